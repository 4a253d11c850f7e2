"""What the report says of a search: the choice, the frontier, and why the others lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report.figures import count, number, percent, size
from compressor.report.table import Table

_SHOWN = 40  # trials; all of them are in optimise.json and report.json
_REACHED = {
    "failed": "not tried to the end",
    "proxies": "proxies",
    "few": "few tokens",
    "full": "all tokens",
    "measured": "measured",
}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Of the search; none where there was none."""
    found = report["optimise"]
    if not found:
        return []
    return [_finalists(found), _trials(found), _proxies(found)]


def _objective(found: Mapping[str, Any], value: float | None) -> str:
    return size(value) if found["minimise"] == "size" and value is not None else number(value)


def _loss(value: float | None) -> str:
    return percent(value, 2, signed=True)


def limits(found: Mapping[str, Any]) -> str:
    """What a search had to keep to, such as ``perplexity 0.01``."""
    return ", ".join(f"{name} {limit:g}" for name, limit in found["limits"].items())


def _finalists(found: Mapping[str, Any]) -> Table:
    names = [one["name"] for one in found["finalists"]]
    at = "" if found["concurrency"] is None else f" at concurrency {found['concurrency']}"
    return Table(
        "Search: the finalists",
        (
            "Variant",
            "Keeps the limits",
            "Perplexity change in the search",
            "held out",
            f"{found['minimise'].capitalize()} [{found['unit']}] in the search",
            "in the end",
        ),
        tuple(
            (
                one["name"],
                "yes" if one["passed"] else "no",
                _loss(one["search_loss"]),
                _loss(one["loss"]),
                _objective(found, one["search_objective"]),
                _objective(found, one["objective"]),
            )
            for one in found["finalists"]
        ),
        text_columns=2,
        note=f"{found['sentence']} Minimised: {found['minimise']}{at}, within {limits(found)} "
        f"(decided on the {found['decide_on']}). Baseline: "
        f"{_objective(found, found['baseline_objective'])}. Finalists were evaluated anew on texts "
        "that the search had not seen, and measured together on other prompts.",
        marked=names.index(found["chosen"]) if found["chosen"] in names else None,
    )


def _trials(found: Mapping[str, Any]) -> Table:
    front = set(found["frontier"])
    rows = []
    for trial in found["trials"][:_SHOWN]:
        choice = ", ".join(value for value in trial["choice"].values() if value != "none")
        measured = trial["objective"] is not None
        shown = _objective(found, trial["objective"] if measured else trial["estimated"])
        rows.append(
            (
                trial["name"] + (" *" if trial["name"] in front else ""),
                choice or "of the recipe",
                trial["origin"],
                _REACHED[trial["reached"]],
                trial["why"] or "–",
                _loss(trial["predicted_loss"]),
                _loss(trial["few_loss"]),
                _loss(trial["loss"]),
                shown if measured else f"~{shown}",
            )
        )
    lost = "; ".join(f"{why}: {count(n)}" for why, n in found["excluded"].items()) or "none"
    return Table(
        "Search: the trials",
        (
            "Candidate",
            "What it is",
            "Proposed by",
            "Came as far as",
            "Lost by",
            "Perplexity change predicted",
            "on few tokens",
            "on all",
            f"{found['minimise'].capitalize()} [{found['unit']}]",
        ),
        tuple(rows),
        text_columns=5,
        note=f"{count(len(found['trials']))} of {count(found['candidates'])} candidates tried in "
        f"{found['seconds'] / 60:.1f} minutes of stages; stopped: {found['stopped']}. Left out by "
        f"the proxies: {lost}; not tried for lack of time: {count(found['untried'])}. * on the "
        "frontier: no candidate is better in both. ~ is an estimate.",
    )


def _proxies(found: Mapping[str, Any]) -> Table:
    errors = found["errors"]
    return Table(
        "Search: proxies against the full figures",
        ("Proxy", "Median error", "Rank correlation"),
        (
            (
                f"Roofline's {found['minimise']}, against the measured one",
                percent(errors["objective"], 0),
                number(errors["rank_objective"]),
            ),
            (
                "Loss predicted from the layers' sensitivities",
                "–",
                number(errors["rank_predicted"]),
            ),
            (
                "Perplexity change on few tokens (difference)",
                _loss(errors["few"]),
                number(errors["rank_few"]),
            ),
            (
                "Perplexity change in the search against held-out texts (difference)",
                _loss(errors["held_out"]),
                "–",
            ),
        ),
    )
