"""Shapes read off checkpoint headers against the modules that are built from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint
from compressor.models.shapes import LinearShape, fused_experts, linear_shapes
from tests import tiny


def headers(directory: Path) -> list[tuple[str, tuple[int, ...]]]:
    checkpoint = Checkpoint(directory)
    return [(name, checkpoint.shape(name)) for name in checkpoint.names]


@pytest.mark.parametrize("arch", ["llama", "phi3", "opt", "gpt_neox", "mixtral", "qwen2_moe"])
def test_every_linear_of_a_block_is_counted_and_nothing_else(tmp_path: Path, arch: str) -> None:
    """What engines fuse is summed, so outputs must add up to those of the modules."""
    tiny.build(arch, tmp_path, layers=1)
    refs = CausalLM.open(tmp_path).linears(0)
    # Distinct shapes only are given: widths of inputs, with experts apart from the others.
    found = {(s.in_features, s.expert) for s in linear_shapes(headers(tmp_path))}
    assert found == {(r.module.in_features, ".experts." in r.name) for r in refs}
    whole = [name for name, _ in headers(tmp_path) if ".layers.0." in name]
    for shape in linear_shapes([(n, s) for n, s in headers(tmp_path) if n in whole]):
        same = [
            r.module.out_features
            for r in refs
            if r.module.in_features == shape.in_features and (".experts." in r.name) == shape.expert
        ]
        assert shape.out_features <= sum(same)


def test_fused_siblings_are_one_matrix(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    shapes = {s.name: (s.out_features, s.in_features) for s in linear_shapes(headers(tmp_path))}
    assert shapes == {
        "model.layers.0.mlp.down_proj": (64, 128),
        "model.layers.0.mlp.gate_up": (256, 64),
        "model.layers.0.self_attn.o_proj": (64, 64),
        "model.layers.0.self_attn.qkv": (64 + 32 + 32, 64),
    }


def test_gguf_names_are_understood() -> None:
    tensors = [
        ("token_embd.weight", (384, 64)),
        ("blk.0.attn_q.weight", (64, 64)),
        ("blk.0.attn_k.weight", (32, 64)),
        ("blk.0.attn_v.weight", (32, 64)),
        ("blk.0.ffn_gate.weight", (96, 64)),
        ("blk.0.ffn_up.weight", (96, 64)),
        ("blk.0.ffn_gate_inp.weight", (4, 64)),
        ("blk.0.attn_norm.weight", (64,)),
    ]
    assert linear_shapes(tensors) == (
        LinearShape("blk.0.qkv", 128, 64),
        LinearShape("blk.0.gate_up", 192, 64),
    )


def test_experts_in_three_dimensions_are_found() -> None:
    tensors = [("model.layers.0.mlp.experts.down_proj", (4, 64, 32)), ("conv1d.weight", (4, 1, 3))]
    assert fused_experts(tensors) == ("model.layers.0.mlp.experts.down_proj",)
    assert linear_shapes(tensors) == ()
