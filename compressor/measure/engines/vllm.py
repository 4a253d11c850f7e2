"""A vLLM server as a child process.

It runs in an environment of its own (see `compressor.doctor.vllm_python`) and is spoken to over its
OpenAI-compatible address, so neither its torch nor its transformers has to match ours.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.measure.client import HttpClient
from compressor.measure.engines.process import HOST, ServerProcess

SERVED_NAME = "model"
# Its log tells what it chose (vllm/config/vllm.py `VllmConfig.__str__`,
# vllm/model_executor/kernels/linear, vllm/v1/core/kv_cache_utils.py; version 0.32).
_LOGGED = {
    "dtype": re.compile(r"\bdtype=torch\.(\w+),"),
    "quantization": re.compile(r"\bquantization=([\w-]+),"),
    "kv_cache_dtype": re.compile(r"\bkv_cache_dtype=([\w.]+),"),
    "max_model_len": re.compile(r"\bmax_seq_len=(\d+),"),
    "prefix_caching": re.compile(r"\benable_prefix_caching=(\w+),"),
    "kv_cache_tokens": re.compile(r"KV cache size: ([\d,]+) tokens"),
}
_KERNEL = re.compile(r"\b(?:Using|Selected) (\w*Kernel\w*) for ")
# What /metrics tells of speculation (vllm/v1/spec_decode/metrics.py).
_COUNTER = re.compile(
    r"^vllm:spec_decode_num_(?P<name>\w+?)_total(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)",
    re.MULTILINE,
)
_POSITION = re.compile(r'(?:^|,)\s*position="(\d+)"')


class VllmServer(ServerProcess):
    """``with VllmServer(...) as server:`` serves a model directory on a free loopback port.

    The prefix cache is off unless a flag speaks of it: workloads come back to their prompts, and a
    prompt that was seen before would be answered without the prefill that is to be measured.

    Args:
        python: interpreter of an environment with vLLM.
        model: directory to serve.
        log: file that receives the server's output.
        flags: further flags of ``vllm.entrypoints.openai.api_server``.
        start_timeout: seconds to wait for health; the first start compiles.
        variables: further variables of its environment.
        stall_s, total_s: limits of a request of `client` [s].

    Raises:
        RunError: the server died or did not become healthy; with the tail of its log.
    """

    name = "vllm"
    title = "vLLM"

    def __init__(
        self,
        python: Path,
        model: Path,
        log: Path,
        flags: Sequence[str] = (),
        start_timeout: float = 600.0,
        variables: Mapping[str, str] | None = None,
        *,
        stall_s: float = 60.0,
        total_s: float = 600.0,
    ) -> None:
        super().__init__(
            model, log, flags, start_timeout, variables, stall_s=stall_s, total_s=total_s
        )
        self.python = python

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        own = (
            [] if any("prefix-caching" in f for f in self.flags) else ["--no-enable-prefix-caching"]
        )
        return [
            str(self.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--served-model-name", SERVED_NAME,
            "--host", HOST, "--port", str(self.port), *own, *self.flags,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """No network, no telemetry; VLLM_CPU_KVCACHE_SPACE [GiB] is 2 where it is not set."""
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
            "VLLM_NO_USAGE_STATS": "1",
        }

    def client(self) -> HttpClient:
        """A client that sends token ids and gets token ids, so that every token is counted.

        A model's generation_config.json may ask for a repetition penalty; that is set back, since
        it costs time and changes greedy tokens.
        """
        return HttpClient(
            f"{self.url}/v1/completions",
            model=SERVED_NAME,
            fields={"return_token_ids": True, "repetition_penalty": 1.0},
            stall_s=self.stall_s,
            total_s=self.total_s,
        )

    def metadata(self) -> dict[str, Any]:
        """Facts about the started server; what its log does not tell is None."""
        environment = self.environment() | self.variables
        log = self.log.read_text(encoding="utf-8", errors="replace")
        found = {name: _last(pattern, log) for name, pattern in _LOGGED.items()}
        kernels = list(dict.fromkeys(_KERNEL.findall(log)))
        quantized = found["quantization"] not in (None, "None")
        return {
            **super().metadata(),
            "engine_version": self.get("/version")["version"],
            "python": str(self.python),
            "kv_cache_space_gib": environment["VLLM_CPU_KVCACHE_SPACE"],
            **found,
            "kernel": ", ".join(kernels) or (found["quantization"] if quantized else "dense"),
            "decoding": "greedy",
        }

    def drafted(self) -> dict[str, Any] | None:
        """What it has counted of drafts since it started, see `drafted`."""
        return drafted(self.get_text("/metrics"))

    def complete(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy token ids that follow a prompt of token ids."""
        body = {
            "model": SERVED_NAME,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return self.post("/v1/completions", body)["choices"][0]["token_ids"]


def drafted(metrics: str) -> dict[str, Any] | None:
    """Counters of speculation in vLLM's ``/metrics``, Prometheus' text format; engines of one
    server are added.

    Returns:
        ``drafts`` (steps with candidates), ``draft_tokens`` (candidates), ``accepted_tokens`` (of
        them), ``accepted_by_position`` (drafts of which at least 1, 2, ... were accepted); None
        where the server does not speculate.
    """
    totals: Counter[str] = Counter()
    positions: Counter[int] = Counter()
    for match in _COUNTER.finditer(metrics):
        value = int(float(match["value"]))
        place = _POSITION.search(match["labels"] or "")
        if match["name"] != "accepted_tokens_per_pos":
            totals[match["name"]] += value
        elif place is not None:
            positions[int(place[1])] += value
    names = ("drafts", "draft_tokens", "accepted_tokens")
    if not set(names) <= set(totals):
        return None
    by_position = [positions[place] for place in range(max(positions, default=-1) + 1)]
    return {name: totals[name] for name in names} | {"accepted_by_position": by_position}


def _last(pattern: re.Pattern[str], log: str) -> str | None:
    found = pattern.findall(log)
    return found[-1] if found else None
