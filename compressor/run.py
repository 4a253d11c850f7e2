"""Execute a plan: run what the store lacks, then lay out the run directory and its report.

runs/<recipe name>/<date>-<plan key>/
    recipe.lock.yaml  plan.json  environment.json  ledger.json  log.jsonl
    samples/*.jsonl.gz   artifacts/<variant>/<format>/   report/{index.html,report.md,...}
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from compressor import __version__
from compressor.errors import CompressorError, RunError
from compressor.plan import BASELINE, Plan, Stage
from compressor.progress import Progress
from compressor.stages import FUNCTIONS, Context
from compressor.store import StoredStage, content_key, write_atomic


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


def execute(plan: Plan, progress: Progress) -> RunResult:
    """Run every stage that the store lacks and write the run directory.

    A stage that serves one variant and fails marks that variant failed; the others go on. A stage
    that serves all and fails ends the run.

    Raises:
        CompressorError: a stage that every variant needs failed, or the disk is too small.
    """
    plan.check_disk()
    run_dir = _run_directory(plan)
    log = run_dir / "log.jsonl"
    outcome = _Outcome({}, set(), {})
    for stage in plan.stages:
        if stage.variant in outcome.failed:
            continue
        try:
            _run_stage(plan, stage, outcome, progress, log)
        except CompressorError as error:
            if stage.variant in (None, BASELINE):
                _log(log, "failed", stage, error=str(error))
                raise
            outcome.failed[str(stage.variant)] = str(error)
            _log(log, "failed", stage, error=str(error))
    return _finish(plan, outcome, run_dir)


def _run_stage(plan: Plan, stage: Stage, outcome: _Outcome, progress: Progress, log: Path) -> None:
    inputs = {name: outcome.done[name] for name in stage.inputs if name in outcome.done}
    key = stage.key_given({name: stored.key for name, stored in inputs.items()})
    stored = plan.store.get(key)
    if stored is None:
        with plan.store.working(key) as directory:
            stored = plan.store.get(key)  # another process may have made it while we waited
            if stored is None:
                _log(log, "start", stage, key=key)
                stored = _make(plan, stage, key, inputs, directory, progress)
                seconds = stored.manifest["seconds"]
                _log(log, "done", stage, key=key, seconds=seconds)
    else:
        outcome.cached.add(stage.name)
        _log(log, "cached", stage, key=key)
    outcome.done[stage.name] = stored


def _make(
    plan: Plan,
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
    except OSError as error:
        # What is left behind is either resumable or overwritten: nothing of it counts as finished.
        raise RunError(
            f"{stage.name}: {error.strerror or error}",
            where=str(error.filename or directory),
            fix="free some space or mend the path, and run again: finished stages are kept",
        ) from error
    except CompressorError:
        plan.store.discard_partial(key)
        raise
    return plan.store.publish(
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


def _finish(plan: Plan, outcome: _Outcome, run_dir: Path) -> RunResult:
    from compressor.doctor import environment
    from compressor.report.build import build_report
    from compressor.report.write import write_report

    lock = plan.recipe.lock()
    write_atomic(run_dir / "recipe.lock.yaml", yaml.safe_dump(lock, sort_keys=False))
    facts = environment()
    write_atomic(run_dir / "environment.json", json.dumps(facts, indent=1))
    stages = [
        {
            "name": stage.name,
            "kind": stage.kind,
            "variant": stage.variant,
            "key": outcome.done[stage.name].key,
            "seconds": outcome.done[stage.name].manifest["seconds"],
            "peak_rss_bytes": outcome.done[stage.name].manifest["peak_rss_bytes"],
            "cached": stage.name in outcome.cached,
        }
        for stage in plan.stages
        if stage.name in outcome.done
    ]
    write_atomic(run_dir / "plan.json", json.dumps(stages, indent=1))
    measured = outcome.done.get("measure")
    if measured:
        write_atomic(run_dir / "ledger.json", json.dumps(measured.result, indent=1))
        for path in sorted(measured.path.glob("samples/*")):
            _place(path, run_dir / "samples" / path.name)
    load = outcome.done["load"].result
    calibration = outcome.done.get("calibrate")
    report = build_report(
        recipe={"name": plan.recipe.name, "sha256": content_key(lock)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        compressor_version=__version__,
        command=_command(),
        environment=facts,
        model={k: load[k] for k in ("source", "revision", "architecture", "parameters")}
        | {"size_bytes": load["size_bytes"]},
        calibration=calibration.result if calibration else None,
        variants=[_variant(plan, outcome, run_dir, name) for name in _variant_names(plan)],
        measured=measured.result if measured else None,
        stages=stages,
        notes=list(load["notes"]),
    )
    write_report(report, run_dir / "report")
    write_atomic(run_dir / ".complete", content_key(report["stages"]))
    return RunResult(run_dir, report, outcome.failed)


def _variant_names(plan: Plan) -> list[str]:
    return list(dict.fromkeys(s.variant for s in plan.stages if s.variant))


_LAYER_KEYS = ("name", "error", "rtn_error", "fallback", "tokens", "undersampled")


def _scheme_name(layers: list[dict[str, Any]]) -> str:
    """``W4A16``, or ``W4A16/W8A16`` when layers differ."""
    return "/".join(sorted({layer["scheme"]["name"] for layer in layers if "scheme" in layer}))


def _precision(allocation: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the report says of mixed precision; the schemes stand with the layers."""
    if allocation is None:
        return None
    return {key: allocation[key] for key in ("mean_bits", "stored_bits", "predicted_loss")}


