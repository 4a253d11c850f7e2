"""Predicted losses against the divergence that quantizing one linear really causes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.models.architecture import CausalLM
from compressor.numerics import grid
from compressor.numerics.scheme import Scheme
from compressor.quantize.sensitivity import measure_sensitivity, stored_bits
from tests import tiny

TOKENS = np.random.default_rng(0).integers(4, 300, (8, 32)).astype(np.int32)
SCHEMES = [Scheme.parse("W2A16", 16), Scheme.parse("W4A16", 16), Scheme.parse("W8A16", 16)]


def divergence(model: Any, path: str, scheme: Scheme) -> float:
    """Mean KL divergence (nats per token) with one linear rounded to nearest."""
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    linear = model.get_submodule(path)
    kept = linear.weight.detach().clone()
    with torch.no_grad():
        before = torch.log_softmax(model(ids).logits.double(), -1)
        scale, zero = grid.fit_grid(kept, scheme.weights, "mse")
        linear.weight.copy_(grid.quantize(kept, scale, zero, scheme.weights).dequantize())
        after = torch.log_softmax(model(ids).logits.double(), -1)
        linear.weight.copy_(kept)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox", "qwen3_moe"])
def test_the_prediction_follows_the_measured_divergence(tmp_path: Path, arch: str) -> None:
    tiny.build(arch, tmp_path / "model")
    opened = CausalLM.open(tmp_path / "model")
    found = measure_sensitivity(opened, SCHEMES, TOKENS, tmp_path, batch_size=3)
    paths = {r.name: r.path for i in range(len(opened.blocks)) for r in opened.linears(i)}
    assert [one.name for one in found] == list(paths)
    assert not list(tmp_path.glob("*.tmp"))
    whole = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    predicted, measured = [], []
    for one in found[:: max(1, len(found) // 12)]:
        assert one.loss["W2A16"] > one.loss["W4A16"] > one.loss["W8A16"] >= 0
        predicted.append(one.loss["W4A16"])
        measured.append(divergence(whole, paths[one.name], SCHEMES[1]))
    order = np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(measured)))[0, 1]
    assert order > 0.6
    assert 0.3 < sum(predicted) / sum(measured) < 3


def test_equal_seeds_give_equal_figures(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    first, second = (
        measure_sensitivity(CausalLM.open(tmp_path / "model"), SCHEMES, TOKENS, tmp_path, seed=seed)
        for seed in (3, 3)
    )
    assert first == second


def test_a_scheme_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    found = measure_sensitivity(
        CausalLM.open(tmp_path / "model"),
        [SCHEMES[1], Scheme.parse("W8A16", 128)],
        TOKENS,
        tmp_path,
    )
    assert {tuple(one.loss) for one in found} == {("W4A16",), ("W4A16", "W8A16")}


def test_stored_bits_count_scales_and_zero_points() -> None:
    assert stored_bits(Scheme.parse("W4A16", 64), 128) == 4.25
    assert stored_bits(Scheme.parse("W4A16", 64, symmetric=False), 128) == 4.3125
    assert stored_bits(Scheme.parse("W8A16"), 128) == 8.125
