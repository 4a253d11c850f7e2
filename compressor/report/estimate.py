"""Estimates and their comparison with measured points, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from compressor.report.figures import count, number, percent, size


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
    found.append(f"Device: {made['device']['source']}.")
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
