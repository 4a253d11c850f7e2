"""The methods of speculation that a recipe can name, and what can be set of each."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.speculate.draft import Method as ChosenBy
from compressor.speculate.draft_training import DraftOptions
from compressor.speculate.eagle3_training import Eagle3Options
from compressor.speculate.medusa import MedusaOptions


class NgramOptions(BaseModel):
    """Options of prompt lookup (n-gram): drafts are copied from the text so far."""

    model_config = ConfigDict(extra="forbid")

    shortest: int = Field(2, ge=1, description="Tokens that must be the same, at least.")
    longest: int = Field(4, ge=1, description="Tokens that are looked for first.")
    depth: int = Field(4, ge=1, le=16, description="Tokens drafted per step.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError("shortest must not be more than longest")
        return self


class DraftModelOptions(DraftOptions):
    """Options of a draft model: some of the target's own blocks, distilled."""

    blocks: int = Field(description="Decoder blocks of the target that the draft keeps.", ge=1)
    chosen_by: ChosenBy = Field(
        "influence",
        description="Which blocks stay: those that change their input most (influence), or those "
        "left when one after the other goes whose loss changes the output least (divergence, "
        "slower).",
    )


OPTIONS: dict[str, type[BaseModel]] = {
    "medusa": MedusaOptions,
    "eagle3": Eagle3Options,
    "draft": DraftModelOptions,
    "ngram": NgramOptions,
}
TRAINED = ("medusa", "eagle3", "draft")


def depth_of(method: str, options: BaseModel) -> int:
    """Tokens drafted per step by a chain."""
    return int(getattr(options, "heads" if method == "medusa" else "depth"))
