"""Tables of speculative decoding: what was accepted, what it cost, and where it stops paying."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from compressor.report import figures
from compressor.report.table import Table

NAMES = {"medusa": "Medusa", "eagle3": "EAGLE-3", "draft": "draft model", "ngram": "n-gram"}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All of them; empty ones are left out by the caller."""
    return [acceptance(report), served(report), heads(report), times(report)]


def acceptance(report: Mapping[str, Any]) -> Table:
    """Tokens per step of every variant that speculates, by way to propose."""
    rows = []
    for variant, found in _speculating(report):
        method = NAMES.get(found["method"], found["method"])
        if draft := found.get("draft"):
            source = f"given ({draft['source']})" if draft["source"] else None
            scheme = f"{draft['algorithm']} {draft['scheme']}" if draft["scheme"] else None
            method = ", ".join(part for part in (method, source, scheme) if part)
        if found["trained_on_baseline"]:
            method += ", trained on the baseline"
        for way, result in found["results"].items():
            nodes = f", {len(found['tree'])} nodes" if way == "tree" and found["tree"] else ""
            rows.append(
                (
                    variant,
                    method,
                    f"{way} of {found['depth']}{nodes}",
                    _interval(result["tokens_per_step"], result["error"]),
                    " / ".join(f"{share:.0%}" for share in result["accepted_by_position"]),
                    _equal(result),
                )
            )
    return Table(
        "Speculative decoding",
        ("Variant", "Method", "Candidates", "Tokens per step", "Accepted by place", "Same output"),
        tuple(rows),
        text_columns=3,
        note="Tokens per pass of the target, its own included, with a 95% interval over prompts: "
        "greedy, by our own decoder in float32, on prompts that nothing was trained on. Accepted "
        "by place: share of the drafts of which at least 1, 2, ... tokens stood. Same output: "
        "answers that are the target's own token by token; where others part from it, its best two "
        "logits were as close as given, which the order of sums decides.",
    )


def served(report: Mapping[str, Any]) -> Table:
    """What the engine counted, beside what our own decoder found for a chain."""
    rows = []
    for variant, found in _speculating(report):
        own = found["results"].get("chain")
        expected = 1 + math.fsum(own["accepted_by_position"]) if own else None
        for row in found["served"]:
            load = row["rate_per_s"]
            rows.append(
                (
                    variant,
                    f"{row['concurrency']} at once" if load is None else f"{load:g} per second",
                    str(row["drafts"]),
                    f"{row['tokens_per_draft']:.2f}",
                    "–" if expected is None else f"{expected:.2f}",
                    "–"
                    if expected is None
                    else figures.percent(row["tokens_per_draft"] / expected - 1, 1),
                    " / ".join(f"{share:.0%}" for share in row["accepted_by_position"]),
                )
            )
    return Table(
        "Drafts in the engine",
        (
            "Variant", "Load", "Drafts", "Tokens per draft", "Our decoder", "Difference",
            "Accepted by place",
        ),
        tuple(rows),
        text_columns=2,
        note="Counted by the measured engine, a chain of guesses: tokens per draft that it made, "
        "the target's own included, beside those of our decoder, which runs in float32 and on "
        "prompts of its own choice.",
    )  # fmt: skip


def heads(report: Mapping[str, Any]) -> Table:
    """Accuracy of each head or step on the answers held out."""
    rows = []
    for variant, found in _speculating(report):
        if not found["evaluations"]:
            continue
        best = max(found["evaluations"], key=lambda row: row["score"])
        top = best["top"] if isinstance(best["top"][0], list) else [best["top"]]
        for number, shares in enumerate(top, 1):
            rows.append(
                (
                    variant,
                    NAMES.get(found["method"], found["method"]),
                    str(number),
                    *(figures.percent(shares[k - 1], 1) for k in (1, 3, 5) if k <= len(shares)),
                )
            )
    return Table(
        "Accuracy of the guesses",
        ("Variant", "Method", "Token ahead", "Top 1", "Top 3", "Top 5"),
        tuple(rows),
        text_columns=2,
        note="Share of positions at which the likeliest guess, or one of the three or five "
        "likeliest, was what the target said, on answers held out from training. Medusa's first "
        "head guesses the second token after the state that it reads; a draft's guess follows "
        "right tokens.",
    )


def times(report: Mapping[str, Any]) -> Table:
    """Gain of the best number of guessed tokens, by sequences at once."""
    rows = []
    for variant, found in _speculating(report):
        for size in sorted({row["batch_size"] for row in found["times"]}):
            of_size = [row for row in found["times"] if row["batch_size"] == size]
            plain = next((_rate(row) for row in of_size if row["proposer"] is None), math.nan)
            for way in dict.fromkeys(row["proposer"] for row in of_size if row["proposer"]):
                best = max((r for r in of_size if r["proposer"] == way), key=_rate)
                rows.append(
                    (
                        variant,
                        way,
                        str(size),
                        str(best["depth"]),
                        f"{plain:.0f}",
                        f"{_rate(best):.0f}",
                        f"{_rate(best) / plain:.2f}x",
                    )
                )
    return Table(
        "Where speculation pays",
        (
            "Variant", "Candidates", "Sequences at once", "Best depth", "Without [tok/s]",
            "With [tok/s]", "Gain",
        ),
        tuple(rows),
        text_columns=2,
        note="Output tokens per second of our own decoder in float32, each number of guessed "
        "tokens timed once, prefill included: it shows where the gain ends, and is no serving "
        "figure.",
    )  # fmt: skip


def _speculating(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for variant in report["variants"]:
        if variant["speculation"]:
            yield variant["name"], variant["speculation"]


def _interval(mean: float, error: float | None) -> str:
    if error is None or not math.isfinite(error):
        return f"{mean:.2f}"
    return f"{mean:.2f} [{mean - 1.96 * error:.2f}, {mean + 1.96 * error:.2f}]"


def _equal(result: Mapping[str, Any]) -> str:
    text = f"{result['equal']} of {result['sequences']}"
    return f"{text} (margins up to {max(result['ties']):.1e})" if result["ties"] else text


def _rate(row: Mapping[str, Any]) -> float:
    return row["tokens"] / row["seconds"]
