"""A vLLM server as a child process: start, wait until healthy, stop.

It runs in an environment of its own (see `compressor.doctor.vllm_python`) and is spoken to over its
OpenAI-compatible address, so neither its torch nor its transformers has to match ours.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from compressor.errors import RunError

LOG_TAIL_LINES = 25
STOP_SECONDS = 10.0


class VllmServer:
    """``with VllmServer(...) as server:`` serves a model directory on a free loopback port.

    Args:
        python: interpreter of an environment with vLLM.
        model: directory to serve.
        log: file that receives the server's output.
        flags: further flags of ``vllm.entrypoints.openai.api_server``.
        start_timeout: seconds to wait for health; the first start compiles.
        variables: further variables of its environment.

    Raises:
        RunError: the server died or did not become healthy; with the tail of its log.
    """

    def __init__(
        self,
        python: Path,
        model: Path,
        log: Path,
        flags: Sequence[str] = (),
        start_timeout: float = 600.0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.python = python
        self.model = model
        self.log = log
        self.flags = tuple(flags)
        self.start_timeout = start_timeout
        self.variables = dict(variables or {})
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        return [
            str(self.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--served-model-name", "model",
            "--host", "127.0.0.1", "--port", str(self.port), *self.flags,
        ]  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> VllmServer:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
            "VLLM_NO_USAGE_STATS": "1",
        }
        environment.pop("PYTHONPATH", None)
        environment |= self.variables
        try:
            with open(self.log, "wb") as output, _interrupt_held():
                self.process = subprocess.Popen(
                    self.command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that its workers are stopped with it
                )
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self._failed(f"vLLM ended with code {self.process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise self._failed(f"vLLM was not healthy after {self.start_timeout:.0f} s")

    def _failed(self, what: str) -> RunError:
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return RunError(
            what, where=str(self.model), fix="read the end of its log:\n    " + "\n    ".join(tail)
        )

    def complete(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy token ids that follow a prompt of token ids."""
        body = {
            "model": "model",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return self.post("/v1/completions", body)["choices"][0]["token_ids"]

    def post(self, path: str, body: dict[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        """POST JSON and read the JSON answer."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            detail = error.read().decode("utf-8", "replace")[:500]
            raise RunError(f"vLLM answered {error.code}: {detail}", where=path) from error
        except (OSError, http.client.HTTPException) as error:  # it died, or hangs
            raise self._failed(f"vLLM did not answer {path} ({type(error).__name__})") from error

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
def _interrupt_held() -> Iterator[None]:
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
