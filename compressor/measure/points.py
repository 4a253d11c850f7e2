"""From raw samples to the performance rows of the report; nothing here touches a clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.measure import ledger, metrics
from compressor.measure.engines.base import RequestSample
from compressor.measure.prices import PriceScenario
from compressor.measure.samples import read_samples

LEDGER = "ledger.json"


def performance_row(
    samples: Sequence[RequestSample],
    baseline: Sequence[RequestSample],
    *,
    engine: Mapping[str, Any],
    prices: PriceScenario,
    artifact_bytes: int,
    baseline_bytes: int,
    seed: int,
    goal: metrics.Goal,
) -> dict[str, Any]:
    """One variant at one concurrency, against the baseline at the same concurrency.

    All costs rest on goodput: output tokens of the requests inside the goal (all, without goals)
    per second of the whole window, prefill included. When no request met the goal the costs and
    the ratio are None.
    """
    raw = metrics.throughput_interval(samples, seed=seed)
    good = metrics.throughput_interval(samples, seed=seed, goal=goal)
    baseline_good = metrics.throughput(baseline, goal)
    row: dict[str, Any] = {
        "concurrency": samples[0].concurrency,
        "engine": engine["engine"],
        "kernel": engine["kernel"],
        "dtype": engine["dtype"],
        "requests": len(samples),
        "rounds": len(metrics.by_round(samples)),
        "window_seconds": metrics.window_seconds(samples),
        "prompt_tokens": sum(sample.prompt_tokens for sample in samples),
        "output_tokens": sum(sample.output_tokens for sample in samples),
        "throughput_tok_s": raw.to_dict(),
        "goodput_tok_s": good.to_dict(),
        "goal_met_share": sum(map(goal.met, samples)) / len(samples),
        "prefill_tok_s": metrics.prefill_rate(samples),
        "decode_tok_s": metrics.decode_rate(samples),
        **metrics.latency_figures(samples),
        "speedup": None,
        "cost_usd_per_mtok_output": None,
        "cost_usd_per_mtok_prefill": None,
        "cost_usd_per_mtok_decode": None,
        "cost_ratio": None,
        "components_usd_per_hour": ledger.components_usd_per_hour(
            prices, tokens_per_second=good.value, artifact_bytes=artifact_bytes
        ),
    }
    if good.value <= 0:
        return row
    row["cost_usd_per_mtok_output"] = ledger.cost_interval(
        prices, good, artifact_bytes=artifact_bytes
    ).to_dict()
    for name in ("prefill", "decode"):
        if (rate := row[f"{name}_tok_s"]) is not None:
            row[f"cost_usd_per_mtok_{name}"] = ledger.cost_usd_per_mtok(
                prices, tokens_per_second=rate, artifact_bytes=artifact_bytes
            )
    if baseline_good > 0:
        speedup = (
            metrics.Interval(1.0, None, None)
            if samples is baseline
            else metrics.speedup_interval(baseline, samples, seed=seed, goal=goal)
        )
        row["speedup"] = speedup.to_dict()
        row["cost_ratio"] = ledger.cost_ratio(
            prices,
            baseline_rate=baseline_good,
            candidate_rate=good.value,
            speedup=speedup,
            baseline_bytes=baseline_bytes,
            candidate_bytes=artifact_bytes,
        ).to_dict()
    return row


def performance(
    samples: Mapping[str, Sequence[RequestSample]],
    *,
    baseline: str,
    engines: Mapping[str, Mapping[str, Any]],
    prices: PriceScenario,
    artifact_bytes: Mapping[str, int],
    seed: int,
    goal: metrics.Goal,
) -> dict[str, list[dict[str, Any]]]:
    """Rows by variant name, one per concurrency in rising order."""
    groups: dict[str, dict[int, list[RequestSample]]] = {}
    for name, rows in samples.items():
        groups[name] = {}
        for sample in rows:
            groups[name].setdefault(sample.concurrency, []).append(sample)
    return {
        name: [
            performance_row(
                group,
                groups[baseline][concurrency],
                engine=engines[name],
                prices=prices,
                artifact_bytes=artifact_bytes.get(name, 0),
                baseline_bytes=artifact_bytes.get(baseline, 0),
                seed=seed,
                goal=goal,
            )
            for concurrency, group in sorted(by_concurrency.items())
        ]
        for name, by_concurrency in groups.items()
    }


def recompute(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The performance rows again, from nothing but the files that a measurement left.

    `directory` holds ``ledger.json`` and ``samples/``. The rows equal
    ``performance`` in ``ledger.json`` exactly, or something was altered.
    """
    record = json.loads((directory / LEDGER).read_text(encoding="utf-8"))
    return performance(
        {name: read_samples(directory / row["path"]) for name, row in record["samples"].items()},
        baseline=record["baseline"],
        engines=record["engines"],
        prices=PriceScenario.from_dict(record["prices"]),
        artifact_bytes=record["artifact_bytes"],
        seed=record["workload"]["seed"],
        goal=metrics.Goal(**record["workload"]["goal"]),
    )
