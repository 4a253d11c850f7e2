"""Execute a plan: run what the store lacks, then lay out the run directory and its report.

runs/<recipe name>/<date>-<plan key>/
    log.jsonl   artifacts/<variant>/<format>/   report/{index.html,report.md,...}
    and everything that the figures rest on: see `compressor.record`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.errors import CompressorError, RunError
from compressor.numerics.memory import is_out_of_memory, trim
from compressor.plan import BASELINE, Plan, Stage, code_version
from compressor.progress import Progress
from compressor.record import LOG
from compressor.stages import FUNCTIONS, Context
from compressor.store import Store, StoredStage, content_key, write_atomic


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    Attributes:
        run_dir: where everything a reader needs lies.
        report: the content of report.json.
        failed_variants: variant -> error message; empty when all went well.
    """

    run_dir: Path
    report: dict[str, Any]
    failed_variants: dict[str, str]


@dataclass
class _Outcome:
    """What has happened so far."""

    done: dict[str, StoredStage]
    cached: set[str]
    failed: dict[str, str]
    broken: dict[str, str] = field(default_factory=dict)  # error by key of a stage that failed
    made: set[str] = field(default_factory=set)  # keys of stages that were made for this run
    checked: set[str] = field(default_factory=set)  # keys whose files are what was written


def execute(
    plan: Plan,
    progress: Progress,
    *,
    search: Mapping[str, str] | None = None,
    on: str | None = None,
) -> RunResult:
    """Run every stage that the store lacks and write the run directory.

    Args:
        plan: what to do.
        progress: where to report.
        search: files of a search (`compressor.optimise`) that chose these variants, by name.
        on: ``ray`` or ``ray=ADDRESS``: make the stages there first; None makes them here.

    A stage that serves one variant and fails marks that variant failed; the others go on. A stage
    that serves all and fails ends the run.

    Raises:
        CompressorError: a stage that every variant needs failed, or the disk is too small.
    """
    plan.check_disk()
    with plan.store.lock(plan.key):  # the same recipe run twice at once has one directory
        run_dir = _run_directory(plan)
    log = run_dir / LOG
    outcome = _Outcome({}, set(), {})
    if on is not None:
        from compressor.cluster import parse_address, spread

        found = spread(plan, parse_address(on), progress)
        outcome = _Outcome({}, set(), {}, found.broken, found.made)
    for stage in plan.stages:
        if stage.variant in outcome.failed:
            continue
        if stage.key in outcome.broken:  # another variant's equal stage: it would fail again
            _withdraw(stage, outcome)
            outcome.failed[str(stage.variant)] = outcome.broken[stage.key]
            _log(log, "failed", stage, error=outcome.broken[stage.key])
            continue
        try:
            _run_stage(plan, stage, outcome, progress, log)
        except CompressorError as error:
            if stage.variant in (None, BASELINE):
                _log(log, "failed", stage, error=str(error))
                raise
            outcome.failed[str(stage.variant)] = outcome.broken[stage.key] = str(error)
            _withdraw(stage, outcome)
            _log(log, "failed", stage, error=str(error))
    with plan.store.lock(plan.key):
        return _finish(plan, outcome, run_dir, search or {})


def run_stages(
    plan: Plan, names: Iterable[str], progress: Progress, log: Path
) -> dict[str, StoredStage]:
    """Run some of a plan's stages, and what they rest on.

    Args:
        plan: that has them.
        names: of the stages that are wanted.
        progress: where to report.
        log: file that a line is added to for each stage that begins or ends.

    Returns:
        every stage that was needed, by name.

    Raises:
        CompressorError: one of them failed.
    """
    by_name = {stage.name: stage for stage in plan.stages}
    wanted: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += by_name[name].inputs
    outcome = _Outcome({}, set(), {})
    for stage in plan.stages:
        if stage.name in wanted:
            _run_stage(plan, stage, outcome, progress, log)
    return outcome.done


def _withdraw(stage: Stage, outcome: _Outcome) -> None:
    """An artifact that failed its proof is not done: it is neither measured nor laid out."""
    if stage.kind == "verify":
        for name in stage.inputs:
            if name.startswith("export:"):
                outcome.done.pop(name, None)


def _run_stage(plan: Plan, stage: Stage, outcome: _Outcome, progress: Progress, log: Path) -> None:
    inputs = {name: outcome.done[name] for name in stage.inputs if name in outcome.done}
    if stage.variant is not None and len(inputs) < len(stage.inputs):
        missing = ", ".join(name for name in stage.inputs if name not in inputs)
        raise RunError(f"{missing} failed, which {stage.name} rests on", where=stage.name)
    key = stage.key_given({name: stored.key for name, stored in inputs.items()})
    stored = plan.store.get(key)
    if stored is None:
        _log(log, "start", stage, key=key)
        check_inputs(inputs, outcome.checked)
        stored = make(plan.store, stage, key, inputs, progress)
        outcome.checked.add(key)
        _log(log, "done", stage, key=key, seconds=stored.manifest["seconds"])
    else:
        if key not in outcome.made:
            outcome.cached.add(stage.name)
        _log(log, "cached", stage, key=key)
    plan.store.share(stored)
    outcome.done[stage.name] = stored


