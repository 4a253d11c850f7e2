"""Measure all variants under one declared load, interleaved round by round."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import psutil
import torch
from torch import nn

from compressor.errors import CompressorError, RecipeError, RunError
from compressor.measure import metrics, points
from compressor.measure.engines.base import Engine, RequestSample
from compressor.measure.engines.transformers import (
    CacheKind,
    Loader,
    TransformersEngine,
)
from compressor.measure.prices import price_basis, resolve_prices
from compressor.measure.samples import write_samples
from compressor.measure.workload import (
    PROMPTS,
    Workload,
    build_workload,
    tokenizer_encode,
    write_prompts,
)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_FAILURES = (CompressorError, RuntimeError, ValueError, TypeError, OSError, KeyError)
_WARM_UP_TOKENS = 4
_RESERVE_BYTES = 1 << 30


class _Task(Protocol):
    def advance(self, n: int, /) -> None:
        """Count `n` steps as done."""


class ProgressReporter(Protocol):
    """The part of `compressor.progress.Progress` that a measurement uses."""

    def task(self, description: str, total: int, /) -> AbstractContextManager[_Task]:
        """Open a task of `total` steps."""


@dataclass(frozen=True)
class MeasureSettings:
    """The declared load.

    Attributes:
        input_length, output_length: tokens of every request.
        concurrency: points of the sweep; a batch of that many requests starts together.
        requests: requests per point and variant over all rounds; rounded up to full batches in
            each round.
        rounds: how often the variants take turns; the confidence intervals rest on rounds.
        dtype: ``auto`` takes the faster of float32 and bfloat16 for each variant.
        prices: overrides of the price table, see `prices.resolve_prices`.
        keep_loaded: None keeps all models in memory when they fit, else reloads each round.
        ttft_ms, tpot_ms: service level objective [ms]; only requests inside it count as goodput.
    """

    engine: str = "transformers"
    dtype: str = "auto"
    input_length: int = 128
    output_length: int = 64
    concurrency: tuple[int, ...] = (1, 4)
    requests: int = 8
    rounds: int = 5
    seed: int = 0
    prompts: str = "prompts"
    prices: Mapping[str, Any] = field(default_factory=dict)
    keep_loaded: bool | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        """Sort the sweep; raise RecipeError for a load that cannot be run."""
        object.__setattr__(self, "concurrency", tuple(sorted(set(self.concurrency))))
        counts = (self.input_length, self.output_length, self.requests, self.rounds)
        if min(counts) < 1 or not self.concurrency or min(self.concurrency) < 1:
            raise RecipeError(
                "lengths, requests, rounds and concurrency must all be at least 1",
                where="measure.workload",
                fix="for example input_length: 128, output_length: 64, concurrency: [1, 4]",
            )
        if self.output_length < 2:
            raise RecipeError(
                "output_length must be at least 2, else there is no time per output token",
                where="measure.workload.output_length",
                fix="for example 64",
            )
        if self.engine != "transformers":
            raise RecipeError(
                f"engine {self.engine!r} is not known",
                where="measure.engine",
                fix="use transformers",
            )
        if self.dtype != "auto" and self.dtype not in _DTYPES:
            raise RecipeError(
                f"dtype {self.dtype!r} is not known",
                where="measure.dtype",
                fix=f"use auto, {', '.join(_DTYPES)}",
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MeasureSettings:
        """Settings from the recipe's ``measure`` section as a plain dict; absent keys default.

        ``workload.slo`` may hold ``ttft_ms`` and ``tpot_ms``.
        """
        load = dict(config.get("workload") or {})
        load |= {key: config[key] for key in ("engine", "dtype") if key in config}
        load |= load.pop("slo", None) or {}
        names = {item.name for item in dataclasses.fields(cls)}
        values = {key: value for key, value in load.items() if key in names and value is not None}
        if "concurrency" in values:
            values["concurrency"] = tuple(values["concurrency"])
        return cls(**values, prices=dict(config.get("prices") or {}))

    def served(self, concurrency: int) -> int:
        """Requests that one variant really serves at a point of the sweep."""
        return self.batches(concurrency) * concurrency * self.rounds

    def batches(self, concurrency: int) -> int:
        """Batches per round at one point of the sweep."""
        return math.ceil(self.requests / (self.rounds * concurrency))

    @property
    def goal(self) -> metrics.Goal:
        """The service level objective."""
        return metrics.Goal(self.ttft_ms, self.tpot_ms)


@dataclass(frozen=True)
class Probe:
    """What was tried for a variant before measuring, and what won.

    `tokens_per_second` holds ``"<dtype>/<cache>" -> tok/s`` of whole requests, `failed` the reason
    for what did not run.
    """

    dtype: str
    cache: CacheKind
    tokens_per_second: dict[str, float]
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def probe_variant(
    loader: Loader,
    workload: Workload,
    settings: MeasureSettings,
    caches: Sequence[CacheKind],
) -> tuple[Probe, nn.Module]:
    """Try a variant in each dtype and kind of cache; returns the fastest and a model in that dtype.

    Every variant, the baseline first of all, is thus measured at its best. Each is tried at the
    first point of the sweep with at most 16 output tokens, median of three after a warm-up.
    Raises the last error when nothing ran.
    """
    prompts = workload.batch(0, settings.concurrency[0])
    output_length = min(16, settings.output_length)
    names = ("float32", "bfloat16") if settings.dtype == "auto" else (settings.dtype,)
    rates: dict[str, float] = {}
    failed: dict[str, str] = {}
    last_error: Exception | None = None
    loaded: tuple[str, nn.Module] | None = None
    for name in names:
        loaded = None  # before the next model is loaded
        try:
            model = loader(_DTYPES[name])
        except _FAILURES as error:
            failed[name], last_error = str(error), error
            continue
        loaded = (name, model)
        for cache in caches:
            engine = TransformersEngine(_ready(model), cache=cache)
            engine.start()
            try:
                rates[f"{name}/{cache}"] = _rate(engine, prompts, output_length)
            except _FAILURES as error:
                failed[f"{name}/{cache}"], last_error = str(error), error
            engine.stop()
        del model, engine
    if not rates:
        assert last_error is not None
        raise last_error
    dtype, best = max(rates, key=lambda key: rates[key]).split("/")
    if loaded is None or loaded[0] != dtype:
        loaded = None
        gc.collect()
        loaded = (dtype, loader(_DTYPES[dtype]))
    kind: CacheKind = "static" if best == "static" else "dynamic"
    return Probe(dtype, kind, rates, failed), loaded[1]


def _rate(engine: Engine, prompts: list[list[int]], output_length: int) -> float:
    engine.generate(prompts, min(_WARM_UP_TOKENS, output_length))
    return statistics.median(
        metrics.throughput(engine.generate(prompts, output_length)) for _ in range(3)
    )


def _ready(model: nn.Module, again: Loader | None = None) -> Loader:
    """A loader that hands out `model`: each time, or once and then what `again` loads."""
    spare = [model]

    def load(dtype: torch.dtype) -> nn.Module:
        if again is None:
            return spare[0]
        return spare.pop() if spare else again(dtype)

    return load


class _Silent:
    def advance(self, n: int, /) -> None:
        """Nothing is shown."""


def _task(
    progress: ProgressReporter | None, description: str, total: int
) -> AbstractContextManager[_Task]:
    return progress.task(description, total) if progress else nullcontext(_Silent())


def _fits(largest_bytes: int) -> bool:
    """Whether another model as large as the largest so far fits beside those in memory.

    Twice its size is asked for: loading holds the checkpoint and the converted weights.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] > 2 * largest_bytes + _RESERVE_BYTES
    return psutil.virtual_memory().available > 2 * largest_bytes + _RESERVE_BYTES


