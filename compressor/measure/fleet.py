"""The engines of all variants: what each could be, which was fastest, and which run now."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.errors import CompressorError, RecipeError, RunError
from compressor.measure import metrics
from compressor.measure.engines.base import ServedEngine
from compressor.measure.load import LoadResult, closed_loop, run_load
from compressor.measure.settings import DTYPES, MeasureSettings
from compressor.measure.workload import Workload
from compressor.numerics.memory import free_bytes

FAILURES = (CompressorError, RuntimeError, ValueError, TypeError, OSError, KeyError)
Loader = Callable[[torch.dtype], nn.Module]
# What a variant could be served by, by ``<dtype>`` or ``<dtype>/<cache>``; none runs yet.
Candidates = Mapping[str, Callable[[], ServedEngine]]

_WARM_UP_TOKENS = 4
_PROBE_TOKENS = 16
_RESERVE_BYTES = 1 << 30
_OPEN_LOOP_BATCHES = (1, 2, 4, 8, 16, 32, 64)  # that graphs are made for: any may come


@dataclass(frozen=True)
class Probe:
    """What was tried for a variant before measuring, and what won.

    Attributes:
        dtype: of the activations; empty where the engine was not told one.
        cache: kind of key-value cache; empty where there was no choice.
        tokens_per_second: ``"<dtype>/<cache>" -> tok/s`` of whole requests; empty where there was
            nothing to choose from.
        failed: the reason for what did not run.
    """

    dtype: str
    cache: str
    tokens_per_second: dict[str, float]
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Fleet:
    """Starts engines, all of them when they fit, else one at a time.

    Args:
        variants: candidates of each, the baseline first.
        workload: its first prompts are what candidates are tried with.
        settings: the declared load.

    Attributes:
        keep: whether all stay in memory.
        errors: why a variant cannot be measured any more.
        metadata: facts of each started engine.
        probes: what was tried for each.
    """

    def __init__(
        self, variants: Mapping[str, Candidates], workload: Workload, settings: MeasureSettings
    ) -> None:
        self.baseline = next(iter(variants))
        self.errors: dict[str, str] = {}
        self.metadata: dict[str, dict[str, Any]] = {}
        self.probes: dict[str, Probe] = {}
        self.keep = settings.keep_loaded is not False
        self._variants, self._workload, self._settings = dict(variants), workload, settings
        self._engines: dict[str, ServedEngine] = {}
        self._started: set[str] = set()
        self._largest = 0  # bytes that an engine has taken

    def prepare(self, name: str) -> None:
        """Choose a variant's engine and start it; from now on one at a time when memory is short.

        Every variant, the baseline first of all, is thus measured at its best: each candidate
        serves the first point of the sweep with few tokens, median of three after a warm-up. The
        kind of cache that the baseline is fastest with is taken for all. A winner that is still up,
        the last that was tried, is not started again.
        """
        if self.keep and self._settings.keep_loaded is None and self.metadata:
            self.keep = _free() > self._largest + _RESERVE_BYTES
        if not self.keep:
            self.stop_all()
        candidates = self._variants[name]
        if name != self.baseline and (kind := self.probes[self.baseline].cache):
            same = {k: v for k, v in candidates.items() if k.endswith(f"/{kind}")}
            candidates = same or candidates  # none where it is batched otherwise
        rates: dict[str, float] = {}
        failed: dict[str, str] = {}
        last: Exception | None = None
        tried = candidates if len(candidates) > 1 else {}
        for number, (label, make) in enumerate(tried.items(), 1):
            engine, kept = None, False
            try:
                engine = make()
                taken = self._bring_up(engine)
                rates[label] = self._rate(engine)
                kept = number == len(tried) and label == _fastest(rates)
            except FAILURES as error:
                # Its frames hold what was loaded, and with it the memory of a GPU.
                failed[label], last = str(error), error.with_traceback(None)
            finally:
                if engine is not None and not kept:
                    engine.stop()
            if kept and engine is not None:  # it has won and is up: no second start
                self._engines[name] = engine
                self._started.add(name)
                self._largest = max(self._largest, taken)
        if tried and not rates:
            assert last is not None
            self.fail(name, last)
            return
        label = _fastest(rates) if rates else next(iter(candidates))
        dtype, _, cache = label.partition("/")
        self.probes[name] = Probe(dtype, cache, rates, failed)
        if name not in self._started:
            try:
                self._engines[name] = candidates[label]()
            except FAILURES as error:
                self.fail(name, error)
                return
        self.use(name)

    def _bring_up(self, engine: ServedEngine) -> int:
        """Start an engine and warm it up; the memory that it took [bytes]."""
        before = _free()
        engine.start()
        self._warm_up(engine)
        return before - _free()

    def _rate(self, engine: ServedEngine) -> float:
        length = min(_PROBE_TOKENS, self._settings.longest_output)
        rates = []
        for _ in range(3):
            samples = self._closed(engine, self._first, self._first, length).samples
            errors = [sample.error for sample in samples if sample.error]
            if errors:
                raise RunError(errors[0])
            rates.append(metrics.throughput(samples))
        return statistics.median(rates)

    @property
    def _first(self) -> int:
        return self._settings.concurrency[0] if self._settings.concurrency else 1

    def _closed(
        self, engine: ServedEngine, concurrency: int, requests: int, length: int
    ) -> LoadResult:
        return run_load(
            engine.client,
            lambda client: closed_loop(
                client,
                self._workload.tokens,
                concurrency=concurrency,
                requests=requests,
                output_lengths=length,
                ignore_eos=self._settings.ignore_eos,
            ),
        )

    def _warm_up(self, engine: ServedEngine) -> None:
        """Requests that leave no sample: memory pools, thread pools and lazy packing get ready."""
        for size in self._settings.concurrency or (1,):
            samples = self._closed(engine, size, size, _WARM_UP_TOKENS).samples
            if all(sample.error for sample in samples):
                raise RunError(f"no request of the warm-up was answered: {samples[0].error}")

    def use(self, name: str) -> ServedEngine | None:
        """The started engine; None (and the reason in `errors`) when it cannot serve."""
        if name in self.errors:
            return None
        engine = self._engines[name]
        try:
            if name not in self._started:
                if not self.keep:
                    self.stop_all()
                self._started.add(name)  # from here on it is to be stopped
                self._largest = max(self._largest, self._bring_up(engine))
            if name not in self.metadata:
                self.metadata[name] = facts = engine.metadata()
                # Loading holds the checkpoint and the converted weights.
                self._largest = max(self._largest, 2 * (facts.get("model_bytes") or 0))
        except FAILURES as error:
            self.fail(name, error)
            return None
        return engine

    def check(self, name: str, result: LoadResult) -> None:
        """Take a variant out whose engine died, or that answered no request of a load."""
        engine = self._engines[name]
        errors = [sample.error for sample in result.samples if sample.error]
        if not errors:
            return
        if not engine.healthy():
            message = f"its engine died: {errors[0]}"
            explain = getattr(engine, "failed", RunError)  # a server's has the end of its log
            self.fail(name, explain(message))
        elif len(errors) == len(result.samples):
            self.fail(name, RunError(f"no request was answered: {errors[0]}"))

    def fail(self, name: str, error: Exception) -> None:
        """Take a variant out of the measurement; without the baseline there is none."""
        if name in self._engines:
            self._engines[name].stop()
        self._started.discard(name)
        if name == self.baseline:
            raise RunError(
                f"the baseline cannot be measured: {error}",
                where=f"measure, variant {name}",
                fix=f"check that the model generates in {self._settings.engine} on this device",
            ) from error
        self.errors[name] = str(error) or type(error).__name__

    def stop_all(self) -> None:
        """Stop every engine and free its memory."""
        for name in self._started:
            self._engines[name].stop()
        self._started.clear()


def _fastest(rates: Mapping[str, float]) -> str:
    return max(rates, key=lambda label: rates[label])


def _free() -> int:
    """Memory left [bytes] where models live."""
    return free_bytes("cuda" if torch.cuda.is_available() else "cpu")


def _dtypes(settings: MeasureSettings) -> tuple[str, ...]:
    return ("float32", "bfloat16") if settings.dtype == "auto" else (settings.dtype,)


def in_process(loader: Loader, settings: MeasureSettings, longest_prompt: int) -> Candidates:
    """Candidates of the transformers engine.

    Args:
        loader: returns the ready model in evaluation mode for a dtype of its activations.
        settings: the declared load.
        longest_prompt: of the workload [tokens].
    """
    from compressor.measure.engines.continuous import ContinuousEngine
    from compressor.measure.engines.static import StaticEngine
    from compressor.measure.engines.transformers import CacheKind

    most = max(settings.concurrency, default=256)
    found: dict[str, Callable[[], ServedEngine]] = {}

    def static(dtype: str, cache: CacheKind) -> Callable[[], ServedEngine]:
        return lambda: StaticEngine(
            loader,
            dtype=DTYPES[dtype],
            cache=cache,
            batches=settings.concurrency or _OPEN_LOOP_BATCHES,
            longest=longest_prompt + settings.longest_output,
            max_batch=most,
        )

    def continuous(dtype: str) -> Callable[[], ServedEngine]:
        return lambda: ContinuousEngine(loader, dtype=DTYPES[dtype])

    for dtype in _dtypes(settings):
        if settings.batching == "continuous":
            found[dtype] = continuous(dtype)
        else:
            found[f"{dtype}/dynamic"] = static(dtype, "dynamic")
            found[f"{dtype}/static"] = static(dtype, "static")
    return found


def vllm_interpreter(program: str | None) -> Path:
    """The interpreter of an environment with vLLM, as given or found; RecipeError where there is
    none."""
    from compressor.doctor import vllm_python

    python = Path(program) if program else vllm_python()
    if python is None or not python.exists():
        raise RecipeError(
            f"no environment with vLLM{f' at {python}' if python else ''}",
            where="measure.program" if python else "measure.engine",
            fix="bash scripts/setup_vllm_cpu.sh, or name the interpreter of an environment that "
            "has vLLM in measure.program or $COMPRESSOR_VLLM_PYTHON",
        )
    return python


def vllm(directory: Path, log: Path, settings: MeasureSettings) -> Candidates:
    """Candidates of vLLM: the dtypes that the recipe leaves open, each a server of its own.

    Raises:
        RecipeError: there is no environment with vLLM.
    """
    from compressor.measure.engines.vllm import VllmServer

    python = vllm_interpreter(settings.program)
    told = any(flag.split("=")[0] == "--dtype" for flag in settings.flags)

    def server(dtype: str) -> Callable[[], ServedEngine]:
        flags = settings.flags if told else (*settings.flags, "--dtype", dtype)
        return lambda: VllmServer(
            python,
            directory,
            log.with_name(f"{log.name}.{dtype}.log" if dtype else f"{log.name}.log"),
            flags,
            settings.start_timeout_s,
            settings.variables,
        )

    return {dtype: server(dtype) for dtype in (("",) if told else _dtypes(settings))}


def llama_cpp(file: Path, log: Path, settings: MeasureSettings, longest_prompt: int) -> Candidates:
    """The one candidate of llama.cpp: a GGUF file says itself what it is computed in.

    Args:
        longest_prompt: of the workload [tokens]; every slot has room for it and its answer.
    """
    from compressor.measure.engines.llama_cpp import LlamaCppServer

    def server() -> ServedEngine:
        return LlamaCppServer(
            file,
            log.with_name(f"{log.name}.log"),
            context_length=longest_prompt + settings.longest_output,
            parallel=max(settings.concurrency, default=16),
            binary=settings.program,
            flags=settings.flags,
            start_timeout=settings.start_timeout_s,
            variables=settings.variables,
        )

    return {"": server}


def endpoint(variant: Mapping[str, Any], tokenizer: Any) -> Candidates:
    """The one candidate of an address that serves a variant already.

    Args:
        variant: url, model, key_variable, chat, knows_ignore_eos of the recipe's
            ``measure.endpoints``.
        tokenizer: makes text of the workload's token ids.
    """
    from compressor.measure.engines.endpoint import Endpoint

    keys = ("key_variable", "chat", "knows_ignore_eos")
    options = {key: variant[key] for key in keys if variant.get(key) is not None}
    return {
        "": lambda: Endpoint(variant["url"], variant["model"], decode=tokenizer.decode, **options)
    }
