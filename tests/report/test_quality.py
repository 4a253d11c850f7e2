"""Words and tables of retained quality: they claim what the figures show, in every form."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.console import Console

from compressor.report import quality
from compressor.report.build import build_report
from compressor.report.html import render_html
from compressor.report.markdown import render_markdown
from compressor.report.terminal import closing
from tests.report.sample import sample_inputs

EVIL = "<script>alert(1)</script> | `x` [bold]"


def row(finding: str, **facts: Any) -> dict[str, Any]:
    return {
        "axis": "accuracy", "task": None, "overall": True, "metric": "acc", "documents": 1954,
        "baseline": 0.42, "value": 0.4, "retained": {"value": 0.952, "low": 0.93, "high": 0.98},
        "loss": {"value": 0.02, "low": 0.008, "high": 0.032},
        "flips": {"broken": 90, "mended": 51, "changed": 260,
                  "share": {"value": 0.072, "low": 0.06, "high": 0.085}},
        "test": "McNemar, exact", "p": 0.0013, "p_holm": 0.0052, "visible_loss": 0.0171,
        "tolerance": 0.01, "finding": finding,
    } | facts  # fmt: skip


def report(rows: list[dict[str, Any]], gate: dict[str, Any] | None = None) -> dict[str, Any]:
    inputs = sample_inputs()
    variant = inputs["variants"][1]
    variant["retained"], variant["gate"] = rows, gate
    variant["drift"] = {
        "prompts": 2, "output_length": 8, "equal": 1, "first_difference": [3, None],
        "median_first_difference": 5.5, "equal_after": [{"tokens": 8, "share": 0.5}],
        "examples": [{"prompt": EVIL, "baseline": EVIL, "variant": EVIL, "first_difference": 3}],
    }  # fmt: skip
    variant["positions"] = [
        {"text": "novel", "length": 64, "bins": [
            {"first": 1, "last": 63, "perplexity": 9.5, "perplexity_change": 0.01,
             "perplexity_ci": [0.005, 0.015], "kl_mean": 0.02}]}
    ]  # fmt: skip
    return build_report(**inputs)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            row("loss"),
            "accuracy −2.00 points (−3.20 points to −0.800 points), a significant loss (p 0.0013)",
        ),
        (
            row("no-loss", p=0.4, visible_loss=0.008),
            "accuracy: no significant loss (one of 0.800 points would have been seen)",
        ),
        (
            row("not-shown", p=0.4),
            "accuracy: not shown, this test could only have seen losses above 1.71 points",
        ),
        (
            row("not-shown", p=1.0, visible_loss=None),
            "accuracy: not shown, this test could not have seen any loss",
        ),
        (row("equal"), "accuracy: the very same on all 1,954"),
        (
            row("gain", loss={"value": -0.02, "low": -0.03, "high": -0.01}, p_holm=0.0001),
            "accuracy +2.00 points (+1.00 points to +3.00 points), a significant gain (p < 0.001)",
        ),
        (
            row("loss", axis="calibration", loss={"value": 0.02, "low": 0.01, "high": 0.03}),
            "calibration +2.00 points (+1.00 points to +3.00 points), a significant loss "
            "(p 0.0013)",
        ),
    ],
)
def test_a_finding_in_words(made: dict[str, Any], words: str) -> None:
    assert quality.finding_words(made) == words


def test_verdict_and_closing_say_what_the_tasks_showed() -> None:
    lost = report([row("loss")])
    assert "a significant loss" in lost["verdict"]["details"][0]
    kept = report([row("no-loss", p=0.4, visible_loss=0.008)])
    assert kept["verdict"]["best_variant"] == "int8-gptq"
    assert "no significant loss (one of 0.800 points" in kept["verdict"]["sentence"]
    assert lost["verdict"]["best_variant"] != "int8-gptq"  # 2 points are beyond the limit of 1%
    small = report([row("loss", loss={"value": 0.005, "low": 0.001, "high": 0.009})])
    assert small["verdict"]["best_variant"] == "int8-gptq"
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(closing(lost))
    assert "int8-gptq: accuracy −2.00 points" in console.export_text()


def test_a_variant_that_failed_the_gate_is_never_the_best() -> None:
    limit = {
        "metric": "kl_mean", "limit": 0.001, "kind": "most", "where": "novel", "value": 0.0009,
        "decided": 0.0023, "passed": False,
    }  # fmt: skip
    made = report([], {"passed": False, "decide_on": "bound", "limits": [limit]})
    assert made["verdict"]["best_variant"] != "int8-gptq"
    (line,) = quality.gate_lines(made)
    assert line == (
        "int8-gptq failed the gate: mean KL divergence 0.000900 on novel (95% interval up to "
        "0.00230), at most 0.00100 allowed"
    )
    assert line in re.sub(r"\\", "", render_markdown(made)) and line in render_html(made, {})
    missing = limit | {"metric": "drift", "kind": "least", "value": None, "decided": None}
    assert quality.limit_words(missing | {"limit": 0.9}) == (
        "share of prompts continued as by the baseline: not measured, at least 90.00% asked for"
    )


def test_tables_hold_every_row_and_escape_what_was_generated() -> None:
    made = report([row("loss"), row("not-shown", overall=False, task="siqa", p_holm=None)])
    titles = [table.title for table in quality.tables(made) if table.rows]
    assert titles == [
        "Retained quality",
        "Perplexity by position",
        "Generation drift",
        "Continuations side by side",
    ]
    table = quality.retained(made)
    assert [each[1] for each in table.rows] == ["accuracy", "accuracy: siqa"]
    assert table.rows[0][7] == "90 / 51\n260 changed" and table.rows[0][-1] == "loss"
    assert "at most 1.00%" in table.note
    page = render_html(made, {})
    assert page.count("<script>") == 1 and "&lt;script&gt;" in page  # its own
    assert "<script>" not in render_markdown(made)
