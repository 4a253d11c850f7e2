"""Runs of the command line without the seconds that a new interpreter takes to import everything,
and which meet a fault where they are told to.

`Zygote` starts ``python -m tests.zygote``, which imports everything once and forks for each job.
Jobs and what became of them are lines of JSON on its stdin and stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What makes a file appear under its name: the places where a run can be half done.
PUBLISHING = ("rename", "replace", "link")


class Zygote:
    """Forks runs off a process that has everything imported.

    Args:
        environment: of all of them; what libraries read when they are imported is settled by it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=environment,
        )

    def run(self, directory: Path, *arguments: str, **job: Any) -> tuple[int, str]:
        """(exit code, what it printed) of ``compress ARGUMENTS`` in a directory; negative codes are
        signals.

        Args:
            directory: where it runs.
            arguments: ``run recipe.yaml`` where there are none.
            job: ``output``, a file for what it prints; ``errors``, one for what it prints as
                errors, which are among the rest else; ``environment``, variables beside those of
                all; ``uid``, who runs it; ``after`` so many seconds a ``signal`` (SIGKILL);
                ``limit`` [s], after which it is killed; ``points``, ``calls``, ``memory`` and
                ``clock``: see the functions below.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        output = job.pop("output", directory / f"printed-{self.process.pid}")
        request = {
            "directory": str(directory),
            "output": str(output),
            "arguments": list(arguments or ("run", "recipe.yaml")),
            **{key: str(value) if isinstance(value, Path) else value for key, value in job.items()},
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the zygote died"
        return json.loads(answer)["code"], output.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def main() -> None:
    import compressor.cli
    import compressor.evaluate.lm
    import compressor.evaluate.tasks
    import compressor.measure.runner
    import compressor.quantize.driver
    import compressor.report.write
    import compressor.speculate.pipeline
    import compressor.stages
    import compressor.verify  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        sys.stdout.flush()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _child(job, writing)
        os.close(writing)
        code = _wait(pid, job)
        with open(reading, encoding="utf-8") as names:
            _import(names.read().split())
        print(json.dumps({"code": code}), flush=True)


def _import(names: list[str]) -> None:
    """What a run that ended had imported besides, once for all that follow."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _wait(pid: int, job: dict[str, Any]) -> int:
    """Exit code of the child, negative for a signal; sends one where the job says when."""
    started = time.monotonic()
    left = [float(job["after"])] if "after" in job else []
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if left and time.monotonic() - started >= left[0]:
            left.clear()
            os.kill(pid, job.get("signal", signal.SIGKILL))
        if time.monotonic() - started > job.get("limit", 300):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _child(job: dict[str, Any], names: int) -> None:
    from compressor.cli import main as command_line

    before = set(sys.modules)
    code: Any = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        os.chdir(job["directory"])
        os.environ.update(job.get("environment", {}))
        output = _opened(job["output"])
        errors = _opened(job["errors"]) if "errors" in job else output
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if "uid" in job:
            os.setgroups([])
            os.setgid(job["uid"])
            os.setuid(job["uid"])
        if "points" in job:
            _die_at_a_new_point(Path(job["points"]), job.get("calls", PUBLISHING))
        if "memory" in job:
            _limit_memory(job["memory"])
        if "clock" in job:
            _jump(job["clock"])
        sys.argv = ["compress", *job["arguments"]]
        command_line()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            new = [name for name in list(sys.modules) if name not in before]
            os.write(names, "\n".join(new).encode()[: 1 << 15])  # a pipe holds more than that
        os._exit(code if isinstance(code, int) else int(code is not None))


def _opened(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _die_at_a_new_point(seen: Path, calls: Sequence[str]) -> None:
    """SIGKILL before, and in another run after, the first publishing of a file, by one of these
    calls, that no earlier run died at. ``seen`` holds those points, a line each."""
    known = set(seen.read_text().splitlines()) if seen.exists() else set()

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(source: Any, target: Any, *rest: Any, **named: Any) -> Any:
            place = os.path.relpath(os.fspath(target))
            for when in ("before", "after"):
                if when == "after":
                    made = call(source, target, *rest, **named)
                point = f"{when} {name} {place}"
                if point not in known:
                    with open(seen, "a", encoding="utf-8") as file:
                        file.write(point + "\n")
                    os.kill(os.getpid(), signal.SIGKILL)
            return made

        return wrapped

    for name in calls:
        setattr(os, name, wrap(name, getattr(os, name)))


def _limit_memory(megabytes: int) -> None:
    """Allocations of so much more than is mapped by now fail."""
    import psutil

    most = psutil.Process().memory_info().vms + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _jump(step: float) -> None:
    """The wall clock goes by so many seconds more (or less) at each look."""
    real, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return real() + step * looks[0]

    time.time = jumping


if __name__ == "__main__":
    main()
