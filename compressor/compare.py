"""Regressions between two runs, variant by variant: quality, cost, size and the gate.

Where both runs scored the same documents or windows, losses are paired over them, with a bootstrap
interval. Costs were measured at different times: their ratio has an interval from both runs' own
intervals, on the logarithmic scale and independent of each other.

A figure is a regression where it is worse by more than its tolerance and its interval, if it has
one, excludes that nothing became worse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from compressor import record
from compressor.errors import RecipeError, RunError
from compressor.quality import task_results
from compressor.report import figures
from compressor.report.read import read_report
from compressor.store import write_atomic

QUALITY, COST, SIZE, GATE = "quality", "cost", "size", "gate"


@dataclass(frozen=True)
class Comparison:
    """One figure in both runs.

    Attributes:
        variant: whose.
        kind: quality, cost, size or gate; ``variant`` where it is not in both runs.
        name: what is compared, such as ``perplexity on novel``.
        before: in the first run; None where it is not there.
        after: in the second run.
        loss: how much worse, positive for worse: relative, of accuracy and calibration absolute.
        low: of its 95% interval; None where there is none.
        high: the same.
        tolerance: what is let pass.
        regressed: whether it is a regression.
        note: what a reader should know of it.
    """

    variant: str
    kind: str
    name: str
    before: float | None
    after: float | None
    loss: float | None
    low: float | None
    high: float | None
    tolerance: float | None
    regressed: bool
    note: str = ""

    @property
    def sentence(self) -> str:
        """The finding in words."""
        if self.loss is None:
            return f"{self.variant}, {self.name}: {self.note}"
        words = f"{self.variant}, {self.name}: {figures.number(self.before, 5)} before, "
        words += f"{figures.number(self.after, 5)} after, "
        words += f"{figures.percent(abs(self.loss))} {'worse' if self.loss > 0 else 'better'}"
        if self.low is not None:
            words += f" (95% interval {figures.change_interval([self.low, self.high or 0.0])})"
        words += f", {figures.percent(self.tolerance)} tolerated"
        return f"{words}; {self.note}" if self.note else words

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"sentence": self.sentence}


class _Run:
    """What is compared of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "report" / "report.json").is_file():
            raise RecipeError(
                "no report can be read there", where=str(path), fix="give the directory of a run"
            )
        self.report = read_report(path / "report" / "report.json")
        self.stages: list[dict[str, Any]] = []
        if (path / record.STAGES).is_file():
            self.stages = record.read_json(path, record.STAGES)
        self.variants = {variant["name"]: variant for variant in self.report["variants"]}

    def windows(self, text: str) -> Any:
        """What identifies a text's windows; None where the run does not say."""
        for stage in self.stages:
            if stage["kind"] == "texts":
                for entry in stage["result"]["texts"]:
                    if entry["name"] == text:
                        return entry["sha256"]
        return None

    def nll(self, variant: str, text: str) -> Any:
        """Negative log-likelihoods float32 [windows, length - 1] [nats]; None without the file."""
        from safetensors.numpy import load_file

        path = self.path / "scores" / variant / f"{text}.safetensors"
        if not path.is_file():
            return None
        try:
            return load_file(path)["nll"]
        except Exception as error:  # the library has several, none in common
            raise RunError(f"cannot be read: {error}", where=str(path)) from error


def compare(
    first: Path,
    second: Path,
    *,
    quality: float = 0.01,
    cost: float = 0.05,
    size: float = 0.01,
) -> list[Comparison]:
    """Compare the second run with the first.

    Args:
        first: directory of the run that is the reference.
        second: directory of the run that is judged.
        quality: tolerated growth of perplexity, and drop of accuracy or calibration.
        cost: tolerated growth of the cost per output token.
        size: tolerated growth of the artifact.

    Raises:
        RecipeError: one of them is no run, or they have no variant in common.
        RunError: a file of a run cannot be read.
    """
    before, after = _Run(first), _Run(second)
    common = [name for name in before.variants if name in after.variants]
    if not common:
        raise RecipeError(
            "the two runs have no variant in common",
            where=f"{first}, {second}",
            fix="compare runs of the same recipe, or of recipes whose variants have the same names",
        )
    found: list[Comparison] = []
    for name in before.variants:
        if name not in after.variants:
            found.append(_missing(name, "it is not in the second run"))
            continue
        old, new = before.variants[name], after.variants[name]
        if old["status"] != "ok":
            continue
        if new["status"] != "ok":
            found.append(_missing(name, f"it failed in the second run: {new['error']}"))
            continue
        found += _texts(before, after, name, quality)
        found += _axes(before, after, name, quality)
        found += _costs(before, after, name, cost)
        if old["size_bytes"] and new["size_bytes"]:
            found.append(
                _judged(name, SIZE, "size [bytes]", old["size_bytes"], new["size_bytes"], size)
            )
        found += _gate(name, old["gate"], new["gate"])
    return found


def _missing(variant: str, note: str) -> Comparison:
    return Comparison(
        variant, "variant", "the variant", None, None, None, None, None, None, True, note
    )


def _judged(
    variant: str,
    kind: str,
    name: str,
    before: float,
    after: float,
    tolerance: float,
    *,
    loss: float | None = None,
    bounds: tuple[float, float] | None = None,
    note: str = "",
) -> Comparison:
    """`loss` is the relative growth where it is not given."""
    if loss is None:
        loss = after / before - 1 if before else math.copysign(1.0, after - before)
    low, high = bounds or (None, None)
    worse = loss > tolerance and (low is None or low > 0)
    return Comparison(variant, kind, name, before, after, loss, low, high, tolerance, worse, note)


