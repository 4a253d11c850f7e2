"""Work shared out over several devices, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from compressor.numerics.memory import gpu_index

_Result = TypeVar("_Result")


def solving_devices(device: str) -> list[str]:
    """Where linears are solved by default: ``device``, and every other GPU if it is one."""
    if torch.device(device).type != "cuda":
        return [device]
    first = gpu_index(device)
    others = [f"cuda:{i}" for i in range(torch.cuda.device_count()) if i != first]
    return [f"cuda:{first}", *others]


def share_out(sizes: Sequence[float], workers: int) -> list[list[int]]:
    """Indices of ``sizes`` for each worker, in rising order: the largest go first, each to whoever
    has least so far (Graham's LPT rule: at most a third beyond the best possible)."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0.0] * workers
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += sizes[index]
    return [sorted(share) for share in shares]


def spread(
    sizes: Sequence[float],
    devices: Sequence[str],
    work: Callable[[list[int], str], Sequence[_Result]],
) -> list[_Result]:
    """Results of items ``0 .. len(sizes) - 1``, in order.

    Args:
        sizes: what each item costs, in any unit.
        devices: where the items may be worked on.
        work: the results of some items, in their order, made on one device. Runs in a thread of
            its own for each device, or in this one when all items go to the same.
    """
    shares = share_out(sizes, len(devices))
    busy = [(share, device) for share, device in zip(shares, devices, strict=True) if share]
    if len(busy) == 1:
        return list(work(*busy[0]))
    found: dict[int, _Result] = {}
    with ThreadPoolExecutor(len(busy)) as pool:
        made = [(share, pool.submit(work, share, device)) for share, device in busy]
        for share, future in made:
            found.update(zip(share, future.result(), strict=True))
    return [found[index] for index in range(len(sizes))]
