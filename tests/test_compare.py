"""What counts as a regression: tolerances, intervals, and runs that cannot be paired."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from junitparser import JUnitXml

from compressor.compare import Comparison, compare, write_junit
from compressor.errors import RecipeError, RunError
from compressor.evaluate.samples import TaskSample, write_samples
from compressor.report.build import build_report
from compressor.report.write import write_report
from tests.report.sample import sample_inputs


def run(directory: Path, change: Any = lambda report: None) -> Path:
    """A run's report without anything else, figures changed."""
    report = build_report(**sample_inputs())
    change(report)
    write_report(report, directory / "report")
    return directory


def cost(report: dict[str, Any]) -> dict[str, Any]:
    return report["variants"][1]["performance"][0]["cost_usd_per_mtok_output"]


def named(found: list[Comparison], variant: str = "int8-gptq") -> dict[str, Comparison]:
    return {one.name: one for one in found if one.variant == variant}


def test_costs_have_an_interval_of_both_runs(tmp_path: Path) -> None:
    def dearer(report: dict[str, Any]) -> None:
        cost(report).update(value=12.0, low=11.0, high=13.0)

    def base(report: dict[str, Any]) -> None:
        cost(report).update(value=10.0, low=9.5, high=10.5)

    first, second = run(tmp_path / "a", base), run(tmp_path / "b", dearer)
    one = named(compare(first, second))["cost at concurrency 1 [USD/Mtok output]"]
    assert one.loss == pytest.approx(0.2)
    half = math.hypot(math.log(10.5 / 9.5), math.log(13 / 11)) / 2
    assert one.low == pytest.approx(1.2 * math.exp(-half) - 1) and one.low > 0
    assert one.regressed and "20.00% worse" in one.sentence
    assert not named(compare(first, second, cost=0.25))[one.name].regressed
    # As large a change that the intervals do not bear out.

    def unsure(report: dict[str, Any]) -> None:
        cost(report).update(value=12.0, low=8.0, high=18.0)

    third = run(tmp_path / "c", unsure)
    assert not named(compare(first, third))[one.name].regressed
    assert not named(compare(second, first))[one.name].regressed  # cheaper is no regression


def test_sizes_count_by_the_byte(tmp_path: Path) -> None:
    def larger(report: dict[str, Any]) -> None:
        report["variants"][1]["size_bytes"] = round(163_000_000 * 1.02)

    first, second = run(tmp_path / "a"), run(tmp_path / "b", larger)
    assert named(compare(first, second))["size [bytes]"].regressed
    assert not named(compare(first, second, size=0.03))["size [bytes]"].regressed


def test_windows_that_are_not_known_to_be_the_same_give_no_interval(tmp_path: Path) -> None:
    def worse(report: dict[str, Any]) -> None:
        report["variants"][1]["quality"][0]["perplexity"] *= 1.02

    first, second = run(tmp_path / "a"), run(tmp_path / "b", worse)
    one = named(compare(first, second))["perplexity on novel"]
    assert one.low is None and one.regressed and "no interval" in one.sentence

    def gone(report: dict[str, Any]) -> None:
        del report["variants"][1]["quality"][0]

    third = run(tmp_path / "c", gone)
    one = named(compare(first, third))["perplexity on novel"]
    assert one.regressed and "not evaluated" in one.sentence


def test_variants_that_are_gone_or_failed_are_regressions(tmp_path: Path) -> None:
    def fewer(report: dict[str, Any]) -> None:
        del report["variants"][2]
        report["variants"][1].update(status="failed", error="out of memory")

    first, second = run(tmp_path / "a"), run(tmp_path / "b", fewer)
    found = compare(first, second)
    assert named(found)["the variant"].regressed
    assert "out of memory" in named(found)["the variant"].sentence
    assert "not in the second run" in named(found, "int4-gptq")["the variant"].sentence
    assert named(compare(second, first)) == {}  # what failed before cannot become worse

    def other(report: dict[str, Any]) -> None:
        for number, variant in enumerate(report["variants"]):
            variant["name"] = f"v{number}"

    with pytest.raises(RecipeError, match="no variant in common"):
        compare(first, run(tmp_path / "c", other))


def with_tasks(directory: Path, right: int, *, ids: str = "") -> Path:
    """A run with one task of 400 documents, of which so many were answered right."""
    run(directory)
    stages = []
    for variant, hits in (("baseline", 300), ("int8-gptq", right)):
        samples = [
            TaskSample(
                f"{ids}{i}", "ab", 0, int(i >= hits), (-1.0 - (i >= hits), -1.5), (1, 1), None,
                {"acc": float(i < hits)},
            )
            for i in range(400)
        ]  # fmt: skip
        write_samples(samples, directory / "tasks" / variant / "siqa.jsonl")
        task = {
            "task": "siqa", "axis": "accuracy", "main_metric": "acc", "file": "samples/siqa.jsonl",
        }  # fmt: skip
        stages.append({"kind": "tasks", "variant": variant, "result": {"tasks": [task]}})
    (directory / "stages.json").write_text(json.dumps(stages))
    return directory


def test_answers_are_paired_over_documents(tmp_path: Path) -> None:
    first, second = with_tasks(tmp_path / "a", 300), with_tasks(tmp_path / "b", 280)
    one = named(compare(first, second))["accuracy"]
    assert one.regressed and one.loss == pytest.approx(0.05)
    assert 0.02 < (one.low or 0) < 0.05 < (one.high or 0) < 0.08
    assert not named(compare(first, second, quality=0.06))["accuracy"].regressed
    assert not named(compare(first, with_tasks(tmp_path / "c", 300)))["accuracy"].regressed
    other = named(compare(first, with_tasks(tmp_path / "d", 200, ids="x")))["siqa"]
    assert not other.regressed and "not asked the same documents" in other.sentence


def test_junit_of_awkward_words_is_read_back(tmp_path: Path) -> None:
    plain = Comparison("v", "quality", "perplexity on <&>", 1.0, 2.0, 1.0, None, None, 0.1, True)
    odd = dataclasses.replace(plain, note="bell \x07 quote \" '")
    write_junit([plain, odd], tmp_path / "j.xml")
    (suite,) = JUnitXml.fromfile(str(tmp_path / "j.xml"))
    assert suite.failures == suite.tests == 2
    assert [case.name for case in suite] == ["perplexity on <&>"] * 2
    with pytest.raises(RunError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        write_junit([plain], tmp_path / "file" / "j.xml")
