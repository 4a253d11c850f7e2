"""The map of bits by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.report.build import build_report
from compressor.report.heatmap import _bits, _grid, allocation_plot, error_plot
from compressor.report.write import write_report


def layers() -> list[dict[str, Any]]:
    return [
        {"name": f"model.layers.{block}.{kind}", "error": 0.01, "scheme": scheme}
        for block, scheme in enumerate(["W8A16", "W4A16", "W4A16"])
        for kind in ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.1.w1", "mlp.experts.2.w1")
    ]


def test_layers_stand_at_their_block_and_kind() -> None:
    rows = [*layers(), {"name": "lm_head", "error": 0.1, "scheme": "W8A16"}]
    kinds, values = _grid(_bits({"quantization": {"layers": rows}}))
    assert kinds == ["self_attn.q_proj", "mlp.down_proj", "mlp.experts.w1"]
    assert values.tolist() == [[8, 4, 4]] * 3


def test_only_mixed_precision_is_drawn(inputs: dict[str, Any], tmp_path: Path) -> None:
    assert allocation_plot(build_report(**inputs)) is None
    variant = inputs["variants"][1]
    variant["precision"] = {"mean_bits": 5.33, "stored_bits": 5.58, "predicted_loss": 0.1}
    variant["quantization"]["layers"] = layers()
    report = build_report(**inputs)
    names = {path.name for path in write_report(report, tmp_path)}
    assert {"allocation.svg", "allocation.png"} <= names
    assert "5.33 bits on average" in (tmp_path / "allocation.svg").read_text()
    assert "allocation.svg" in (tmp_path / "report.md").read_text()
    assert "5.33 bits on average" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == len([name for name in names if name.endswith(".svg")])
    assert "<image" not in (tmp_path / "allocation.svg").read_text()


def test_errors_are_drawn_once_for_equal_layers(inputs: dict[str, Any]) -> None:
    plot = error_plot(build_report(**inputs))
    assert plot is not None
    assert "int8-gptq" in plot.svg and "int4-gptq, int4-rtn" in plot.svg
    assert "model.layers.29.mlp.down_proj moved most (0.00039" in plot.caption
    for variant in inputs["variants"]:
        variant["quantization"] = None
    assert error_plot(build_report(**inputs)) is None
