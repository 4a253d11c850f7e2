"""Runs that meet faults, and what they leave behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from compressor.store import Store
from tests.projects import ENVIRONMENT

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
        output = directory / "printed"
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


def killed(code: int) -> bool:
    """Whether a run ended by SIGKILL."""
    return code == -signal.SIGKILL
