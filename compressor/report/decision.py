"""A report's answers to whoever has a minute: what to deploy, its cost, how sure, what would change
it. Every sentence follows from the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report import figures
from compressor.report.optimise import limits
from compressor.report.verdict import (
    certainly_cheaper,
    comparable,
    loss_bound,
    row_at,
    worst_quality,
)


def answers(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(question, sentences) in the order in which they are asked; without sentences left out."""
    verdict = report["verdict"]
    name = verdict["best_variant"] or report["baseline"]
    chosen = next((v for v in report["variants"] if v["name"] == name), None)
    if chosen is None or verdict["outcome"] in ("failed", "unmeasured"):
        return []
    found = [
        ("What to deploy", _deploy(report, chosen)),
        ("What it costs", _cost(report, chosen)),
        ("How sure that is", _sure(report, chosen)),
        ("What would change it", _change(report, chosen)),
    ]
    return [(question, lines) for question, lines in found if lines]


def _deploy(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    verdict, name, search = report["verdict"], chosen["name"], report["optimise"]
    limit = f"{100 * verdict['quality_limit']:g}%"
    if search and search["chosen"] == name:
        lines = [
            f"{name}: what the search chose of {search['candidates']} candidates for its "
            f"{search['minimise']}, within {limits(search)}."
        ]
    elif verdict["outcome"] == "gain":
        words = f"{name}: of the variants that keep quality within {limit} it is the cheapest"
        rivals = [
            v["name"] for v in report["variants"] if v["name"] not in (name, report["baseline"])
        ]
        lines = [
            f"{words}." if rivals else f"{name}: it is cheaper and keeps quality within {limit}."
        ]
    elif verdict["outcome"] == "trade-off":
        lines = [
            f"{name}, as it is, unless a loss above {limit} is acceptable: what is cheaper does "
            "not surely stay within it."
        ]
    else:
        lines = [f"{name}, as it is: nothing is shown to be cheaper."]
    if chosen["artifacts"]:
        places = figures.listed([artifact["path"] for artifact in chosen["artifacts"]])
        lines.append(f"It lies in the run's {places}.")
    return lines


def _cost(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    point = report["verdict"]["concurrency"]
    row = row_at(chosen, point)
    if row is None or row["cost_usd_per_mtok_output"] is None:
        return []
    cost, money = row["cost_usd_per_mtok_output"], figures.currency(report)
    words = f"{_with(cost)} {money} per million output tokens at concurrency {point}"
    baseline = next(v for v in report["variants"] if v["name"] == report["baseline"])
    base = row_at(baseline, point)
    if base and chosen is not baseline and base["cost_usd_per_mtok_output"]:
        words += f"; the baseline {_with(base['cost_usd_per_mtok_output'])}"
    lines = [f"{words}."]
    prices = report["prices"] or {}
    if row["components_usd_per_hour"]:
        paid = sum(row["components_usd_per_hour"].values())
        lines.append(
            f"At {paid:.4g} {money} per hour ({prices.get('label') or 'this device'}, "
            f"{prices.get('price_kind') or 'declared'} price"
            f"{', ' + prices['as_of'] if prices.get('as_of') else ''}), used "
            f"{figures.percent(prices.get('utilisation'), 0)} of the paid time; that is declared, "
            "only the speed was measured."
        )
    return lines


def _sure(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    point, lines = report["verdict"]["concurrency"], []
    row, text = row_at(chosen, point), worst_quality(chosen)
    is_baseline = chosen["name"] == report["baseline"]
    if row and row["cost_ratio"] and not is_baseline:
        lines.append(
            f"Cost gain {_with(row['cost_ratio'], '×')}, 95% interval over {row['rounds']} rounds "
            f"that took turns with the baseline, {figures.count(row['requests'])} requests."
        )
    elif row and row["rounds"]:
        lines.append(
            f"Costs: {row['rounds']} rounds of all variants in turn, "
            f"{figures.count(row['requests'])} requests each."
        )
    if text and not is_baseline:
        bounds = figures.change_interval(text["perplexity_ci"])
        lines.append(
            f"Perplexity {figures.change(text['perplexity_change'], text['perplexity_ci'])}"
            f"{f' ({bounds})' if bounds else ', without an interval'} on {text['text']}, the worst "
            f"of {len(chosen['quality'])} held-out texts, {figures.count(text['tokens'])} tokens."
        )
    tested = [r for v in report["variants"] for r in v["retained"] if r["axis"] != "divergence"]
    if not tested:
        lines.append(
            "Quality is perplexity on texts alone: no task was run, so what it answers was not "
            "compared."
        )
    for artifact in chosen["artifacts"]:
        check = artifact["verification"]
        if check is None or not check["verified"]:
            lines.append(f"The {artifact['format']} artifact was not verified in what loads it.")
    return lines


def _change(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    lines, name = [], chosen["name"]
    if name != report["baseline"]:
        gains = [
            f"{_with(row['cost_ratio'], '×')} at concurrency {row['concurrency']}"
            for row in comparable(chosen)
            if row["cost_ratio"]
        ]
        if len(gains) > 1:
            lines.append(f"Another load: its cost gain is {figures.listed(gains)}.")
    if better := _better(report, chosen):
        bound, other, row = better
        lines.append(
            f"Another limit: if perplexity may grow by {figures.percent(bound, 1)}, "
            f"{other['name']} gains {_with(row['cost_ratio'], '×')} at concurrency "
            f"{row['concurrency']}."
        )
    if found := report["economics"].get(name):
        lines.append(found["sensitivity"]["sentence"])
    return lines


def _better(
    report: Mapping[str, Any], chosen: Mapping[str, Any]
) -> tuple[float, Mapping[str, Any], Mapping[str, Any]] | None:
    """What a looser limit of quality would gain most by: (its loss, the variant, the row)."""
    found = []
    for other in report["variants"]:
        bound = loss_bound(other)
        if (
            other["name"] in (chosen["name"], report["baseline"])
            or other["status"] != "ok"
            or bound is None
            or bound <= report["verdict"]["quality_limit"]
        ):
            continue
        for row in comparable(other):
            mine = (row_at(chosen, row["concurrency"]) or {}).get("cost_ratio") or {"value": 1.0}
            if certainly_cheaper(row) and row["cost_ratio"]["value"] > mine["value"]:
                found.append((bound, other, row))
    return max(found, key=lambda one: one[2]["cost_ratio"]["value"], default=None)


def _with(interval: Mapping[str, Any], unit: str = "") -> str:
    """A figure and its interval in brackets."""
    bounds = figures.between(interval)
    return f"{figures.measured(interval)}{unit}" + (f" ({bounds})" if bounds else "")
