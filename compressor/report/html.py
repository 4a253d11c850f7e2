"""The report as one self-contained page: no requests, everything escaped, and one script of its own
that sorts tables and computes the what-if panel. Without scripts the rest is there all the same."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compressor.report import coverage, decision, overview, quality, tables, whatif
from compressor.report.plots import Plot, inline_svg

_OUTCOMES = {
    "gain": "Cheaper, quality kept",
    "trade-off": "Cheaper, quality not kept",
    "no-gain": "No gain shown",
    "unmeasured": "Not fully measured",
    "failed": "Failed",
}
TITLES = {
    "quality_cost": "Quality against cost",
    "latency": "Latency against throughput",
    "waterfall": "What each technique gained",
    "acceptance": "Guesses accepted per step",
    "training": "Training of the speculators",
    "allocation": "Bits by layer",
    "errors": "Error by layer",
    "frontier": "Quality against cost, all runs",
    "history": "Over time",
}
_SIDE_BY_SIDE = "Continuations side by side"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("compressor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _file(name: str) -> str:
    return resources.files("compressor.report").joinpath("templates", name).read_text("utf-8")


def render_page(template: str, *, title: str, plots: Mapping[str, Plot], **values: Any) -> str:
    """A page from one of the templates; texts among the values are escaped by it.

    The page's policy lets nothing be fetched and no script run but ours, by its hash.
    """
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            style=Markup(_file("page.css")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            figures=[
                {
                    "name": name,
                    "title": TITLES[name],
                    "svg": Markup(inline_svg(plot, name)),
                    "caption": plot.caption,
                }
                for name, plot in plots.items()
            ],
            **values,
        )
    )


def render_html(report: Mapping[str, Any], plots: Mapping[str, Plot]) -> str:
    """The whole page of a run, with plots by their files' names."""
    panel = whatif.data(report)
    pairs = quality.example_pairs(report)
    return render_page(
        "report.html.j2",
        title=report["title"],
        plots=plots,
        report=report,
        verdict=report["verdict"],
        outcome=_OUTCOMES[report["verdict"]["outcome"]],
        answers=decision.answers(report),
        warnings=[*coverage.warnings(report), *quality.gate_lines(report)],
        summary=overview.table(report),
        whatif=panel,
        whatif_json=_embedded(panel),
        formula=whatif.FORMULA.format(money=panel["currency"] if panel else ""),
        recorded=panel is not None and all(row["samples"] for row in panel["rows"]),
        apart=panel is not None and all(row["split"] for row in panel["rows"]),
        pairs=pairs,
        body=[table for table in tables.body(report) if table.title != _SIDE_BY_SIDE],
        notes=[*report["notes"], *((report["prices"] or {}).get("assumptions") or [])],
        provenance=tables.provenance(report),
    )


def _embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: it holds no `<`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
