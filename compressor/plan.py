"""From a recipe to a directed acyclic graph of stages, each with a content key and an estimate.

A stage's key is the SHA-256 of its kind, its settings, the keys of its inputs and the source code
(and library versions) that it runs: equal keys mean equal results, so a stage that is in the store
is not done again, and changing one setting redoes only what depends on it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import RunError
from compressor.quantize import registry
from compressor.store import Store, content_key

if TYPE_CHECKING:
    from compressor.models.source import ResolvedSource
    from compressor.recipe import Recipe, Variant

BASELINE = "baseline"
_PACKAGE = Path(__file__).parent

# The rooms whose source decides what a stage of each kind produces.
_ROOMS: dict[str, tuple[str, ...]] = {
    "load": ("models",),
    "calibrate": ("data",),
    "texts": ("data",),
    "rotate": ("models", "quantize"),
    "sensitivity": ("numerics", "models", "quantize"),
    "quantize": ("numerics", "models", "quantize"),
    "export": ("numerics", "models", "export"),
    "evaluate": ("numerics", "models", "evaluate"),
    "measure": ("numerics", "models", "export", "measure", "data"),
}
_HEAD_MEMORY = 300_000_000  # copies of a part of the output layer while it is solved
_LIBRARIES = ("torch", "transformers", "compressed-tensors", "tokenizers", "gguf")


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to take: seconds, bytes of memory, bytes of disk."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique in the plan, such as ``quantize:int4``.
        kind: selects the function in `compressor.stages`.
        variant: the variant it serves, None when it serves all.
        config: plain values that go into the key.
        inputs: names of the stages whose results it reads.
        key: content key (assuming that every input succeeds).
        cached: whether the store already has it.
        local: what the function needs on this machine but does not change its result (paths).
    """

    name: str
    kind: str
    variant: str | None
    config: dict[str, Any]
    inputs: tuple[str, ...]
    key: str
    cached: bool
    estimate: Estimate
    local: dict[str, Any] = field(default_factory=dict, compare=False)

    def key_given(self, keys: dict[str, str]) -> str:
        """The key when its inputs have ``keys``; inputs that are missing there are left out."""
        inputs = {name: keys[name] for name in self.inputs if name in keys}
        return content_key(
            {
                "kind": self.kind,
                "config": self.config,
                "in": inputs,
                "code": code_version(self.kind),
            }
        )


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which each comes after its inputs."""

    recipe: Recipe
    store: Store
    stages: tuple[Stage, ...]
    facts: ModelFacts

    @property
    def key(self) -> str:
        """Identity of the whole run."""
        return content_key([stage.key for stage in self.stages])

    @property
    def remaining(self) -> list[Stage]:
        return [stage for stage in self.stages if not stage.cached]

    def check_disk(self) -> None:
        """Raise `RunError` when the estimated bytes do not fit on the store's file system."""
        need = sum(stage.estimate.disk_bytes for stage in self.remaining)
        free = shutil.disk_usage(self.store.root).free
        if need > free:
            raise RunError(
                f"this run needs about {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
                where=str(self.store.root),
                fix="free some space, or put the store elsewhere with --store",
            )


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the source model that estimates are made from."""

    architecture: str
    parameters: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int


@functools.cache
def code_version(kind: str) -> str:
    """SHA-256 over the source of the rooms that a kind of stage runs, and library versions."""
    digest = hashlib.sha256()
    for room in _ROOMS[kind]:
        for path in sorted((_PACKAGE / room).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.relative_to(_PACKAGE).as_posix().encode())
                digest.update(path.read_bytes())
    for library in _LIBRARIES:
        try:
            digest.update(f"{library}={version(library)};".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()


def make_plan(recipe: Recipe, store: Store, only: Iterable[str] = ()) -> Plan:
    """Expand a recipe into stages.

    Args:
        recipe: validated recipe.
        store: where finished stages are looked up.
        only: names of the variants to keep; all when empty.

    Raises:
        RecipeError: a source that the recipe names does not exist.
        RunError: the model cannot be resolved (network, package not installed).
    """
    from compressor.models.source import resolve_source

    resolved = resolve_source(
        recipe.model.source,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
        allow_pickle=recipe.model.allow_pickle,
        base_dir=recipe.base_dir,
    )
    builder = _Builder(recipe, store, model_facts(resolved))
    builder.expand(resolved, set(only) or set(recipe.variants))
    return Plan(recipe, store, tuple(builder.stages.values()), builder.facts)


class _Builder:
    def __init__(self, recipe: Recipe, store: Store, facts: ModelFacts) -> None:
        self.recipe = recipe
        self.store = store
        self.facts = facts
        self.stages: dict[str, Stage] = {}
        self.speed = _Speed(facts)

    def add(
        self,
        name: str,
        kind: str,
        config: dict[str, Any],
        inputs: list[str],
        estimate: Estimate,
        *,
        variant: str | None = None,
        local: dict[str, Any] | None = None,
    ) -> str:
        # Settings go through JSON so that a key never depends on how a value is held in memory.
        plain = json.loads(json.dumps(config))
        draft = Stage(name, kind, variant, plain, tuple(inputs), "", False, estimate, local or {})
        key = draft.key_given({n: self.stages[n].key for n in inputs})
        cached = self.store.get(key) is not None
        if cached:
            estimate = Estimate(0.0, 0, 0)
        self.stages[name] = Stage(
            name, kind, variant, plain, tuple(inputs), key, cached, estimate, draft.local
        )
        return name

    def expand(self, resolved: ResolvedSource, wanted: set[str]) -> None:
        recipe, speed = self.recipe, self.speed
        model = self.add(
            "load",
            "load",
            {"source": _fingerprint(resolved, self.store), "dtype": recipe.model.dtype},
            [],
            speed.load(resolved.kind),
            local={"resolved": resolved},
        )
        calibration, walk = None, {}
        if recipe.calibration is not None:
            settings = recipe.calibration.model_dump(mode="json")
            walk = {key: settings.pop(key) for key in ("batch_size", "dtype", "all_experts")}
            calibration = self.add(
                "calibrate",
                "calibrate",
                settings | _local_file(recipe.calibration.source, recipe.base_dir, self.store),
                [model],
                Estimate(5, 600_000_000, 4 * settings["samples"] * settings["length"]),
                local={"base_dir": recipe.base_dir},
            )
        exports = [self._export(BASELINE, "compressed-tensors", [model])]
        texts = baseline_scores = None
        if recipe.evaluate is not None:
            texts, baseline_scores = self._baseline_scores(model)
        quantized, sources = {}, {}
        for name, variant in recipe.variants.items():
            if name not in wanted:
                continue
            steps = [step.dump() for step in variant.quantize]
            precision = variant.precision
            needs = bool(precision or variant.kv_cache) or any(
                step.needs_calibration for step in variant.quantize
            )
            source = [model]
            if registry.get(variant.quantize[0].algorithm).kind == "rotation":
                source.append(self._rotate(model, next(iter(steps.pop(0).values()))))
            config: dict[str, Any] = {"steps": steps, "ignore": list(variant.ignore)}
            if variant.kv_cache is not None:
                config["kv_cache"] = variant.kv_cache
            inputs = list(source)
            sources[name] = source
            tokens = length = 0
            if needs:
                assert recipe.calibration is not None and calibration is not None
                inputs.append(calibration)
                config |= walk
                length = recipe.calibration.length
                tokens = recipe.calibration.samples * length
            if precision is not None and calibration is not None:
                inputs.append(self._sensitivity(source, calibration, variant))
                config["precision"] = precision.model_dump(exclude={"samples"})
            if variant.lm_head is not None:
                config["lm_head"] = variant.lm_head.step(variant.quantizer)
            quantized[name] = self.add(
                f"quantize:{name}",
                "quantize",
                config,
                inputs,
                speed.quantize(
                    tokens,
                    length,
                    [step.options for step in variant.quantize],
                    _head_options(variant),
                ),
                variant=name,
            )
            for fmt in recipe.export:
                exports.append(
                    self._export(
                        name, fmt, [*source, quantized[name]], head=variant.lm_head is not None
                    )
                )
        if recipe.evaluate is not None and texts and baseline_scores:
            for name, stage in quantized.items():
                self.add(
                    f"evaluate:{name}",
                    "evaluate",
                    {"batch_size": recipe.evaluate.batch_size},
                    [*sources[name], texts, baseline_scores, stage],
                    speed.evaluate(self._evaluated_tokens(), variant=True),
                    variant=name,
                )
        if recipe.measure is not None:
            self.add(
                "measure",
                "measure",
                recipe.measure.model_dump(mode="json")
                | _local_file(recipe.measure.workload.prompts, recipe.base_dir, self.store),
                [model, *exports],
                speed.measure(recipe.measure.workload, len(exports)),
                local={"base_dir": recipe.base_dir},
            )

    def _rotate(self, model: str, options: dict[str, Any]) -> str:
        """The rotated checkpoint; shared by the variants that ask for the same rotation."""
        for stage in self.stages.values():
            if stage.kind == "rotate" and stage.config == options:
                return stage.name
        number = sum(stage.kind == "rotate" for stage in self.stages.values())
        size = 2 * (self.facts.parameters + self.facts.vocabulary * self.facts.hidden)
        memory = self.speed.BASE_MEMORY + 20 * self.facts.vocabulary * self.facts.hidden
        estimate = Estimate(5 + size / 5e7, memory, size)
        return self.add(f"rotate:{number}", "rotate", options, [model], estimate)

    def _sensitivity(self, source: list[str], calibration: str, variant: Variant) -> str:
        """Shared by the variants that ask for the same schemes on the same grids."""
        precision, calibrated = variant.precision, self.recipe.calibration
        assert precision is not None and calibrated is not None
        quantizer = variant.quantizer
        config: dict[str, Any] = {
            "schemes": precision.schemes,
            "grid": {
                key: getattr(quantizer.options, key, None) for key in ("group_size", "symmetric")
            },
            "samples": min(precision.samples, calibrated.samples),
            "batch_size": calibrated.batch_size,
        }
        for stage in self.stages.values():
            same = stage.config == json.loads(json.dumps(config))
            if stage.kind == "sensitivity" and same and stage.inputs == (*source, calibration):
                return stage.name
        number = sum(stage.kind == "sensitivity" for stage in self.stages.values())
        tokens = config["samples"] * calibrated.length
        return self.add(
            f"sensitivity:{number}",
            "sensitivity",
            config,
            [*source, calibration],
            self.speed.sensitivity(tokens, len(precision.schemes)),
        )

    def _export(self, variant: str, fmt: str, inputs: list[str], head: bool = False) -> str:
        parameters = self.facts.parameters
        if head:  # no longer shared with the embeddings
            parameters += self.facts.vocabulary * self.facts.hidden
        size = self.speed.bytes_per_weight(variant != BASELINE) * parameters
        return self.add(
            f"export:{variant}:{fmt}",
            "export",
            {"variant": variant, "format": fmt},
            inputs,
            Estimate(3 + size / 1.5e8, 1_000_000_000, int(size)),
            variant=variant,
        )

    def _baseline_scores(self, model: str) -> tuple[str, str]:
        settings = self.recipe.evaluate
        assert settings is not None
        listed = [
            text.model_dump(mode="json")
            | _local_file(text.source, self.recipe.base_dir, self.store)
            for text in settings.texts
        ]
        texts = self.add(
            "texts",
            "texts",
            {"texts": listed, "length": settings.length},
            [model],
            Estimate(5, 600_000_000, 4 * self._evaluated_tokens()),
            local={"base_dir": self.recipe.base_dir},
        )
        scores = self.add(
            f"evaluate:{BASELINE}",
            "evaluate",
            {"batch_size": settings.batch_size},
            [model, texts],
            self.speed.evaluate(self._evaluated_tokens(), variant=False),
            variant=BASELINE,
        )
        return texts, scores

    def _evaluated_tokens(self) -> int:
        assert self.recipe.evaluate is not None
        return sum(text.max_tokens for text in self.recipe.evaluate.texts)


class _Speed:
    """Rough cost model of this machine; its float32 rate is probed once, in about 0.1 s."""

    BASE_MEMORY = 700_000_000  # interpreter, torch and transformers

    def __init__(self, facts: ModelFacts) -> None:
        self.facts = facts
        embedding = facts.vocabulary * facts.hidden
        self.block_parameters = max(facts.parameters - embedding, 1) // max(facts.layers, 1)

    @functools.cached_property
    def flops(self) -> float:
        """Sustained float32 FLOP/s of a matrix product of a typical shape."""
        import torch

        a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
        a @ b
        started = time.perf_counter()
        for _ in range(8):
            a @ b
        return 8 * 2 * a.shape[0] * b.numel() / (time.perf_counter() - started) * 0.6

    def bytes_per_weight(self, quantized: bool) -> float:
        return 1.0 if quantized else 2.0

    def load(self, kind: str) -> Estimate:
        if kind != "gguf":
            return Estimate(2, self.BASE_MEMORY, 0)
        p = self.facts.parameters
        return Estimate(15 + p / 2e7, self.BASE_MEMORY + 6 * p, 2 * p)

    def quantize(
        self, tokens: int, length: int, options: Sequence[Any], head: Sequence[Any] = ()
    ) -> Estimate:
        """``options`` of all steps; those that work on the output layer again under ``head``."""
        found = self._blocks(tokens, length, options)
        if not head:
            return found
        f = self.facts
        size = f.vocabulary * f.hidden
        flops = tokens * (f.hidden**2 + 2 * self.block_parameters) + 3 * size * f.hidden
        flops += sum(o.work(size, f.hidden, length) for o in head)
        memory = self.BASE_MEMORY + 4 * tokens * f.hidden + 4 * size + _HEAD_MEMORY
        return Estimate(
            found.seconds + (flops / self.flops if tokens else size / 2e7),
            max(found.memory_bytes, memory),
            found.disk_bytes + int(1.1 * size),
        )

    def _blocks(self, tokens: int, length: int, options: Sequence[Any]) -> Estimate:
        f, layers = self.facts, self.facts.layers
        hidden = 4 * tokens * f.hidden
        memory = self.BASE_MEMORY + 2 * hidden + 16 * self.block_parameters
        disk = int(1.1 * f.parameters) + hidden
        if not tokens:
            return Estimate(5 + f.parameters / 2e7, memory, disk)
        one_pass = len(options) == 1 and getattr(options[0], "true_sequential", False)
        forward = (1 if one_pass else 2) * 2 * self.block_parameters * tokens
        statistics = tokens * (3 * f.hidden**2 + f.intermediate**2)
        solve = 3 * self.block_parameters * f.intermediate
        solve += sum(o.work(self.block_parameters, f.intermediate, length) for o in options)
        return Estimate(5 + layers * (forward + statistics + solve) / self.flops, memory, disk)

    def sensitivity(self, tokens: int, schemes: int) -> Estimate:
        f = self.facts
        flops = (4 + schemes) * 2 * f.layers * self.block_parameters * tokens
        flops += 3 * 2 * tokens * f.vocabulary * f.hidden
        memory = self.BASE_MEMORY + 16 * self.block_parameters + 8 * f.vocabulary * f.hidden
        return Estimate(5 + flops / self.flops, memory, 4 * tokens * f.hidden * (f.layers + 1))

    def evaluate(self, tokens: int, *, variant: bool) -> Estimate:
        f = self.facts
        heads = 2 if variant else 1
        flops = tokens * 2 * (f.parameters + (heads - 1) * f.vocabulary * f.hidden)
        elementwise = tokens * heads * f.vocabulary * 1.2e-9
        memory = self.BASE_MEMORY + 4 * f.parameters * heads + 4 * tokens * f.hidden
        disk = 12 * tokens + (0 if variant else 4 * tokens * f.hidden)
        return Estimate(8 + flops / self.flops + elementwise, memory, disk)

    def measure(self, workload: Any, variants: int) -> Estimate:
        step = 0.01 + 2 * self.facts.parameters / 1e10
        per_variant = sum(
            workload.requests / c * workload.output_length * step * (1 + c / 16)
            for c in workload.concurrency
        )
        memory = self.BASE_MEMORY + variants * 3 * self.facts.parameters
        return Estimate(10 * variants + per_variant * variants, memory, 10_000_000)


def _head_options(variant: Variant) -> list[Any]:
    """Options of the steps that work on the output layer too; none where it is left as it is."""
    if variant.lm_head is None:
        return []
    classes = [(registry.get(step.algorithm), step.options) for step in variant.quantize]
    return [
        options
        for cls, options in classes
        if cls.kind == "weights" or getattr(cls, "level", None) == "layer"
    ]


def model_facts(resolved: ResolvedSource) -> ModelFacts:
    """Sizes of a model from its headers alone; no weight is read."""
    if resolved.kind == "gguf":
        return _gguf_facts(resolved.path)
    from compressor.models.checkpoint import Checkpoint

    config = json.loads((resolved.path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    checkpoint = Checkpoint(resolved.path)
    hidden = config.get("hidden_size") or config.get("n_embd") or 1
    return ModelFacts(
        architecture=(config.get("architectures") or [config.get("model_type", "?")])[0],
        parameters=sum(checkpoint.numel(name) for name in checkpoint.names),
        hidden=hidden,
        intermediate=config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden,
        layers=config.get("num_hidden_layers") or config.get("n_layer") or 1,
        vocabulary=config.get("vocab_size", 1),
    )


def _gguf_facts(path: Path) -> ModelFacts:
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(key: str, default: Any = 0) -> Any:
        found = reader.get_field(key)
        return found.contents() if found else default

    name = value("general.architecture", "?")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    return ModelFacts(
        architecture=name,
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        hidden=int(value(f"{name}.embedding_length", 1)),
        intermediate=int(value(f"{name}.feed_forward_length", 1)),
        layers=int(value(f"{name}.block_count", 1)),
        vocabulary=int(max(shapes.get("token_embd.weight", [1]))),
    )


def _fingerprint(resolved: ResolvedSource, store: Store) -> dict[str, Any]:
    """What identifies a source's content: a Hub commit, or the SHA-256 of every file."""
    if resolved.kind == "hub":
        return {"source": resolved.source, "revision": resolved.revision}
    return {path.name: store.source_sha256(path) for path in sorted(resolved.files)}


def _local_file(source: str, base_dir: Path, store: Store) -> dict[str, Any]:
    """SHA-256 of a data source that is a local file, so that an edit of it changes the key."""
    path = base_dir / source
    return {"file_sha256": store.source_sha256(path)} if path.is_file() else {}
