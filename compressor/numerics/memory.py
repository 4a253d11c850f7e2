"""How the process keeps its memory, and how much there is."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEEP = 1 << 30
CONTROL_GROUP = Path("/sys/fs/cgroup")
_resident = 0  # bytes of the process after freed pages were last handed back
WAITING_SHARE = 0.4  # of the free memory that batches may take which wait for a linear


@functools.cache
def keep_freed_pages() -> bool:
    """Have glibc reuse freed memory where it would hand it back to the kernel.

    torch frees and allocates the same tens of megabytes at every step of a forward pass; by
    default each comes from the kernel page by page, zeroed, which takes a fifth of the time.

    Returns:
        Whether it was done; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP) and mallopt(_M_TRIM_THRESHOLD, _KEEP))


def release_freed_pages() -> None:
    """Hand what is free in glibc's heap back to the kernel, also in the middle of it, once a
    gigabyte has come together.

    The counterpart of `keep_freed_pages`, between pieces of work whose allocations differ in size:
    what one leaves in pieces, the next cannot use, and the heap would grow with every piece.
    """
    global _resident
    process = psutil.Process()
    if keep_freed_pages() and process.memory_info().rss - _resident > _KEEP:
        ctypes.CDLL(None).malloc_trim(0)
        _resident = process.memory_info().rss


def free_bytes(device: Any = "cpu") -> int:
    """Memory that a device still has, in bytes.

    Of a GPU what this process can still allocate, within
    ``torch.cuda.set_per_process_memory_fraction``.

    Of the CPU what this process can get without pushing anything out to swap: the system's, or its
    control group's if that has less (cgroup v2, kernel documentation "Control Group v2").

    Args:
        device: as torch knows it, a string or a ``torch.device``.
    """
    if str(device).startswith("cuda"):
        import torch  # the plan asks for the CPU's, and does without torch

        device = gpu_index(device)
        free, total = torch.cuda.mem_get_info(device)
        used, taken = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(min(free + taken, allowed) - used, 0)
    free = psutil.virtual_memory().available
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((CONTROL_GROUP / "memory.current").read_text())
            stat = dict(
                line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines()
            )
            free = min(free, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def gpu_index(device: Any) -> int:
    """Number of a GPU; of the one in use where ``device`` names none."""
    import torch

    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def training_bytes(
    parameters: int,
    itemsize: int,
    tokens: tuple[int, ...],
    hidden: int,
    layers: int,
    vocabulary: int,
) -> int:
    """Memory that training the scales of a whole quantized model takes, roughly.

    Args:
        parameters: of the model.
        itemsize: bytes of a number in the dtype that it runs in.
        tokens: samples and tokens of each.
        hidden, layers, vocabulary: width, number of blocks, tokens that are told apart.
    """
    samples, length = tokens
    kept = 40 * length * hidden * layers * itemsize  # activations for the way back
    kept += samples * length * hidden * itemsize  # what the original makes of them
    kept += 10 * 4 * 256 * vocabulary  # distributions of a few tokens at a time
    # Codes and the weights made of them; factors, gradients and moments for groups of 32 and up.
    return int((2 * itemsize + 0.7) * parameters) + kept + 700_000_000
