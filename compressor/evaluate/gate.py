"""The gate: whether a variant kept every limit that the recipe sets.

It is decided on the unfavourable end of the 95% interval unless the recipe says ``point``: a limit
that too few documents were asked to show is not kept, since nobody knows. Where a figure has no
interval, it is decided on the figure itself. A limit whose figure was not measured is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_LEAST = ("top1_agreement", "drift")  # limits from below; all others are from above
_AXES = {"acc": "accuracy", "robustness": "robustness", "safety": "safety", "ece": "calibration"}


@dataclass(frozen=True)
class _Figure:
    """A measured figure; ``where``: the text or axis it is of."""

    where: str
    value: float
    low: float | None = None
    high: float | None = None


def judge(
    limits: Mapping[str, float], decide_on: str, variant: Mapping[str, Any]
) -> dict[str, Any]:
    """The gate's outcome for one variant.

    Args:
        limits: by metric, see `options.GateMetrics`.
        decide_on: ``bound`` or ``point``.
        variant: with ``quality`` (rows by text), ``retained`` (rows by axis) and ``drift``.

    Returns:
        ``passed``, ``decide_on`` and by limit: metric, the limit, whether it is the ``most`` or the
        ``least``, where the figure is worst, its value, what was decided on, and ``passed``.
    """
    rows = [asdict(_decide(metric, limit, decide_on, variant)) for metric, limit in limits.items()]
    return {
        "passed": all(row["passed"] for row in rows),
        "decide_on": decide_on,
        "limits": rows,
    }


@dataclass(frozen=True)
class _Limit:
    metric: str
    limit: float
    kind: str
    where: str | None
    value: float | None
    decided: float | None
    passed: bool


def _decide(metric: str, limit: float, decide_on: str, variant: Mapping[str, Any]) -> _Limit:
    least = metric in _LEAST
    kind = "least" if least else "most"

    def decided(figure: _Figure) -> float:
        bound = figure.low if least else figure.high
        return figure.value if bound is None or decide_on == "point" else bound

    found = list(_figures(metric, variant))
    if not found:
        return _Limit(metric, limit, kind, None, None, None, False)
    worst = (min if least else max)(found, key=decided)
    figure = decided(worst)
    passed = figure >= limit if least else figure <= limit
    return _Limit(metric, limit, kind, worst.where, worst.value, figure, passed)


def _figures(metric: str, variant: Mapping[str, Any]) -> Iterator[_Figure]:
    """Every figure that a limit is about."""
    bounds = {"perplexity": "perplexity_ci", "kl_mean": "kl_ci", "top1_agreement": "top1_ci"}
    if metric in ("perplexity", "kl_mean", "kl_p99", "top1_agreement"):
        key = "perplexity_change" if metric == "perplexity" else metric
        for row in variant["quality"]:
            ends = row.get(bounds[metric]) if metric in bounds else None
            yield _Figure(row["text"], row[key], *(ends or (None, None)))
        return
    if metric == "drift":
        if found := variant.get("drift"):
            yield _Figure("continuations", found["equal"] / found["prompts"])
        return
    for row in variant["retained"]:
        if not row["overall"]:
            continue
        if metric == "flips" and row["axis"] == "accuracy" and row["flips"]:
            yield _Figure(row["axis"], **row["flips"]["share"])
        elif row["axis"] == _AXES.get(metric) or (
            metric == "languages" and row["axis"].startswith("language:")
        ):
            yield _Figure(row["axis"], **row["loss"])
