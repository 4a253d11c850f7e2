"""The report as one self-contained page: no scripts, no requests, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from compressor.report import coverage, quality, tables
from compressor.report.plots import Plot, inline_svg

_OUTCOMES = {
    "gain": "Cheaper, quality kept",
    "trade-off": "Cheaper, quality not kept",
    "no-gain": "No gain shown",
    "unmeasured": "Not fully measured",
    "failed": "Failed",
}


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("compressor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def render_html(report: Mapping[str, Any], *plots: Plot | None) -> str:
    """The whole page. All texts of the report are escaped by the template."""
    figures = [
        (Markup(inline_svg(plot.svg, str(escape(plot.caption)))), plot.caption)
        for plot in plots
        if plot is not None
    ]
    return _template().render(
        report=report,
        verdict=report["verdict"],
        outcome=_OUTCOMES[report["verdict"]["outcome"]],
        warnings=[*coverage.warnings(report), *quality.gate_lines(report)],
        summary=tables.summary(report),
        figures=figures,
        body=tables.body(report),
        notes=[*report["notes"], *((report["prices"] or {}).get("assumptions") or [])],
        provenance=tables.provenance(report),
    )