def _warm_up(engine: Engine, workload: Workload, concurrency: Sequence[int]) -> None:
    """Requests that leave no sample: memory pools, thread pools and lazy packing get ready."""
    for size in concurrency:
        engine.generate(workload.batch(0, size), _WARM_UP_TOKENS)


def _measure_point(
    engine: Engine,
    workload: Workload,
    settings: MeasureSettings,
    *,
    concurrency: int,
    round_index: int,
    variant: str,
    origin: float,
) -> list[RequestSample]:
    """All batches of one variant at one concurrency in one round, times relative to `origin`."""
    rows: list[RequestSample] = []
    batches = settings.batches(concurrency)
    for batch in range(batches):
        first = (round_index * batches + batch) * concurrency
        prompts = workload.batch(first, concurrency)
        for index, sample in enumerate(engine.generate(prompts, settings.output_length)):
            rows.append(
                dataclasses.replace(
                    sample,
                    request_id=f"{variant}/c{concurrency}/r{round_index}/b{batch}/{index}",
                    start_s=round(sample.start_s - origin, 7),
                    first_token_s=round(sample.first_token_s - origin, 7),
                    token_times_s=tuple(round(t - origin, 7) for t in sample.token_times_s),
                    concurrency=concurrency,
                    round=round_index,
                    variant=variant,
                )
            )
    return rows


