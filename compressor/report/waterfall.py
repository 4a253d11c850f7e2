"""The waterfall of techniques, drawn: what each step gained, beside the range that is claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from compressor.report import figures
from compressor.report.plots import BASE, COLOURS, GRID, INK, STYLE, Plot, render

_GAIN, _LOSS = COLOURS[:2]
_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_WIDTH = 0.6


def waterfall_plot(report: Mapping[str, Any]) -> Plot | None:
    """One panel per measured point; None when no point has two steps.

    The axis is logarithmic, so that equal gains are equally high wherever they start.
    """
    points = [point for point in report["techniques"] if len(point["steps"]) > 1]
    if not points:
        return None
    heights = [height for point in points for height in _heights(point["steps"])]
    with matplotlib.rc_context(STYLE):
        columns = min(len(points), 2)
        rows = math.ceil(len(points) / columns)
        size = (8.4 if columns == 2 else 6.4, 3.6 * rows + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            if index >= len(points):
                axes.set_visible(False)
                continue
            _draw(axes, points[index]["steps"])
            axes.set_ylim(min(heights) / 1.1, max(heights) * 1.25)
            axes.set_title(figures.load(points[index]), fontsize=10, loc="left")
            if index % columns == 0:
                axes.set_ylabel("gain over the first step")
        figure.legend(
            [
                Patch(color=_GAIN),
                Patch(color=_LOSS),
                Patch(facecolor="none", edgecolor=BASE, linestyle="--"),
                Line2D([], [], color=INK, linewidth=1.4),
            ],
            ["gain", "loss", "claimed for the step", "95% interval of its gain"],
            loc="outside upper left",
            ncols=4 if columns == 2 else 2,
            frameon=False,
            fontsize=9,
        )
        return render(
            figure,
            f"{_conclusion(points)} "
            "What each technique gained in output tokens per second: a bar reaches from the step "
            "before to its own step, its factor stands above it, and the dashed frame is the range "
            "that is claimed for it. The axis is logarithmic: equal gains are equally high.",
        )


def _conclusion(points: Sequence[Mapping[str, Any]]) -> str:
    """The step that gained most, at the last point, and what all steps gained together."""
    point = points[-1]
    best = max(point["steps"][1:], key=lambda step: step["step_gain"]["value"])
    total = point["steps"][-1]["total_gain"]
    words = f"At {figures.load(point)} {best['name']} gained most over the step before"
    if best["step_gain"]["low"] is not None and best["step_gain"]["low"] <= 1:
        words += " (though no gain is shown)"
    between = figures.between(total)
    return (
        f"{words}: {figures.ratio(best['step_gain'])}; all steps together {figures.ratio(total)}"
        f"{f' ({between})' if between else ''}."
    )


def _ends(before: float, interval: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """A step's bounds as gains over the first step, from those over the step before."""
    if interval is None or interval["low"] is None or interval["high"] is None:
        return None
    return before * interval["low"], before * interval["high"]


def _heights(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """Every height that the panel of these steps must show."""
    found, before = [1.0], 1.0
    for step in steps[1:]:
        for interval in (step["step_gain"], step["claim"]):
            found += _ends(before, interval) or ()
        before = step["total_gain"]["value"]
        found.append(before)
    return found


def _draw(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    axes.set_yscale("log")
    axes.axhline(1, color=BASE, linewidth=0.8, zorder=1)
    axes.plot([-_WIDTH / 2, _WIDTH / 2], [1, 1], color=BASE, linewidth=4, zorder=3)
    rate = figures.measured(steps[0]["throughput_tok_s"])
    _write(axes, 0, 1.0, f"{rate} tok/s")
    before = 1.0
    for place, step in enumerate(steps[1:], 1):
        level = step["total_gain"]["value"]
        low, high = min(before, level), max(before, level)
        colour = _GAIN if level >= before else _LOSS
        axes.bar(place, high - low, _WIDTH, bottom=low, color=colour, zorder=3)
        start = place - _WIDTH / 2
        axes.plot([start - 1 + _WIDTH, start], [before, before], color=BASE, lw=0.8, zorder=2)
        if ends := _ends(before, step["claim"]):
            axes.bar(
                place,
                ends[1] - ends[0],
                _WIDTH + 0.2,
                bottom=ends[0],
                facecolor="none",
                edgecolor=BASE,
                linestyle="--",
                zorder=4,
            )
        if ends := _ends(before, step["step_gain"]):
            errors = [[max(0.0, level - ends[0])], [max(0.0, ends[1] - level)]]
            axes.errorbar(place, level, yerr=errors, color=INK, elinewidth=1.4, capsize=3, zorder=5)
            high = max(high, ends[1])
        _write(axes, place, high, figures.ratio(step["step_gain"]))
        before = level
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    names = [step["name"].replace("$", r"\$") for step in steps]
    axes.set_xticks(range(len(steps)), names, rotation=20, ha="right", fontsize=9)
    axes.grid(True, axis="y", color=GRID, linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _write(axes: Axes, place: float, height: float, text: str) -> None:
    """A figure above a bar."""
    axes.annotate(
        text,
        (place, height),
        (0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        zorder=6,
        bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.8},
    )
