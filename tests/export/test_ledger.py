"""Every tensor of the source accounted for in what was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.export import compressed_tensors as ct
from compressor.export.ledger import TensorLedger, compare_tensors
from compressor.models.architecture import FUSED_EXPERTS, CausalLM
from compressor.models.checkpoint import Checkpoint
from compressor.quantize import registry
from compressor.quantize.codes import iterate_quantized, read_layers
from compressor.quantize.driver import quantize_model
from tests import tiny


def add_tensors(directory: Path, extra: dict[str, torch.Tensor]) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})


def exported(tmp_path: Path, **options: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Quantize and export tmp_path/model; (scheme by linear, facts)."""
    cls = registry.get("rtn")
    algorithm = cls(cls.Options(**options), torch.float32)
    facts = quantize_model(CausalLM.open(tmp_path / "model"), algorithm, tmp_path / "codes")
    ignore = [entry["name"] for entry in facts["coverage"]["skipped"]]
    quantized = iterate_quantized(tmp_path / "codes")
    ct.export(tmp_path / "model", quantized, ignore, {}, tmp_path / "artifact")
    layers = [layer for layer in read_layers(tmp_path / "codes") if "scheme" in layer]
    return {layer["name"]: layer["scheme"]["name"] for layer in layers}, facts


@pytest.mark.parametrize("options", [{"scheme": "W8A8"}, {"scheme": "W4A16", "group_size": 32}])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "mixtral"])
def test_an_export_is_whole_and_its_bytes_are_those_of_the_file(
    tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    tiny.build(arch, tmp_path / "model")
    schemes, facts = exported(tmp_path, **options)
    artifact = Checkpoint(tmp_path / "artifact")
    ledger = compare_tensors(Checkpoint(tmp_path / "model"), artifact, schemes)
    assert (ledger.missing, ledger.added, ledger.unread) == ([], [], [])
    assert set(ledger.bytes_by_scheme) == {options["scheme"], "float32"}
    assert sum(ledger.bytes_by_scheme.values()) == artifact.total_bytes
    if options["scheme"] == "W4A16":  # codes of 4 bits, a float32 scale a group, two int64
        linears = len(schemes)
        codes = facts["coverage"]["quantized_parameters"]
        assert ledger.bytes_by_scheme["W4A16"] == codes // 2 + 4 * codes // 32 + 16 * linears
    # All matrices of the blocks but the routers.
    routers = 2 * tiny.EXPERTS * tiny.HIDDEN if arch == "mixtral" else 0
    coverage = facts["coverage"]
    assert coverage["block_parameters"] == coverage["quantized_parameters"] + routers


def test_heads_that_no_code_reads_are_carried_over_and_listed(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    head = {"mtp.0.proj.weight": torch.randn(64, 128), "mtp.0.norm.weight": torch.randn(64)}
    add_tensors(tmp_path / "model", head)
    unread = CausalLM.open(tmp_path / "model").unread()
    assert unread == sorted(head)
    schemes, _ = exported(tmp_path, scheme="W8A8")
    artifact = Checkpoint(tmp_path / "artifact")
    ledger = compare_tensors(Checkpoint(tmp_path / "model"), artifact, schemes, unread=unread)
    assert ledger.unread == sorted(head) and not ledger.missing
    assert all(torch.equal(artifact.tensor(name), value) for name, value in head.items())


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_models_as_transformers_saves_them_are_read_whole(tmp_path: Path, arch: str) -> None:
    assert CausalLM.open(tiny.build(arch, tmp_path)).unread() == []


def write(directory: Path, **tensors: torch.Tensor) -> Checkpoint:
    directory.mkdir()
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(named, directory / "model.safetensors")
    return Checkpoint(directory)


def test_what_is_missing_or_added_is_named(tmp_path: Path) -> None:
    weight = torch.zeros(4, 8)
    source = write(
        tmp_path / "source",
        a__weight=weight, a__bias=weight[0].clone(), b__weight=weight.clone(),
        mtp__weight=weight.clone(), norm__weight=weight[0].clone(),
    )  # fmt: skip
    artifact = write(
        tmp_path / "artifact",
        a__weight_packed=torch.zeros(4, 1, dtype=torch.int32),
        a__weight_scale=torch.zeros(4, 1, dtype=torch.bfloat16),
        a__bias=weight[0].clone(),
        b__weight_scale=torch.zeros(4, 1),  # codes forgotten
        norm__weight=weight[0].clone(),
        lm_head__weight=weight.clone().bfloat16(),
        k_scale=torch.zeros(1),
    )
    ledger = compare_tensors(source, artifact, {"a": "W4A16", "b": "W8A8"}, lost=["mtp.1.weight"])
    assert ledger == TensorLedger(
        missing=["b.weight", "mtp.1.weight", "mtp.weight"],
        added=["k_scale", "lm_head.weight"],
        unread=[],
        # a: 4 x int32 + 4 x bfloat16; b's scale; norm, a's bias and k_scale; lm_head
        bytes_by_scheme={"float32": 68, "bfloat16": 64, "W4A16": 24, "W8A8": 16},
    )


def test_fused_experts_are_counted_as_left(tmp_path: Path) -> None:
    """Experts in three dimensions on disk stay as they are, and the facts say how much that is."""
    source = tiny.build("qwen3_moe", tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            [weights.pop(f"{prefix}.{e}.{leaf}.weight") for e in range(tiny.EXPERTS)]
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        fused = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        weights[f"{prefix}.gate_up_proj"] = torch.stack(fused)
        weights[f"{prefix}.down_proj"] = torch.stack(down)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    schemes, facts = exported(tmp_path, scheme="W8A8")
    left = [one for one in facts["coverage"]["skipped"] if one["reason"] == FUSED_EXPERTS]
    assert len(left) == 4
    assert sum(one["parameters"] for one in left) == 2 * tiny.EXPERTS * 3 * 64 * 64
    coverage = facts["coverage"]
    assert coverage["quantized_parameters"] / coverage["block_parameters"] < 0.3
    ledger = compare_tensors(Checkpoint(source), Checkpoint(tmp_path / "artifact"), schemes)
    assert not ledger.missing and not ledger.added
    json.dumps(facts)
