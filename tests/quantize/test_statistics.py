"""The Hessian accumulator against a plain float64 product."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.quantize.statistics import HessianAccumulator


@settings(max_examples=30, deadline=None)
@given(
    features=st.sampled_from([1, 7, 64, 257, 600]),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_plain_product(features: int, sizes: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    accumulator = HessianAccumulator(features)
    parts = [torch.randn(1, n, features, generator=generator).to(dtype) for n in sizes]
    for part in parts:
        accumulator.update(part)
    x = torch.cat(parts, dim=1)[0].double().numpy()
    expected = 2 / max(len(x), 1) * x.T @ x
    assert accumulator.tokens == len(x)
    got = accumulator.result()
    # Products of bfloat16 are rounded to it once an update.
    tolerance = 1e-4 if dtype == torch.float32 else 8e-3
    size = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-3 + tolerance * size, rtol=tolerance)
    assert torch.equal(got, got.T)
