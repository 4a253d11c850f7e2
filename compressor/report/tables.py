"""The report's tables as headers and rows of text, shared by every output form."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from compressor.report import economics, estimate, figures, optimise, speculation, techniques
from compressor.report import quality as retained
from compressor.report.coverage import block_share, named
from compressor.report.table import Table
from compressor.report.verdict import row_at, worst_quality

_WORST = 5  # layers listed per variant


def method(variant: Mapping[str, Any]) -> str:
    """Algorithm, scheme and group size in words."""
    if variant["algorithm"] is None and variant["scheme"] is None:
        return "full precision" if variant["status"] == "ok" else figures.MISSING
    words = " ".join(str(part) for part in (variant["algorithm"], variant["scheme"]) if part)
    group = variant["group_size"]
    if group and group > 0:
        words += f", group {group}"
    mixed = variant.get("precision")
    return f"{words}, {figures.number(mixed['mean_bits'])} bits on average" if mixed else words


def served(report: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    """How a variant was served, where that is not how the baseline was; else empty."""
    baseline, own = (_baseline(report) or {}).get("serving"), variant["serving"]
    if own is None or baseline is None:
        return ""
    words = {
        "batching": f"{own['batching']} batching",
        "dtype": f"asked for {own['dtype']}",
        "flags": " ".join(own["flags"]) or "no flags",
        "variables": ", ".join(f"{key}={value}" for key, value in own["variables"].items())
        or "no variables",
    }
    return "; ".join(words[key] for key in words if own[key] != baseline[key])


def _stacked(first: str, second: str) -> str:
    return f"{first}\n{second}" if second else first


def _baseline(report: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((v for v in report["variants"] if v["name"] == report["baseline"]), None)


def summary(report: Mapping[str, Any]) -> Table:
    """One row per variant: size, worst quality, speed and cost at the headline concurrency."""
    concurrency, money = report["verdict"]["concurrency"], figures.currency(report)
    baseline = _baseline(report)
    base_size = baseline["size_bytes"] if baseline else None
    rows, marked = [], None
    for index, variant in enumerate(report["variants"]):
        is_baseline = variant["name"] == report["baseline"]
        if variant["name"] == report["verdict"]["best_variant"]:
            marked = index
        if variant["status"] != "ok":
            blanks = (figures.MISSING,) * 6
            rows.append((variant["name"], f"{method(variant)} (failed)", *blanks))
            continue
        quality = worst_quality(variant) or {}
        point = row_at(variant, concurrency) or {}
        size = variant["size_bytes"]
        share = ""
        if size and base_size and not is_baseline:
            share = f"{figures.percent(size / base_size, 0)} of baseline"
        cost, gain = point.get("cost_usd_per_mtok_output"), point.get("cost_ratio")
        speed = point.get("throughput_tok_s")
        rows.append(
            (
                variant["name"],
                _stacked(method(variant), served(report, variant)),
                _stacked(figures.size(size), share),
                "reference"
                if is_baseline and quality
                else _stacked(
                    figures.change(quality.get("perplexity_change"), quality.get("perplexity_ci")),
                    figures.change_interval(quality.get("perplexity_ci")),
                ),
                figures.percent(quality.get("top1_agreement"), 1),
                figures.measured(speed) if speed else figures.MISSING,
                figures.measured(cost) if cost else figures.MISSING,
                "1×"
                if is_baseline and gain
                else _stacked(figures.ratio(gain), figures.between(gain)),
            )
        )
    at = "" if concurrency is None else f" at concurrency {concurrency}"
    note = (
        "Perplexity change: on the text where it is worst. Top-1 agreement: share of positions "
        "where the most likely token is the baseline's. Cost gain: baseline cost / variant cost, "
        "above 1× is cheaper. Second lines are 95% confidence intervals."
    )
    if concurrency is not None:
        note += (
            f" Speed and cost{at}, where the baseline is cheapest; every measured point is in the "
            "table of speed and cost."
        )
    return Table(
        "Summary",
        (
            "Variant",
            "Method",
            "Size on disk",
            "Perplexity change",
            "Top-1 agreement",
            "Output [tok/s]",
            f"Cost [{money}/Mtok output]",
            "Cost gain",
        ),
        tuple(rows),
        text_columns=2,
        note=note,
        marked=marked,
    )


def quality(report: Mapping[str, Any]) -> Table:
    """Every variant on every text."""
    rows = [
        (
            variant["name"],
            row["text"],
            figures.count(row["tokens"]),
            figures.number(row["perplexity"], 5),
            "reference"
            if variant["name"] == report["baseline"]
            else _stacked(
                figures.change(row["perplexity_change"], row["perplexity_ci"]),
                figures.change_interval(row["perplexity_ci"]),
            ),
            figures.number(row["bits_per_byte"], 4),
            figures.number(row["kl_mean"]),
            figures.number(row["kl_p99"]),
            figures.percent(row["top1_agreement"], 1),
        )
        for variant in report["variants"]
        for row in variant["quality"]
    ]
    return Table(
        "Quality on held-out text",
        (
            "Variant",
            "Text",
            "Tokens",
            "Perplexity",
            "Change",
            "Bits per byte",
            "KL mean [nats/token]",
            "KL p99 [nats/token]",
            "Top-1 agreement",
        ),
        tuple(rows),
        text_columns=2,
        note="KL divergence and top-1 agreement compare the variant's next-token distribution with "
        "the baseline's at every position.",
    )


def _p(values: Mapping[str, Any]) -> str:
    return " / ".join(figures.number(values[key]) for key in ("p50", "p90", "p99"))


def performance(report: Mapping[str, Any]) -> Table:
    """Every variant at every concurrency."""
    rows, money = [], figures.currency(report)
    for variant in report["variants"]:
        for row in variant["performance"]:
            cost, gain = row["cost_usd_per_mtok_output"], row["cost_ratio"]
            rows.append(
                (
                    f"{variant['name']}\n{row['kernel']}, {row['dtype']}",
                    figures.load(row).removeprefix("concurrency "),
                    str(row["requests"]),
                    _stacked(
                        figures.measured(row["throughput_tok_s"]),
                        figures.between(row["throughput_tok_s"]),
                    ),
                    figures.number(row["prefill_tok_s"]),
                    figures.number(row["decode_tok_s"]),
                    _p(row["ttft_ms"]),
                    _p(row["tpot_ms"]),
                    _stacked(figures.measured(cost), figures.between(cost))
                    if cost
                    else figures.MISSING,
                    "1×"
                    if variant["name"] == report["baseline"] and gain
                    else _stacked(figures.ratio(gain), figures.between(gain)),
                )
            )
    note = (
        "Output: output tokens per second of the whole request window, prefill included. TTFT: "
        "time to first token; TPOT: time per output token after the first; both as p50 / p90 / p99 "
        "over requests. Second lines are 95% confidence intervals over rounds; the cost gain is "
        "paired by round."
    )
    goal = (report["workload"] or {}).get("goal") or {}
    limits = [
        f"{name.split('_')[0].upper()} {figures.number(goal[name])} ms"
        for name in ("ttft_ms", "tpot_ms")
        if goal.get(name) is not None
    ]
    if limits:
        note += f" Costs count only requests within {' and '.join(limits)}."
    return Table(
        "Speed and cost",
        (
            "Variant, kernel, dtype",
            "Concur\u00adrency",
            "Requests",
            "Output [tok/s]",
            "Prefill [prompt tok/s]",
            "Decode [tok/s]",
            "TTFT [ms]",
            "TPOT [ms]",
            f"Cost [{money}/Mtok output]",
            "Cost gain",
        ),
        tuple(rows),
        note=note,
    )


def latency(report: Mapping[str, Any]) -> Table:
    """Every latency of every variant at every point, and how sound the load was."""
    rows = []
    for variant in report["variants"]:
        for row in variant["performance"]:
            if not row.get("end_to_end_ms"):
                continue
            steady = row["steady"]
            rows.append(
                (
                    variant["name"],
                    figures.load(row),
                    _p(row["ttft_ms"]),
                    _p(row["itl_ms"]),
                    _p(row["end_to_end_ms"]),
                    figures.percent(row["error_rate"], 1),
                    figures.percent(row["goal_met_share"], 1),
                    f"{steady['rounds']} of {steady['of']}" if steady else figures.MISSING,
                )
            )
    return Table(
        "Latency",
        (
            "Variant",
            "Load",
            "TTFT [ms]",
            "ITL [ms]",
            "End to end [ms]",
            "Failed",
            "Within the goals",
            "Steady rounds",
        ),
        tuple(rows),
        text_columns=2,
        note="p50 / p90 / p99 over requests answered. ITL: between one token and the next. "
        "Steady: rounds in which output rate and time to first token had no trend once ramp-up "
        "and ramp-down are set aside; rounds of few requests cannot show it. Figures count all "
        "requests.",
    )


def costs(report: Mapping[str, Any]) -> Table:
    """The cost ledger: each component, then the cost per million tokens."""
    names = ("accelerator", "host", "energy", "storage", "network")
    money = figures.currency(report)
    rows = [
        (
            variant["name"],
            figures.load(row).removeprefix("concurrency "),
            *(figures.number(row["components_usd_per_hour"].get(name), 4) for name in names),
            figures.number(sum(row["components_usd_per_hour"].values()), 4),
            figures.number(row["cost_usd_per_mtok_prefill"]),
            figures.number(row["cost_usd_per_mtok_decode"]),
            figures.number(row["cost_usd_per_mtok_output"]["value"])
            if row["cost_usd_per_mtok_output"]
            else figures.MISSING,
        )
        for variant in report["variants"]
        for row in variant["performance"]
    ]
    return Table(
        "Cost ledger",
        (
            "Variant",
            "Concurrency",
            f"Accelerator [{money}/h]",
            f"Host [{money}/h]",
            f"Energy [{money}/h]",
            f"Storage [{money}/h]",
            f"Network [{money}/h]",
            f"Total [{money}/h]",
            f"Prefill alone [{money}/Mtok input]",
            f"Decode alone [{money}/Mtok output]",
            f"Whole request [{money}/Mtok output]",
        ),
        tuple(rows),
        note="Cost per million tokens = total per hour / (tokens per second x 3600 / 1e6) / "
        "utilisation. On a CPU the accelerator is the instance.",
    )


def quantization(report: Mapping[str, Any]) -> Table:
    """How each variant was quantized and how far its layers' outputs moved."""
    rows = []
    for variant in report["variants"]:
        facts, coverage = variant["quantization"], variant["coverage"]
        if facts is None and (coverage is None or not coverage["quantized_parameters"]):
            continue
        layers = [row for row in (facts or {}).get("layers", []) if row["error"] is not None]
        paired = [row for row in layers if row["rtn_error"]]
        worst = max(layers, key=lambda row: row["error"], default=None)
        rows.append(
            (
                variant["name"],
                method(variant),
                figures.percent(coverage["share"], 1) if coverage else figures.MISSING,
                str(len((facts or {}).get("layers", []))),
                figures.number(sum(row["error"] for row in layers) / len(layers))
                if layers
                else figures.MISSING,
                figures.percent(
                    sum(row["error"] / row["rtn_error"] for row in paired) / len(paired),
                    0,
                )
                if paired
                else figures.MISSING,
                f"{figures.number(worst['error'])}\n{worst['name']}" if worst else figures.MISSING,
                str(sum(row["fallback"] for row in (facts or {}).get("layers", []))),
                figures.seconds((facts or {}).get("seconds")),
                figures.size((facts or {}).get("peak_rss_bytes")),
            )
        )
    return Table(
        "Quantization",
        (
            "Variant",
            "Method",
            "Parameters quantized",
            "Layers",
            "Mean layer error",
            "Error / RTN's",
            "Worst layer error",
            "Fell back to RTN",
            "Time",
            "Peak memory",
        ),
        tuple(rows),
        text_columns=2,
        note="Layer error: squared change of the layer's output on the calibration data / squared "
        "output. Error / RTN's: mean over layers against plain rounding on the same grid.",
    )


