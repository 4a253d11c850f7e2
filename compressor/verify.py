"""Check a finished run: make every figure again from raw samples and hashes.

Nothing but the run's directory is read. What was recorded is compared with what follows from the
files beneath it, so that an altered figure, sample, price, prompt or artifact is named together
with what should stand there. ``docs/verify.md`` says what cannot be found out this way.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import __version__, record
from compressor.errors import RunError
from compressor.quality import DRIFT, GATE, gate_record
from compressor.store import file_sha256

if TYPE_CHECKING:
    from compressor.measure.settings import MeasureSettings

TOLERANCE = 1e-9  # relative; other processors and numpy versions differ in the last bits
VOLATILE: tuple[str, ...] = ()  # keys of report.json that are not compared: none
LATER = ("samples",)  # keys of report.json that earlier versions did not write
_ABSENT = "nothing"


@dataclass(frozen=True)
class Failure:
    """One thing that does not hold.

    Attributes:
        check: name of the check.
        file: path in the run directory.
        key: place in the file, such as ``variants[1].size_bytes``; empty for the whole file.
        recorded: what stands there.
        found: what it should be, or what else was found.
        problem: in words.
    """

    check: str
    file: str
    key: str = ""
    recorded: Any = None
    found: Any = None
    problem: str = "recorded {recorded}, recomputed {found}"

    @property
    def sentence(self) -> str:
        """One line."""
        place = f"{self.file}: {self.key}" if self.key else self.file
        words = self.problem.replace("{recorded}", _short(self.recorded))
        return f"{place}: {words.replace('{found}', _short(self.found))}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"sentence": self.sentence}


@dataclass
class Check:
    """A kind of comparison: `count` things of the named `unit` were compared."""

    name: str
    unit: str
    count: int = 0
    failures: list[Failure] = field(default_factory=list)
    note: str = ""

    def fail(self, file: str, key: str = "", **facts: Any) -> None:
        """Add a failure."""
        self.failures.append(Failure(self.name, file, key, **facts))

    def expect(self, file: str, key: str, recorded: Any, computed: Any) -> None:
        """Compare two values deeply; every difference is a failure."""
        self.count += leaves(computed)
        for place, old, new in differences(recorded, computed, key):
            self.fail(file, place, recorded=old, found=new)


@dataclass(frozen=True)
class Verification:
    """Outcome: every check, and the SHA-256 of the run's manifest."""

    run_dir: Path
    checks: tuple[Check, ...]
    seal: str | None

    @property
    def failures(self) -> list[Failure]:
        """Of all checks."""
        return [failure for check in self.checks for failure in check.failures]

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ok": self.ok,
            "manifest_sha256": self.seal,
            "checks": [
                {
                    "name": check.name,
                    "unit": check.unit,
                    "count": check.count,
                    "ok": not check.failures,
                    "note": check.note,
                    "failures": [failure.to_dict() for failure in check.failures],
                }
                for check in self.checks
            ],
        }


