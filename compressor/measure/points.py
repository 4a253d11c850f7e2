"""From raw request samples to the figures of the report; nothing here touches a clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError
from compressor.measure import energy, ledger, metrics, scenarios, steady, techniques
from compressor.measure.engines.base import RequestSample
from compressor.measure.prices import PriceScenario, price_table, with_watts
from compressor.measure.samples import read_samples

LEDGER = "ledger.json"
LIST_PRICES = ("usd_per_mtok_input", "usd_per_mtok_output")
_MEASURED = ("nvml", "rapl")


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
    loads: Sequence[Mapping[str, Any]] = (),
    list_price: Mapping[str, float | None] | None = None,
    baseline_cost: float | None = None,
) -> dict[str, Any]:
    """One variant at one point of the sweep, against the baseline at the same point.

    All costs rest on goodput: output tokens of the requests inside the goal (all, without goals)
    per second of the whole window, prefill included. When no request met the goal the costs and
    the ratio are None.

    Args:
        loads: of this point; the energy, where it was measured.
        list_price: of a provider who is paid by the token; the cost is that, input included.
        baseline_cost: of the baseline at this point, for the ratio of list prices.
    """
    raw = metrics.throughput_interval(samples, seed=seed)
    good = metrics.throughput_interval(samples, seed=seed, goal=goal)
    baseline_good = metrics.throughput(baseline, goal)
    prompt_tokens = sum(sample.prompt_tokens for sample in samples if not sample.error)
    output_tokens = sum(sample.output_tokens for sample in samples if not sample.error)
    used = _energy(loads, prices, output_tokens)
    prices = _at_measured_watts(prices, used)
    row: dict[str, Any] = {
        "concurrency": samples[0].concurrency,
        "rate_per_s": samples[0].rate_per_s,
        "engine": engine["engine"],
        "kernel": engine["kernel"],
        "dtype": engine["dtype"],
        "requests": len(samples),
        "rounds": len(metrics.by_round(samples)),
        "window_seconds": metrics.window_seconds(samples),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "throughput_tok_s": raw.to_dict(),
        "goodput_tok_s": good.to_dict(),
        "goal_met_share": sum(map(goal.met, samples)) / len(samples),
        "prefill_tok_s": metrics.prefill_rate(samples),
        "decode_tok_s": metrics.decode_rate(samples),
        **metrics.serving_figures(samples),
        "steady": _steady(samples),
        "energy": used,
        "speedup": None,
        "cost_usd_per_mtok_output": None,
        "cost_usd_per_mtok_prefill": None,
        "cost_usd_per_mtok_decode": None,
        "cost_ratio": None,
        "components_usd_per_hour": ledger.components_usd_per_hour(
            prices, tokens_per_second=good.value, artifact_bytes=artifact_bytes
        )
        if list_price is None
        else {},
    }
    if good.value <= 0:
        return row
    speedup = None
    if baseline_good > 0:
        speedup = (
            metrics.Interval(1.0, None, None)
            if samples is baseline
            else metrics.speedup_interval(baseline, samples, seed=seed, goal=goal)
        )
        row["speedup"] = speedup.to_dict()
    if list_price is not None:
        cost = ledger.list_cost_usd_per_mtok(
            prompt_tokens=prompt_tokens, output_tokens=output_tokens, **list_price
        )
        row["cost_usd_per_mtok_output"] = metrics.Interval(cost, None, None).to_dict()
        if baseline_cost:
            ratio = baseline_cost / cost if cost else None
            row["cost_ratio"] = ratio and metrics.Interval(ratio, None, None).to_dict()
        return row
    row["cost_usd_per_mtok_output"] = ledger.cost_interval(
        prices, good, artifact_bytes=artifact_bytes
    ).to_dict()
    for name in ("prefill", "decode"):
        if rate := row[f"{name}_tok_s"]:
            row[f"cost_usd_per_mtok_{name}"] = ledger.cost_usd_per_mtok(
                prices, tokens_per_second=rate, artifact_bytes=artifact_bytes
            )
    if speedup is not None:
        row["cost_ratio"] = ledger.cost_ratio(
            prices,
            baseline_rate=baseline_good,
            candidate_rate=good.value,
            speedup=speedup,
            baseline_bytes=baseline_bytes,
            candidate_bytes=artifact_bytes,
        ).to_dict()
    return row


def _at_measured_watts(prices: PriceScenario, used: Mapping[str, Any] | None) -> PriceScenario:
    """The prices with the power that was measured, where energy is paid by what is drawn."""
    if used and used["method"] in _MEASURED and not prices.energy_included:
        return with_watts(prices, used["mean_watts"], used["method"])
    return prices


def _steady(samples: Sequence[RequestSample]) -> dict[str, Any]:
    """In how many rounds the load came to a steady state, and why not in the others."""
    windows = [steady.find_window(group) for group in metrics.by_round(samples).values()]
    reasons = {window.reason for window in windows if not window.steady}
    return {
        "rounds": sum(window.steady for window in windows),
        "of": len(windows),
        "reasons": sorted(reasons),
    }


def _energy(
    loads: Sequence[Mapping[str, Any]], prices: PriceScenario, output_tokens: int
) -> dict[str, Any] | None:
    """Joules and grams per output token over the loads of a point; None where not known."""
    readings = [load["energy"] for load in loads if load.get("energy")]
    methods = {reading["method"] for reading in readings}
    if len(methods) != 1 or "none" in methods or not output_tokens:
        return None
    joules = sum(reading["joules"] for reading in readings)
    seconds = sum(reading["seconds"] for reading in readings)
    grid = prices.grid_gco2e_per_kwh
    busy = [r["utilisation_percent"] for r in readings if r["utilisation_percent"] is not None]
    return {
        "method": methods.pop(),
        "joules": joules,
        "mean_watts": joules / seconds,
        "joules_per_output_token": energy.joules_per_token(joules, output_tokens, pue=prices.pue),
        "gco2e_per_output_token": None
        if grid is None
        else energy.gco2e_per_token(joules, output_tokens, grid_gco2e_per_kwh=grid, pue=prices.pue),
        "utilisation_percent": sum(busy) / len(busy) if busy else None,
        "utilisation_of": readings[0]["utilisation_of"],
    }


Key = tuple[int, float | None]  # concurrency, arrivals per second


def _key(row: Any) -> Key:
    if isinstance(row, Mapping):
        return row["concurrency"], row["rate_per_s"]
    return row.concurrency, row.rate_per_s


def _order(key: Key) -> tuple[bool, float]:
    """Closed loops first, each kind rising."""
    return key[1] is not None, key[1] or key[0]


def figures(
    record: Mapping[str, Any], samples: Mapping[str, Sequence[RequestSample]]
) -> dict[str, Any]:
    """``performance`` and ``economics`` of a measurement, ``techniques`` of a declared waterfall,
    ``split`` of measured parts.

    Args:
        record: content of ``ledger.json``, without these.
        samples: by variant.

    Returns:
        ``performance``: rows by variant, one per point of the sweep, closed loops first;
        ``economics``: see `economics`; ``techniques``: see `techniques.gains`; ``split``: see
        `split_costs`, by variant.
    """
    prices = PriceScenario.from_dict(record["prices"])
    seed, goal = record["workload"]["seed"], metrics.Goal(**record["workload"]["goal"])
    groups: dict[str, dict[Key, list[RequestSample]]] = {}
    for name, rows in samples.items():
        groups[name] = {}
        for sample in rows:
            if not sample.part:
                groups[name].setdefault(_key(sample), []).append(sample)
        groups[name] = dict(sorted(groups[name].items(), key=lambda item: _order(item[0])))
    loads: dict[tuple[str, Key], list[Mapping[str, Any]]] = {}
    for load in record["loads"]:
        if not load.get("part"):
            loads.setdefault((load["variant"], _key(load)), []).append(load)
    first = record["baseline"]
    performance: dict[str, list[dict[str, Any]]] = {}
    costs: dict[Key, float] = {}
    for name in [first, *(name for name in groups if name != first)]:
        performance[name] = []
        for key, group in groups[name].items():
            row = performance_row(
                group,
                groups[first][key],
                engine=record["engines"][name],
                prices=prices,
                artifact_bytes=record["artifact_bytes"].get(name, 0),
                baseline_bytes=record["artifact_bytes"].get(first, 0),
                seed=seed,
                goal=goal,
                loads=loads.get((name, key), ()),
                list_price=record["list_prices"].get(name),
                baseline_cost=costs.get(key),
            )
            performance[name].append(row)
            if name == first and row["cost_usd_per_mtok_output"]:
                costs[key] = row["cost_usd_per_mtok_output"]["value"]
    found: dict[str, Any] = {
        "performance": performance,
        "economics": economics(record, performance),
    }
    if declared := record.get("waterfall"):
        found["techniques"] = techniques.gains(
            declared, groups, baseline=first, seed=seed, goal=goal
        )
    if any(sample.part for rows in samples.values() for sample in rows):
        found["split"] = {
            name: split_costs(
                samples[name],
                rows,
                prices=prices,
                artifact_bytes=record["artifact_bytes"].get(name, 0),
                seed=seed,
            )
            for name, rows in performance.items()
        }
    return found


def split_costs(
    samples: Sequence[RequestSample],
    performance: Sequence[Mapping[str, Any]],
    *,
    prices: PriceScenario,
    artifact_bytes: int,
    seed: int,
) -> list[dict[str, Any]]:
    """What input and output tokens of one variant cost apart, one row per concurrency.

    A row is `scenarios.SplitCost` for the mean request of the load, its two costs with intervals
    over rounds, with ``concurrency`` and ``groups``: the tokens and seconds by part that it was
    solved from. Points at which they cannot be told apart, since requests failed, have no row.

    Args:
        samples: of the load and of its parts.
        performance: the variant's rows; power is taken from them where it was measured.
    """
    found = []
    for row in performance:
        groups: dict[str, list[RequestSample]] = {}
        for sample in samples:
            if _key(sample) == _key(row):
                groups.setdefault(sample.part, []).append(sample)
        scenario = _at_measured_watts(prices, row["energy"])
        whole = _split(list(groups.values()), scenario, artifact_bytes)
        if whole is None:
            continue
        rounds = [metrics.by_round(group) for group in groups.values()]
        turns = [
            _split([group.get(turn, []) for group in rounds], scenario, artifact_bytes)
            for turn in sorted({turn for group in rounds for turn in group})
        ]
        line: dict[str, Any] = {"concurrency": row["concurrency"], **whole.to_dict()}
        for key in ("input_usd_per_mtok", "output_usd_per_mtok"):
            each = [0.0 if turn is None else getattr(turn, key) for turn in turns]
            line[key] = metrics.bootstrap_interval(line[key], each, seed=seed).to_dict()
        line["groups"] = {
            part or "load": asdict(scenarios.Totals.of(group)) for part, group in groups.items()
        }
        found.append(line)
    return found


def _split(
    groups: Sequence[Sequence[RequestSample]], prices: PriceScenario, artifact_bytes: int
) -> scenarios.SplitCost | None:
    """The costs from requests of the load, the first group, and of its parts; None where they do
    not tell them apart."""
    totals = [scenarios.Totals.of(group) for group in groups]
    if len(totals) < 2 or not all(one.requests for one in totals):
        return None
    mix = totals[0].input_tokens / totals[0].requests, totals[0].output_tokens / totals[0].requests
    try:
        return scenarios.split_input_output(totals, prices, artifact_bytes=artifact_bytes, mix=mix)
    except RecipeError:
        return None


def economics(
    record: Mapping[str, Any], performance: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """What the costs depend on, at the point where the baseline is cheapest.

    By variant: ``concurrency`` and ``rate_per_s`` of the point, ``scenarios`` (cost under each plan
    known for the device), ``sensitivity`` (which assumption moves the cost most), ``utilisation``
    (cost by share of paid hours in use). Empty for list prices, which hide all of it.
    """
    if record["list_prices"]:
        return {}
    rows = [
        row
        for row in performance[record["baseline"]]
        if row["cost_usd_per_mtok_output"] is not None
    ]
    if not rows:
        return {}
    point = _key(min(rows, key=lambda row: row["cost_usd_per_mtok_output"]["value"]))
    prices, basis = PriceScenario.from_dict(record["prices"]), record["price_basis"]
    found = {}
    for name, own in performance.items():
        row = next((row for row in own if _key(row) == point), None)
        if row is None or row["goodput_tok_s"]["value"] <= 0:
            continue
        rate = metrics.Interval(**row["goodput_tok_s"])
        size = record["artifact_bytes"].get(name, 0)
        scenario = _at_measured_watts(prices, row["energy"])
        with price_table(basis["table"] if basis["table"]["rows"] else None):
            table = scenarios.scenario_table(
                rate,
                artifact_bytes=size,
                overrides=basis["overrides"],
                gpu_name=basis["gpu_name"],
                cpu_count=basis["cpu_count"],
            )
        found[name] = {
            "concurrency": point[0],
            "rate_per_s": point[1],
            "scenarios": table.to_dict(),
            "sensitivity": scenarios.sensitivity(scenario, rate, artifact_bytes=size).to_dict(),
            "utilisation": [
                share.to_dict()
                for share in scenarios.utilisation_table(scenario, rate, artifact_bytes=size)
            ],
        }
    return found


def recompute(directory: Path) -> dict[str, Any]:
    """`figures` again, from nothing but the files that a measurement left.

    `directory` holds ``ledger.json`` and ``samples/``. They equal what ``ledger.json`` says
    exactly, or something was altered.
    """
    record = json.loads((directory / LEDGER).read_text(encoding="utf-8"))
    samples = {
        name: read_samples(directory / row["path"]) for name, row in record["samples"].items()
    }
    return json.loads(json.dumps(figures(record, samples)))