def worst_layers(report: Mapping[str, Any]) -> Table:
    """The layers of each variant that moved most, and those that fell back."""
    rows = []
    for variant in report["variants"]:
        layers = [
            row
            for row in (variant["quantization"] or {}).get("layers", [])
            if row["error"] is not None
        ]
        worst = sorted(layers, key=lambda row: -row["error"])[:_WORST]
        listed = worst + [row for row in layers if row["fallback"] and row not in worst]
        rows += [
            (
                variant["name"],
                row["name"],
                row["scheme"] or figures.MISSING,
                figures.number(row["error"]),
                figures.number(row["rtn_error"]),
                "yes" if row["fallback"] else "no",
                figures.count(row["tokens"]),
            )
            for row in listed
        ]
    return Table(
        "Worst layers",
        ("Variant", "Layer", "Scheme", "Error", "RTN's error", "Fell back to RTN", "Tokens seen"),
        tuple(rows),
        text_columns=3,
        note=f"The {_WORST} layers of each variant whose output moved most, and every layer that "
        "went back to plain rounding because its algorithm did worse.",
    )


def experts(report: Mapping[str, Any]) -> Table:
    """How many calibration tokens the experts of each mixture saw."""
    rows = []
    for variant in report["variants"]:
        seen: dict[str, list[dict[str, Any]]] = {}
        for row in (variant["quantization"] or {}).get("layers", []):
            mixture, found, _ = row["name"].partition(".experts.")
            if found and row["tokens"] is not None:
                seen.setdefault(mixture, []).append(row)
        for mixture, layers in seen.items():
            tokens = [row["tokens"] for row in layers]
            rows.append(
                (
                    variant["name"],
                    mixture,
                    figures.count(min(tokens)),
                    figures.count(round(statistics.median(tokens))),
                    figures.count(max(tokens)),
                    f"{sum(row['undersampled'] for row in layers)} of {len(layers)}",
                )
            )
    return Table(
        "Experts",
        ("Variant", "Mixture", "Fewest tokens", "Median", "Most", "Linears with too few"),
        tuple(rows),
        text_columns=2,
        note="Calibration tokens that the experts' linears saw. Those with too few were rounded to "
        "nearest; more samples, or `all_experts` in the recipe, calibrate them.",
    )


