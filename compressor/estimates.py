"""What stages are expected to take: time, memory and disk, from the model's sizes and this machine.

`compress plan` shows it, and a run that cannot fit is refused before it begins (`preflight`).
"""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import RunError
from compressor.quantize import registry

if TYPE_CHECKING:
    from compressor.models.source import ResolvedSource
    from compressor.recipe import Recipe, Variant

_HEAD_MEMORY = 300_000_000  # copies of a part of the output layer while it is solved


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to take: seconds, bytes of memory, bytes of disk.

    ``least_memory`` is what it cannot do without [bytes], where it would take more if it has it; 0
    where that is not known.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    least_memory: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the source model that estimates are made from.

    Attributes:
        dtype: that most of the weights are stored in; bfloat16 for a GGUF file, which becomes it.
        tensors: name and shape [out, in] of every tensor.
    """

    architecture: str
    parameters: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    dtype: str = "bfloat16"
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = field(default=(), repr=False)

    def with_layers(self, layers: int) -> ModelFacts:
        """Of the model with so many of its decoder blocks."""
        embedding = self.vocabulary * self.hidden
        block = max(self.parameters - embedding, 1) // max(self.layers, 1)
        return replace(self, layers=layers, parameters=embedding + layers * block)


def model_facts(resolved: ResolvedSource) -> ModelFacts:
    """Sizes of a model from its headers alone; no weight is read."""
    if resolved.kind == "gguf":
        return _gguf_facts(resolved.path)
    from compressor.models.checkpoint import Checkpoint

    config = json.loads((resolved.path / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    checkpoint = Checkpoint(resolved.path)
    sizes: Counter[str] = Counter()
    for name in checkpoint.names:
        sizes[str(checkpoint.dtype(name)).removeprefix("torch.")] += checkpoint.numel(name)

    def count(*names: str, default: int = 1) -> int:
        given = next((config[name] for name in names if config.get(name)), default)
        if isinstance(given, bool) or not isinstance(given, int) or not 0 < given < 1 << 40:
            raise RunError(
                f"{' or '.join(names)} is no size: {given!r:.40}",
                where=str(resolved.path / "config.json"),
                fix="mend it, or download it again",
            )
        return given

    hidden = count("hidden_size", "n_embd")
    return ModelFacts(
        architecture=str((config.get("architectures") or [config.get("model_type", "?")])[0]),
        parameters=sum(checkpoint.numel(name) for name in checkpoint.names),
        hidden=hidden,
        intermediate=count("intermediate_size", "ffn_dim", default=4 * hidden),
        layers=count("num_hidden_layers", "n_layer"),
        vocabulary=count("vocab_size"),
        dtype=sizes.most_common(1)[0][0] if sizes else "float32",
        tensors=tuple((name, checkpoint.shape(name)) for name in checkpoint.names),
    )


def _gguf_facts(path: Path) -> ModelFacts:
    from compressor.models.gguf_file import count_field, open_gguf, text_field

    reader = open_gguf(path)
    name = text_field(reader, "general.architecture")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    return ModelFacts(
        architecture=name,
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        hidden=count_field(reader, f"{name}.embedding_length", 1),
        intermediate=count_field(reader, f"{name}.feed_forward_length", 1),
        layers=count_field(reader, f"{name}.block_count", 1),
        vocabulary=int(max(shapes.get("token_embd.weight", [1]))),
        # GGUF writes the fastest dimension first.
        tensors=tuple((name, tuple(int(n) for n in reversed(s))) for name, s in shapes.items()),
    )


class Speed:
    """Rough cost model of this machine; its float32 rate is probed once, in about 0.1 s."""

    BASE_MEMORY = 700_000_000  # interpreter, torch and transformers
    # Measured with 2 cores of an AMD EPYC (AVX-512).
    SAVE_SECONDS = 2e-8  # a parameter: read, rounded to nearest, written and synced
    COLUMN_SECONDS = 1.1e-4  # calls for one column of GPTQ
    MEMORY_BANDWIDTH = 14e9  # bytes per second of its updates
    DOCUMENTS, DOCUMENT_TOKENS = 2000, 100  # of a task, where nothing else is known
    BLOCK_BYTES = 40  # a weight: codes and what ggml's blocks make of them (`numerics.ggml`)

    def __init__(self, facts: ModelFacts) -> None:
        self.facts = facts
        embedding = facts.vocabulary * facts.hidden
        self.block_parameters = max(facts.parameters - embedding, 1) // max(facts.layers, 1)

    @functools.cached_property
    def flops(self) -> float:
        """Sustained float32 FLOP/s of whole models."""
        return 0.6 * self.product("float32")

    def product(self, dtype: str) -> float:
        """FLOP/s of a matrix product of a typical shape."""
        return _product(dtype)

    def bytes_per_weight(self, quantized: bool) -> float:
        return 1.0 if quantized else 2.0

    def export(self, fmt: str, *, quantized: bool, head: bool = False) -> Estimate:
        """What writing one artifact takes.

        Args:
            fmt: the format.
            quantized: whether it is of a variant.
            head: whether the output layer is quantized, and so no longer shared.
        """
        f = self.facts
        vocabulary = f.vocabulary * f.hidden
        size = int(self.bytes_per_weight(quantized) * (f.parameters + head * vocabulary))
        seconds = 3 + size / 1.5e8
        if fmt != "gguf":
            return Estimate(seconds, 1_000_000_000, size)
        # One tensor at a time: the embeddings as they are stored, a quantized linear in float32.
        widest = vocabulary if head else f.hidden * f.intermediate
        memory = self.BASE_MEMORY + max(4 * vocabulary, quantized * self.BLOCK_BYTES * widest)
        # Tensors wait in a file without a name until the header is written.
        return Estimate(2 * seconds, memory, 2 * size, memory)

    def verify(self, tokens: int) -> Estimate:
        """What loading an artifact twice takes, and computing so many tokens one by one."""
        p = self.facts.parameters
        seconds = 10 + p / 1e7 + tokens * 4 * p / self.MEMORY_BANDWIDTH
        return Estimate(seconds, self.BASE_MEMORY + 5 * p, 0)

    def load(self, kind: str) -> Estimate:
        if kind != "gguf":
            return Estimate(2, self.BASE_MEMORY, 0)
        p = self.facts.parameters
        return Estimate(15 + p / 2e7, self.BASE_MEMORY + 6 * p, 2 * p)

    def quantize(
        self,
        tokens: int,
        length: int,
        options: Sequence[Any],
        roles: Sequence[str] = ("weights",),
        batch_size: int = 8,
        dtype: str = "float32",
        head: Sequence[Any] = (),
    ) -> Estimate:
        """What one variant takes to quantize.

        Args:
            tokens: of the calibration set; 0 where no step looks at it.
            length: tokens per sample.
            options: of every step.
            roles: of every step; see `role_of`.
            batch_size: samples per forward pass.
            dtype: what blocks run in.
            head: options of the steps that work on the output layer too.
        """
        memory = self.quantize_memory(tokens, length, options, roles, batch_size, dtype)
        waiting = memory.pop("waiting")
        least = sum(memory.values())  # in one pass for each group of linears no batch waits
        seconds = self.quantize_seconds(tokens, length, options, roles, dtype, waiting > 0)
        blocks = Estimate(
            sum(seconds.values()),
            least + waiting,
            int(1.1 * self.facts.parameters) + memory["activations"],
            least,
        )
        made = self._with_head(blocks, tokens, length, head) if head else blocks
        if "model" in roles:
            return self._with_training(made, tokens, length, options[roles.index("model")], dtype)
        return made

    def _with_training(
        self, made: Estimate, tokens: int, length: int, options: Any, dtype: str
    ) -> Estimate:
        """The estimate with a refinement of the whole model (`quantize/whole.py`)."""
        from compressor.numerics import memory

        f = self.facts
        seen = 8 * options.steps * options.batch_size * length + 2 * tokens  # passes: 4, or 1
        itemsize = 2 if dtype in ("bfloat16", "float16") else 4
        shape = (-(-tokens // length), length)
        needed = memory.training_bytes(
            f.parameters, itemsize, shape, f.hidden, f.layers, f.vocabulary
        )
        return Estimate(
            made.seconds + seen * f.parameters / (0.6 * self.product(dtype)),
            max(made.memory_bytes, needed),
            made.disk_bytes + f.parameters,  # of factors and moments, twice while it is written
            made.least_memory if has_gpu() else max(made.least_memory, needed),
        )

    def _with_head(
        self, blocks: Estimate, tokens: int, length: int, options: Sequence[Any]
    ) -> Estimate:
        """The blocks' estimate and the output layer's."""
        f = self.facts
        size = f.vocabulary * f.hidden
        flops = tokens * (f.hidden**2 + 2 * self.block_parameters) + 3 * size * f.hidden
        flops += sum(o.work(size, f.hidden, length) for o in options)
        memory = self.BASE_MEMORY + 4 * tokens * f.hidden + 4 * size + _HEAD_MEMORY
        return Estimate(
            blocks.seconds + (flops / self.product("float32") if tokens else size / 2e7),
            max(blocks.memory_bytes, memory),
            blocks.disk_bytes + int(1.1 * size),
            max(blocks.least_memory, memory),
        )

    def quantize_seconds(
        self,
        tokens: int,
        length: int,
        options: Sequence[Any],
        roles: Sequence[str],
        dtype: str,
        one_pass: bool,
    ) -> dict[str, float]:
        """Seconds by part, over all blocks. See `driver._Walk.block` for the passes; ``one_pass``
        says whether batches wait at each linear, where statistics are taken in sequence."""
        f, block = self.facts, self.block_parameters
        parts = {"start": 1.5, "save": f.layers * block * self.SAVE_SECONDS}
        if not tokens:
            return parts
        sequential = any(getattr(o, "true_sequential", False) for o in options)
        refined = "block" in roles
        collecting = 1 + (sequential and "transform" in roles)
        running = (not sequential or refined) + refined
        if sequential and not one_pass:  # a pass for each group of linears, and one more
            collecting += 3
            running += not refined
        rate, exact = 0.9 * self.product(dtype), 0.9 * self.product("float32")
        forward = 2 * tokens * (block + 2 * length * f.hidden)
        hessians = tokens * (3 * f.hidden**2 + f.intermediate**2)  # upper triangles
        # Error of both roundings on the Hessian, its factor, and what the options add.
        solve = 4.2 * block * f.intermediate + f.intermediate**3
        solve += sum(o.work(block, f.intermediate, length) for o in options)
        columns = 0.0
        for o in options:
            if lazy := getattr(o, "block_size", 0):  # column by column: calls and memory traffic
                columns += (3 * f.hidden + f.intermediate) * self.COLUMN_SECONDS
                columns += 4 * lazy * block / self.MEMORY_BANDWIDTH
        return parts | {
            "forward": f.layers * (collecting + running) * forward / rate,
            "statistics": f.layers * collecting * hessians / rate,
            "solve": f.layers * (solve / exact + columns),
        }

    def quantize_memory(
        self,
        tokens: int,
        length: int,
        options: Sequence[Any],
        roles: Sequence[str],
        batch_size: int,
        dtype: str,
    ) -> dict[str, int]:
        """Bytes by part. ``waiting`` is what batches keep while they wait for their linears to be
        quantized (`driver._Walk._suspended_fits`), as far as memory holds it."""
        from compressor.numerics import memory

        f, itemsize = self.facts, 2 if dtype == "bfloat16" else 4
        parts = {
            "base": 600_000_000,  # no model is whole in memory
            "block": 8 * self.block_parameters,  # float32, what it runs in, codes
            "solving": 6 * 4 * 2 * f.hidden * f.intermediate,  # copies of gate and up
            "statistics": 0,
            "activations": 0,
            "batch": 0,
            "embeddings": 0,
            "waiting": 0,
        }
        if not tokens:
            return parts
        streams = 2 if "block" in roles else 1
        per_token = 8 * f.hidden + 2 * f.intermediate
        # The Hessian of the widest input, its damped copy, factor and inverse; the others' sums.
        parts["statistics"] = 4 * (5 * f.intermediate**2 + 3 * f.hidden**2)
        parts["activations"] = streams * itemsize * tokens * f.hidden
        batch = min(batch_size * length, tokens)
        parts["batch"] = batch * per_token * (4 if "transform" in roles else itemsize)
        # They come first and are freed: only what they take beyond the blocks counts.
        blocks = sum(parts[key] for key in ("block", "solving", "statistics", "batch"))
        parts["embeddings"] = max(0, 6 * f.vocabulary * f.hidden - blocks)
        waiting = itemsize * tokens * per_token
        if any(getattr(o, "true_sequential", False) for o in options):
            fits = waiting < memory.WAITING_SHARE * memory.free_bytes()
            parts["waiting"] = waiting if fits else 0
        return parts

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
        # On a GPU the models are there.
        least = 0 if has_gpu() else memory
        return Estimate(8 + flops / self.flops + elementwise, memory, disk, least)

    def tasks(self, limits: Sequence[int | None]) -> Estimate:
        """What tasks take with so many documents each, None for all of them."""
        tokens = sum(self.DOCUMENT_TOKENS * (limit or self.DOCUMENTS) for limit in limits)
        memory = self.BASE_MEMORY + 4 * self.facts.parameters + 1_000_000_000
        seconds = 20 + tokens * 2 * self.facts.parameters / self.flops
        return Estimate(seconds, memory, 300 * tokens // self.DOCUMENT_TOKENS)

    def speculate(
        self, settings: dict[str, Any], speculate: Any, drafts: ModelFacts
    ) -> dict[str, Estimate]:
        """What making the corpus, its features and the speculator takes, by kind of stage.

        Args:
            settings: of the recipe's ``speculation`` section.
            speculate: the variant's section.
            drafts: of the draft model, for that method.
        """
        from compressor.speculate.features import feature_bytes
        from compressor.speculate.own_prompts import LENGTH, OWN, SURPLUS

        f, options = self.facts, speculate.options
        samples = settings["samples"] + settings["held_out"]
        length = settings["output_length"] + settings["input_length"] // 4  # most are short
        tokens = samples * length
        forward = 2 * f.parameters
        memory = self.BASE_MEMORY + 4 * f.parameters
        written = settings["output_length"]
        if settings["prompts"] == OWN:
            written += int(LENGTH * SURPLUS)
        steps = samples / settings["batch_size"] * written
        step = 4 * f.parameters / self.MEMORY_BANDWIDTH + (
            settings["batch_size"] * forward / self.flops
        )
        draft = getattr(options, "draft_vocabulary", None) or f.vocabulary
        if speculate.method == "medusa":
            work = options.heads * (options.layers * f.hidden + draft) * f.hidden
        elif speculate.method == "eagle3":
            work = options.depth * (self.block_parameters + draft * f.hidden)
        else:
            work = drafts.parameters
        layers = 3 if speculate.method == "eagle3" else 0
        disk = feature_bytes(tokens, f.hidden, layers)
        trained = 3 * 4 * work
        return {
            "corpus": Estimate(20 + steps * step, memory, 8 * tokens),
            "features": Estimate(10 + tokens * forward / self.flops, memory, disk),
            "speculate": Estimate(
                20
                + options.epochs
                * 6
                * settings["samples"]
                * settings["output_length"]
                * work
                / self.flops,
                memory + trained,
                trained,
            ),
        }

    def joint(self, settings: dict[str, Any], epochs: int) -> Estimate:
        """What training the target together with its heads takes; see `speculate`."""
        f = self.facts
        length = settings["output_length"] + settings["input_length"] // 4
        work = epochs * 6 * settings["samples"] * length * f.parameters
        # Weights, their gradients, two moments, the best so far; the output layer as it was.
        memory = self.BASE_MEMORY + 20 * f.parameters + 8 * f.vocabulary * f.hidden
        return Estimate(20 + work / self.flops, memory, 4 * f.parameters)

    def accept(self, settings: dict[str, Any], tried: dict[str, Any], depth: int) -> Estimate:
        """What trying a speculator takes."""
        f = self.facts
        step = 4 * f.parameters / self.MEMORY_BANDWIDTH
        passes = 3 * settings["output_length"] * -(-tried["test_samples"] // settings["batch_size"])
        passes += len(tried["sweep"]) * (2 + 2 * depth) * settings["output_length"]
        return Estimate(20 + 3 * passes * step, self.BASE_MEMORY + 8 * f.parameters, 1_000_000)

    def measure(self, workload: Any, variants: int) -> Estimate:
        step = 0.01 + 2 * self.facts.parameters / 1e10
        bounds = workload.output_length_range or [workload.output_length]
        per_variant = sum(
            workload.requests / c * sum(bounds) / len(bounds) * step * (1 + c / 16)
            for c in workload.concurrency
        )
        if workload.split:  # the answers once more, and prompts alone
            per_variant *= 2.1
        per_variant += sum(workload.requests / rate for rate in workload.rate_per_s)
        memory = self.BASE_MEMORY + variants * 3 * self.facts.parameters
        return Estimate(10 * variants + per_variant * variants, memory, 10_000_000)


@functools.cache
def _product(dtype: str) -> float:
    """FLOP/s of a matrix product of a typical shape, probed once."""
    import torch

    a, b = (torch.randn(n, 1024).to(getattr(torch, dtype)) for n in (512, 1024))
    a @ b
    started = time.perf_counter()
    for _ in range(8):
        a @ b
    return 8 * 2 * a.shape[0] * b.numel() / (time.perf_counter() - started)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def role_of(algorithm: str) -> str:
    """``rotation``, ``transform``, ``weights``, or the level of a refinement: ``layer``, ``block``
    or ``model``."""
    found = registry.get(algorithm)
    return found.level if found.kind == "refinement" else found.kind


def calibration_dtype_of(recipe: Recipe, facts: ModelFacts) -> str:
    """What blocks will run in while statistics are taken."""
    if recipe.calibration is None:
        return "float32"
    if recipe.calibration.dtype != "auto":
        return recipe.calibration.dtype
    import torch

    from compressor.quantize.stream import calibration_dtype

    stored = facts.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    device = "cuda" if has_gpu() else "cpu"
    return str(calibration_dtype(getattr(torch, stored), device)).removeprefix("torch.")


def head_options(variant: Variant) -> list[Any]:
    """Options of the steps that work on the output layer too; none where it is left as it is."""
    if variant.lm_head is None:
        return []
    classes = [(registry.get(step.algorithm), step.options) for step in variant.quantize]
    return [
        options
        for cls, options in classes
        if cls.kind == "weights" or getattr(cls, "level", None) == "layer"
    ]
