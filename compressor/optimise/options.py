"""What a recipe may say of a search (`optimise:`); no torch.

The types of what variants are made of (steps, `precision:`, `serve:` and so on) are put in by
`compressor.recipe`, which knows them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compressor.evaluate.options import Gate, Share
from compressor.numerics.scheme import Scheme

Objective = Literal["cost", "latency", "size", "energy"]
MEASURED = ("cost", "latency", "energy")  # objectives that need a load
SEARCHED = ("perplexity", "kl_mean", "kl_p99", "top1_agreement", "drift")  # metrics of `evaluate`


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Gate):
    """What the variant to deploy must keep. Limits on tasks are looked at in the end alone."""

    size_gb: float | None = Field(None, gt=0, description="Most size of the artifact, GB.")
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="Most memory of weights and cache under the load, GB; an estimate.",
    )
    goal_met: Share | None = Field(
        None, description="Least share of requests inside measure.workload.slo."
    )


def _known(name: str) -> str:
    Scheme.parse(name)
    return name


SchemeName = Annotated[str, AfterValidator(_known)]


def _untouched() -> list[Any]:
    return [None]


class Space(_Options):
    """What variants are made of: one entry of each list. `null` leaves the key out."""

    algorithms: list[list[Any]] = Field(
        min_length=1,
        description="Lists of steps in their order, as under `quantize:`; the quantizer gets each "
        "scheme and group size, where it has none of its own. `[]`: the model as it is, for what "
        "only serves otherwise.",
    )
    schemes: list[SchemeName] = Field(
        default_factory=lambda: ["W8A8", "W8A16", "W4A16"],
        description="Schemes of the quantizers.",
        json_schema_extra={"default": ["W8A8", "W8A16", "W4A16"]},
    )
    precision: list[Any] = Field(
        default_factory=list,
        description="Bits by layer, beside the schemes: sections as in a variant.",
        json_schema_extra={"default": []},
    )
    group_sizes: list[int] = Field(
        default_factory=lambda: [128],
        min_length=1,
        description="Input columns that share a scale, of weights with less than 8 bits; -1 for "
        "channels.",
        json_schema_extra={"default": [128]},
    )
    ignore: list[list[str]] = Field(
        default_factory=lambda: [list[str]()],
        min_length=1,
        description="Linears to leave as they are.",
        json_schema_extra={"default": [[]]},
    )
    lm_head: list[Any] = Field(
        default_factory=_untouched, min_length=1, description="Of the output layer."
    )
    kv_cache: list[Literal["fp8", "int8"] | None] = Field(
        default_factory=_untouched, min_length=1, description="Of cached keys and values."
    )
    speculate: list[Any] = Field(
        default_factory=_untouched, min_length=1, description="Speculation: method and depth."
    )
    serve: list[Any] = Field(
        default_factory=_untouched,
        min_length=1,
        description="Serving settings, such as flags with batch limits.",
    )


class Optimise(_Options):
    """Search for the variant to deploy. The recipe's own variants are candidates too. The search
    looks at tokens and prompts of its own; `evaluate:` and `measure:` judge what it found."""

    minimise: Objective = Field(
        "cost",
        description="cost of an output token, latency of a request (median, to its last token), "
        "size of the artifact, or energy of an output token.",
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Point of measure.workload.concurrency that counts; the highest if not given.",
    )
    subject_to: Limits = Field(description="Limits, as in a gate, and of size and memory.")
    space: Space = Field(description="What variants are made of.")
    minutes: float = Field(
        60.0,
        gt=0,
        description="Stop when the stages of the search took so long. The final judgement comes "
        "on top.",
    )
    trials: int = Field(64, ge=1, description="Most candidates to try, the recipe's own included.")
    seed: int = Field(0, ge=0, description="Of what is drawn.")
    finalists: int = Field(
        3, ge=1, description="Candidates that are judged anew, on the recipe's texts and prompts."
    )
    tokens: int = Field(
        4096, ge=16, description="Of each text, behind those that `evaluate:` has, to search on."
    )
    few_tokens: int = Field(
        1024, ge=16, description="The first of them, on which hopeless candidates are told."
    )
    sensitivity_samples: int = Field(
        8, ge=1, description="Calibration windows that losses are predicted from."
    )
    prompts: str = Field("builtin:instructions", description="Prompts of the load while searching.")
