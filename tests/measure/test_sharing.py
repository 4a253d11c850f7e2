"""Who else is on the GPU, with a stand-in for the driver's library: there is no GPU in CI."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor.measure.sharing import gpu_sharing

UUID = "0a1b2c3d-0000-0000-0000-000000000000"


class Nvml:
    """One GPU with processes (pid, bytes)."""

    def __init__(self, processes: list[tuple[int, int | None]]) -> None:
        self.processes, self.open = processes, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise RuntimeError(f"no GPU {uuid}")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, _: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))


def test_without_a_gpu_there_is_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_sharing(Nvml([])) is None


@pytest.mark.usefixtures("gpu")
def test_others_are_counted_and_told() -> None:
    nvml = Nvml([(os.getpid(), 5_000), (1, 2_000_000_000), (2, None)])
    found = gpu_sharing(nvml)
    assert found is not None and nvml.open == 0
    assert (found.processes, found.others_bytes, found.slice) == (2, 2_000_000_000, False)
    (note,) = found.notes
    assert note.startswith("2 other process(es) held 2.0 GB of the GPU")


@pytest.mark.usefixtures("gpu")
def test_a_container_that_hides_numbers_is_not_guessed_about() -> None:
    found = gpu_sharing(Nvml([(os.getpid() + 1, 5_000)]))  # this process, by the host's number
    assert found is not None and found.processes is None and found.notes == []


@pytest.mark.usefixtures("gpu")
def test_alone_on_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 MIG 1g.18gb")
    found = gpu_sharing(Nvml([(os.getpid(), 5_000)]))
    assert found is not None and found.slice and found.processes == 0
    assert len(found.notes) == 1 and "MIG slice" in found.notes[0]


@pytest.mark.usefixtures("gpu")
def test_a_driver_that_does_not_tell_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="another")
    )
    nvml = Nvml([(1, 1)])
    found = gpu_sharing(nvml)
    assert found is not None and found.processes is None and found.notes == [] and nvml.open == 0
