"""Low-bit integers packed into int32, by compressed-tensors' own functions."""

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
