"""Several runs in one report: one table, one frontier, and their course in time.

Costs are compared as they are, each at its run's headline load. Quality is compared in bits per
byte on a text that all runs were evaluated on, which holds across models and tokenizers; where
there is none, runs of one model are compared by the change of perplexity against their own
baselines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from compressor import __version__
from compressor.errors import RecipeError
from compressor.report import figures
from compressor.report.html import render_page
from compressor.report.markdown import escape, table_markdown
from compressor.report.model import Interval, Strict
from compressor.report.plots import BASE, COLOURS, GRID, MARKERS, STYLE, Plot, frontier, render
from compressor.report.read import read_report
from compressor.report.table import Table
from compressor.report.tables import method
from compressor.report.verdict import row_at, worst_quality
from compressor.report.write import write_files

_LOG_FROM = 8.0  # largest cost / smallest, from which the axis is logarithmic
_LABELS = {"bits_per_byte": "bits per byte", "perplexity_change": "perplexity change [%]"}


class ComparedRun(Strict):
    """One run: `label` names it in this report, `path` is where it was read from."""

    label: str
    path: str
    created: str
    recipe: str
    recipe_sha256: str | None
    model: str
    revision: str | None
    device: str | None
    engine: str | None
    compressor_version: str
    concurrency: int | None
    sentence: str


class ComparedVariant(Strict):
    """One variant of the run of that index, at its run's headline load.

    `quality` is in the report's measure; `perplexity_change` is that of its worst text against its
    own baseline. `frontier`: no other is both cheaper and better.
    """

    run: int
    name: str
    method: str
    is_baseline: bool
    size_bytes: int | None
    quality: Interval | None
    perplexity_change: Interval | None
    throughput_tok_s: Interval | None
    tpot_p50_ms: float | None
    cost_usd_per_mtok_output: Interval | None
    cost_ratio: Interval | None
    frontier: bool = False


class Compared(Strict):
    """The whole comparison; `measure` of quality on `text`, both null where runs share none."""

    schema_version: Literal[1] = 1
    compressor_version: str
    currency: str
    measure: Literal["bits_per_byte", "perplexity_change"] | None
    text: str | None
    sentence: str
    runs: list[ComparedRun]
    variants: list[ComparedVariant]


def comparison_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `comparison.json`."""
    schema = Compared.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def report_file(path: Path) -> Path:
    """The `report.json` of a run's directory, or of a report's own directory."""
    for found in (path / "report" / "report.json", path / "report.json"):
        if found.is_file():
            return found
    raise RecipeError(
        "no report can be read there", where=str(path), fix="give the directory of a run"
    )


def compare_reports(paths: Sequence[Path]) -> dict[str, Any]:
    """Content of `comparison.json` from the reports of some runs' directories.

    Raises RecipeError where a directory holds no report, or the runs count in different
    currencies; RunError where a report is malformed.
    """
    reports = [read_report(report_file(path)) for path in paths]
    money = sorted({figures.currency(report) for report in reports if report["prices"]})
    if len(money) > 1:
        raise RecipeError(
            f"the runs count in {figures.listed(money)}",
            where=", ".join(map(str, paths)),
            fix="compare runs of one currency (measure.prices.currency)",
        )
    measure, text = _measure(reports)
    labels = _labels(paths, reports)
    runs = [_run(*row) for row in zip(paths, reports, labels, strict=True)]
    variants = [
        _variant(index, report, variant, measure, text)
        for index, report in enumerate(reports)
        for variant in report["variants"]
        if variant["status"] == "ok"
    ]
    known = [v for v in variants if v["cost_usd_per_mtok_output"] and v["quality"]]
    places = [(v["cost_usd_per_mtok_output"]["value"], v["quality"]["value"]) for v in known]
    best = [known[index] for index in frontier(places)]
    for variant in best:
        variant["frontier"] = True
    content = {
        "compressor_version": __version__,
        "currency": money[0] if money else "USD",
        "measure": measure,
        "text": text,
        "sentence": _sentence(best, labels, money[0] if money else "USD"),
        "runs": runs,
        "variants": variants,
    }
    return Compared.model_validate(content).model_dump(mode="json")


