"""Linears that read one input: one product, and what each would compute by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from compressor.numerics import siblings
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from tests.numerics.test_kernels import quantized

SIZES = (32, 16, 48)
Weight = tuple[QuantizedTensor, Scheme, torch.Tensor | None]


def weights(scheme: Scheme, *, bias: bool = True, ordered: bool = False) -> list[Weight]:
    """A weight of each size with 64 columns."""
    made = []
    for size in SIZES:
        tensor = quantized(scheme, size, 64, ordered=ordered)
        if scheme.static_activations:
            tensor.input_scale = torch.tensor([0.02])
        made.append((tensor, scheme, torch.linspace(-1, 1, size) if bias else None))
    return made


def alone(linears: list[Weight], dtype: torch.dtype) -> list[nn.Module]:
    return [QuantizedLinear.from_tensor(*one, kernel="auto", dtype=dtype) for one in linears]


@pytest.fixture
def products() -> Callable[[list[nn.Module]], list[int]]:
    """Rows of every product that some siblings make from now on."""

    def counted(made: list[nn.Module]) -> list[int]:
        rows: list[int] = []
        together = made[0].siblings
        assert all(one.siblings is together for one in made)
        together.linear.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[:-1].numel()))
        return rows

    return counted


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("scheme", "ordered", "dtype"),
    [
        (Scheme.parse("W8A8"), False, torch.bfloat16),
        (Scheme.parse("W8A8", activations="dynamic-asymmetric"), False, torch.float32),
        (Scheme.parse("W8A8", activations="static"), False, torch.float32),
        (Scheme.parse("W8A16"), False, torch.bfloat16),
        (Scheme.parse("W4A16", 32), True, torch.bfloat16),
        (Scheme.parse("W4A16", 32, symmetric=False), False, torch.bfloat16),
        (Scheme.parse("W4A16", 32), False, torch.float32),
        (Scheme.parse("FP8"), False, torch.float32),
    ],
    ids=str,
)
def test_each_computes_what_it_would_by_itself(
    scheme: Scheme, ordered: bool, dtype: torch.dtype, inference: bool, products: Any
) -> None:
    every = weights(scheme, ordered=ordered)
    made, plain = siblings.quantized(every, dtype=dtype), alone(every, dtype)
    rows = products(made)
    for one, other in zip(made, plain, strict=True):
        assert one.kernel_name == other.kernel_name and one.out_features == other.out_features
    with torch.inference_mode(inference), torch.no_grad():
        for x in (torch.randn(2, 3, 64, dtype=dtype), torch.randn(1, 64, dtype=dtype)):
            for one, other in zip(made, plain, strict=True):
                torch.testing.assert_close(one(x), other(x), rtol=2e-2, atol=1e-5)
    assert rows == [6, 1]


@pytest.mark.parametrize("bias", [False, True])
def test_dense_ones_too(bias: bool, products: Any) -> None:
    plain = [nn.Linear(64, size, bias=bias) for size in SIZES]
    made = siblings.dense(plain)
    rows = products(made)
    x = torch.randn(5, 64)
    with torch.no_grad():
        for one, other in zip(made, plain, strict=True):
            assert one.kernel_name is None
            torch.testing.assert_close(one(x), other(x))
    assert rows == [5]


def test_a_product_is_of_one_input_as_it_is_now(products: Any) -> None:
    every = weights(Scheme.parse("W8A8"))
    (a, b, c), (plain_a, plain_b, plain_c) = siblings.quantized(every), alone(every, torch.float32)
    rows = products([a, b, c])
    x, y = torch.randn(4, 64), torch.randn(4, 64)
    assert torch.equal(a(x), plain_a(x))
    assert torch.equal(b(y), plain_b(y))  # another tensor
    y.mul_(torch.linspace(1, 3, 64))
    assert torch.equal(c(y), plain_c(y))  # altered
    assert len(rows) == 3
    with torch.inference_mode():  # nothing tells that one was altered, but who reads it again
        x = torch.randn(4, 64)
        assert torch.equal(a(x), plain_a(x))
        x.mul_(torch.linspace(1, 3, 64))
        assert torch.equal(a(x), plain_a(x))
    assert len(rows) == 5


def test_nothing_is_held_once_all_have_read() -> None:
    made = siblings.quantized(weights(Scheme.parse("W8A8")))
    together: Any = made[0].siblings
    x = torch.randn(4, 64)
    for index, one in enumerate(made):
        one(x)
        assert (together._last is None) == (index == len(made) - 1)


def other_scheme(every: list[Weight]) -> None:
    every[1] = weights(Scheme.parse("W8A16"))[1]


def other_grid(every: list[Weight]) -> None:
    every[1] = weights(Scheme.parse("W4A16", 16))[1]


def other_order(every: list[Weight]) -> None:
    tensor, *rest = every[1]
    order = torch.arange(64, dtype=torch.int32) % tensor.scale.shape[1]
    every[1] = (replace(tensor, g_idx=order), *rest)


def other_input_scale(every: list[Weight]) -> None:
    tensor, *rest = every[1]
    every[1] = (replace(tensor, input_scale=torch.tensor([0.03])), *rest)


def no_bias(every: list[Weight]) -> None:
    every[1] = (*every[1][:2], None)


@pytest.mark.parametrize(
    ("scheme", "change"),
    [
        (Scheme.parse("W8A8"), other_scheme),
        (Scheme.parse("W4A16", 32), other_grid),
        (Scheme.parse("W4A16", 32), other_order),
        (Scheme.parse("W8A8", activations="static"), other_input_scale),
        (Scheme.parse("W8A8"), no_bias),
    ],
)
def test_what_cannot_be_one_product_stays_apart(
    scheme: Scheme, change: Callable[[list[Weight]], None]
) -> None:
    every = weights(scheme)
    assert isinstance(siblings.quantized(every)[0], siblings.Sibling)
    change(every)
    x = torch.randn(3, 64)
    made, plain = siblings.quantized(every), alone(every, torch.float32)
    assert not any(isinstance(one, siblings.Sibling) for one in made)
    for one, other in zip(made, plain, strict=True):
        assert torch.equal(one(x), other(x))


def test_dense_ones_that_differ_stay_apart() -> None:
    biased = [nn.Linear(8, 8), nn.Linear(8, 8, bias=False)]
    mixed = [nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16)]
    wider = [nn.Linear(8, 8), nn.Linear(16, 8)]
    for linears in (biased, mixed, wider, [nn.Linear(8, 8)]):
        assert siblings.dense(linears) == linears


def test_weights_of_other_widths_are_not_joined() -> None:
    scheme = Scheme.parse("W8A8")
    assert siblings.joined([quantized(scheme, 16, 64), quantized(scheme, 16, 128)]) is None
