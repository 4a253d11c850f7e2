"""SmoothQuant's scales: formula, search, and the learned ones against brute force."""

import pytest
import torch

from compressor.numerics.scheme import ActivationKind, Scheme
from compressor.quantize.smoothquant import (
    SmoothQuant,
    SmoothQuantOptions,
    _rounding_error,
    channel_scales,
    learned_scales,
)
from compressor.quantize.statistics import InputStatistics


def _problem(columns: int = 64, seed: int = 0) -> tuple[list[torch.Tensor], InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(columns, generator=generator).exp()
    spread[3] = 60.0  # an outlier channel
    rows = torch.randn(512, columns, generator=generator).pow(3) * spread  # heavy-tailed
    weights = [torch.randn(n, columns, generator=generator) for n in (48, 16)]
    statistics = InputStatistics(columns)
    for batch in rows.split(64):
        statistics.update(batch)
    return weights, statistics


def test_equation_4() -> None:
    absmax, largest = torch.tensor([4.0, 1.0, 16.0]), torch.tensor([1.0, 1.0, 1.0])
    scale = channel_scales(absmax, largest, 0.5)
    assert torch.allclose(scale, torch.tensor([1.0, 0.5, 2.0]))


@pytest.mark.parametrize("name", ["W8A8", "W4A8"])
@pytest.mark.parametrize("activations", ["dynamic", "dynamic-asymmetric", "static"])
def test_learned_scales_beat_every_strength(name: str, activations: ActivationKind) -> None:
    weights, statistics = _problem()
    group_size = 16 if name == "W4A8" else None
    scheme = Scheme.parse(name, group_size=group_size, activations=activations)
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)

    def error(scale: torch.Tensor) -> float:
        return _rounding_error(weights, statistics.rows, statistics.absmax, scale, scheme)

    tried = [channel_scales(statistics.absmax, largest, a / 10) for a in range(11)]
    start = tried[5]
    learned = learned_scales(weights, statistics.rows, statistics.absmax, start, scheme)
    assert error(learned) < min(error(scale) for scale in tried)


def test_the_minimum_does_not_depend_on_the_start() -> None:
    weights, statistics = _problem(columns=16)
    scheme = Scheme.parse("W8A8")
    found = []
    for start in (torch.ones(16), statistics.absmax.sqrt()):
        scale = learned_scales(weights, statistics.rows, statistics.absmax, start, scheme)
        found.append(_rounding_error(weights, statistics.rows, statistics.absmax, scale, scheme))
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_auto_chooses_the_least_error() -> None:
    weights, statistics = _problem()
    scheme = Scheme.parse("W8A8")
    chosen = SmoothQuant(SmoothQuantOptions()).scales(weights, statistics, scheme)
    neutral = torch.ones_like(chosen)
    rows, absmax = statistics.rows, statistics.absmax
    assert _rounding_error(weights, rows, absmax, chosen, scheme) < 0.3 * _rounding_error(
        weights, rows, absmax, neutral, scheme
    )


def test_weight_only_schemes_are_left_alone() -> None:
    weights, statistics = _problem()
    scale = SmoothQuant(SmoothQuantOptions()).scales(weights, statistics, Scheme.parse("W8A16"))
    assert bool((scale == 1).all())


@pytest.mark.parametrize("static", [False, True])
def test_float8_search_never_loses(static: bool) -> None:
    """Rounded as fp8 on both sides; nothing is learned, whose model is of equal steps."""
    weights, statistics = _problem()
    scheme = Scheme.parse("FP8", activations=["dynamic", "static"][static])
    scale = SmoothQuant(SmoothQuantOptions()).scales(weights, statistics, scheme)
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    absmax = statistics.absmax
    tried = [torch.ones_like(absmax)]
    tried += [channel_scales(absmax, largest, a) for a in (0.4, 0.5, 0.6, 0.7, 0.8)]
    errors = [
        _rounding_error(weights, statistics.rows, absmax, trial, scheme)
        for trial in [*tried, scale]
    ]
    assert errors[-1] == min(errors)
    assert any(torch.equal(scale, trial) for trial in tried)
