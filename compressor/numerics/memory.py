"""How the process keeps its memory, and how much there is."""

from __future__ import annotations

import ctypes
import functools
import sys

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEEP = 1 << 30


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


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Memory that a device still has, in bytes; the CPU's without pushing anything out to swap."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