def differences(recorded: Any, computed: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key path, recorded, computed) wherever two JSON values differ.

    Floats are equal within `TOLERANCE`; everything else must be equal, and of one type.
    """
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        for name in dict.fromkeys([*recorded, *computed]):
            inner = _join(key, str(name))
            if name not in recorded:
                yield inner, _ABSENT, computed[name]
            elif name not in computed:
                yield inner, recorded[name], _ABSENT
            else:
                yield from differences(recorded[name], computed[name], inner)
    elif isinstance(recorded, list) and isinstance(computed, list):
        for index in range(max(len(recorded), len(computed))):
            inner = f"{key}[{index}]"
            if index >= len(recorded):
                yield inner, _ABSENT, computed[index]
            elif index >= len(computed):
                yield inner, recorded[index], _ABSENT
            else:
                yield from differences(recorded[index], computed[index], inner)
    elif not _equal(recorded, computed):
        yield key, recorded, computed


def leaves(value: Any) -> int:
    """Single values in a JSON value."""
    if isinstance(value, Mapping):
        return sum(map(leaves, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(leaves, value))
    return 1


def verify(run_dir: Path, expected_seal: str | None = None, *, drawn: bool = True) -> Verification:
    """Check everything in a run's directory.

    Args:
        run_dir: as a run laid it out, or a copy of it anywhere.
        expected_seal: SHA-256 that ``MANIFEST.sha256`` should have, noted down elsewhere.
        drawn: whether the report is drawn again too, which takes nine tenths of the time; its
            files' hashes and its content are checked without.

    Raises:
        RunError: there is no run, or one whose directory does not hold what checking needs.
    """
    for name in (record.STAGES, record.RUN):
        if not (run_dir / name).is_file():
            raise RunError(
                f"there is no {name}: this is no run, or one of an earlier version",
                where=str(run_dir),
                fix="give the directory of a run; running its recipe again adds what is missing "
                "and does no other work",
            )
    run = _Run(run_dir)
    checks = []
    for check, function in _CHECKS:
        if function is _check_rendered and not drawn:
            continue
        made = Check(*check)
        try:
            function(run, made)
        except Exception as error:  # an altered file may raise anything
            where = getattr(error, "where", None) or getattr(error, "filename", None)
            made.fail(
                _relative(run_dir, where),
                problem=f"cannot be checked: {type(error).__name__}: "
                f"{getattr(error, 'what', None) or error}",
            )
        checks.append(made)
    manifest = run_dir / record.MANIFEST
    seal = file_sha256(manifest) if manifest.is_file() else None
    if expected_seal is not None and seal != expected_seal.lower():
        checks[0].fail(
            record.MANIFEST,
            recorded=seal,
            found=expected_seal,
            problem="its SHA-256 is {recorded}, expected was {found}",
        )
    return Verification(run_dir, tuple(checks), seal)


class _Run:
    """The files of a run, each read and hashed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hashes: dict[str, str] = {}

    def sha256(self, name: str) -> str | None:
        """Hash of a file; None when it is not there."""
        if name not in self._hashes:
            path = self.path / name
            if path.is_symlink() or not path.is_file():
                return None
            self._hashes[name] = file_sha256(path)
        return self._hashes[name]

    def json(self, name: str) -> Any:
        return record.read_json(self.path, name)

    @cached_property
    def files(self) -> list[str]:
        return record.run_files(self.path)

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        return self.json(record.STAGES)

    def stage(self, name: str) -> dict[str, Any] | None:
        return next((stage for stage in self.stages if stage["name"] == name), None)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [stage for stage in self.stages if stage["kind"] == kind]

    @cached_property
    def ledger(self) -> dict[str, Any] | None:
        return self.json(record.LEDGER) if self.stage("measure") else None

    @cached_property
    def settings(self) -> MeasureSettings | None:
        """What the recipe asked to be measured; None where nothing was."""
        from compressor.measure.settings import MeasureSettings

        measured = self.stage("measure")
        return MeasureSettings.from_config(measured["config"]) if measured else None

    @cached_property
    def prompts(self) -> list[list[int]]:
        from compressor.measure.workload import read_prompts

        assert self.ledger is not None
        return read_prompts(self.path / self.ledger["prompts"]["path"])

    @cached_property
    def measured(self) -> dict[str, Any] | None:
        """``performance`` and ``economics``, made again from the raw samples."""
        from compressor.measure.points import recompute

        return recompute(self.path) if self.ledger is not None else None

    @cached_property
    def evaluated(self) -> dict[str, dict[str, Any]]:
        """Results of the evaluation by variant, made again from the scores of every token and from
        what was generated."""
        from compressor.evaluate.divergence import Scores, by_position, summarise
        from compressor.evaluate.drift import read_continuations, summarise_drift

        texts = next((stage["result"] for stage in self.of_kind("texts")), None)
        baseline = next(
            (s["variant"] for s in self.of_kind("evaluate") if not _evaluated_against(s)), None
        )
        if texts is None or baseline is None:
            return {}
        made = {}
        for stage in self.of_kind("evaluate"):
            variant, settings = stage["variant"], stage["config"]

            def scores(name: str, variant: str = variant) -> tuple[Scores, Scores]:
                own, reference = (
                    Scores.load(self.path / "scores" / who / f"{name}.safetensors")
                    for who in (variant, baseline)
                )
                return own, reference

            quality, positions, drift = [], [], None
            for text in texts["texts"]:
                name = text["name"]
                quality.append({"text": name, **summarise(*scores(name), text["bytes"])})
            length = settings["positions"] if texts["long"] else settings["length"]
            for text in texts["long"] or texts["texts"]:
                where = f"long/{text['name']}" if texts["long"] else text["name"]
                parts = by_position(*scores(where), settings["bins"])
                positions.append({"text": text["name"], "length": length, "bins": parts})
            if texts["prompts"]:
                own, reference = (
                    read_continuations(self.path / DRIFT / f"{who}.jsonl")
                    for who in (variant, baseline)
                )
                drift = summarise_drift(own, reference, settings["drift"]["output_length"])
            made[variant] = {"quality": quality, "positions": positions, "drift": drift}
        return made

    @cached_property
    def report(self) -> dict[str, Any]:
        """The report's content, made again from recomputed figures."""
        return record.run_report(self.path, measured=self.measured, evaluated=self.evaluated)


