"""SmoothQuant: move the difficulty of activations with outlier channels into the weights.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization
for Large Language Models", arXiv 2211.10438. Input channel j of a linear is divided by
s_j = max|x_j|^a / max|w_j|^(1-a), and column j of the weight multiplied by it (equation 4). The
division goes into the layer before, so serving costs nothing. The strength a is searched per input:
the one with the least output error after rounding both sides wins, 0 being no smoothing. From there
the scales of integer grids are learned one by one (`learned_scales`), and kept where that is better
still.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from compressor.numerics import grid
from compressor.numerics.kernels import INT8_MAX, rounded
from compressor.numerics.scheme import Scheme
from compressor.quantize.registry import AlgorithmOptions, register
from compressor.quantize.statistics import InputStatistics

_SEARCHED = (0.4, 0.5, 0.6, 0.7, 0.8)
_ITERATIONS = 150
_LEARNING_RATE = 0.05
_PARTS = 4  # of the rows, of which each iteration sees one
_WEIGHT_ROWS = 512  # of a weight whose largest entries are looked at


class SmoothQuantOptions(AlgorithmOptions):
    """Options of SmoothQuant."""

    strength: float | Literal["auto"] = Field(
        "auto",
        description="How much of the difficulty moves into the weights, 0 to 1; auto searches it "
        "for every input and then learns each channel's scale.",
    )


@register("smoothquant")
class SmoothQuant:
    """Chooses the channel scales that move outliers from activations into weights.

    Args:
        options: see `SmoothQuantOptions`.
    """

    Options: ClassVar[type[SmoothQuantOptions]] = SmoothQuantOptions
    kind: ClassVar[str] = "transform"

    def __init__(self, options: SmoothQuantOptions) -> None:
        self.options = options

    def scales(
        self, weights: Sequence[torch.Tensor], statistics: InputStatistics, scheme: Scheme
    ) -> torch.Tensor:
        """Divisors of the input's channels, float32 [in]; ones where smoothing does not help.

        Args:
            weights: float32 [out, in] of every linear that reads this input.
            statistics: of the input.
            scheme: how weights and activations will be rounded.
        """
        absmax, rows = statistics.absmax, statistics.rows
        neutral = torch.ones_like(absmax)
        if scheme.input_activations is None:
            return neutral
        largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        if self.options.strength != "auto":
            return channel_scales(absmax, largest, float(self.options.strength))
        best, least = neutral, _rounding_error(weights, rows, absmax, neutral, scheme)
        for strength in _SEARCHED:
            trial = channel_scales(absmax, largest, strength)
            error = _rounding_error(weights, rows, absmax, trial, scheme)
            if error < least:
                best, least = trial, error
        if scheme.input_activations.type == "float":
            return best  # its steps follow the numbers: the model of what is learned is not its own
        learned = learned_scales(weights, rows, absmax, best, scheme)
        error = _rounding_error(weights, rows, absmax, learned, scheme)
        return learned if error < least else best


def learned_scales(
    weights: Sequence[torch.Tensor],
    rows: torch.Tensor,
    absmax: torch.Tensor,
    start: torch.Tensor,
    scheme: Scheme,
) -> torch.Tensor:
    """Channel scales with the least expected error of the output, float32 [in].

    Rounding with step d makes an error of variance d^2 / 12. With the inputs' steps max_j|x_j|/s_j
    and the weights' steps max_j|w_j|s_j, the expected relative error of the output y = W x,

        (mean_t dx_t^2 sum_j s_j^2 |w_j|^2 + sum_i dw_i^2 sum_j mean(x_j^2) / s_j^2) / 12 |y|^2,

    summed over the linears, is a sum of maxima of monomials of s, hence convex in log s (a
    geometric program: Boyd, Kim, Vandenberghe, Hassibi, "A tutorial on geometric programming",
    2007; a zero point makes of the first maximum half the sum of two). Adam in log s finds it.

    Args:
        weights: float32 [out, in] of every linear that reads this input.
        rows: float32 [n, in] some inputs.
        absmax: float32 [in] largest magnitude of each channel, for static activations.
        start: float32 [in] where to begin.
        scheme: how weights and activations will be rounded.
    """
    steps = 2.0**scheme.weights.num_bits - 1
    groups = scheme.weights.groups(rows.shape[1])
    activations = scheme.input_activations
    both_sides = activations is not None and not activations.symmetric
    inputs = absmax.unsqueeze(0) if scheme.static_activations else rows
    inputs = inputs if both_sides else inputs.abs()
    moment = rows.square().mean(0)
    terms = []
    for weight in weights:
        energy = (rows @ weight.T).square().mean(0).sum().clamp_min(1e-30)
        some = weight[:: max(len(weight) // _WEIGHT_ROWS, 1)].abs()
        grouped = some.unflatten(1, (groups, -1))
        terms.append((weight.square().sum(0) / energy, grouped, len(weight) / len(some) / energy))
    log_scale = start.log().requires_grad_(True)
    optimizer = torch.optim.Adam([log_scale], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _ITERATIONS)
    with torch.enable_grad():
        for iteration in range(_ITERATIONS):
            scale = log_scale.exp()
            part = inputs[iteration % _PARTS :: _PARTS] if len(inputs) >= _PARTS else inputs
            reach = (part / scale).amax(1)
            if both_sides:  # half of the range from the least value to the largest, zero in it
                reach = (reach.clamp_min(0) - (part / scale).amin(1).clamp_max(0)) / 2
            squared_step = reach.square().mean() / INT8_MAX**2
            error = scale.new_zeros(())
            for columns, grouped, share in terms:
                error = error + squared_step * (scale.square() * columns).sum()
                highest = (grouped * scale.unflatten(0, (groups, -1))).amax(2).square().sum(0)
                noise = (moment / scale.square()).unflatten(0, (groups, -1)).sum(1)
                error = error + share * (2 / steps) ** 2 * (highest * noise).sum()
            optimizer.zero_grad()
            error.log().backward()
            optimizer.step()
            schedule.step()
    return log_scale.detach().exp()


def channel_scales(absmax: torch.Tensor, largest: torch.Tensor, strength: float) -> torch.Tensor:
    """Equation 4, with mean (geometric) one; channels that are never used keep their scale."""
    used = (absmax > 0) & (largest > 0)
    scale = absmax.clamp_min(1e-8).pow(strength) / largest.clamp_min(1e-8).pow(1 - strength)
    scale = scale / scale[used].log().mean().exp() if bool(used.any()) else scale
    return torch.where(used, scale.clamp(1e-4, 1e4), torch.ones_like(scale))


def _rounding_error(
    weights: Sequence[torch.Tensor],
    rows: torch.Tensor,
    absmax: torch.Tensor,
    scale: torch.Tensor,
    scheme: Scheme,
) -> float:
    """Summed relative output error of the linears with both sides rounded to nearest."""
    activations, fixed = scheme.input_activations, None
    assert activations is not None
    if scheme.static_activations:
        fixed = (absmax / scale).amax().clamp_min(1e-8).view(1) / activations.maximum
    inputs = rounded(rows / scale, activations, fixed)
    error = 0.0
    for weight in weights:
        scaled = weight * scale
        points, zero = grid.fit_grid(scaled, scheme.weights)
        approximate = grid.quantize(scaled, points, zero, scheme.weights).dequantize()
        exact = rows @ weight.T
        difference = inputs @ approximate.T - exact
        error += float(difference.square().sum() / exact.square().sum().clamp_min(1e-30))
    return error
