"""Grids against compressed-tensors' own quantization parameters, schemes and packing."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compressor.numerics import grid
from compressor.numerics.packing import pack_int32, unpack_int32
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme, WeightScheme


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_scales_and_zero_points_are_the_formats_own(
    seed: int, bits: int, symmetric: bool, shift: float
) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) + shift
    scale, zero = grid.fit_grid(weight, WeightScheme(bits, symmetric, "group", 8))
    groups = weight.view(5, 4, 8)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=8)
    expected, expected_zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    torch.testing.assert_close(scale, expected)
    if symmetric:
        assert zero is None
    else:
        assert zero is not None and torch.equal(zero.int(), expected_zero.int())


def test_mse_search_never_has_more_error_than_minmax() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) ** 3
    scheme = WeightScheme(4, True, "group", 16)
    errors = []
    for observer in ("minmax", "mse"):
        scale, zero = grid.fit_grid(weight, scheme, observer)  # type: ignore[arg-type]
        tensor = grid.quantize(weight, scale, zero, scheme)
        errors.append(float((tensor.dequantize() - weight).abs().pow(2.4).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_zero_groups_stay_zero() -> None:
    scheme = WeightScheme(4, True, "group", 4)
    weight = torch.zeros(2, 8)
    scale, zero = grid.fit_grid(weight, scheme)
    assert (scale > 0).all()
    assert grid.quantize(weight, scale, zero, scheme).dequantize().abs().max() == 0


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 9),
    columns=st.sampled_from([8, 32, 64]),
    dim=st.sampled_from([0, 1]),
)
@example(bits=4, rows=1, columns=8, dim=0)
@example(bits=4, rows=8, columns=32, dim=0)
def test_packing_is_reversible(bits: int, rows: int, columns: int, dim: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8)
    packed = pack_int32(codes, bits, packed_dim=dim)  # type: ignore[arg-type]
    assert torch.equal(unpack_int32(packed, bits, codes.shape, packed_dim=dim), codes)  # type: ignore[arg-type]


def test_packed_layout_is_the_documented_one() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).view(1, 16)
    packed = pack_int32(codes, 4)
    words = [sum((j + 8 * w) << (4 * j) for j in range(8)) for w in range(2)]
    assert [int(v) & 0xFFFFFFFF for v in packed[0]] == words


def test_scheme_names() -> None:
    assert Scheme.parse("W8A8").weights.strategy == "channel"
    assert Scheme.parse("W8A8").input_activations is not None
    four = Scheme.parse("W4A16")
    assert (four.weights.strategy, four.weights.group_size) == ("group", 128)
    assert Scheme.parse("W4A16", -1).weights.strategy == "channel"
    assert Scheme.from_dict(Scheme.parse("W4A8", 32, False).to_dict()) == Scheme.parse(
        "W4A8", 32, False
    )
    for bad in ("W9A16", "W1A16", "w4a16", "W4", "W4A4", ""):
        with pytest.raises(ValueError, match="unknown scheme"):
            Scheme.parse(bad)
    with pytest.raises(ValueError, match="group_size is 0"):
        Scheme.parse("W4A16", 0)


@pytest.mark.parametrize("what", ["zero_shape", "zero_dtype", "g_idx_length", "g_idx_range"])
def test_malformed_zero_points_and_group_indices_are_refused(what: str) -> None:
    scheme = WeightScheme(4, False, "group", 4)
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    scale, zero = grid.fit_grid(weight, scheme)
    assert zero is not None
    codes = grid.quantize(weight, scale, zero, scheme).codes
    index = torch.tensor([0, 1] * 4, dtype=torch.int32)
    QuantizedTensor(codes, scale, zero, index, scheme).validate()
    zeros = {"zero_shape": zero[:, :1], "zero_dtype": zero.float()}.get(what, zero)
    indices = {"g_idx_length": index[:3], "g_idx_range": index - 1}.get(what, index)
    with pytest.raises(ValueError, match=what.split("_")[0]):
        QuantizedTensor(codes, scale, zeros, indices, scheme).validate()


@pytest.mark.parametrize("what", ["codes", "scale", "shape", "zero"])
def test_a_tensor_that_contradicts_its_scheme_is_refused(what: str) -> None:
    scheme = WeightScheme(4, True, "group", 4)
    scale, zero = grid.fit_grid(torch.ones(2, 8), scheme)
    tensor = grid.quantize(torch.ones(2, 8), scale, zero, scheme)
    tensor.validate()
    broken = {
        "codes": QuantizedTensor(tensor.codes + 100, tensor.scale, None, None, scheme),
        "scale": QuantizedTensor(tensor.codes, tensor.scale * torch.nan, None, None, scheme),
        "shape": QuantizedTensor(tensor.codes, tensor.scale[:, :1], None, None, scheme),
        "zero": QuantizedTensor(tensor.codes, tensor.scale, tensor.codes[:, :2], None, scheme),
    }[what]
    with pytest.raises(ValueError):
        broken.validate()
