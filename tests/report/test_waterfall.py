from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.measure import metrics, techniques
from compressor.report import techniques as table_of
from compressor.report.build import build_report
from compressor.report.waterfall import waterfall_plot
from compressor.report.write import write_report

DECLARED = [
    {"variant": "int8-gptq", "technique": "int8"},
    {"variant": "int4-gptq", "technique": "<b>int4</b>"},
    {"variant": "int4-rtn", "technique": "continuous-batching"},
]


@pytest.fixture
def inputs(inputs: dict[str, Any], sample: Any) -> dict[str, Any]:
    """The invented report with a waterfall, made by the real code."""
    groups: dict[str, dict[Any, list[Any]]] = {}
    for name, speed in {
        "baseline": 1.0, "int8-gptq": 1.7, "int4-gptq": 2.1, "int4-rtn": 1.5
    }.items():  # fmt: skip
        groups[name] = {}
        for row in sample.requests(name, speed):
            groups[name].setdefault((row.concurrency, row.rate_per_s), []).append(row)
    inputs["measured"]["techniques"] = techniques.gains(
        DECLARED, groups, baseline="baseline", seed=0, goal=metrics.Goal()
    )
    inputs["measured"]["serving"] = {
        name: {"batching": "static", "dtype": "auto", "flags": [], "variables": {}}
        for name in groups
    }
    inputs["measured"]["serving"]["int4-rtn"]["batching"] = "continuous"
    return inputs


def test_every_form_shows_steps_claims_and_positions(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    names = {path.name for path in write_report(build_report(**inputs), tmp_path)}
    assert {"waterfall.svg", "waterfall.png"} <= names
    page, text = (tmp_path / "index.html").read_text(), (tmp_path / "report.md").read_text()
    for form in (page, text):
        assert "Gain of each technique" in form and "1.5× to 2×" in form
        assert "arXiv:2211.10438" in form and "continuous batching" in form
        assert "<b>" not in form
    assert (
        page.count("<svg") == len([name for name in names if name.endswith(".svg")])
        and "waterfall.svg" in text
    )


def test_table_says_where_each_gain_lies(inputs: dict[str, Any]) -> None:
    made = table_of.table(build_report(**inputs))
    assert len(made.rows) == 2 * 4 and len(made.headers) == len(made.rows[0])
    assert [row[6] for row in made.rows[:4]] == ["–", "inside\nsurely", "–", "below\nsurely"]
    assert made.rows[1][4].startswith("1.70×\n1.") and made.rows[0][7] == "1×"
    assert "23x" in made.note


def test_a_waterfall_that_ends_early_says_so(inputs: dict[str, Any]) -> None:
    for point in inputs["measured"]["techniques"]:
        del point["steps"][1:]
        point["left_out"] = ["int8-gptq"]
    report = build_report(**inputs)
    assert "ends before int8-gptq" in table_of.table(report).note
    assert waterfall_plot(report) is None


def test_without_a_waterfall_there_is_no_plot_and_no_table(inputs: dict[str, Any]) -> None:
    del inputs["measured"]["techniques"]
    report = build_report(**inputs)
    assert waterfall_plot(report) is None and not table_of.table(report).rows


def test_equal_reports_give_equal_plots(inputs: dict[str, Any]) -> None:
    first, second = (waterfall_plot(build_report(**inputs)) for _ in range(2))
    assert first is not None and first == second
