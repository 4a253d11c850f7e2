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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import RunError
from compressor.estimates import (
    Estimate,
    ModelFacts,
    Speed,
    calibration_dtype_of,
    head_options,
    model_facts,
    role_of,
)
from compressor.export.options import GPTQ, MEDUSA_TGI, NOT_MEASURED, PACKED, Verify
from compressor.export.readers import available
from compressor.quantize import registry
from compressor.store import Store, content_key, file_sha256, stage_key

if TYPE_CHECKING:
    from compressor.export.options import Import
    from compressor.models.source import ResolvedSource
    from compressor.recipe import Recipe, Speculate, Variant

BASELINE = "baseline"
# What each method's speculator is exported as.
SPECULATOR_FORMATS = {"medusa": "medusa", "eagle3": "speculators", "draft": "draft-model"}
_PACKAGE = Path(__file__).parent

# The rooms (or single files) whose source decides what a stage of each kind produces.
_ROOMS: dict[str, tuple[str, ...]] = {
    "load": ("models",),
    "origin": ("models",),
    "calibrate": ("data",),
    "texts": ("data",),
    "rotate": ("models", "quantize"),
    "sensitivity": ("numerics", "models", "quantize"),
    "quantize": ("numerics", "models", "quantize"),
    "import": ("numerics", "models", "export", "imports"),
    "export": ("numerics", "models", "export"),
    "verify": ("numerics", "models", "export", "imports"),
    "corpus": ("numerics", "models", "data", "speculate"),
    "features": ("numerics", "models", "speculate"),
    "draft": ("models", "speculate"),
    "quantize-draft": ("numerics", "models", "quantize"),
    "speculate": ("numerics", "models", "speculate"),
    "joint": ("numerics", "models", "speculate"),
    "accept": ("numerics", "models", "data", "speculate"),
    "evaluate": ("numerics", "models", "evaluate", "measure/engines/transformers.py"),
    "tasks": ("numerics", "models", "evaluate"),
    "served": ("evaluate", "measure"),
    "measure": ("numerics", "models", "export", "measure", "data"),
    "search": ("optimise",),  # no stage: what the trials of a search follow from
}
_WALK = ("batch_size", "dtype", "all_experts")  # of `calibration`: how blocks run over its tokens
_DATA = ("corpus", "features")  # kinds of stages that a speculator is trained on
_LIBRARIES = ("torch", "transformers", "compressed-tensors", "tokenizers", "gguf")


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
        return stage_key(self.kind, self.config, inputs, code_version(self.kind))


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


