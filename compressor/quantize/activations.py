"""Where the calibration activations of a walk live: on a GPU that has the room, else in memory, or
in a mapped file where they would take too much of it."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from compressor.errors import RunError
from compressor.numerics.memory import free_bytes

# Of the free memory that activations may take; block weights and Hessians need the rest.
ACTIVATIONS_SHARE = float(os.environ.get("COMPRESSOR_ACTIVATIONS_SHARE", "0.5"))
_GPU_SHARE = 0.25  # the same of a GPU's, where block, Hessians and batches that wait are too


Place = Literal["device", "memory", "disk"]


def kept_on(size: int, device: str) -> Place:
    """Where activations of ``size`` bytes are kept of a walk that runs on ``device``."""
    if torch.device(device).type == "cuda" and size <= _GPU_SHARE * free_bytes(device):
        return "device"
    return "memory" if size <= ACTIVATIONS_SHARE * free_bytes() else "disk"


def allocate(
    shape: Sequence[int], dtype: torch.dtype, directory: Path | None, device: str = "cpu"
) -> torch.Tensor:
    """A tensor whose values are not set yet.

    Args:
        shape: at least one element.
        dtype: of the elements.
        device: whose memory, where there is no directory.
        directory: None for memory. Else the tensor is mapped from a file there that has no name:
            the kernel frees it with the tensor, or when the process dies however it dies.

    Raises:
        RunError: no room for the file.
    """
    if directory is None:
        return torch.empty(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            # All of it now: a disk that fills up under a mapping kills the process.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise RunError(
                f"no room for {size / 1e9:.1f} GB of calibration activations ({error.strerror})",
                where=str(directory),
                fix="free disk space, or lower `calibration.samples`",
            ) from error
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=dtype).view(*shape)