def check_inputs(inputs: Mapping[str, StoredStage], checked: set[str]) -> None:
    """See that what a stage rests on is what was written; ``checked`` grows by their keys.

    Raises:
        RunError: a file was changed, cut short or removed.
    """
    for stored in inputs.values():
        if stored.key not in checked:
            stored.verify()
            checked.add(stored.key)


def make(
    store: Store, stage: Stage, key: str, inputs: dict[str, StoredStage], progress: Progress
) -> StoredStage:
    """Make one stage, or wait for the process that is making it.

    Args:
        store: that it goes into.
        stage: as planned.
        key: its content key.
        inputs: finished stages by name.
        progress: where to report.

    Raises:
        CompressorError: it failed.
    """
    with store.working(key) as directory:
        stored = store.get(key)  # another process may have made it while we waited
        return stored or _make(store, stage, key, inputs, directory, progress)


def _make(
    store: Store,
    stage: Stage,
    key: str,
    inputs: dict[str, StoredStage],
    directory: Path,
    progress: Progress,
) -> StoredStage:
    _reset_peak_memory()
    started = time.perf_counter()
    try:
        result = FUNCTIONS[stage.kind](Context(stage, inputs, directory, progress))
    # What is left behind is either resumable or overwritten: nothing of it counts as finished.
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise RunError(
                "too little memory",
                where=stage.name,
                fix="free some, or lower the batch size, and run again: finished stages are kept",
            ) from error
        if not isinstance(error, OSError):
            raise
        raise RunError(
            f"{stage.name}: {error.strerror or error}",
            where=str(error.filename or directory),
            fix="free some space or mend the path, and run again: finished stages are kept",
        ) from error
    except CompressorError:
        store.discard_partial(key)
        raise
    trim()
    return store.publish(
        key,
        directory,
        {
            "name": stage.name,
            "kind": stage.kind,
            "variant": stage.variant,
            "config": stage.config,
            "inputs": {name: stored.key for name, stored in inputs.items()},
            "result": result,
            "seconds": time.perf_counter() - started,
            "peak_rss_bytes": _peak_memory(),
        },
    )


def _finish(plan: Plan, outcome: _Outcome, run_dir: Path, search: Mapping[str, str]) -> RunResult:
    from compressor.doctor import environment
    from compressor.publish.complete import complete_artifacts
    from compressor.quality import write_gate
    from compressor.record import lay_out, run_report, stage_record, write_manifest
    from compressor.report.write import write_report

    lay_out(
        run_dir,
        lock=plan.recipe.lock(),
        facts={
            "name": plan.recipe.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "compressor_version": __version__,
            "command": _command(),
            "variants": list(dict.fromkeys(s.variant for s in plan.stages if s.variant)),
            "failed": outcome.failed,
        },
        environment=environment(),
        stages=[
            (
                stage_record(
                    stage.name,
                    stage.variant,
                    stored,
                    inputs={
                        name: outcome.done[name].key
                        for name in stage.inputs
                        if name in outcome.done
                    },
                    code=code_version(stage.kind),
                    cached=stage.name in outcome.cached,
                ),
                stored.path,
            )
            for stage in plan.stages
            if (stored := outcome.done.get(stage.name))
        ],
        search=search,
    )
    report = run_report(run_dir)
    complete_artifacts(run_dir, report)
    write_report(report, run_dir / "report")
    write_gate(run_dir, report)
    write_atomic(run_dir / ".complete", content_key(report["stages"]))
    write_manifest(run_dir)
    return RunResult(run_dir, report, outcome.failed)


def _run_directory(plan: Plan) -> Path:
    """The run's directory: the earlier one when this very plan has run before."""
    parent = plan.recipe.output_dir / plan.recipe.name
    suffix = plan.key[:10]
    try:
        found = sorted(parent.glob(f"*-{suffix}"))
        if found:
            return found[-1]
        path = parent / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{suffix}"
        path.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"cannot make the run's directory: {error.strerror}",
            where=str(parent),
            fix="give another directory with --output",
        ) from error
    return path


def _log(path: Path, event: str, stage: Stage, **facts: Any) -> None:
    line = {"time": datetime.now(UTC).isoformat(), "event": event, "stage": stage.name, **facts}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _command() -> str:
    return " ".join(["compress", *sys.argv[1:]])


def _reset_peak_memory() -> None:
    """Start a new peak of resident memory (Linux: /proc/self/clear_refs, proc(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_memory() -> int:
    """Peak resident bytes of this process since the last reset."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
