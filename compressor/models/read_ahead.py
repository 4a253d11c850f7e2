"""Tensors read in the background while something else is computed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from compressor.models.checkpoint import Checkpoint


class ReadAhead:
    """Starts reading at once, in a thread; whoever needs a tensor takes it.

    For a GPU the tensors are read into pinned memory and copied on a stream of their own, so that
    the copy too runs beside the computation.

    Args:
        checkpoint: what is read from.
        keys: tensors to read, in the order they will be taken.
        device: where they are to go.
    """

    def __init__(
        self, checkpoint: Checkpoint, keys: Sequence[str], device: str | torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._keys = set(keys)
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        self._found: dict[str, torch.Tensor] = {}
        self._thread = threading.Thread(target=self._read, args=(list(keys),), daemon=True)
        self._thread.start()

    def take(self, key: str) -> torch.Tensor | None:
        """The tensor as it is stored, on its device; None where it was not asked for or could not
        be read (the caller's own reading then meets the same error)."""
        if key not in self._keys:
            return None
        self._thread.join()
        value = self._found.pop(key, None)
        if value is not None and self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            value.record_stream(current)
        return value

    def _read(self, keys: list[str]) -> None:
        try:
            for key in keys:
                value = self._checkpoint.tensor(key, pinned=self._cuda)
                if self._stream is not None:
                    with torch.cuda.stream(self._stream):
                        value = value.to(self._device, non_blocking=True)
                self._found[key] = value
        except Exception:
            # Not an error yet: the block may never be needed. Memory may also lack only for now.
            return
