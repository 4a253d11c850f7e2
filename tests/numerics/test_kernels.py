"""Every low-bit kernel against the dense float64 product of the same codes."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.numerics import grid, kernels
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import ASYMMETRIC, DYNAMIC, ActivationScheme, Scheme


def quantized(scheme: Scheme, out: int, columns: int, *, ordered: bool = False) -> QuantizedTensor:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
    scale, zero = grid.fit_grid(weight, scheme.weights, scale_dtype=torch.bfloat16)
    g_idx = None
    if ordered:
        shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
        g_idx = (torch.argsort(shuffled) // (columns // scale.shape[1])).to(torch.int32)
    return grid.quantize(weight, scale, zero, scheme.weights, g_idx)


def exact(tensor: QuantizedTensor, scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if scheme.input_activations is not None:
        codes, scale = kernels.quantize_rows(x.float())
        x = codes.double() * scale.double()
    return x @ tensor.dequantize(torch.float32).double().T


@pytest.mark.parametrize("rows", [1, 3, 64, 130])
@pytest.mark.parametrize(
    ("name", "group_size", "symmetric", "ordered", "dtype", "kernel", "tolerance"),
    [
        ("W8A8", None, True, False, torch.float32, "int8-int_mm", 1e-6),
        ("W8A8", None, True, False, torch.bfloat16, "int8-int_mm", 1e-2),
        ("W4A16", 32, True, False, torch.bfloat16, "int4-int4pack_mm", 1e-2),
        ("W4A16", 64, False, False, torch.bfloat16, "int4-int4pack_mm", 1e-2),
        ("W4A16", 64, True, True, torch.bfloat16, "int4-int4pack_mm", 1e-2),
        ("W8A16", None, True, False, torch.bfloat16, "int8-int8pack_mm", 1e-2),
        ("W4A16", 64, True, False, torch.float32, "dequantized-float32", 1e-5),
        ("W4A8", 64, True, False, torch.float32, "dequantized-float32", 1e-5),
        ("W3A16", 64, True, False, torch.bfloat16, "dequantized-bfloat16", 1e-2),
    ],
)
def test_kernel_computes_the_product(
    rows: int, name: str, group_size: int | None, symmetric: bool, ordered: bool,
    dtype: torch.dtype, kernel: str, tolerance: float,
) -> None:  # fmt: skip
    scheme = Scheme.parse(name, group_size, symmetric)
    tensor = quantized(scheme, 96, 128, ordered=ordered)
    bias = torch.linspace(-1, 1, 96)
    linear = QuantizedLinear.from_tensor(tensor, scheme, bias, kernel="auto", dtype=dtype)
    assert linear.kernel_name == kernel
    x = torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = linear(x)
    assert got.dtype == dtype and got.shape == (2, rows, 96)
    expected = exact(tensor, scheme, x.reshape(-1, 128)).view(2, rows, 96) + bias.double()
    assert float((got.double() - expected).norm() / expected.norm()) < tolerance


def test_reference_rounds_activations_as_the_engine_does() -> None:
    scheme = Scheme.parse("W8A8")
    tensor = quantized(scheme, 32, 64)
    x = torch.randn(5, 64)
    linear = QuantizedLinear.from_tensor(tensor, scheme, None)
    torch.testing.assert_close(linear(x).double(), exact(tensor, scheme, x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(linear(x), x @ tensor.dequantize().T, atol=1e-3)


def test_rows_of_zeros_have_no_nan() -> None:
    codes, scale = kernels.quantize_rows(torch.zeros(2, 8))
    assert codes.abs().max() == 0 and torch.isfinite(scale).all()
    codes, scale = kernels.quantize_rows(torch.tensor([[-2.0, 1.0, 0.5]]))
    assert codes.tolist() == [[-127, 64, 32]] and float(scale) == pytest.approx(2 / 127)


@pytest.mark.parametrize("columns", [8, 20, 24, 100])
def test_columns_that_the_int8_kernel_would_read_past_are_computed_densely(columns: int) -> None:
    scheme = Scheme.parse("W8A16")
    tensor = quantized(scheme, 33, columns)
    linear = QuantizedLinear.from_tensor(tensor, scheme, None, kernel="auto", dtype=torch.bfloat16)
    assert linear.kernel_name == "dequantized-bfloat16"
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = exact(tensor, scheme, x)
    assert float((linear(x).double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize(
    "activations",
    [
        ActivationScheme(dynamic=False),
        ActivationScheme(strategy="tensor"),
        ActivationScheme(strategy="tensor", dynamic=False, num_bits=4),
        ActivationScheme(strategy="tensor", dynamic=False, symmetric=False),
        ActivationScheme(num_bits=4),
    ],
)
def test_activation_schemes_that_are_not_computed_are_refused(
    kernel: Literal["reference", "auto"], activations: ActivationScheme
) -> None:
    scheme = Scheme.parse("W8A8")
    other = Scheme("other", scheme.weights, activations)
    with pytest.raises(ValueError, match="only int8, dynamic per token"):
        QuantizedLinear.from_tensor(quantized(scheme, 16, 16), other, None, kernel=kernel)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6), min_size=1, max_size=4
    )
)
def test_zero_points_round_as_the_formats_own_library_does(rows: list[list[float]]) -> None:
    x = torch.tensor(rows)
    args = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=False, dynamic=True)
    batch = x.unsqueeze(0)
    scale, zero = compute_dynamic_scales_and_zp(batch, args, torch.nn.Linear(6, 1))
    theirs = fake_quantize(batch, scale, zero, args)[0]
    ours = kernels.rounded(x, ASYMMETRIC)
    # The library's zero points are rounded from scales of its own: one step apart at most.
    steps = (x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)) / 255
    assert bool(((ours - theirs).abs() <= 1.01 * steps.unsqueeze(1) + 1e-6).all())
    assert bool(((ours - x).abs() <= 1.01 * steps.unsqueeze(1) + 1e-6).all())
    codes, _, points = kernels.quantize_rows_asymmetric(x)
    assert codes.dtype == torch.int8 and points.dtype == torch.int32


def test_a_zero_point_halves_the_error_of_a_row_with_one_large_value() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    x[:, 7] = 60.0
    lost = {
        scheme: float((kernels.rounded(x, scheme) - x).norm()) for scheme in (DYNAMIC, ASYMMETRIC)
    }
    assert lost[ASYMMETRIC] < 0.6 * lost[DYNAMIC]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_with_a_zero_point(
    kernel: Literal["reference", "auto"], dtype: torch.dtype
) -> None:
    scheme = Scheme.parse("W8A8", activations="dynamic-asymmetric")
    tensor = quantized(scheme, 48, 128)
    linear = QuantizedLinear.from_tensor(tensor, scheme, None, kernel=kernel, dtype=dtype)
    assert linear.kernel_name.startswith("int8-int_mm" if kernel == "auto" else "dequantized")
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(2)).abs().to(dtype)
    x[3] = 0
    codes, scale, zero = kernels.quantize_rows_asymmetric(x)
    expected = (codes.double() - zero) * scale.double() @ tensor.dequantize().double().T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((linear(x).double() - expected).norm() / expected.norm()) < tolerance
    assert bool((linear(x)[3] == 0).all())


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_static_activations_have_one_scale(kernel: Literal["reference", "auto"]) -> None:
    scheme = Scheme.parse("W8A8", activations="static")
    tensor = quantized(scheme, 32, 128)
    with pytest.raises(ValueError, match="no input_scale"):
        QuantizedLinear.from_tensor(tensor, scheme, None, kernel=kernel)
    tensor.input_scale = torch.tensor([0.02])
    tensor.validate()
    linear = QuantizedLinear.from_tensor(tensor, scheme, None, kernel=kernel)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 100  # beyond the calibrated range: held at its end
    rounded = (x.double() / 0.02).round().clamp(-128, 127) * torch.tensor([0.02]).double()
    expected = rounded @ tensor.dequantize().double().T
    assert float((linear(x).double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", ["W8A8", "W8A16", "W4A16"])
def test_no_rows_give_no_rows(name: str) -> None:
    scheme = Scheme.parse(name)
    linear = QuantizedLinear.from_tensor(
        quantized(scheme, 32, 128), scheme, None, kernel="auto", dtype=torch.bfloat16
    )
    assert linear(torch.zeros(0, 128, dtype=torch.bfloat16)).shape == (0, 32)
