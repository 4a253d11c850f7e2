"""What a recipe may say of divergence and of the gate; no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

TOLERANCE = 0.01


def parse_share(text: str) -> float | None:
    """`1%` or `0.01` as 0.01; None where it is neither."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    return float(found[1]) / (100 if found[2] else 1) if found else None


def _share(value: Any) -> Any:
    """Text that is a share as a number; anything else is left to the check of numbers."""
    found = parse_share(value) if isinstance(value, str) else None
    return value if found is None else found


Share = Annotated[
    float,
    BeforeValidator(_share),
    Field(ge=0, le=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$"},
            ]
        }
    ),
]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Positions(_Options):
    """Perplexity by position: whether a loss grows with the context."""

    length: int | None = Field(
        None,
        ge=16,
        description="Tokens per window, for a context longer than evaluate.length; those very "
        "windows when not given. Texts that are shorter are left out.",
    )
    bins: int = Field(4, ge=1, le=32, description="Parts of equal width that a window is cut into.")
    max_tokens: int = Field(
        32768, ge=16, description="Tokens of each text to use where a length is given."
    )


class Drift(_Options):
    """Generation drift: greedy continuations of the same prompts by baseline and variant."""

    prompts: str = Field(
        "builtin:prompts",
        description="Prompts: builtin:prompts, a file with a `prompt` column, or a Hub data set. "
        "Put into the model's chat template, where it has one.",
    )
    samples: int = Field(16, ge=1, description="How many of them.")
    input_length: int = Field(128, ge=1, description="Longer prompts are left out [tokens].")
    output_length: int = Field(64, ge=2, description="Most tokens of a continuation.")
    batch_size: int = Field(16, ge=1, description="Prompts continued at once.")
    seed: int = Field(0, ge=0, description="Of the choice of prompts.")


class GateMetrics(_Options):
    """One limit per metric: the most that may be lost, or the least that must be kept."""

    perplexity: Share | None = Field(
        None, description="Most growth of the perplexity, relative, on the text where it is worst."
    )
    kl_mean: float | None = Field(
        None, ge=0, description="Most mean KL divergence, nats per token, on the worst text."
    )
    kl_p99: float | None = Field(
        None,
        ge=0,
        description="Most KL divergence at the 99th percentile of tokens; it has no interval.",
    )
    top1_agreement: Share | None = Field(
        None, description="Least share of positions with the baseline's likeliest token."
    )
    acc: Share | None = Field(
        None, description="Most drop of accuracy, absolute (1%: one point), over all its documents."
    )
    robustness: Share | None = Field(None, description="The same over the disturbed documents.")
    safety: Share | None = Field(None, description="The same over the safety tasks.")
    languages: Share | None = Field(
        None, description="The same in the language that lost most, each on its own documents."
    )
    flips: Share | None = Field(
        None, description="Most documents of the accuracy tasks that turned right or wrong."
    )
    ece: Share | None = Field(
        None, description="Most growth of the expected calibration error, absolute."
    )
    drift: Share | None = Field(
        None,
        description="Least share of prompts continued exactly as by the baseline; no interval.",
    )


NEED_TASKS = ("acc", "robustness", "safety", "languages", "flips", "ece")


class Gate(_Options):
    """Limits that every variant must keep: `compress run` exits with code 3 where one does not, and
    what failed is not published."""

    max_loss: Share | None = Field(None, description="Short for the limit `metrics.perplexity`.")
    metrics: GateMetrics = Field(
        default_factory=lambda: GateMetrics.model_validate({}), description="Limits by metric."
    )
    decide_on: Literal["bound", "point"] = Field(
        "bound",
        description="bound: the unfavourable end of the 95% interval must keep the limit, so that "
        "what too few documents cannot show does not pass; point: the figure itself must.",
    )

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if not self.limits:
            raise ValueError("give `max_loss`, or limits under `metrics`")
        if self.max_loss is not None and self.metrics.perplexity is not None:
            raise ValueError("max_loss is the limit metrics.perplexity: give one of the two")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """What is limited, by metric."""
        found = self.metrics.model_dump(exclude_none=True)
        return found if self.max_loss is None else {"perplexity": self.max_loss, **found}
