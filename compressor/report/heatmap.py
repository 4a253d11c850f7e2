"""Which layer got how many bits, drawn as a heat map."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

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
        grids = [_grid(variant["quantization"]["layers"]) for variant in mixed]
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
            axes.invert_yaxis()
            axes.set_title(
                f"{variant['name']}: {variant['precision']['mean_bits']:.2f} bits on average",
                fontsize=10,
                loc="left",
            )
            axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
            axes.set_xlabel("decoder block")
            axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=list(panels), label="bits per weight", shrink=0.9)
        bar.set_ticks([float(bits) for bits in _BITS], labels=[str(bits) for bits in _BITS])
        return render(
            figure,
            "Bits of every linear, by decoder block and kind: bright layers are those whose "
            "rounding was predicted to raise the loss most for their size. White: not quantized, "
            "or no such layer. Experts of a mixture share one scheme.",
        )


def _grid(layers: list[Mapping[str, Any]]) -> tuple[list[str], np.ndarray]:
    """(kinds of linears, bits [kind, block])."""
    placed: dict[tuple[str, int], int] = {}
    for layer in layers:
        found = _PLACE.search(layer["name"])
        if found and layer["scheme"]:
            kind = _EXPERT.sub(".experts.", f".{found[2]}").lstrip(".")
            placed[kind, int(found[1])] = Scheme.parse(layer["scheme"]).weights.num_bits
    kinds = list(dict.fromkeys(kind for kind, _ in placed))
    values = np.full((len(kinds), 1 + max((block for _, block in placed), default=0)), np.nan)
    for (kind, block), bits in placed.items():
        values[kinds.index(kind), block] = bits
    return kinds, values
