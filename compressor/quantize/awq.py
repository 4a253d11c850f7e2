"""AWQ: protect the weights that meet large activations by scaling them up before rounding.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight Quantization
for LLM Compression and Acceleration", arXiv 2306.00978. Input channel j of a linear is divided by
s_j = mean|x_j|^a / mean|w_j|^(1-a) and column j of the weight multiplied by it; the division goes
into the layer before. The exponent a is searched per input for the least output error with weights
rounded to nearest (equation 5); that error is exact, from the inputs' second moments, so the search
runs no forward pass. The paper's clip search is the observer ``output`` of the quantizer that
follows: ``[awq, {rtn: {scheme: W4A16, observer: output}}]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from compressor.numerics import grid
from compressor.numerics.scheme import Scheme
from compressor.quantize.registry import AlgorithmOptions, register
from compressor.quantize.statistics import InputStatistics


class AWQOptions(AlgorithmOptions):
    """Options of AWQ."""

    steps: int = Field(20, ge=1, description="Exponents tried between 0 and 1.")
    duo_scaling: bool = Field(
        True, description="Divide by the mean of the weights as well as multiply by the inputs'."
    )

    def work(self, parameters: int, width: int, length: int) -> float:
        return 2.0 * (self.steps + 1) * parameters * width


@register("awq")
class AWQ:
    """Chooses the channel scales that leave the least weight rounding error in the output.

    Args:
        options: see `AWQOptions`.
    """

    Options: ClassVar[type[AWQOptions]] = AWQOptions
    kind: ClassVar[str] = "transform"

    def __init__(self, options: AWQOptions) -> None:
        self.options = options

    def scales(
        self, weights: Sequence[torch.Tensor], statistics: InputStatistics, scheme: Scheme
    ) -> torch.Tensor:
        """Divisors of the input's channels, float32 [in]; ones where scaling does not help.

        Args:
            weights: float32 [out, in] of every linear that reads this input.
            statistics: of the input.
            scheme: how weights will be rounded.
        """
        hessian, size = statistics.hessian, statistics.absmean
        powers = [float(((w @ hessian) * w).sum().clamp_min(1e-30)) for w in weights]
        best = torch.ones_like(size)
        mean = _normalised_mean(weights, scheme)
        least = _error(weights, powers, hessian, best, scheme)
        for step in range(1, self.options.steps + 1):
            exponent = step / self.options.steps
            trial = size.clamp_min(1e-8).pow(exponent)
            if self.options.duo_scaling:
                trial = trial / mean.pow(1 - exponent).clamp_min(1e-4)
            trial = torch.where(size > 0, trial.clamp_min(1e-4), 1.0)
            trial = trial / (trial.max() * trial.min()).sqrt()
            error = _error(weights, powers, hessian, trial, scheme)
            if error < least:
                best, least = trial, error
        return best


def _normalised_mean(weights: Sequence[torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """Mean magnitude of each column, every group of weights first brought to a largest of one."""
    joined = torch.cat(list(weights)).abs()
    rows, columns = joined.shape
    grouped = joined.view(rows, scheme.weights.groups(columns), -1)
    return (grouped / grouped.amax(-1, keepdim=True).clamp_min(1e-6)).view(rows, columns).mean(0)


def _error(
    weights: Sequence[torch.Tensor],
    powers: Sequence[float],
    hessian: torch.Tensor,
    scale: torch.Tensor,
    scheme: Scheme,
) -> float:
    """Summed output error, each relative to the output's own power, with the scaled weights rounded
    to nearest."""
    total = 0.0
    for weight, power in zip(weights, powers, strict=True):
        scaled = weight * scale
        points, zero = grid.fit_grid(scaled, scheme.weights)
        rounded = grid.quantize(scaled, points, zero, scheme.weights).dequantize()
        difference = rounded.div_(scale).sub_(weight)
        total += float(((difference @ hessian) * difference).sum()) / power
    return total