def coverage(report: Mapping[str, Any]) -> Table:
    """How much of each variant was really quantized, and what its bytes are made of."""
    rows = []
    for variant in report["variants"]:
        facts = variant["coverage"]
        sizes = next((a["tensors"] for a in variant["artifacts"] if a["tensors"]), None)
        if facts is None and sizes is None:
            continue
        share = block_share(variant)
        stored = (sizes or {}).get("bytes_by_scheme", {})
        whole = sum(stored.values())
        rows.append(
            (
                variant["name"],
                ", ".join(f"{name} {figures.percent(s / whole, 1)}" for name, s in stored.items())
                or figures.MISSING,
                figures.percent(facts["share"], 1) if facts else figures.MISSING,
                figures.percent(share, 1),
                str(len(facts["skipped"])) if facts else figures.MISSING,
            )
        )
    return Table(
        "Coverage",
        ("Variant", "Bytes of the weights", "Of all parameters", "Of the blocks'", "Layers left"),
        tuple(rows),
        text_columns=2,
        note="Bytes by scheme (codes, scales and zero points), or by dtype where they are not "
        "quantized. The other columns: share of parameters that was quantized, of the whole model "
        "and of the decoder blocks' matrices, and layers left in full precision.",
    )


def tensors(report: Mapping[str, Any]) -> Table:
    """Tensors that the artifact and the source do not share, and those that no code reads."""
    rows = []
    for variant in report["variants"]:
        for artifact in variant["artifacts"]:
            ledger = artifact["tensors"] or {}
            for key, what in (
                ("missing", "missing from the artifact"),
                ("added", "not in the source"),
                ("unread", "carried over, read by no modelling code"),
            ):
                if found := ledger.get(key):
                    rows.append(
                        (variant["name"], artifact["format"], what, named(found), str(len(found)))
                    )
    return Table(
        "Tensors against the source",
        ("Variant", "Format", "What", "Tensors", "Count"),
        tuple(rows),
        text_columns=4,
        note="Every other tensor of the source is in the artifact as it was, or as the codes of a "
        "quantized layer. All names are in report.json.",
    )


