"""The finding in words. Each claim follows from the figures, and their intervals bound it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.report import figures
from compressor.report.quality import summary_words

QUALITY_LIMIT = 0.01


def headline_concurrency(report: Mapping[str, Any]) -> int | None:
    """The point at which the baseline is cheapest: the choice favours no candidate."""
    for variant in report["variants"]:
        if variant["name"] == report["baseline"]:
            rows = [row for row in comparable(variant) if row["cost_usd_per_mtok_output"]]
            if rows:
                best = min(rows, key=lambda row: row["cost_usd_per_mtok_output"]["value"])
                return best["concurrency"]
    return None


def comparable(variant: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that verdict and plot rest on: closed loops, or else the first open one."""
    rows = variant["performance"]
    return [row for row in rows if row.get("rate_per_s") is None] or list(rows[:1])


def row_at(variant: Mapping[str, Any], concurrency: int | None) -> dict[str, Any] | None:
    """The performance row at a concurrency, or None."""
    rows = [row for row in comparable(variant) if row["concurrency"] == concurrency]
    return rows[0] if rows else None


def worst_quality(variant: Mapping[str, Any]) -> dict[str, Any] | None:
    """The text on which the variant's perplexity grew most, or None."""
    rows = [row for row in variant["quality"] if row["perplexity_change"] is not None]
    return max(rows, key=lambda row: row["perplexity_change"]) if rows else None


def loss_bound(variant: Mapping[str, Any]) -> float | None:
    """Upper bound of the perplexity growth over all texts (interval's end where there is one)."""
    bounds = [
        row["perplexity_ci"][1] if row["perplexity_ci"] else row["perplexity_change"]
        for row in variant["quality"]
        if row["perplexity_change"] is not None
    ]
    return max(bounds) if bounds else None


def _surely_lost(variant: Mapping[str, Any]) -> float:
    """Perplexity growth that one of the texts shows for certain (interval's lower end)."""
    ends = [row["perplexity_ci"][0] for row in variant["quality"] if row["perplexity_ci"]]
    return max(ends, default=-math.inf)


def keeps_quality(variant: Mapping[str, Any], limit: float) -> bool:
    """Whether perplexity surely stays within a limit, no axis has a significant loss beyond it, and
    the gate, where there is one, was passed."""
    bound = loss_bound(variant)
    lost = any(
        row["finding"] == "loss" and row["overall"] and row["loss"]["value"] > limit
        for row in variant["retained"]
        if row["axis"] != "divergence"
    )
    passed = variant["gate"] is None or variant["gate"]["passed"]
    return bound is not None and bound <= limit and not lost and passed


def certainly_cheaper(row: Mapping[str, Any] | None) -> bool:
    """Whether the whole interval of the cost ratio lies above 1."""
    ratio = row["cost_ratio"] if row else None
    return ratio is not None and ratio["low"] is not None and ratio["low"] > 1


def cost_words(row: Mapping[str, Any] | None) -> str:
    """What the measurement shows about cost, no more than its interval allows."""
    ratio = row["cost_ratio"] if row else None
    if row is None or not ratio:
        return "its cost was not measured"
    where = f"at {figures.load(row)}"
    if ratio["low"] is None or ratio["high"] is None:
        return (
            f"the cost ratio {where} is {figures.ratio(ratio)} without a confidence interval, so "
            "no difference in cost is claimed"
        )
    change = figures.percent(abs(1 - 1 / ratio["value"]), 0)
    figure = f"cost ratio {figures.ratio(ratio)}, 95% interval {figures.between(ratio)}"
    if ratio["low"] > 1:
        return f"an output token costs {change} less than the baseline's {where} ({figure})"
    if ratio["high"] < 1:
        return f"an output token costs {change} more than the baseline's {where} ({figure})"
    return f"no difference in cost is shown {where} ({figure}, which includes 1)"


def quality_words(variant: Mapping[str, Any]) -> str:
    """The perplexity change on the worst text."""
    row = worst_quality(variant)
    if row is None:
        return "quality was not measured"
    change = figures.change(row["perplexity_change"], row["perplexity_ci"])
    interval = figures.change_interval(row["perplexity_ci"])
    words = f"perplexity {change} on {row['text']}"
    words = f"{words} (95% interval {interval})" if interval else words
    axes = summary_words(variant)
    return f"{words}; {axes}" if axes else words


