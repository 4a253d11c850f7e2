"""What reads which format, and whether it is on this machine. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.doctor import gptqmodel_python, vllm_python
from compressor.errors import RunError

# The best first: what computes most nearly as the reference does.
READERS: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("transformers", "vllm"),
    "gptq": ("gptqmodel", "vllm"),
    "awq": ("gptqmodel", "vllm"),
    "gguf": ("llama.cpp", "transformers"),
    "safetensors": ("transformers", "vllm"),
    "bitsandbytes": ("transformers",),
}


def available(fmt: str, engines: Sequence[str]) -> tuple[list[str], str]:
    """(consumers of a format that are allowed and here, why the others are not)."""
    here: list[str] = []
    missing: list[str] = []
    for consumer in READERS.get(fmt, ()):
        if consumer not in engines:
            missing.append(f"{consumer} is not among verify.engines")
        elif reason := _absent(consumer):
            missing.append(reason)
        else:
            here.append(consumer)
    return here, "; ".join(missing) or f"no consumer of {fmt} is known"


def _absent(consumer: str) -> str:
    """Why a consumer cannot be used here; empty where it can."""
    if consumer == "gptqmodel" and gptqmodel_python() is None:
        return "GPTQModel is not installed (`compress doctor` says how)"
    if consumer == "vllm" and vllm_python() is None:
        return "vLLM is not installed (bash scripts/setup_vllm_cpu.sh)"
    if consumer == "llama.cpp":
        from compressor.measure.engines.llama_cpp import llama_server

        try:
            llama_server()
        except RunError:
            return "llama.cpp is not installed (bash scripts/setup_llama_cpp.sh)"
    return ""
