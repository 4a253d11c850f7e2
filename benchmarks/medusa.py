"""Training Medusa heads, against a plain implementation: time, memory, and what is learned.

    python benchmarks/medusa.py MODEL --output reports/speculate/training [--epochs 5] [--heads 4]
        [--output-layer shared] [--answers 96] [--length 128]

The plain one runs the target anew at every step, as the reference implementation of Medusa does,
and makes the logits of all heads over the whole vocabulary at once. Ours runs it once, keeps its
last hidden states on disk, and makes logits for a few tokens at a time. Corpus, heads, order of
samples, optimizer and evaluations are the same. Each runs in a process of its own, whose time and
peak resident memory are taken from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from compressor.data.sources import load_texts
from compressor.models.architecture import CausalLM
from compressor.models.head import last_hidden, split
from compressor.speculate.corpus import Corpus, generate_corpus
from compressor.speculate.features import Features, write_features
from compressor.speculate.medusa import (
    MedusaHeads,
    MedusaOptions,
    held_out_accuracy,
    places,
    train_medusa,
    trainable,
)
from compressor.speculate.training import train

HELD_OUT = 0.1


def make_corpus(model_dir: Path, directory: Path, answers: int, length: int) -> None:
    """Answers of the model to the built-in prompts."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = load_texts("builtin:prompts", field="prompt", base_dir=Path())[:answers]
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
    generate_corpus(
        CausalLM.open(model_dir).load_full(torch.float32),
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        output_length=length,
        batch_size=16,
        temperature=0,
        seed=0,
        end_tokens=[tokenizer.eos_token_id],
        held_out=max(1, int(HELD_OUT * len(texts))),
        directory=directory,
    )


def ours(
    model_dir: Path, corpus: Corpus, options: MedusaOptions, directory: Path
) -> dict[str, Any]:
    """States once, then the heads alone."""
    model = CausalLM.open(model_dir).load_full(torch.float32)
    head = split(model)
    started = time.perf_counter()
    write_features(model, corpus, directory / "features")
    once = time.perf_counter() - started
    del model
    _, facts = train_medusa(
        head, corpus, Features.open(directory / "features"), options, directory / "heads"
    )
    return {**facts, "seconds_features": once}


def plain(
    model_dir: Path, corpus: Corpus, options: MedusaOptions, directory: Path
) -> dict[str, Any]:
    """The target at every step, and all logits at once."""
    model = CausalLM.open(model_dir).load_full(torch.float32)
    head = split(model)
    width = model.get_output_embeddings().in_features
    heads = MedusaHeads.start(head, width, options, None)

    def states(rows: Sequence[int]) -> torch.Tensor:
        longest = int(corpus.lengths[list(rows)].max())
        ids = torch.from_numpy(corpus.tokens[list(rows), :longest].astype("int64"))
        with torch.no_grad():
            return last_hidden(model, ids)

    def backward(rows: Sequence[int], weight: float) -> dict[str, float]:
        hidden = states(rows)
        tokens = torch.from_numpy(corpus.tokens[list(rows), : hidden.shape[1]].astype("int64"))
        at = torch.arange(hidden.shape[1])
        starts, lengths = (
            torch.from_numpy(values[list(rows)].astype("int64")).unsqueeze(1)
            for values in (corpus.starts, corpus.lengths)
        )
        total = torch.zeros(())
        for i, logits in enumerate(heads(hidden)):
            counts = (at >= starts - 1) & (at + 2 + i < lengths)
            labels = torch.where(counts, tokens.roll(-2 - i, 1), -100)
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            total = total + options.decay**i * loss
        (total * weight).backward()
        return {"loss": float(total.detach())}

    return train(
        {name: p for name, p in heads.named_parameters() if p.requires_grad},
        backward,
        lambda: held_out_accuracy(heads, corpus, lambda row: states([row])[0]),
        trainable(corpus),
        options,
        directory / "heads",
        size=lambda row: places(corpus, row),
    )


def child(name: str, args: argparse.Namespace, scratch: Path) -> None:
    """What a contestant's process does."""
    corpus = Corpus.load(scratch / "corpus")
    options = MedusaOptions(
        heads=args.heads,
        output=args.output_layer,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        patience=0,
    )
    run = {"ours": ours, "plain": plain}[name]
    facts = run(args.model, corpus, options, scratch / name)
    (scratch / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")


def watch(command: list[str]) -> tuple[int, float]:
    """Run a process; its peak resident bytes and its seconds."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"the child ended with {process.returncode}")
    return peak, time.perf_counter() - started


def measure(args: argparse.Namespace, arguments: list[str], scratch: Path) -> dict[str, Any]:
    base = [sys.executable, __file__, *arguments, "--scratch", str(scratch), "--child"]
    watch([*base, "corpus"])
    corpus = Corpus.load(scratch / "corpus")
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/medusa.py", *arguments]),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "samples": len(corpus.tokens),
        "answer_tokens": {part: corpus.answer_tokens(part) for part in ("train", "held_out")},
    }
    for name in ("plain", "ours"):
        peak, seconds = watch([*base, name])
        facts = json.loads((scratch / f"{name}.json").read_text(encoding="utf-8"))
        last = facts["evaluations"][-1]
        found[name] = {
            "seconds": seconds,
            "peak_rss_bytes": peak,
            "seconds_training": facts["seconds"],
            "seconds_features": facts.get("seconds_features"),
            "steps": len(facts["steps"]),
            "first_loss": facts["steps"][0]["loss"],
            "last_loss": facts["steps"][-1]["loss"],
            **{key: last[key] for key in ("expected_length", "tokens_per_step", "top")},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model directory with its tokenizer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--output-layer", choices=["own", "shared", "original"], default="shared")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--answers", type=int, default=96)
    parser.add_argument("--length", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--child", choices=["corpus", "ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "corpus":
        return make_corpus(args.model, args.scratch / "corpus", args.answers, args.length)
    if args.child:
        return child(args.child, args, args.scratch)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args, sys.argv[1:], Path(scratch))
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (args.output / "medusa_training.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
