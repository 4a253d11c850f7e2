"""Write every form of a report to a directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compressor.errors import RunError
from compressor.report.curves import latency_plot
from compressor.report.heatmap import allocation_plot, error_plot
from compressor.report.html import render_html
from compressor.report.markdown import render_markdown
from compressor.report.plots import Plot, quality_cost_plot
from compressor.report.read import validate_report
from compressor.report.speculation_plots import acceptance_plot, training_plot
from compressor.report.waterfall import waterfall_plot

# (file's name, what it shows, who draws it), in the order of the page
_PLOTS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Plot | None]], ...] = (
    ("quality_cost", "Quality against cost", quality_cost_plot),
    ("latency", "Latency against throughput", latency_plot),
    ("waterfall", "What each technique gained", waterfall_plot),
    ("acceptance", "Guesses accepted per step", acceptance_plot),
    ("training", "Training of the speculators", training_plot),
    ("allocation", "Bits by layer", allocation_plot),
    ("errors", "Error by layer", error_plot),
)


def write_report(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write ``index.html report.md report.json`` and the plots of `_PLOTS` as .svg and .png.

    A plot's files are left out (and old ones removed) when there is nothing to plot. Equal
    reports give byte-identical files. Returns the paths; RunError when the report is malformed or
    the directory cannot be written.
    """
    report = validate_report(report)
    directory = Path(directory)
    plots = {name: draw(report) for name, _, draw in _PLOTS}
    pictures = [
        (f"{name}.svg", title, plot.caption) for name, title, _ in _PLOTS if (plot := plots[name])
    ]
    contents: dict[str, bytes | None] = {
        "index.html": render_html(
            report, {name: plot for name, plot in plots.items() if plot}
        ).encode(),
        "report.md": render_markdown(report, pictures).encode(),
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    for name, plot in plots.items():
        contents[f"{name}.svg"] = plot.svg.encode() if plot else None
        contents[f"{name}.png"] = plot.png if plot else None
    return write_files(contents, directory)


def write_files(contents: Mapping[str, bytes | None], directory: Path) -> list[Path]:
    """Write files by name, each whole or not at all; those that are None are removed.

    Returns the paths; RunError when the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            if data is None:
                (directory / name).unlink(missing_ok=True)
                continue
            part = directory / f".{name}.part"
            part.write_bytes(data)
            part.replace(directory / name)
    except OSError as error:
        raise RunError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(directory),
            fix="check the free space and the permissions of the output directory",
        ) from error
    return [directory / name for name, data in contents.items() if data is not None]