def _texts(before: _Run, after: _Run, variant: str, tolerance: float) -> Iterator[Comparison]:
    """Perplexity on the texts that both runs have."""
    import numpy as np

    from compressor.evaluate.significance import interval, resampled_means

    old, new = (
        {row["text"]: row for row in run.variants[variant]["quality"]} for run in (before, after)
    )
    for text, row in old.items():
        name = f"perplexity on {text}"
        if text not in new:
            yield Comparison(
                variant, QUALITY, name, row["perplexity"], None, None, None, None, tolerance, True,
                "it was not evaluated in the second run",
            )  # fmt: skip
            continue
        figures_of = (row["perplexity"], new[text]["perplexity"])
        windows, again = before.windows(text), after.windows(text)
        if windows is None or windows != again:
            note = "the windows are not known to be the same: no interval"
            yield _judged(variant, QUALITY, name, *figures_of, tolerance, note=note)
            continue
        scores = [run.nll(variant, text) for run in (before, after)]
        bounds = None
        if scores[0] is not None and scores[1] is not None:
            losses = (scores[1].astype(np.float64) - scores[0]).mean(axis=1)
            bounds = interval(np.expm1(resampled_means(losses)))
        yield _judged(variant, QUALITY, name, *figures_of, tolerance, bounds=bounds)


def _axes(before: _Run, after: _Run, variant: str, tolerance: float) -> Iterator[Comparison]:
    """Accuracy on every axis, and calibration, paired over documents."""
    from compressor.evaluate.retained import retained_quality
    from compressor.report.quality import axis_name

    old, new = (task_results(run.path, run.stages, variant) for run in (before, after))
    asked = {result.task: _asked(result.samples) for result in new}
    same = {result.task for result in old if asked.get(result.task) == _asked(result.samples)}
    for result in old:
        if result.task not in same:
            note = "it was not asked the same documents in the second run"
            yield Comparison(
                variant, QUALITY, result.task, None, None, None, None, None, None, False, note
            )
    own, reference = (
        [result for result in results if result.task in same] for results in (new, old)
    )
    for row in retained_quality(own, reference, (), (), tolerance):
        if row["overall"]:
            loss = row["loss"]
            yield _judged(
                variant,
                QUALITY,
                axis_name(row),
                row["baseline"],
                row["value"],
                tolerance,
                loss=loss["value"],
                bounds=(loss["low"], loss["high"]),
            )


def _asked(samples: Sequence[Any]) -> list[tuple[str, str]]:
    return [(sample.id, sample.prompt_sha256) for sample in samples]


def _costs(before: _Run, after: _Run, variant: str, tolerance: float) -> Iterator[Comparison]:
    """Cost per output token at the points that both runs have."""
    money = [figures.currency(run.report) for run in (before, after)]
    old, new = (
        {
            (row["concurrency"], row["rate_per_s"]): row
            for row in run.variants[variant]["performance"]
            if row["cost_usd_per_mtok_output"]
        }
        for run in (before, after)
    )
    for point, row in old.items():
        if point not in new:
            continue
        name = f"cost at {figures.load(row)} [{money[0]}/Mtok output]"
        one, other = (r["cost_usd_per_mtok_output"] for r in (row, new[point]))
        if money[0] != money[1]:
            note = f"the second run counts in {money[1]}"
            yield Comparison(variant, COST, name, None, None, None, None, None, None, False, note)
            continue
        bounds = _ratio_bounds(one, other)
        yield _judged(variant, COST, name, one["value"], other["value"], tolerance, bounds=bounds)


def _ratio_bounds(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[float, float] | None:
    """95% interval of after / before - 1, from the intervals of both."""
    if any(not each[end] for each in (before, after) for end in ("low", "high", "value")):
        return None
    half = math.hypot(*(math.log(each["high"] / each["low"]) / 2 for each in (before, after)))
    middle = math.log(after["value"] / before["value"])
    return math.expm1(middle - half), math.expm1(middle + half)


def _gate(
    variant: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> Iterator[Comparison]:
    """The gate's outcome, where the second run has one."""
    if after is None:
        return
    passed_before = before is None or before["passed"]
    note = "passed" if after["passed"] else "not passed"
    if not after["passed"] and not passed_before:
        note += ", as before"
    yield Comparison(
        variant, GATE, "gate", None, None, None, None, None, None,
        passed_before and not after["passed"], note,
    )  # fmt: skip


def write_junit(found: Sequence[Comparison], path: Path) -> None:
    """The comparisons as JUnit XML, as CI systems read it: one suite per variant, one case per
    figure, regressions as failures.

    Raises RunError when the file cannot be written.
    """
    root = ElementTree.Element("testsuites", {"name": "compress compare"} | _counts(found))
    for variant in dict.fromkeys(one.variant for one in found):
        own = [one for one in found if one.variant == variant]
        suite = ElementTree.SubElement(root, "testsuite", {"name": variant} | _counts(own))
        for one in own:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{variant}.{one.kind}", name=_printable(one.name)
            )
            words = _printable(one.sentence)
            if one.regressed:
                ElementTree.SubElement(
                    case, "failure", message=words, type="regression"
                ).text = words
            else:
                ElementTree.SubElement(case, "system-out").text = words
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
    try:
        write_atomic(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')
    except OSError as error:
        raise RunError(
            f"cannot be written ({error.strerror})", where=str(path), fix="give another file"
        ) from error


def _counts(found: Sequence[Comparison]) -> dict[str, str]:
    failures = sum(one.regressed for one in found)
    return {"tests": str(len(found)), "failures": str(failures), "errors": "0"}


def _printable(text: str) -> str:
    """Without the control characters that XML 1.0 has no way to write."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text)
