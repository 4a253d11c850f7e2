"""Budgets, and which linears must agree."""

from __future__ import annotations

import pytest

from compressor.errors import RunError
from compressor.quantize.precision import allocate_precision
from compressor.quantize.sensitivity import Sensitivity


def linear(name: str, group: str, loss: float) -> Sensitivity:
    return Sensitivity(
        name,
        group,
        1000,
        {"W4A16": loss, "W8A16": loss / 200},
        {"W4A16": 4.25, "W8A16": 8.25},
    )


LAYERS = [
    linear("0.q_proj", "0.qkv", 0.01),
    linear("0.k_proj", "0.qkv", 0.09),
    linear("0.o_proj", "0.o", 0.02),
    linear("0.down_proj", "0.down", 0.3),
]


def test_bits_go_where_they_are_missed() -> None:
    found = allocate_precision(LAYERS, mean_bits=5)
    assert found.schemes == {
        "0.q_proj": "W4A16",
        "0.k_proj": "W4A16",
        "0.o_proj": "W4A16",
        "0.down_proj": "W8A16",
    }
    assert found.mean_bits == 5 and found.stored_bits == 5.25
    assert found.predicted_loss == pytest.approx(0.01 + 0.09 + 0.02 + 0.3 / 200)


def test_fused_linears_agree() -> None:
    found = allocate_precision(LAYERS, mean_bits=7)
    assert found.schemes["0.q_proj"] == found.schemes["0.k_proj"] == "W8A16"
    experts = [
        linear(f"0.experts.{i}.{part}_proj", f"0.experts.{i}.{part}", 0.01 + i / 10)
        for i in range(4)
        for part in ("gate", "down")
    ]
    for budget in (5, 6, 7):
        schemes = allocate_precision([*experts, *LAYERS], mean_bits=budget).schemes
        assert len({schemes[one.name] for one in experts}) == 1


def test_other_budgets() -> None:
    small = allocate_precision(LAYERS, most_bytes=1000 * (3 * 4.25 + 8.25) / 8)
    assert small.schemes["0.down_proj"] == "W8A16" and small.stored_bits == 5.25
    loose = allocate_precision(LAYERS, most_loss=0.5)
    assert set(loose.schemes.values()) == {"W4A16"}
    tight = allocate_precision(LAYERS, most_loss=0.13)
    assert tight.predicted_loss <= 0.13 and tight.mean_bits == 5
    with pytest.raises(RunError, match="no allocation keeps within"):
        allocate_precision(LAYERS, mean_bits=3)


def test_ignored_linears_take_no_part() -> None:
    found = allocate_precision(LAYERS, mean_bits=5, ignore=[r"0\.down_proj"])
    assert "0.down_proj" not in found.schemes
