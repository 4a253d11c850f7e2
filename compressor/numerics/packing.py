"""Low-bit integers in int32 words: by compressed-tensors' own functions, and as GPTQ and AWQ do."""

from __future__ import annotations

from typing import Literal

import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)


def pack_int32(values: torch.Tensor, num_bits: int, packed_dim: Literal[0, 1] = 1) -> torch.Tensor:
    """Signed int8 codes [rows, cols] -> int32, first element in the lowest bits, stored unsigned
    (code + 2^(b-1)); ``packed_dim`` shrinks by 32 / num_bits."""
    if packed_dim == 0:
        return pack_int32(values.T.contiguous(), num_bits).T.contiguous()
    return pack_to_int32(values, num_bits).contiguous()


def unpack_int32(
    packed: torch.Tensor, num_bits: int, shape: torch.Size, packed_dim: Literal[0, 1] = 1
) -> torch.Tensor:
    """Inverse of `pack_int32`; ``shape`` is that of the signed int8 codes."""
    if packed_dim == 0:
        # compressed-tensors 0.20 views the transposed words as bytes, which fails for one row of
        # them: a column counts as contiguous whatever its stride. A clone has the strides it needs.
        words = packed.t().clone(memory_format=torch.contiguous_format)
        return unpack_from_int32(words, num_bits, torch.Size(shape[::-1])).t().contiguous()
    return unpack_from_int32(packed, num_bits, shape).contiguous()


def pack_words(values: torch.Tensor, num_bits: int, dim: Literal[0, 1]) -> torch.Tensor:
    """Unsigned integers [rows, cols] of 2, 4 or 8 bits -> int32 words, along ``dim``, first element
    in the lowest bits; that dimension shrinks by 32 / num_bits, which must divide it."""
    count = 32 // num_bits
    parts = values.to(torch.int32).unflatten(dim, (-1, count)).unbind(dim + 1)
    words = torch.zeros_like(parts[0])
    for position, part in enumerate(parts):
        words |= part << (num_bits * position)
    return words.contiguous()


def unpack_words(words: torch.Tensor, num_bits: int, dim: Literal[0, 1]) -> torch.Tensor:
    """Inverse of `pack_words`: int32 [rows, cols], values from 0 to 2^num_bits - 1."""
    shifts = range(0, 32, num_bits)
    mask = (1 << num_bits) - 1
    return torch.stack([(words >> s) & mask for s in shifts], dim + 1).flatten(dim, dim + 1)
