"""The quality-versus-cost plot: one panel per measured concurrency, deterministic files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compressor.report import figures
from compressor.report.verdict import comparable

# Okabe and Ito's palette, readable with the common colour blindnesses; the marker tells them apart
# in greyscale. The lightest (yellow) is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
INK, GRID, BASE, _PAPER = "#1b1f24", "#d5d9de", "#6b7280", "#ffffff"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "compressor",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Plot:
    """A drawn figure in both formats, and its caption (plain text)."""

    svg: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class _Point:
    name: str
    style: int
    x: float
    x_bounds: tuple[float, float] | None
    y: float
    y_bounds: tuple[float, float] | None


def plotted_text(report: Mapping[str, Any]) -> str | None:
    """The held-out text of the plot: the first that the baseline was evaluated on."""
    for variant in report["variants"]:
        if variant["name"] == report["baseline"] and variant["quality"]:
            return variant["quality"][0]["text"]
    return None


def _points(report: Mapping[str, Any], text: str, concurrency: int | None) -> list[_Point]:
    points, style = [], -1
    for variant in report["variants"]:
        if variant["name"] != report["baseline"]:
            style += 1
        quality = [row for row in variant["quality"] if row["text"] == text]
        if variant["status"] != "ok" or not quality or quality[0]["perplexity_change"] is None:
            continue
        if concurrency is None:
            if variant["size_bytes"] is None:
                continue
            x, x_bounds = variant["size_bytes"] / 1e6, None
        else:
            cost = next(
                (
                    row["cost_usd_per_mtok_output"]
                    for row in comparable(variant)
                    if row["concurrency"] == concurrency
                ),
                None,
            )
            if not cost:
                continue
            x = cost["value"]
            x_bounds = None if cost["low"] is None else (cost["low"], cost["high"])
        bounds = quality[0]["perplexity_ci"]
        points.append(
            _Point(
                variant["name"],
                style if variant["name"] != report["baseline"] else -1,
                x,
                x_bounds,
                quality[0]["perplexity_change"] * 100,
                (bounds[0] * 100, bounds[1] * 100) if bounds else None,
            )
        )
    return points


def _look(style: int) -> dict[str, Any]:
    """Colour and marker of a variant; -1 is the baseline."""
    if style < 0:
        return {"color": BASE, "marker": "*", "markersize": 11}
    marker = _MARKERS[style % len(_MARKERS)]
    return {"color": COLOURS[style % len(COLOURS)], "marker": marker, "markersize": 8}


def _draw(axes: Axes, points: list[_Point]) -> None:
    axes.axhline(0, color=BASE, linewidth=0.8, zorder=1)
    for point in points:
        x_error = y_error = None
        if point.x_bounds:
            low, high = point.x_bounds
            x_error = [[point.x - low], [high - point.x]]
        if point.y_bounds:
            low, high = point.y_bounds
            y_error = [[max(0.0, point.y - low)], [max(0.0, high - point.y)]]
        axes.errorbar(
            point.x,
            point.y,
            xerr=x_error,
            yerr=y_error,
            linestyle="",
            elinewidth=1.4,
            capsize=3,
            zorder=3,
            **_look(point.style),
        )
    axes.grid(True, color=GRID, linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+g}%" if value else "0%")
    )


def _caption(report: Mapping[str, Any], text: str, sweep: list[int | None], shown: int) -> str:
    total = sum(variant["status"] == "ok" for variant in report["variants"])
    if sweep == [None]:
        axis = "weights' size on disk [MB]"
    else:
        axis = f"cost of a million output tokens [{figures.currency(report)}], prefill included"
    words = (
        f"Perplexity change against the baseline on {text} [%] over {axis}. Lower left is better; "
        "the star is the baseline. Bars are 95% confidence intervals where they are known (of the "
        "cost: over rounds, each variant on its own; the paired ratios in the table are sharper)."
        if sweep != [None]
        else f"Perplexity change against the baseline on {text} [%] over {axis}. Lower left is "
        "better; the star is the baseline. Bars are 95% confidence intervals where they are known."
    )
    if len(sweep) > 1:
        words += " One panel per concurrency; the panels share the vertical axis only."
    if shown < total:
        words += f" {total - shown} variant(s) without both figures are not shown."
    return words


def quality_cost_plot(report: Mapping[str, Any]) -> Plot | None:
    """Draw the plot; None when no variant has a quality figure to draw.

    Without measured cost the horizontal axis is the size on disk.
    """
    text = plotted_text(report)
    if text is None:
        return None
    sweep: list[int | None] = sorted(
        {row["concurrency"] for variant in report["variants"] for row in comparable(variant)}
    )
    panels = [(value, _points(report, text, value)) for value in sweep or [None]]
    panels = [(value, points) for value, points in panels if points]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        columns = min(len(panels), 2)
        rows = math.ceil(len(panels) / columns)
        names = {point.name: None for _, points in panels for point in points}
        legend_columns = min(len(names), 4 if columns == 2 else 3)
        legend_rows = math.ceil(len(names) / legend_columns)
        height = 3.3 * rows + 0.3 * legend_rows + 0.2
        figure = Figure(figsize=(8.4 if columns == 2 else 6.4, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_visible(False)
                continue
            value, points = panels[index]
            _draw(axes, points)
            if value is None:
                axes.set_xlabel("size on disk [MB]")
            else:
                axes.set_title(f"concurrency {value}", fontsize=10, loc="left", color=INK)
                axes.set_xlabel(f"cost [{figures.currency(report)} per million output tokens]")
            if index % columns == 0:
                axes.set_ylabel("perplexity change [%]")
        styles = {point.name: point.style for _, points in panels for point in points}
        figure.legend(
            [
                Line2D([], [], linestyle="", **_look(style))  # type: ignore[arg-type]
                for style in styles.values()
            ],
            [name.replace("$", r"\$") for name in styles],
            loc="outside upper left",
            ncols=legend_columns,
            frameon=False,
            fontsize=9,
        )
        caption = _caption(report, text, [value for value, _ in panels], len(names))
        return render(figure, caption)


def render(figure: Figure, caption: str) -> Plot:
    """A figure in both formats; equal figures give equal bytes."""
    svg, png = io.StringIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": "compressor"})
    figure.set_dpi(160)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": "compressor"})
    return Plot(svg.getvalue(), png.getvalue(), caption)


def inline_svg(svg: str, description: str) -> str:
    """The SVG for embedding in a page: no prolog or metadata, themed ink, fluid width, a name.

    `description` must already be escaped for XML.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    body = f'{head} role="img" aria-label="{description}">{rest}'
    for colour, name in (
        (INK, "--ink"),
        (GRID, "--line"),
        (BASE, "--muted"),
        (COLOURS[0].lower(), "--accent"),
        (_PAPER, "--paper"),
    ):
        body = body.replace(colour, f"var({name})")
    return body.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
