"""Speculators drawn: how many guesses the target accepted per step, and how training went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from compressor.report.plots import COLOURS, GRID, STYLE, Plot, render
from compressor.report.speculation import NAMES

_SMOOTHED = 20  # steps that a point of the loss is the mean of, at most
_PANELS = 2  # in a row


def acceptance_plot(report: Mapping[str, Any]) -> Plot | None:
    """Share of the target's steps by accepted guesses, of every variant and way to propose; None
    where none speculates."""
    shown = [
        (f"{variant['name']}, {way}", result)
        for variant in report["variants"]
        for way, result in (variant["speculation"] or {"results": {}})["results"].items()
    ]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 0.42 * len(shown)), layout="constrained")
        axes = figure.subplots()
        most = max(len(result["histogram"]) for _, result in shown)
        shades = matplotlib.colormaps["cividis"](np.linspace(0.1, 0.95, most))
        left = np.zeros(len(shown))
        for accepted in range(most):
            shares = np.array(
                [
                    (result["histogram"][accepted : accepted + 1] or [0])[0] / result["steps"]
                    for _, result in shown
                ]
            )
            places = range(len(shown))
            axes.barh(places, shares, left=left, color=shades[accepted], label=str(accepted))
            left += shares
        for place, (_, result) in enumerate(shown):
            axes.text(1.01, place, f"{result['tokens_per_step']:.2f}", va="center", fontsize=9)
        axes.set_yticks(range(len(shown)), [name.replace("$", r"\$") for name, _ in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("share of the target's steps")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        figure.legend(
            title="guesses accepted", loc="outside upper center", ncols=most, frameon=False
        )
        name, best = max(shown, key=lambda one: one[1]["tokens_per_step"])
        return render(
            figure,
            f"{name} makes most: {best['tokens_per_step']:.2f} tokens per step of the target. "
            "How many guesses the target accepted per step, on prompts that nothing was trained "
            "on; at the right the mean tokens per step, the target's own included. The more of a "
            "bar lies right of the darkest part, the more steps the speculator saved.",
        )


def training_plot(report: Mapping[str, Any]) -> Plot | None:
    """Loss by step and accuracy on the answers held out of every trained speculator; None where
    none was trained."""
    trained = [
        (variant["name"], variant["speculation"])
        for variant in report["variants"]
        if variant["speculation"] and variant["speculation"]["evaluations"]
    ]
    if not trained:
        return None
    with matplotlib.rc_context(STYLE):
        rows = len(trained)
        figure = Figure(figsize=(8.4, 0.5 + 2.4 * rows), layout="constrained")
        grid = figure.subplots(rows, _PANELS, squeeze=False)
        for (name, found), (loss, accuracy) in zip(trained, grid, strict=True):
            method = NAMES.get(found["method"], found["method"])
            loss.set_title(f"{name} ({method})".replace("$", r"\$"), fontsize=10, loc="left")
            _draw_loss(loss, found["losses"])
            _draw_accuracy(accuracy, found["evaluations"])
            for axes in (loss, accuracy):
                axes.grid(True, color=GRID, linewidth=0.6)
                axes.spines[["top", "right"]].set_visible(False)
                axes.tick_params(length=0)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.set_xlabel("optimizer step")
        return render(
            figure,
            "Training of the speculators. Left: loss per predicted token (a speculator's own "
            "loss, not comparable between methods). Right: share of the answers held out that the "
            "first guess of each head or step (top 1, solid) or one of the best five (dashed) has "
            "right. A curve that still rises at its end would gain from more data or epochs.",
        )


def _draw_loss(axes: Axes, losses: list[float]) -> None:
    width = max(1, min(_SMOOTHED, len(losses) // 5))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(np.arange(len(smooth)) + width, smooth, color=COLOURS[0], linewidth=1.4)
    axes.set_ylabel("loss")


def _draw_accuracy(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    steps = [one["step"] for one in evaluations]
    tops = [one["top"] if isinstance(one["top"][0], list) else [one["top"]] for one in evaluations]
    for head in range(len(tops[0])):
        colour = COLOURS[head % len(COLOURS)]
        label = f"token {head + 1}"
        first = [top[head][0] for top in tops]
        axes.plot(steps, first, color=colour, linewidth=1.4, marker=".", label=label)
        axes.plot(steps, [top[head][-1] for top in tops], "--", color=colour, linewidth=1)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("held-out accuracy")
    axes.legend(fontsize=8, frameon=False, ncols=2)
