"""`columns.round_columns` as one Triton kernel.

Rows of a weight do not see each other. A program holds some rows' part of the block in registers,
goes through its columns, and takes each one's error from those behind it. Import only where Triton
is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from compressor.numerics.scheme import WeightScheme

_ROWS = 8  # of the weight in a program
_LONGEST = 512  # columns that fit into registers


def round_columns_triton(
    block: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: WeightScheme,
    columns: range,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """See `columns.round_columns`; of schemes only those on integers.

    Raises:
        ValueError: the block is longer than 512 columns.
    """
    length, rows = block.shape
    if length > _LONGEST:
        raise ValueError(f"block_size must be at most {_LONGEST} on a GPU, not {length}")
    offsets = scale if zero is None else zero
    grid: Any = (triton.cdiv(rows, _ROWS),)
    _round[grid](
        block, factor, scale, offsets, codes, errors,
        length, rows,
        block.stride(0), factor.stride(0), factor.stride(1), scale.stride(0), scale.stride(1),
        offsets.stride(0), offsets.stride(1), codes.stride(0), errors.stride(0),
        float(scheme.minimum), float(scheme.maximum),
        FIRST=columns.start, LAST=columns.stop, HAS_ZERO=zero is not None,
        LENGTH=triton.next_power_of_2(length), ROWS=_ROWS,
        num_warps=1 if length <= 128 else 4,
    )  # fmt: skip


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    block, factor, scale, zero, codes, errors,
    length, rows,
    block_stride, factor_row, factor_column, scale_column, scale_row,
    zero_column, zero_row, codes_stride, errors_stride,
    minimum, maximum,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_ZERO: tl.constexpr,
    LENGTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, LENGTH)
    inside = row < rows
    where = block + column[:, None] * block_stride + row[None, :]
    there = (column[:, None] < length) & inside[None, :]
    tile = tl.load(where, mask=there, other=0.0)
    for i in range(FIRST, LAST):
        weight = tl.sum(tl.where(column[:, None] == i, tile, 0.0), axis=0)
        step = tl.load(scale + i * scale_column + row * scale_row, mask=inside, other=1.0)
        # Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
        code = tl.div_rn(weight, step)
        code = tl.minimum(tl.maximum(code, -4194304.0), 4194304.0)
        code = (code + 12582912.0) - 12582912.0
        if HAS_ZERO:
            offset = tl.load(zero + i * zero_column + row * zero_row, mask=inside, other=0.0)
            code = tl.minimum(tl.maximum(code + offset, minimum), maximum)
            value = (code - offset) * step
        else:
            code = tl.minimum(tl.maximum(code, minimum), maximum)
            value = code * step
        diagonal = tl.load(factor + i * factor_row + i * factor_column)
        error = tl.div_rn(weight - value, tl.zeros_like(weight) + diagonal)
        tl.store(codes + i * codes_stride + row, code.to(codes.dtype.element_ty), mask=inside)
        tl.store(errors + i * errors_stride + row, error, mask=inside)
        behind = (column > i) & (column < length)
        shares = tl.load(factor + i * factor_row + column * factor_column, mask=behind, other=0.0)
        tile -= shares[:, None] * error[None, :]
    tl.store(where, tile, mask=there)
