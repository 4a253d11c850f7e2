"""What else may run on the GPU that is measured: other slices of it (MIG), and other processes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from compressor.measure.energy import pynvml
from compressor.measure.prices import is_slice


@dataclass(frozen=True)
class Sharing:
    """Of the GPU that torch takes first.

    Attributes:
        name: as the driver gives it, of a slice with its size.
        slice: whether it is a MIG slice: caches and memory bandwidth are its own, power and the
            counter of energy are the whole GPU's.
        processes: other processes on it before the measurement; None where NVML does not tell, or
            knows this one by another number (in a container).
        others_bytes: their memory, as far as it tells.
    """

    name: str
    slice: bool
    processes: int | None
    others_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @property
    def notes(self) -> list[str]:
        """Sentences for the report."""
        found = []
        if self.slice:
            found.append(
                f"The GPU is a MIG slice ({self.name}): power and energy, where NVML counts them, "
                "are the whole GPU's."
            )
        if self.processes:
            found.append(
                f"{self.processes} other process(es) held {self.others_bytes / 1e9:.1f} GB of the "
                "GPU when the measurement began: figures hold for a GPU that is shared like that."
            )
        return found


def gpu_sharing(nvml: Any = None) -> Sharing | None:
    """Who shares the GPU; None without one.

    Args:
        nvml: the module pynvml, or a stand-in for it.
    """
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    name = torch.cuda.get_device_name(0)
    try:
        torch.cuda.mem_get_info()  # puts this process on the GPU, if it is not there yet
        others = _others(nvml or pynvml(), str(properties.uuid))
    except Exception:  # NVML's own, one for each of its faults, or no NVML at all
        others = None
    if others is None:
        return Sharing(name, is_slice(name), None, 0)
    held = sum(int(one.usedGpuMemory or 0) for one in others)
    return Sharing(name, is_slice(name), len(others), held)


def _others(nvml: Any, uuid: str) -> list[Any] | None:
    """Processes that compute on a GPU and are not of this run; None where that cannot be told."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    nvml.nvmlInit()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(
            uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        )
        found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        others = [one for one in found if one.pid not in own]
        return others if len(others) < len(found) else None
    finally:
        nvml.nvmlShutdown()
