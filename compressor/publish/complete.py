"""What artifact directories of a run get when its figures are known.

An exporter is a pure function of its inputs and knows no figures. So the run's directory, not the
store, gets what rests on them: ``README.md`` (the model card), ``compression.json`` (recipe,
hashes, figures), ``serving.json`` (the commands), the base model's licence files, and
``SHA256SUMS`` over it all. Each is made from the run's directory alone and holds no times, so that
`compressor.verify` makes it again. Weights stay links into the store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor import record
from compressor.export.artifact import PROVENANCE, SUMS
from compressor.publish.artifacts import Artifact, read_artifacts
from compressor.publish.card import DEFAULT_PORT, PORTS, render
from compressor.store import content_key, file_sha256s, write_atomic

CARD, SERVING = "README.md", "serving.json"
MADE = (CARD, SERVING, PROVENANCE)  # in this module
_PRIVATE = ("output", "store", "publish")  # of the recipe: places, which decide nothing


def complete_artifacts(run_dir: Path, report: Mapping[str, Any]) -> None:
    """Complete every artifact directory of a run.

    Args:
        run_dir: laid out by `record.lay_out`.
        report: its content.

    Raises:
        RunError: a file of the run cannot be read.
    """
    for artifact in read_artifacts(run_dir, report):
        for name, text in made_files(artifact).items():
            write_atomic(artifact.directory / name, text)
        for name in artifact.origin.get("files", []):
            if not (artifact.directory / name).exists():
                record.place_file(artifact.licences / name, artifact.directory / name)
        _write_sums(artifact)


def made_files(artifact: Artifact) -> dict[str, str]:
    """The files that rest on figures, by name."""
    return {
        CARD: render(artifact),
        SERVING: _json(serving_facts(artifact)),
        PROVENANCE: _json(compression_facts(artifact)),
    }


def serving_facts(artifact: Artifact) -> dict[str, Any]:
    """Content of ``serving.json``; see `compressor.export.serving` for the places in a command."""
    return {
        "format": artifact.format,
        "target": artifact.target,
        "host": "127.0.0.1",
        "engines": [
            {**command.to_dict(), "port": PORTS.get(command.engine, DEFAULT_PORT)}
            for command in artifact.commands()
        ],
    }


def compression_facts(artifact: Artifact) -> dict[str, Any]:
    """Content of ``compression.json``: what the exporter says, and what is known of the whole."""
    made = record.read_json(artifact.run_dir, record.export_record(artifact.stage).as_posix())
    facts, stages = artifact.facts, artifact.stages
    calibrated, texts = stages.get("calibrate"), stages.get("texts")
    baseline = next(
        one for one in artifact.report["variants"] if one["name"] == artifact.report["baseline"]
    )
    keys = ("quality", "performance", "split", "size_bytes", "coverage", "speculation")
    return {
        **made,
        "tool_version": artifact.run["compressor_version"],
        "recipe": {key: value for key, value in artifact.lock.items() if key not in _PRIVATE},
        "recipe_sha256": content_key(artifact.lock),
        "inputs": {
            "model": stages["load"]["config"]["source"],
            "calibration": calibrated["result"]["sha256"] if calibrated else None,
            "texts": {
                text["name"]: text["sha256"] for text in (texts["result"]["texts"] if texts else [])
            },
            "weights": {
                Path(entry["path"]).name: entry["sha256"]
                for entry in artifact.stage["files"]
                if Path(entry["path"]).name not in (SUMS, PROVENANCE)
            },
        },
        "base_model": artifact.base_model,
        "licence": dict(artifact.origin),
        "verification": dict(artifact.verification),
        "metrics": {key: facts[key] for key in keys},
        "baseline_metrics": {
            key: baseline[key] for key in ("quality", "performance", "size_bytes")
        },
        "verdict": [
            line
            for line in artifact.report["verdict"]["details"]
            if line.startswith(f"{artifact.variant}:")
        ],
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _write_sums(artifact: Artifact) -> None:
    """Hashes that the stage recorded are taken from there: weights are not read again."""
    known = {
        Path(entry["path"]).name: entry["sha256"]
        for entry in artifact.stage["files"]
        if Path(entry["path"]).name not in MADE
    }
    names = sorted(p.name for p in artifact.directory.iterdir() if p.is_file() and p.name != SUMS)
    unknown = [name for name in names if name not in known]
    known |= dict(
        zip(unknown, file_sha256s([artifact.directory / name for name in unknown]), strict=True)
    )
    lines = [f"{known[name]}  {name}\n" for name in names]
    write_atomic(artifact.directory / SUMS, "".join(lines))
