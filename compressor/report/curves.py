"""Latency against throughput over the load, one curve per variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compressor.report import figures
from compressor.report.plots import GRID, STYLE, Plot, look, render

_LATENCIES = (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"))


def latency_plot(report: Mapping[str, Any]) -> Plot | None:
    """Time to first token and time per output token over output tokens per second.

    None when no variant was measured at two points of a closed loop or of an open one.
    """
    curves = _curves(report)
    if not any(len(rows) > 1 for _, _, rows in curves):
        return None
    titles: dict[str, str] = {}
    with matplotlib.rc_context(STYLE):
        columns = min(len(curves), 4)
        height = 3.4 + 0.3 * -(-len(curves) // columns)
        figure = Figure(figsize=(8.4, height), layout="constrained")
        for axes, (key, name) in zip(figure.subplots(1, 2), _LATENCIES, strict=True):
            for index, style, rows in curves:
                titles |= _draw(axes, report["variants"][index]["name"], index, style, rows, key)
            axes.set_title(f"{name}: median, and up to p90", fontsize=10, loc="left")
            axes.set_xlabel("output tokens per second")
            axes.set_ylabel(f"{name} [ms]")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.grid(True, color=GRID, linewidth=0.6, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0)
        figure.legend(
            [Line2D([], [], **look(style)) for _, style, _ in curves],
            [report["variants"][index]["name"].replace("$", r"\$") for index, _, _ in curves],
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=9,
        )
        return render(figure, _caption(report, curves), titles)


def _curves(report: Mapping[str, Any]) -> list[tuple[int, int, list[Mapping[str, Any]]]]:
    """(index of the variant, style, its rows by rising load) of those that were measured."""
    found, style = [], -1
    for index, variant in enumerate(report["variants"]):
        own = -1
        if variant["name"] != report["baseline"]:
            own = style = style + 1
        closed = [row for row in variant["performance"] if row["rate_per_s"] is None]
        rows = closed or variant["performance"]
        rows = [row for row in rows if all(row[key]["p50"] is not None for key, _ in _LATENCIES)]
        if rows:
            rows = sorted(rows, key=lambda row: row["rate_per_s"] or row["concurrency"])
            found.append((index, own, rows))
    return found


def _draw(
    axes: Axes, name: str, index: int, style: int, rows: Sequence[Mapping[str, Any]], key: str
) -> dict[str, str]:
    """One curve; what its points are, by id."""
    titles = {}
    colour = look(style)["color"]
    speeds = [row["throughput_tok_s"]["value"] for row in rows]
    axes.plot(speeds, [row[key]["p50"] for row in rows], color=colour, linewidth=1.2, zorder=2)
    for row in rows:
        speed, middle, high = row["throughput_tok_s"], row[key]["p50"], row[key]["p90"]
        x_error = None
        if speed["low"] is not None and speed["high"] is not None:
            x_error = [[speed["value"] - speed["low"]], [speed["high"] - speed["value"]]]
        drawn = axes.errorbar(
            speed["value"],
            middle,
            xerr=x_error,
            yerr=None if high is None else [[0.0], [max(0.0, high - middle)]],
            linestyle="",
            elinewidth=1.2,
            capsize=3,
            zorder=3,
            **look(style),
        )
        point = f"{key.removesuffix('_ms')}-{index}-{row['rate_per_s'] or row['concurrency']}"
        drawn.lines[0].set_gid(point)
        titles[point] = (
            f"{name}, {figures.load(row)}: {figures.measured(speed)} tok/s, "
            f"{key.removesuffix('_ms').upper()} {figures.number(middle)} ms, "
            f"p90 {figures.number(high)} ms"
        )
    return titles


def _caption(
    report: Mapping[str, Any], curves: Sequence[tuple[int, int, list[Mapping[str, Any]]]]
) -> str:
    fastest, row = max(
        ((index, rows[-1]) for index, _, rows in curves),
        key=lambda item: item[1]["throughput_tok_s"]["value"],
    )
    lightest, first = min(
        ((index, rows[0]) for index, _, rows in curves), key=lambda item: item[1]["tpot_ms"]["p50"]
    )
    names = [variant["name"] for variant in report["variants"]]
    return (
        f"Under the heaviest load {names[fastest]} yields most: "
        f"{figures.measured(row['throughput_tok_s'])} tok/s at a median TPOT of "
        f"{figures.number(row['tpot_ms']['p50'])} ms. Under the lightest {names[lightest]} answers "
        f"fastest: {figures.number(first['tpot_ms']['p50'])} ms per token. Each curve goes from "
        "light to heavy load; lower right is better. Marks: median over requests; upward bars "
        "reach to the 90th percentile, bars across are 95% intervals of the throughput."
    )