def verified(artifact: Mapping[str, Any]) -> str:
    """What loaded an artifact and computed from it what was evaluated."""
    found = artifact.get("verification")
    if found is None or not found["verified"]:
        return "unverified" + (f": {found['why']}" if found and found["why"] else "")
    return (
        f"{found['consumer']} {found['version'] or ''}: "
        f"{figures.percent(found['greedy_agreement'], 0)} of greedy tokens, logits within "
        f"{found['max_logit_difference']:.2g}"
    )


def artifacts(report: Mapping[str, Any]) -> Table:
    """The exported directories."""
    rows = [
        (
            variant["name"],
            artifact["format"],
            artifact["path"],
            artifact["sha256"] or figures.MISSING,
            verified(artifact),
            figures.size(artifact["size_bytes"]),
        )
        for variant in report["variants"]
        for artifact in variant["artifacts"]
    ]
    return Table(
        "Artifacts",
        ("Variant", "Format", "Path in the run", "SHA-256", "Verified by", "Size"),
        tuple(rows),
        text_columns=5,
    )


def skipped(report: Mapping[str, Any]) -> Table:
    """Layers left in full precision, grouped by variant and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for variant in report["variants"]:
        for row in (variant["coverage"] or {}).get("skipped", []):
            groups.setdefault((variant["name"], row["reason"]), []).append(row["name"])
    rows = [
        (
            name,
            reason,
            ", ".join(layers[:4]) + (" …" if len(layers) > 4 else ""),
            str(len(layers)),
        )
        for (name, reason), layers in groups.items()
    ]
    return Table(
        "Left in full precision",
        ("Variant", "Reason", "Layers", "Count"),
        tuple(rows),
        text_columns=3,
    )


def stages(report: Mapping[str, Any]) -> Table:
    """What the run did and how long it took."""
    rows = [
        (
            row["name"],
            row["variant"] or figures.MISSING,
            "from the store" if row["cached"] else "done",
            (row["key"] or figures.MISSING)[:12],
            figures.seconds(row["seconds"]),
            figures.size(row["peak_rss_bytes"]),
        )
        for row in report["stages"]
    ]
    return Table(
        "Stages",
        ("Stage", "Variant", "State", "Key", "Time", "Peak memory"),
        tuple(rows),
        text_columns=4,
    )


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return figures.MISSING if value is None else str(value)


def facts(title: str, values: Mapping[str, Any] | None, *, drop: tuple[str, ...] = ()) -> Table:
    """A two-column table of plain facts."""
    rows = [
        (key.replace("_", " "), _plain(value))
        for key, value in (values or {}).items()
        if key not in drop and value not in (None, "", [], {})
    ]
    return Table(title, ("What", "Value"), tuple(rows), text_columns=2)


def provenance(report: Mapping[str, Any]) -> list[Table]:
    """Everything needed to know how the figures came about, empty tables left out."""
    recipe = report["recipe"]
    run = {
        "recipe": recipe["name"],
        "recipe_sha256": recipe["sha256"],
        "command": report["command"],
        "created": report["created"],
        "compressor_version": report["compressor_version"],
    }
    model = dict(report["model"])
    model["size_bytes"] = figures.size(model["size_bytes"])
    if model["parameters"] is not None:
        model["parameters"] = f"{model['parameters']:,}"
    workload = report["workload"]
    samples = {
        name: f"{row['path']}, {row['requests']} requests, SHA-256 {row['sha256']}"
        for name, row in ((workload or {}).get("samples") or {}).items()
    }
    tables = [
        facts("Run", run),
        facts("Model", {("size" if k == "size_bytes" else k): v for k, v in model.items()}),
        facts("Calibration", report["calibration"]),
        facts("Workload", workload, drop=("engines", "samples", "probes")),
        facts("Prices", report["prices"], drop=("assumptions",)),
        facts("Raw samples", samples),
        facts("Environment", report["environment"]),
    ]
    for name, engine in ((workload or {}).get("engines") or {}).items():
        probe = ((workload or {}).get("probes") or {}).get(name, {})
        tried = {
            "tried_tok_s": probe.get("tokens_per_second"),
            "did_not_run": probe.get("failed"),
        }
        tables.append(facts(f"Engine of {name}", {**engine, **tried}))
    return [table for table in tables if table.rows]


def body(report: Mapping[str, Any]) -> list[Table]:
    """The detail tables in reading order, empty ones left out."""
    tables = [
        *optimise.tables(report),
        quality(report),
        *retained.tables(report),
        performance(report),
        techniques.table(report),
        costs(report),
        latency(report),
        estimate.report_table(report),
        *economics.tables(report),
        *speculation.tables(report),
        quantization(report),
        worst_layers(report),
        experts(report),
        coverage(report),
        skipped(report),
        tensors(report),
        artifacts(report),
        stages(report),
    ]
    return [table for table in tables if table.rows]
