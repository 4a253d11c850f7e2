"""What vLLM accepted of drafts against what our decoder accepts, of the same prompts.

    python benchmarks/acceptance.py RECIPE RUN [--tokens 48] [--output FILE.json]

RUN is a finished run of the recipe in which variants with speculation were measured in vLLM: its
own counters of each load are in the ledger. Our decoder answers the very prompts that were served,
as many tokens of each, with a chain as deep. It computes in float32, vLLM in what the recipe says.
Exit code 1 where the acceptance rate
(accepted of drafted tokens) differs by more than 10%.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lossless import contexts

from compressor.doctor import cpu_name
from compressor.measure.workload import read_prompts
from compressor.models.end_tokens import end_tokens
from compressor.speculate.acceptance import Acceptance
from compressor.speculate.cached import CachedModel
from compressor.speculate.decoding import speculative_decode
from compressor.speculate_stages import proposers, target

MOST = 0.1


def served_prompts(run: Path, variant: str) -> list[int]:
    """Indices of the prompts that the variant was asked, as often as it was."""
    with gzip.open(run / "samples" / f"{variant}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def figures(counts: Acceptance) -> dict[str, Any]:
    return {
        "drafts": counts.drafts,
        "tokens_per_draft": round(counts.mean_length, 4),
        "rate": round(counts.rate, 4),
        "accepted_by_position": [round(rate, 4) for rate in counts.rates_by_position],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=48, help="workload.output_length")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    ledger = json.loads((arguments.run / "ledger.json").read_text(encoding="utf-8"))
    prompts = read_prompts(arguments.run / ledger["prompts"]["path"])
    rows = []
    for context in contexts(arguments.recipe):
        variant, c = context.stage.variant, context.config
        loads = [x for x in ledger["loads"] if x["variant"] == variant and not x["part"]]
        counted = [x["drafted"] for x in loads if x.get("drafted")]
        if variant is None or not counted:
            continue
        asked = served_prompts(arguments.run, variant)
        model = target(context)
        chain = proposers(context, model)["chain"]
        different = sorted(set(asked))
        answers = speculative_decode(
            CachedModel(model),
            chain,
            [prompts[index] for index in different],
            output_length=arguments.tokens,
            batch_size=arguments.batch,
            ends=sorted(end_tokens(model)),
            depth=c["depth"],
        )
        answer = dict(zip(different, answers, strict=True))
        own = Acceptance.of([answer[index] for index in asked])
        theirs = Acceptance.total(counted)
        row = {
            "variant": variant,
            "method": c["method"],
            "prompts": len(different),
            "ours": figures(own),
            "vllm": figures(theirs),
            "ratio": round(theirs.rate / own.rate, 4) if own.accepted_tokens else None,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": cpu_name(),
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not rows:
        print("no variant of the run was measured with speculation", file=sys.stderr)
        return 2
    return 1 if any(row["ratio"] is None or abs(row["ratio"] - 1) > MOST for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
