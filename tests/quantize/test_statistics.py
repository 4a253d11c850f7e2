"""Statistics of inputs against plain float64 products."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.numerics.kernels import quantize_rows, quantize_rows_asymmetric
from compressor.numerics.scheme import ASYMMETRIC, DYNAMIC
from compressor.quantize.statistics import (
    HessianAccumulator,
    InputStatistics,
    fit_to_rounded_inputs,
)


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


def correlated(rows: int, columns: int) -> torch.Tensor:
    """Inputs of low rank with an outlier channel, beside which rounding wipes out small ones."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, columns, generator=generator)
    x = torch.randn(rows, 6, generator=generator) @ mix
    x += 0.05 * torch.randn(rows, columns, generator=generator)
    x[:, 3] *= 100
    return x


def test_statistics_of_rounded_inputs() -> None:
    x = correlated(500, 24)
    seen = InputStatistics(24, rounded=DYNAMIC)
    seen.update(x[:200])
    seen.update(x[200:])
    codes, step = quantize_rows(x)
    q = (codes.float() * step).double()
    assert seen.drift is not None
    torch.testing.assert_close(seen.hessian.double(), 2 / 500 * q.T @ q, rtol=1e-4, atol=1e-4)
    expected = 2 / 500 * (x.double() - q).T @ q
    torch.testing.assert_close(seen.drift.double(), expected, rtol=1e-3, atol=1e-2)
    plain = InputStatistics(24)
    plain.update(x)
    assert plain.drift is None
    torch.testing.assert_close(plain.hessian, 2 / 500 * x.T @ x)


def test_statistics_of_inputs_rounded_with_a_zero_point() -> None:
    x = correlated(500, 24)
    seen = InputStatistics(24, rounded=ASYMMETRIC)
    seen.update(x)
    codes, step, zero = quantize_rows_asymmetric(x)
    q = ((codes.float() - zero) * step).double()
    torch.testing.assert_close(seen.hessian.double(), 2 / 500 * q.T @ q, rtol=1e-4, atol=1e-4)


def test_fitted_weights_are_the_least_squares_solution() -> None:
    x = correlated(4000, 24)
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    seen = InputStatistics(24, rounded=DYNAMIC)
    seen.update(x)
    assert seen.drift is not None
    (fitted,) = fit_to_rounded_inputs([weight], seen.hessian, seen.drift, 1e-9)
    codes, step = quantize_rows(x)
    q = codes.float() * step
    solved = torch.linalg.lstsq(q.double(), (x @ weight.T).double()).solution.T
    wanted = x @ weight.T
    before = (q @ weight.T - wanted).norm()
    after = (q @ fitted.T - wanted).norm()
    least = (q.double() @ solved.T - wanted).norm()
    assert after < 0.8 * before
    assert float(after) < 1.01 * float(least)


def test_inputs_that_survive_rounding_change_nothing() -> None:
    x = torch.randint(-127, 128, (300, 12), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127.0
    weight = torch.randn(4, 12)
    seen = InputStatistics(12, rounded=DYNAMIC)
    seen.update(x)
    assert seen.drift is not None and not bool(seen.drift.any())
    (fitted,) = fit_to_rounded_inputs([weight], seen.hessian, seen.drift, 0.01)
    assert torch.equal(fitted, weight)