class _Fleet:
    """The engines of all variants: all started when they fit, else one at a time."""

    def __init__(
        self,
        loaders: Mapping[str, Loader],
        workload: Workload,
        settings: MeasureSettings,
    ) -> None:
        self.baseline = next(iter(loaders))
        self.errors: dict[str, str] = {}
        self.metadata: dict[str, dict[str, Any]] = {}
        self.probes: dict[str, Probe] = {}
        self.keep = settings.keep_loaded is not False
        self._loaders, self._workload, self._settings = (
            dict(loaders),
            workload,
            settings,
        )
        self._engines: dict[str, Engine] = {}
        self._started: set[str] = set()

    def prepare(self, name: str) -> None:
        """Probe a variant and start it; falls back to one at a time when memory is short."""
        if self.keep and self._settings.keep_loaded is None and self.metadata:
            self.keep = _fits(max(facts["model_bytes"] for facts in self.metadata.values()))
        if not self.keep:
            self.stop_all()
        caches: tuple[CacheKind, ...] = ("dynamic", "static")
        if name != self.baseline:
            caches = (self.probes[self.baseline].cache,)
        loader = self._loaders[name]
        try:
            probe, model = probe_variant(loader, self._workload, self._settings, caches)
        except _FAILURES as error:
            self.fail(name, error)
            return
        self.probes[name] = probe
        self._engines[name] = TransformersEngine(
            _ready(model, again=loader), dtype=_DTYPES[probe.dtype], cache=probe.cache
        )
        del model
        self.use(name)

    def use(self, name: str) -> Engine | None:
        """The started engine; None (and the reason in `errors`) when it cannot serve."""
        if name in self.errors:
            return None
        engine = self._engines[name]
        if name not in self._started:
            if not self.keep:
                self.stop_all()
            try:
                engine.start()
                self._started.add(name)
                self.metadata.setdefault(name, engine.metadata())
                _warm_up(engine, self._workload, self._settings.concurrency)
            except _FAILURES as error:
                self.fail(name, error)
                return None
        return engine

    def fail(self, name: str, error: Exception) -> None:
        """Take a variant out of the measurement; without the baseline there is none."""
        if name in self._engines:
            self._engines[name].stop()
        self._started.discard(name)
        if name == self.baseline:
            raise RunError(
                f"the baseline cannot be measured: {error}",
                where=f"measure, variant {name}",
                fix="check that the model generates in transformers on this device",
            ) from error
        self.errors[name] = str(error) or type(error).__name__

    def stop_all(self) -> None:
        """Free every model."""
        for name in self._started:
            self._engines[name].stop()
        self._started.clear()


def _schedule(
    names: Sequence[str], settings: MeasureSettings, keep: bool
) -> list[tuple[int, str, int]]:
    """(round, variant, concurrency) in order: the variants take turns as closely as memory allows.

    All loaded: A B C at each point of each round. Reloading: each variant serves its whole sweep of
    the round before the next is loaded.
    """
    rounds, sweep = range(settings.rounds), settings.concurrency
    if keep:
        return [(turn, name, size) for turn in rounds for size in sweep for name in names]
    return [(turn, name, size) for turn in rounds for name in names for size in sweep]