def _measure(reports: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """(measure of quality, text) that all runs have in common."""
    shared: list[str] | None = None
    for report in reports:
        own = [
            row["text"]
            for variant in report["variants"]
            if variant["name"] == report["baseline"]
            for row in variant["quality"]
            if row["bits_per_byte"] is not None
        ]
        shared = own if shared is None else [text for text in shared if text in own]
    if shared:
        return "bits_per_byte", shared[0]
    models = {(report["model"]["source"], report["model"]["revision"]) for report in reports}
    evaluated = all(any(v["quality"] for v in report["variants"]) for report in reports)
    return ("perplexity_change", None) if len(models) == 1 and evaluated else (None, None)


def _labels(paths: Sequence[Path], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each run: its recipe's, with what tells runs of one recipe apart."""
    names = [report["recipe"]["name"] for report in reports]
    labels = []
    for path, report, name in zip(paths, reports, names, strict=True):
        twice = names.count(name) > 1
        labels.append(f"{name}, {report['created'][:16].replace('T', ' ')}" if twice else name)
        if labels.count(labels[-1]) > 1:
            labels[-1] += f", {path.resolve().name}"
    return labels


def _run(path: Path, report: Mapping[str, Any], label: str) -> dict[str, Any]:
    environment, workload = report["environment"], report["workload"] or {}
    return {
        "label": label,
        "path": str(path),
        "created": report["created"],
        "recipe": report["recipe"]["name"],
        "recipe_sha256": report["recipe"]["sha256"],
        "model": report["model"]["source"],
        "revision": report["model"]["revision"],
        "device": environment.get("device") or environment.get("cpu"),
        "engine": workload.get("engine"),
        "compressor_version": report["compressor_version"],
        "concurrency": report["verdict"]["concurrency"],
        "sentence": report["verdict"]["sentence"],
    }


def _variant(
    index: int,
    report: Mapping[str, Any],
    variant: Mapping[str, Any],
    measure: str | None,
    text: str | None,
) -> dict[str, Any]:
    worst = worst_quality(variant)
    change = None
    if worst is not None:
        low, high = worst["perplexity_ci"] or (None, None)
        change = {"value": worst["perplexity_change"], "low": low, "high": high}
    row = row_at(variant, report["verdict"]["concurrency"]) or {}
    own = next((r for r in variant["quality"] if r["text"] == text), None)
    return {
        "run": index,
        "name": variant["name"],
        "method": method(variant),
        "is_baseline": variant["name"] == report["baseline"],
        "size_bytes": variant["size_bytes"],
        "quality": _bits(own) if measure == "bits_per_byte" else measure and _hundredfold(change),
        "perplexity_change": change,
        "throughput_tok_s": row.get("throughput_tok_s"),
        "tpot_p50_ms": (row.get("tpot_ms") or {}).get("p50"),
        "cost_usd_per_mtok_output": row.get("cost_usd_per_mtok_output"),
        "cost_ratio": row.get("cost_ratio"),
        "frontier": False,
    }


def _bits(row: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    """Bits per byte with the interval of the perplexity's change: bits go as its logarithm."""
    if row is None or row["bits_per_byte"] is None:
        return None
    bits, change, bounds = row["bits_per_byte"], row["perplexity_change"], row["perplexity_ci"]
    if change is None or not bounds or bounds[1] <= bounds[0] or row["perplexity"] <= 1:
        return {"value": bits, "low": None, "high": None}
    per_log = bits / math.log(row["perplexity"])
    low, high = (bits + per_log * (math.log1p(end) - math.log1p(change)) for end in bounds)
    return {"value": bits, "low": low, "high": high}


def _hundredfold(change: Mapping[str, float | None] | None) -> dict[str, float | None] | None:
    if change is None:
        return None
    return {key: None if end is None else 100 * end for key, end in change.items()}


def _sentence(best: Sequence[Mapping[str, Any]], labels: Sequence[str], money: str) -> str:
    """The frontier in words."""
    if not best:
        return "The runs share no measure of quality and cost, so there is no frontier."
    words = [
        f"{v['name']} of {labels[v['run']]} ({figures.measured(v['cost_usd_per_mtok_output'])} "
        f"{money}/Mtok output)"
        for v in best
    ]
    if len(words) == 1:
        return f"{words[0]} is both the cheapest and the best of what was measured."
    return f"On the frontier, from the cheapest to the best: {figures.listed(words)}."


def frontier_plot(content: Mapping[str, Any]) -> Plot | None:
    """Quality over cost of all runs; a colour per run, a marker per variant. None without both."""
    shown = [v for v in content["variants"] if v["cost_usd_per_mtok_output"] and v["quality"]]
    if not shown:
        return None
    names = list(dict.fromkeys(v["name"] for v in shown))
    titles = {}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        axes = figure.subplots()
        costs = [v["cost_usd_per_mtok_output"]["value"] for v in shown]
        best = sorted(
            (v["cost_usd_per_mtok_output"]["value"], v["quality"]["value"])
            for v in shown
            if v["frontier"]
        )
        axes.step(*zip(*best, strict=True), where="post", color=BASE, linestyle="--", zorder=2)
        for index, variant in enumerate(content["variants"]):
            if variant in shown:
                point = f"compared-{index}"
                _mark(axes, variant, names, point)
                titles[point] = _spoken(variant, content)
        if max(costs) / max(min(costs), 1e-12) > _LOG_FROM:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"cost [{content['currency']} per million output tokens]")
        on = f" on {content['text']}" if content["text"] else ""
        axes.set_ylabel(f"{_LABELS[content['measure']]}{on}")
        _plain(axes)
        used = sorted({v["run"] for v in shown})
        handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=4) for i in used]
        handles += [
            Line2D([], [], linestyle="", color=BASE, marker=_marker(names, name)) for name in names
        ]
        words = [content["runs"][i]["label"] for i in used] + names
        figure.legend(
            handles,
            [word.replace("$", r"\$") for word in words],
            loc="outside upper left",
            ncols=3,
            frameon=False,
            fontsize=9,
        )
        return render(
            figure,
            f"{content['sentence']} Lower left is better; the dashed line is the frontier: nothing "
            "measured is both cheaper and better, intervals aside. A colour per run, a mark per "
            "variant. Each run at the load where its baseline is cheapest; bars are 95% confidence "
            "intervals, of quality against the run's own baseline.",
            titles,
        )


