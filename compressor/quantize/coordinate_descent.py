"""Coordinate descent: change one column's codes at a time, for as long as the output error falls.

Behdin, Acharya, Gupta, Keerthi, Mazumder, Song, Siyu: "QuantEase: Optimization-based Quantization
for Language Models", arXiv 2309.01885. With the other columns fixed, the best value of column j is
w_j - (E H)_j / H_jj, E being the error without it, rounded to the grid; no step can make the
layer's output worse. In between, each group's scale is set to the least-squares solution for its
codes (also exact), so it starts where GPTQ or round-to-nearest ended and goes downhill from there.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from pydantic import Field

from compressor.numerics import grid
from compressor.numerics.quantized import QuantizedTensor
from compressor.quantize.registry import (
    AlgorithmOptions,
    WeightResult,
    register,
    relative_error,
)

_BLOCK = 128


class CoordinateDescentOptions(AlgorithmOptions):
    """Options of coordinate descent."""

    passes: int = Field(4, ge=1, description="Times that every column is visited.")
    damp: float = Field(
        0.01, ge=0, le=1, description="Share of the mean diagonal added to the Hessian."
    )
    refit_scales: bool = Field(
        True, description="Set the scales to the least-squares solution before each pass."
    )

    def work(self, parameters: int, width: int, length: int) -> float:
        return 6.0 * self.passes * parameters * width


@register("coordinate_descent")
class CoordinateDescent:
    """Refines the codes and scales of a quantized layer by its own output error.

    Args:
        options: see `CoordinateDescentOptions`.
        scale_dtype: dtype that scales are stored in.
    """

    Options: ClassVar[type[CoordinateDescentOptions]] = CoordinateDescentOptions
    kind: ClassVar[str] = "refinement"
    level: ClassVar[str] = "layer"

    def __init__(
        self, options: CoordinateDescentOptions, scale_dtype: torch.dtype = torch.float32
    ) -> None:
        self.options = options
        self.scale_dtype = scale_dtype

    def refine(
        self, weight: torch.Tensor, result: WeightResult, hessian: torch.Tensor
    ) -> WeightResult:
        """A result whose (damped) output error is at most that of ``result``.

        Args:
            weight: float32 [out, in], the target.
            result: of the step before.
            hessian: float32 [in, in], 2/n sum x x^T of the layer's inputs.
        """
        diagonal = torch.diagonal(hessian)
        damped = hessian + torch.diag((self.options.damp * diagonal.mean()).expand_as(diagonal))
        best, rounded = result.tensor, result.rounded
        least = relative_error(weight, best.dequantize(), damped)
        tensor = best
        for _ in range(self.options.passes):
            if self.options.refit_scales:
                tensor = self._refit(weight, tensor, damped)
            tensor, seen = _descend(weight, tensor, damped)
            error = relative_error(weight, tensor.dequantize(), damped)
            if not error < least:
                break
            best, least, rounded = tensor, error, seen
        error = relative_error(weight, best.dequantize(), hessian)
        return dataclasses.replace(result, tensor=best, error=error, rounded=rounded)

    def _refit(
        self, weight: torch.Tensor, tensor: QuantizedTensor, hessian: torch.Tensor
    ) -> QuantizedTensor:
        """Scales by least squares, one small system per row; kept where rounding them to their
        storage dtype does not lose more than was gained."""
        index = tensor.column_groups()
        groups = tensor.scale.shape[1]
        shifted = tensor.codes.float()
        if tensor.zero_point is not None:
            shifted = shifted - tensor.zero_point.float()[:, index]
        rows = len(shifted)
        members = torch.zeros(len(index), groups, device=weight.device)
        members[torch.arange(len(index), device=weight.device), index] = 1.0
        system = torch.empty(rows, groups, groups, device=weight.device)
        for group in range(groups):
            of_group = index == group
            reach = shifted[:, of_group] @ hessian[of_group]  # [rows, in]
            system[:, group] = (reach * shifted) @ members
        wanted = (shifted * (weight @ hessian)) @ members
        diagonal = torch.diagonal(system, dim1=1, dim2=2)
        ridge = 1e-6 * diagonal.mean(1, keepdim=True).clamp_min(1e-20)
        diagonal += torch.where(diagonal > 0, ridge, ridge.clamp_min(1.0))
        lower, failed = torch.linalg.cholesky_ex(system)
        solved = torch.cholesky_solve(wanted.unsqueeze(-1), lower).squeeze(-1)
        solved = solved.to(self.scale_dtype).float()
        usable = (failed == 0).unsqueeze(1) & torch.isfinite(solved) & (solved > 0)
        usable = usable.all(1, keepdim=True)
        trial = dataclasses.replace(tensor, scale=torch.where(usable, solved, tensor.scale))
        before, after = (_row_error(weight, t.dequantize(), hessian) for t in (tensor, trial))
        keep = (after < before).unsqueeze(1)
        return dataclasses.replace(tensor, scale=torch.where(keep, trial.scale, tensor.scale))


def _row_error(
    weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    difference = approximation - weight
    return ((difference @ hessian) * difference).sum(1)


def _descend(
    weight: torch.Tensor, tensor: QuantizedTensor, hessian: torch.Tensor
) -> tuple[QuantizedTensor, torch.Tensor]:
    """One visit of every column; the new codes, and what each was rounded from [out, in]."""
    index = tensor.column_groups()
    scheme = tensor.scheme
    diagonal = torch.diagonal(hessian)
    floor = 1e-6 * diagonal.mean().clamp_min(1e-20)
    scale = tensor.scale.T.contiguous()[index]  # [in, out], like everything below
    zero = None if tensor.zero_point is None else tensor.zero_point.float().T.contiguous()[index]
    target = weight.T
    value = tensor.dequantize().T.contiguous()
    codes = tensor.codes.T.float().contiguous()
    rounded = torch.empty_like(value)
    slope = hessian @ (value - target)  # [in, out]
    for start in range(0, len(index), _BLOCK):
        stop = min(start + _BLOCK, len(index))
        local = hessian[start:stop, start:stop].contiguous()
        near = slope[start:stop].clone()
        change = torch.zeros_like(near)
        for i in range(stop - start):
            column = start + i
            if diagonal[column] <= floor:
                rounded[column] = value[column]
                continue
            wish = value[column] - near[i] / diagonal[column]
            offset = None if zero is None else zero[column]
            code = grid.round_to_grid(wish, scale[column], offset, scheme)
            new = (code if offset is None else code - offset) * scale[column]
            rounded[column] = wish
            change[i] = new - value[column]
            codes[column], value[column] = code, new
            near[i:].addr_(local[i:, i], change[i])
        slope.addmm_(hessian[:, start:stop], change)
    made = dataclasses.replace(tensor, codes=codes.T.to(torch.int8).contiguous())
    return made, rounded.T.contiguous()
