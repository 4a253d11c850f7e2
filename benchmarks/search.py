"""A search against trying every candidate of a small space: the same winner, in how much less time?

    python benchmarks/search.py recipes/optimise.yaml --output reports/optimise/exhaustive.json
        [--max-loss 5%] [--work DIR]

The recipe's space is cut down to 32 candidates. Each is evaluated on all tokens of the search
and, where it keeps the limits, exported and measured, in a store of its own that the search does
not see. Candidates that compute the same in serving cost the same: the median of their
measurements; the one that loses least wins, as in the search. Times are what stages took when they
ran, those that both need (model, texts, baseline) counted for both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from records import write_record

from compressor.doctor import cpu_name
from compressor.optimise import trials
from compressor.optimise.options import MEASURED
from compressor.optimise.search import search
from compressor.optimise.space import CandidateSpace
from compressor.optimise.trials import Trials
from compressor.progress import make_progress
from compressor.recipe import Recipe, load_recipe
from compressor.store import Store

SPACE: dict[str, Any] = {
    "algorithms": [["rtn"], [{"rtn": {"observer": "mse"}}], ["gptq"], ["smoothquant", "gptq"]],
    "schemes": ["W8A8", "W8A16", "W4A16"],
    "group_sizes": [32, 64],
    "lm_head": [None, {"scheme": "W8A8"}],
}
SAMPLES, TOKENS, FEW_TOKENS, ROUNDS = 16, 2048, 512, 4  # fewer than the recipe's, for both


def small(path: Path, max_loss: str, directory: Path) -> Recipe:
    """The recipe with the small space and no variants of its own."""
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    value.pop("variants", None)
    limits = {**value["optimise"]["subject_to"], "max_loss": max_loss}
    value["calibration"]["samples"] = SAMPLES
    value["measure"]["workload"]["rounds"] = ROUNDS
    value["optimise"] |= {
        "space": SPACE,
        "subject_to": limits,
        "minutes": 1000,
        "trials": 64,
        "tokens": TOKENS,
        "few_tokens": FEW_TOKENS,
    }
    made = directory / "small.yaml"
    made.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return load_recipe(made)


def exhaustive(recipe: Recipe, store: Store, log: Path) -> dict[str, Any]:
    """Every candidate's figures, and the best that keeps the limits."""
    options = recipe.optimise
    assert options is not None
    runner, rows = Trials(recipe, store, make_progress(False), log), []
    runner.baseline(options.tokens)
    for candidate in CandidateSpace(recipe).pool:
        quality = runner.quality(candidate, options.tokens)
        row: dict[str, Any] = {
            "name": candidate.name,
            "variant": candidate.variant,
            "loss": trials.worst_loss(quality),
            "violation": trials.violation(options.subject_to, quality),
            "computes": candidate.speed_class,
            "objective": None,
            "baseline_objective": None,
            "ratio": None,  # to the baseline measured beside it
        }
        if row["violation"] <= 0:
            size, baseline = runner.artifact(candidate)
            figures: dict[str, Any] = {"own": {}, "baseline": {}}
            if options.minimise in MEASURED:
                figures = runner.measured(candidate)
            row["objective"] = trials.objective_of(options.minimise, figures["own"], size)
            row["baseline_objective"] = trials.objective_of(
                options.minimise, figures["baseline"], baseline
            )
            row["ratio"] = row["objective"] / row["baseline_objective"]
        rows.append(row)
    kept = [row for row in rows if row["ratio"] is not None]
    measured: dict[str, list[float]] = {}
    for row in kept:
        measured.setdefault(row["computes"], []).append(row["ratio"])
    best = min(
        kept,
        key=lambda row: (statistics.median(measured[row["computes"]]), row["violation"]),
        default=None,
    )
    return {
        "candidates": rows,
        "winner": best and best["name"],
        "seconds": sum(runner.seconds.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-loss", default="5%")
    parser.add_argument("--work", type=Path, help="directory for both stores; kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        recipe = small(arguments.recipe, arguments.max_loss, work)
        started = time.monotonic()
        found = search(recipe, Store(work / "search"), make_progress(False), work / "search.jsonl")
        wall = time.monotonic() - started
        every = exhaustive(recipe, Store(work / "every"), work / "every.jsonl")
    seconds = sum(found.runner.seconds.values())
    ranked = [record.name for _, record in found.ranked]
    by_name = {row["name"]: row for row in every["candidates"]}
    facts = {
        "max_loss": arguments.max_loss,
        "search": {
            "winner": ranked[0] if ranked else None,
            "seconds": seconds,
            "wall_seconds": wall,
            "trials": [one.model_dump(mode="json") for _, one in found.trials],
            "excluded": found.excluded,
            "stopped": found.stopped,
        },
        "exhaustive": every,
        "same_winner": bool(ranked) and ranked[0] == every["winner"],
        "same_cost": bool(ranked)
        and every["winner"] is not None
        and by_name[ranked[0]]["computes"] == by_name[every["winner"]]["computes"],
        "winner_in_exhaustive": by_name.get(ranked[0]) if ranked else None,
        "time_share": seconds / every["seconds"],
    }
    write_record(arguments.output, cpu_name(), facts)
    short = {key: facts[key] for key in ("same_winner", "same_cost", "time_share")}
    print(short, ranked[:1], every["winner"], f"{seconds:.0f} s / {every['seconds']:.0f} s")
    return int(not facts["same_cost"])


if __name__ == "__main__":
    sys.exit(main())
