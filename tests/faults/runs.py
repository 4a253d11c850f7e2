"""Runs that meet faults, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.store import Store
from tests.projects import ENVIRONMENT

NOBODY = 65534  # a user that owns nothing
TIMED = ("measure", "accept", "served")  # kinds of stages whose files hold times


class Zygote:
    """Forks runs off a process that has everything imported."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
            env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "COMPRESSOR_CHECKPOINT_SECONDS": "0"},
        )

    def run(self, directory: Path, *arguments: str, **job: Any) -> tuple[int, str]:
        """(exit code, what it printed) of ``compress ARGUMENTS`` in a directory; negative codes are
        signals. See `zygote` for what a job may hold."""
        assert self.process.stdin is not None and self.process.stdout is not None
        output = directory / f"printed-{self.process.pid}"
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


def stored(directory: Path) -> dict[str, dict[str, str]]:
    """SHA-256 by file of every finished stage, by key, but for files of times. Each is compared
    with its manifest: RunError where a stage is taken for whole that is not."""
    store, found = Store(directory / ".compressor"), {}
    for path in sorted(store.root.glob("objects/*/*")):
        stage = store.get(path.name)
        assert stage is not None, f"{path} has no manifest"
        stage.verify()
        listed = {entry["path"] for entry in stage.manifest["files"]} | {"stage.json"}
        there = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert there == listed, f"{path} holds {there ^ listed}"
        if stage.manifest["kind"] not in TIMED:
            found[stage.key] = {e["path"]: e["sha256"] for e in stage.manifest["files"]}
    return found


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of that size in a new directory; whether one may be mounted here."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
    may = shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
    try:
        yield bool(may)
    finally:
        if may:
            subprocess.run(["umount", "-l", str(place)], check=True)


def let_nobody_read(directory: Path) -> None:
    """Let who owns nothing read a project."""
    for path in (directory, *directory.parents):
        path.chmod(path.stat().st_mode | 0o005)


def killed(code: int) -> bool:
    """Whether a run ended by SIGKILL."""
    return code == -signal.SIGKILL
