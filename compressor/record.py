"""What a run directory holds beside its report, and the report made from that alone.

Everything that a figure rests on is laid into the run's directory, so that `compressor.verify` can
make every figure again on another machine, without the store::

    recipe.lock.yaml    the recipe, every default resolved
    run.json            name, time, version, command, failed variants, the recipe once more
    environment.json    the machine
    plan.json           the stages in short, as the report lists them
    stages.json         every stage: settings, keys, result, SHA-256 of every file it made
    ledger.json  prompts.jsonl.gz  samples/    the measurement
    calibration/tokens.npy  texts/<text>.npy   token ids
    licence/                                   licences and notices of the source model
    exports/<variant>/<format>.json            what the exporter says of an artifact
    layers/<variant>.jsonl                     what quantization did to each linear
    scores/<variant>/<text>.safetensors        the evaluation, token by token
    texts/prompts.json  drift/<variant>.jsonl  prompts, and their greedy continuations
    tasks/<variant>/<task>.jsonl               the tasks, document by document
    served/<variant>/<task>.jsonl              the same, asked of the served artifact
    optimise.json  optimised.yaml              a search's record, and the recipe that it chose
    gate.json           which variants kept the recipe's limits (where it sets any)
    artifacts/<variant>/<format>/              completed by `compressor.publish.complete`
    report/
    MANIFEST.sha256     the hash of every file above (sha256sum -c reads it)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from compressor.errors import RunError
from compressor.evaluate.options import TOLERANCE
from compressor.export.artifact import PROVENANCE, SUMS
from compressor.store import (
    StoredStage,
    check_files,
    content_key,
    file_sha256,
    remove_leftovers,
    stage_key,
    write_atomic,
)

MANIFEST, EXPORTS = "MANIFEST.sha256", "exports"
MEDUSA_2 = "medusa-2"  # the algorithm of a model that was trained on with its heads
LOCK, RUN, ENVIRONMENT, PLAN = "recipe.lock.yaml", "run.json", "environment.json", "plan.json"
STAGES, LEDGER, LOG = "stages.json", "ledger.json", "log.jsonl"
OPTIMISE, OPTIMISED = "optimise.json", "optimised.yaml"
RECORD = (LOCK, RUN, ENVIRONMENT, PLAN, STAGES, LEDGER, OPTIMISE)
_IN_SHORT = ("name", "kind", "variant", "key", "seconds", "peak_rss_bytes", "cached")
_LAYER_KEYS = ("name", "error", "rtn_error", "fallback", "tokens", "undersampled")
_FIX = "name the directory of a run; `compress run` with the same recipe writes it again"
# libyaml's where PyYAML was built with it: 10 times as fast.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def stage_record(
    name: str,
    variant: str | None,
    stored: StoredStage,
    *,
    inputs: Mapping[str, str],
    code: str,
    cached: bool,
) -> dict[str, Any]:
    """A stage's entry in ``stages.json``.

    Args:
        name, variant: as planned; two variants may share one stored stage.
        inputs: keys of its inputs by their names in this plan.
        code: `plan.code_version` of its kind.
    """
    manifest = stored.manifest
    result = dict(manifest["result"])
    if manifest["kind"] in ("load", "draft"):
        result["path"] = None  # a place on this machine
    return {
        "name": name,
        "kind": manifest["kind"],
        "variant": variant,
        "key": stored.key,
        "config": manifest["config"],
        "inputs": dict(inputs),
        "code": code,
        "seconds": manifest["seconds"],
        "peak_rss_bytes": manifest["peak_rss_bytes"],
        "cached": cached,
        "result": result,
        "files": manifest["files"],
    }


def recorded_key(stage: Mapping[str, Any]) -> str:
    """The content key that follows from a stage's entry (see `plan.Stage.key_given`)."""
    return stage_key(stage["kind"], stage["config"], stage["inputs"], stage["code"])


def export_directory(stage: Mapping[str, Any]) -> PurePosixPath:
    """Where an export stage's artifact lies in the run directory."""
    return PurePosixPath("artifacts") / stage["variant"] / stage["result"]["format"]


def export_record(stage: Mapping[str, Any]) -> PurePosixPath:
    """Where what the exporter wrote of the artifact lies in the run directory."""
    return PurePosixPath(EXPORTS) / stage["variant"] / f"{stage['result']['format']}.json"


