"""The raw samples in short, as a report keeps them for its what-if panel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from compressor.measure import metrics
from compressor.measure.engines.base import RequestSample
from compressor.measure.samples import read_samples

_DIGITS = 3  # of a latency in ms


def add_samples(performance: Iterable[dict[str, Any]], samples: Sequence[RequestSample]) -> None:
    """Fill ``samples`` of a variant's performance rows, in place; those without samples are left
    as they are.

    Args:
        performance: rows as in `model.Performance`.
        samples: of the variant, all points and parts.
    """
    points: dict[tuple[int, float | None], list[RequestSample]] = {}
    for sample in samples:
        if not sample.part:
            points.setdefault((sample.concurrency, sample.rate_per_s), []).append(sample)
    for row in performance:
        if found := points.get((row["concurrency"], row.get("rate_per_s"))):
            row["samples"] = shortened(found)


def shortened(samples: Sequence[RequestSample]) -> dict[str, Any]:
    """The samples of one point as `model.RequestSamples`; latencies [ms] to the microsecond."""
    rounds = metrics.by_round(samples)
    rows = [(turn, sample) for turn, group in enumerate(rounds.values()) for sample in group]
    return {
        "round": [turn for turn, _ in rows],
        "ttft_ms": [_finite(metrics.ttft_ms(sample)) for _, sample in rows],
        "tpot_ms": [_finite(metrics.tpot_ms(sample)) for _, sample in rows],
        "output_tokens": [0 if sample.error else sample.output_tokens for _, sample in rows],
        "round_seconds": [metrics.window_seconds(group) for group in rounds.values()],
    }


def add_from_run(report: dict[str, Any], run_dir: Path) -> None:
    """`add_samples` for every variant of a report whose raw samples lie in the run's directory.

    Raises RunError when a file of samples cannot be read.
    """
    listed = (report["workload"] or {}).get("samples") or {}
    for variant in report["variants"]:
        row = listed.get(variant["name"])
        if row and (path := run_dir / row["path"]).is_file():
            add_samples(variant["performance"], read_samples(path))


def _finite(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None
