"""Write every form of a report to a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import RunError
from compressor.report.build import validate_report
from compressor.report.html import render_html
from compressor.report.markdown import render_markdown
from compressor.report.plots import quality_cost_plot


def write_report(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write ``index.html report.md report.json quality_cost.svg quality_cost.png``.

    The plot's files are left out (and old ones removed) when there is nothing to plot. Equal
    reports give byte-identical files. Returns the paths; RunError when the report is malformed or
    the directory cannot be written.
    """
    report = validate_report(report)
    directory = Path(directory)
    plot = quality_cost_plot(report)
    contents: dict[str, bytes] = {
        "index.html": render_html(report, plot).encode(),
        "report.md": render_markdown(report, plot.caption if plot else None).encode(),
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    plot_files = (
        {"quality_cost.svg": plot.svg.encode(), "quality_cost.png": plot.png} if plot else {}
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("quality_cost.svg", "quality_cost.png"):
            if name not in plot_files:
                (directory / name).unlink(missing_ok=True)
        for name, data in (contents | plot_files).items():
            part = directory / f".{name}.part"
            part.write_bytes(data)
            part.replace(directory / name)
    except OSError as error:
        raise RunError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(directory),
            fix="check the free space and the permissions of the output directory",
        ) from error
    return [directory / name for name in contents | plot_files]


def read_report(path: Path) -> dict[str, Any]:
    """A `report.json` again, checked; RunError when it cannot be read or does not fit."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"the report cannot be read: {error}",
            where=str(path),
            fix="name a run directory that holds report/report.json",
        ) from error
    return validate_report(data)
