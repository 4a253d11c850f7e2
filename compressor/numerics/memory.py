"""How the process keeps its memory, and how much there is."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil

from compressor.errors import RunError

Rows = TypeVar("Rows")  # what slices give parts of
Made = TypeVar("Made")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEEP = 1 << 30
CONTROL_GROUP = Path("/sys/fs/cgroup")
WAITING_SHARE = 0.4  # of the free memory that batches may take which wait for a linear
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")
_resident = 0  # bytes of the process after freed pages were last handed back


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
    if process.memory_info().rss - _resident > _KEEP:
        trim()
        _resident = process.memory_info().rss


def trim() -> None:
    """Hand what is free in glibc's heap back to the kernel."""
    if keep_freed_pages():
        ctypes.CDLL(None).malloc_trim(0)


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


@contextlib.contextmanager
def suppress_out_of_memory() -> Iterator[None]:
    """Go on behind the block where an allocation in it failed, on a GPU or on this machine."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    trim()  # what was freed lies in pieces that a smaller batch may not use


@contextlib.contextmanager
def refuse_out_of_memory(what: str, where: str, fix: str) -> Iterator[None]:
    """One error to read where an allocation in the block fails, on a GPU or on this machine."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise RunError(what, where=where, fix=fix) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a GPU, on the CPU or of a mapped file
    (plain RuntimeErrors), a thread's stack, or another mapping."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def in_batches(
    rows: Rows,
    size: int,
    work: Callable[[Rows], Made],
    lowered: Callable[[int], None] = lambda size: None,
) -> Iterator[tuple[Rows, Made]]:
    """Work on rows in batches, of half the size from where memory does not suffice.

    Args:
        rows: a sequence, or an array.
        size: rows of a batch, at most.
        work: makes something of a batch.
        lowered: called with each new size.

    Yields:
        A batch, and what was made of it, in order.

    Raises:
        RunError: memory does not suffice for one row.
    """
    start, every = 0, cast(Any, rows)
    while start < len(every):
        part = every[start : start + size]
        made: list[Made] = []
        with suppress_out_of_memory():
            made.append(work(part))
        if made:
            yield part, made.pop()
            start += len(part)
            continue
        size = halved(len(part))
        lowered(size)


def halved(size: int) -> int:
    """Half as many; RunError where there is but one."""
    if size <= 1:
        raise RunError(
            "too little memory for a batch of one",
            fix="shorten the texts, or use a machine or device with more memory",
        )
    return size // 2


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
