"""Words and tables of quality: what a variant kept on each axis, by position, in generation, and
the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.report import figures
from compressor.report.table import Table

_SHARES = ("perplexity", "top1_agreement", "acc", "robustness", "safety", "languages", "flips")
_WORDS = {
    "perplexity": "growth of perplexity",
    "kl_mean": "mean KL divergence",
    "kl_p99": "KL divergence at the 99th percentile",
    "top1_agreement": "top-1 agreement",
    "acc": "drop of accuracy",
    "robustness": "drop of robustness",
    "safety": "drop of safety",
    "languages": "drop of accuracy by language",
    "flips": "share of flipped answers",
    "ece": "growth of the calibration error",
    "drift": "share of prompts continued as by the baseline",
}


def limit_words(limit: Mapping[str, Any]) -> str:
    """A limit, what was found, and whether it was kept."""
    name = _WORDS[limit["metric"]]
    asked = f"at {limit['kind']} {_amount(limit['metric'], limit['limit'])} allowed"
    if limit["kind"] == "least":
        asked = f"at least {_amount(limit['metric'], limit['limit'])} asked for"
    if limit["value"] is None:
        return f"{name}: not measured, {asked}"
    found = _amount(limit["metric"], limit["value"])
    words = f"{name} {found} on {limit['where']}"
    if limit["decided"] != limit["value"]:
        ends = "down to" if limit["kind"] == "least" else "up to"
        words += f" (95% interval {ends} {_amount(limit['metric'], limit['decided'])})"
    return f"{words}, {asked}"


def _amount(metric: str, value: float) -> str:
    return figures.percent(value) if metric in (*_SHARES, "drift") else figures.number(value)


def gate_lines(report: Mapping[str, Any]) -> list[str]:
    """One sentence for every variant that did not pass the gate."""
    lines = []
    for variant in report["variants"]:
        outcome = variant["gate"]
        if outcome is not None and not outcome["passed"]:
            failed = [limit_words(limit) for limit in outcome["limits"] if not limit["passed"]]
            lines.append(f"{variant['name']} failed the gate: {'; '.join(failed)}")
    return lines


def axis_name(row: Mapping[str, Any]) -> str:
    """The axis in words, with the text or task."""
    name = row["axis"].replace("language:", "language ")
    if row["axis"] == "divergence":
        return f"perplexity on {row['task']}"
    return name if row["overall"] else f"{name}: {row['task']}"


def loss_words(row: Mapping[str, Any]) -> str:
    """Size and interval of a loss or gain, with the unit of its axis."""
    loss, name = row["loss"], axis_name(row)
    change = -loss["value"] if _higher_is_better(row) else loss["value"]
    ends = [loss["low"], loss["high"]]
    if _higher_is_better(row):
        ends = [-end for end in reversed(ends)]
    return f"{name} {_change(row, change)} ({_change(row, ends[0])} to {_change(row, ends[1])})"


def finding_words(row: Mapping[str, Any]) -> str:
    """What the test of a row shows, and no more."""
    name, visible = axis_name(row), row["visible_loss"]
    seen = (
        "this test could not have seen any loss"
        if visible is None
        else f"this test could only have seen losses above {_size(row, visible)}"
    )
    if row["finding"] == "equal":
        return f"{name}: the very same on all {row['documents']:,}"
    if row["finding"] in ("loss", "gain"):
        p = row["p"] if row["finding"] == "loss" or row["p_holm"] is None else row["p_holm"]
        return f"{loss_words(row)}, a significant {row['finding']} (p {_p(p)})"
    if row["finding"] == "no-loss":
        return f"{name}: no significant loss (one of {_size(row, visible)} would have been seen)"
    return f"{name}: not shown, {seen}"


def summary_words(variant: Mapping[str, Any]) -> str:
    """What was found on the axes that are answered by tasks; empty where there were none."""
    rows = [r for r in variant["retained"] if r["overall"] and r["axis"] != "divergence"]
    return "; ".join(finding_words(row) for row in rows)


def _higher_is_better(row: Mapping[str, Any]) -> bool:
    return row["axis"] not in ("divergence", "calibration")


def _size(row: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "any size"
    if row["axis"] == "divergence":
        return figures.percent(value)
    return f"{figures.number(100 * value)} points"


def _change(row: Mapping[str, Any], value: float) -> str:
    if row["axis"] == "divergence":
        return figures.percent(value, signed=True)
    text = figures.number(100 * value)
    return f"{text if value <= 0 else '+' + text} points"


def _p(value: float | None) -> str:
    if value is None:
        return figures.MISSING
    return "< 0.001" if value < 0.001 else figures.number(value, 2)


def _value(row: Mapping[str, Any], value: float) -> str:
    if row["axis"] == "divergence":
        return figures.number(value, 4)
    return figures.number(value) if row["axis"] == "calibration" else figures.percent(value, 1)


_FINDINGS = {
    "equal": "equal",
    "loss": "loss",
    "gain": "gain",
    "no-loss": "no significant loss",
    "not-shown": "not shown",
}


def retained(report: Mapping[str, Any]) -> Table:
    """What every variant kept, axis by axis, with the tests."""
    rows = []
    for variant in report["variants"]:
        for row in variant["retained"]:
            flips, kept, loss = row["flips"], row["retained"], row["loss"]
            share = figures.percent(kept["value"], 1) if kept else figures.MISSING
            if kept and kept["low"] is not None:
                low, high = (figures.percent(kept[end], 1) for end in ("low", "high"))
                share = f"{share}\n{low} to {high}"
            rows.append(
                (
                    variant["name"],
                    axis_name(row),
                    figures.count(row["documents"]),
                    _value(row, row["baseline"]),
                    _value(row, row["value"]),
                    share,
                    f"{_loss(row, loss['value'])}\n"
                    f"{_loss(row, loss['low'])} to {_loss(row, loss['high'])}",
                    f"{flips['broken']} / {flips['mended']}\n{flips['changed']} changed"
                    if flips
                    else figures.MISSING,
                    f"{_p(row['p'])}\n{_p(row['p_holm'])}" if row["overall"] else _p(row["p"]),
                    _size(row, row["visible_loss"]) if row["p"] is not None else figures.MISSING,
                    _FINDINGS[row["finding"]],
                )
            )
    return Table(
        "Retained quality",
        (
            "Variant",
            "Axis",
            "Documents",
            "Baseline",
            "Variant's",
            "Retained",
            "Loss",
            "Broken / mended",
            "p, p by Holm",
            "Smallest visible loss",
            "Finding",
        ),
        tuple(rows),
        text_columns=2,
        note=_explained(report),
    )


def _explained(report: Mapping[str, Any]) -> str:
    tolerances = {row["tolerance"] for v in report["variants"] for row in v["retained"]}
    if not tolerances:
        return ""
    return (
        "Both models answered the same documents (of perplexity: windows). Loss: in points of "
        "accuracy or calibration error, of perplexity relative; negative is a gain. Second lines: "
        "95% paired bootstrap intervals over documents. Broken / mended: answers that turned wrong "
        "/ right; changed: another answer than the baseline's at all. p: McNemar's exact test "
        "where answers are right or wrong, else bootstrap; below it adjusted by Holm over the "
        "variant's axes. A loss is found by its own p below 5%, a gain by the adjusted one. "
        "Smallest visible loss: what the test finds in 80% of cases at 5%, as many answers "
        "differing as did; no significant loss is said where that is at most "
        f"{' or '.join(figures.percent(t) for t in sorted(tolerances))}. Calibration: expected "
        "calibration error over 15 bins of equal width. Axes count every document alike, whatever "
        "task it is of."
    )


def _loss(row: Mapping[str, Any], value: float) -> str:
    if row["axis"] == "divergence":
        return figures.percent(value)
    return figures.number(100 * value)


def positions(report: Mapping[str, Any]) -> Table:
    """Perplexity by position in the window."""
    rows = [
        (
            variant["name"],
            f"{text['text']}, windows of {figures.count(text['length'])}",
            f"{figures.count(part['first'])} to {figures.count(part['last'])}",
            figures.number(part["perplexity"], 4),
            "reference"
            if variant["name"] == report["baseline"]
            else f"{figures.change(part['perplexity_change'], part['perplexity_ci'])}\n"
            f"{figures.change_interval(part['perplexity_ci'])}",
            figures.number(part["kl_mean"]),
        )
        for variant in report["variants"]
        for text in variant["positions"]
        for part in text["bins"]
    ]
    return Table(
        "Perplexity by position",
        ("Variant", "Text", "Tokens before", "Perplexity", "Change", "KL mean [nats/token]"),
        tuple(rows),
        text_columns=2,
        note="Of predicted tokens with so many tokens of the window before them. A change that "
        "grows with the position is a loss of long context.",
    )


def drift(report: Mapping[str, Any]) -> Table:
    """How long greedy continuations stay the baseline's."""
    found = [
        (variant["name"], variant["drift"])
        for variant in report["variants"]
        if variant["drift"] and variant["name"] != report["baseline"]
    ]
    lengths = sorted({row["tokens"] for _, each in found for row in each["equal_after"]})
    rows = []
    for name, each in found:
        shares = {row["tokens"]: row["share"] for row in each["equal_after"]}
        rows.append(
            (
                name,
                str(each["prompts"]),
                f"{each['median_first_difference']:g} of {each['output_length']}",
                *(figures.percent(shares.get(length), 0) for length in lengths),
            )
        )
    return Table(
        "Generation drift",
        ("Variant", "Prompts", "Median first difference", *(f"Equal after {n}" for n in lengths)),
        tuple(rows),
        note="Greedy continuations of the same prompts by baseline and variant, in tokens: where "
        "the first one differs, and the share of prompts whose first so many tokens are the same. "
        "The median counts those that never differ with the whole length.",
    )