@functools.cache
def code_version(kind: str) -> str:
    """SHA-256 over the source of the rooms that a kind of stage runs, and library versions."""
    digest = hashlib.sha256()
    for room in _ROOMS[kind]:
        place = _PACKAGE / room
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.relative_to(_PACKAGE).as_posix().encode())
                digest.update(path.read_bytes())
    for library in _LIBRARIES:
        try:
            digest.update(f"{library}={version(library)};".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()


def make_plan(
    recipe: Recipe, store: Store, only: Iterable[str] = (), *, proofs: bool = True
) -> Plan:
    """Expand a recipe into stages.

    Args:
        recipe: validated recipe.
        store: where finished stages are looked up.
        only: names of the variants to keep; all when empty.
        proofs: whether artifacts are tried in what will load them.

    Raises:
        RecipeError: a source that the recipe names does not exist.
        RunError: the model cannot be resolved (network, package not installed), or a library
            that a variant needs is not installed.
    """
    from compressor.models.source import resolve_source

    resolved = resolve_source(
        recipe.model.source,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
        allow_pickle=recipe.model.allow_pickle,
        base_dir=recipe.base_dir,
    )
    builder = _Builder(recipe, store, model_facts(resolved), proofs)
    builder.expand(resolved, set(only) or set(recipe.variants))
    return Plan(recipe, store, tuple(builder.stages.values()), builder.facts)


class _Builder:
    def __init__(
        self, recipe: Recipe, store: Store, facts: ModelFacts, proofs: bool = True
    ) -> None:
        self.proofs = proofs
        self.recipe = recipe
        self.store = store
        self.facts = facts
        self.stages: dict[str, Stage] = {}
        self.speed = Speed(facts)

    def add(
        self,
        name: str,
        kind: str,
        config: dict[str, Any],
        inputs: Sequence[str],
        estimate: Estimate,
        *,
        variant: str | None = None,
        local: dict[str, Any] | None = None,
    ) -> str:
        # Settings go through JSON so that a key never depends on how a value is held in memory.
        plain = json.loads(json.dumps(config))
        draft = Stage(name, kind, variant, plain, tuple(inputs), "", False, estimate, local or {})
        key = draft.key_given({n: self.stages[n].key for n in inputs})
        cached = self.store.has(key)
        if cached or any(stage.key == key for stage in self.stages.values()):
            estimate = Estimate(0.0, 0, 0)  # done before, or by another variant's stage
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
        self.add(
            "origin",
            "origin",
            {"source": _fingerprint(resolved, self.store), "texts": _licence_texts(resolved)},
            [],
            Estimate(1, 200_000_000, 100_000),
            local={"resolved": resolved},
        )
        calibration, walk = None, {}
        if recipe.calibration is not None:
            settings = recipe.calibration.model_dump(mode="json")
            walk = {key: settings.pop(key) for key in _WALK}
            calibration = self.add(
                "calibrate",
                "calibrate",
                settings | _local_file(recipe.calibration.source, recipe.base_dir, self.store),
                [model],
                Estimate(5, 600_000_000, 4 * settings["samples"] * settings["length"]),
                local={"base_dir": recipe.base_dir},
            )
        exports = [self._export(BASELINE, "compressed-tensors", [model])]
        if "gguf" in recipe.export:
            # Early: it tells whether the model can be one.
            exports.append(self._export(BASELINE, "gguf", [model]))
        texts = baseline_scores = None
        if recipe.evaluate is not None:
            texts, baseline_scores = self._baseline_scores(model)
            self._tasks(BASELINE, [model])
        quantized, sources, learned = {}, {}, {}
        first: dict[str, str] = {}  # variant by what it does to the model
        shared: dict[str, str] = {}  # by variant: whose stages its own are equal to
        for name, variant in recipe.variants.items():
            if name not in wanted:
                continue
            alone = variant.model_dump(mode="json", exclude={"base", "serve", "speculate"})
            if variant.joint is not None and variant.speculate is not None:
                alone["medusa"] = variant.speculate.options.model_dump(mode="json")
            same = json.dumps(alone, sort_keys=True)
            changed = variant.quantize or variant.imported or variant.joint
            owner = BASELINE if not changed else first.setdefault(same, name)
            shared[name] = owner
            if owner == BASELINE:
                for listed in recipe.export:
                    if listed not in NOT_MEASURED:  # which the baseline has no use for
                        exports.append(self._export(name, listed, [model], owner=BASELINE))
                continue
            if variant.imported is not None:
                sources[name] = [model]
                quantized[name], packed = self._import(name, variant.imported, model)
                for fmt in recipe.export:
                    if fmt in PACKED and not packed:
                        continue  # GGUF's block types are no grid of theirs
                    exports.append(self._export(name, fmt, [model, quantized[owner]], owner=owner))
                continue
            if variant.joint is not None:
                sources[name] = [model]
                quantized[name], learned[name] = self._train_jointly(name, model)
                exports += [
                    self._export(name, fmt, [model, quantized[owner]], owner=owner)
                    for fmt in recipe.export
                    if fmt not in PACKED  # nothing is quantized
                ]
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
            library = variant.library
            if library is not None:
                # Into the key of this stage alone: no other result depends on that library.
                config["library"] = library.version()
                if library.format == "gguf":  # it works on what our converter makes
                    config["converter"] = code_version("export")
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
                    roles=[role_of(step.algorithm) for step in variant.quantize],
                    batch_size=recipe.calibration.batch_size if recipe.calibration else 1,
                    dtype=calibration_dtype_of(recipe, self.facts),
                    head=head_options(variant),
                ),
                variant=name,
            )
            head = variant.lm_head is not None
            formats: Sequence[str] = recipe.export if library is None else (library.format,)
            inputs = [*source, quantized[owner]]
            exports += [
                self._export(name, each, inputs, head=head, owner=owner) for each in formats
            ]
        if recipe.evaluate is not None and texts and baseline_scores:
            for name, owner in shared.items():
                against = [baseline_scores, quantized[owner]] if owner != BASELINE else []
                if recipe.variants[name].is_null:  # scored anew, to see that nothing differs
                    against = [baseline_scores]
                self.add(
                    f"evaluate:{name}",
                    "evaluate",
                    self._evaluate_settings(),
                    [*sources.get(name, [model]), texts, *against],
                    speed.evaluate(self._evaluated_tokens(), variant=True),
                    variant=name,
                )
                inputs = [*sources.get(name, [model])]
                inputs += [quantized[owner]] if owner != BASELINE else []
                if recipe.variants[name].is_null and recipe.evaluate.tasks:
                    inputs.append(f"tasks:{BASELINE}")  # asked anew likewise
                self._tasks(name, inputs)
            self._served_tasks(model, [BASELINE, *shared])
        speculators = []
        for name, owner in shared.items():
            own = [*sources.get(name, [model]), *([quantized[owner]] if owner != BASELINE else [])]
            if recipe.variants[name].speculate is not None:
                speculators += self._speculate(
                    name, sources.get(name, [model]), own, learned.get(owner, [])
                )
        if recipe.measure is not None:
            gguf = recipe.measure.engine == "llama.cpp"
            exports = [
                name
                for name in exports
                if (fmt := self.stages[name].config["format"]) not in NOT_MEASURED
                and (fmt == "gguf") == gguf
            ]
            self.add(
                "measure",
                "measure",
                recipe.measure.model_dump(mode="json")
                | self._serve(shared)
                | self._speculates(shared)
                | _local_file(recipe.measure.workload.prompts, recipe.base_dir, self.store),
                [model, *exports, *speculators],
                speed.measure(recipe.measure.workload, len(exports)),
                local={"base_dir": recipe.base_dir},
            )

    def _import(self, name: str, imported: Import, model: str) -> tuple[str, bool]:
        """Read what another tool made of the model.

        Returns:
            The stage, and whether it will have codes of ours.
        """
        from compressor.models.source import resolve_source

        resolved = resolve_source(
            imported.source,
            revision=imported.revision,
            base_dir=self.recipe.base_dir,
            quantized=True,
        )
        p = self.facts.parameters
        dense = resolved.kind == "gguf"
        memory = self.speed.BASE_MEMORY + (6 * p if dense else 16 * self.speed.block_parameters)
        stage = self.add(
            f"import:{name}",
            "import",
            {
                "steps": [{"import": {"source": imported.source}}],
                "files": _fingerprint(resolved, self.store),
            },
            [model],
            Estimate(10 + p / 2e7, memory, 4 * p if dense else int(1.1 * p)),
            variant=name,
            local={"resolved": resolved},
        )
        return stage, not dense

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

    def _serve(self, variants: Iterable[str]) -> dict[str, Any]:
        """Serving settings of their own, by variant; nothing where none has any."""
        own = {name: self.recipe.variants[name].serve for name in variants}
        found = {name: serve.given for name, serve in own.items() if serve is not None}
        return {"serve": found} if found else {}

    def _speculates(self, variants: Iterable[str]) -> dict[str, Any]:
        """Speculation by variant, as far as its server is told of it."""
        own = {name: self.recipe.variants[name].speculate for name in variants}
        found = {
            name: {"method": one.method, "depth": one.depth, "options": one.options.model_dump()}
            for name, one in own.items()
            if one is not None
        }
        return {"speculate": found} if found else {}

    def _train_jointly(self, name: str, model: str) -> tuple[str, list[str]]:
        """Heads on the baseline as it is, then both together.

        Returns:
            The stage of the target that comes of it, and what it was trained on.
        """
        variant = self.recipe.variants[name]
        assert variant.speculate is not None and variant.joint is not None
        settings, _ = self._speculation()
        learned = self._train(name, settings, [model], [], self.facts)
        config = variant.speculate.options.model_dump(mode="json")
        estimate = self.speed.joint(settings, variant.joint.epochs)
        stage = self.add(
            f"joint:{name}", "joint", {"options": config}, [model, *learned], estimate, variant=name
        )
        return stage, learned

    def _speculation(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The recipe's ``speculation`` section: what is trained on, and what is tried."""
        from compressor.recipe import Speculation

        settings = (self.recipe.speculation or Speculation.model_validate({})).model_dump()
        tried = {key: settings.pop(key) for key in ("test_prompts", "test_samples", "sweep")}
        return settings, tried

    def _speculate(
        self, name: str, baseline: list[str], own: list[str], learned: Sequence[str] = ()
    ) -> list[str]:
        """Train a variant's speculator, try it, and export it.

        Args:
            name: the variant.
            baseline: inputs that the variant is made of, but for its quantization: a rotated model
                has other hidden states.
            own: all inputs that the variant is made of.
            learned: what heads were trained on that are there already (Medusa-2).

        Returns:
            the export; none of prompt lookup.
        """
        variant = self.recipe.variants[name]
        speculate, joint = variant.speculate, variant.joint is not None
        assert speculate is not None
        settings, tried = self._speculation()
        local = {"base_dir": self.recipe.base_dir}
        config = _method(speculate)
        learned = list(learned)
        exports: list[str] = []
        facts = self.facts
        if (draft := speculate.draft) is not None:
            facts = self.facts.with_layers(draft.blocks or 0)
            if draft.model is not None:
                given, facts = self._given_draft(name, draft.model, draft.revision, baseline)
                learned.append(given)
        taught = own if speculate.trained_on == "variant" or joint else baseline
        if speculate.is_trained and not joint:
            learned += self._train(name, settings, taught, learned, facts)
        if speculate.draft_steps:
            learned.append(self._quantize_draft(name, learned, facts))
        if speculate.method in SPECULATOR_FORMATS:
            fmt = SPECULATOR_FORMATS[speculate.method]
            exports = [
                self.add(
                    f"export:{name}:{fmt}",
                    "export",
                    {"variant": name, "format": fmt, **config},
                    [*taught, *(one for one in learned if self.stages[one].kind not in _DATA)],
                    Estimate(5, 1_500_000_000, 4 * facts.parameters),
                    variant=name,
                )
            ]
        if speculate.tgi:
            self.add(
                f"export:{name}:{MEDUSA_TGI}",
                "export",
                {
                    "variant": name,
                    "format": MEDUSA_TGI,
                    "target": f"../{self.recipe.tgi_target(self.recipe.variants[name])}",
                    **config,
                },
                self.stages[exports[0]].inputs,
                Estimate(5, 1_500_000_000, 4 * facts.parameters),
                variant=name,
            )
        self.add(
            f"accept:{name}",
            "accept",
            config
            | tried
            | {key: settings[key] for key in ("input_length", "output_length", "batch_size")}
            | {
                "depth": speculate.depth,
                "tree_nodes": speculate.tree_nodes,
                "seed": settings["seed"],
            }
            | _local_file(tried["test_prompts"], self.recipe.base_dir, self.store),
            [*own, *learned],
            self.speed.accept(settings, tried, speculate.depth),
            variant=name,
            local=local,
        )
        return exports

    def _train(
        self,
        name: str,
        settings: dict[str, Any],
        taught: list[str],
        start: list[str],
        facts: ModelFacts,
    ) -> list[str]:
        """Answers to learn from, hidden states over them, and the training on both.

        Args:
            name: the variant.
            settings: of the recipe's ``speculation`` section, but for what is tried.
            taught: inputs that make the model whose answers they are.
            start: a given draft model.
            facts: of the draft model; the target's for other methods.
        """
        speculate = self.recipe.variants[name].speculate
        assert speculate is not None
        estimates = self.speed.speculate(settings, speculate, facts)
        corpus = self.add(
            f"corpus:{name}",
            "corpus",
            settings | _local_file(settings["prompts"], self.recipe.base_dir, self.store),
            taught,
            estimates["corpus"],
            variant=name,
            local={"base_dir": self.recipe.base_dir},
        )
        corpus = self._first(corpus)
        features = self.add(
            f"features:{name}",
            "features",
            {
                "aux": speculate.method == "eagle3",
                "layers": getattr(speculate.options, "aux_layers", None),
            },
            [*taught, corpus],
            estimates["features"],
            variant=name,
        )
        features = self._first(features)
        trained = self.add(
            f"speculate:{name}",
            "speculate",
            _method(speculate),
            [*taught, *start, corpus, features],
            estimates["speculate"],
            variant=name,
        )
        return [corpus, features, trained]

    def _first(self, name: str) -> str:
        """The first stage that is equal to this one: what comes after either is then equal too."""
        key = self.stages[name].key
        return next(stage.name for stage in self.stages.values() if stage.key == key)

    def _given_draft(
        self, name: str, source: str, revision: str | None, baseline: list[str]
    ) -> tuple[str, ModelFacts]:
        """The stage that opens a given draft model, and the model's sizes."""
        from compressor.models.source import resolve_source

        where = self.recipe.place("variants", name, "speculate", "draft", "model")
        try:
            resolved = resolve_source(source, revision=revision, base_dir=self.recipe.base_dir)
        except RunError as error:
            other = "give a Hub id (org/name), a directory in safetensors, or a .gguf file"
            fix = other if "model." in (error.fix or "model.") else error.fix
            raise RunError(f"draft model {source!r}: {error.what}", where=where, fix=fix) from error
        facts = model_facts(resolved)
        stage = self.add(
            f"draft:{name}",
            "draft",
            {"source": _fingerprint(resolved, self.store), "texts": _licence_texts(resolved)},
            baseline[:1],
            Speed(facts).load(resolved.kind),
            variant=name,
            local={"resolved": resolved},
        )
        return stage, facts

    def _quantize_draft(self, name: str, learned: list[str], facts: ModelFacts) -> str:
        """Quantize a draft model by its own steps."""
        recipe, speculate = self.recipe, self.recipe.variants[name].speculate
        assert speculate is not None
        steps = speculate.draft_steps
        config: dict[str, Any] = {"steps": [step.dump() for step in steps]}
        inputs = [one for one in learned if self.stages[one].kind not in _DATA]
        tokens = length = 0
        if any(step.needs_calibration for step in steps):
            assert recipe.calibration is not None
            inputs.append("calibrate")
            settings = recipe.calibration.model_dump(mode="json")
            config |= {key: settings[key] for key in _WALK}
            length = recipe.calibration.length
            tokens = recipe.calibration.samples * length
        return self.add(
            f"quantize-draft:{name}",
            "quantize-draft",
            config,
            inputs,
            Speed(facts).quantize(
                tokens,
                length,
                [step.options for step in steps],
                roles=[role_of(step.algorithm) for step in steps],
                batch_size=recipe.calibration.batch_size if recipe.calibration else 1,
                dtype=calibration_dtype_of(recipe, facts),
            ),
            variant=name,
        )

    def _export(
        self,
        variant: str,
        fmt: str,
        inputs: list[str],
        head: bool = False,
        owner: str | None = None,
    ) -> str:
        """`owner` is the variant whose artifact this one shares; its own where not given."""
        owner = owner or variant
        config: dict[str, Any] = {"variant": owner, "format": fmt}
        options = self.recipe.gguf
        if fmt == "gguf" and owner != BASELINE and options and options.embeddings != "stored":
            config["embeddings"] = options.embeddings
        own = getattr(self.recipe, fmt, None) if fmt in ("gptq", "safetensors") else None
        if fmt == "gptq" or own is not None:
            config["options"] = (own or GPTQ()).model_dump(mode="json")
        made = self.add(
            f"export:{variant}:{fmt}",
            "export",
            config,
            inputs,
            self.speed.export(fmt, quantized=owner != BASELINE, head=head),
            variant=variant,
        )
        if self.proofs and (owner != BASELINE or fmt == "gguf"):
            self._verify(variant, fmt, [*inputs, self._first(made)], owner)  # once, if shared
        return made

    def _verify(self, variant: str, fmt: str, inputs: list[str], owner: str) -> None:
        """Try an artifact in what will load it, as far as that is on this machine."""
        options = (self.recipe.verify or Verify()).model_dump(mode="json")
        consumers, missing = available(fmt, options.pop("engines"))
        self.add(
            f"verify:{variant}:{fmt}",
            "verify",
            options
            | {"consumers": consumers, "missing": missing, "rounded": self._rounded(owner, fmt)},
            inputs,
            self.speed.verify(options["prompts"] * options["tokens"]),
            variant=variant,
        )

    def _rounded(self, owner: str, fmt: str) -> bool:
        """Whether an artifact differs from what was evaluated by more than the order of sums."""
        variant = self.recipe.variants.get(owner)
        if owner == BASELINE:
            return False
        dense, gguf = self.recipe.safetensors, self.recipe.gguf
        if fmt == "safetensors" and (dense is None or dense.dtype != "float32"):
            return True
        if fmt == "gguf" and gguf is not None and gguf.embeddings != "stored":
            return True
        if variant is None or not variant.quantize:
            # What was imported may round activations.
            return variant is not None and variant.imported is not None
        options = variant.quantizer.options if not variant.library else None
        schemes = (
            variant.precision.schemes if variant.precision else [getattr(options, "scheme", "")]
        )
        activations = any(not name.endswith("A16") for name in schemes)
        return bool(activations or variant.kv_cache or variant.lm_head or variant.library)

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
            {"texts": listed, "length": settings.length} | self._divergence_settings(),
            [model],
            Estimate(5, 600_000_000, 4 * self._evaluated_tokens()),
            local={"base_dir": self.recipe.base_dir},
        )
        scores = self.add(
            f"evaluate:{BASELINE}",
            "evaluate",
            self._evaluate_settings(),
            [model, texts],
            self.speed.evaluate(self._evaluated_tokens(), variant=False),
            variant=BASELINE,
        )
        return texts, scores

    def _divergence_settings(self) -> dict[str, Any]:
        """Of the longer windows and of the prompts, as far as they are asked for."""
        settings = self.recipe.evaluate
        assert settings is not None
        found: dict[str, Any] = {}
        if settings.positions.length is not None:
            found["positions"] = settings.positions.model_dump(mode="json", exclude={"bins"})
        if settings.drift is not None:
            found["drift"] = settings.drift.model_dump(mode="json", exclude={"batch_size"})
            found["drift"] |= _local_file(settings.drift.prompts, self.recipe.base_dir, self.store)
        return found

    def _tasks(self, variant: str, inputs: list[str]) -> None:
        """The tasks on one variant; nothing where the recipe has none.

        Raises RecipeError for a task that there is not, unless all was done before.
        """
        settings = self.recipe.evaluate
        if settings is None or not settings.tasks:
            return
        places = [self.recipe.place("evaluate", "tasks", i) for i in range(len(settings.tasks))]
        dtype = settings.tasks_dtype
        if dtype == "auto" and any(v.library for v in self.recipe.variants.values()):
            dtype = "float32"  # what libraries' modules compute in: all variants are run alike
        stage = self.add(
            f"tasks:{variant}",
            "tasks",
            self._task_settings() | {"dtype": dtype, "batch_tokens": settings.tasks_batch_tokens},
            inputs,
            self.speed.tasks([c.limit or settings.tasks_limit for c in settings.tasks]),
            variant=variant,
            local={"base_dir": self.recipe.base_dir, "places": places},
        )
        if variant == BASELINE and not self.stages[stage].cached:
            from compressor.evaluate.tasks import specifications

            for choice, place in zip(settings.tasks, places, strict=True):
                specifications(choice, self.recipe.base_dir, place)

    def _task_settings(self) -> dict[str, Any]:
        """What decides which documents are asked, and how."""
        settings = self.recipe.evaluate
        assert settings is not None
        base = self.recipe.base_dir
        listed = []
        for choice in settings.tasks:
            entry = choice.model_dump(mode="json")
            if choice.path is not None:
                root, files = _task_files(base / choice.path)
                entry["files"] = {
                    file.relative_to(root).as_posix(): self.store.source_sha256(file)
                    for file in files
                    if file.resolve() != self.recipe.path
                }
            listed.append(entry)
        return {
            "tasks": listed,
            "limit": settings.tasks_limit,
            "seed": settings.tasks_seed,
            "runner": f"lm_eval {version('lm_eval')}",
        }

    def _served_tasks(self, model: str, variants: Sequence[str]) -> None:
        """The tasks on what is served, where the recipe asks for it."""
        settings, measure = self.recipe.evaluate, self.recipe.measure
        if settings is None or measure is None or not settings.tasks_served:
            return
        places = self.stages[f"tasks:{BASELINE}"].local
        for name in variants:
            inputs = [model]
            if measure.engine == "endpoint":
                if (endpoint := measure.endpoints.get(name)) is None:
                    continue
                server = endpoint.model_dump(include={"url", "model", "key_variable"})
            else:
                stage = f"export:{name}:compressed-tensors"
                if stage not in self.stages:  # in its library's own format
                    continue
                inputs.append(stage)
                own = self.recipe.variants[name].serve if name != BASELINE else None
                server = {
                    key: (own and getattr(own, key)) or getattr(measure, key)
                    for key in ("dtype", "flags", "variables")
                } | {"program": measure.program, "start_timeout_s": measure.start_timeout_s}
            self.add(
                f"served:{name}",
                "served",
                self._task_settings() | {"engine": measure.engine, "server": server},
                inputs,
                self.speed.tasks([c.limit or settings.tasks_limit for c in settings.tasks]),
                variant=name,
                local=places,
            )

    def _evaluate_settings(self) -> dict[str, Any]:
        settings = self.recipe.evaluate
        assert settings is not None
        drift = settings.drift and settings.drift.model_dump(
            include={"output_length", "batch_size"}
        )
        return {
            "batch_size": settings.batch_size,
            "length": settings.length,
            "bins": settings.positions.bins,
            "positions": settings.positions.length,
            "drift": drift,
        }

    def _evaluated_tokens(self) -> int:
        """Tokens that are scored; a token that is generated counts as one."""
        settings = self.recipe.evaluate
        assert settings is not None
        count = sum(text.max_tokens for text in settings.texts)
        if settings.positions.length is not None:
            count += settings.positions.max_tokens * len(settings.texts)
        if settings.drift is not None:
            count += settings.drift.samples * settings.drift.output_length
        return count


