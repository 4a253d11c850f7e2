"""The answers on top of a report follow from its figures."""

from __future__ import annotations

from typing import Any

from compressor.report.build import build_report
from compressor.report.decision import answers


def said(report: dict[str, Any]) -> dict[str, str]:
    return {question: " ".join(lines) for question, lines in answers(report)}


def test_a_gain_is_answered(inputs: dict[str, Any]) -> None:
    found = said(build_report(**inputs))
    assert list(found) == [
        "What to deploy", "What it costs", "How sure that is", "What would change it"
    ]  # fmt: skip
    assert found["What to deploy"].startswith("int8-gptq: ")
    assert "artifacts/int8-gptq/compressed-tensors" in found["What to deploy"]
    assert "USD per million output tokens at concurrency 4" in found["What it costs"]
    assert "5 rounds" in found["How sure that is"] and "novel" in found["How sure that is"]
    assert "no task was run" in found["How sure that is"]
    assert "not verified" in found["How sure that is"]
    change = found["What would change it"]
    assert "at concurrency 1" in change and "int4-gptq gains" in change
    assert "depends most on" in change


def test_without_a_gain_the_baseline_stays(inputs: dict[str, Any]) -> None:
    inputs["quality_limit"] = 0.0
    found = said(build_report(**inputs))
    assert found["What to deploy"].startswith("baseline, as it is, unless a loss above 0%")
    inputs["measured"] = None
    assert answers(build_report(**inputs)) == []