def measure(
    variants: Mapping[str, Loader],
    tokenizer: Any,
    prompts: Sequence[str],
    settings: MeasureSettings,
    out_dir: Path,
    progress: ProgressReporter | None = None,
    *,
    artifact_bytes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Measure the variants; the first one is the baseline.

    Args:
        variants: name -> ``loader(dtype)`` of the ready model in evaluation mode, in order. With
            dtype ``auto`` each variant runs in the dtype that serves it fastest (`probe_variant`).
        tokenizer: Hugging Face tokenizer that all variants share.
        prompts: texts of the workload (raw text, no chat template).
        out_dir: gets ``samples/<variant>.jsonl.gz``, ``prompts.jsonl.gz`` and ``ledger.json``.
        artifact_bytes: size on disk by variant, for the storage line [bytes].

    Returns the JSON-ready content of ``ledger.json``: ``baseline``, ``performance`` {variant: [row
    per concurrency]}, ``workload``, ``prompts`` (path, sha256, prompt_sha256 of each), ``prices``,
    ``price_basis``, ``engines`` {variant: facts}, ``samples`` {variant: path, sha256, requests},
    ``probes`` {variant: what was tried}, ``errors`` {variant: message of
    those that failed}, ``artifact_bytes``, ``seconds``, ``notes``.

    Raises RunError when the baseline fails, RecipeError when the prompts hold no text or the prices
    cannot be used.
    """
    began = time.perf_counter()
    baseline = next(iter(variants))
    gpu_name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    prices = resolve_prices(settings.prices, gpu_name=gpu_name, cpu_count=available_cpus())
    needed = max(settings.served(size) for size in settings.concurrency)
    workload = build_workload(
        prompts,
        tokenizer_encode(tokenizer),
        input_length=settings.input_length,
        count=min(needed, max(len(prompts), *settings.concurrency)),
        seed=settings.seed,
        source=settings.prompts,
    )
    fleet = _Fleet(variants, workload, settings)
    samples: dict[str, list[RequestSample]] = {name: [] for name in variants}
    try:
        with _task(progress, "prepare measurement", len(variants)) as task:
            for name in variants:
                fleet.prepare(name)
                task.advance(1)
        schedule = _schedule(list(variants), settings, fleet.keep)
        origin = time.perf_counter()
        with _task(progress, "measure", len(schedule)) as task:
            for turn, name, size in schedule:
                engine = fleet.use(name)
                if engine is not None:
                    try:
                        samples[name] += _measure_point(
                            engine,
                            workload,
                            settings,
                            concurrency=size,
                            round_index=turn,
                            variant=name,
                            origin=origin,
                        )
                    except _FAILURES as error:
                        fleet.fail(name, error)
                task.advance(1)
    finally:
        fleet.stop_all()

    for name in fleet.errors:
        del samples[name]
    sizes = {name: int(size) for name, size in (artifact_bytes or {}).items() if name in samples}
    files = {}
    for name, rows in samples.items():
        path = Path("samples") / f"{quote(name, safe='')}.jsonl.gz"  # a name is no path
        digest = write_samples(Path(out_dir) / path, rows)
        files[name] = {"path": path.as_posix(), "sha256": digest, "requests": len(rows)}
    engines = {name: fleet.metadata[name] for name in samples}
    result: dict[str, Any] = {
        "baseline": baseline,
        "performance": points.performance(
            samples,
            baseline=baseline,
            engines=engines,
            prices=prices,
            artifact_bytes=sizes,
            seed=settings.seed,
            goal=settings.goal,
        ),
        "workload": {
            "engine": settings.engine,
            **workload.describe(),
            "output_length": settings.output_length,
            "concurrency": list(settings.concurrency),
            "requests": {str(size): settings.served(size) for size in settings.concurrency},
            "rounds": settings.rounds,
            "seed": settings.seed,
            "goal": {"ttft_ms": settings.ttft_ms, "tpot_ms": settings.tpot_ms},
            "interleaved": "every point of every round" if fleet.keep else "every round",
            "confidence": metrics.CONFIDENCE,
        },
        "prompts": write_prompts(Path(out_dir) / PROMPTS, workload.tokens.tolist()),
        "prices": prices.to_dict(),
        "price_basis": price_basis(prices, gpu_name=gpu_name, cpu_count=available_cpus()),
        "engines": engines,
        "samples": files,
        "probes": {name: probe.to_dict() for name, probe in fleet.probes.items()},
        "errors": fleet.errors,
        "artifact_bytes": sizes,
        "seconds": time.perf_counter() - began,
        "notes": _notes(settings, fleet),
    }
    target = Path(out_dir) / points.LEDGER
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def available_cpus() -> int:
    """CPUs that this process may run on."""
    affinity = getattr(psutil.Process(), "cpu_affinity", None)
    return len(affinity()) if affinity else psutil.cpu_count() or 1


def _notes(settings: MeasureSettings, fleet: _Fleet) -> list[str]:
    probe = fleet.probes[fleet.baseline]
    tried = ", ".join(f"{key} {rate:.1f} tok/s" for key, rate in probe.tokens_per_second.items())
    notes = [
        f"The baseline runs in {probe.dtype} with a {probe.cache} key-value cache, its fastest of "
        f"those tried ({tried}); all variants use the same kind of cache"
        + (", each in its own fastest data type." if settings.dtype == "auto" else "."),
        f"Each request: {settings.input_length} prompt tokens, {settings.output_length} greedy "
        "output tokens, end-of-sequence ignored; a batch of as many requests as the concurrency "
        "starts together. Warm-up is excluded.",
    ]
    if not fleet.keep:
        notes.append(
            "The models did not stay in memory together: each was reloaded every round, so the "
            "variants take turns by round only."
        )
    if settings.rounds < 5:
        notes.append(
            f"Only {settings.rounds} round(s): the confidence intervals are wide or missing; use 5 "
            "or more rounds."
        )
    return notes
