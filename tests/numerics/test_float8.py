"""Scheme FP8: rounding against float8_e4m3fn's definition and compressed-tensors' own code."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.numerics import grid, kernels
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.scheme import FP8, FP8_STATIC, Scheme

SCHEME = Scheme.parse("FP8")


def points() -> list[float]:
    """Every number of float8_e4m3fn from 0 up by its definition: 4 bits of exponent with bias 7, 3
    of mantissa, subnormals at exponent 0, no infinity, S.1111.111 is not a number."""
    found = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        fraction = mantissa / 8 + (exponent > 0)
        found.append(fraction * 2.0 ** (max(exponent, 1) - 7))
    return found


POINTS = points()


def nearest(value: float) -> float:
    """By search over all points; a tie goes to the even code, beyond the largest to it."""
    distances = [abs(abs(value) - point) for point in POINTS]
    least = min(distances)
    codes = [code for code, distance in enumerate(distances) if distance == least]
    code = next((c for c in codes if c % 2 == 0), codes[0])
    return -POINTS[code] if value < 0 else POINTS[code]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-600, 600, width=32, allow_subnormal=False), min_size=1, max_size=16),
    st.sampled_from([1.0, 2.0**-6, 2.0**3]),
)
def test_rounding_goes_to_the_nearest_point(values: list[float], scale: float) -> None:
    weight = torch.tensor([values]) * scale
    step = torch.full((1, 1), scale)
    tensor = grid.quantize(weight, step, None, SCHEME.weights)
    tensor.validate()
    assert tensor.codes.float()[0].tolist() == [nearest(value) for value in values]
    cast = (weight / step).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(tensor.codes.view(torch.uint8), cast.view(torch.uint8))
    assert torch.equal(tensor.dequantize(), cast.float() * step)


def test_halfway_goes_to_the_even_mantissa() -> None:
    halves = [(a + b) / 2 for a, b in itertools.pairwise(POINTS)]
    got = grid.round_to_float8(torch.tensor(halves)).tolist()
    assert got == [POINTS[i] if i % 2 == 0 else POINTS[i + 1] for i in range(len(halves))]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.sampled_from([-3.0, 0.0, 3.0]))
def test_scales_and_values_are_the_formats_own(seed: int, shift: float) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) + shift
    scale, zero = grid.fit_grid(weight, SCHEME.weights)
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    expected, no_zero = calculate_qparams(weight.amin(1, True), weight.amax(1, True), args)
    assert zero is None
    torch.testing.assert_close(scale, expected)
    theirs = fake_quantize(weight, scale, no_zero, args)
    assert torch.equal(grid.quantize(weight, scale, None, SCHEME.weights).dequantize(), theirs)


def test_mse_search_never_has_more_error_than_minmax() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for observer in ("minmax", "mse"):
        scale, _ = grid.fit_grid(weight, SCHEME.weights, observer)  # type: ignore[arg-type]
        tensor = grid.quantize(weight, scale, None, SCHEME.weights)
        errors.append((tensor.dequantize() - weight).abs().pow(2.5).sum(1))
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    assert float(errors[1].sum()) < 0.97 * float(errors[0].sum())


def test_codes_that_are_not_numbers_are_refused() -> None:
    weight = torch.ones(2, 4)
    tensor = grid.quantize(weight, torch.ones(2, 1), None, SCHEME.weights)
    tensor.codes = torch.full((2, 4), torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="beyond"):
        tensor.validate()
    tensor.codes = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="int8"):
        tensor.validate()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_rounds_its_inputs(static: bool, dtype: torch.dtype) -> None:
    scheme = Scheme.parse("FP8", activations="static" if static else "dynamic")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(9, 64, generator=generator)
    x[0] = 0  # a row without anything in it
    x = x.to(dtype)
    scale, _ = grid.fit_grid(weight, scheme.weights)
    tensor = grid.quantize(weight, scale, None, scheme.weights)
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor" if static else "channel")
    if static:
        tensor.input_scale = torch.tensor([0.75 * float(x.float().abs().max()) / 448])  # saturates
        step = tensor.input_scale
    else:
        step = (x.float().abs().amax(1, True) / 448).clamp_min(1e-9)
    expected = fake_quantize(x.float(), step, torch.zeros_like(step), args)
    linear = QuantizedLinear.from_tensor(tensor, scheme, None, kernel="auto", dtype=dtype)
    assert linear.kernel_name.startswith("dequantized")
    got = kernels.rounded(x, FP8_STATIC if static else FP8, tensor.input_scale)
    # A quotient on the edge between two points may fall to either side of it.
    same = torch.isclose(got.float(), expected.to(dtype).float(), rtol=1e-5)
    assert float(same.float().mean()) > 0.99
    assert float((got.float() - expected).abs().max()) <= 0.07 * float(x.float().abs().max())
    torch.testing.assert_close(
        linear(x), torch.nn.functional.linear(got, tensor.dequantize(dtype)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("options", [{"group_size": 64}, {"symmetric": False}])
def test_what_the_format_has_no_place_for_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="one scale per output channel"):
        Scheme.parse("FP8", **options)
    assert Scheme.from_dict(SCHEME.to_dict()) == SCHEME
    assert Scheme.parse("FP8", -1) == SCHEME
