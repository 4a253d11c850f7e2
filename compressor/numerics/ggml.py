"""Codes and scales in the blocks of ggml, which llama.cpp multiplies without unpacking.

Every block is 32 columns of one row. Layouts (ggml/src/ggml-common.h, `block_q4_0` and so on), with
d and m float16:

- Q4_0: d, 16 bytes; value ``(q - 8) * d``. Byte j holds q of column j in its low four bits and q of
  column j + 16 in its high four;
- Q4_1: d, m, 16 bytes in the same order; value ``q * d + m``;
- Q8_0: d, 32 signed bytes; value ``q * d``.

A grid of ours fits where its groups are whole blocks. What is lost is in the float16 numbers alone:
a bfloat16 scale has 8 significant bits and float16 has 11, so d is exact from 2^-17 on; m is the
product of scale and zero point, of up to 12 bits, and may be rounded by a 4096th of itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from compressor.numerics.quantized import QuantizedTensor

BLOCK = 32
# Of one step of the grid: half of a step is what rounding to the grid costs in the worst case.
MAX_ERROR = 1 / 16
_ROWS = 4096


@dataclass(frozen=True)
class Blocks:
    """A weight [out, in] in ggml's blocks.

    Attributes:
        type: Q4_0, Q4_1 or Q8_0.
        data: uint8 [out, bytes per row].
        error: largest difference from the weight that the codes stand for, in steps of the grid
            (scales); 0 where every value is the same.
    """

    type: GGMLQuantizationType
    data: NDArray[np.uint8]
    error: float


def to_blocks(tensor: QuantizedTensor) -> Blocks | str:
    """A quantized weight in ggml's blocks, its codes as they are.

    Returns:
        The blocks, or the reason why no block type holds this grid.
    """
    scheme = tensor.scheme
    columns = tensor.codes.shape[1]
    if scheme.type != "int":
        return "ggml has no blocks of 8-bit floating point"
    if tensor.g_idx is not None:
        return "its columns are grouped by activation order (g_idx)"
    if columns % BLOCK:
        return f"{columns} columns are not whole blocks of {BLOCK}"
    if scheme.strategy == "group" and (scheme.group_size or 0) % BLOCK:
        return f"groups of {scheme.group_size} columns are not whole blocks of {BLOCK}"
    scale = tensor.scale.float()
    codes = tensor.codes.float()
    spread = codes.view(len(codes), scale.shape[1], -1)
    zero = 0 if tensor.zero_point is None else tensor.zero_point.float().unsqueeze(-1)
    steps = (spread - zero).view_as(codes)
    low, high = float(steps.min()), float(steps.max())
    lowest = -8
    minimum = None
    if low >= -8 and high <= 7:
        kind = GGMLQuantizationType.Q4_0
    elif scheme.num_bits <= 4 and tensor.zero_point is not None:
        kind = GGMLQuantizationType.Q4_1
        lowest = scheme.minimum
        minimum = -(tensor.zero_point.float() - lowest) * scale
    elif low >= -128 and high <= 127:
        kind = GGMLQuantizationType.Q8_0
    else:
        return f"values reach from {low:.0f} to {high:.0f} steps, beyond 8 bits"
    d = scale.half()
    m = None if minimum is None else minimum.half()
    stored = _values(steps, codes - lowest, d, m)
    wanted = _per_group(steps, scale)
    step = _per_group(torch.ones_like(steps), scale).abs().clamp_min(torch.finfo().tiny)
    error = float(((stored - wanted).abs() / step).nan_to_num(torch.inf).max())
    if error > MAX_ERROR:
        return (
            f"its scales, down to {float(scale.abs().min()):.1e}, are too far from float16 "
            f"(a value would be {error:.2g} steps off)"
        )
    if kind == GGMLQuantizationType.Q8_0:
        quants = steps.to(torch.int8).numpy().view(np.uint8).reshape(len(codes), -1, BLOCK)
    else:
        unsigned = (codes - lowest if m is not None else steps + 8).to(torch.uint8).numpy()
        halves = unsigned.reshape(len(codes), -1, 2, BLOCK // 2)
        quants = halves[:, :, 0] | (halves[:, :, 1] << 4)
    heads = [_block_bytes(part, columns) for part in (d, m) if part is not None]
    return Blocks(kind, np.concatenate([*heads, quants], axis=-1).reshape(len(codes), -1), error)


def round_to_q8_0(weight: torch.Tensor) -> tuple[NDArray[np.uint8], float] | str:
    """A weight [out, in] rounded to the nearest values of Q8_0, bit for bit as llama.cpp does it.

    Returns:
        Its blocks, uint8 [out, bytes per row], and the length of the error / that of the weight;
        or the reason why no blocks hold it.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        return f"{columns} columns are not whole blocks of {BLOCK}"
    kind = GGMLQuantizationType.Q8_0
    data = np.empty((rows, columns // BLOCK * (2 + BLOCK)), np.uint8)
    error = size = 0.0
    for start in range(0, rows, _ROWS):  # a part at a time: in float32 they take twice the memory
        part = weight[start : start + _ROWS].float().numpy()
        with np.errstate(over="ignore"):  # found out below
            data[start : start + _ROWS] = blocks = quantize(part, kind)
        error += float(np.square(dequantize(blocks, kind) - part, dtype=np.float64).sum())
        size += float(np.square(part, dtype=np.float64).sum())
    if not np.isfinite(error):
        return "it has values that float16 scales cannot reach"
    return data, (error / size) ** 0.5 if size else 0.0


def permute_rows(tensor: QuantizedTensor, order: torch.Tensor) -> QuantizedTensor:
    """The same weight with its rows in another order (int64 [out])."""
    zero = None if tensor.zero_point is None else tensor.zero_point[order]
    return replace(tensor, codes=tensor.codes[order], scale=tensor.scale[order], zero_point=zero)


def _values(
    steps: torch.Tensor, quants: torch.Tensor, d: torch.Tensor, m: torch.Tensor | None
) -> torch.Tensor:
    """What a reader makes of the blocks: float32 [out, in]."""
    if m is None:
        return _per_group(steps, d.float())
    spread = m.float().repeat_interleave(steps.shape[1] // m.shape[1], dim=1)
    return _per_group(quants, d.float()) + spread


def _per_group(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values [out, in] times scale [out, groups], each spread over its columns."""
    return (values.view(len(values), scale.shape[1], -1) * scale.unsqueeze(-1)).view_as(values)


def _block_bytes(part: torch.Tensor, columns: int) -> NDArray[np.uint8]:
    """float16 [out, groups] -> its bytes for every block: uint8 [out, blocks, 2]."""
    blocks = part.repeat_interleave(columns // BLOCK // part.shape[1], dim=1).contiguous()
    return blocks.numpy().view(np.uint8).reshape(len(part), -1, 2)
