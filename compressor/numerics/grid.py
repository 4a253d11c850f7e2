"""Fit a grid to weights, and round to it.

Symmetric grids use the whole signed range, with ``scale = absmax / ((2^b - 1) / 2)``, as
compressed-tensors' ``calculate_qparams`` does; asymmetric grids always contain zero. The points of
a grid are integers, or the numbers of float8_e4m3fn, whose steps grow with their size
(``scale = absmax / 448``).
"""

from __future__ import annotations

from typing import Literal

import torch

from compressor.numerics.quantized import CODE_DTYPE, QuantizedTensor
from compressor.numerics.scheme import FP8_MAX, WeightScheme

Observer = Literal["minmax", "mse", "output"]
_SHRINK_STEPS = 20
_SHRINK_TO = 0.6


def fit_grid(
    weight: torch.Tensor,
    scheme: WeightScheme,
    observer: Observer = "minmax",
    scale_dtype: torch.dtype = torch.float32,
    hessian: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of every group of a weight.

    Args:
        weight: float32 [out, in].
        scheme: the grid.
        observer: ``minmax`` spans all weights of the group; ``mse`` tries ranges down to 60% of
            that and keeps the one with the least error of the weights; ``output`` the one with the
            least error of the group's share of the output (the clip search of AWQ, arXiv
            2306.00978, with the inputs' second moments in place of the inputs themselves).
        scale_dtype: dtype that scales will be stored in; they are rounded to it here, so that the
            codes chosen afterwards fit the stored scales.
        hessian: float32 [in, in], needed by ``output``.

    Returns:
        scale float32 [out, groups], zero_point int8 [out, groups] or None.

    Raises:
        ValueError: group_size does not divide the columns, or ``output`` has no Hessian.
    """
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    if scheme.strategy == "tensor":
        if observer == "output":
            raise ValueError("observer `output` works by channel or group, not by tensor")
        scale, zero = _fit(weight.reshape(1, 1, -1), scheme, observer, scale_dtype)
        scale = scale.expand(rows, 1).contiguous()
        return scale, None if zero is None else zero.expand(rows, 1).contiguous()
    moments = None
    if observer == "output":
        if hessian is None:
            raise ValueError("observer `output` needs the Hessian of the layer's input")
        width = columns // groups
        parts = [hessian[i : i + width, i : i + width] for i in range(0, columns, width)]
        moments = torch.stack(parts)
        # Group by group: what is multiplied by each group's moments lies together.
        apart = weight.reshape(rows, groups, -1).transpose(0, 1).contiguous()
        scale, zero = _fit(apart, scheme, observer, scale_dtype, moments)
        return scale.T.contiguous(), None if zero is None else zero.T.contiguous()
    return _fit(weight.reshape(rows, groups, -1), scheme, observer, scale_dtype)


def _fit(
    x: torch.Tensor,
    scheme: WeightScheme,
    observer: Observer,
    scale_dtype: torch.dtype,
    moments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    low = x.amin(-1).clamp_max(0.0)
    high = x.amax(-1).clamp_min(0.0)
    best = _qparams(low, high, scheme, scale_dtype)
    if observer != "minmax":
        error = _error(x, *best, scheme, moments)
        for step in range(1, _SHRINK_STEPS + 1):
            factor = 1 - (1 - _SHRINK_TO) * step / _SHRINK_STEPS
            trial = _qparams(low * factor, high * factor, scheme, scale_dtype)
            trial_error = _error(x, *trial, scheme, moments)
            better = trial_error < error
            error = torch.where(better, trial_error, error)
            best = (
                torch.where(better, trial[0], best[0]),
                None if best[1] is None else torch.where(better, trial[1], best[1]),  # type: ignore[arg-type]
            )
    return best


def _qparams(
    low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    steps = scheme.maximum - scheme.minimum
    scale = torch.maximum(-low, high) * 2.0 if scheme.symmetric else high - low
    scale = (scale / steps).to(scale_dtype).float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if scheme.symmetric:
        return scale, None
    zero = torch.round(scheme.minimum - low / scale).clamp(scheme.minimum, scheme.maximum)
    return scale, zero.to(torch.int8)


def _error(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: WeightScheme,
    moments: torch.Tensor | None,
) -> torch.Tensor:
    """Error of every group [..., width] of the weights, or of their outputs where moments [groups,
    width, width] of weights [groups, out, width] are given."""
    step = scale.unsqueeze(-1)
    if scheme.type == "float":
        error = round_to_float8(x / step)
    elif zero is None:
        error = (x / step).round_().clamp_(scheme.minimum, scheme.maximum)
    else:
        error = (x / step).round_()
        offset = zero.float().unsqueeze(-1)
        error.add_(offset).clamp_(scheme.minimum, scheme.maximum).sub_(offset)
    error.mul_(step).sub_(x)
    if moments is None:
        # |error|^2.5: GPTQ's own clip search takes 2.4, for which there is no quick instruction.
        return error.abs_().sqrt().mul_(error).mul_(error).sum(-1)
    return torch.bmm(error, moments).mul_(error).sum(-1)


def round_to_grid(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: WeightScheme,
) -> torch.Tensor:
    """Float codes of weights on per-element (broadcast) scales; ties go to even."""
    if scheme.type == "float":
        return round_to_float8(weight / scale)
    codes = torch.round(weight / scale)
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp_(scheme.minimum, scheme.maximum)


def round_to_float8(x: torch.Tensor) -> torch.Tensor:
    """The nearest float8_e4m3fn of float32 numbers, as float32; ties go to the even mantissa, and
    what lies beyond the largest goes to it."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def quantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: WeightScheme,
    g_idx: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round a weight [out, in] to the nearest points of its grid."""
    rows, columns = weight.shape
    if g_idx is None:
        shaped = weight.view(rows, scale.shape[1], -1)
        zero = None if zero_point is None else zero_point.float().unsqueeze(-1)
        codes = round_to_grid(shaped, scale.unsqueeze(-1), zero, scheme)
    else:
        index = g_idx.long()
        zero = None if zero_point is None else zero_point.float()[:, index]
        codes = round_to_grid(weight, scale[:, index], zero, scheme)
    codes = codes.view(rows, columns).to(CODE_DTYPE[scheme.type])
    return QuantizedTensor(codes, scale, zero_point, g_idx, scheme)