def _sentence_of(variant: Mapping[str, Any], concurrency: int | None) -> str:
    if variant["status"] != "ok":
        return f"{variant['name']}: failed ({variant['error'] or 'no reason given'})."
    parts = [cost_words(row_at(variant, concurrency)), quality_words(variant)]
    parts += [
        f"cost ratio {figures.ratio(row['cost_ratio'])} at {figures.load(row)}"
        for row in variant["performance"]
        if row != row_at(variant, concurrency) and row["cost_ratio"]
    ]
    return f"{variant['name']}: {'; '.join(parts)}."


def _claim(variant: Mapping[str, Any], concurrency: int | None) -> str:
    row = row_at(variant, concurrency)
    return f"With {variant['name']} {cost_words(row)}; {quality_words(variant)}"


def make_verdict(report: Mapping[str, Any], limit: float = QUALITY_LIMIT) -> dict[str, Any]:
    """The verdict of a report that has `baseline` and `variants`.

    The best variant is the one with the largest certain gain (lower end of the cost ratio's
    interval) at the headline concurrency among those whose perplexity grows by at most `limit` on
    every text, the interval's upper end counted where there is one, which have no significant loss
    beyond it on another axis and passed the gate. Where none of the cheaper variants stays within
    it, the sentence is about the one that loses least.

    Where a search chose among the variants, its choice is the best one, and its limit counts.
    """
    search = report["optimise"]
    if search:
        limit = search["limits"].get("perplexity", limit)
    candidates = [v for v in report["variants"] if v["name"] != report["baseline"]]
    concurrency = headline_concurrency(report)
    alive = [variant for variant in candidates if variant["status"] == "ok"]
    chosen = next((v for v in alive if search and v["name"] == search["chosen"]), None)
    verdict: dict[str, Any] = {
        "details": [_sentence_of(variant, concurrency) for variant in candidates],
        "best_variant": None,
        "concurrency": concurrency,
        "quality_limit": limit,
    }
    cheaper = [v for v in alive if certainly_cheaper(row_at(v, concurrency))]
    good = [v for v in alive if keeps_quality(v, limit)]
    both = [variant for variant in cheaper if variant in good]
    percent = f"{100 * limit:g}%"

    def gain(variant: Mapping[str, Any]) -> float:
        row = row_at(variant, concurrency)
        return row["cost_ratio"]["low"] if row else 0.0

    def loss(variant: Mapping[str, Any]) -> float:
        bound = loss_bound(variant)
        return math.inf if bound is None else bound

    if not candidates:
        outcome, sentence = (
            "unmeasured",
            "Only the baseline was run; there is nothing to compare.",
        )
    elif not alive:
        outcome, sentence = "failed", "No variant succeeded; the baseline stands alone."
    elif search and search["chosen"] is None:
        outcome = "unmeasured" if concurrency is None else "no-gain"
        sentence = search["sentence"]
    elif chosen:
        verdict["best_variant"] = chosen["name"]
        outcome = "unmeasured" if concurrency is None else "gain"
        sentence = f"{_claim(chosen, concurrency)}: what the search chose within its limits."
    elif both:
        best = max(both, key=gain)
        verdict["best_variant"] = best["name"]
        outcome = "gain"
        sentence = f"{_claim(best, concurrency)}, within the limit of {percent}."
    elif concurrency is None:
        outcome, sentence = "unmeasured", _quality_only(good, alive, percent)
    elif cheaper:
        best = min(cheaper, key=lambda v: (loss(v), -gain(v)))
        outcome = "trade-off"
        if loss_bound(best) is None:
            reason = "quality was not measured, against"
        elif _surely_lost(best) > limit:
            reason = "the loss is certainly above"
        else:
            reason = "the loss is not certain to stay within"
        sentence = f"{_claim(best, concurrency)}; {reason} the limit of {percent}."
    else:
        outcome = "no-gain"
        sentence = (
            f"No variant is shown to make output tokens cheaper than the baseline at concurrency "
            f"{concurrency}."
        )
        if good:
            sentence += f" Perplexity stays within {percent} for {_names(good)}."
    return verdict | {"outcome": outcome, "sentence": sentence}


def _names(variants: Sequence[Mapping[str, Any]]) -> str:
    return figures.listed([variant["name"] for variant in variants])


def _quality_only(
    good: Sequence[Mapping[str, Any]], alive: Sequence[Mapping[str, Any]], percent: str
) -> str:
    if good:
        return f"Cost was not measured. Perplexity stays within {percent} for {_names(good)}."
    if any(worst_quality(variant) for variant in alive):
        return f"Cost was not measured. No variant's perplexity surely stays within {percent}."
    return "Neither cost nor quality was measured."
