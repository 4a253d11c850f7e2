"""Round to nearest: every code is the closest one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.quantize.registry import SchemeOptions
from compressor.quantize.rtn import RTN


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 8, 16]),
    symmetric=st.booleans(),
)
def test_no_other_code_is_closer(seed: int, bits: int, group_size: int, symmetric: bool) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    options = SchemeOptions(scheme=f"W{bits}A16", group_size=group_size, symmetric=symmetric)
    tensor = RTN(options).quantize(weight).tensor
    tensor.validate()
    width = 32 if group_size == -1 else group_size
    scale = tensor.scale.repeat_interleave(width, 1)
    zero = 0 if tensor.zero_point is None else tensor.zero_point.repeat_interleave(width, 1).float()
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).view(-1, 1, 1)
    best = ((codes - zero) * scale - weight).abs().amin(0)
    got = (tensor.dequantize() - weight).abs()
    assert torch.allclose(got, best, atol=1e-5)


def test_non_finite_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        RTN(SchemeOptions()).quantize(torch.full((2, 128), torch.nan))


def test_scales_beyond_their_storage_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"too large for scales stored in torch\.float16"):
        RTN(SchemeOptions(), torch.float16).quantize(torch.full((2, 128), 1e6))
