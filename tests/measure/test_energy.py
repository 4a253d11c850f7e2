from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.measure.energy import (
    EnergyMeter,
    EnergyReading,
    gco2e_per_token,
    joules_per_token,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def zone(root: Path, name: str, energy: int, *, kind: str = "package-0", largest: int = 10**9):
    path = root / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{kind}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{largest}\n")
    return path


class Nvml:
    """A stand-in for pynvml: one energy counter [mJ], power [mW] and utilisation [%] for all."""

    def __init__(self, *, counter: bool = True) -> None:
        self.energy, self.power, self.busy, self.counter, self.open = 0, 0, 0, counter, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if not self.counter:
            raise RuntimeError("Not Supported")
        return self.energy

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if self.power < 0:
            raise RuntimeError("GPU is lost")
        return self.power

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=self.busy)


def meter(clock: Clock, **options: Any) -> EnergyMeter:
    defaults: dict[str, Any] = {"interval_s": None, "clock": clock, "cpu_percent": lambda: 50.0}
    return EnergyMeter(**(defaults | options))


def test_rapl_sums_packages_and_their_dram_but_no_parts(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", 5_000_000)
    core = zone(tmp_path, "intel-rapl:0:0", 0, kind="core")
    dram = zone(tmp_path, "intel-rapl:0:1", 0, kind="dram")
    psys = zone(tmp_path, "intel-rapl:2", 0, kind="psys")
    clock = Clock()
    with meter(clock, device="cpu", powercap=tmp_path) as running:
        clock.now += 2.0
        (first / "energy_uj").write_text("3000000")
        running.sample()
        clock.now += 2.0
        for path in (second, dram):
            (path / "energy_uj").write_text("7000000")
        for path in (core, psys):
            (path / "energy_uj").write_text("999000000")
    result = running.result
    assert result.method == "rapl" and result.joules == pytest.approx(2 + 2 + 7)
    assert result.seconds == 4.0 and result.mean_watts == pytest.approx(11 / 4)
    assert [sample.watts for sample in result.samples] == [1.0, 4.5]
    assert result.utilisation_percent == 50.0 and result.utilisation_of == "cpu"


@given(start=st.integers(0, 10**6), steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_rapl_wraps_at_its_range(
    start: int, steps: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    largest = 1_500_000
    root = tmp_path_factory.mktemp("powercap")
    path = zone(root, "intel-rapl:0", start, largest=largest)
    clock, value = Clock(), start
    with meter(clock, device="cpu", powercap=root) as running:
        for step in steps:
            clock.now += 1.0
            value = (value + step) % largest
            (path / "energy_uj").write_text(str(value))
            running.sample()
    assert running.result.joules == pytest.approx(sum(steps) / 1e6)


def test_unreadable_rapl_is_declared_and_said_so(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", 0)
    (path / "energy_uj").unlink()
    clock = Clock()
    with meter(clock, device="cpu", powercap=tmp_path, declared_watts=65.0) as running:
        clock.now += 10.0
    result = running.result
    assert result.method == "declared" and result.joules == 650.0 and result.mean_watts == 65.0
    assert any("energy_uj cannot be read" in note for note in result.notes)
    assert result.samples[-1].watts is None, "declared watts are no sample"


def test_nothing_measured_and_nothing_declared_is_none(tmp_path: Path) -> None:
    clock = Clock()
    with meter(clock, device="cpu", powercap=tmp_path / "absent") as running:
        clock.now += 1.0
    assert running.result.method == "none" and running.result.joules is None
    assert any("no package" in note for note in running.result.notes)


def test_counter_lost_on_the_way_is_not_half_a_measurement(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", 0)
    clock = Clock()
    with meter(clock, device="cpu", powercap=tmp_path, declared_watts=10.0) as running:
        clock.now += 5.0
        (path / "energy_uj").unlink()
        running.sample()
        clock.now += 5.0
    assert running.result.method == "declared" and running.result.joules == 100.0
    assert any("given up after 5.0 s" in note for note in running.result.notes)


def test_nvml_counter() -> None:
    clock, nvml = Clock(), Nvml()
    nvml.energy = 7_000
    with meter(clock, device="cuda", nvml=nvml) as running:
        clock.now += 2.0
        nvml.energy, nvml.busy = 607_000, 80
        running.sample()
        clock.now += 2.0
        nvml.energy, nvml.busy = 1_407_000, 100
    result = running.result
    assert result.method == "nvml" and result.joules == 1400.0 and result.mean_watts == 350.0
    assert [sample.watts for sample in result.samples] == [300.0, 400.0]
    assert result.utilisation_percent == 90.0 and result.utilisation_of == "gpu"
    assert nvml.open == 0


def test_nvml_power_is_integrated_where_there_is_no_counter() -> None:
    clock, nvml = Clock(), Nvml(counter=False)
    nvml.power = 100_000
    with meter(clock, device="cuda", nvml=nvml, gpus=(0, 1)) as running:
        clock.now += 2.0
        nvml.power = 200_000
        running.sample()
        clock.now += 1.0
    assert running.result.joules == pytest.approx(2 * (150 * 2 + 200 * 1))


def test_gpu_never_falls_back_to_the_cpu_counter(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 0)
    broken = Nvml(counter=False)
    broken.power = -1
    clock = Clock()
    with meter(clock, device="cuda", nvml=broken, powercap=tmp_path) as running:
        clock.now += 1.0
    assert running.result.method == "none"
    assert any("GPU is lost" in note for note in running.result.notes)
    assert broken.open == 0, "NVML is shut down again"
    assert running.result.utilisation_of == "cpu" and running.result.utilisation_percent == 50.0


def test_thread_samples_and_stops_when_the_block_fails(tmp_path: Path) -> None:
    running = EnergyMeter(device="cpu", powercap=tmp_path, interval_s=0.005, declared_watts=1.0)
    with pytest.raises(ZeroDivisionError), running:
        time.sleep(0.05)
        raise ZeroDivisionError
    assert len(running.result.samples) > 1
    count = len(running.result.samples)
    time.sleep(0.02)
    assert len(running.result.samples) == count
    assert isinstance(running.result, EnergyReading)
    assert json.loads(json.dumps(running.result.to_dict())) == running.result.to_dict()


def test_per_token_by_hand() -> None:
    assert joules_per_token(1000.0, 500) == 2.0
    assert joules_per_token(1000.0, 500, pue=1.5) == 3.0
    # 3.6 MJ are one kWh: 1.2 kWh at the meter x 400 g over 1000 tokens
    assert gco2e_per_token(3.6e6, 1000, grid_gco2e_per_kwh=400, pue=1.2) == pytest.approx(0.48)
