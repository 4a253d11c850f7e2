"""AWQ's scale search, and the clip search that goes with it."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics import grid
from compressor.numerics.scheme import Scheme
from compressor.quantize.awq import AWQ, AWQOptions
from compressor.quantize.registry import relative_error
from compressor.quantize.rtn import RTN, SchemeOptions
from compressor.quantize.statistics import InputStatistics

SCHEME = Scheme.parse("W4A16", 16)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, InputStatistics]:
    """A weight, and inputs a few channels of which are much larger than the rest."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=random)
    inputs = torch.randn(512, 64, generator=random)
    inputs[:, ::17] *= 20
    statistics = InputStatistics(64)
    for part in inputs.split(64):
        statistics.update(part)
    return weight, inputs, statistics


def output_error(weight: torch.Tensor, inputs: torch.Tensor, scale: torch.Tensor) -> float:
    points, zero = grid.fit_grid(weight * scale, SCHEME.weights)
    rounded = grid.quantize(weight * scale, points, zero, SCHEME.weights).dequantize() / scale
    return float(((rounded - weight) @ inputs.T).norm() / (weight @ inputs.T).norm())


def test_scaling_protects_the_columns_of_large_inputs() -> None:
    weight, inputs, statistics = problem()
    scale = AWQ(AWQOptions()).scales([weight], statistics, SCHEME)
    assert scale[::17].min() > scale.median()
    assert output_error(weight, inputs, scale) < 0.75 * output_error(weight, inputs, torch.ones(64))


@pytest.mark.parametrize("seed", range(5))
def test_scaling_never_loses(seed: int) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    statistics = InputStatistics(64)
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed + 100))
    statistics.update(inputs)  # no channel stands out
    scale = AWQ(AWQOptions()).scales([weight], statistics, SCHEME)
    ones = torch.ones(64)
    assert output_error(weight, inputs, scale) <= output_error(weight, inputs, ones) * 1.0001


def test_statistics_follow_a_division_of_the_input() -> None:
    _, inputs, statistics = problem()
    scale = torch.linspace(0.5, 4, 64)
    statistics.divide(scale)
    expected = InputStatistics(64)
    for part in (inputs / scale).split(64):
        expected.update(part)
    torch.testing.assert_close(statistics.hessian, expected.hessian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.absmax, expected.absmax)
    torch.testing.assert_close(statistics.absmean, expected.absmean)
    torch.testing.assert_close(statistics.rows, expected.rows)


def test_the_output_observer_beats_the_others_by_its_own_measure() -> None:
    weight, _, statistics = problem()
    hessian = statistics.hessian
    errors = {}
    for observer in ("minmax", "mse", "output"):
        options = SchemeOptions(scheme="W3A16", group_size=64, observer=observer)
        tensor = RTN(options).quantize(weight, hessian).tensor
        errors[observer] = relative_error(weight, tensor.dequantize(), hessian)
    assert errors["output"] < min(errors["minmax"], errors["mse"])