def _evaluated_against(stage: Mapping[str, Any]) -> bool:
    return any(name.startswith("evaluate:") for name in stage["inputs"])


def _check_manifest(run: _Run, check: Check) -> None:
    """Every file is listed with its hash, and nothing else lies there."""
    listed = _sums(run.path / record.MANIFEST)
    _compare_files(run, check, listed, run.files, record.MANIFEST, "")


def _check_stages(run: _Run, check: Check) -> None:
    """Keys follow from settings and inputs; the kept files are those that the stages made."""
    keys = {stage["name"]: stage["key"] for stage in run.stages}
    for index, stage in enumerate(run.stages):
        place = f"[{index}]"
        check.expect(record.STAGES, f"{place}.key", stage["key"], record.recorded_key(stage))
        for name, key in stage["inputs"].items():
            if name in keys:  # a stage shared by variants may name the other's input
                check.expect(record.STAGES, f'{place}.inputs["{name}"]', key, keys[name])
        for entry, kept in record.kept_files(stage):
            check.count += 1
            found = run.sha256(kept.as_posix())
            if found != entry["sha256"]:
                check.fail(
                    kept.as_posix(),
                    recorded=entry["sha256"],
                    found=found or "no file",
                    problem=f"{stage['name']} made it with SHA-256 {{recorded}}, found {{found}}",
                )
    in_short = [
        {key: stage[key] for key in row}
        for row, stage in zip(run.json(record.PLAN), run.stages, strict=False)
    ]
    check.expect(record.PLAN, "", run.json(record.PLAN), in_short)
    measured = run.stage("measure")
    if measured is not None:
        check.expect(record.LEDGER, "", run.ledger, measured["result"])


def _check_recipe(run: _Run, check: Check) -> None:
    """The locked recipe is the one that ran, and the stages had its settings."""
    lock = record.read_lock(run.path)
    check.expect(record.LOCK, "", lock, run.json(record.RUN)["recipe"])
    evaluated = lock.get("evaluate") or {}
    measured = run.stage("measure")
    if measured is not None:
        given = dict(measured["config"])
        given.pop("file_sha256", None)
        served = given.pop("serve", {})
        guessed = given.pop("speculate", {})
        check.expect(record.LOCK, "measure", lock.get("measure"), given)
        for name in run.json(record.RUN)["variants"]:
            own = (lock.get("variants") or {}).get(name, {}).get("serve") or {}
            own = {key: value for key, value in own.items() if value is not None}
            check.expect(record.LOCK, f"variants.{name}.serve", own, served.get(name, {}))
            own = (lock.get("variants") or {}).get(name, {}).get("speculate") or {}
            if (found := guessed.get(name)) is not None:
                wanted = own.get(found["method"])
                check.expect(record.LOCK, f"variants.{name}.speculate", wanted, found["options"])
    for stage in run.of_kind("texts"):
        listed = [
            {key: value for key, value in text.items() if key != "file_sha256"}
            for text in stage["config"]["texts"]
        ]
        check.expect(record.LOCK, "evaluate.texts", evaluated.get("texts"), listed)
        check.expect(
            record.LOCK, "evaluate.length", evaluated.get("length"), stage["config"]["length"]
        )
        long, drift = evaluated.get("positions") or {}, evaluated.get("drift")
        given = stage["config"].get("positions") or {"length": None}
        known = {key: long.get(key) for key in given}
        check.expect(record.LOCK, "evaluate.positions", known, given)
        given = dict(stage["config"].get("drift") or {})
        given.pop("file_sha256", None)
        known = {key: drift.get(key) for key in given} if drift else {}
        check.expect(record.LOCK, "evaluate.drift", known, given)
    for stage in run.of_kind("evaluate"):
        bins = (evaluated.get("positions") or {}).get("bins")
        check.expect(record.LOCK, "evaluate.positions.bins", bins, stage["config"]["bins"])