@dataclass(frozen=True)
class Example:
    """A prompt and both continuations as (what they share, the first word that differs, the rest);
    `place` is the first difference in tokens, None where there is none."""

    variant: str
    prompt: str
    baseline: tuple[str, str, str]
    own: tuple[str, str, str]
    place: int | None


def example_pairs(report: Mapping[str, Any]) -> list[Example]:
    """The continuations that a report keeps, taken apart at their first difference."""
    return [
        Example(
            variant["name"],
            " ".join(row["prompt"].split()),
            *_apart(" ".join(row["baseline"].split()), " ".join(row["variant"].split())),
            row["first_difference"],
        )
        for variant in report["variants"]
        if variant["drift"]
        for row in variant["drift"]["examples"]
    ]


def _apart(one: str, other: str) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """Both texts cut before and after the first word in which they differ."""
    pairs = enumerate(zip(one, other, strict=False))
    shared = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    if not len(one) == len(other) == shared:
        shared = one.rfind(" ", 0, shared) + 1

    def cut(text: str) -> tuple[str, str, str]:
        word, space, rest = text[shared:].partition(" ")
        return text[:shared], word, space + rest

    return cut(one), cut(other)


def examples(report: Mapping[str, Any]) -> Table:
    """Continuations side by side."""
    rows = [
        (
            one.variant,
            one.prompt,
            _marked(one.baseline),
            _marked(one.own),
            figures.MISSING if one.place is None else str(one.place),
        )
        for one in example_pairs(report)
    ]
    return Table(
        "Continuations side by side",
        ("Variant", "Prompt", "Baseline", "Variant's", "First difference"),
        tuple(rows),
        text_columns=4,
        note="The first prompts, not chosen by what became of them; all are in the run's directory "
        "`drift`. First difference: equal tokens before it; the first word that differs stands "
        "between »«.",
    )


