"""Greedy output with speculation against the target's own, token by token, of a finished run.

    python benchmarks/lossless.py recipes/medusa.yaml [--prompts 200] [--tokens 16] [--nodes 16]
        [--batch 32] [--output FILE.json]

For each variant with speculation that the recipe's store holds, with a chain and with a tree of its
guesses, behind its own target and behind the unquantized one (whose outputs the guesses were not
trained on: fewer are accepted, the output must not care). Prompts are the built-in ones, then
instructions. Computed in float32. Exit code 1 where an output differs and the target's two best
logits at that place were further apart than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor.data.sources import load_texts
from compressor.data.tokens import prompt_tokens
from compressor.doctor import cpu_name
from compressor.models.architecture import CausalLM
from compressor.models.end_tokens import end_tokens
from compressor.plan import make_plan
from compressor.progress import SilentProgress
from compressor.recipe import load_recipe
from compressor.speculate.cached import CachedModel
from compressor.speculate.decoding import Decoded, speculative_decode
from compressor.speculate.trial import figures
from compressor.speculate_stages import proposers, target
from compressor.stages import Context
from compressor.store import Store

TIE = 1e-3  # logits: the order of sums moves them by less, and may so turn what is chosen


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    texts = [
        text
        for name in ("prompts", "instructions")
        for text in load_texts(f"builtin:{name}", field="prompt", base_dir=Path())
    ]
    found = (list(prompt_tokens(text, tokenizer)) for text in texts)
    return [ids for ids in found if len(ids) <= 256][:count]


def contexts(recipe_path: Path) -> list[Context]:
    """The stages in which the recipe tries its speculators, with what they need from the store."""
    recipe = load_recipe(recipe_path)
    store = Store(recipe.store_dir)
    plan = make_plan(recipe, store)
    keys = {stage.name: stage.key for stage in plan.stages}
    found = []
    for stage in plan.stages:
        inputs = {name: store.get(keys[name]) for name in stage.inputs}
        there = {name: stored for name, stored in inputs.items() if stored is not None}
        if stage.kind == "accept" and len(there) == len(inputs):
            found.append(Context(stage, there, Path(), SilentProgress()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=16, help="of trees")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    plain: dict[str, list[Decoded]] = {}  # by target
    for context in contexts(arguments.recipe):
        c = context.config
        c["tree_nodes"] = arguments.nodes
        prompts = prompts_of(context.tokenizer(), arguments.prompts)
        full: Any = CausalLM.open(context.model_dir).load_full(torch.float32)
        quantized = context.quantized
        for name, model in {"as served": target(context), "full precision": full.eval()}.items():
            cached, ends = CachedModel(model), sorted(end_tokens(model))

            decode = partial(
                speculative_decode,
                cached,
                prompts=prompts,
                output_length=arguments.tokens,
                batch_size=arguments.batch,
                ends=ends,
                depth=c["depth"],
            )
            key = quantized.key if quantized and name == "as served" else str(context.model_dir)
            if key not in plain:
                plain[key] = decode(None)
            for way, proposer in proposers(context, model).items():
                started = time.perf_counter()
                found = figures(plain[key], decode(proposer))
                rows.append(
                    {
                        "method": c["method"],
                        "candidates": way,
                        "target": name,
                        "prompts": found["sequences"],
                        "equal": found["equal"],
                        "ties": found["ties"],
                        "tokens_per_step": round(found["tokens_per_step"], 3),
                        "seconds": round(time.perf_counter() - started, 1),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    if not rows:
        print("the store holds no trained speculator of this recipe: run it first", file=sys.stderr)
        return 2
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu_name()}, {platform.machine()}",
        "tokens": arguments.tokens,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lost = [row for row in rows if any(tie > TIE for tie in row["ties"])]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
