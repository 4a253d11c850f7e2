"""Peak memory and resume of quantizing a model that is larger than memory would need to be.

    python benchmarks/memory.py --output reports/memory [--gigabytes 6] [--samples 8]

Writes a Llama-layout checkpoint of random bfloat16 weights shard by shard, quantizes it with GPTQ
in a child process whose resident memory is watched from outside, kills that once in the middle, and
compares the bytes of the resumed result with those of a run that was not disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig

from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import TensorWriter

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 2048, 5632, 16, 32000
SHARD_BYTES = 1_000_000_000


def build(directory: Path, gigabytes: float) -> int:
    """Write the checkpoint; returns its bytes."""
    per_block = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    layers = int(gigabytes * 1e9 / per_block) + 1
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        value = torch.randn(rows, columns, generator=random) / columns**0.5
        return value.to(torch.bfloat16)

    writer = TensorWriter(directory, SHARD_BYTES)
    writer.add("model.embed_tokens.weight", matrix(VOCABULARY, HIDDEN))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            writer.add(f"{prefix}.self_attn.{name}_proj.weight", matrix(HIDDEN, HIDDEN))
        for name in ("gate", "up"):
            writer.add(f"{prefix}.mlp.{name}_proj.weight", matrix(INTERMEDIATE, HIDDEN))
        writer.add(f"{prefix}.mlp.down_proj.weight", matrix(HIDDEN, INTERMEDIATE))
        for name in ("input", "post_attention"):
            ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
            writer.add(f"{prefix}.{name}_layernorm.weight", ones)
    writer.add("model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16))
    writer.close()
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def quantize(model_dir: Path, output: Path, samples: int) -> None:
    """What the child process does."""
    from compressor.quantize.driver import quantize_model
    from compressor.stages import algorithms

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (samples, 512)).astype(np.int32)
    steps = [{"gptq": {"scheme": "W4A16", "group_size": 128}}]
    _, algorithm, _ = algorithms(steps, torch.bfloat16)
    quantize_model(CausalLM.open(model_dir), algorithm, output, tokens=tokens, batch_size=1)


def watch(command: list[str], kill_when: Path | None = None) -> tuple[int, float]:
    """Run the child; its peak resident bytes and seconds. Kills it once ``kill_when`` exists."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    child = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, child.memory_info().rss)
        except psutil.Error:
            break
        if kill_when is not None and kill_when.exists():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return peak, time.perf_counter() - started
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"the child ended with {process.returncode}")
    return peak, time.perf_counter() - started


def digest(directory: Path) -> str:
    """SHA-256 over names and contents."""
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        found.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return quantize(*args.child, args.samples)
    with tempfile.TemporaryDirectory() as scratch:
        facts = measure(Path(scratch), args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "memory.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    size = build(scratch / "model", args.gigabytes)
    base = [sys.executable, __file__, "--output", "-", "--samples", str(args.samples), "--child"]

    def command(name: str) -> list[str]:
        return [*base, str(scratch / "model"), str(scratch / name)]

    peak, seconds = watch(command("whole"))
    blocks = len(list((scratch / "whole").glob("block-*.safetensors")))
    middle = scratch / "killed" / f"block-{blocks // 2:05d}.safetensors"
    killed_peak, _ = watch(command("killed"), kill_when=middle)
    resumed_peak, resumed_seconds = watch(command("killed"))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/memory.py --gigabytes {args.gigabytes} "
        f"--samples {args.samples}",
        "machine": f"{os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "model_bytes": size,
        "blocks": blocks,
        "calibration_tokens": args.samples * 512,
        "seconds": seconds,
        "peak_rss_bytes": max(peak, killed_peak, resumed_peak),
        "seconds_after_kill": resumed_seconds,
        "same_bytes_after_kill": digest(scratch / "whole") == digest(scratch / "killed"),
    }


if __name__ == "__main__":
    main()