def kept_files(stage: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], PurePosixPath]]:
    """(entry of the stage's ``files``, its place in the run directory) of those that are kept."""
    kind, variant = stage["kind"], stage["variant"]
    for entry in stage["files"]:
        path = PurePosixPath(entry["path"])
        if kind == "export" and path.name == SUMS:
            continue  # made anew over the completed directory
        if kind == "export" and path.name == PROVENANCE:
            yield entry, export_record(stage)
        elif kind == "export":
            yield entry, export_directory(stage) / path.relative_to("artifact")
        elif kind == "origin":
            yield entry, PurePosixPath("licence") / path
        elif kind == "draft" and path.parts[0] == "licence":
            yield entry, PurePosixPath("draft-licence") / variant / path.name
        elif kind == "measure":
            yield entry, path
        elif kind == "calibrate" and path.suffix == ".npy":
            yield entry, PurePosixPath("calibration") / path
        elif kind == "texts":
            yield entry, PurePosixPath("texts") / path
        elif kind in ("tasks", "served") and path.suffix == ".jsonl":
            yield entry, PurePosixPath(kind) / variant / path.name
        elif kind == "evaluate" and path.suffix == ".jsonl":
            yield entry, PurePosixPath("drift") / f"{variant}.jsonl"
        elif kind in ("quantize", "import") and path.name == "layers.jsonl":
            yield entry, PurePosixPath("layers") / f"{variant}.jsonl"
        elif kind == "accept" and path.suffix == ".jsonl":
            yield entry, PurePosixPath("acceptance") / f"{variant}.jsonl"
        elif (
            kind == "evaluate"
            and path.suffix == ".safetensors"
            and not path.name.endswith(".hidden.safetensors")
        ):
            yield entry, PurePosixPath("scores") / variant / path


def lay_out(
    run_dir: Path,
    *,
    lock: Mapping[str, Any],
    facts: Mapping[str, Any],
    environment: Mapping[str, Any],
    stages: Sequence[tuple[dict[str, Any], Path]],
    search: Mapping[str, str],
) -> None:
    """Write the record of a run and link the files that its figures rest on.

    Args:
        lock: the resolved recipe.
        facts: content of ``run.json`` without the recipe.
        environment: what `doctor.environment` found.
        stages: (`stage_record`, directory in the store) in the plan's order.
        search: text of `OPTIMISE` and `OPTIMISED`; none where nothing was searched.

    Raises:
        RunError: a stored file is not what was written.
    """
    remove_leftovers(run_dir)
    records = [record for record, _ in stages]
    in_short = [{key: record[key] for key in _IN_SHORT} for record in records]
    write_atomic(run_dir / LOCK, yaml.safe_dump(dict(lock), sort_keys=False))
    write_atomic(run_dir / RUN, _json({**facts, "recipe": lock}))
    write_atomic(run_dir / ENVIRONMENT, _json(environment))
    write_atomic(run_dir / PLAN, _json(in_short))
    write_atomic(run_dir / STAGES, _json(records))
    for name in (OPTIMISE, OPTIMISED):
        if name in search:
            write_atomic(run_dir / name, search[name])
        else:
            (run_dir / name).unlink(missing_ok=True)  # of a search that came to the same stages
    for record, directory in stages:
        kept = list(kept_files(record))
        if record["cached"]:  # made some time ago
            check_files(directory, [entry for entry, _ in kept])
        for entry, place in kept:
            place_file(directory / entry["path"], run_dir / place)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def place_file(source: Path, target: Path) -> None:
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


