"""Runs that meet faults, and what they leave behind."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from compressor.store import Store
from tests.projects import ENVIRONMENT
from tests.zygote import Zygote

NOBODY = 65534  # a user that owns nothing
TIMED = ("measure", "accept", "served")  # kinds of stages whose files hold times


def new_zygote() -> Zygote:
    """One whose runs leave a checkpoint at every occasion."""
    return Zygote(ENVIRONMENT | {"OMP_NUM_THREADS": "1", "COMPRESSOR_CHECKPOINT_SECONDS": "0"})


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
