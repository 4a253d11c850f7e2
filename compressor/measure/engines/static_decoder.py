"""Decoding a batch in buffers of fixed shapes, so that a GPU can replay a step as one CUDA graph.

A step of a small or quantized model has hundreds of kernels that each take a few microseconds:
launched one by one, they wait for Python. A graph launches them at once. What it reads and writes
are the same tensors each time: the tokens, the mask, and a key-value cache of a fixed length. The
small operations between a block's products are compiled for the capture (`fusion`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from compressor.measure.engines.fusion import fused
from compressor.numerics.kernels import has_triton

_WARM_UP = 2  # steps before one is captured: libraries choose kernels and take memory in the first


class StaticDecoder:
    """One batch size, one length of cache; used again for every batch that fits.

    On a GPU the step is captured when this is made. Where it cannot be (sliding windows, whose
    cache moves by numbers that a graph does not see, or code that waits for the device), steps run
    operation by operation, and `launch` says why.

    Args:
        model: in evaluation mode, on its device; takes ``position_ids``.
        batch: sequences.
        capacity: positions of the cache, for prompt and output.
        last_logit_only: keywords that have the model compute the last position's logits alone.

    Attributes:
        launch: ``CUDA graph`` and whether its small operations are compiled, or why steps are not
            replayed.
    """

    def __init__(
        self, model: nn.Module, batch: int, capacity: int, last_logit_only: dict[str, Any]
    ) -> None:
        self.batch, self.capacity = batch, capacity
        self._model, self._last_logit_only = model, last_logit_only
        device = next(model.parameters()).device
        self._ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._mask = torch.ones(batch, capacity, dtype=torch.long, device=device)
        self._positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)  # type: ignore[arg-type]
        self._graph: Any = None
        self.launch = self._prepare(device)

    @torch.inference_mode()
    def begin(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Read the prompts; the first token of each [batch, 1], on the device.

        Args:
            ids: int64 [batch, length], padded on the left.
            mask: int64 [batch, length], 0 for padding.

        Raises:
            ValueError: the batch has another size, or its prompts do not fit.
        """
        batch, length = ids.shape
        if batch != self.batch or length >= self.capacity:
            raise ValueError(
                f"{batch} prompts of {length} tokens do not fit {self.batch} of {self.capacity}"
            )
        self._cache.reset()
        self._mask.zero_()  # what lies ahead: so attention need not go over it now
        self._mask[:, :length] = mask
        positions = (self._mask[:, :length].cumsum(-1) - 1).clamp_(min=0)
        self._positions.copy_(positions[:, -1:])
        self._forward(ids.to(self._ids.device), positions)
        self._mask[:, length:] = 1
        return self._ids

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """The next token of each [batch, 1], on the device; what it held before is written over."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        return self._ids

    def _step(self) -> None:
        self._positions.add_(1)
        self._forward(self._ids, self._positions)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        # In a step the mask has ones ahead too: what is not there yet is hidden in any case.
        found = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_logit_only,
        )
        self._ids.copy_(found.logits[:, -1].argmax(dim=-1, keepdim=True))

    def _prepare(self, device: torch.device) -> str:
        """Capture the step where the device can; how steps are launched."""
        if device.type != "cuda":
            return f"no graphs on {device.type}"
        if any(getattr(layer, "is_sliding", True) for layer in self._cache.layers):
            return "no graph: the cache has sliding windows"
        ids = torch.zeros(self.batch, 2, dtype=torch.long, device=device)
        try:
            self.begin(ids, torch.ones_like(ids))  # the cache gets its memory here
            if has_triton():
                with contextlib.suppress(RuntimeError), fused(self._model):
                    return self._capture("CUDA graph, small operations compiled")
                torch.cuda.synchronize()
            return self._capture("CUDA graph")
        except RuntimeError as error:
            self._graph = None
            torch.cuda.synchronize()
            return f"no graph: {str(error).splitlines()[0]}"

    @torch.inference_mode()
    def _capture(self, launch: str) -> str:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")  # here, since a failed capture leaves its marks
            try:
                self._step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(current), torch.cuda.graph(graph):
            self._step()
        self._graph = graph
        return launch


class StaticDecoders:
    """Decoders of some sizes, made beforehand since capturing takes as long as many steps. What
    fits is used; a longer cache is made where none is long enough.

    Args:
        sizes: sequences; each is rounded up to a power of two.
        capacity: positions that each has at least.
        make: makes a decoder of (batch, capacity).
    """

    _ROUND = 128  # positions

    def __init__(
        self, sizes: Iterable[int], capacity: int, make: Callable[[int, int], StaticDecoder]
    ) -> None:
        self.sizes = sorted({1 << (size - 1).bit_length() for size in sizes})
        self._capacity, self._make = capacity, make
        self._made: dict[int, StaticDecoder] = {}  # by size

    def prepare(self) -> None:
        """Make those of all sizes."""
        for size in self.sizes:
            self.fitting(size, 1)

    def fitting(self, batch: int, positions: int) -> StaticDecoder | None:
        """One for so many sequences at least, and positions; None for more than any size."""
        size = next((size for size in self.sizes if size >= batch), None)
        if size is None:
            return None
        found = self._made.get(size)
        if found is None or found.capacity < positions:
            self._made.pop(size, None)  # its cache goes first
            length = -(-max(positions, self._capacity) // self._ROUND) * self._ROUND
            found = self._made[size] = self._make(size, length)
        return found

    @property
    def launch(self) -> str | None:
        """How steps are launched, by size where that differs; None before any was made."""
        found = {one.launch: size for size, one in self._made.items()}
        return (
            "; ".join(
                launch if len(found) == 1 else f"{launch} (up to {size})"
                for launch, size in found.items()
            )
            or None
        )

    def clear(self) -> None:
        """Drop all of them."""
        self._made.clear()
