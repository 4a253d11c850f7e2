"""What each serving technique gained, beside what the field claims for it, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report import figures
from compressor.report.table import Table


def table(report: Mapping[str, Any]) -> Table:
    """Every step of the waterfall at every point of the load; no rows without a waterfall."""
    rows, notes = [], []
    claims: dict[str, Mapping[str, Any]] = {}
    for point in report["techniques"]:
        for number, step in enumerate(point["steps"]):
            claim = step["claim"]
            if claim:
                claims[claim["technique"]] = claim
            rate = step["throughput_tok_s"]
            rows.append(
                (
                    f"{step['name']}\n{step['technique'] or 'starting point'}",
                    figures.load(point),
                    f"over {claim['over']}\n{claim['source']}" if claim else figures.MISSING,
                    _stacked(figures.measured(rate), rate),
                    _stacked(figures.ratio(step["step_gain"]), step["step_gain"])
                    if number
                    else figures.MISSING,
                    f"{claim['low']:g}× to {claim['high']:g}×" if claim else figures.MISSING,
                    _position(step),
                    _stacked(figures.ratio(step["total_gain"]), step["total_gain"])
                    if number
                    else "1×",
                )
            )
        if point["left_out"]:
            notes.append(
                f" At {figures.load(point)} the waterfall ends before "
                f"{point['left_out'][0]}, which has no figures there; left out: "
                f"{', '.join(point['left_out'])}."
            )
    reported = [
        f" {claim['technique']}, what the work itself reports: {claim['reported']}."
        for claim in claims.values()
    ]
    return Table(
        "Gain of each technique",
        (
            "Step and technique",
            "Load",
            "Claimed over, by",
            "Output [tok/s]",
            "Gain over the step before",
            "Claimed",
            "Beside the claim",
            "Gain over the first",
        ),
        tuple(rows),
        text_columns=3,
        note="Gain: output tokens per second / those of the step before, on the same prompts, "
        "paired by round. Second lines are 95% confidence intervals. A gain is surely below, "
        "inside or above the claim where its whole interval is. Claims were found on other models "
        "and devices: a gain outside of one is no error." + "".join(reported + notes),
    )


def _stacked(text: str, interval: Mapping[str, Any]) -> str:
    between = figures.between(interval)
    return f"{text}\n{between}" if between else text


def _position(step: Mapping[str, Any]) -> str:
    if step["position"] is None:
        return figures.MISSING
    return f"{step['position']}\n{'surely' if step['certain'] else 'not surely'}"
