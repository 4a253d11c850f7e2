"""Runs of the command line on a tiny model, in a directory of their own."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.zygote import Zygote

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(__file__).parent.parent),
}
RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "model"},
    "calibration": {"source": "builtin:calibration", "samples": 8, "length": 64},
    "variants": {
        "int8": {"quantize": [{"gptq": {"scheme": "W8A8"}}]},
        "int4-rtn": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]},
        "int4": {"quantize": [{"gptq": {"scheme": "W4A16", "group_size": 32}}]},
    },
    "evaluate": {
        "texts": [{"name": "novel", "source": "builtin:novel", "max_tokens": 512}],
        "length": 64,
    },
    "export": ["compressed-tensors"],
}  # fmt: skip


def write(project: Path, recipe: dict[str, Any]) -> Path:
    path = project / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@functools.cache
def _zygote() -> Zygote:
    made = Zygote(ENVIRONMENT)
    atexit.register(made.close)
    return made


def compress(
    project: Path, *arguments: str, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """What ``compress ARGUMENTS`` (``run recipe.yaml``) does in a directory.

    Args:
        project: the directory.
        arguments: of the command line.
        fresh: in an interpreter of its own, not in a fork of one that has everything imported.
        environment: variables; with ``fresh`` also those that libraries read when imported.
    """
    arguments = arguments or ("run", "recipe.yaml")
    command = [sys.executable, "-m", "compressor", *arguments]
    if fresh:
        return subprocess.run(
            command, cwd=project, env=ENVIRONMENT | environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        errors = Path(scratch) / "errors"
        code, printed = _zygote().run(
            project, *arguments, output=Path(scratch) / "output", errors=errors,
            environment=environment,
        )  # fmt: skip
        return subprocess.CompletedProcess(command, code, printed, errors.read_text())


def artifacts(project: Path) -> dict[str, str]:
    (run,) = (project / "runs" / "recipe").iterdir()
    files = sorted(p for p in (run / "artifacts").rglob("*") if p.is_file())
    assert files
    return {
        p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def report(project: Path) -> dict[str, Any]:
    newest = max((project / "runs" / "recipe").iterdir(), key=lambda p: p.stat().st_mtime)
    return json.loads((newest / "report" / "report.json").read_text())


def completed(project: Path, recipe: dict[str, Any], **environment: str) -> dict[str, Any]:
    """The report of a recipe that is run to its end without a failed variant."""
    write(project, recipe)
    done = compress(project, **environment)
    assert done.returncode == 0, done.stderr
    made = report(project)
    assert all(v["status"] == "ok" for v in made["variants"])
    return made
