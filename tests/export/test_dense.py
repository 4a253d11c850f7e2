"""Plain safetensors: the dequantized model, sharded, loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.export import dense
from compressor.models import checkpoint
from compressor.models.checkpoint import Checkpoint
from compressor.quantize.codes import iterate_quantized
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests.export.test_gptq import quantized


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "qwen3_moe", "gemma2"])
def test_transformers_computes_what_the_codes_do(tmp_path: Path, arch: str) -> None:
    quantized(tmp_path, arch, scheme="W4A16", group_size=16, symmetric=False)
    codes = iterate_quantized(tmp_path / "codes")
    notes = dense.export(tmp_path / "model", codes, {}, tmp_path / "out")
    assert notes == []  # the model is in float32
    stage = StoredStage("", tmp_path / "codes", {"result": {}})
    ids = torch.arange(5, 25).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = quantized_model(tmp_path / "model", stage, "cpu")(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_one_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be written never exceeds a shard and the tensor that did not fit."""
    quantized(tmp_path, "llama", scheme="W8A16")
    most = 0
    add = checkpoint.TensorWriter.add

    def watched(self: Any, name: str, tensor: torch.Tensor) -> None:
        nonlocal most
        add(self, name, tensor)
        most = max(most, self._bytes)

    monkeypatch.setattr(checkpoint.TensorWriter, "add", watched)
    limit, out = 60_000, tmp_path / "out"
    dense.export(
        tmp_path / "model", iterate_quantized(tmp_path / "codes"), {}, out, max_shard_bytes=limit
    )
    source = Checkpoint(tmp_path / "model")
    largest = max(4 * source.numel(name) for name in source.names)
    assert most <= max(limit, largest)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == 4 * sum(source.numel(n) for n in source.names)
    assert Checkpoint(out).names == source.names


def test_rounding_is_told(tmp_path: Path) -> None:
    quantized(tmp_path, "llama", scheme="W8A8")
    codes = list(iterate_quantized(tmp_path / "codes"))
    notes = dense.export(tmp_path / "model", codes, {}, tmp_path / "out", dtype="bfloat16")
    assert any("activations" in note for note in notes)
    assert any("rounded" in note for note in notes)
    for name, tensor, _ in codes:
        stored = Checkpoint(tmp_path / "out").tensor(f"{name}.weight")
        assert torch.equal(stored, tensor.dequantize().to(torch.bfloat16))
