"""What is shown of speculation: figures invented, arithmetic real."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from compressor.report import speculation
from compressor.report.build import build_report
from compressor.report.markdown import render_markdown
from compressor.report.speculation_plots import acceptance_plot, training_plot
from tests.report.sample import sample_inputs


def result(**changes: Any) -> dict[str, Any]:
    return {
        "tokens_per_step": 1.5,
        "error": 0.05,
        "steps": 100,
        "accepted_by_position": [0.4, 0.1],
        "rate": 0.25,
        "histogram": [60, 30, 10],
        "sequences": 32,
        "equal": 32,
        "ties": [],
    } | changes


def made(**changes: Any) -> dict[str, Any]:
    return {
        "method": "medusa",
        "depth": 2,
        "answer_tokens": 1000,
        "seconds": {"corpus": 10.0, "features": 2.0, "speculate": 30.0},
        "losses": [3.0, 2.5, 2.0, 1.9, 1.8, 1.7],
        "evaluations": [
            {"step": 0, "score": 1.0, "top": [[0.1, 0.2, 0.2, 0.3], [0.0, 0.1, 0.1, 0.1]]},
            {"step": 6, "score": 1.4, "top": [[0.4, 0.5, 0.5, 0.6], [0.2, 0.3, 0.3, 0.4]]},
        ],
        "prompts": "builtin:prompts",
        "results": {"chain": result(), "tree": result(tokens_per_step=1.9)},
        "tree": [[0], [1], [0, 0]],
        "times": [],
    } | changes  # fmt: skip


def load(variant: str, turn: int, drafts: int, accepted: list[int], **changes: Any) -> Any:
    return {
        "variant": variant,
        "concurrency": 4,
        "rate_per_s": None,
        "part": "",
        "round": turn,
        "energy": None,
        "drafted": {
            "drafts": drafts,
            "draft_tokens": 2 * drafts,
            "accepted_tokens": sum(accepted),
            "accepted_by_position": accepted,
        },
    } | changes


@pytest.fixture
def report() -> dict[str, Any]:
    inputs = sample_inputs()
    for variant in inputs["variants"]:
        if variant["name"] == "int4-gptq":
            variant["speculation"] = made()
        if variant["name"] == "int4-rtn":
            variant["speculation"] = made(
                method="ngram", evaluations=[], losses=[], tree=None, results={"chain": result()}
            )
    inputs["measured"]["loads"] = [
        load("int4-gptq", 0, 60, [30, 6]),
        load("int4-gptq", 1, 40, [16, 4]),
        load("int4-gptq", 1, 99, [99, 99], part="decode"),  # the split of costs is another load
        load("int4-rtn", 0, 0, [], drafted=None),
    ]
    return build_report(**inputs)


def test_counts_of_all_rounds_are_added_and_stand_beside_our_own(report: dict[str, Any]) -> None:
    found = {v["name"]: v["speculation"] for v in report["variants"]}
    (row,) = found["int4-gptq"]["served"]
    assert row["drafts"] == 100
    assert row["tokens_per_draft"] == pytest.approx(1 + 56 / 100)
    assert row["accepted_by_position"] == pytest.approx([0.46, 0.10])
    assert row["rate"] == pytest.approx(56 / 200)
    assert found["int4-rtn"]["served"] == []
    (cells,) = speculation.served(report).rows
    assert cells[:5] == ("int4-gptq", "4 at once", "100", "1.56", "1.50")
    assert "4.0" in cells[5]  # 1.56 / 1.50


def test_every_way_to_propose_has_a_row(report: dict[str, Any]) -> None:
    table = speculation.acceptance(report)
    assert [row[:3] for row in table.rows] == [
        ("int4-gptq", "Medusa", "chain of 2"),
        ("int4-gptq", "Medusa", "tree of 2, 3 nodes"),
        ("int4-rtn", "n-gram", "chain of 2"),
    ]
    assert [row[3] for row in table.rows] == [
        "1.50 [1.40, 1.60]",
        "1.90 [1.80, 2.00]",
        "1.50 [1.40, 1.60]",
    ]
    assert [row[0] for row in speculation.heads(report).rows] == ["int4-gptq"] * 2


def test_plots_show_all_that_speculates_and_all_that_was_trained(report: dict[str, Any]) -> None:
    accepted, training = acceptance_plot(report), training_plot(report)
    assert accepted is not None and training is not None
    for plot in (accepted, training):
        ET.fromstring(plot.svg)
    for name in ("int4-gptq, chain", "int4-gptq, tree", "int4-rtn, chain", "1.90"):
        assert name in accepted.svg
    assert "int4-gptq (Medusa)" in training.svg and "n-gram" not in training.svg


def test_there_is_nothing_to_draw_without(report: dict[str, Any]) -> None:
    for variant in report["variants"]:
        variant["speculation"] = None
    assert acceptance_plot(report) is None and training_plot(report) is None
    assert "Speculative decoding" not in render_markdown(report)
