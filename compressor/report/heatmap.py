"""Heat maps over the layers: which got how many bits, and how far each one's output moved."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from compressor.numerics.scheme import Scheme
from compressor.report.plots import STYLE, Plot, render

_BITS = tuple(range(2, 9))
_PLACE = re.compile(r"\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def allocation_plot(report: Mapping[str, Any]) -> Plot | None:
    """One panel per variant of mixed precision: its layers' bits by block and kind of linear.

    None when no variant has mixed precision.
    """
    mixed = [v for v in report["variants"] if v["precision"] and v["quantization"]]
    if not mixed:
        return None
    with matplotlib.rc_context(STYLE):
        grids = [_grid(_bits(variant)) for variant in mixed]
        height = 0.7 + sum(0.8 + 0.24 * len(kinds) for kinds, _ in grids)
        figure = Figure(figsize=(8.4, height), layout="constrained")
        ratios = [len(kinds) + 2 for kinds, _ in grids]
        panels = figure.subplots(len(mixed), 1, squeeze=False, height_ratios=ratios)[:, 0]
        colours = matplotlib.colormaps["cividis"].resampled(len(_BITS)).with_extremes(bad="#ffffff")
        levels = [_BITS[0] - 0.5, *((a + b) / 2 for a, b in itertools.pairwise(_BITS))]
        norm = BoundaryNorm([*levels, _BITS[-1] + 0.5], colours.N)
        for axes, variant, (kinds, values) in zip(panels, mixed, grids, strict=True):
            image = axes.pcolormesh(
                np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="white", lw=0.4
            )
            bits = variant["precision"]["mean_bits"]
            _label(axes, f"{variant['name']}: {bits:.2f} bits on average", kinds)
        bar = figure.colorbar(image, ax=list(panels), label="bits per weight", shrink=0.9)
        bar.set_ticks([float(bits) for bits in _BITS], labels=[str(bits) for bits in _BITS])
        return render(
            figure,
            f"{_most_bits(mixed[0])} "
            "Bits of every linear, by decoder block and kind: bright layers are those whose "
            "rounding was predicted to raise the loss most for their size. White: not quantized, "
            "or no such layer. Experts of a mixture share one scheme.",
        )


def error_plot(report: Mapping[str, Any]) -> Plot | None:
    """One panel per quantized variant: its layers' relative output errors by block and kind.

    Variants of the same layers share a panel. None when no variant has layers with errors.
    """
    shown: list[tuple[str, dict[str, float]]] = []
    for variant in report["variants"]:
        errors = _errors(variant)
        same = next((i for i, (_, other) in enumerate(shown) if other == errors), None)
        if same is not None:
            shown[same] = f"{shown[same][0]}, {variant['name']}", errors
        elif errors:
            shown.append((variant["name"], errors))
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        grids = [_grid(errors) for _, errors in shown]
        height = 0.7 + sum(0.8 + 0.24 * len(kinds) for kinds, _ in grids)
        figure = Figure(figsize=(8.4, height), layout="constrained")
        ratios = [len(kinds) + 2 for kinds, _ in grids]
        panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=ratios)[:, 0]
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="#ffffff")
        every = [error for _, errors in shown for error in errors.values()]
        norm = LogNorm(min(every), max(*every, min(every) * 1.001))
        for axes, (name, _), (kinds, values) in zip(panels, shown, grids, strict=True):
            image = axes.pcolormesh(
                np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="white", lw=0.4
            )
            _label(axes, name, kinds)
        bar = figure.colorbar(image, ax=list(panels), label="relative error", shrink=0.9)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        return render(
            figure,
            f"{_worst(shown)} Squared change of every linear's output on the calibration data / "
            "squared output, by decoder block and kind, on a logarithmic scale that the variants "
            "share: bright layers moved most. White: not quantized, or no such layer. Of the "
            "experts of a mixture the worst is shown.",
        )


def _label(axes: Axes, title: str, kinds: list[str]) -> None:
    axes.invert_yaxis()
    axes.set_title(title.replace("$", r"\$"), fontsize=10, loc="left")
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
    axes.set_xlabel("decoder block")
    axes.tick_params(length=0)


def _bits(variant: Mapping[str, Any]) -> dict[str, float]:
    """Bits of the weights by layer."""
    return {
        row["name"]: Scheme.parse(row["scheme"]).weights.num_bits
        for row in variant["quantization"]["layers"]
        if row["scheme"]
    }


def _errors(variant: Mapping[str, Any]) -> dict[str, float]:
    """Relative output errors above 0 by layer that stands in a decoder block."""
    return {
        row["name"]: row["error"]
        for row in (variant["quantization"] or {}).get("layers", [])
        if row["error"] and _PLACE.search(row["name"])
    }


def _most_bits(variant: Mapping[str, Any]) -> str:
    """Which kind of linear got most bits on average, of a variant."""
    kinds, values = _grid(_bits(variant))
    means = np.nanmean(values, axis=1)
    most, least = int(means.argmax()), int(means.argmin())
    return (
        f"In {variant['name']} {kinds[most]} got most bits ({means[most]:.1f} on average) and "
        f"{kinds[least]} fewest ({means[least]:.1f})."
    )


def _worst(shown: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """The layer that moved most, of every variant."""
    words = []
    for variant, errors in shown:
        name = max(errors, key=lambda layer: errors[layer])
        median = statistics.median(errors.values())
        words.append(
            f"{variant}: {name} moved most ({errors[name]:.2g}; half of the layers at most "
            f"{median:.2g})."
        )
    return " ".join(words)


def _grid(layers: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """(kinds of linears, values [kind, block]); of experts of one block the largest."""
    placed: dict[tuple[str, int], float] = {}
    for name, value in layers.items():
        if found := _PLACE.search(name):
            kind = _EXPERT.sub(".experts.", f".{found[2]}").lstrip(".")
            place = kind, int(found[1])
            placed[place] = max(value, placed.get(place, value))
    kinds = list(dict.fromkeys(kind for kind, _ in placed))
    values = np.full((len(kinds), 1 + max((block for _, block in placed), default=0)), np.nan)
    for (kind, block), value in placed.items():
        values[kinds.index(kind), block] = value
    return kinds, values
