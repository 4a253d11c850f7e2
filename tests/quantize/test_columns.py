"""The Triton kernel of GPTQ's inner loop against the loop of tensor operations.

On a machine without a GPU it runs in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.numerics.scheme import Scheme, WeightScheme
from compressor.quantize.columns import round_columns_loop
from compressor.quantize.gptq import inverse_factor

pytest.importorskip("triton")

from compressor.quantize.columns_triton import round_columns_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(
    length: int, rows: int, scheme: WeightScheme, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Block, factor, and scale and zero of each column."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * length, length, generator=random) @ torch.randn(
        length, length, generator=random
    )
    factor, _ = inverse_factor(2 / len(x) * x.T @ x, 0.01)
    block = torch.randn(length, rows, generator=random)
    scale = torch.rand(length, rows, generator=random) * 0.2 + 0.1
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(-4, 4, (length, rows), generator=random).float()
    return block, factor, scale, zero


def run(function: Any, inputs: Any, scheme: WeightScheme, columns: list[range], device: str) -> Any:
    block, factor, scale, zero = (None if x is None else x.clone().to(device) for x in inputs)
    codes = torch.full(block.shape, 99, dtype=torch.int8, device=device)
    errors = torch.full_like(block, torch.nan)
    for some in columns:
        function(block, factor, scale, zero, scheme, some, codes, errors)
    return [x.cpu() for x in (block, codes, errors)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("length", "rows", "name", "split"),
    [
        (128, 24, "W4A16", None),
        (100, 13, "W4A16", 32),  # neither a power of two nor whole programs
        (64, 8, "W8A16", None),
        (256, 9, "W2A16", 128),
    ],
)
def test_kernel_is_the_loop(
    symmetric: bool, length: int, rows: int, name: str, split: int | None
) -> None:
    scheme = Scheme.parse(name, -1, symmetric).weights
    inputs = problem(length, rows, scheme)
    step = split or length
    columns = [range(i, min(i + step, length)) for i in range(0, length, step)]
    loop = run(round_columns_loop, inputs, scheme, columns, "cpu")
    kernel = run(round_columns_triton, inputs, scheme, columns, DEVICE)
    # A fused multiply-add may push a number over a tie, and its row goes another way from there.
    same = (loop[1] == kernel[1]).all(0)
    assert same.float().mean() >= 0.9
    for ours, theirs in zip(kernel, loop, strict=True):
        torch.testing.assert_close(
            ours[:, same].float(), theirs[:, same].float(), rtol=1e-3, atol=1e-3
        )
    assert int(loop[1].min()) >= scheme.minimum and int(kernel[1].min()) >= scheme.minimum
    assert int(kernel[1].max()) <= scheme.maximum


def test_expanded_scales() -> None:
    scheme = Scheme.parse("W4A16", -1, True).weights
    block, factor, scale, _ = problem(64, 16, scheme)
    one = scale[:1].expand(64, 16)
    dense = run(
        round_columns_triton, (block, factor, one.contiguous(), None), scheme, [range(64)], DEVICE
    )
    inputs = (block, factor, one, None)
    codes, errors = torch.zeros(64, 16, dtype=torch.int8), torch.zeros(64, 16)
    moved = [None if x is None else x.to(DEVICE) for x in inputs]
    moved[0] = moved[0].clone()
    codes, errors = codes.to(DEVICE), errors.to(DEVICE)
    round_columns_triton(moved[0], moved[1], one.to(DEVICE), None, scheme, range(64), codes, errors)
    assert torch.equal(codes.cpu(), dense[1])
    assert torch.equal(errors.cpu(), dense[2])


def test_ties_go_to_even() -> None:
    scheme = Scheme.parse("W4A16", -1, True).weights
    block = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, -9.0, 1e9]])
    eye, ones = torch.eye(1), torch.ones_like(block)
    _, codes, _ = run(round_columns_triton, (block, eye, ones, None), scheme, [range(1)], DEVICE)
    assert codes.tolist() == [[0, 2, 2, 0, -2, 7, -8, 7]]


def test_too_long_a_block() -> None:
    scheme = Scheme.parse("W4A16", -1, True).weights
    with pytest.raises(ValueError, match="block_size must be at most 512"):
        run(
            round_columns_triton,
            (torch.zeros(513, 1), torch.eye(513), torch.ones(513, 1), None),
            scheme,
            [range(513)],
            DEVICE,
        )
