"""Coordinate descent against a plain float64 reference, and its promise never to make it worse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.quantize.coordinate_descent import (
    CoordinateDescent,
    CoordinateDescentOptions,
    _descend,
)
from compressor.quantize.gptq import GPTQ, GPTQOptions
from compressor.quantize.rtn import RTN, SchemeOptions


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=random) @ (mix + torch.eye(columns))
    return weight, 2 / len(inputs) * inputs.T @ inputs


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_pass_is_the_one_of_the_paper(symmetric: bool) -> None:
    """Column by column, in float64, with no blocking and nothing kept between columns."""
    weight, hessian = problem(6, 160, 0)
    options = SchemeOptions(scheme="W3A16", group_size=32, symmetric=symmetric)
    tensor = RTN(options).quantize(weight, hessian).tensor
    value, target, moments = tensor.dequantize().double(), weight.double(), hessian.double()
    codes = tensor.codes.clone()
    for j in range(160):
        slope = (value - target) @ moments[:, j]
        wish = value[:, j] - slope / moments[j, j]
        scale = tensor.scale[:, j // 32].double()
        zero = 0 if tensor.zero_point is None else tensor.zero_point[:, j // 32].double()
        codes[:, j] = (torch.round(wish / scale) + zero).clamp(-4, 3).to(torch.int8)
        value[:, j] = (codes[:, j] - zero) * scale
    made, _ = _descend(weight, tensor, hessian)
    assert (made.codes != codes).float().mean() < 0.01  # near-ties fall either way in float32
    assert (made.codes != tensor.codes).float().mean() > 0.05


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    desc_act=st.booleans(),
    static_groups=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_it_never_gets_worse(
    rows: int, groups: int, bits: int, symmetric: bool, desc_act: bool, static_groups: bool,
    seed: int,
) -> None:  # fmt: skip
    weight, hessian = problem(rows, 16 * groups, seed)
    hessian[3] = hessian[:, 3] = 0  # an input that is never used
    options = GPTQOptions(
        scheme=f"W{bits}A16", group_size=16, symmetric=symmetric, desc_act=desc_act,
        static_groups=static_groups,
    )  # fmt: skip
    first = GPTQ(options).quantize(weight, hessian)
    refined = CoordinateDescent(CoordinateDescentOptions(damp=0.0)).refine(weight, first, hessian)
    refined.tensor.validate()
    assert refined.error <= first.error * (1 + 1e-4)
    assert refined.rounded is not None and refined.rounded.shape == weight.shape


def test_it_improves_on_gptq() -> None:
    weight, hessian = problem(64, 256, 1)
    first = GPTQ(GPTQOptions(scheme="W3A16", group_size=64)).quantize(weight, hessian)
    refined = CoordinateDescent(CoordinateDescentOptions()).refine(weight, first, hessian)
    assert refined.error < 0.9 * first.error