def _check_artifacts(run: _Run, check: Check) -> None:
    """SHA256SUMS of each artifact is complete and right; sizes and provenance agree."""
    from compressor.export.artifact import SUMS

    directories = []
    for stage in run.of_kind("export"):
        directory = record.export_directory(stage).as_posix()
        directories.append(f"{directory}/")
        inside = [
            name.removeprefix(f"{directory}/")
            for name in run.files
            if name.startswith(f"{directory}/")
        ]
        sums = f"{directory}/{SUMS}"
        listed = _sums(run.path / sums)
        _compare_files(run, check, listed, [n for n in inside if n != SUMS], sums, directory)
        index = run.stages.index(stage)
        size = sum(_size(run.path, stage))
        check.expect(
            record.STAGES, f"[{index}].result.size_bytes", stage["result"]["size_bytes"], size
        )
        exported = record.export_record(stage).as_posix()
        made = run.json(exported)
        expected = {
            "variant": stage["config"]["variant"],  # another one's, where they share it
            "format": stage["result"]["format"],
            "stages": sorted(stage["inputs"].values()),
        }
        own = {key: made.get(key) for key in expected} | {
            "stages": sorted(made.get("stages", {}).values())
        }
        check.expect(exported, "", own, expected)
    for name in run.files:
        if name.startswith("artifacts/") and not name.startswith(tuple(directories)):
            check.fail(name, problem="no stage of this run made it")


def _size(run_dir: Path, stage: Mapping[str, Any]) -> Iterator[int]:
    """Sizes of the files that an exporter wrote, of those that the run keeps as they are there."""
    kept = {entry["path"]: place for entry, place in record.kept_files(stage)}
    for entry in stage["files"]:
        place = kept.get(entry["path"])
        if place is None:
            yield entry["size_bytes"]
        elif (run_dir / place).is_file():  # a missing one is named by its hash
            yield (run_dir / place).stat().st_size


def _check_cards(run: _Run, check: Check) -> None:
    """Model cards, ``compression.json`` and ``serving.json`` of the artifacts, made again."""
    from compressor.publish.artifacts import read_artifacts
    from compressor.publish.complete import made_files

    with tempfile.TemporaryDirectory() as directory:
        for artifact in read_artifacts(run.path, run.report):
            for name, text in made_files(artifact).items():
                check.count += 1
                place = artifact.directory / name
                made = Path(directory) / name
                made.write_text(text, encoding="utf-8")
                where = place.relative_to(run.path).as_posix()
                if not place.is_file():
                    check.fail(where, problem="is missing")
                elif place.read_bytes() != made.read_bytes():
                    line, old, new = _first_difference(place, made)
                    check.fail(where, line, recorded=old, found=new)


def _check_tokens(run: _Run, check: Check) -> None:
    """Calibration and evaluation tokens have the hashes that were recorded."""
    import numpy as np

    from compressor.data.tokens import tokens_sha256

    for stage in run.of_kind("calibrate"):
        tokens = np.load(run.path / "calibration" / "tokens.npy")
        result = stage["result"]
        check.expect("calibration/tokens.npy", "sha256", tokens_sha256(tokens), result["sha256"])
        check.expect("calibration/tokens.npy", "tokens", int(tokens.size), result["tokens"])
    for stage in run.of_kind("texts"):
        for text in stage["result"]["texts"]:
            name = f"texts/{text['name']}.npy"
            tokens = np.load(run.path / name)
            check.expect(name, "sha256", tokens_sha256(tokens), text["sha256"])
            check.expect(name, "windows", len(tokens), text["windows"])
        for text in stage["result"]["long"]:
            name = f"texts/long/{text['name']}.npy"
            tokens = np.load(run.path / name)
            check.expect(name, "sha256", tokens_sha256(tokens), text["sha256"])
            check.expect(name, "windows", len(tokens), text["windows"])
        if (prompts := stage["result"]["prompts"]) is not None:
            name = "texts/prompts.json"
            check.expect(name, "sha256", run.sha256(name), prompts["sha256"])
            check.expect(name, "prompts", len(run.json(name)), prompts["prompts"])


