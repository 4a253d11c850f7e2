"""Tables of what the cost depends on: price plans, assumptions, use, energy, and when compressing
has paid for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report import figures
from compressor.report.table import Table


def _point(one: Mapping[str, Any]) -> str:
    return figures.load(one)


def _cost(interval: Mapping[str, Any]) -> str:
    bounds = figures.between(interval)
    return figures.measured(interval) + (f"\n{bounds}" if bounds else "")


def scenarios(report: Mapping[str, Any]) -> Table:
    """The cost of each variant under each plan that is known for the device."""
    found = report["economics"]
    plans = [row for row in next(iter(found.values()))["scenarios"]["rows"]] if found else []
    rows = tuple(
        (name, *(_cost(row["cost_usd_per_mtok_output"]) for row in one["scenarios"]["rows"]))
        for name, one in found.items()
    )
    note = ""
    if found:
        first = next(iter(found.values()))
        missing = first["scenarios"]["not_known"]
        sources = "; ".join(
            f"{row['plan']}: {row['price_kind']} price, {row['as_of'] or 'no date'}, "
            f"{row['source']}"
            for row in plans
        )
        note = f"At {_point(first)}. {sources}."
        if missing:
            note += f" Not known for this device: {', '.join(missing)}."
    return Table(
        f"Cost by price plan [{figures.currency(report)}/Mtok output]",
        ("Variant", *(row["plan"] for row in plans)),
        rows,
        note=note,
    )


def sensitivity(report: Mapping[str, Any]) -> Table:
    """Which assumption moves the cost most."""
    rows, sentences = [], []
    for name, one in report["economics"].items():
        found = one["sensitivity"]
        sentences.append(f"{name}: {found['sentence']}")
        for row in found["rows"]:
            low, high = row["settings"]
            rows.append(
                (
                    name,
                    f"{row['assumption']} [{row['unit']}]" if row["unit"] else row["assumption"],
                    figures.number(row["base"]),
                    f"{figures.number(low)} to {figures.number(high)}",
                    f"{figures.number(row['cost_low_usd_per_mtok'])} to "
                    f"{figures.number(row['cost_high_usd_per_mtok'])}",
                    figures.number(row["swing_usd_per_mtok"]),
                )
            )
    money = figures.currency(report)
    return Table(
        "Which assumption moves the cost most",
        ("Variant", "Assumption", "Base", "Moved", f"Cost [{money}/Mtok output]", "Swing"),
        tuple(rows),
        text_columns=2,
        note="One at a time; throughput by its own confidence interval. " + " ".join(sentences),
    )


def split(report: Mapping[str, Any]) -> Table:
    """What input and output tokens cost apart."""
    money, first = figures.currency(report), report["baseline"]
    baseline = {
        row["concurrency"]: row
        for variant in report["variants"]
        if variant["name"] == first
        for row in variant["split"]
    }
    rows = []
    for variant in report["variants"]:
        for row in variant["split"]:
            costs, gains = [], []
            for key in ("input_usd_per_mtok", "output_usd_per_mtok"):
                costs.append(_cost(row[key]))
                base = baseline.get(row["concurrency"])
                known = base and row[key]["value"] > 0
                gain = base[key]["value"] / row[key]["value"] if base and known else None
                gains.append(figures.MISSING if gain is None else f"{figures.number(gain)}×")
            rows.append(
                (
                    variant["name"],
                    str(row["concurrency"]),
                    costs[0],
                    gains[0],
                    costs[1],
                    gains[1],
                    f"{figures.number(row['mix_input_tokens'])} + "
                    f"{figures.number(row['mix_output_tokens'])}",
                    figures.number(row["blended_usd_per_mtok_output"]),
                    figures.percent(row["residual_share"], 1),
                )
            )
    return Table(
        "Input and output tokens apart",
        (
            "Variant",
            "Concurrency",
            f"Input [{money}/Mtok]",
            "Gain",
            f"Output [{money}/Mtok]",
            "Gain",
            "Mean request [tokens]",
            f"It costs [{money}/Mtok output]",
            "Not explained",
        ),
        tuple(rows),
        note="Seconds = a x input tokens + b x output tokens, solved by least squares over the "
        "load's requests, its prompts with one output token each, and short prompts with whole "
        "answers. Gain: baseline cost / variant cost. Not explained: what the two rates leave of "
        "the measured seconds; where it is large, the split is not to be trusted. Second lines are "
        "95% confidence intervals over rounds. All answered requests count, also outside of goals.",
    )


def utilisation(report: Mapping[str, Any]) -> Table:
    """The cost by share of paid hours in which the device serves."""
    found = report["economics"]
    shares = (
        [row["utilisation"] for row in next(iter(found.values()))["utilisation"]] if found else []
    )
    rows = tuple(
        (
            name,
            *(figures.measured(row["cost_usd_per_mtok_output"]) for row in one["utilisation"]),
        )
        for name, one in found.items()
    )
    return Table(
        f"Cost by use of the paid hours [{figures.currency(report)}/Mtok output]",
        ("Variant", *(figures.percent(share, 0) for share in shares)),
        rows,
        note="The share of paid hours in which the device serves this load.",
    )


def break_even(report: Mapping[str, Any]) -> Table:
    """When compressing a variant has paid for itself."""
    money = figures.currency(report)
    rows = []
    for variant in report["variants"]:
        one = variant.get("break_even")
        if one is None:
            continue
        tokens = one["tokens"]
        rows.append(
            (
                variant["name"],
                figures.number(one["run_cost_usd"]),
                figures.number(one["saving_usd_per_mtok"]),
                figures.MISSING if tokens is None else f"{figures.number(tokens / 1e6)} million",
                figures.number(one["days"]),
                one["reason"],
            )
        )
    return Table(
        "Break-even",
        (
            "Variant",
            f"Compressing [{money}]",
            f"Saving [{money}/Mtok output]",
            "Output tokens",
            "Days at the measured rate",
            "Why not",
        ),
        tuple(rows),
        note="Compressing: the measured seconds of the variant's own stages (quantize, export), at "
        "the hourly price of the machine that was measured.",
    )


def energy(report: Mapping[str, Any]) -> Table:
    """Energy and emissions of an output token."""
    rows = []
    for variant in report["variants"]:
        for row in variant["performance"]:
            if used := row.get("energy"):
                grams = used["gco2e_per_output_token"]
                rows.append(
                    (
                        variant["name"],
                        figures.load(row),
                        used["method"],
                        figures.number(used["mean_watts"]),
                        figures.number(used["joules_per_output_token"]),
                        figures.number(None if grams is None else grams * 1e6),
                        figures.percent((used["utilisation_percent"] or 0) / 100, 0),
                    )
                )
    return Table(
        "Energy",
        (
            "Variant",
            "Load",
            "Method",
            "Mean power [W]",
            "Energy [J/output token]",
            "Emissions [gCO2e/Mtok]",
            "Device in use",
        ),
        tuple(rows),
        text_columns=3,
        note="PUE included. declared: power stated in the recipe or the price table, not measured.",
    )


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All of them; those without rows are left out."""
    found = [
        split(report),
        scenarios(report),
        sensitivity(report),
        utilisation(report),
        break_even(report),
        energy(report),
    ]
    return [table for table in found if table.rows]
