"""Energy: measured by the GPU's or the CPU's own counters where they can be read, else declared.

Sources, in the order in which they are tried:
    nvml     the GPU's total energy counter (nvmlDeviceGetTotalEnergyConsumption, Volta and newer),
             or its power samples, integrated by the trapezoid rule. The host is not in it.
    rapl     the CPU packages and their DRAM, /sys/class/powercap/intel-rapl:*/energy_uj.
    declared watts that the recipe or the price table gives, times seconds: nothing was measured.
    none     not even declared.
A run on a GPU never falls back to rapl, which does not see the GPU.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import psutil

POWERCAP = Path("/sys/class/powercap")
INTERVAL_SECONDS = 0.5
JOULES_PER_KWH = 3.6e6

Method = Literal["nvml", "rapl", "declared", "none"]


class EnergyError(Exception):
    """A counter that cannot be read; the message says why."""


@dataclass(frozen=True)
class EnergySample:
    """Mean power [W] since the sample before, and utilisation [%] of what is measured.

    `time_s` counts from the start of the measurement. `watts` is None where power is not measured,
    and in the first sample of an energy counter.
    """

    time_s: float
    watts: float | None
    utilisation_percent: float | None


@dataclass(frozen=True)
class EnergyReading:
    """What a measurement used.

    `joules` and `mean_watts` are without PUE and None for method ``none``. `utilisation_percent` is
    the mean over the samples, of the GPU for nvml (share of time in which a kernel ran), else of
    all CPUs. `notes` says what was not available, and why.
    """

    method: Method
    seconds: float
    joules: float | None
    mean_watts: float | None
    utilisation_percent: float | None
    utilisation_of: Literal["gpu", "cpu"]
    samples: tuple[EnergySample, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [asdict(sample) for sample in self.samples]
        return asdict(self) | {"samples": rows, "notes": list(self.notes)}


def joules_per_token(joules: float, tokens: int, *, pue: float = 1.0) -> float:
    """Energy per token [J] at the meter of the building: J x PUE / tokens."""
    return joules * pue / tokens


def gco2e_per_token(
    joules: float, tokens: int, *, grid_gco2e_per_kwh: float, pue: float = 1.0
) -> float:
    """Emissions of operation per token [gCO2e]: J x PUE / 3.6e6 x gCO2e/kWh / tokens.

    What making the hardware emitted is not in it.
    """
    return joules_per_token(joules, tokens, pue=pue) / JOULES_PER_KWH * grid_gco2e_per_kwh


class EnergySource(Protocol):
    """Something that measures energy from its construction on."""

    method: Method

    def read(self, now: float) -> tuple[float | None, float | None]:
        """Power [W] since the read before and utilisation [%] at time `now` [s]; EnergyError."""

    def joules(self) -> float:
        """Energy up to the last read [J]."""

    def close(self) -> None:
        """Free what is held."""


class NvmlSource:
    """GPUs by NVML; `nvml` is the module pynvml or a stand-in for it.

    Raises EnergyError when the driver cannot be asked.
    """

    method: Method = "nvml"

    def __init__(self, nvml: Any, now: float, devices: Sequence[int] = (0,)) -> None:
        self._nvml, self._joules, self._time = nvml, 0.0, now
        self._counter: float | None = None
        self._watts = 0.0
        try:
            nvml.nvmlInit()
        except Exception as error:
            raise EnergyError(f"NVML: {error}") from error
        try:
            self._handles = [self._ask(nvml.nvmlDeviceGetHandleByIndex, i) for i in devices]
            try:
                self._counter = self._total()
            except Exception:  # an old GPU: no counter, only samples of power
                self._watts = self._ask(self._power)
        except EnergyError:
            nvml.nvmlShutdown()
            raise

    def _ask(self, what: Callable[..., Any], *arguments: int) -> Any:
        try:
            return what(*arguments)
        except Exception as error:
            raise EnergyError(f"NVML: {error}") from error

    def _total(self) -> float:
        ask = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return sum(ask(handle) for handle in self._handles) / 1e3

    def _power(self) -> float:
        return sum(self._nvml.nvmlDeviceGetPowerUsage(handle) for handle in self._handles) / 1e3

    def _busy(self) -> float | None:
        try:
            rates = [self._nvml.nvmlDeviceGetUtilizationRates(h).gpu for h in self._handles]
        except Exception:
            return None
        return sum(rates) / len(rates)

    def read(self, now: float) -> tuple[float | None, float | None]:
        """See `EnergySource`."""
        passed = now - self._time
        watts: float | None
        if self._counter is not None:
            total = self._ask(self._total)
            used, self._counter = total - self._counter, total
            watts = used / passed if passed > 0 else None
        else:
            watts = self._ask(self._power)
            used, self._watts = (self._watts + watts) / 2 * passed, watts
        self._joules, self._time = self._joules + used, now
        return watts, self._busy()

    def joules(self) -> float:
        """See `EnergySource`."""
        return self._joules

    def close(self) -> None:
        """See `EnergySource`."""
        self._nvml.nvmlShutdown()


class RaplSource:
    """CPU packages and their DRAM by the kernel's powercap files; EnergyError when unreadable."""

    method: Method = "rapl"

    def __init__(self, powercap: Path, now: float) -> None:
        self._zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _counts(zone)]
        if not self._zones:
            raise EnergyError(f"RAPL: no package under {powercap}")
        self._range = [self._number(zone, "max_energy_range_uj") for zone in self._zones]
        self._last = self._energies()
        self._joules, self._time = 0.0, now

    @staticmethod
    def _number(zone: Path, name: str) -> int:
        try:
            return int((zone / name).read_text())
        except (OSError, ValueError) as error:
            detail = getattr(error, "strerror", None) or error
            raise EnergyError(f"RAPL: {zone / name} cannot be read ({detail})") from error

    def _energies(self) -> list[int]:
        return [self._number(zone, "energy_uj") for zone in self._zones]

    def read(self, now: float) -> tuple[float | None, float | None]:
        """See `EnergySource`; a counter that went down went once past its largest value."""
        energies, used = self._energies(), 0
        for value, last, largest in zip(energies, self._last, self._range, strict=True):
            used += value - last if value >= last else value - last + largest
        passed = now - self._time
        self._last, self._time = energies, now
        self._joules += used / 1e6
        return (used / 1e6 / passed if passed > 0 else None), None

    def joules(self) -> float:
        """See `EnergySource`."""
        return self._joules

    def close(self) -> None:
        """See `EnergySource`."""


