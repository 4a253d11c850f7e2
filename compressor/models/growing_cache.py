"""transformers' key-value cache without its copies.

`DynamicCache` joins old and new keys into a new tensor at every step, which on CPUs costs as much
as the rest of a small model's step. Here new ones are written behind the old ones, in buffers that
grow by half.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_STEP = 256  # slots that are added at once, at least


class _GrowingLayer(DynamicLayer):
    """Keys and values of one decoder block; `keys` and `values` are views of larger buffers."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers = [
            x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, new, width]; returns all, as views."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = start + key_states.shape[2]
        self._buffers = [enlarged(x, end) for x in self._buffers]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (x[:, :, :end] for x in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        if length := self.get_seq_length():
            self._buffers = [x[indices] for x in self._buffers]
            self.keys, self.values = (x[:, :, :length] for x in self._buffers)


def growing_cache(config: Any) -> DynamicCache:
    """A cache for `generate`-like loops: appended to, and rows of it dropped, no more.

    Args:
        config: of the model. Layers that keep something else than all keys and values (sliding
            windows, recurrent states) are transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        _GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def enlarged(buffer: torch.Tensor, slots: int) -> torch.Tensor:
    """Keys or values [rows, heads, held, width] with room for at least so many slots, zeros behind
    those that are there; the same tensor where it has the room."""
    held = buffer.shape[2]
    if slots <= held:
        return buffer
    room = max(-(-slots // _STEP) * _STEP, held + held // 2)
    more = buffer.new_zeros(*buffer.shape[:2], room - held, buffer.shape[3])
    return torch.cat([buffer, more], 2)
