"""SmoothQuant: move the difficulty of activations with outlier channels into the weights.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization
for Large Language Models", arXiv 2211.10438. Input channel j of a linear is divided by
s_j = max|x_j|^a / max|w_j|^(1-a), and column j of the weight multiplied by it (equation 4). The
division goes into the layer before, so serving costs nothing. The strength a is searched per input:
the one with the least output error after rounding both sides wins, 0 being no smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from compressor.numerics import grid
from compressor.numerics.kernels import INT8_MAX, quantize_rows
from compressor.numerics.scheme import STATIC, Scheme
from compressor.quantize.registry import AlgorithmOptions, register
from compressor.quantize.statistics import InputStatistics

_SEARCHED = (0.4, 0.5, 0.6, 0.7, 0.8)


class SmoothQuantOptions(AlgorithmOptions):
    """Options of SmoothQuant."""

    strength: float | Literal["auto"] = Field(
        "auto",
        description="How much of the difficulty moves into the weights, 0 to 1; auto searches it "
        "for every input.",
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
        return best


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
    fixed = None
    if scheme.input_activations == STATIC:
        fixed = (absmax / scale).amax().clamp_min(1e-8).view(1) / INT8_MAX
    codes, step = quantize_rows(rows / scale, fixed)
    rounded = codes.float() * step
    error = 0.0
    for weight in weights:
        scaled = weight * scale
        points, zero = grid.fit_grid(scaled, scheme.weights)
        approximate = grid.quantize(scaled, points, zero, scheme.weights).dequantize()
        exact = rows @ weight.T
        difference = rounded @ approximate.T - exact
        error += float(difference.square().sum() / exact.square().sum().clamp_min(1e-30))
    return error