def _counts(zone: Path) -> bool:
    """Packages, and the DRAM below them; other sub-zones are parts of a package, psys is all."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        name = ""
    if re.fullmatch(r"intel-rapl:\d+", zone.name):
        return name != "psys"
    return name == "dram"


def pynvml() -> Any:
    """The module of that name; EnergyError where it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise EnergyError("NVML: the package nvidia-ml-py is not installed") from None


class EnergyMeter:
    """Measures the energy of a ``with`` block, sampling in a thread; `result` is its reading.

    Args:
        device: ``cuda`` measures GPUs, ``cpu`` the CPU packages.
        declared_watts: what to assume when nothing can be measured (`PriceScenario.watts`).
        gpus: NVML indices of the GPUs in use; NVML does not know CUDA_VISIBLE_DEVICES.
        interval_s: time between samples [s]; None takes only one at each end, without a thread.
            A RAPL counter that wraps twice between samples would be read too low, which takes
            minutes.
        powercap, nvml, clock, cpu_percent: what is read; tests put in their own.

    Nothing is raised for energy that cannot be measured: `result.method` and `result.notes` say so.
    """

    result: EnergyReading

    def __init__(
        self,
        *,
        device: Literal["cuda", "cpu"],
        declared_watts: float | None = None,
        gpus: Sequence[int] = (0,),
        interval_s: float | None = INTERVAL_SECONDS,
        powercap: Path = POWERCAP,
        nvml: Any = None,
        clock: Callable[[], float] = time.perf_counter,
        cpu_percent: Callable[[], float] = psutil.cpu_percent,
    ) -> None:
        self._device, self._declared, self._gpus = device, declared_watts, gpus
        self._interval, self._powercap, self._nvml = interval_s, powercap, nvml
        self._clock, self._cpu_percent = clock, cpu_percent
        self._source: EnergySource | None = None
        self._samples: list[EnergySample] = []
        self._notes: list[str] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._utilisation_of: Literal["gpu", "cpu"] = "cpu"

    def _open(self) -> EnergySource | None:
        try:
            if self._device == "cpu":
                return RaplSource(self._powercap, self._began)
            nvml = pynvml() if self._nvml is None else self._nvml
            return NvmlSource(nvml, self._began, self._gpus)
        except EnergyError as error:
            self._notes.append(str(error))
            return None

    def sample(self) -> None:
        """Take a sample now; the thread calls this, and it may be called besides."""
        with self._lock:
            now = self._clock()
            watts, busy = None, None
            if self._source is not None:
                try:
                    watts, busy = self._source.read(now)
                except EnergyError as error:
                    self._notes.append(f"{error}; given up after {now - self._began:.1f} s")
                    self._close()
            if self._utilisation_of == "cpu":
                busy = self._cpu_percent()
            self._samples.append(EnergySample(now - self._began, watts, busy))

    def _close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def _run(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.sample()

    def __enter__(self) -> EnergyMeter:
        """Start."""
        self._cpu_percent()  # the first call only sets the start of its window
        self._began = self._clock()
        self._source = self._open()
        if self._source is not None and self._source.method == "nvml":
            self._utilisation_of = "gpu"
        if self._interval is not None:
            self._thread = threading.Thread(target=self._run, args=(self._interval,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, whatever happened in the block."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()
        self.result = self._reading()
        self._close()

    def _reading(self) -> EnergyReading:
        seconds = self._samples[-1].time_s
        notes = list(self._notes)
        method: Method = "none"
        joules: float | None = None
        if self._source is not None:
            method, joules = self._source.method, self._source.joules()
            if method == "nvml":
                notes.append("The GPU's own counter: its host is not in it.")
        elif self._declared is not None:
            method, joules = "declared", self._declared * seconds
            notes.append(f"Not measured: {self._declared:g} W are declared.")
        else:
            notes.append("Not measured, and no watts are declared.")
        busy = [s.utilisation_percent for s in self._samples if s.utilisation_percent is not None]
        return EnergyReading(
            method=method,
            seconds=seconds,
            joules=joules,
            mean_watts=joules / seconds if joules is not None and seconds > 0 else None,
            utilisation_percent=sum(busy) / len(busy) if busy else None,
            utilisation_of=self._utilisation_of,
            samples=tuple(self._samples),
            notes=tuple(notes),
        )
