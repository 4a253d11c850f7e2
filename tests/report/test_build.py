from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compressor.report
from compressor.errors import RunError
from compressor.report.build import build_report
from compressor.report.model import report_schema
from compressor.report.read import validate_report


def test_published_schema_is_current() -> None:
    path = Path(compressor.report.__file__).with_name("report.schema.json")
    assert json.loads(path.read_text(encoding="utf-8")) == report_schema()


def test_report_is_plain_json_and_stable(report: dict[str, Any]) -> None:
    again = json.loads(json.dumps(report))
    assert validate_report(again) == again == report


def test_measured_rows_reach_their_variants(report: dict[str, Any]) -> None:
    rows = {variant["name"]: variant["performance"] for variant in report["variants"]}
    assert [len(rows[name]) for name in ("baseline", "int8-gptq", "int4-odd")] == [2, 2, 0]
    assert report["prices"]["energy_included"] is True
    assert report["workload"]["input_length"] == 128


def test_inputs_are_left_alone(inputs: dict[str, Any]) -> None:
    before = json.dumps(inputs, sort_keys=True)
    build_report(**inputs)
    assert json.dumps(inputs, sort_keys=True) == before


def test_missing_change_is_filled_from_the_baseline(inputs: dict[str, Any]) -> None:
    for variant in inputs["variants"]:
        for row in variant.get("quality", []):
            row.pop("perplexity_change")
    report = build_report(**inputs)
    int8 = report["variants"][1]["quality"][0]
    assert int8["perplexity_change"] == pytest.approx(0.0021)


def test_failed_measurement_becomes_a_note(inputs: dict[str, Any]) -> None:
    inputs["measured"]["errors"] = {"int4-rtn": "out of memory"}
    del inputs["measured"]["performance"]["int4-rtn"]
    report = build_report(**inputs)
    assert "int4-rtn could not be measured: out of memory" in report["notes"]
    assert report["variants"][3]["quality"] and not report["variants"][3]["performance"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(perplexty=1), "perplexty"),
        (lambda v: v["quality"][0].update(perplexity="good"), "perplexity"),
        (lambda v: v["quality"][0].update(perplexity=float("nan")), "finite"),
        (lambda v: v.update(status="maybe"), "status"),
    ],
)
def test_malformed_figures_are_named(inputs: dict[str, Any], change: Any, words: str) -> None:
    change(inputs["variants"][1])
    with pytest.raises(RunError, match=words):
        build_report(**inputs)


def test_baseline_alone_without_measurement(inputs: dict[str, Any]) -> None:
    inputs["variants"] = inputs["variants"][:1]
    inputs["measured"] = inputs["calibration"] = None
    report = build_report(**inputs)
    assert report["verdict"]["outcome"] == "unmeasured"
    assert "nothing to compare" in report["verdict"]["sentence"]
