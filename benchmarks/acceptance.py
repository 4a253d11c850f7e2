"""What vLLM accepts of drafts against what our decoder accepts, of the same prompts.

    python benchmarks/acceptance.py RECIPE RUN [--prompts 32] [--tokens 48] [--at-once 8]
        [--dtype bfloat16] [--output FILE.json]

RUN is a finished run of the recipe. Each of its variants with speculation is served by vLLM as it
is exported, and asked for greedy answers to built-in prompts; its own counters tell what it
accepted, and the answers are compared with those of the same server without speculation. Our
decoder answers the same prompts with a chain as deep, in float32. Tokens per second are wall clock,
of one pass over the prompts: no more than a hint. Exit code 1 where an acceptance rate (accepted of
drafted tokens) differs from ours by more than 10%.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lossless import contexts, prompts_of

from compressor.doctor import cpu_name
from compressor.measure.engines.vllm import VllmServer
from compressor.measure.fleet import vllm_interpreter
from compressor.measure.runner import drafted_since
from compressor.plan import SPECULATOR_FORMATS
from compressor.speculate.acceptance import Acceptance
from compressor.speculate.cached import CachedModel
from compressor.speculate.decoding import speculative_decode
from compressor.speculate_stages import proposers, serving_flags, target

MOST = 0.1


def figures(counts: Acceptance) -> dict[str, Any]:
    return {
        "drafts": counts.drafts,
        "tokens_per_draft": round(counts.mean_length, 4),
        "rate": round(counts.rate, 4),
        "accepted_by_position": [round(rate, 4) for rate in counts.rates_by_position],
    }


def serve(
    directory: Path, flags: tuple[str, ...], prompts: list[list[int]], args: argparse.Namespace
) -> tuple[list[list[int]], float, Acceptance | None]:
    """Answers of vLLM, their tokens per second, and what it counted of drafts."""
    longest = max(map(len, prompts)) + args.tokens + 16
    common = ("--dtype", args.dtype, "--max-model-len", str(longest))
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        python = vllm_interpreter(None)
        with VllmServer(python, directory, log, (*common, *flags)) as server:
            server.complete(prompts[0], 4)
            before = server.drafted()
            started = time.perf_counter()
            with ThreadPoolExecutor(args.at_once) as pool:
                answers = list(pool.map(lambda one: server.complete(one, args.tokens), prompts))
            seconds = time.perf_counter() - started
            after = server.drafted()
    found = drafted_since(before, after)
    counts = None if found is None else Acceptance.total([found])
    return answers, sum(map(len, answers)) / seconds, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    plain: dict[str, tuple[list[list[int]], float, Any]] = {}  # by target
    for context in contexts(args.recipe):
        variant, c = context.stage.variant, context.config
        assert variant is not None
        prompts = prompts_of(context.tokenizer(), args.prompts)
        artifacts = (args.run / "artifacts" / variant).resolve()
        served = artifacts / "compressed-tensors"
        fmt = SPECULATOR_FORMATS.get(c["method"])
        flags = serving_flags(c, artifacts / fmt if fmt else None)
        key = context.quantized.key if context.quantized else ""
        if key not in plain:
            plain[key] = serve(served, (), prompts, args)
        answers, speed, theirs = serve(served, flags, prompts, args)
        model = target(context)
        own = Acceptance.of(
            speculative_decode(
                CachedModel(model),
                proposers(context, model)["chain"],
                prompts,
                output_length=args.tokens,
                batch_size=32,
                ends=(),
                depth=c["depth"],
            )
        )
        assert theirs is not None, "vLLM counted no drafts"
        same = sum(one == other for one, other in zip(answers, plain[key][0], strict=True))
        row = {
            "variant": variant,
            "method": c["method"],
            "prompts": len(prompts),
            "same_answers": same,
            "tokens_per_s": round(speed, 1),
            "tokens_per_s_without": round(plain[key][1], 1),
            "ours": figures(own),
            "vllm": figures(theirs),
            "rate_ratio": round(theirs.rate / own.rate, 4) if own.accepted_tokens else None,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": cpu_name(),
        "rows": rows,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not rows:
        print("the store holds no speculator of this recipe: run it first", file=sys.stderr)
        return 2
    apart = [x for x in rows if x["rate_ratio"] is None or abs(x["rate_ratio"] - 1) > MOST]
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
