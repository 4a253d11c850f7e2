"""The artifacts of a finished run, with all that is known of each from its directory alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor import record
from compressor.export.options import SPECULATORS
from compressor.export.serving import Command, serving

LICENCES, DRAFT_LICENCES = "licence", "draft-licence"  # of the base model, of a given draft model


@dataclass(frozen=True)
class Artifact:
    """One exported directory of a run.

    Attributes:
        run_dir: the run.
        stage: entry of the export stage in ``stages.json``.
        stages: all entries, by name.
        run: content of ``run.json``.
        lock: the resolved recipe.
        report: content of ``report.json``.
    """

    run_dir: Path
    stage: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    run: Mapping[str, Any]
    lock: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def variant(self) -> str:
        return self.stage["variant"]

    @property
    def format(self) -> str:
        return self.stage["result"]["format"]

    @property
    def directory(self) -> Path:
        return self.run_dir / record.export_directory(self.stage)

    @property
    def is_baseline(self) -> bool:
        return self.variant == self.report["baseline"]

    @property
    def speculates(self) -> bool:
        """Whether it is a speculator, which comes beside the model that it drafts for."""
        return self.format in SPECULATORS

    @property
    def facts(self) -> Mapping[str, Any]:
        """The variant's entry of the report."""
        return next(one for one in self.report["variants"] if one["name"] == self.variant)

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the base model's source says of itself (`models.origin.Origin`); of a given draft
        model, what its own source says."""
        if self._given_draft is not None:
            return self._given_draft["result"]["origin"]
        stage = self.stages.get("origin")
        return stage["result"] if stage else {}

    @property
    def licences(self) -> Path:
        """Directory of the licence files that `origin` names."""
        if self._given_draft is not None:
            return self.run_dir / DRAFT_LICENCES / self.variant
        return self.run_dir / LICENCES

    @property
    def _given_draft(self) -> Mapping[str, Any] | None:
        return self.stages.get(f"draft:{self.variant}") if self.speculates else None

    @property
    def base_model(self) -> str | None:
        """The base model's id on the Hub; None where nothing tells it."""
        stated = (self.lock.get("publish") or {}).get("base_model")
        if self._given_draft is not None:
            stated = None  # that is of the target
        return stated or self.origin.get("hub_id")

    @property
    def verification(self) -> Mapping[str, Any]:
        """What a consumer made of it: ``verified`` is true, false, or null where none tried, and
        ``why`` says why not."""
        stage = self.stages.get(self.stage["name"].replace("export:", "verify:", 1))
        return stage["result"] if stage else {"verified": None, "why": ""}

    @property
    def target(self) -> str | None:
        """Of a speculator: the directory of the model that it drafts for, relative to its own."""
        if not self.speculates:
            return None
        for stage in self.stages.values():
            if stage["kind"] == "export" and stage["variant"] == self.variant:
                found = stage["result"]["format"]
                if found not in (*SPECULATORS, "gguf", "onnx"):
                    return f"../{found}"
        return None

    def commands(self) -> list[Command]:
        """How each engine serves it."""
        tokens, lookup = None, None
        speculate = self.lock["variants"].get(self.variant, {}).get("speculate") or {}
        accepted = self.stages.get(f"accept:{self.variant}")
        if accepted is not None:
            tokens = accepted["config"]["depth"]
            if options := speculate.get("ngram"):
                lookup = {
                    "prompt_lookup_min": options["shortest"],
                    "prompt_lookup_max": options["longest"],
                }
        files = [Path(entry["path"]).name for entry in self.stage["files"]]
        return serving(
            self.format,
            file=next((name for name in sorted(files) if name.endswith(".gguf")), None),
            tokens=tokens,
            lookup=lookup,
            refused=self._refused(),
        )

    def _refused(self) -> dict[str, str]:
        """Engines without a kernel for one of the schemes on any device that is known."""
        if self.format != "compressed-tensors" or self.is_baseline:
            return {}
        from compressor.numerics.scheme import Scheme
        from compressor.support import Target, check

        targets = (
            Target("vllm", "cpu", amx=True),
            *(Target("vllm", "cuda", one) for one in (75, 80, 89, 90)),
        )
        layers = record.read_layers(self.run_dir, self.variant)
        schemes = {str(layer["scheme"]): layer["scheme"] for layer in layers if "scheme" in layer}
        for value in schemes.values():
            found = [check(target, Scheme.from_dict(value), ()) for target in targets]
            if all(one.level == "fails" for one in found):
                return {"vllm": found[0].reason}
        return {}

    def refusals(self) -> list[str]:
        """Why it should not be published; empty where nothing speaks against it."""
        found = []
        if self.variant in self.run["failed"]:
            found.append(f"the variant failed: {self.run['failed'][self.variant].splitlines()[0]}")
        gate = self.facts.get("gate") or {}
        if gate.get("passed") is False:
            found.append("it did not pass the quality gate")
        told = self.verification
        why = f" ({told['why']})" if told.get("why") else ""
        if told["verified"] is False:
            found.append(f"{told['consumer']} computes something else than this model{why}")
        elif told["verified"] is not True:
            found.append(f"no consumer has verified it{why}")
        return found


def read_artifacts(run_dir: Path, report: Mapping[str, Any] | None = None) -> list[Artifact]:
    """Every artifact of a run, the baseline's included.

    Args:
        run_dir: a finished run.
        report: its content; read from ``report/report.json`` where not given.

    Raises:
        RunError: it is no run, or a file of it cannot be read.
    """
    from compressor.report.read import read_report

    stages: Sequence[Mapping[str, Any]] = record.read_json(run_dir, record.STAGES)
    run, lock = record.read_json(run_dir, record.RUN), record.read_lock(run_dir)
    if report is None:
        report = read_report(run_dir / "report" / "report.json")
    by_name = {stage["name"]: stage for stage in stages}
    return [
        Artifact(run_dir, stage, by_name, run, lock, report)
        for stage in stages
        if stage["kind"] == "export"
    ]
