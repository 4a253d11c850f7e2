"""The quality-versus-cost plot: one panel per measured concurrency, deterministic files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from markupsafe import escape
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
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
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
    """A drawn figure in both formats, its caption (plain text), and by the id of a group in the SVG
    what it shows."""

    svg: str
    png: bytes
    caption: str
    titles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Point:
    name: str
    style: int
    x: float
    x_bounds: tuple[float, float] | None
    y: float
    y_bounds: tuple[float, float] | None
    id: str = ""

    @property
    def size(self) -> bool:
        """Whether the horizontal axis is the size."""
        return self.id.endswith("-size")


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats or equals on both axes, least first coordinate
    first; of equal points the first."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not found or points[index][1] < points[found[-1]][1]:
            found.append(index)
    return found


def plotted_text(report: Mapping[str, Any]) -> str | None:
    """The held-out text of the plot: the first that the baseline was evaluated on."""
    for variant in report["variants"]:
        if variant["name"] == report["baseline"] and variant["quality"]:
            return variant["quality"][0]["text"]
    return None


def _points(report: Mapping[str, Any], text: str, concurrency: int | None) -> list[_Point]:
    points, style = [], -1
    for index, variant in enumerate(report["variants"]):
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
                f"point-{index}-{'size' if concurrency is None else concurrency}",
            )
        )
    return points


def look(style: int) -> dict[str, Any]:
    """Colour and marker of a variant; -1 is the baseline."""
    if style < 0:
        return {"color": BASE, "marker": "*", "markersize": 11}
    marker = MARKERS[style % len(MARKERS)]
    return {"color": COLOURS[style % len(COLOURS)], "marker": marker, "markersize": 8}


def _draw(axes: Axes, points: list[_Point]) -> None:
    axes.axhline(0, color=BASE, linewidth=0.8, zorder=1)
    best = [points[index] for index in frontier([(point.x, point.y) for point in points])]
    axes.step(
        [point.x for point in best], [point.y for point in best],
        where="post", color=BASE, linewidth=1.2, linestyle="--", zorder=2,
    )  # fmt: skip
    for point in points:
        x_error = y_error = None
        if point.x_bounds:
            low, high = point.x_bounds
            x_error = [[point.x - low], [high - point.x]]
        if point.y_bounds:
            low, high = point.y_bounds
            y_error = [[max(0.0, point.y - low)], [max(0.0, high - point.y)]]
        drawn = axes.errorbar(
            point.x,
            point.y,
            xerr=x_error,
            yerr=y_error,
            linestyle="",
            elinewidth=1.4,
            capsize=3,
            zorder=3,
            **look(point.style),
        )
        drawn.lines[0].set_gid(point.id)
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


def _spoken(point: _Point, unit: str) -> str:
    """A point in words, for whoever asks what it is."""
    x = {"value": point.x, "low": None, "high": None}
    y = figures.percent(point.y / 100, signed=True)
    if point.x_bounds:
        x |= {"low": point.x_bounds[0], "high": point.x_bounds[1]}
    words = f"{point.name}: {figures.measured(x)} {unit}"
    if point.x_bounds:
        words += f" ({figures.between(x)})"
    words += f", perplexity {y}"
    if point.y_bounds:
        words += f" ({figures.change_interval([bound / 100 for bound in point.y_bounds])})"
    return words


def _conclusion(value: int | None, points: Sequence[_Point]) -> str:
    """What the frontier of a panel says."""
    best = frontier([(point.x, point.y) for point in points])
    on = [points[index].name for index in best]
    off = [point.name for index, point in enumerate(points) if index not in best]
    where = "By size" if value is None else f"At concurrency {value}"
    thing = "smaller" if value is None else "cheaper"
    if len(points) == 1:
        return f"{where} only {on[0]} has both figures."
    words = f"{where} {figures.listed(on)} {'is' if len(on) == 1 else 'are'} on the frontier"
    words += f": nothing measured is both {thing} and better"
    if off:
        words += f"; {figures.listed(off)} {'is' if len(off) == 1 else 'are'} not"
    return words + ", intervals aside."


def _caption(
    report: Mapping[str, Any],
    text: str,
    panels: Sequence[tuple[int | None, Sequence[_Point]]],
    shown: int,
) -> str:
    total = sum(variant["status"] == "ok" for variant in report["variants"])
    sweep = [value for value, _ in panels]
    value, points = next(
        (panel for panel in panels if panel[0] == report["verdict"]["concurrency"]), panels[0]
    )
    axis = "weights' size on disk [MB]"
    if sweep != [None]:
        axis = f"cost of a million output tokens [{figures.currency(report)}], prefill included"
    words = (
        f"{_conclusion(value, points)} Perplexity change against the baseline on {text} [%] over "
        f"{axis}. Lower left is better; the star is the baseline, the dashed line the frontier. "
        "Bars are 95% confidence intervals where they are known"
    )
    words += (
        " (of the cost: over rounds, each variant on its own; the paired ratios in the table are "
        "sharper)."
        if sweep != [None]
        else "."
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
                Line2D([], [], linestyle="", **look(style))  # type: ignore[arg-type]
                for style in styles.values()
            ],
            [name.replace("$", r"\$") for name in styles],
            loc="outside upper left",
            ncols=legend_columns,
            frameon=False,
            fontsize=9,
        )
        unit = f"{figures.currency(report)}/Mtok output"
        titles = {
            point.id: _spoken(point, "MB" if point.size else unit)
            for _, points in panels
            for point in points
        }
        return render(figure, _caption(report, text, panels, len(names)), titles)


def render(figure: Figure, caption: str, titles: Mapping[str, str] | None = None) -> Plot:
    """A figure in both formats; equal figures give equal bytes.

    `titles`: by the id (gid) of an artist what it shows.
    """
    svg, png = io.StringIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": "compressor"})
    figure.set_dpi(160)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": "compressor"})
    return Plot(svg.getvalue(), png.getvalue(), caption, titles or {})


def inline_svg(plot: Plot, name: str) -> str:
    """The SVG for embedding in a page: no prolog or metadata, themed ink, fluid width, a label.

    `name` goes before every id, so that several plots can stand in one page.
    """
    body = plot.svg[plot.svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for key, words in plot.titles.items():
        group = f'<g id="{name}-{key}">'
        body = body.replace(group, f"{group}<title>{escape(words)}</title>", 1)
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    body = f'{head} role="img" aria-label="{escape(plot.caption)}">{rest}'
    for colour, ink in (
        (INK, "--ink"),
        (GRID, "--line"),
        (BASE, "--muted"),
        (COLOURS[0].lower(), "--accent"),
        (_PAPER, "--paper"),
    ):
        body = body.replace(colour, f"var({ink})")
    return body.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