def _check_quality(run: _Run, check: Check) -> None:
    """Perplexity, its interval, KL divergence and agreement follow from the tokens' scores, drift
    from what was generated."""
    for index, stage in enumerate(run.stages):
        if stage["kind"] == "evaluate":
            made = run.evaluated[stage["variant"]]
            check.expect(record.STAGES, f"[{index}].result", stage["result"], made)


def _check_tasks(run: _Run, check: Check) -> None:
    """Every figure of a task follows from its samples, which are those that were hashed."""
    from compressor.evaluate.samples import read_samples
    from compressor.evaluate.tasks import figures

    evaluated = record.read_lock(run.path).get("evaluate") or {}
    for index, stage in enumerate(run.stages):
        if stage["kind"] not in ("tasks", "served"):
            continue
        listed = [
            {key: value for key, value in choice.items() if key != "files"}
            for choice in stage["config"]["tasks"]
        ]
        check.expect(record.LOCK, "evaluate.tasks", evaluated.get("tasks"), listed)
        for key in ("limit", "seed"):
            given = evaluated.get(f"tasks_{key}")
            check.expect(record.LOCK, f"evaluate.tasks_{key}", given, stage["config"][key])
        for number, task in enumerate(stage["result"]["tasks"]):
            name = f"{stage['kind']}/{stage['variant']}/{Path(task['file']).name}"
            check.expect(name, "sha256", run.sha256(name), task["sha256"])
            samples = read_samples(run.path / name)
            key = f"[{index}].result.tasks[{number}]"
            check.expect(record.STAGES, f"{key}.samples", task["samples"], len(samples))
            made = figures(samples, task["aggregation"])
            check.expect(record.STAGES, f"{key}.metrics", task["metrics"], made)


def _check_gate(run: _Run, check: Check) -> None:
    """The gate's record follows from all figures."""
    made = gate_record(run.report)
    there = (run.path / GATE).is_file()
    if made is None:
        check.note = "the recipe sets no limits"
        if there:
            check.fail(GATE, problem="the recipe sets no limits")
    else:
        check.expect(GATE, "", run.json(GATE), made)


