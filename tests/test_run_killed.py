"""A run that was killed goes on where it was, to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.projects import ENVIRONMENT, RECIPE, artifacts, compress, write


@pytest.mark.parametrize("block", [1, 3])
def test_killed_run_resumes_to_the_same_bytes(project: Path, tmp_path: Path, block: int) -> None:
    whole = tmp_path / "whole"
    tiny.build("llama", whole / "model", layers=5)
    (project / "model").rename(project / "unused")
    tiny.build("llama", project / "model", layers=5)
    recipe = {k: v for k, v in RECIPE.items() if k != "evaluate"}
    recipe["variants"] = {"int4": RECIPE["variants"]["int4"]}
    for directory in (whole, project):
        write(directory, recipe)
    assert compress(whole, fresh=True, PYTHONHASHSEED="1").returncode == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", "run", "recipe.yaml"],
        cwd=project,
        env=ENVIRONMENT | {"COMPRESSOR_CHECKPOINT_SECONDS": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Kill as soon as the block before has been written, somewhere in the middle of the next one.
    pattern = f"partial/*/block-{block:05d}.safetensors"
    deadline = time.monotonic() + 120
    while not list((project / ".compressor").glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, "the run was not caught"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((project / "runs").glob("*/*/artifacts"))

    done = compress(project)
    assert done.returncode == 0, done.stderr
    assert artifacts(project) == artifacts(whole)
    manifests = [
        json.loads(p.read_text()) for p in project.glob(".compressor/objects/*/*/stage.json")
    ]
    (resumed,) = [m["result"]["resumed_at_block"] for m in manifests if m["kind"] == "quantize"]
    assert resumed >= block
