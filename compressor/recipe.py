"""The recipe: what to compress, how, and how to judge it.

A recipe is YAML, validated by pydantic. Every problem is reported with its file and line, and an
unknown key with the nearest valid one; all problems of a file are reported at once.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compressor.errors import RecipeError
from compressor.evaluate.options import NEED_TASKS, TOLERANCE, Drift, Gate, Positions, Share
from compressor.evaluate.task_options import TaskChoice
from compressor.export.options import (
    GGUF,
    GPTQ,
    GPTQ_BITS,
    WHOLE,
    Import,
    Safetensors,
    Verify,
)
from compressor.numerics.scheme import Scheme
from compressor.optimise.options import MEASURED, SEARCHED, Optimise, Space
from compressor.publish.options import Publish
from compressor.quantize import registry
from compressor.recipe_file import compose, explain, line_of, models_in, plain_value
from compressor.speculate.options import (
    OPTIONS,
    TRAINED,
    DraftModelOptions,
    Eagle3Options,
    JointOptions,
    MedusaOptions,
    NgramOptions,
    depth_of,
)

MAX_NAME = 64
Name = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME)
]
Format = Literal["compressed-tensors", "gptq", "awq", "gguf", "safetensors"]


def _not_baseline(name: str) -> str:
    if name == "baseline":
        raise ValueError("`baseline` is always there: give the variant another name")
    return name


VariantName = Annotated[Name, AfterValidator(_not_baseline)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Model(_Section):
    """The model to compress."""

    source: str = Field(
        min_length=1,
        description="Hub id (org/name), directory, .gguf file, or package:NAME/FILE.gguf for a "
        "file inside an installed Python package. Paths are relative to the recipe.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the baseline's weights. auto: as stored; bfloat16 for a GGUF file.",
    )
    trust_remote_code: bool = Field(
        False, description="Let Python code that comes with the checkpoint run."
    )
    allow_pickle: bool = Field(
        False, description="Accept pickled weights (.bin), which can run code when loaded."
    )


class TextSource(_Section):
    """Where texts come from."""

    source: str = Field(
        min_length=1,
        description="builtin:calibration, builtin:novel, builtin:web or builtin:questions; a "
        ".txt, .jsonl, .json or .parquet file relative to the recipe; or a data set on the Hub.",
    )
    split: str | None = Field(None, description="Split of a Hub data set; train when not given.")
    field: str = Field("text", description="Column that holds the text, or a list of messages.")


class Calibration(TextSource):
    """Text that statistics are collected on. Never evaluate on it."""

    samples: int = Field(128, ge=1, description="Number of windows.")
    length: int = Field(512, ge=8, description="Tokens per window.")
    seed: int = Field(0, ge=0, description="Seed of the choice of windows.")
    batch_size: int = Field(8, ge=1, description="Windows per forward pass.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="What blocks run in while statistics are taken. auto: bfloat16 where the model "
        "is stored in it and the device multiplies it faster, else float32.",
    )
    all_experts: bool = Field(
        False,
        description="Run every token through every expert of a mixture while statistics are taken, "
        "so that rarely chosen experts are calibrated too.",
    )


class Step(_Section):
    """One algorithm with its options; exactly one key, the algorithm's name."""

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {value: {}}
        if isinstance(value, dict):
            return {k: {} if v is None else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _one_algorithm(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError("each step names exactly one algorithm")
        return self

    @property
    def algorithm(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> BaseModel:
        return cast(BaseModel, getattr(self, self.algorithm))

    @property
    def needs_calibration(self) -> bool:
        return cast(registry.AlgorithmOptions, self.options).needs_calibration

    def dump(self) -> dict[str, Any]:
        """``{algorithm: options}`` with every default filled in."""
        return {self.algorithm: self.options.model_dump(mode="json")}


def _in_order(steps: list[Step]) -> list[Step]:
    """The steps, which make one quantization: one quantizer, each kind in its place."""
    if not steps:
        return steps
    kinds = [registry.get(step.algorithm).kind for step in steps]
    if kinds.count("weights") + kinds.count("library") != 1:
        raise ValueError("exactly one step must be a quantizer such as gptq or rtn")
    if "library" in kinds and not set(kinds) <= {"rotation", "library"}:
        raise ValueError(
            f"{steps[kinds.index('library')].algorithm} does everything by itself: only "
            "rotation goes with it"
        )
    if kinds.count("rotation") > 1:
        raise ValueError("a model is rotated once")
    if kinds != sorted(kinds, key=registry.KINDS.index):
        raise ValueError(
            "steps come in this order: rotation, transforms (smoothquant, awq), the quantizer, "
            "refinements (coordinate_descent, signround, distillation)"
        )
    levels = [getattr(registry.get(step.algorithm), "level", None) for step in steps]
    if "model" in levels[:-1]:
        raise ValueError(
            f"{steps[levels.index('model')].algorithm} looks at the whole quantized model: it "
            "comes last"
        )
    return steps


class Precision(_Section):
    """Mixed precision: bits go to the layers that lose most without them. Give one budget."""

    schemes: list[str] = Field(
        default_factory=lambda: ["W4A16", "W8A16"],
        min_length=2,
        description="Schemes to choose from, with the quantizer's group_size.",
        json_schema_extra={"default": ["W4A16", "W8A16"]},
    )
    mean_bits: float | None = Field(
        None, gt=0, description="Budget: bits of the codes per weight, scales not counted."
    )
    size_gb: float | None = Field(
        None, gt=0, description="Budget: size of the quantized linears, scales included, in GB."
    )
    max_loss: float | None = Field(
        None, gt=0, description="Budget: predicted rise of the mean loss, nats per token."
    )
    samples: int = Field(16, ge=1, description="Calibration windows to measure sensitivities on.")

    @field_validator("schemes")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            Scheme.parse(name)
        if len(set(names)) != len(names):
            raise ValueError("two schemes are the same")
        return names

    @model_validator(mode="after")
    def _one_budget(self) -> Precision:
        if sum(b is not None for b in (self.mean_bits, self.size_gb, self.max_loss)) != 1:
            raise ValueError("give exactly one of mean_bits, size_gb and max_loss")
        return self


class LMHead(_Section):
    """Quantize the output layer too, by the variant's quantizer and the refinements that work layer
    by layer, on a symmetric grid of its own. Where it shares the embeddings' weight, the embeddings
    stay as they are and are stored besides."""

    scheme: Literal["W8A16", "W4A16", "W8A8"] = Field(
        "W8A16",
        description="Bits of weights and activations (vLLM on a CPU loads W4A16 and W8A8).",
    )
    group_size: int | None = Field(
        None,
        description="Input columns that share a scale; -1 for one scale per output channel (per "
        "token of the vocabulary). Default: one per channel for 8 bits, the quantizer's for 4.",
    )

    @model_validator(mode="after")
    def _loads(self) -> LMHead:
        Scheme.parse(self.scheme, self.group_size)
        if self.scheme == "W8A8" and self.group_size not in (None, -1):
            raise ValueError("W8A8 has one scale per output channel: remove group_size")
        return self

    def step(self, quantizer: Step) -> dict[str, Any]:
        """The quantizer with its options for the output layer, in the form of `Step.dump`."""
        ((name, options),) = quantizer.dump().items()
        group_size = self.group_size
        if group_size is None and self.scheme == "W4A16":
            group_size = options["group_size"]
        own = {"scheme": self.scheme, "group_size": group_size}
        return {name: options | own | {"symmetric": True, "activations": "dynamic"}}


class Serve(_Section):
    """How one variant is served: each key that is given stands in for the one of `measure:`."""

    batching: Literal["continuous", "static"] | None = Field(
        None, description="Of transformers, instead of measure.batching."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Activations' dtype, instead of measure.dtype."
    )
    flags: list[str] | None = Field(
        None,
        description="Arguments of the vLLM or llama.cpp server, one word an item, instead of "
        "measure.flags.",
    )
    variables: dict[str, str] | None = Field(
        None,
        description="Environment variables of the server, instead of measure.variables; they stand "
        "in the record, so no secrets.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Serve:
        if not self.given:
            raise ValueError("give at least one of batching, dtype, flags and variables")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are set, as plain data."""
        return self.model_dump(mode="json", exclude_none=True)


_BY_NAME = ("medusa", "eagle3", "ngram")  # methods that need no options


class Draft(DraftModelOptions):
    """Options of a draft model: some of the target's own blocks, or a given smaller model of the
    same tokenizer; as it is, distilled on the target's answers, and quantized if asked."""

    quantize: list[Step] = Field(
        default_factory=list,
        description="Algorithms that quantize the draft, as of variants (rotations and libraries' "
        "formats apart), with the recipe's `calibration:`. Left in full precision when absent.",
        json_schema_extra={"default": []},
    )

    @field_validator("quantize")
    @classmethod
    def _steps(cls, steps: list[Step]) -> list[Step]:
        for step in _in_order(steps):
            if registry.get(step.algorithm).kind in ("rotation", "library"):
                raise ValueError(f"a draft is not quantized with {step.algorithm}: leave it out")
        return steps

    @field_serializer("quantize")
    def _dumped(self, steps: list[Step]) -> list[dict[str, Any]]:
        return [step.dump() for step in steps]


class Speculate(_Section):
    """What guesses tokens ahead, for the variant to verify: one of these methods."""

    medusa: MedusaOptions | None = Field(None, description="Medusa heads, trained.")
    eagle3: Eagle3Options | None = Field(None, description="An EAGLE-3 head, trained.")
    draft: Draft | None = Field(
        None,
        description="A draft model: some of the target's own blocks, distilled, or a given one.",
    )
    ngram: NgramOptions | None = Field(None, description="Prompt lookup: nothing is trained.")
    trained_on: Literal["variant", "baseline"] = Field(
        "variant",
        description="Whose answers and hidden states it learns: the variant's own, as it will be "
        "served, or the baseline's.",
    )
    tgi: bool = Field(
        False,
        description="Write Medusa heads in TGI's layout too, beside vLLM's: a directory of its own "
        "whose config.json names the variant's model by a path beside it.",
    )
    tree_nodes: int = Field(
        16, ge=1, description="Candidates of a tree, which our own decoder tries beside the chain."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`medusa` and `medusa:` alone stand for its default options."""
        if isinstance(value, str):
            value = {value: None}
        if isinstance(value, dict):
            return {k: {} if v is None and k in _BY_NAME else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _one_method(self) -> Speculate:
        given = [name for name in OPTIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of medusa, eagle3, draft and ngram")
        return self

    @model_validator(mode="after")
    def _tgi_loads(self) -> Speculate:
        if not self.tgi:
            return self
        if self.medusa is None:
            raise ValueError("`tgi:` is a layout of Medusa heads: remove it, or train those")
        bare = self.medusa.output == "original" and self.medusa.layers == 1
        if self.medusa.draft_vocabulary is not None and not bare:
            raise ValueError(
                "TGI knows no reduced vocabulary: leave draft_vocabulary out, or set output: "
                "original with layers: 1, or remove `tgi:`"
            )
        return self

    @property
    def method(self) -> str:
        """Name of the method."""
        return next(name for name in OPTIONS if getattr(self, name) is not None)

    @property
    def options(self) -> BaseModel:
        """What is set of the method."""
        return getattr(self, self.method)

    @property
    def is_trained(self) -> bool:
        """Whether anything is learned: not for prompt lookup, nor for a draft taken as it is."""
        return self.method in TRAINED and getattr(self.options, "epochs", 0) > 0

    @property
    def draft_steps(self) -> list[Step]:
        """What the draft model is quantized by; nothing of other methods."""
        return self.draft.quantize if self.draft is not None else []

    @property
    def depth(self) -> int:
        """Tokens drafted per step."""
        return depth_of(self.method, self.options)


class Variant(_Section):
    """One way to compress the model, or to serve it."""

    base: Name | None = Field(
        None,
        alias="from",
        description="Start from another variant: what is not given here is as it is there.",
    )

    quantize: list[Step] = Field(
        default_factory=list,
        description="Algorithms in the order in which they are applied, each `name: {options}`. "
        "May be left out beside `serve:`: the untouched model, served otherwise. `[]` alone: the "
        "untouched model evaluated once more, which must show no loss.",
        json_schema_extra={"default": []},
    )
    imported: Import | None = Field(
        None,
        alias="import",
        description="A form of this model that another tool quantized (GPTQ, AWQ, "
        "compressed-tensors, GGUF), to evaluate, measure and compare as a variant, instead of "
        "`quantize:`.",
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="Linears to leave as they are: names in the checkpoint, or regular expressions "
        "that match the whole name.",
    )
    precision: Precision | None = Field(
        None, description="A scheme of its own for every layer, within a budget."
    )
    kv_cache: Literal["fp8", "int8"] | None = Field(
        None,
        description="Keys and values in 8 bits, float8_e4m3fn or integers, with one static scale "
        "for the keys of a layer and one for its values, from calibration. vLLM 0.32 serves fp8 "
        "and refuses a checkpoint with int8 scales.",
    )
    lm_head: LMHead | None = Field(
        None, description="Quantize the output layer (lm_head) too; left as it is when absent."
    )
    speculate: Speculate | None = Field(
        None,
        description="What guesses tokens ahead, for this variant to verify: the output stays its "
        "own. What is trained is trained on the `speculation:` section's prompts.",
    )
    serve: Serve | None = Field(
        None,
        description="Serving settings of its own; those of `measure:` when absent. Variants that "
        "differ in nothing else are compressed and evaluated once.",
    )

    @property
    def is_null(self) -> bool:
        """Whether it is the baseline once more: `quantize: []`, and nothing else."""
        asked = "quantize" in self.model_fields_set and not self.quantize
        return asked and self.serve is None and self.speculate is None

    @property
    def joint(self) -> JointOptions | None:
        """Medusa-2: how the model itself is trained; None where it is left as it is."""
        medusa = self.speculate.medusa if self.speculate is not None else None
        return medusa.joint if medusa is not None else None

    @property
    def quantizer(self) -> Step:
        """The step that turns weights into codes; StopIteration where nothing is quantized."""
        return next(s for s in self.quantize if registry.get(s.algorithm).kind == "weights")

    _steps = field_validator("quantize")(_in_order)

    @model_validator(mode="after")
    def _does_something(self) -> Variant:
        if self.quantize:
            if self.imported is not None:
                raise ValueError("give `quantize:` or `import:`: what is imported is quantized")
            return self
        given = (self.imported, self.serve, self.speculate)
        if all(one is None for one in given) and not self.is_null:
            raise ValueError(
                "give `quantize:`, the algorithms to apply (or `[]` for the baseline once more), "
                "`import:`, `speculate:`, or `serve:`, to serve the model as it is in another way"
            )
        for key in ("ignore", "precision", "kv_cache", "lm_head"):
            if getattr(self, key):
                raise ValueError(f"`{key}:` needs `quantize:`")
        return self

    @model_validator(mode="after")
    def _weights_can_be_trained(self) -> Variant:
        if self.joint is not None and (self.quantize or self.imported):
            raise ValueError(
                "`joint:` (Medusa-2) trains the model's weights, which are quantized here: train "
                "the heads alone, without it; or train first, and quantize what comes of it by a "
                "recipe of its own"
            )
        return self

    @model_validator(mode="after")
    def _library_is_alone(self) -> Variant:
        for key in ("precision", "kv_cache", "lm_head"):
            if getattr(self, key) is not None and self.library is not None:
                raise ValueError(f"`{key}:` does not go with {self.quantize[-1].algorithm}")
        level = registry.get(self.quantize[-1].algorithm) if self.quantize else None
        if self.kv_cache is not None and getattr(level, "level", None) == "model":
            raise ValueError(
                f"`kv_cache:` does not go with {self.quantize[-1].algorithm}, which would move "
                "keys and values after the cache's scales were found"
            )
        return self

    @property
    def library(self) -> type[registry.Library] | None:
        """The algorithm that quantizes into a format of its own, if the variant has one."""
        if not self.quantize:
            return None
        found = registry.get(self.quantize[-1].algorithm)
        return found if found.kind == "library" else None

    @field_validator("ignore")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _head_can_be_quantized(self) -> Variant:
        if self.lm_head is None:
            return self
        if not isinstance(self.quantizer.options, registry.SchemeOptions):
            raise ValueError(
                f"`lm_head:` needs a quantizer with schemes; {self.quantizer.algorithm} has none"
            )
        if any(re.fullmatch(pattern, "lm_head") for pattern in self.ignore):
            raise ValueError("`lm_head:` asks to quantize what `ignore` leaves as it is")
        return self


class Speculation(_Section):
    """What speculators are trained and tried on."""

    prompts: str = Field(
        "builtin:instructions",
        description="What is asked in training: builtin:instructions, a file with a `prompt` "
        "column, or a Hub data set, put into the model's chat template, where it has one; or own: "
        "what the model itself makes of its users' part of the template (Magpie, "
        "arXiv 2406.08464).",
    )
    split: str | None = Field(None, description="Split of a Hub data set; train if not given.")
    field: str = Field("prompt", description="Column that holds the prompts, or the dialogues.")
    answers: Literal["own", "given"] = Field(
        "own",
        description="The target's own answers to the prompts, generated (self-distillation), or "
        "those of given dialogues (lists of chat messages in `field`).",
    )
    samples: int = Field(1024, ge=2, description="Prompts that are trained on, at most.")
    held_out: int = Field(32, ge=1, description="Further prompts on which is decided when to stop.")
    input_length: int = Field(256, ge=1, description="Longer prompts are left out [tokens].")
    output_length: int = Field(128, ge=2, description="Most tokens of an answer.")
    temperature: float = Field(
        0.0, ge=0, description="Of generated answers; 0: the likeliest token each time."
    )
    batch_size: int = Field(32, ge=1, description="Prompts answered at once.")
    seed: int = Field(0, ge=0, description="Of the choice of prompts and of what is drawn.")
    test_prompts: str = Field(
        "builtin:prompts", description="Prompts on which acceptance is measured: other ones."
    )
    test_samples: int = Field(32, ge=1, description="How many of them.")
    sweep: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 4, 16],
        description="Sequences at once at which the time is taken for each number of guessed "
        "tokens, by our own decoder.",
        json_schema_extra={"default": [1, 4, 16]},
    )

    @model_validator(mode="after")
    def _dialogues_are_given(self) -> Speculation:
        if self.answers == "given" and self.prompts == "own":
            raise ValueError("answers: given needs a file or data set of dialogues as prompts")
        return self


class EvaluationText(TextSource):
    """A held-out text."""

    name: Name = Field(description="How the report calls it.")
    skip: int = Field(
        0, ge=0, description="Tokens at its beginning to leave out, in whole windows."
    )
    max_tokens: int = Field(16384, ge=16, description="Tokens to use after those.")


class Evaluate(_Section):
    """Quality: perplexity, KL divergence, top-1 agreement and drift against the baseline."""

    texts: list[EvaluationText] = Field(min_length=1, description="Held-out texts.")
    length: int = Field(512, ge=8, description="Tokens per window.")
    batch_size: int = Field(4, ge=1, description="Windows per forward pass.")
    positions: Positions = Field(
        default_factory=lambda: Positions.model_validate({}),
        description="Perplexity by position.",
    )
    drift: Drift | None = Field(
        default_factory=lambda: Drift.model_validate({}),
        description="Where greedy continuations leave the baseline's; null leaves it out.",
    )
    tolerance: Share = Field(
        TOLERANCE,
        description="A loss that counts as none (of accuracy and calibration absolute, of "
        "perplexity relative). No significant loss is only claimed where the test would have found "
        "one of this size.",
    )
    gate: Gate | None = Field(
        None, description="Limits that every variant must keep; exit code 3 where one does not."
    )
    tasks: list[TaskChoice] = Field(
        default_factory=list,
        description="Tasks of lm-eval, of this package (builtin:social_iqa, "
        "builtin:social_iqa_typos, builtin:social_iqa_listed, builtin:social_iqa_shuffled, "
        "builtin:refusal, builtin:over_refusal) or local ones; a name, or a mapping.",
        json_schema_extra={"default": []},
    )
    tasks_limit: int | None = Field(
        None, ge=1, description="Documents of each task, drawn with tasks_seed; all if not given."
    )
    tasks_seed: int = Field(
        0, ge=0, description="Of the documents that are drawn, and of examples in prompts."
    )
    tasks_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="What tasks are computed in. auto: bfloat16 where the model is stored in it "
        "and the device multiplies it faster, else float32; float32 beside variants of "
        "bitsandbytes.",
    )
    tasks_batch_tokens: int = Field(4096, ge=1, description="Tokens of a forward pass, at most.")
    tasks_served: bool = Field(
        False,
        description="Ask the served artifacts too (measure.engine vllm or endpoint), by "
        "log-probabilities over the OpenAI-compatible interface, and keep both results.",
    )

    @model_validator(mode="after")
    def _gate_is_measured(self) -> Evaluate:
        """No limit is set on what is not evaluated."""
        limits = self.gate.limits if self.gate is not None else {}
        for metric in limits:
            if missing := self.lacks(metric):
                raise PydanticCustomError(
                    "gate",
                    "the limit on {metric} needs `evaluate.{missing}:`: add that, or remove it",
                    {
                        "metric": metric,
                        "missing": missing,
                        "loc": ("evaluate", "gate", "metrics", metric),
                    },
                )
        return self

    def lacks(self, metric: str) -> str:
        """The key without which a limit on a metric cannot be judged; empty where it is there."""
        if metric in NEED_TASKS and not self.tasks:
            return "tasks"
        return "drift" if metric == "drift" and self.drift is None else ""

    @field_validator("texts")
    @classmethod
    def _distinct(cls, texts: list[EvaluationText]) -> list[EvaluationText]:
        names = [text.name for text in texts]
        if len(set(names)) != len(names):
            raise ValueError("two texts have the same name")
        return texts


class SLO(_Section):
    """Service level objective; only requests inside it count as goodput."""

    ttft_ms: float | None = Field(None, gt=0, description="Time to first token, milliseconds.")
    tpot_ms: float | None = Field(None, gt=0, description="Time per output token, milliseconds.")


class Workload(_Section):
    """The load that every variant is put under."""

    prompts: str = Field(
        "builtin:prompts",
        description="Prompts: builtin:prompts, a file with a `prompt` column, or a Hub data set.",
    )
    input_length: int | None = Field(
        128, ge=1, description="Tokens per prompt; null sends each prompt whole."
    )
    chat_template: bool = Field(
        False, description="Put each prompt into the model's chat template."
    )
    output_length: int = Field(64, ge=2, description="Tokens generated per request.")
    output_length_range: list[Annotated[int, Field(ge=2)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Lowest and highest, instead of output_length: each prompt gets a length of "
        "its own between them, from the seed, the same for every variant.",
    )
    ignore_eos: bool = Field(
        True,
        description="Go on past the end-of-sequence token, so that all variants do equal work; "
        "false ends answers as the model does, at output_length at the latest.",
    )
    concurrency: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 4],
        description="Points of a closed loop: requests in flight, the next starting when one ends.",
        json_schema_extra={"default": [1, 4]},
    )
    rate_per_s: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list,
        description="Points of an open loop: requests arriving per second, whatever the answers "
        "do; latencies count from when a request was due.",
    )
    arrival: Literal["poisson", "constant"] = Field(
        "poisson", description="How requests of an open loop arrive."
    )
    requests: int = Field(16, ge=1, description="Requests per point and variant, over all rounds.")
    rounds: int = Field(4, ge=2, description="How often the variants take turns.")
    seed: int = Field(0, ge=0, description="Seed of the choice of prompts.")
    split: bool = Field(
        False,
        description="Say what input and output tokens cost apart: beside each point of the closed "
        "loop, serve the prompts with one output token each, and whole answers to short prompts.",
    )
    slo: SLO = Field(
        default_factory=lambda: SLO.model_validate({}), description="Service level objective."
    )

    @field_validator("output_length_range")
    @classmethod
    def _rising(cls, bounds: list[int] | None) -> list[int] | None:
        if bounds is not None and bounds[0] > bounds[1]:
            raise ValueError("the lowest length comes first")
        return bounds


class Prices(_Section):
    """Prices; each overrides the table that comes with the package."""

    device: str | None = Field(None, description="Row of the price table; found when not given.")
    plan: Literal["on-demand", "reserved-1y", "reserved-3y", "spot", "purchase"] | None = Field(
        None, description="How the device is paid; on-demand when no price of your own is given."
    )
    currency: str | None = Field(
        None,
        pattern="^[A-Z]{3}$",
        description="Currency of this section, also of its usd_ keys; USD when not given.",
    )
    per_usd: float | None = Field(
        None, gt=0, description="What one US dollar is in it; converts the table's prices."
    )
    per_usd_as_of: str | None = Field(None, description="Day of that exchange rate, in quotes.")
    usd_per_hour: float | None = Field(None, ge=0, description="Rental of the device, USD/h.")
    host_usd_per_hour: float | None = Field(None, ge=0, description="Rental of its host, USD/h.")
    purchase_usd: float | None = Field(None, ge=0, description="Purchase instead of rental, USD.")
    residual_usd: float | None = Field(None, ge=0, description="Value at the end of life, USD.")
    life_hours: float | None = Field(None, gt=0, description="Hours of life after purchase.")
    watts: float | None = Field(None, ge=0, description="Declared power under load, W.")
    electricity_usd_per_kwh: float | None = Field(None, ge=0, description="Electricity, USD/kWh.")
    pue: float | None = Field(None, ge=1, description="Power usage effectiveness.")
    grid_gco2e_per_kwh: float | None = Field(
        None, ge=0, description="Emissions of the grid, gCO2e/kWh."
    )
    utilisation: float | None = Field(
        None, gt=0, le=1, description="Share of paid hours in which the device serves."
    )
    storage_usd_per_gb_month: float | None = Field(None, ge=0, description="Storage, USD/GB-month.")
    egress_usd_per_gb: float | None = Field(None, ge=0, description="Network egress, USD/GB.")
    egress_bytes_per_token: float | None = Field(None, ge=0, description="Bytes sent per token.")


class Endpoint(_Section):
    """An OpenAI-compatible address that serves a variant already."""

    url: str = Field(description="Base of the interface, such as https://api.example.com/v1.")
    model: str = Field(description="The model's name there.")
    key_variable: str | None = Field(
        None, description="Environment variable that holds the bearer key."
    )
    chat: bool = Field(False, description="Send prompts as chat messages.")
    knows_ignore_eos: bool = Field(
        False, description="Whether it takes ignore_eos, as vLLM and SGLang do."
    )
    usd_per_mtok_input: float | None = Field(
        None, ge=0, description="List price of a million input tokens."
    )
    usd_per_mtok_output: float | None = Field(
        None, ge=0, description="List price of a million output tokens."
    )


class WaterfallStep(_Section):
    """One configuration of a waterfall, and what it adds to the one before."""

    variant: Name = Field(description="A variant of this recipe, or baseline.")
    technique: str | None = Field(
        None,
        min_length=1,
        description="What it adds to the step before: int8, int4, continuous-batching, "
        "speculative-decoding, paged-attention, or another word, for which no claim is on record. "
        "Left out by a first step, which is then the starting point.",
    )


class Measure(_Section):
    """Speed and cost on this device."""

    engine: Literal["transformers", "vllm", "llama.cpp", "endpoint"] = Field(
        "transformers",
        description="What serves: transformers in this process, a vLLM or llama.cpp server of its "
        "own (llama.cpp takes the gguf format), or addresses that serve already (endpoints).",
    )
    batching: Literal["continuous", "static"] = Field(
        "continuous",
        description="Of transformers: requests join and leave the running batch, or one batch is "
        "served to its end before the next.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Activations' dtype; auto takes the faster one for each variant. llama.cpp "
        "and endpoints choose their own.",
    )
    flags: list[str] = Field(
        default_factory=list, description="Further arguments of the vLLM or llama.cpp server."
    )
    variables: dict[str, str] = Field(
        default_factory=dict,
        description="Further environment variables of the server; they stand in the record, so "
        "no secrets.",
    )
    program: str | None = Field(
        None,
        description="Interpreter of vLLM's environment, or the llama-server binary; found when "
        "not given.",
    )
    start_timeout_s: float = Field(
        600.0, gt=0, description="Longest wait for a server to become healthy, seconds."
    )
    keep_loaded: bool | None = Field(
        None,
        description="Keep the engines of all variants in memory at once; decided by the memory "
        "that is free when not given.",
    )
    endpoints: dict[Name, Endpoint] = Field(
        default_factory=dict,
        description="With engine endpoint: the address that serves each variant, the baseline's "
        "first; variants without one are not measured.",
    )
    workload: Workload = Field(
        default_factory=lambda: Workload.model_validate({}), description="The load."
    )
    waterfall: list[WaterfallStep] = Field(
        default_factory=list,
        description="What each technique gained over the step before, beside what the field claims "
        "for it. Starts from the baseline, or from a first step without a technique.",
        json_schema_extra={"default": []},
    )
    prices: Prices = Field(default_factory=lambda: Prices.model_validate({}), description="Prices.")


# Which keys of `serve:` each engine looks at.
_SERVED_BY = {
    "transformers": ("batching", "dtype"),
    "vllm": ("dtype", "flags", "variables"),
    "llama.cpp": ("flags", "variables"),
    "endpoint": (),
}


def _with_base(name: str, variants: dict[str, Any]) -> Any:
    """A variant as it stands in the recipe, with what it takes from others."""
    found = variants[name]
    seen = [name]
    while isinstance(found, dict) and isinstance(base := variants[seen[-1]].get("from"), str):
        if base in seen or not isinstance(variants.get(base), dict):
            raise PydanticCustomError(
                "base",
                "it starts from itself"
                if base in seen
                else "{base} is no variant of this recipe; choose from {known}",
                {
                    "base": repr(base),
                    "known": ", ".join(str(other) for other in variants if other != name),
                    "loc": ("variants", seen[-1], "from"),
                },
            )
        found = {**variants[base], **found}
        seen.append(base)
    return found


_NOTHING = "unchanged"  # stands for variants where there are none beside `optimise:`


def _formats() -> list[Format]:
    return ["compressed-tensors"]


class Recipe(_Section):
    """A whole recipe."""

    version: Literal[1] = Field(description="Version of the recipe format: 1.")
    name: Name = Field("", validate_default=False, description="Name of the run; the file's stem.")
    model: Model = Field(description="What to compress: source, revision, dtype.")
    calibration: Calibration | None = Field(
        None, description="Calibration text; needed by gptq, not by rtn."
    )
    variants: dict[VariantName, Variant] = Field(
        min_length=1,
        description="Named ways to compress the model, compared with the baseline. May be left out "
        "beside `optimise:`.",
    )
    optimise: Optimise | None = Field(
        None, description="Search for the variant to deploy; nothing is searched when absent."
    )
    speculation: Speculation | None = Field(
        None, description="What speculators are trained and tried on; defaults when absent."
    )
    evaluate: Evaluate | None = Field(None, description="Quality; left out when absent.")
    measure: Measure | None = Field(None, description="Speed and cost; left out when absent.")
    export: list[Format] = Field(
        default_factory=_formats,
        min_length=1,
        description="Formats that artifacts are written in: compressed-tensors (vLLM, SGLang, TGI, "
        "transformers), gptq and awq (the same, and GPTQModel), gguf (llama.cpp), safetensors "
        "(dequantized, for anything). A variant by "
        "bitsandbytes or llama_cpp has its library's own format instead.",
        json_schema_extra={"default": ["compressed-tensors"]},
    )
    gguf: GGUF | None = Field(None, description="Options of the format gguf.")
    publish: Publish | None = Field(
        None, description="Upload to the Hugging Face Hub at the end; nothing is when absent."
    )
    gptq: GPTQ | None = Field(None, description="Options of the format gptq.")
    safetensors: Safetensors | None = Field(None, description="Options of the format safetensors.")
    verify: Verify | None = Field(
        None, description="How artifacts are tried in what will load them; defaults when absent."
    )
    output: str = Field("runs", description="Directory of runs, relative to the recipe.")
    store: str = Field(
        ".compressor", description="Directory of finished stages, relative to the recipe."
    )
    shared_store: str | None = Field(
        None,
        description="Address of finished stages that several machines share, of any file system "
        "that fsspec knows: s3://bucket/prefix, gs://..., file:///mnt/...",
    )
    _path: Path = PrivateAttr(default=Path())
    _value: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("export", mode="before")
    @classmethod
    def _no_onnx(cls, formats: Any) -> Any:
        if isinstance(formats, list) and "onnx" in formats:
            raise ValueError(
                "ONNX is not written: the newest exporter (optimum-onnx 0.1.0) needs transformers "
                "below 4.58. Export `safetensors`, and run `optimum-cli export onnx` on that in an "
                "environment of its own"
            )
        return formats

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, value: Any) -> Any:
        """Fill in what variants take `from` another; `optimise:` may stand without any."""
        variants = value.get("variants") if isinstance(value, dict) else None
        if not isinstance(variants, dict):
            searched = isinstance(value, dict) and isinstance(value.get("optimise"), dict)
            if searched and variants is None:
                return {**value, "variants": {_NOTHING: {"quantize": []}}}
            return value
        made = {name: _with_base(name, variants) for name in variants}
        return {**value, "variants": made}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name, variant in self.variants.items():
            steps = variant.quantize
            needs = variant.precision is not None or any(s.needs_calibration for s in steps)
            if self.calibration is None and (needs or variant.kv_cache is not None):
                raise PydanticCustomError(
                    "needs_calibration",
                    "its algorithm needs a `calibration:` section in the recipe"
                    if needs
                    else "the scales of kv_cache need a `calibration:` section in the recipe",
                    {"loc": ("variants", name)},
                )
            if variant.quantize:
                self._check_schemes(name, variant)
                if not variant.library:
                    if "gguf" in self.export:
                        self._check_gguf(name, variant)
                    for fmt in ("gptq", "awq"):
                        if fmt in self.export:
                            self._check_packed(fmt, name, variant)
            self._check_serve(name, variant)
            self._check_speculate(name, variant)
        self._check_engine()
        self._check_tasks()
        self._check_waterfall()
        self._check_optimise()
        for name in (self.publish and self.publish.variants) or ():
            if name not in self.variants:
                raise PydanticCustomError(
                    "publish",
                    "no variant {name} in this recipe; choose from {known}",
                    {
                        "name": repr(name),
                        "known": ", ".join(self.variants),
                        "loc": ("publish", "variants"),
                    },
                )
        for fmt in ("gguf", "gptq", "safetensors"):
            if getattr(self, fmt) is not None and fmt not in self.export:
                raise PydanticCustomError(
                    "format_options",
                    "nothing is exported in this format: add {fmt} to `export:`, or remove this "
                    "section",
                    {"fmt": fmt, "loc": (fmt,)},
                )
        return self

    def _check_serve(self, name: str, variant: Variant) -> None:
        """A variant's serving settings are those of the engine that measures."""
        if variant.serve is None:
            return
        if self.measure is None:
            raise PydanticCustomError(
                "serve",
                "it says how the variant is measured: add a `measure:` section, or remove it",
                {"loc": ("variants", name, "serve")},
            )
        engine = self.measure.engine
        known = _SERVED_BY[engine]
        for key in variant.serve.given:
            if key not in known:
                raise PydanticCustomError(
                    "serve",
                    "engine {engine} has no such setting; it has {known}",
                    {
                        "engine": engine,
                        "known": " and ".join(known) or "none of its own",
                        "loc": ("variants", name, "serve", key),
                    },
                )

    def _check_speculate(self, name: str, variant: Variant) -> None:
        """What a speculating variant needs is there, and its engine knows how to serve it."""
        if variant.speculate is None:
            return
        steps = variant.speculate.draft_steps
        if self.calibration is None and any(step.needs_calibration for step in steps):
            raise PydanticCustomError(
                "needs_calibration",
                "its algorithm needs a `calibration:` section in the recipe",
                {"loc": ("variants", name, "speculate", "draft", "quantize")},
            )
        if variant.speculate.tgi and self.tgi_target(variant) is None:
            raise PydanticCustomError(
                "tgi",
                "TGI loads none of the variant's formats to draft for: add compressed-tensors to "
                "`export:`, or remove `tgi:`",
                {"loc": ("variants", name, "speculate", "tgi")},
            )
        if self.measure is None:
            return
        if self.measure.engine != "vllm":
            raise PydanticCustomError(
                "speculate",
                "engine {engine} is not measured with speculation: measure with vllm, or leave "
                "`measure:` out",
                {"engine": self.measure.engine, "loc": ("variants", name, "speculate")},
            )
        flags = (variant.serve and variant.serve.flags) or self.measure.flags
        if any(flag.startswith("--speculative-config") for flag in flags):
            raise PydanticCustomError(
                "speculate",
                "the flags hold a --speculative-config already: remove one of the two",
                {"loc": ("variants", name, "speculate")},
            )

    def _check_optimise(self) -> None:
        """What is minimised and limited is measured, and every entry of the space can be used."""
        found = self.optimise
        if found is None:
            return

        def refuse(why: str, *loc: int | str) -> PydanticCustomError:
            return PydanticCustomError("optimise", "{why}", {"why": why, "loc": ("optimise", *loc)})

        if self.evaluate is None:
            raise refuse("the limits need an `evaluate:` section in the recipe", "subject_to")
        limits = found.subject_to
        for metric in limits.limits:
            if missing := self.evaluate.lacks(metric):
                why = f"the limit on {metric} needs `evaluate.{missing}:`"
                raise refuse(why, "subject_to", "metrics", metric)
        if not set(limits.limits) & set(SEARCHED):
            raise refuse(
                "one of the limits must be of the evaluation, such as max_loss: tasks are looked "
                "at in the end alone",
                "subject_to",
            )
        measured = self.measure
        if found.minimise in MEASURED:
            if measured is None:
                raise refuse(
                    f"{found.minimise} is measured: add a `measure:` section, or minimise size",
                    "minimise",
                )
            if measured.engine == "endpoint":
                raise refuse("an endpoint serves what is there already", "minimise")
            listed = measured.workload.concurrency
            if not listed:
                raise refuse("it needs points of a closed loop in measure.workload", "minimise")
            if found.concurrency is not None and found.concurrency not in listed:
                raise refuse(f"it is not in measure.workload.concurrency, {listed}", "concurrency")
        if limits.goal_met is not None:
            slo = measured.workload.slo if measured is not None else SLO.model_validate({})
            if found.minimise not in MEASURED or not (slo.ttft_ms or slo.tpot_ms):
                raise refuse(
                    "it needs a load that is measured, and measure.workload.slo",
                    "subject_to",
                    "goal_met",
                )
        self._check_space(found.space, refuse)

    def _check_space(self, space: Space, refuse: Any) -> None:
        """Each list of algorithms makes a variant with one scheme at least."""
        for number, steps in enumerate(space.algorithms):
            for place, step in enumerate(steps):
                if self.calibration is None and step.needs_calibration:
                    raise refuse(
                        "it needs a `calibration:` section in the recipe",
                        "space", "algorithms", number, place,
                    )  # fmt: skip
            if not steps:
                continue
            why = "no scheme is listed"
            for scheme in space.schemes:
                made = []
                for step in steps:
                    options = step.options.model_dump(exclude_unset=True)
                    if isinstance(step.options, registry.SchemeOptions):
                        options.setdefault("scheme", scheme)
                    made.append({step.algorithm: options})
                try:
                    self.variant_type().model_validate({"quantize": made})
                    break
                except ValidationError as error:
                    why = error.errors()[0]["msg"].removeprefix("Value error, ")
            else:
                if not space.precision or space.schemes:
                    raise refuse(why, "space", "algorithms", number)

    @classmethod
    def variant_type(cls) -> type[Variant]:
        """The type of this recipe's variants."""
        made = next(models_in(cls.model_fields["variants"].annotation))
        assert issubclass(made, Variant)
        return made

    def _check_tasks(self) -> None:
        """Every variant computes in the dtype that is asked for, and a server that is asked gives
        log-probabilities of its prompt."""
        if self.evaluate is None:
            return
        for name, variant in self.variants.items():
            if variant.library and self.evaluate.tasks and self.evaluate.tasks_dtype == "bfloat16":
                raise PydanticCustomError(
                    "tasks_dtype",
                    "{variant} is evaluated in float32: leave it auto, or set float32",
                    {"variant": name, "loc": ("evaluate", "tasks_dtype")},
                )
        if not self.evaluate.tasks_served:
            return
        engine = self.measure.engine if self.measure is not None else None
        if engine not in ("vllm", "endpoint") or not self.evaluate.tasks:
            raise PydanticCustomError(
                "tasks_served",
                "it needs `evaluate.tasks:`, and `measure:` with engine vllm or endpoint",
                {"loc": ("evaluate", "tasks_served")},
            )
        for name, endpoint in self.measure.endpoints.items() if self.measure else ():
            if endpoint.chat:
                raise PydanticCustomError(
                    "tasks_served",
                    "a chat interface gives no log-probabilities of its prompt, which "
                    "evaluate.tasks_served asks for: remove one of the two",
                    {"loc": ("measure", "endpoints", name, "chat")},
                )

    def _check_waterfall(self) -> None:
        """The steps are measured variants, each once, and each but the first adds something."""
        steps = self.measure.waterfall if self.measure is not None else []
        if self.measure is None or not steps:
            return
        measured = list(self.measure.endpoints) or ["baseline", *self.variants]
        seen = ["baseline"] if steps[0].technique else []
        for number, step in enumerate(steps):
            where = ("measure", "waterfall", number)
            if step.variant not in measured:
                raise PydanticCustomError(
                    "waterfall",
                    "{variant} is not measured by this recipe; choose from {known}",
                    {
                        "variant": repr(step.variant),
                        "known": ", ".join(measured),
                        "loc": (*where, "variant"),
                    },
                )
            if step.variant in seen:
                raise PydanticCustomError(
                    "waterfall",
                    "{variant} is a step already"
                    if number
                    else "the baseline is the starting point: remove this step, or its technique",
                    {"variant": step.variant, "loc": (*where, "variant")},
                )
            if number and not step.technique:
                raise PydanticCustomError(
                    "waterfall",
                    "say what it adds to the step before, such as `technique: int8`",
                    {"loc": where},
                )
            seen.append(step.variant)
        if len(seen) < 2:
            raise PydanticCustomError(
                "waterfall",
                "there is nothing beside the starting point: add a step with a technique",
                {"loc": ("measure", "waterfall")},
            )

    def _check_engine(self) -> None:
        """The engine finds what it serves."""
        if self.measure is None:
            return
        engine = self.measure.engine
        needed = {"llama.cpp": "gguf", "endpoint": None}.get(engine, "compressed-tensors")
        if needed is not None and needed not in self.export:
            raise PydanticCustomError(
                "measured_format",
                "engine {engine} serves the {needed} artifacts: add that format, or leave out "
                "`measure:`",
                {"engine": engine, "needed": needed, "loc": ("export",)},
            )
        if not self.measure.workload.concurrency and not self.measure.workload.rate_per_s:
            raise PydanticCustomError(
                "no_load",
                "give points to measure at, such as [1, 4]",
                {"loc": ("measure", "workload", "concurrency")},
            )
        if self.measure.workload.split and not self.measure.workload.concurrency:
            raise PydanticCustomError(
                "split",
                "it needs points of a closed loop: give `concurrency`, such as [4]",
                {"loc": ("measure", "workload", "split")},
            )
        if self.measure.workload.split and engine == "endpoint":
            raise PydanticCustomError(
                "split",
                "an endpoint's list prices are of input and output tokens already: remove it",
                {"loc": ("measure", "workload", "split")},
            )
        if (self.measure.engine == "endpoint") != bool(self.measure.endpoints):
            raise PydanticCustomError(
                "endpoints",
                "engine endpoint, and no other, needs the address of each variant under "
                "`endpoints`",
                {"loc": ("measure", "endpoints" if self.measure.endpoints else "engine")},
            )
        if self.measure.endpoints:
            first = next(iter(self.measure.endpoints))
            unknown = set(self.measure.endpoints) - {"baseline", *self.variants}
            if first != "baseline" or unknown:
                raise PydanticCustomError(
                    "endpoints",
                    "name the baseline first, then variants of this recipe",
                    {"loc": ("measure", "endpoints")},
                )

    def _check_gguf(self, name: str, variant: Variant) -> None:
        """Nothing is asked for that GGUF cannot hold."""
        if variant.kv_cache is not None:
            raise PydanticCustomError(
                "gguf_cache",
                "GGUF holds no scales of cached keys and values: remove it, or gguf from `export:`",
                {"loc": ("variants", name, "kv_cache")},
            )
        options = variant.quantizer.options
        if getattr(options, "desc_act", False) and not getattr(options, "static_groups", True):
            raise PydanticCustomError(
                "gguf_order",
                "GGUF has no columns grouped by activation order: set static_groups beside "
                "desc_act, or remove gguf from `export:`",
                {"loc": ("variants", name, "quantize")},
            )

    def _check_packed(self, fmt: str, name: str, variant: Variant) -> None:
        """Nothing is asked for that GPTQ's or AWQ's format cannot hold."""

        def refuse(key: str, why: str) -> PydanticCustomError:
            return PydanticCustomError(
                "packed",
                "{fmt} {why}, or remove it from `export:`",
                {"fmt": fmt, "why": why, "loc": ("variants", name, key)},
            )

        if variant.kv_cache is not None:
            raise refuse("kv_cache", "holds no scales of cached keys and values: remove it")
        if variant.lm_head is not None and (fmt == "awq" or variant.lm_head.scheme == "W8A8"):
            raise refuse("lm_head", "holds no such output layer: remove it")
        if variant.precision is not None and fmt == "awq":
            raise refuse("precision", "has one scheme for all layers: remove it")
        options = variant.quantizer.options
        if not isinstance(options, registry.SchemeOptions):
            return
        schemes = variant.precision.schemes if variant.precision else [options.scheme]
        known = {f"W{bits}A16" for bits in (GPTQ_BITS if fmt == "gptq" else (2, 3, 4))}
        for scheme in schemes:
            if scheme not in known:
                raise refuse(
                    "precision" if variant.precision else "quantize",
                    f"holds no {scheme}: use {' or '.join(sorted(known))}",
                )
        if (
            fmt == "awq"
            and getattr(options, "desc_act", False)
            and not getattr(options, "static_groups", True)
        ):
            raise refuse(
                "quantize",
                "has no columns grouped by activation order: set static_groups beside desc_act",
            )

    def _check_schemes(self, name: str, variant: Variant) -> None:
        """Every scheme goes with the quantizer's other options, and with the refinements."""
        options = None if variant.library else variant.quantizer.options
        if not isinstance(options, registry.SchemeOptions):
            return
        parsed = [options.parsed()]
        for scheme in variant.precision.schemes if variant.precision else ():
            try:
                parsed.append(options.model_copy(update={"scheme": scheme}).parsed())
            except ValueError as error:
                raise PydanticCustomError(
                    "scheme", "{why}", {"why": str(error), "loc": ("variants", name, "precision")}
                ) from error
        floats = next((s.name for s in parsed if s.weights.type == "float"), None)
        for number, step in enumerate(variant.quantize):
            cls = registry.get(step.algorithm)
            if floats and cls.kind == "refinement" and not getattr(cls, "takes_floats", False):
                raise PydanticCustomError(
                    "integer_grid",
                    "it works on an integer grid, which scheme {scheme} is not: remove this step, "
                    "or choose a scheme of integers such as W8A8",
                    {
                        "scheme": floats,
                        "loc": ("variants", name, "quantize", number, step.algorithm),
                    },
                )

    @property
    def path(self) -> Path:
        """The file it was read from, absolute."""
        return self._path

    def place(self, *loc: int | str) -> str:
        """``file:line`` of a key, or of the nearest above it that is there."""
        return f"{self._path}:{line_of(compose(self._path), loc)}"

    def tgi_target(self, variant: Variant) -> str | None:
        """The first of a variant's formats that TGI loads, if there is one."""
        if variant.library is not None:
            return None
        return next((fmt for fmt in self.export if fmt in WHOLE), None)

    @property
    def base_dir(self) -> Path:
        """Directory that relative paths start from."""
        return self._path.parent

    @property
    def output_dir(self) -> Path:
        return self.base_dir / self.output

    @property
    def store_dir(self) -> Path:
        return self.base_dir / self.store

    def lock(self) -> dict[str, Any]:
        """Every resolved value, defaults included, as plain data."""
        value = self.model_dump(mode="json", exclude={"optimise"})
        for name, variant in self.variants.items():
            found = value["variants"][name]
            found["quantize"] = [step.dump() for step in variant.quantize]
            found["import"] = found.pop("imported")
            del found["base"]  # what it had to give stands here
        return value


@functools.cache
def recipe_model() -> type[Recipe]:
    """`Recipe` with a key for every algorithm that is installed, third parties' included."""
    options: dict[str, Any] = {
        name: (
            registry.get(name).Options | None,
            Field(None, description=(registry.get(name).__doc__ or name).strip().splitlines()[0]),
        )
        for name in registry.names()
    }
    step = create_model("Step", __base__=Step, **options)
    draft = create_model(
        "Draft",
        __base__=Draft,
        __doc__=Draft.__doc__,
        quantize=(list[step], Draft.model_fields["quantize"]),  # type: ignore[valid-type]
    )
    speculate = create_model(
        "Speculate",
        __base__=Speculate,
        __doc__=Speculate.__doc__,
        draft=(draft | None, Speculate.model_fields["draft"]),
    )
    variant = create_model(
        "Variant",
        __base__=Variant,
        quantize=(list[step], Variant.model_fields["quantize"]),  # type: ignore[valid-type]
        speculate=(speculate | None, Variant.model_fields["speculate"]),
    )
    space = create_model(
        "Space",
        __base__=Space,
        algorithms=(list[list[step]], Space.model_fields["algorithms"]),  # type: ignore[valid-type]
        precision=(list[Precision], Space.model_fields["precision"]),
        lm_head=(list[LMHead | None], Space.model_fields["lm_head"]),
        speculate=(list[speculate | None], Space.model_fields["speculate"]),  # type: ignore[valid-type]
        serve=(list[Serve | None], Space.model_fields["serve"]),
    )
    optimise = create_model(
        "Optimise", __base__=Optimise, space=(space, Optimise.model_fields["space"])
    )
    return create_model(
        "Recipe",
        __base__=Recipe,
        optimise=(optimise | None, Recipe.model_fields["optimise"]),
        variants=(dict[VariantName, variant], Recipe.model_fields["variants"]),  # type: ignore[valid-type]
    )


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        RecipeError: naming every problem of the file with its line.
    """
    root = compose(path)
    value = plain_value(root, path)
    if not isinstance(value, dict):
        raise RecipeError(
            "a recipe is a mapping of keys to values",
            where=f"{path}:{root.start_mark.line + 1}",
            fix="start with `version: 1` and `model:`; `compress init MODEL` writes one",
        )
    model = recipe_model()
    try:
        recipe = model.model_validate({"name": _default_name(path), **value})
    except ValidationError as error:
        raise explain(error, root, path, model) from None
    recipe._path = path.resolve()
    recipe._value = value
    return recipe


def derive(recipe: Recipe, **sections: Any) -> Recipe:
    """An ordinary recipe made of another one, without its `optimise:`.

    Args:
        recipe: as it was read.
        sections: plain values instead of its own; None leaves one out.

    Raises:
        RecipeError: they do not fit together.
    """
    value = derived_value(recipe, **sections)
    try:
        made = recipe_model().model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        loc = first.get("ctx", {}).get("loc", first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"{'.'.join(map(str, loc))}: {message}", where=str(recipe.path)
        ) from error
    made._path, made._value = recipe.path, value
    return made


def variant_values(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A recipe's variants as plain data, with what they take from others."""
    variants = recipe._value.get("variants") or {}
    found = {name: _with_base(name, variants) for name in variants}
    return {
        name: {key: part for key, part in value.items() if key != "from"}
        for name, value in found.items()
    }


def derived_value(recipe: Recipe, **sections: Any) -> dict[str, Any]:
    """What `derive` makes a recipe of, as plain data."""
    own = {"name": recipe.name, "output": recipe.output}
    value = {**recipe._value, **own, "optimise": None, **sections}
    return {key: section for key, section in value.items() if section is not None}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    schema = recipe_model().model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "compressor recipe"
    by_name = {"type": "string", "enum": registry.names()}  # a step without options
    for owner in ("Variant", "Draft"):
        steps = schema["$defs"][owner]["properties"]["quantize"]
        steps["items"] = {"anyOf": [steps["items"], by_name]}
    speculate = schema["$defs"]["Variant"]["properties"]["speculate"]
    speculate["anyOf"].append({"type": "string", "enum": list(_BY_NAME)})
    space = schema["$defs"]["Space"]["properties"]
    space["algorithms"]["items"]["items"] = steps["items"]
    space["speculate"]["items"] = {"anyOf": speculate["anyOf"]}
    schema["required"].remove("variants")
    schema["anyOf"] = [{"required": ["variants"]}, {"required": ["optimise"]}]
    tasks = schema["$defs"]["Evaluate"]["properties"]["tasks"]
    tasks["items"] = {"anyOf": [tasks["items"], {"type": "string", "minLength": 1}]}
    return schema


def _default_name(path: Path) -> str:
    """The file's stem with everything that a name may not hold replaced by ``-``."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    return name[:MAX_NAME] or "recipe"