def _variant(plan: Plan, outcome: _Outcome, run_dir: Path, name: str) -> dict[str, Any]:
    """One variant's entry of the report, from the manifests of its stages."""
    from compressor.quantize.driver import read_layers

    done = outcome.done
    quantized, scored = done.get(f"quantize:{name}"), done.get(f"evaluate:{name}")
    entry: dict[str, Any] = {
        "name": name,
        "status": "failed" if name in outcome.failed else "ok",
        "error": outcome.failed.get(name),
        "algorithm": None,
        "scheme": None,
        "group_size": None,
        "size_bytes": None,
        "coverage": None,
        "precision": None,
        "quantization": None,
        "quality": scored.result["quality"] if scored else [],
        "artifacts": [],
    }
    if quantized:
        steps = quantized.manifest["config"]["steps"]
        layers = read_layers(quantized.path)
        cache = quantized.result.get("kv_cache")
        entry |= {
            "algorithm": "+".join(next(iter(step)) for step in steps),
            "scheme": _scheme_name(layers) + (f" with {cache} cache" if cache else ""),
            "group_size": quantized.result["scheme"]["weights"]["group_size"],
            "coverage": quantized.result["coverage"],
            "precision": _precision(quantized.result.get("allocation")),
            "quantization": {
                "seconds": quantized.manifest["seconds"],
                "peak_rss_bytes": quantized.manifest["peak_rss_bytes"],
                "layers": [
                    {k: layer[k] for k in _LAYER_KEYS} | {"scheme": layer["scheme"]["name"]}
                    for layer in layers
                    if "error" in layer
                ],
            },
        }
    for stage_name, stored in done.items():
        if stored.manifest["kind"] == "export" and stored.manifest["variant"] == name:
            entry["artifacts"].append(_artifact(stored, run_dir, stage_name))
            entry["size_bytes"] = entry["size_bytes"] or stored.result["size_bytes"]
    return entry


def _artifact(stored: StoredStage, run_dir: Path, stage_name: str) -> dict[str, Any]:
    """Lay an export into the run directory and list its files."""
    _, variant, fmt = stage_name.split(":")
    relative = Path("artifacts") / variant / fmt
    files = []
    for entry in stored.manifest["files"]:
        inner = Path(entry["path"]).relative_to("artifact")
        _place(stored.path / entry["path"], run_dir / relative / inner)
        files.append({**entry, "path": inner.as_posix()})
    return {
        "format": fmt,
        "path": relative.as_posix(),
        "size_bytes": stored.result["size_bytes"],
        "sha256": content_key([[f["path"], f["sha256"]] for f in files]),
        "files": files,
        "tensors": stored.result["tensors"],
    }


def _place(source: Path, target: Path) -> None:
    """Link a stored file into the run (copy where links are impossible), replacing what is there.

    Links are safe since stored files are read-only and engines only read artifacts.
    """
    if target.exists() and os.path.samefile(source, target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
