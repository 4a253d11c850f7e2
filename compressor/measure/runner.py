"""Measure all variants under one declared load, interleaved round by round."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote

import psutil
import torch

from compressor.measure import metrics, points
from compressor.measure.energy import EnergyMeter
from compressor.measure.engines.base import RequestSample, ServedEngine
from compressor.measure.fleet import FAILURES, Candidates, Fleet
from compressor.measure.load import LoadResult, closed_loop, open_loop, run_load
from compressor.measure.prices import price_basis, resolve_prices
from compressor.measure.samples import write_samples
from compressor.measure.settings import MeasureSettings, Point
from compressor.measure.sharing import gpu_sharing
from compressor.measure.workload import PROMPTS, Workload, write_prompts

LOGS = "logs"
_CLOCK_DIGITS = 7


class _Task(Protocol):
    def advance(self, n: int, /) -> None:
        """Count `n` steps as done."""


class ProgressReporter(Protocol):
    """The part of `compressor.progress.Progress` that a measurement uses."""

    def task(self, description: str, total: int, /) -> AbstractContextManager[_Task]:
        """Open a task of `total` steps."""


class _Silent:
    def advance(self, n: int, /) -> None:
        """Nothing is shown."""


def _task(
    progress: ProgressReporter | None, description: str, total: int
) -> AbstractContextManager[_Task]:
    return progress.task(description, total) if progress else nullcontext(_Silent())


def _load(
    engine: ServedEngine, workload: Workload, settings: MeasureSettings, point: Point, turn: int
) -> LoadResult:
    """One variant at one point in one round; every variant gets the same prompts."""
    count = settings.per_round(point)
    prompts = [tokens[: point.prompt_length(len(tokens))] for tokens in workload.tokens]
    common: dict[str, Any] = {
        "output_lengths": point.output_lengths(settings.output_lengths(len(prompts))),
        "requests": count,
        "ignore_eos": settings.ignore_eos,
        "first": turn * count,
    }
    rate = point.rate_per_s
    if rate is None:
        return run_load(
            engine.client,
            lambda client: closed_loop(client, prompts, concurrency=point.concurrency, **common),
        )
    return run_load(
        engine.client,
        lambda client: open_loop(
            client,
            prompts,
            rate_per_s=rate,
            arrival=settings.arrival,
            seed=settings.seed + turn,
            **common,
        ),
    )


def _placed(
    sample: RequestSample, *, variant: str, point: Point, turn: int, origin: float
) -> RequestSample:
    """A sample under its place in the run, times relative to `origin`."""

    def moved(moment: float) -> float:
        return round(moment - origin, _CLOCK_DIGITS)

    due = sample.scheduled_s
    return dataclasses.replace(
        sample,
        request_id=f"{variant}/{point.name}/r{turn}/{sample.request_id}",
        start_s=moved(sample.start_s),
        first_token_s=moved(sample.first_token_s),
        token_times_s=tuple(moved(moment) for moment in sample.token_times_s),
        scheduled_s=None if due is None else moved(due),
        concurrency=point.concurrency,
        rate_per_s=point.rate_per_s,
        round=turn,
        variant=variant,
        part=point.part,
    )


def _schedule(
    names: Sequence[str], settings: MeasureSettings, keep: bool
) -> list[tuple[int, str, Point]]:
    """(round, variant, point) in order: the variants take turns as closely as memory allows.

    All loaded: A B C at each point of each round. Reloading: each variant serves its whole sweep of
    the round before the next is loaded.
    """
    rounds, sweep = range(settings.rounds), settings.points
    if keep:
        return [(turn, name, point) for turn in rounds for point in sweep for name in names]
    return [(turn, name, point) for turn in rounds for name in names for point in sweep]


def measure(
    variants: Mapping[str, Candidates],
    workload: Workload,
    settings: MeasureSettings,
    out_dir: Path,
    progress: ProgressReporter | None = None,
    *,
    artifact_bytes: Mapping[str, int] | None = None,
    basis: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the variants; the first one is the baseline.

    Args:
        variants: name -> what it could be served by (`fleet.in_process` and the like), in order.
            With several candidates each variant runs in the one that serves it fastest.
        workload: prompts that all of them get.
        out_dir: gets ``samples/<variant>.jsonl.gz``, ``prompts.jsonl.gz`` and ``ledger.json``.
        artifact_bytes: size on disk by variant, for the storage line [bytes].
        basis: what estimates of these points can be made from: ``device``
            (`devices.Device.to_dict`) and ``dimensions`` of the model; kept as they are.

    Returns the JSON-ready content of ``ledger.json``: ``baseline``, ``performance`` {variant: [row
    per point]}, ``split`` (where the load's parts were measured: `points.split_costs`),
    ``techniques`` (where a waterfall is declared: `techniques.gains`), ``workload``,
    ``serving`` {variant: settings}, ``waterfall`` (its steps as declared), ``prompts`` (path,
    sha256, prompt_sha256 of each), ``prices``, ``price_basis``,
    ``list_prices`` {variant: of an address that is paid by the token}, ``economics`` {variant:
    scenarios, sensitivity, ... at one point}, ``engines`` {variant: facts},
    ``samples`` {variant: path, sha256, requests}, ``loads`` (what each load took: generator's
    share of a CPU, lateness, energy, drafts counted by an engine that speculates), ``probes``
    {variant: what was tried}, ``errors`` {variant: message of those that failed},
    ``artifact_bytes``, ``device`` and ``dimensions`` (None where not known), ``gpu`` (who shares
    it: `sharing.Sharing`, None without one), ``seconds``, ``notes``.

    Raises RunError when the baseline fails, RecipeError when the prices cannot be used.
    """
    began = time.perf_counter()
    baseline = next(iter(variants))
    gpu_name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    prices = resolve_prices(settings.prices, gpu_name=gpu_name, cpu_count=available_cpus())
    fleet = Fleet(variants, workload, settings)
    samples: dict[str, list[RequestSample]] = {name: [] for name in variants}
    loads: list[dict[str, Any]] = []
    device: Literal["cuda", "cpu"] = "cuda" if gpu_name else "cpu"
    sharing = gpu_sharing()
    try:
        with _task(progress, "prepare measurement", len(variants)) as task:
            for name in variants:
                fleet.prepare(name)
                task.advance(1)
        schedule = _schedule(list(variants), settings, fleet.keep)
        origin = time.perf_counter()
        with _task(progress, "measure", len(schedule)) as task:
            for turn, name, point in schedule:
                engine = fleet.use(name)
                if engine is not None:
                    try:
                        before = _drafted(engine)
                        with EnergyMeter(device=device, declared_watts=prices.watts) as meter:
                            result = _load(engine, workload, settings, point, turn)
                        drafted = drafted_since(before, _drafted(engine))
                    except FAILURES as error:
                        fleet.fail(name, error)
                    else:
                        samples[name] += [
                            _placed(row, variant=name, point=point, turn=turn, origin=origin)
                            for row in result.samples
                        ]
                        loads.append(
                            _load_facts(result, settings, name, point, turn)
                            | {"energy": meter.result.to_dict(), "drafted": drafted}
                        )
                        fleet.check(name, result)
                task.advance(1)
    finally:
        fleet.stop_all()

    for name in fleet.errors:
        del samples[name]
    loads = [load for load in loads if load["variant"] in samples]
    sizes = {name: int(size) for name, size in (artifact_bytes or {}).items() if name in samples}
    files = {}
    for name, rows in samples.items():
        path = Path("samples") / f"{quote(name, safe='')}.jsonl.gz"  # a name is no path
        digest = write_samples(Path(out_dir) / path, rows)
        files[name] = {"path": path.as_posix(), "sha256": digest, "requests": len(rows)}
    result_: dict[str, Any] = {
        "baseline": baseline,
        "performance": {},
        "workload": {
            **workload.describe(),
            "input_length": settings.input_length,
            "engine": settings.engine,
            "batching": settings.batching if settings.engine == "transformers" else None,
            "output_length": settings.output_length,
            "output_length_range": settings.output_length_range
            and list(settings.output_length_range),
            "ignore_eos": settings.ignore_eos,
            "concurrency": list(settings.concurrency),
            "rate_per_s": list(settings.rate_per_s),
            "arrival": settings.arrival,
            "requests": {point.name: settings.served(point) for point in settings.points},
            "rounds": settings.rounds,
            "seed": settings.seed,
            "split": settings.split,
            "goal": dataclasses.asdict(settings.goal),
            "interleaved": "every point of every round" if fleet.keep else "every round",
            "confidence": metrics.CONFIDENCE,
        },
        "serving": {name: settings.serving(name) for name in samples},
        "waterfall": [dict(step) for step in settings.waterfall],
        "prompts": write_prompts(Path(out_dir) / PROMPTS, workload.tokens),
        "prices": prices.to_dict(),
        "price_basis": price_basis(prices, gpu_name=gpu_name, cpu_count=available_cpus())
        | {"overrides": dict(settings.prices)},
        "list_prices": {
            name: {key: one.get(key) for key in points.LIST_PRICES}
            for name, one in settings.endpoints.items()
            if name in samples
        },
        "engines": {name: fleet.metadata[name] for name in samples},
        "samples": files,
        "loads": loads,
        "probes": {name: probe.to_dict() for name, probe in fleet.probes.items()},
        "errors": fleet.errors,
        "artifact_bytes": sizes,
        "device": None,
        "dimensions": None,
        **(basis or {}),
        "seconds": time.perf_counter() - began,
        "gpu": sharing and sharing.to_dict(),
        "notes": [*_notes(settings, fleet), *(sharing.notes if sharing else [])],
    }
    result_ |= points.figures(result_, samples)
    target = Path(out_dir) / points.LEDGER
    target.write_text(json.dumps(result_, indent=1) + "\n", encoding="utf-8")
    return result_