def _check_speculation(run: _Run, check: Check) -> None:
    """Acceptance follows from what was decoded."""
    from compressor.speculate.decoding import Decoded
    from compressor.speculate.trial import figures

    for index, stage in enumerate(run.stages):
        if stage["kind"] != "accept":
            continue
        name = f"acceptance/{stage['variant']}.jsonl"
        rows: dict[str, list[Decoded]] = {}
        for line in (run.path / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            way, _ = row.pop("proposer"), row.pop("prompt")
            rows.setdefault(way, []).append(Decoded(**row))
        plain = rows.pop("plain")
        check.expect(
            record.STAGES,
            f"[{index}].result.results",
            stage["result"]["results"],
            {way: figures(plain, made) for way, made in rows.items()},
        )


def _check_prompts(run: _Run, check: Check) -> None:
    """The prompts are those that were hashed when they were served."""
    from compressor.measure.workload import prompt_sha256, prompts_sha256

    if run.ledger is None:
        check.note = "nothing was measured"
        return
    facts, load = run.ledger["prompts"], run.ledger["workload"]
    name = facts["path"]
    check.expect(name, "sha256", run.sha256(name), facts["sha256"])
    hashes = [prompt_sha256(prompt) for prompt in run.prompts]
    check.count += len(hashes)
    for index in range(max(len(hashes), len(facts["prompt_sha256"]))):
        own, expected = (
            rows[index] if index < len(rows) else _ABSENT
            for rows in (hashes, facts["prompt_sha256"])
        )
        if own != expected:
            check.fail(
                name,
                f"prompt {index}",
                recorded=expected,
                found=own,
                problem="it is not the prompt that was served: SHA-256 {found}, served {recorded}",
            )
    check.expect(record.LEDGER, "workload.prompt_count", load["prompt_count"], len(run.prompts))
    whole = prompts_sha256(run.prompts)
    check.expect(record.LEDGER, "workload.prompts_sha256", load["prompts_sha256"], whole)


def _check_samples(run: _Run, check: Check) -> None:
    """No request is missing, doubled or impossible."""
    from compressor.measure.samples import read_samples, request_ids

    settings = run.settings
    if run.ledger is None or settings is None:
        check.note = "nothing was measured"
        return
    lengths = settings.output_lengths(len(run.prompts))
    for variant, facts in run.ledger["samples"].items():
        name = facts["path"]
        check.expect(name, "sha256", run.sha256(name), facts["sha256"])
        samples = read_samples(run.path / name)
        check.expect(name, "requests", len(samples), facts["requests"])
        seen: set[str] = set()
        for sample in samples:
            check.count += 1
            if sample.request_id in seen:
                check.fail(name, sample.request_id, problem="is there twice")
            seen.add(sample.request_id)
            for problem in _impossible(sample, variant, run.prompts):
                check.fail(name, sample.request_id, problem=problem)
            for problem in _other_length(sample, lengths, settings):
                check.fail(name, sample.request_id, problem=problem)
        scheduled = request_ids(run.ledger["workload"], variant)
        for missing in [one for one in scheduled if one not in seen]:
            check.fail(name, missing, problem="this request was served, but its sample is missing")
        for surplus in sorted(seen - set(scheduled)):
            check.fail(name, surplus, problem="no such request was scheduled")


def _impossible(sample: Any, variant: str, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    """What in a sample contradicts itself, its id or the prompts."""
    from compressor.measure.settings import Point

    times = [sample.start_s, sample.first_token_s, *sample.token_times_s]
    if not all(math.isfinite(moment) for moment in times):
        yield "a time is not a number"
    if any(after < before for before, after in pairwise(times)):
        yield "its times run backwards"
    if sample.token_times_s and sample.first_token_s != sample.token_times_s[0]:
        yield "first_token_s is not the time of its first token"
    if sample.output_tokens != len(sample.token_times_s):
        yield f"{sample.output_tokens} tokens, but {len(sample.token_times_s)} token times"
    if sample.variant != variant:
        yield f"belongs to variant {sample.variant!r}"
    point = Point(sample.concurrency, sample.rate_per_s, sample.part)
    if not sample.request_id.startswith(f"{variant}/{point.name}/r{sample.round}/"):
        yield f"load {point.name}, round {sample.round} contradict its id"
    if not 0 <= sample.prompt < len(prompts):
        yield f"prompt {sample.prompt} does not exist"
        return
    length = point.prompt_length(len(prompts[sample.prompt]))
    if sample.prompt_tokens != length:
        yield f"{sample.prompt_tokens} prompt tokens, its prompt has {length}"


def _other_length(sample: Any, lengths: Sequence[int], settings: Any) -> Iterator[str]:
    """What in a sample contradicts the answer's length that follows from the recipe."""
    from compressor.measure.settings import Point

    if not 0 <= sample.prompt < len(lengths):
        return
    point = Point(sample.concurrency, sample.rate_per_s, sample.part)
    length = point.output_lengths(lengths)[sample.prompt]
    if sample.asked_tokens != length:
        yield f"{sample.asked_tokens} tokens were asked for, its prompt's length is {length}"
    whole = settings.ignore_eos and settings.engine != "endpoint" and not sample.error
    if sample.output_tokens > length or (whole and sample.output_tokens < length):
        yield f"{sample.output_tokens} tokens, its prompt's length is {length}"


def _check_load(run: _Run, check: Check) -> None:
    """The ledger's load, serving settings and sizes are those of the recipe and the artifacts."""
    from compressor.measure.settings import serves

    measured = run.stage("measure")
    settings = run.settings
    if run.ledger is None or measured is None or settings is None:
        check.note = "nothing was measured"
        return
    asked, load = measured["config"]["workload"], run.ledger["workload"]
    expected = {
        key: sorted(set(value)) if key in ("concurrency", "rate_per_s") else value
        for key, value in asked.items()
        if key in load and key != "requests"
    }
    check.expect(record.LEDGER, "workload", {key: load[key] for key in expected}, expected)
    check.expect(record.LEDGER, "workload.goal", load["goal"], asked["slo"])
    serving = {name: settings.serving(name) for name in run.ledger["samples"]}
    check.expect(record.LEDGER, "serving", run.ledger.get("serving"), serving)
    for name, own in serving.items():
        key, ran = f'engines["{name}"]', run.ledger["engines"][name]
        if own["batching"] is not None:
            check.expect(record.LEDGER, f"{key}.batching", ran.get("batching"), own["batching"])
        if own["flags"]:  # others of the engine's own may follow
            flags = ran.get("flags", [])[: len(own["flags"])]
            check.expect(record.LEDGER, f"{key}.flags", flags, own["flags"])
    steps = measured["config"].get("waterfall") or []
    check.expect(record.LEDGER, "waterfall", run.ledger.get("waterfall"), steps)
    sizes: dict[str, int] = {}
    for stage in run.of_kind("export"):
        if serves(run.ledger["workload"]["engine"], stage["result"]["format"]):
            sizes.setdefault(stage["variant"], stage["result"]["size_bytes"])
    sizes = {name: size for name, size in sizes.items() if name in run.ledger["samples"]}
    check.expect(record.LEDGER, "artifact_bytes", run.ledger["artifact_bytes"], sizes)


def _check_prices(run: _Run, check: Check) -> None:
    """The price scenario follows from the recipe's overrides and the table's row."""
    from compressor.measure.prices import price_rows, price_table, resolve_prices, table_sha256

    if run.ledger is None:
        check.note = "nothing was measured"
        return
    basis = run.ledger["price_basis"]
    overrides = record.read_lock(run.path)["measure"]["prices"]
    with price_table(basis["table"]):
        made = resolve_prices(
            overrides,
            gpu_name=basis["gpu_name"],
            cpu_count=basis["cpu_count"],
        )
    check.expect(record.LEDGER, "prices", run.ledger["prices"], made.to_dict())
    check.expect(record.LEDGER, "price_basis.overrides", basis["overrides"], overrides)
    if basis["table_sha256"] != table_sha256():
        check.note = "the price table of this version is another; the run's own row was used"
        return
    for index, row in enumerate(basis["table"]["rows"]):
        key = f"price_basis.table.rows[{index}]"
        check.expect(record.LEDGER, key, row, price_rows().get(row["id"]))


def _check_device(run: _Run, check: Check) -> None:
    """Bandwidth and peaks follow from what was read of the device, or are its data sheet's."""
    from compressor.measure.devices import Device

    device = run.ledger.get("device") if run.ledger is not None else None
    if device is None:
        check.note = "no device was recorded"
        return
    made = Device.from_dict(device).again().to_dict()
    check.expect(record.LEDGER, "device", device, made)


def _check_performance(run: _Run, check: Check) -> None:
    """Latency, throughput and cost follow from the raw samples and the prices."""
    if run.ledger is None:
        check.note = "nothing was measured"
        return
    assert run.measured is not None
    for key, value in run.measured.items():
        check.expect(record.LEDGER, key, run.ledger[key], value)


def _check_report(run: _Run, check: Check) -> None:
    """Every figure and sentence of report.json follows from the files."""
    name = "report/report.json"
    recorded, made = run.json(name), dict(run.report)
    for key in VOLATILE:
        recorded.pop(key, None)
        made.pop(key, None)
    check.expect(name, "", recorded, _known(recorded, made))
    written = run.json(record.RUN)["compressor_version"]
    if written != __version__:
        check.note = f"written by version {written}, checked by {__version__}"


def _known(recorded: Any, made: Any) -> Any:
    """What is made now without keys that say nothing and that the record does not have: a report of
    an earlier version lacks those that came later."""
    if isinstance(recorded, dict) and isinstance(made, dict):
        return {
            key: _known(recorded.get(key), value)
            for key, value in made.items()
            if key in recorded or (value not in (None, [], {}) and key not in LATER)
        }
    if isinstance(recorded, list) and isinstance(made, list) and len(recorded) == len(made):
        return [_known(one, other) for one, other in zip(recorded, made, strict=True)]
    return made


def _check_rendered(run: _Run, check: Check) -> None:
    """The page, the text and the plots show the report's figures."""
    from importlib.metadata import version

    from compressor.report.write import write_report

    packages = run.json(record.ENVIRONMENT).get("packages", {})
    plots = packages.get("matplotlib") == version("matplotlib")
    if not plots:
        check.note = "another matplotlib drew the plots: only report.md is compared"
    with tempfile.TemporaryDirectory() as made:
        for path in write_report(run.report, Path(made)):
            if path.name == "report.json" or not (plots or path.suffix == ".md"):
                continue
            check.count += 1
            name = f"report/{path.name}"
            recorded = run.path / name
            if not recorded.is_file():
                check.fail(name, problem="is missing")
            elif recorded.read_bytes() != path.read_bytes():
                line, old, new = _first_difference(recorded, path)
                check.fail(name, line, recorded=old, found=new)


_CHECKS: tuple[tuple[tuple[str, str], Callable[[_Run, Check], None]], ...] = (
    (("files of the run", "hashes"), _check_manifest),
    (("stages", "keys and hashes"), _check_stages),
    (("recipe", "settings"), _check_recipe),
    (("artifacts", "hashes and sizes"), _check_artifacts),
    (("calibration and evaluation tokens", "hashes"), _check_tokens),
    (("quality figures recomputed", "figures"), _check_quality),
    (("task figures recomputed", "figures"), _check_tasks),
    (("gate", "values"), _check_gate),
    (("acceptance recomputed", "figures"), _check_speculation),
    (("prompts", "hashes"), _check_prompts),
    (("raw samples", "requests and hashes"), _check_samples),
    (("load and sizes", "settings"), _check_load),
    (("prices", "values"), _check_prices),
    (("device", "values"), _check_device),
    (("performance figures recomputed", "figures"), _check_performance),
    (("report rebuilt", "values"), _check_report),
    (("report drawn again", "files"), _check_rendered),
    (("model cards made again", "files"), _check_cards),
)


def _compare_files(
    run: _Run,
    check: Check,
    listed: Mapping[str, str],
    present: Sequence[str],
    list_name: str,
    directory: str,
) -> None:
    """A list of hashes against the files under `directory`."""
    prefix = f"{directory}/" if directory else ""
    for name, expected in listed.items():
        check.count += 1
        found = run.sha256(prefix + name) if name in present else None
        if found is None:
            check.fail(prefix + name, problem=f"is listed in {list_name}, but is not there")
        elif found != expected:
            check.fail(
                prefix + name,
                recorded=expected,
                found=found,
                problem=f"has SHA-256 {{found}}, {list_name} says {{recorded}}",
            )
    for name in present:
        if name not in listed:
            check.fail(prefix + name, problem=f"is not listed in {list_name}")


def _sums(path: Path) -> dict[str, str]:
    """File -> hash of a list in the format of sha256sum(1)."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or name in found:
            raise RunError(f"line {number} is not a hash and a name", where=str(path))
        found[name] = digest
    return found


def _first_difference(recorded: Path, made: Path) -> tuple[str, str, str]:
    """(line, recorded, made) where two files first differ; no words for binary ones."""
    if recorded.suffix == ".png":
        return "", file_sha256(recorded), file_sha256(made)
    old, new = (
        path.read_text(encoding="utf-8", errors="replace").split("\n") for path in (recorded, made)
    )
    number = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
        min(len(old), len(new)),
    )
    before, after = (rows[number] if number < len(rows) else _ABSENT for rows in (old, new))
    return f"line {number + 1}", before, after


def _relative(run_dir: Path, where: Any) -> str:
    path = Path(str(where)) if where else run_dir
    return path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else str(where)


def _join(key: str, name: str) -> str:
    if re.fullmatch(r"\w+", name):
        return f"{key}.{name}" if key else name
    return f'{key}["{name}"]'


def _equal(recorded: Any, computed: Any) -> bool:
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in (recorded, computed)
    )
    if numbers and float in (type(recorded), type(computed)):
        return math.isclose(recorded, computed, rel_tol=TOLERANCE, abs_tol=0.0)
    return type(recorded) is type(computed) and recorded == computed


def _short(value: Any, width: int = 90) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
