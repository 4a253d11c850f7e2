"""Estimates, and their comparison with measured points, for the terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from compressor.errors import RunError
from compressor.measure import roofline
from compressor.measure.devices import Device
from compressor.models.dimensions import Dimensions
from compressor.report.figures import count, number, percent, size
from compressor.report.table import Table as ReportTable

_FIX = "give a run whose recipe has a measure section, of an engine on this machine"


def report_estimates(
    report: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The report's ``estimates``: every measured point beside its estimate.

    Args:
        report: with the variants' performance.
        measured: the ledger; its ``device`` and ``dimensions`` are what estimates are made from.

    Returns None where the ledger has neither, or the baseline no point that can be compared.
    """
    if not measured.get("device") or not measured.get("dimensions"):
        return None
    made = roofline.compare(
        report,
        Device.from_dict(measured["device"]),
        Dimensions.from_dict(measured["dimensions"]),
    )
    return made.to_dict() if made else None


def compare_run(run_dir: Path, device: Device | None = None) -> roofline.Comparison:
    """A run's measured points against estimates.

    Args:
        run_dir: of a run with a measurement.
        device: instead of the one that the run recorded.

    Raises RunError when the run holds no measured points, or does not say what it ran on.
    """
    from compressor.record import LEDGER, read_json
    from compressor.report.read import read_report

    report = read_report(run_dir / "report" / "report.json")
    if not any(variant["performance"] for variant in report["variants"]):
        raise RunError("the run holds no measured points", where=str(run_dir), fix=_FIX)
    ledger = read_json(run_dir, LEDGER)
    if not ledger.get("device") or not ledger.get("dimensions"):
        raise RunError("the run does not say what it ran on", where=str(run_dir), fix=_FIX)
    device = device or Device.from_dict(ledger["device"])
    made = roofline.compare(report, device, Dimensions.from_dict(ledger["dimensions"]))
    if made is None:
        raise RunError("its baseline has no point of a closed loop", where=str(run_dir), fix=_FIX)
    return made


def estimate_table(made: Mapping[str, Any]) -> Table:
    """One line per batch."""
    table = Table(
        title=f"estimate: {made['model']}, {made['scheme']}, {made['device']['label']}, "
        f"{made['input_length']} + {made['output_length']} tokens"
    )
    for column in ("batch", "TTFT ms", "TPOT ms", "output tok/s", "USD/Mtok", "decoding bound by"):
        table.add_column(column, justify="right")
    for point in made["points"]:
        table.add_row(
            count(point["batch"]) + ("" if point["fits"] else " (does not fit)"),
            number(point["ttft_ms"]),
            number(point["tpot_ms"]),
            number(point["tok_s"]),
            number(point["cost_usd_per_mtok_output"]),
            point["bound"],
        )
    return table


def facts(made: Mapping[str, Any]) -> list[str]:
    """What belongs under the table, a sentence a line."""
    active = made["active_parameters"]
    found = [
        f"{made['parameters'] / 1e9:.3g}B parameters, {active / 1e9:.3g}B at work for one token; "
        f"weights {size(made['weight_bytes'])}, cache of one request "
        f"{size(made['kv_bytes_per_sequence'])} ({made['kv_cache']})."
    ]
    if made["max_batch"] is not None:
        found.append(
            f"At most {count(made['max_batch'])} requests at once fit into "
            f"{percent(made['memory_share'], 0)} of {size(made['device']['memory_bytes'])}."
        )
    crossing = made["crossover_batch"]
    found.append(
        "Decoding is bound by memory at any batch."
        if crossing is None
        else f"Decoding is bound by compute from a batch of {count(crossing)} on."
    )
    reached = made["efficiency"]
    if reached == {"decode": 1.0, "prefill": 1.0}:
        found.append("Estimate, efficiency 1: an upper bound of speed; real engines are slower.")
    else:
        found.append(
            f"Estimate, efficiency {number(reached['decode'])} decoding, "
            f"{number(reached['prefill'])} prefill, as the run's baseline reached."
        )
    again = made["device"]["command"]
    found.append(f"Device: {made['device']['source']}{f' ({again})' if again else ''}.")
    return found


def comparison_table(compared: Mapping[str, Any]) -> Table:
    """Predicted against measured."""
    table = Table(title="estimate against measurement (efficiency from the baseline's points)")
    table.add_column("variant")
    table.add_column("requests at once", justify="right")
    for name in ("TTFT ms", "TPOT ms", "tok/s"):
        for column in (f"{name} predicted", "measured", "error"):
            table.add_column(column, justify="right")
    for row in compared["rows"]:
        cells = [row["variant"], count(row["concurrency"])]
        for key in ("ttft_ms", "tpot_ms", "tok_s"):
            cells += [number(row[f"predicted_{key}"]), number(row[f"measured_{key}"])]
            cells.append(percent(row[f"{key}_error"], 0, signed=True))
        table.add_row(*cells)
    error = compared["median_tpot_error"]
    if error is not None:
        table.caption = f"median error of TPOT, candidates: {percent(error, 0)}"
    return table


def report_table(report: Mapping[str, Any]) -> ReportTable:
    """Every measured point beside its estimate; no rows where nothing was estimated."""
    made = report["estimates"]
    rows = []
    for row in made["rows"] if made else ():
        cells = [row["variant"], str(row["concurrency"])]
        for key in ("ttft_ms", "tpot_ms", "tok_s"):
            cells += [number(row[f"predicted_{key}"]), number(row[f"measured_{key}"])]
            cells.append(percent(row[f"{key}_error"], 0, signed=True))
        rows.append((*cells, number(row["bound_tpot_ms"]), row["bound"]))
    return ReportTable(
        "Estimates beside the measurement",
        (
            "Variant",
            "Concurrency",
            "TTFT [ms] estimated",
            "measured",
            "error",
            "TPOT [ms] estimated",
            "measured",
            "error",
            "Output [tok/s] estimated",
            "measured",
            "error",
            "TPOT bound [ms]",
            "Decoding bound by",
        ),
        tuple(rows),
        note=_explained(made) if made else "",
    )


def _explained(made: Mapping[str, Any]) -> str:
    device, reached = made["device"], made["efficiency"]
    peaks = ", ".join(f"{name} {number(rate / 1e12)}" for name, rate in device["peak"].items())
    words = (
        "An estimate is a roofline's bound (docs/estimate.md) / the efficiency that the baseline "
        f"reached: {number(reached['decode'])} decoding, {number(reached['prefill'])} prefill, the "
        "median over its points. The baseline's own errors are its spread; those of the others are "
        "what an estimate made before compressing would have been off by."
    )
    if made["median_tpot_error"] is not None:
        words += f" Theirs of TPOT: {percent(made['median_tpot_error'], 0)} in the median."
    words += (
        f" Device: {device['label']}, reads {number(device['bandwidth'] / 1e9)} GB/s, peaks "
        f"[TFLOPS or TOPS] {peaks}; {device['source']}"
    )
    return words + (f" ({device['command']})." if device["command"] else ".")
