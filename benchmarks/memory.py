"""Peak memory and resume of quantizing a model that is larger than memory would need to be.

    python benchmarks/memory.py --output reports/memory [--gigabytes 6] [--samples 8] [--together]
        [--keep DIR]

Writes a Llama-layout checkpoint of random bfloat16 weights shard by shard, quantizes it with GPTQ
in a child process whose resident memory is watched from outside, kills that once in the middle, and
compares the bytes of the resumed result with those of a run that was not disturbed. What differs is
named in the record, and both results are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import random_llama
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from compressor.models.architecture import CausalLM

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 2048, 5632, 16, 32000


def build(directory: Path, gigabytes: float) -> tuple[int, int]:
    """Write the checkpoint; returns its bytes and its blocks."""
    per_block = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    layers = int(gigabytes * 1e9 / per_block) + 1
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return random_llama.write(directory, config), layers


def quantize(model_dir: Path, output: Path, samples: int) -> None:
    """What the child process does."""
    from compressor.quantize.driver import quantize_model
    from compressor.stages import algorithms

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (samples, 512)).astype(np.int32)
    steps = [{"gptq": {"scheme": "W4A16", "group_size": 128}}]
    _, algorithm, _ = algorithms(steps, torch.bfloat16)
    quantize_model(CausalLM.open(model_dir), algorithm, output, tokens=tokens, batch_size=1)


def watch(command: list[str], threads: int, kill_when: Path | None = None) -> tuple[int, float]:
    """Run the child; its peak resident bytes and seconds. Kills it once ``kill_when`` exists."""
    started, peak = time.perf_counter(), 0
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=os.environ | variables)
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


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files hold the same."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as left, open(other, "rb") as right:
        while block := left.read(1 << 24):
            if block != right.read(len(block)):
                return False
    return True


def differing(one: Path, other: Path) -> list[str]:
    """What is not the same in two directories: files, and of safetensors the tensors; empty when
    they are equal byte for byte."""
    found = []
    for name in sorted({path.name for path in (*one.iterdir(), *other.iterdir())}):
        a, b = one / name, other / name
        if not (a.exists() and b.exists()):
            found.append(f"{name}: only in {(a if a.exists() else b).parent.name}")
        elif same_bytes(a, b):
            continue
        elif a.suffix == ".safetensors":
            found += [f"{name}: {what}" for what in differing_tensors(a, b)]
        else:
            lines = [path.read_text(encoding="utf-8").splitlines() for path in (a, b)]
            first = next((i for i, (x, y) in enumerate(zip(*lines, strict=False)) if x != y), None)
            first = min(map(len, lines)) if first is None else first
            found.append(f"{name}: from line {first + 1} of {len(lines[0])}")
    return found


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors of two files that are not the same, with how many elements are not."""
    with safe_open(one, "pt") as left, safe_open(other, "pt") as right:
        keys = [set(file.keys()) for file in (left, right)]
        found = [f"{key}: only in one" for key in sorted(keys[0] ^ keys[1])]
        for key in sorted(keys[0] & keys[1]):
            a, b = left.get_tensor(key), right.get_tensor(key)
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                found.append(f"{key}: {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}")
            elif not torch.equal(a, b):
                found.append(f"{key}: {int((a != b).sum())} of {a.numel()} elements")
    return found or ["header"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--keep", type=Path, help="where the two results go if they differ (default: OUTPUT)"
    )
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--together",
        action="store_true",
        help="both runs at once, on half of the cores each: quicker, but the times say little",
    )
    args = parser.parse_args()
    if args.child:
        return quantize(*args.child, args.samples)
    with tempfile.TemporaryDirectory() as scratch:
        facts = measure(Path(scratch), args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "memory.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    size, blocks = build(scratch / "model", args.gigabytes)
    base = [sys.executable, __file__, "--output", "-", "--samples", str(args.samples), "--child"]
    threads = max((os.cpu_count() or 1) // (2 if args.together else 1), 1)

    def run(name: str, kill_when: Path | None = None) -> tuple[int, float]:
        command = [*base, str(scratch / "model"), str(scratch / name)]
        return watch(command, threads, kill_when)

    def killed() -> tuple[int, float, int, float]:
        middle = scratch / "killed" / f"block-{blocks // 2:05d}.safetensors"
        return *run("killed", middle), *run("killed")

    with ThreadPoolExecutor(2 if args.together else 1) as pool:
        whole, other = pool.submit(run, "whole"), pool.submit(killed)
        peak, seconds = whole.result()
        killed_peak, _, resumed_peak, resumed_seconds = other.result()
    different = differing(scratch / "whole", scratch / "killed")
    if different:
        keep = args.keep or args.output
        keep.mkdir(parents=True, exist_ok=True)
        for name in ("whole", "killed"):
            shutil.move(scratch / name, keep / name)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/memory.py --gigabytes {args.gigabytes} "
        f"--samples {args.samples}{' --together' if args.together else ''}",
        "machine": f"{os.cpu_count()} cores, no GPU",
        "threads": threads,
        "torch": torch.__version__,
        "model_bytes": size,
        "blocks": blocks,
        "calibration_tokens": args.samples * 512,
        "seconds": seconds,
        "peak_rss_bytes": max(peak, killed_peak, resumed_peak),
        "seconds_after_kill": resumed_seconds,
        "same_bytes_after_kill": not different,
        "differing": different,
    }


if __name__ == "__main__":
    main()
