"""Quantize the output layer (lm_head), often the largest matrix of a model.

It is solved in parts of its rows, since algorithms make several float32 copies of what they are
given and rows do not see each other: the codes are those of the whole at once, save that GPTQ falls
back to round-to-nearest for each part by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compressor.numerics.quantized import QuantizedTensor
from compressor.quantize.registry import Algorithm, LayerRefinement, WeightResult

PART_ELEMENTS = 1 << 23  # of a part: 32 MB in float32
_LEAST_ROWS = 4  # of a part, for each column: below, factorising the Hessian each time would show


def quantize_in_parts(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    algorithm: Algorithm,
    refinements: Sequence[LayerRefinement] = (),
    device: str | torch.device = "cpu",
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda part: part,
) -> WeightResult:
    """Quantize a tall weight by ``algorithm`` and ``refinements``, part by part.

    Args:
        weight: [out, in] of any float dtype; only parts of it are converted to float32.
        hessian: float32 [in, in] of its input; None for algorithms that need none.
        algorithm: turns each part into codes.
        refinements: applied to each part after that, in this order; they need the Hessian.
        device: where parts are solved; the result is on the CPU.
        prepare: applied to each float32 part before anything else; works row by row.

    Returns:
        the whole weight's codes and errors, without ``rounded``. ``fallback`` says that some part
        fell back.

    Raises:
        ValueError: the weight cannot take the scheme.
    """
    columns = weight.shape[1]
    rows = max(PART_ELEMENTS // columns, _LEAST_ROWS * columns, 1)
    parts, sizes = _solve(weight, hessian, algorithm, refinements, device, prepare, rows)
    if len({part.tensor.g_idx is None for part in parts}) > 1:
        # Some parts fell back to contiguous groups and others did not: one order is for all rows.
        parts, sizes = _solve(weight, hessian, algorithm, refinements, device, prepare, len(weight))
    total = max(sum(sizes), 1e-30)
    return WeightResult(
        _join([part.tensor for part in parts]),
        sum(part.error * size for part, size in zip(parts, sizes, strict=True)) / total,
        sum(part.rtn_error * size for part, size in zip(parts, sizes, strict=True)) / total,
        fallback=any(part.fallback for part in parts),
        damp=parts[0].damp,
    )


def _solve(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    algorithm: Algorithm,
    refinements: Sequence[LayerRefinement],
    device: str | torch.device,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    rows: int,
) -> tuple[list[WeightResult], list[float]]:
    """Results of each part of ``rows`` rows, and the size of its output, tr(W H W^T)."""
    parts, sizes = [], []
    for some in weight.split(rows):
        part = prepare(some.to(device, torch.float32))
        (result,) = algorithm.quantize_all([part], hessian)
        for refinement in refinements:
            assert hessian is not None
            result = refinement.refine(part, result, hessian)
        result.rounded = None
        result.tensor = _to_cpu(result.tensor)
        parts.append(result)
        reach = part if hessian is None else part @ hessian
        sizes.append(float((reach * part).sum(dtype=torch.float64)))
    return parts, sizes


def _to_cpu(tensor: QuantizedTensor) -> QuantizedTensor:
    zero, order = tensor.zero_point, tensor.g_idx
    return QuantizedTensor(
        tensor.codes.cpu(),
        tensor.scale.cpu(),
        None if zero is None else zero.cpu(),
        None if order is None else order.cpu(),
        tensor.scheme,
    )


def _join(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One tensor with the rows of all."""
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].g_idx,
        parts[0].scheme,
    )
