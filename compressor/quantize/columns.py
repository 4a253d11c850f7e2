"""The inner loop of GPTQ: columns of one block rounded one after the other.

`round_columns_loop` is made of tensor operations. On a GPU each of those is a launch of a few
microseconds, seven a column, for some nanoseconds of work; there the whole loop is one kernel
(`columns_triton.py`), with the same result up to the rounding of fused multiply-adds.
`round_columns` takes whichever fits.
"""

from __future__ import annotations

import torch

from compressor.numerics import grid
from compressor.numerics.kernels import has_triton
from compressor.numerics.scheme import WeightScheme


def round_columns(
    block: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: WeightScheme,
    columns: range,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Round ``columns`` of a block, taking each one's error from all columns behind it.

    Args:
        block: float32 [in, out], a row for each column of the weight, changed in place: what is
            rounded stays as it was just before.
        factor: float32 [in, in], the block's part of the Cholesky factor (`gptq.inverse_factor`).
        scale: float32 [in, out] of each column; may be expanded.
        zero: the same of its zero point, None where the scheme is symmetric.
        scheme: the grid.
        columns: which, consecutive.
        codes: gets the codes, int8 or float32 [in, out].
        errors: float32 [in, out], gets (weight - rounded) / factor[i, i].
    """
    if block.is_cuda and scheme.type == "int" and has_triton():
        from compressor.quantize.columns_triton import round_columns_triton

        round_columns_triton(block, factor, scale, zero, scheme, columns, codes, errors)
    else:
        round_columns_loop(block, factor, scale, zero, scheme, columns, codes, errors)


def round_columns_loop(
    block: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: WeightScheme,
    columns: range,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """See `round_columns`; of any scheme, on any device."""
    for i in columns:
        step, offset = scale[i], None if zero is None else zero[i]
        code = grid.round_to_grid(block[i], step, offset, scheme)
        codes[i] = code
        value = (code if offset is None else code - offset) * step
        errors[i] = (block[i] - value) / factor[i, i]
        if i + 1 < len(block):
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
