"""What all engines share that are a server process of this machine: start, health, log, stop.

The server listens on a free port of the loopback address only, in a session of its own, so that
its workers end with it. Its output goes to a log file, whose end is part of every error.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from compressor.errors import RunError
from compressor.measure.client import HttpClient

HOST = "127.0.0.1"
LOG_TAIL_LINES = 25
STOP_SECONDS = 10.0
_HEALTH_SECONDS = 5.0
_POLL_SECONDS = 0.2
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_CAUSE = re.compile(r"\b\w*(?:Error|Exception): \S.*")

# A proxy from the environment must not stand between us and our own child.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerProcess:
    """Base of engines that run as a child process: a subclass says with which command.

    ``with Server(...) as server:`` starts and stops it; so do `start` and `stop`.

    Args:
        model: what is served; names the server in errors.
        log: file that receives the server's output; kept.
        flags: further arguments of the command.
        start_timeout: longest wait for health [s].
        variables: further variables of its environment.
        stall_s, total_s: limits of a request of `client` [s]; see `HttpClient`.

    Attributes:
        name: the engine's name in reports.
        title: its name in messages.
        health: path that answers 200 when it can serve.
        port: of this start; chosen anew at each.
        process: the child while it runs.
    """

    name = ""
    title = ""
    health = "/health"

    def __init__(
        self,
        model: Path,
        log: Path,
        flags: Sequence[str] = (),
        start_timeout: float = 600.0,
        variables: Mapping[str, str] | None = None,
        *,
        stall_s: float = 60.0,
        total_s: float = 600.0,
    ) -> None:
        self.model = model
        self.log = log
        self.flags = tuple(flags)
        self.start_timeout = start_timeout
        self.variables = dict(variables or {})
        self.stall_s, self.total_s = stall_s, total_s
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return f"http://{HOST}:{self.port}"

    def environment(self) -> dict[str, str]:
        """Variables that are set for it on top of this process's; `variables` win."""
        return {}

    def client(self) -> HttpClient:
        """A new client, for the event loop that is running."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Facts about the started server; a subclass adds version, dtype and kernel."""
        return {
            "engine": self.name,
            "model": str(self.model),
            "address": self.url,
            "port": self.port,
            "pid": self.process.pid if self.process else None,
            "command": self.command,
            "flags": list(self.flags),
            "environment": {
                key: "***" if _SECRET.search(key) else value
                for key, value in (self.environment() | self.variables).items()
            },
            "stall_s": self.stall_s,
            "total_s": self.total_s,
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until healthy; does nothing when it runs already.

        Raises RunError, with the tail of the log, when it cannot be started, ends, or is not
        healthy in `start_timeout` seconds. No process is left behind then.
        """
        if self.process is not None:
            return
        self.port = free_port()
        environment = os.environ | self.environment() | self.variables
        if "PYTHONPATH" not in self.variables:
            environment.pop("PYTHONPATH", None)  # ours; another environment breaks on it
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "wb") as output, interrupt_held():
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that its workers are stopped with it
                )
            self._wait()
        except OSError as error:  # no such program, or not one
            self.stop()
            raise RunError(
                f"{self.title} cannot be started: {error.strerror or error}",
                where=str(error.filename or self.command[0]),
                fix="check that the program exists and may be run, and that the log can be written",
            ) from error
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self.failed(f"{self.title} ended with code {self.process.returncode}")
            if self.healthy():
                return
            time.sleep(_POLL_SECONDS)
        raise self.failed(f"{self.title} was not healthy after {self.start_timeout:.0f} s")

    def healthy(self) -> bool:
        """Whether it runs and answers its health path with 200 now."""
        if self.process is None or self.process.poll() is not None:
            return False
        try:
            with _OPENER.open(self.url + self.health, timeout=_HEALTH_SECONDS) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def failed(self, what: str) -> RunError:
        """An error that tells the first error in the log, and shows its end."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            text = f"(the log cannot be read: {error})"
        # The last one may only say "see root cause above" (vLLM's parent process).
        if cause := _CAUSE.search(text):
            what = f"{what}: {cause[0].rstrip()[:300]}"
        tail = text.splitlines()[-LOG_TAIL_LINES:]
        return RunError(
            what, where=str(self.model), fix="read the end of its log:\n    " + "\n    ".join(tail)
        )

    def get(self, path: str, timeout: float = 10.0) -> Any:
        """GET and read the JSON answer; RunError when there is none."""
        return self._ask(urllib.request.Request(self.url + path), timeout)

    def get_text(self, path: str, timeout: float = 10.0) -> str:
        """GET and read an answer in plain text; RunError when there is none."""
        request = urllib.request.Request(self.url + path)
        return self._ask(request, timeout, lambda answer: answer.read().decode("utf-8", "replace"))

    def post(self, path: str, body: dict[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        """POST JSON and read the JSON answer; RunError when there is none."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return self._ask(request, timeout)

    def _ask(
        self,
        request: urllib.request.Request,
        timeout: float,
        read: Callable[[Any], Any] = json.load,
    ) -> Any:
        path = request.selector
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                return read(answer)
        except urllib.error.HTTPError as error:
            detail = error.read().decode("utf-8", "replace")[:500]
            raise RunError(f"{self.title} answered {error.code}: {detail}", where=path) from error
        except ValueError as error:
            raise RunError(f"{self.title} answered no JSON: {error}", where=path) from error
        except (OSError, http.client.HTTPException) as error:  # it died, or hangs
            kind = type(error).__name__
            raise self.failed(f"{self.title} did not answer {path} ({kind})") from error

    def stop(self) -> None:
        """End the server and its workers: asked first, killed after `STOP_SECONDS`."""
        if self.process is None:
            return
        for signal_ in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, signal_)
                self.process.wait(STOP_SECONDS)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        self.process = None


@contextlib.contextmanager
def interrupt_held() -> Iterator[None]:
    """Let Ctrl-C take effect only at the end: a child is never started and then not known of."""
    if threading.current_thread() is not threading.main_thread():
        yield  # the interrupt goes to the main thread only
        return
    held: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]
