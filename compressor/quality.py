"""What a run's directory says of quality: the table of what each variant kept, and the gate.

Both follow from the samples of the tasks and the figures of the evaluation, and are made anew each
time: `compressor.verify` makes them again. ``gate.json`` is for those who act on a run without
reading its report, such as a publisher (`gate_refusals`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from compressor.evaluate import gate
from compressor.evaluate.options import Gate
from compressor.store import write_atomic

if TYPE_CHECKING:
    from compressor.evaluate.retained import TaskResult

GATE = "gate.json"
TASKS = "tasks"  # directory of samples, by variant
DRIFT = "drift"  # directory of continuations, one file a variant
_EXAMPLES = 3  # prompts whose continuations are shown


def task_results(
    run_dir: Path, stages: Sequence[Mapping[str, Any]], variant: str
) -> list[TaskResult]:
    """A variant's tasks with the samples of every document; none where it was given none.

    Raises RunError when samples cannot be read.
    """
    from compressor.evaluate.retained import TaskResult
    from compressor.evaluate.samples import read_samples

    return [
        TaskResult(
            task["task"],
            task["axis"],
            task["main_metric"],
            read_samples(run_dir / TASKS / variant / PurePosixPath(task["file"]).name),
        )
        for stage in stages
        if stage["kind"] == "tasks" and stage["variant"] == variant
        for task in stage["result"]["tasks"]
    ]


def judged_variants(
    run_dir: Path,
    variants: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    tolerance: float,
    settings: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """The report's variants with ``retained``, the drift's examples and ``gate`` filled in.

    Args:
        run_dir: the run's directory.
        variants: the baseline first, with the figures of their evaluation.
        stages: content of ``stages.json``.
        tolerance: a loss that counts as none.
        settings: the recipe's gate, if it has one.
    """
    from compressor.evaluate.retained import retained_quality

    baseline = variants[0]
    reference = task_results(run_dir, stages, baseline["name"])
    limits = Gate.model_validate(settings) if settings else None
    made = [dict(baseline)]
    for variant in variants[1:]:
        row = dict(variant)
        made.append(row)
        if row["status"] != "ok":
            continue
        row["retained"] = retained_quality(
            task_results(run_dir, stages, row["name"]),
            reference,
            row["quality"],
            baseline["quality"],
            tolerance,
        )
        if row["drift"]:
            examples = _examples(run_dir, baseline["name"], row["name"], row["drift"])
            row["drift"] = {**row["drift"], "examples": examples}
        if limits is not None:
            row["gate"] = gate.judge(limits.limits, limits.decide_on, row)
    return made


def _examples(
    run_dir: Path, baseline: str, variant: str, figures: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The first prompts with what both made of them."""
    from compressor.evaluate.drift import read_continuations

    before, after = (
        read_continuations(run_dir / DRIFT / f"{name}.jsonl")[:_EXAMPLES]
        for name in (baseline, variant)
    )
    return [
        {
            "prompt": old.prompt,
            "baseline": old.text,
            "variant": new.text,
            "first_difference": place,
        }
        for old, new, place in zip(before, after, figures["first_difference"], strict=False)
    ]


def gate_record(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Content of ``gate.json``: by variant whether it passed, every limit that it did not keep in
    words, and where its artifacts lie; None where the recipe sets no limits.

    A variant that could not be made has not passed.
    """
    from compressor.report.quality import limit_words

    if all(variant["gate"] is None for variant in report["variants"]):
        return None
    found = {}
    for variant in report["variants"]:
        if variant["name"] == report["baseline"]:
            continue
        outcome = variant["gate"]
        if outcome is None:
            passed, failed = False, [f"it could not be made: {variant['error']}"]
        else:
            passed = outcome["passed"]
            failed = [limit_words(limit) for limit in outcome["limits"] if not limit["passed"]]
        found[variant["name"]] = {
            "passed": passed,
            "failed": failed,
            "artifacts": [artifact["path"] for artifact in variant["artifacts"]],
        }
    return {"variants": found}


def write_gate(run_dir: Path, report: Mapping[str, Any]) -> None:
    """Write ``gate.json``, or remove that of an earlier recipe which set limits."""
    record = gate_record(report)
    if record is None:
        (run_dir / GATE).unlink(missing_ok=True)
    else:
        write_atomic(run_dir / GATE, json.dumps(record, indent=1) + "\n")


def gate_refusals(run_dir: Path) -> dict[str, list[str]]:
    """By variant that must not be published: every limit that it did not keep, in words.

    Raises RunError when ``gate.json`` is there and cannot be read.
    """
    from compressor.record import read_json

    if not (run_dir / GATE).exists():
        return {}
    return {
        name: outcome["failed"]
        for name, outcome in read_json(run_dir, GATE)["variants"].items()
        if not outcome["passed"]
    }