def _method(speculate: Speculate) -> dict[str, Any]:
    """A speculator as its stages know it: what is done to the models themselves is of others."""
    apart = {"quantize", "joint"}
    options = speculate.options.model_dump(mode="json", exclude=apart)
    return {"method": speculate.method, "options": options}


def _fingerprint(resolved: ResolvedSource, store: Store) -> dict[str, Any]:
    """What identifies a source's content: a Hub commit, or the SHA-256 of every file."""
    if resolved.kind == "hub":
        return {"source": resolved.source, "revision": resolved.revision}
    return {path.name: store.source_sha256(path) for path in sorted(resolved.files)}


def _task_files(path: Path) -> tuple[Path, list[Path]]:
    """(root, files below it) that a local task may be made of: beside a YAML file, or in a
    directory."""
    root = path if path.is_dir() else path.parent
    found = root.rglob("*") if path.is_dir() else root.glob("*")
    kinds = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".gz")
    return root, sorted(file for file in found if file.suffix in kinds and file.is_file())


def _licence_texts(resolved: ResolvedSource) -> dict[str, str]:
    """SHA-256 of the model card and of the licence files, which decide nothing else."""
    from compressor.models.origin import licence_files

    found = licence_files(resolved)
    if resolved.path.is_dir() and (card := resolved.path / "README.md").is_file():
        found.append(card)
    return {path.name: file_sha256(path) for path in found}


def _local_file(source: str, base_dir: Path, store: Store) -> dict[str, Any]:
    """SHA-256 of a data source that is a local file, so that an edit of it changes the key."""
    path = base_dir / source
    return {"file_sha256": store.source_sha256(path)} if path.is_file() else {}
