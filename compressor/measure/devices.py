"""Devices by their memory, bandwidth and peaks: from data sheets, or measured on the spot."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

from compressor.errors import RecipeError
from compressor.measure.prices import device_id

FLOATS = ("float32", "float16", "bfloat16")
_MEASURED = ("cpu", "gpu")  # of this machine


@dataclass(frozen=True)
class Reading:
    """One measurement of a device: the shortest of `calls` calls.

    Attributes:
        what: ``read`` of memory, or the number type of a matrix product.
        amount: bytes read, or operations done, by one call.
        best_s: time of the shortest call [s].
    """

    what: str
    amount: float
    calls: int
    best_s: float

    @property
    def rate(self) -> float:
        """Bytes or operations per second."""
        return self.amount / self.best_s


@dataclass(frozen=True)
class Device:
    """What a roofline needs to know of a device.

    Attributes:
        memory_bytes: for weights and cache.
        bandwidth: of that memory [bytes/s].
        peak: dense multiply-adds by number type, counted as two operations [operations/s].
        price: row of the price table; None when it has none.
        source: where the numbers are from.
        command: what measures it again; empty for a data sheet's.
        readings: what bandwidth and peaks were taken from, where they were measured.
    """

    id: str
    label: str
    memory_bytes: float
    bandwidth: float
    peak: Mapping[str, float]
    price: str | None
    source: str
    command: str = ""
    readings: tuple[Reading, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {**asdict(self), "peak": dict(self.peak)}
        return found | {"readings": [asdict(one) for one in self.readings]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Device:
        """The inverse of `to_dict`."""
        readings = tuple(Reading(**one) for one in value["readings"])
        return cls(**{**value, "readings": readings})

    def again(self) -> Device:
        """The same with bandwidth and peaks made anew: from the readings, or from the table of
        data sheets. RecipeError where the table has no such device."""
        if not self.readings:
            if self.id not in devices():
                raise RecipeError(
                    f"device {self.id!r} has no readings and no data sheet", where="device"
                )
            return devices()[self.id]
        rates = {one.what: one.rate for one in self.readings}
        return replace(self, bandwidth=rates.pop("read"), peak=rates)

    def peak_of(self, kind: str, fallback: str = "float16") -> float:
        """Peak of a number type [operations/s]; where the device has none such, of floats, since
        kernels then dequantize first."""
        for name in (kind, fallback, "bfloat16", "float16", "float32"):
            if name in self.peak:
                return self.peak[name]
        raise ValueError(f"{self.id} has no peak at all")


@functools.cache
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
    """A device by id; ``cpu`` and ``gpu`` measure this machine's (about two seconds).

    Raises RecipeError for an unknown one, or a GPU that is not there.
    """
    if name in _MEASURED:
        return measure_device(name)
    if name not in devices():
        raise RecipeError(
            f"no device {name!r} is known",
            where="--device",
            fix=f"choose from {', '.join([*_MEASURED, *devices()])}",
        )
    return devices()[name]


def this_device() -> Device:
    """Where models run on this machine: by its data sheet where that is listed, else measured."""
    import torch

    if not torch.cuda.is_available():
        return measure_device("cpu")
    listed = device_id(torch.cuda.get_device_name())
    return devices()[listed] if listed in devices() else measure_device("gpu")


def measure_device(
    kind: str = "cpu",
    seconds: float = 0.3,
    buffer_bytes: int | None = None,
    size: int | None = None,
) -> Device:
    """This machine's processor or GPU: bandwidth of reading, and matrix products.

    Args:
        kind: ``cpu``, with the threads that torch has, or ``gpu``.
        seconds: spent on each of the measurements; the best of them counts.
        buffer_bytes: read from memory, far more than caches hold; 256 MiB, of a GPU 1 GiB.
        size: of the square matrices; 1024, of a GPU 8192.

    Raises RecipeError where there is no GPU.
    """
    import psutil
    import torch

    gpu = kind == "gpu"
    if gpu and not torch.cuda.is_available():
        raise RecipeError("torch finds no GPU here", where="--device", fix="use cpu, or its name")
    place = torch.device("cuda" if gpu else "cpu")
    wait = torch.cuda.synchronize if gpu else lambda: None
    buffer_bytes = buffer_bytes or (1 << 30 if gpu else 1 << 28)
    size = size or (8192 if gpu else 1024)
    buffer = torch.ones(buffer_bytes // 4, device=place)
    readings = [_best("read", buffer_bytes, buffer.sum, wait, seconds)]
    del buffer
    for name in ("float32", *(["float16"] if gpu else []), "bfloat16", "int8"):
        matrix = torch.ones(size, size, dtype=getattr(torch, name), device=place)
        product = torch._int_mm if name == "int8" else torch.mm
        work = functools.partial(product, matrix, matrix)  # type: ignore[arg-type]
        with contextlib.suppress(RuntimeError):  # this build has no such product
            readings.append(_best(name, 2 * size**3, work, wait, seconds))
    if gpu:
        label = torch.cuda.get_device_name()
        memory, price = torch.cuda.get_device_properties(place).total_memory, device_id(label)
    else:
        label = f"this processor, {torch.get_num_threads()} thread(s)"
        memory, price = psutil.virtual_memory().total, "cpu"
    rates = {one.what: one.rate for one in readings}
    return Device(
        kind,
        label,
        float(memory),
        rates.pop("read"),
        rates,
        price,
        f"measured: sum of an array of {buffer_bytes >> 20} MiB, products of two {size} x {size} "
        "matrices",
        f"python -m compressor.measure.devices {kind}",
        tuple(readings),
    )


def _best(
    what: str,
    amount: float,
    work: Callable[[], object],
    wait: Callable[[], object],
    seconds: float,
) -> Reading:
    """The shortest call in that time, after a first one that does not count."""
    work()
    wait()
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while not calls or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        wait()
        best, calls = min(best, time.perf_counter() - started), calls + 1
    return Reading(what, float(amount), calls, best)


if __name__ == "__main__":
    try:
        found = find_device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    except RecipeError as error:
        sys.exit(str(error))
    print(json.dumps(found.to_dict(), indent=1))
