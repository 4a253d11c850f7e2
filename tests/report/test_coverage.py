"""What readers are told of layers and tensors that are not what they expect."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from compressor.report import coverage, tables
from compressor.report.build import build_report
from compressor.report.html import render_html
from compressor.report.markdown import render_markdown
from compressor.report.terminal import closing


def ledger(**changes: Any) -> dict[str, Any]:
    sizes = {"W4A16": 9_000, "bfloat16": 91_000}
    return {"missing": [], "added": [], "unread": [], "bytes_by_scheme": sizes} | changes


def with_facts(
    inputs: dict[str, Any],
    *,
    tensors: dict[str, Any] | None = None,
    skipped: list[dict[str, Any]] | None = None,
    blocks: int | None = 106_168_320,
) -> dict[str, Any]:
    """The invented report, its variant int4-gptq changed."""
    variant = inputs["variants"][2]
    variant["coverage"] |= {"block_parameters": blocks}
    if skipped:
        variant["coverage"]["skipped"] = skipped
    if tensors:
        variant["artifacts"][0]["tensors"] = tensors
    return build_report(**inputs)


def terminal(report: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(width=240, file=file).print(closing(report))
    return file.getvalue()


def everywhere(report: dict[str, Any]) -> list[str]:
    """The forms that a person reads, without Markdown's escapes."""
    page = re.sub(r"&#39;", "'", render_html(report, {}))
    return [terminal(report), re.sub(r"\\", "", render_markdown(report)), page]


def test_a_whole_artifact_warns_of_nothing(inputs: dict[str, Any]) -> None:
    report = with_facts(inputs, tensors=ledger())
    assert coverage.warnings(report) == coverage.fallbacks(report) == []
    assert "warning" not in terminal(report) and 'class="warnings"' not in render_html(report, {})
    assert all(table.title != "Tensors against the source" for table in tables.body(report))


def test_missing_tensors_are_loud_in_every_form(inputs: dict[str, Any]) -> None:
    names = [f"mtp.{n}.weight" for n in range(6)]
    report = with_facts(inputs, tensors=ledger(missing=names))
    expected = (
        "int4-gptq: 6 tensors of the source missing from the compressed-tensors artifact: "
        "mtp.0.weight, mtp.1.weight, mtp.2.weight, mtp.3.weight and 2 more"
    )
    assert coverage.warnings(report) == [expected]
    assert all(expected in form for form in everywhere(report))


def test_fused_experts_are_loud_with_their_share(inputs: dict[str, Any]) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    one = {
        "name": name,
        "reason": "fused experts that cannot be taken apart",
        "parameters": 134_515_008 // 2,
    }
    report = with_facts(inputs, skipped=[one])
    (line,) = coverage.warnings(report)
    assert line == (
        f"int4-gptq: 1 tensor of fused experts left in full precision, 50.0% of the model: {name}"
    )
    assert all(line in form for form in everywhere(report))


def test_the_output_layer_is_no_part_of_the_blocks(inputs: dict[str, Any]) -> None:
    inputs["variants"][2]["coverage"] |= {
        "quantized_parameters": 106_168_320 + 28_311_552,
        "head_parameters": 28_311_552,
    }
    report = with_facts(inputs, blocks=2 * 106_168_320)
    assert coverage.block_share(report["variants"][2]) == pytest.approx(0.5)


@pytest.mark.parametrize(("share", "warned"), [(1.0, False), (0.91, False), (0.89, True)])
def test_little_coverage_of_the_blocks_is_said(
    inputs: dict[str, Any], share: float, warned: bool
) -> None:
    report = with_facts(inputs, blocks=round(106_168_320 / share))
    assert coverage.block_share(report["variants"][2]) == pytest.approx(share)
    lines = coverage.warnings(report)
    assert bool(lines) == warned
    if warned:
        assert "only 89.0% of the decoder blocks' parameters were quantized" in lines[0]
        assert all(lines[0] in form for form in everywhere(report))


def test_fallbacks_are_named_at_the_end_of_a_run(inputs: dict[str, Any]) -> None:
    layers = inputs["variants"][2]["quantization"]["layers"]
    layers[3]["fallback"] = layers[5]["undersampled"] = True
    shown = terminal(build_report(**inputs))
    assert (
        "int4-gptq: 1 layer fell back to rounding to nearest, which did better there: "
        "model.layers.3.mlp.down_proj" in shown
    )
    assert "too few tokens and were rounded to nearest: model.layers.5.mlp.down_proj" in shown


def test_coverage_table_shows_bytes_at_once(inputs: dict[str, Any]) -> None:
    report = with_facts(inputs, tensors=ledger(added=["lm_head.weight"], unread=["mtp.0.weight"]))
    rows = {row[0]: row for row in tables.coverage(report).rows}
    assert rows["int4-gptq"][1:] == ("W4A16 9.0%, bfloat16 91.0%", "78.9%", "100.0%", "1")
    assert rows["int8-gptq"][1] == rows["int8-gptq"][3] == "–"  # a report of an older version
    assert "baseline" not in rows
    found = {row[2]: row[3] for row in tables.tensors(report).rows}
    assert found == {
        "not in the source": "lm_head.weight",
        "carried over, read by no modelling code": "mtp.0.weight",
    }
