"""The table of variants: one row each, with every figure that a decision needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report import figures
from compressor.report.quality import axis_name
from compressor.report.table import Table
from compressor.report.tables import method, served
from compressor.report.verdict import row_at, worst_quality

_APART = ("input_usd_per_mtok", "output_usd_per_mtok")


def table(report: Mapping[str, Any]) -> Table:
    """Size, quality per axis, speed, cost and energy of every variant at the headline load.

    Columns without a figure in any row are left out.
    """
    point, money = report["verdict"]["concurrency"], figures.currency(report)
    axes = list(
        dict.fromkeys(
            row["axis"]
            for variant in report["variants"]
            for row in variant["retained"]
            if row["overall"] and row["axis"] != "divergence"
        )
    )
    headers = [
        "Variant",
        "Method",
        "Size on disk",
        "Perplexity change",
        *(f"Retained {axis.replace('language:', 'language ')}" for axis in axes),
        "Output [tok/s]",
        "TTFT [ms]",
        "TPOT [ms]",
        f"Input alone [{money}/Mtok]",
        f"Output alone [{money}/Mtok]",
        f"Cost [{money}/Mtok output]",
        "Cost gain",
        "Energy [J/output token]",
    ]
    rows = [_row(report, variant, point, axes) for variant in report["variants"]]
    kept = [
        index
        for index in range(len(headers))
        if index < 4 or any(row[index] != figures.MISSING for row in rows)
    ]
    best = report["verdict"]["best_variant"]
    marked = next((i for i, v in enumerate(report["variants"]) if v["name"] == best), None)
    return Table(
        "Variants",
        tuple(headers[index] for index in kept),
        tuple(tuple(row[index] for index in kept) for row in rows),
        text_columns=2,
        note=_note(report, point, axes),
        marked=marked,
    )


def _row(
    report: Mapping[str, Any], variant: Mapping[str, Any], point: int | None, axes: list[str]
) -> tuple[str, ...]:
    name, is_baseline = variant["name"], variant["name"] == report["baseline"]
    if variant["status"] != "ok":
        return (name, f"{method(variant)} (failed)", *(figures.MISSING,) * (10 + len(axes)))
    size, text = variant["size_bytes"], worst_quality(variant)
    base = next((v["size_bytes"] for v in report["variants"] if v["name"] == report["baseline"]), 0)
    perplexity = figures.MISSING
    if text is not None:
        bounds = figures.change_interval(text["perplexity_ci"])
        change = figures.change(text["perplexity_change"], text["perplexity_ci"])
        perplexity = "reference" if is_baseline else _stacked(change, bounds)
    measured = row_at(variant, point) or {}
    speed, cost = measured.get("throughput_tok_s"), measured.get("cost_usd_per_mtok_output")
    gain, energy = measured.get("cost_ratio"), measured.get("energy")
    apart: Mapping[str, Any] = next(
        (row for row in variant["split"] if row["concurrency"] == point), {}
    )
    return (
        name,
        _stacked(method(variant), served(report, variant)),
        _stacked(
            figures.size(size),
            f"{figures.percent(size / base, 0)} of baseline"
            if size and base and not is_baseline
            else "",
        ),
        perplexity,
        *(_retained(variant, axis, is_baseline) for axis in axes),
        _interval(speed),
        _latency(measured.get("ttft_ms")),
        _latency(measured.get("tpot_ms")),
        *(_interval(apart.get(key)) for key in _APART),
        _interval(cost),
        "1×"
        if is_baseline and gain
        else _stacked(figures.ratio(gain), figures.between(gain) if gain else ""),
        figures.number(energy["joules_per_output_token"]) if energy else figures.MISSING,
    )


def _stacked(first: str, second: str) -> str:
    return f"{first}\n{second}" if second else first


def _interval(interval: Mapping[str, Any] | None) -> str:
    return _stacked(figures.measured(interval), figures.between(interval))


def _latency(values: Mapping[str, Any] | None) -> str:
    if not values or values["p50"] is None:
        return figures.MISSING
    return f"{figures.number(values['p50'])}\np99 {figures.number(values['p99'])}"


def _retained(variant: Mapping[str, Any], axis: str, is_baseline: bool) -> str:
    row = next((r for r in variant["retained"] if r["overall"] and r["axis"] == axis), None)
    if row is None:
        return "reference" if is_baseline else figures.MISSING
    kept = row["retained"]
    if kept is None:
        return figures.MISSING
    text = figures.percent(kept["value"], 1)
    if kept["low"] is None:
        return text
    return f"{text}\n{figures.percent(kept['low'], 1)} to {figures.percent(kept['high'], 1)}"


def _note(report: Mapping[str, Any], point: int | None, axes: list[str]) -> str:
    words = "Perplexity change: on the text where it is worst."
    if axes:
        names = sorted({axis_name({"axis": axis, "overall": True, "task": None}) for axis in axes})
        words += f" Retained {figures.listed(names)}: the variant's figure / the baseline's."
    if point is not None:
        words += (
            f" Speed and cost at concurrency {point}, where the baseline is cheapest; every "
            "measured point is in the table of speed and cost. TTFT: time to first token, TPOT: "
            "time per output token after it, medians over requests and 99th percentiles. Cost: "
            "prefill included; cost gain: baseline cost / variant cost, above 1× is cheaper."
        )
    return f"{words} Second lines are 95% confidence intervals, with the digits that they support."