def history_plot(content: Mapping[str, Any]) -> Plot | None:
    """Cost and perplexity change of every variant over the runs' dates; None unless all runs are of
    one recipe."""
    runs = content["runs"]
    if len({run["recipe"] for run in runs}) > 1 or len(runs) < 2:
        return None
    order = sorted(range(len(runs)), key=lambda index: runs[index]["created"])
    names = list(dict.fromkeys(v["name"] for v in content["variants"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, key, scale, label in (
            (panels[0], "cost_usd_per_mtok_output", 1, f"cost [{content['currency']}/Mtok output]"),
            (panels[1], "perplexity_change", 100, "perplexity change [%]"),
        ):
            for style, name in enumerate(names):
                _course(axes, content, order, name, style, key, scale)
            axes.set_xticks(
                range(len(order)),
                [runs[index]["created"][:16].replace("T", "\n") for index in order],
                fontsize=8,
            )
            axes.set_ylabel(label)
            _plain(axes)
        figure.legend(
            [Line2D([], [], **_style(style)) for style in range(len(names))],
            [name.replace("$", r"\$") for name in names],
            loc="outside upper left",
            ncols=4,
            frameon=False,
            fontsize=9,
        )
        return render(figure, _course_words(content, order))


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _course(
    axes: Axes,
    content: Mapping[str, Any],
    order: Sequence[int],
    name: str,
    style: int,
    key: str,
    scale: float,
) -> None:
    """One variant over the runs."""
    by_run = {v["run"]: v[key] for v in content["variants"] if v["name"] == name and v[key]}
    places = [place for place, index in enumerate(order) if index in by_run]
    found = [by_run[order[place]] for place in places]
    values = [one["value"] * scale for one in found]
    errors = [
        [
            0.0 if one[end] is None else max(0.0, abs(one[end] - one["value"]) * scale)
            for one in found
        ]
        for end in ("low", "high")
    ]
    axes.errorbar(places, values, yerr=errors, linewidth=1.2, capsize=3, **_style(style))


def _course_words(content: Mapping[str, Any], order: Sequence[int]) -> str:
    """What became of the costs from the first run to the last."""
    first, last = order[0], order[-1]
    costs = {
        (v["run"], v["name"]): v["cost_usd_per_mtok_output"]["value"]
        for v in content["variants"]
        if v["cost_usd_per_mtok_output"]
    }
    words = [
        f"{name} {figures.percent(costs[last, name] / costs[first, name] - 1, 0, signed=True)}"
        for run, name in costs
        if run == first and (last, name) in costs
    ]
    change = f"From the first run to the last costs changed: {', '.join(words)}. " if words else ""
    return (
        f"{change}Cost at each run's headline load and perplexity change on its worst text, by "
        "date; bars are 95% confidence intervals. Runs were measured at different times: where the "
        "machine or the price was another, that is in the table of runs."
    )


def _marker(names: Sequence[str], name: str) -> str:
    return MARKERS[names.index(name) % len(MARKERS)]


def _mark(axes: Axes, variant: Mapping[str, Any], names: Sequence[str], point: str) -> None:
    cost, quality = variant["cost_usd_per_mtok_output"], variant["quality"]
    bars = [
        None
        if one["low"] is None or one["high"] is None
        else [[max(0.0, one["value"] - one["low"])], [max(0.0, one["high"] - one["value"])]]
        for one in (cost, quality)
    ]
    drawn = axes.errorbar(
        cost["value"],
        quality["value"],
        xerr=bars[0],
        yerr=bars[1],
        linestyle="",
        color=COLOURS[variant["run"] % len(COLOURS)],
        marker=_marker(names, variant["name"]),
        markersize=8,
        elinewidth=1.4,
        capsize=3,
        zorder=3,
    )
    drawn.lines[0].set_gid(point)


def _plain(axes: Axes) -> None:
    axes.grid(True, color=GRID, linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _spoken(variant: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    cost = variant["cost_usd_per_mtok_output"]
    return (
        f"{variant['name']} of {content['runs'][variant['run']]['label']}: "
        f"{figures.measured(cost)} {content['currency']}/Mtok output ({figures.between(cost)}), "
        f"{figures.number(variant['quality']['value'], 4)} {_LABELS[content['measure']]}"
    )


def variants_table(content: Mapping[str, Any]) -> Table:
    """Every variant of every run."""
    quality = _LABELS.get(content["measure"] or "", "")
    if quality and content["text"]:
        quality += f" on {content['text']}"
    rows = []
    for v in content["variants"]:
        change = v["perplexity_change"] or {"value": None, "low": None, "high": None}
        ends = None if change["low"] is None else (change["low"], change["high"])
        rows.append(
            (
                v["name"],
                content["runs"][v["run"]]["label"],
                v["method"],
                "yes" if v["frontier"] else "no",
                figures.size(v["size_bytes"]),
                _with_bounds(v["quality"], 4),
                "reference"
                if v["is_baseline"]
                else _stack(figures.change(change["value"], ends), figures.change_interval(ends)),
                _with_bounds(v["throughput_tok_s"]),
                figures.number(v["tpot_p50_ms"]),
                _with_bounds(v["cost_usd_per_mtok_output"]),
                "1×"
                if v["is_baseline"] and v["cost_ratio"]
                else _stack(figures.ratio(v["cost_ratio"]), figures.between(v["cost_ratio"])),
            )
        )
    return Table(
        "Variants of all runs",
        (
            "Variant",
            "Run",
            "Method",
            "On the frontier",
            "Size on disk",
            quality[:1].upper() + quality[1:] or "Quality",
            "Perplexity change",
            "Output [tok/s]",
            "TPOT [ms]",
            f"Cost [{content['currency']}/Mtok output]",
            "Cost gain",
        ),
        tuple(rows),
        text_columns=4,
        note="Each run at its own headline load, where its baseline is cheapest. Perplexity change "
        "and cost gain are against the run's own baseline. Second lines are 95% confidence "
        "intervals.",
    )


def runs_table(content: Mapping[str, Any]) -> Table:
    """Where and when each run was made."""
    return Table(
        "Runs",
        ("Run", "Model", "Device", "Engine", "Date", "Recipe's SHA-256", "Load", "Verdict"),
        tuple(
            (
                run["label"],
                _stack(run["model"], run["revision"] or ""),
                run["device"] or figures.MISSING,
                run["engine"] or figures.MISSING,
                run["created"],
                (run["recipe_sha256"] or figures.MISSING)[:12],
                figures.MISSING
                if run["concurrency"] is None
                else f"concurrency {run['concurrency']}",
                run["sentence"],
            )
            for run in content["runs"]
        ),
        text_columns=8,
    )


def _stack(first: str, second: str) -> str:
    return f"{first}\n{second}" if second else first


def _with_bounds(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    return _stack(figures.measured(interval, digits), figures.between(interval, digits))


def write_comparison(content: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write ``index.html report.md comparison.json`` and the plots as .svg and .png.

    RunError when the directory cannot be written.
    """
    plots = {
        name: plot
        for name, plot in (
            ("frontier", frontier_plot(content)),
            ("history", history_plot(content)),
        )
        if plot
    }
    tables = [variants_table(content), runs_table(content)]
    title = f"Comparison of {len(content['runs'])} runs"
    parts = [f"# {title}", f"**{escape(content['sentence'])}**"]
    for name, plot in plots.items():
        parts += [f"![{name}]({name}.svg)", f"*{escape(plot.caption)}*"]
    for table in tables:
        parts += [f"## {escape(table.title)}", table_markdown(table)]
    page = render_page(
        "comparison.html.j2", title=title, plots=plots, content=content, tables=tables
    )
    contents: dict[str, bytes | None] = {
        "index.html": page.encode(),
        "report.md": ("\n\n".join(parts) + "\n").encode(),
        "comparison.json": (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    for name in ("frontier", "history"):
        contents[f"{name}.svg"] = plots[name].svg.encode() if name in plots else None
        contents[f"{name}.png"] = plots[name].png if name in plots else None
    return write_files(contents, directory)