def read_json(run_dir: Path, name: str) -> Any:
    """A JSON file of the run; RunError when it cannot be read."""
    try:
        return json.loads((run_dir / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read: {error}", where=str(run_dir / name), fix=_FIX) from error


def read_lock(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe; RunError when it cannot be read."""
    path = run_dir / LOCK
    try:
        lock = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"cannot be read: {error}", where=str(path), fix=_FIX) from error
    if not isinstance(lock, dict):
        raise RunError("holds no recipe", where=str(path), fix=_FIX)
    return lock


def run_report(
    run_dir: Path,
    *,
    measured: Mapping[str, Any] | None = None,
    evaluated: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The report's content, from the files of the run directory alone.

    Args:
        measured: figures instead of the ledger's, by key.
        evaluated: by variant, instead of the results of its evaluate stage.

    Raises RunError when a file cannot be read or does not fit the report.
    """
    from compressor.quality import judged_variants
    from compressor.report.build import build_report

    run, stages = read_json(run_dir, RUN), read_json(run_dir, STAGES)
    lock = read_lock(run_dir)
    settings = lock.get("evaluate") or {}
    tolerance = settings.get("tolerance", TOLERANCE)
    results = {stage["name"]: stage["result"] for stage in stages}
    load, ledger = results["load"], None
    if "measure" in results:
        ledger = read_json(run_dir, LEDGER) | dict(measured or {})
    sizes = ledger["artifact_bytes"] if ledger else {}
    return build_report(
        recipe={"name": run["name"], "sha256": content_key(lock)},
        created=run["created"],
        compressor_version=run["compressor_version"],
        command=run["command"],
        environment=read_json(run_dir, ENVIRONMENT),
        model={
            key: load[key]
            for key in ("source", "revision", "architecture", "parameters", "size_bytes")
        }
        | {"license": results.get("origin", {}).get("licence")},
        calibration=results.get("calibrate"),
        variants=judged_variants(
            run_dir,
            [
                _variant(run_dir, run, stages, name, evaluated, sizes.get(name))
                for name in run["variants"]
            ],
            stages,
            tolerance,
            settings.get("gate"),
        ),
        measured=ledger,
        samples=_samples(run_dir, ledger) if ledger else None,
        optimise=read_json(run_dir, OPTIMISE) if (run_dir / OPTIMISE).exists() else None,
        stages=read_json(run_dir, PLAN),
        notes=[*load["notes"], *_export_notes(stages)],
        record={name: file_sha256(run_dir / name) for name in RECORD if (run_dir / name).exists()},
        quality_limit=tolerance,
    )


def _samples(run_dir: Path, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """The raw samples by variant."""
    from compressor.measure.samples import read_samples

    return {name: read_samples(run_dir / row["path"]) for name, row in ledger["samples"].items()}


def _export_notes(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the artifacts do not carry over, as their exporters say."""
    return [
        f"{stage['variant']}, {stage['result']['format']}: {note}."
        for stage in stages
        if stage["kind"] == "export"
        for note in stage["result"].get("notes", [])
    ]


def _variant(
    run_dir: Path,
    run: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    name: str,
    evaluated: Mapping[str, Mapping[str, Any]] | None,
    measured_bytes: int | None,
) -> dict[str, Any]:
    """One variant's entry of the report; its size is that of the artifact that was measured, or of
    the first where none was."""
    own = {stage["name"]: stage for stage in stages if stage["variant"] == name}
    quantized = own.get(f"quantize:{name}") or own.get(f"import:{name}")
    scored = own.get(f"evaluate:{name}")
    found = scored["result"] if scored else {}
    if evaluated is not None:
        found = evaluated.get(name, {})
    entry: dict[str, Any] = {
        "name": name,
        "status": "failed" if name in run["failed"] else "ok",
        "error": run["failed"].get(name),
        "algorithm": None,
        "scheme": None,
        "group_size": None,
        "size_bytes": measured_bytes,
        "coverage": None,
        "precision": None,
        "quantization": None,
        "quality": [dict(row) for row in found.get("quality", [])],
        "positions": found.get("positions", []),
        "drift": found.get("drift"),
        "speculation": _speculation(own, name),
        "artifacts": [],
    }
    if quantized:
        entry |= _quantized(quantized, read_layers(run_dir, name))
    elif f"joint:{name}" in own:
        entry["algorithm"] = MEDUSA_2
    for stage in own.values():
        if stage["kind"] == "export":
            proof = own.get(stage["name"].replace("export:", "verify:", 1))
            entry["artifacts"].append(_artifact(stage, proof))
            if stage["result"]["tensors"] is not None:  # a speculator comes beside the model
                entry["size_bytes"] = entry["size_bytes"] or stage["result"]["size_bytes"]
    return entry


def _speculation(own: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """What is reported of a variant's speculator: its training, and what it was worth."""
    tried = own.get(f"accept:{name}")
    trained = own.get(f"joint:{name}") or own.get(f"speculate:{name}")  # the last stage of it
    if tried is None:
        return None
    corpus = own.get(f"corpus:{name}")
    result = tried["result"]
    return {
        "method": result["method"],
        "depth": result["depth"],
        "trained_on_baseline": bool(
            corpus
            and any(stage.startswith("quantize:") for stage in tried["inputs"])
            and not any(stage.startswith("quantize:") for stage in corpus["inputs"])
        ),
        "draft": _draft(own, name),
        "answer_tokens": corpus["result"]["answer_tokens"] if corpus else None,
        "seconds": {
            kind: own[f"{kind}:{name}"]["seconds"]
            for kind in ("corpus", "features", "speculate", "joint", "quantize-draft")
            if f"{kind}:{name}" in own
        },
        "losses": [step["loss"] for step in trained["result"]["steps"]] if trained else [],
        "evaluations": trained["result"]["evaluations"] if trained else [],
        "prompts": result["prompts"],
        "results": result["results"],
        "tree": result["tree"],
        "times": result["times"],
    }


def _draft(own: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """Where a draft model comes from, if it was given, and what it is quantized by."""
    given, quantized = own.get(f"draft:{name}"), own.get(f"quantize-draft:{name}")
    if given is None and quantized is None:
        return None
    steps = quantized["config"]["steps"] if quantized else []
    return {
        "source": given["result"]["source"] if given else None,
        "parameters": given["result"]["parameters"] if given else None,
        "algorithm": "+".join(next(iter(step)) for step in steps) or None,
        "scheme": quantized["result"]["scheme"]["name"] if quantized else None,
    }


def read_layers(run_dir: Path, variant: str) -> list[dict[str, Any]]:
    """The per-linear records of a quantized variant, in model order; none without the file."""
    path = run_dir / "layers" / f"{variant}.jsonl"
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RunError(f"cannot be read: {error}", where=str(path), fix=_FIX) from error


def _quantized(stage: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the report says of a quantization."""
    result, steps = stage["result"], stage["config"]["steps"]
    cache, allocation = result.get("kv_cache"), result.get("allocation")
    # W4A16, or W4A16/W8A16 when layers differ
    scheme = "/".join(sorted({layer["scheme"]["name"] for layer in layers if "scheme" in layer}))
    precision = None
    if allocation is not None:  # the schemes stand with the layers
        precision = {key: allocation[key] for key in ("mean_bits", "stored_bits", "predicted_loss")}
    return {
        "algorithm": "+".join(next(iter(step)) for step in steps),
        "scheme": scheme + (f" with {cache} cache" if cache else ""),
        "group_size": result["scheme"]["weights"]["group_size"],
        "coverage": result["coverage"],
        "precision": precision,
        "quantization": {
            "seconds": stage["seconds"],
            "peak_rss_bytes": stage["peak_rss_bytes"],
            "refined": _refined(result.get("refined")),
            "layers": [
                {key: layer[key] for key in _LAYER_KEYS} | {"scheme": layer["scheme"]["name"]}
                for layer in layers
                if "error" in layer
            ],
        },
    }


def _refined(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is reported of a refinement of the whole model."""
    keys = ("kl_before", "kl_after", "kept", "held_out_samples")
    return {key: facts[key] for key in keys} if facts else None


def _artifact(stage: Mapping[str, Any], proof: Mapping[str, Any] | None) -> dict[str, Any]:
    """An exported directory, its files, and what the stage that verified it found."""
    directory = export_directory(stage)
    files = [
        {**entry, "path": place.relative_to(directory).as_posix()}
        for entry, place in kept_files(stage)
        if place.is_relative_to(directory)
    ]
    return {
        "format": stage["result"]["format"],
        "path": directory.as_posix(),
        "size_bytes": stage["result"]["size_bytes"],
        "sha256": content_key([[file["path"], file["sha256"]] for file in files]),
        "files": files,
        "tensors": stage["result"]["tensors"],
        "verification": proof["result"] if proof else None,
    }


def write_manifest(run_dir: Path) -> str:
    """Write ``MANIFEST.sha256`` over every other file; returns its own SHA-256 (hex).

    Hashes that ``stages.json`` records are taken from there: large artifacts are not read again.
    """
    known = {}
    if (run_dir / STAGES).exists():
        known = {
            place.as_posix(): entry["sha256"]
            for stage in read_json(run_dir, STAGES)
            for entry, place in kept_files(stage)
        }
    lines = []
    for name in run_files(run_dir):
        lines.append(f"{known.get(name) or file_sha256(run_dir / name)}  {name}\n")
    write_atomic(run_dir / MANIFEST, "".join(lines))
    return file_sha256(run_dir / MANIFEST)


def run_files(run_dir: Path) -> list[str]:
    """Every file of the run but the manifest, relative, sorted."""
    return sorted(
        path.relative_to(run_dir).as_posix()
        for path in run_dir.rglob("*")
        if (path.is_file() or path.is_symlink()) and path != run_dir / MANIFEST
    )
