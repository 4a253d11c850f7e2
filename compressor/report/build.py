"""Assemble the report dict from the stages' results and check it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.measure import scenarios
from compressor.measure.engines.base import RequestSample
from compressor.report.estimate import report_estimates
from compressor.report.model import SCHEMA_VERSION
from compressor.report.read import validate_report
from compressor.report.samples import add_samples
from compressor.report.verdict import (
    QUALITY_LIMIT,
    headline_concurrency,
    make_verdict,
    row_at,
)


def _fill_changes(variants: Sequence[dict[str, Any]], baseline: str) -> None:
    """Perplexity change against the baseline on the same text, where the caller left it out."""
    reference = {
        row["text"]: row["perplexity"]
        for variant in variants
        if variant["name"] == baseline
        for row in variant.get("quality", [])
    }
    for variant in variants:
        for row in variant.get("quality", []):
            if row.get("perplexity_change") is None and row["text"] in reference:
                row["perplexity_change"] = row["perplexity"] / reference[row["text"]] - 1


def build_report(
    *,
    recipe: Mapping[str, Any],
    created: str,
    compressor_version: str,
    command: str,
    environment: Mapping[str, Any],
    model: Mapping[str, Any],
    variants: Sequence[Mapping[str, Any]],
    calibration: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    samples: Mapping[str, Sequence[RequestSample]] | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    record: Mapping[str, str] | None = None,
    optimise: Mapping[str, Any] | None = None,
    baseline: str = "baseline",
    title: str | None = None,
    quality_limit: float = QUALITY_LIMIT,
) -> dict[str, Any]:
    """The checked report dict (see `model.ReportModel`), ready for `write.write_report`.

    Args:
        variants: baseline first; dicts as in `model.Variant`, without `performance`.
        measured: result of `measure.runner.measure`; its rows are put into the variants, and a
            variant that failed there keeps its quality figures and gets a note.
        samples: raw samples by variant, for what the page computes itself.
        created: ISO 8601 time.
        record: SHA-256 by name of the files that all this was read from.
        optimise: content of ``optimise.json`` where a search chose the variants.
        quality_limit: perplexity growth that the verdict accepts as equal quality.

    Raises RunError naming each key at fault.
    """
    rows = [copy.deepcopy(dict(variant)) for variant in variants]
    all_notes = list(notes)
    if measured:
        for row in rows:
            row["serving"] = copy.deepcopy(measured.get("serving", {}).get(row["name"]))
            row["performance"] = copy.deepcopy(measured["performance"].get(row["name"], []))
            add_samples(row["performance"], (samples or {}).get(row["name"], ()))
            row["split"] = copy.deepcopy(measured.get("split", {}).get(row["name"], []))
            if row.get("speculation"):
                row["speculation"]["served"] = _served(measured["loads"], row["name"])
        all_notes += measured["notes"]
        all_notes += [
            f"{name} could not be measured: {message}"
            for name, message in sorted(measured["errors"].items())
        ]
    _fill_changes(rows, baseline)
    name = recipe["name"]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "title": title or f"{name}: quality and cost of compression",
        "created": created,
        "compressor_version": compressor_version,
        "command": command,
        "recipe": dict(recipe),
        "environment": dict(environment),
        "model": dict(model),
        "calibration": dict(calibration) if calibration else None,
        "baseline": baseline,
        "variants": rows,
        "verdict": {
            "outcome": "unmeasured",
            "sentence": "",
            "details": [],
            "best_variant": None,
            "concurrency": None,
            "quality_limit": quality_limit,
        },
        "prices": dict(measured["prices"]) if measured else None,
        "workload": _workload(measured) if measured else None,
        "economics": copy.deepcopy(measured["economics"]) if measured else {},
        "techniques": copy.deepcopy(measured.get("techniques", [])) if measured else [],
        "stages": [dict(stage) for stage in stages],
        "notes": all_notes,
        "record": dict(record or {}),
        "optimise": dict(optimise) if optimise else None,
    }
    report = validate_report(report)
    _fill_break_even(report)
    if measured:
        report["estimates"] = report_estimates(report, measured)
    report["verdict"] = make_verdict(report, quality_limit)
    return validate_report(report)


def _served(loads: Sequence[Mapping[str, Any]], variant: str) -> list[dict[str, Any]]:
    """What the engine counted of a variant's drafts, by point of the load, all rounds together."""
    from compressor.speculate.acceptance import Acceptance

    points: dict[tuple[int, float | None], list[Mapping[str, Any]]] = {}
    for load in loads:
        if load["variant"] == variant and not load["part"] and load.get("drafted"):
            key = (load["concurrency"], load["rate_per_s"])
            points.setdefault(key, []).append(load["drafted"])
    rows = []
    for (concurrency, rate), counts in points.items():
        found = Acceptance.total(counts)
        if found.drafts:
            rows.append(
                {
                    "concurrency": concurrency,
                    "rate_per_s": rate,
                    "drafts": found.drafts,
                    "tokens_per_draft": found.mean_length,
                    "rate": found.rate,
                    "accepted_by_position": found.rates_by_position,
                }
            )
    return rows


# Kinds of stages whose time a variant has to pay back.
_PAID_BACK = ("quantize", "corpus", "features", "speculate", "joint", "quantize-draft", "export")


def _fill_break_even(report: dict[str, Any]) -> None:
    """Where both costs are known: when the variant's own stages have paid for themselves."""
    point = headline_concurrency(report)
    rows = {variant["name"]: row_at(variant, point) for variant in report["variants"]}
    first = rows.get(report["baseline"])
    prices = report["prices"]
    if first is None or prices is None or not first["components_usd_per_hour"]:
        return
    for variant in report["variants"]:
        row = rows[variant["name"]]
        if variant["name"] == report["baseline"] or row is None:
            continue
        own = [
            stage["seconds"]
            for stage in report["stages"]
            if stage["variant"] == variant["name"] and stage["kind"] in _PAID_BACK
        ]
        if (
            variant["quantization"] is None
            or not own
            or None in own
            or not row["cost_usd_per_mtok_output"]
        ):
            continue
        variant["break_even"] = scenarios.break_even(
            run_seconds=sum(own),
            run_usd_per_hour=sum(first["components_usd_per_hour"].values()),
            baseline_usd_per_mtok=first["cost_usd_per_mtok_output"]["value"],
            variant_usd_per_mtok=row["cost_usd_per_mtok_output"]["value"],
            tokens_per_second=row["goodput_tok_s"]["value"],
            utilisation=prices["utilisation"],
            currency=prices["currency"],
        ).to_dict()


def _workload(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **measured["workload"],
        "probes": measured["probes"],
        "engines": measured["engines"],
        "samples": measured["samples"],
        "seconds": measured["seconds"],
    }
