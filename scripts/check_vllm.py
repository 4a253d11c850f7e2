"""Serve exported directories by a real vLLM and compare its greedy tokens with our own model's.

    .venv/bin/python scripts/check_vllm.py runs/quickstart/*/artifacts/*/compressed-tensors

For each directory: vLLM (own environment, see scripts/setup_vllm_cpu.sh) loads it unchanged and
completes 20 built-in prompts greedily and scores a text; the dequantized reference model does the
same in float32. Exit code 1 when a directory does not load, agrees on fewer prompts than --least,
or scores the text more than --most-apart away. (With an 8-bit cache the least difference may push a
number over a rounding boundary, so that greedy tokens part soon: there the score is what counts.)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from compressor.data.sources import load_texts
from compressor.data.tokens import prompt_tokens
from compressor.doctor import vllm_python
from compressor.errors import CompressorError, RunError
from compressor.export.compressed_tensors import load_model
from compressor.measure.engines.vllm import SERVED_NAME, VllmServer


@torch.no_grad()
def reference_tokens(
    model: torch.nn.Module, prompts: list[list[int]], count: int
) -> list[list[int]]:
    """Greedy continuations by the dequantized model; EOS is a token like any other."""
    found = []
    for prompt in prompts:
        step, cache, tokens = torch.tensor([prompt]), None, []
        for _ in range(count):
            out = model(step, past_key_values=cache, use_cache=True)
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            tokens.append(int(step))
        found.append(tokens)
    return found


@torch.no_grad()
def reference_loss(model: torch.nn.Module, text: list[int]) -> float:
    """Mean negative log-likelihood of a text's tokens after the first [nats]."""
    logits = model(torch.tensor([text])).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:])))


def served_loss(server: VllmServer, text: list[int]) -> float:
    """The same by vLLM, which gives each token of a prompt its log-probability."""
    body = {"model": SERVED_NAME, "prompt": text, "max_tokens": 1, "prompt_logprobs": 0}
    found = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
    scores = [row[str(token)]["logprob"] for row, token in zip(found[1:], text[1:], strict=True)]
    return -sum(scores) / len(scores)


def check(directory: Path, python: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Load proof and agreement of one directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = load_texts("builtin:prompts", field="prompt", base_dir=Path())[: args.prompts]
    prompts = [prompt_tokens(text, tokenizer) for text in texts]
    (novel,) = load_texts("builtin:novel", field="text", base_dir=Path())[:1]
    text = tokenizer(novel[: 8 * args.text])["input_ids"][: args.text]
    result: dict[str, Any] = {"directory": str(directory), "loads": False, "prompts": len(prompts)}
    variables = dict(item.split("=", 1) for item in args.env)
    flags = ["--dtype", args.dtype, "--max-model-len", "1024", *args.flag]
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "vllm.log"
        started = time.monotonic()
        try:
            with VllmServer(python, directory, log, flags, variables=variables) as server:
                result["start_seconds"] = time.monotonic() - started
                result["loads"] = True
                served = [server.complete(prompt, args.tokens) for prompt in prompts]
                result["served_loss"] = served_loss(server, text)
        except RunError as error:
            result["error"] = str(error)
            return result
    dtype = getattr(torch, args.reference_dtype)
    model = load_model(directory, kernel="reference", dtype=dtype)
    result["loss"] = reference_loss(model, text)
    result["apart"] = abs(result["served_loss"] / result["loss"] - 1)
    own = reference_tokens(model, prompts, args.tokens)
    result["agree"] = sum(a == b for a, b in zip(served, own, strict=True))
    result["first_difference"] = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        for a, b in zip(served, own, strict=True)
    ]
    result["example"] = tokenizer.decode(served[0])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--least", type=int, default=18, help="prompts that must agree")
    parser.add_argument("--text", type=int, default=512, help="tokens of the text that is scored")
    parser.add_argument("--most-apart", type=float, default=0.01, help="of the losses, relative")
    parser.add_argument("--dtype", default="float16", help="vLLM's --dtype")
    parser.add_argument("--reference-dtype", default="float32", help="of our own model")
    parser.add_argument("--flag", action="append", default=[], help="further flag for vLLM")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for vLLM")
    parser.add_argument("--json", type=Path, help="write results there")
    args = parser.parse_args()
    python = vllm_python()
    if python is None:
        print("vLLM is not installed: bash scripts/setup_vllm_cpu.sh", file=sys.stderr)
        return 1
    for directory in args.directories:
        if not (directory / "config.json").is_file():
            print(f"{directory}: no exported model (config.json) is there", file=sys.stderr)
            return 2
    results = []
    for directory in args.directories:
        try:
            results.append(check(directory, python, args))
        except CompressorError as error:
            results.append({"directory": str(directory), "loads": False, "error": str(error)})
    table = Table(title=f"vLLM, --dtype {args.dtype}, {args.tokens} greedy tokens")
    for column in ("directory", "loads", "start", "agree", "loss, ours", "first completion"):
        table.add_column(column, overflow="fold")
    passed = True
    for r in results:
        good = r["loads"] and r["agree"] >= min(args.least, r["prompts"])
        good = good and r["apart"] <= args.most_apart
        passed &= good
        start = f"{r['start_seconds']:.0f} s" if r["loads"] else ""
        agree = f"{r['agree']}/{r['prompts']}" if r["loads"] else r.get("error", "")
        loads = "yes" if r["loads"] else "no"
        loss = f"{r['served_loss']:.4f}, {r['loss']:.4f}" if r["loads"] else ""
        table.add_row(r["directory"], loads, start, agree, loss, repr(r.get("example", "")))
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
