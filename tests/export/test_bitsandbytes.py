"""bitsandbytes artifacts: byte for byte what transformers writes, and loaded by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.export import bitsandbytes as exporter
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint
from compressor.quantize.bitsandbytes import BitsAndBytes, BitsAndBytesOptions, iterate_tensors
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests import tiny

OPTIONS: list[dict[str, Any]] = [
    {"quant_type": "nf4"},
    {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"},
    {"quant_type": "fp4"},
    {"quant_type": "int8"},
    {"quant_type": "int8", "threshold": 3.0},
]


def source(tmp_path: Path, arch: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model stored in a dtype."""
    from transformers import AutoModelForCausalLM

    path = tiny.build(arch, tmp_path / "model")
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(path)
    return path


def make(tmp_path: Path, model: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """(artifact, facts of the quantization)."""
    ignore = options.pop("ignore", ())
    one = BitsAndBytes(BitsAndBytesOptions(**options))
    facts = one.quantize_checkpoint(CausalLM.open(model), tmp_path / "codes", ignore=ignore)
    exporter.export(
        model, iterate_tensors(tmp_path / "codes"), facts["settings"],
        {"tool": "compressor"}, tmp_path / "artifact",
    )  # fmt: skip
    return tmp_path / "artifact", facts


def plain_kernels(model: Any) -> Any:
    """Without the AVX512 kernels, which compute in bfloat16 whatever was asked for."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bytes_are_those_that_transformers_writes(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = source(tmp_path, "llama", dtype)
    artifact, facts = make(tmp_path, model, **options)
    theirs = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=BitsAndBytesConfig(**facts["settings"]), dtype="auto"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    expected = (tmp_path / "theirs" / "model.safetensors").read_bytes()
    assert (artifact / "model.safetensors").read_bytes() == expected
    configs = [
        json.loads((directory / "config.json").read_text())["quantization_config"]
        for directory in (artifact, tmp_path / "theirs")
    ]
    assert configs[0] == configs[1]
    assert configs[0].get("llm_int8_threshold") == (options.get("threshold") or 6.0)


@pytest.mark.parametrize("options", [*OPTIONS, {"blocksize": 128}], ids=str)
def test_the_evaluated_model_is_the_one_that_is_served(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = source(tmp_path, "llama")
    artifact, facts = make(tmp_path, model, **options)
    served = plain_kernels(exporter.load_model(artifact))
    stage = StoredStage("key", tmp_path / "codes", {"result": facts})
    evaluated = quantized_model(model, stage, "cpu")
    ids = torch.arange(5, 25).unsqueeze(0)
    tolerance = 2e-2 if options.get("compute_dtype") else 1e-5  # that dtype's rounding
    with torch.no_grad():
        expected, got = served(ids).logits, evaluated(ids).logits
        whole = CausalLM.open(model).load_full(torch.float32)(ids).logits
    assert float((got - expected).norm() / expected.norm()) < tolerance
    assert 1e-3 < float((got - whole).norm() / whole.norm()) < 0.5


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize(
    "arch", ["mixtral", "qwen2_moe", "qwen3_moe", "phi3", "gemma2", "gpt_neox", "opt", "qwen2"]
)
def test_other_layouts_load_in_transformers(tmp_path: Path, arch: str, quant_type: str) -> None:
    import bitsandbytes

    model = source(tmp_path, arch)
    artifact, facts = make(
        tmp_path, model, quant_type=quant_type, ignore=[r".*\.0\..*(o|out)_proj"]
    )
    served = plain_kernels(exporter.load_model(artifact))
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    loaded = {path for path, module in served.named_modules() if isinstance(module, kinds)}
    opened = CausalLM.open(model)
    paths = {ref.name: ref.path for i in range(2) for ref in opened.linears(i)}
    assert loaded == {paths[name] for name, _ in iterate_tensors(tmp_path / "codes")}
    stage = StoredStage("key", tmp_path / "codes", {"result": facts})
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        expected = quantized_model(model, stage, "cpu")(ids).logits
        got = served(ids).logits
    assert float((got - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("rows", [128, 80])  # 80 do not fill the AVX512 kernel's blocks
def test_served_with_the_librarys_kernels(
    tmp_path: Path, quant_type: str, dtype: torch.dtype, rows: int
) -> None:
    model = tiny.build("llama", tmp_path / "model", intermediate_size=rows)
    artifact, _ = make(tmp_path, model, quant_type=quant_type)
    served = exporter.load_model(artifact, dtype=dtype)
    names = {m.kernel_name for m in served.modules() if hasattr(m, "kernel_name")}
    assert names and all(name.startswith(f"bitsandbytes_{quant_type}") for name in names)
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.inference_mode():
        got = served(ids).logits.float()
        expected = plain_kernels(exporter.load_model(artifact))(ids).logits
    assert float((got - expected).norm() / expected.norm()) < 5e-2


def test_export_is_complete_and_deterministic(tmp_path: Path) -> None:
    model = source(tmp_path, "llama")
    (model / "LICENSE").write_text("terms")
    artifact, facts = make(tmp_path, model)
    present = {p.name for p in artifact.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "compression.json"} <= present
    assert {"generation_config.json", "LICENSE", "SHA256SUMS"} <= present
    again = tmp_path / "again"
    exporter.export(
        model, iterate_tensors(tmp_path / "codes"), facts["settings"],
        {"tool": "compressor"}, again,
    )  # fmt: skip
    assert (again / "SHA256SUMS").read_text() == (artifact / "SHA256SUMS").read_text()
    names = Checkpoint(artifact).names
    assert "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in names
    assert "model.embed_tokens.weight" in names and "model.norm.weight" in names