def _load_facts(
    result: LoadResult, settings: MeasureSettings, variant: str, point: Point, turn: int
) -> dict[str, Any]:
    """What is kept of a load beside its samples."""
    own = settings.engine != "transformers"  # else the model computes in this process
    return {
        "variant": variant,
        "concurrency": point.concurrency,
        "rate_per_s": point.rate_per_s,
        "part": point.part,
        "round": turn,
        "wall_s": result.wall_s,
        "generator_cpu_s": result.cpu_s if own else None,
        "generator_max_lateness_s": result.max_lateness_s,
    }


def _drafted(engine: ServedEngine) -> dict[str, Any] | None:
    """What the engine has counted of drafts so far; None where it counts none."""
    count: Callable[[], dict[str, Any] | None] = getattr(engine, "drafted", lambda: None)
    return count()


def drafted_since(
    before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The counts of a load: a server that speculates has counters from its start on."""
    if before is None or after is None:
        return after
    earlier = before["accepted_by_position"] + [0] * len(after["accepted_by_position"])
    by_position = [
        now - then for now, then in zip(after["accepted_by_position"], earlier, strict=False)
    ]
    return {
        name: after[name] - before[name] for name in ("drafts", "draft_tokens", "accepted_tokens")
    } | {"accepted_by_position": by_position}


def available_cpus() -> int:
    """CPUs that this process may run on."""
    affinity = getattr(psutil.Process(), "cpu_affinity", None)
    return len(affinity()) if affinity else psutil.cpu_count() or 1


def _notes(settings: MeasureSettings, fleet: Fleet) -> list[str]:
    probe = fleet.probes[fleet.baseline]
    notes = []
    if probe.tokens_per_second:
        tried = ", ".join(
            f"{key} {rate:.1f} tok/s" for key, rate in probe.tokens_per_second.items()
        )
        notes.append(
            f"The baseline runs in {probe.dtype}"
            + (f" with a {probe.cache} key-value cache" if probe.cache else "")
            + f", its fastest of those tried ({tried}); every other variant in its own fastest."
        )
    length = (
        f"{settings.input_length} prompt tokens"
        if settings.input_length is not None
        else "the prompt as it is"
    )
    bounds = settings.output_length_range
    count = f"{bounds[0]} to {bounds[1]}" if bounds else str(settings.output_length)
    answer = (
        f"{count} greedy output tokens, end-of-sequence ignored"
        if settings.ignore_eos
        else f"at most {count} greedy output tokens"
    )
    if bounds:
        answer += ", each prompt's number from the seed and the same for every variant"
    loop = (
        "as many requests as the concurrency are in flight all the time"
        if settings.concurrency
        else f"requests arrive at the declared rate ({settings.arrival})"
    )
    notes.append(f"Each request: {length}, {answer}; {loop}. Warm-up is excluded.")
    if not fleet.keep:
        notes.append(
            "The engines did not fit in memory together: each was started anew every round, so the "
            "variants take turns by round only."
        )
    if settings.rounds < 5:
        notes.append(
            f"Only {settings.rounds} round(s): the confidence intervals are wide or missing; use 5 "
            "or more rounds."
        )
    return notes
