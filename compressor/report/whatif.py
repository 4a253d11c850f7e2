"""What the page needs to compute costs again under other prices, goals and lengths.

The formula is `measure.ledger`'s. Costs of other lengths per request rest on the seconds of an
input and of an output token: as solved where `split` was measured, else estimated from the rates of
prefill and decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.measure.metrics import student_quantile
from compressor.report import figures
from compressor.report.verdict import keeps_quality

FORMULA = (
    "cost [{money}/Mtok output] = "
    "(price + host + W × PUE / 1000 × {money}/kWh + storage + network) [{money}/h] "
    "/ (goodput [tok/s] × 3600 / 1e6) / utilisation × mix"
)
_MEASURED = ("nvml", "rapl")
_MOST_ROUNDS = 40


def data(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Inputs' values as they were, and by variant and point what costs follow from; None where no
    cost follows from an hourly price.

    Units are in the names, as in `model.Performance`. ``quantiles``: Student's t at 97.5% by
    degrees of freedom less 1. ``seconds``: of an input and an output token, each times any factor.
    """
    prices, rows = report["prices"], []
    points: list[str] = []
    for variant in report["variants"]:
        for row in variant["performance"]:
            if not row["components_usd_per_hour"] or not row["cost_usd_per_mtok_output"]:
                continue
            if (label := figures.load(row)) not in points:
                points.append(label)
            rows.append(_row(report, variant, row) | {"point": points.index(label)})
    if not rows or not prices:
        return None
    head = next(
        (row for row in rows if row["concurrency"] == report["verdict"]["concurrency"]), rows[0]
    )
    goal = (report["workload"] or {}).get("goal") or {}
    paid = not prices["energy_included"]
    return {
        "currency": figures.currency(report),
        "baseline": report["baseline"],
        "limit": report["verdict"]["quality_limit"],
        "points": points,
        "rows": rows,
        "quantiles": [student_quantile(0.975, degrees) for degrees in range(1, _MOST_ROUNDS)],
        "defaults": {
            "point": head["point"],
            "price": prices["accelerator_usd_per_hour"],
            "utilisation": prices["utilisation"] * 100,
            "pue": prices["pue"],
            "watts": prices["watts"] or 0.0,
            "electricity": (prices["electricity_usd_per_kwh"] or 0.0) if paid else 0.0,
            "ttft": goal.get("ttft_ms"),
            "tpot": goal.get("tpot_ms"),
            "input": round(head["mix"][0]),
            "output": round(head["mix"][1]),
        },
    }


def _row(
    report: Mapping[str, Any], variant: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, Any]:
    lines, energy = row["components_usd_per_hour"], row["energy"]
    good = row["goodput_tok_s"] or row["throughput_tok_s"]
    apart = next((s for s in variant["split"] if s["concurrency"] == row["concurrency"]), None)
    seconds = None
    if apart:
        seconds = [apart["seconds_per_input_token"], apart["seconds_per_output_token"]]
    elif row["prefill_tok_s"] and row["decode_tok_s"]:
        seconds = [1 / row["prefill_tok_s"], 1 / row["decode_tok_s"]]
    answered = max(1, round(row["requests"] * (1 - (row["error_rate"] or 0.0))))
    return {
        "variant": variant["name"],
        "keeps": variant["name"] == report["baseline"]
        or keeps_quality(variant, report["verdict"]["quality_limit"]),
        "concurrency": row["concurrency"],
        "host": lines.get("host", 0.0),
        "storage": lines.get("storage", 0.0),
        "network_per_mtok": lines.get("network", 0.0) / (good["value"] * 3600 / 1e6),
        "watts": energy["mean_watts"] if energy and energy["method"] in _MEASURED else None,
        "goodput": good,
        "met": row["goal_met_share"],
        "ratio": row["cost_ratio"],
        "seconds": seconds,
        "split": apart is not None,
        "mix": [(row[key] or 0) / answered for key in ("prompt_tokens", "output_tokens")],
        "window": row["window_seconds"],
        "samples": row["samples"],
    }
