"""Devices by their memory, bandwidth and peaks: from data sheets, or measured on the spot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from compressor.errors import RecipeError

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Device:
    """What a roofline needs to know of a device.

    Attributes:
        memory_bytes: for weights and cache.
        bandwidth: of that memory [bytes/s].
        peak: dense multiply-adds by number type, counted as two operations [operations/s].
        price: row of the price table; None when it has none.
        source: where the numbers are from.
    """

    id: str
    label: str
    memory_bytes: float
    bandwidth: float
    peak: Mapping[str, float]
    price: str | None
    source: str

    def peak_of(self, kind: str, fallback: str = "float16") -> float:
        """Peak of a number type [operations/s]; where the device has none such, of floats, since
        kernels then dequantize first."""
        for name in (kind, fallback, "bfloat16", "float16", "float32"):
            if name in self.peak:
                return self.peak[name]
        raise ValueError(f"{self.id} has no peak at all")


@cache
def devices() -> dict[str, Device]:
    """The table of data sheets (``devices.json``), by id."""
    text = resources.files("compressor.measure").joinpath("devices.json").read_text()
    return {
        row["id"]: Device(
            row["id"],
            row["label"],
            row["memory_gb"] * 1e9,
            row["bandwidth_gb_s"] * 1e9,
            {name: value * 1e12 for name, value in row["peak"].items()},
            row["price"],
            row["source"],
        )
        for row in json.loads(text)["rows"]
    }


def find_device(name: str) -> Device:
    """A device by id; ``cpu`` measures this machine's processor (about two seconds).

    Raises RecipeError for an unknown one.
    """
    if name == "cpu":
        return measure_device()
    if name not in devices():
        raise RecipeError(
            f"no device {name!r} is known",
            where="--device",
            fix=f"choose from cpu, {', '.join(devices())}",
        )
    return devices()[name]


def measure_device(seconds: float = 0.3, buffer_bytes: int = 1 << 28) -> Device:
    """This machine's processor: bandwidth of reading, and matrix products, with torch's threads.

    Args:
        seconds: spent on each of the measurements; the best of them counts.
        buffer_bytes: read from memory, far more than caches hold.
    """
    import psutil
    import torch

    buffer = torch.ones(buffer_bytes // 4)
    bandwidth = buffer_bytes / _best(buffer.sum, seconds)
    del buffer
    size = 1024
    peak: dict[str, float] = {}
    for name in ("float32", "bfloat16", "int8"):
        if name == "int8":
            a = torch.ones(size, size, dtype=torch.int8)
            product: Callable[..., torch.Tensor] = torch._int_mm
        else:
            a = torch.ones(size, size, dtype=getattr(torch, name))
            product = torch.mm
        try:
            peak[name] = 2 * size**3 / _best(lambda p=product, x=a: p(x, x), seconds)  # type: ignore[misc]
        except RuntimeError:
            continue  # this build has no such product
    return Device(
        "cpu",
        f"this processor, {torch.get_num_threads()} thread(s)",
        float(psutil.virtual_memory().total),
        bandwidth,
        peak,
        "cpu",
        "measured now: sum of a large array, products of two 1024 x 1024 matrices",
    )


def _best(work: Callable[[], object], seconds: float) -> float:
    """Shortest time of one call [s], after a first one that does not count."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