def _marked(parts: tuple[str, str, str]) -> str:
    same, word, rest = parts
    return f"{same}»{word}«{rest}" if word else same


def gate(report: Mapping[str, Any]) -> Table:
    """Every limit of the gate for every variant."""
    rows = [
        (
            variant["name"],
            _WORDS[limit["metric"]],
            limit["where"] or figures.MISSING,
            f"at {limit['kind']} {_amount(limit['metric'], limit['limit'])}",
            figures.MISSING if limit["value"] is None else _amount(limit["metric"], limit["value"]),
            figures.MISSING
            if limit["decided"] is None
            else _amount(limit["metric"], limit["decided"]),
            "kept" if limit["passed"] else "not kept",
        )
        for variant in report["variants"]
        if variant["gate"]
        for limit in variant["gate"]["limits"]
    ]
    return Table(
        "Gate",
        ("Variant", "Metric", "Where it is worst", "Limit", "Figure", "Decided on", "Outcome"),
        tuple(rows),
        text_columns=3,
        note="Decided on the unfavourable end of the 95% interval, unless the recipe says point or "
        "there is no interval. What was not measured is not kept.",
    )


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All of them, in reading order."""
    return [
        gate(report),
        retained(report),
        positions(report),
        drift(report),
        examples(report),
    ]
