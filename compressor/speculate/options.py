"""The methods of speculation that a recipe can name, and what can be set of each.

Nothing here loads torch: whoever only reads a recipe has no need of it.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["cross_entropy", "kl", "total_variation", "lk"]  # of losses; see `losses.py`
Output = Literal["own", "shared", "original"]
ChosenBy = Literal["influence", "divergence"]


class SpeculatorOptions(BaseModel):
    """What the options of every speculator are made from."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(10, ge=1, description="Times that every sample is trained on.")
    learning_rate: float = Field(1e-3, gt=0, description="At its peak (AdamW, cosine to zero).")
    batch_size: int = Field(4, ge=1, description="Samples whose gradients are taken at once.")
    accumulate: int = Field(
        1, ge=1, description="Such batches per step, over all processes together."
    )
    warm_up: float = Field(
        0.05, ge=0, le=1, description="Share of the steps in which the rate rises."
    )
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the products; what is trained is float32 either way."
    )
    evaluations: int = Field(1, ge=1, description="Evaluations on the samples held out, per epoch.")
    patience: int = Field(
        3, ge=0, description="Evaluations without a gain after which training stops; 0: never."
    )
    seed: int = Field(0, ge=0, description="Of the order of samples.")


class JointOptions(SpeculatorOptions):
    """Options of Medusa-2: the target is trained on together with its heads."""

    epochs: int = Field(2, ge=1, description="Times that every sample is trained on.")
    learning_rate: float = Field(4e-5, gt=0, description="Of the heads, at its peak.")
    backbone_rate: float = Field(0.25, gt=0, description="The target's rate over the heads'.")
    heads_weight: float = Field(0.2, gt=0, description="Of the heads' losses beside the target's.")


class MedusaOptions(SpeculatorOptions):
    """Options of Medusa heads."""

    heads: int = Field(4, ge=1, le=16, description="Tokens drafted per step.")
    layers: int = Field(1, ge=1, description="Residual blocks of each head.")
    output: Output = Field(
        "shared",
        description="Output layers: one for each head (own), one for all of them (shared), or the "
        "target's as it is (original).",
    )
    draft_vocabulary: int | None = Field(
        None,
        ge=1,
        description="The heads know so many tokens, the most frequent ones of the answers trained "
        "on. vLLM loads that with output: shared or original.",
    )
    loss: Kind = Field("cross_entropy", description="See `compressor.speculate.losses`.")
    decay: float = Field(0.8, gt=0, le=1, description="Weight of each head's loss over the last's.")
    joint: JointOptions | None = Field(
        None,
        description="Medusa-2: once the heads are trained, the model is trained on with them, held "
        "to what it said before. The variant is then another model, which is evaluated and "
        "exported as such; it is not quantized.",
    )

    @model_validator(mode="after")
    def _the_output_layer_moves(self) -> Self:
        if self.joint is not None and self.output == "original":
            raise ValueError(
                "`joint:` trains the target's output layer too: set output: shared or own"
            )
        return self


class Eagle3Options(SpeculatorOptions):
    """Options of an EAGLE-3 head."""

    depth: int = Field(
        4, ge=1, le=16, description="Steps of the training-time test: tokens drafted in a row."
    )
    decay: float = Field(0.8, gt=0, le=1, description="Weight of each step's loss over the last's.")
    loss: Kind = Field("kl", description="See `compressor.speculate.losses`.")
    draft_vocabulary: int | None = Field(
        None,
        ge=1,
        description="The head knows so many tokens, the most frequent ones of the answers trained "
        "on; all where not given.",
    )
    aux_layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="The target's features are taken after so many decoder blocks; 2, the middle "
        "and three before the end where not given.",
    )
    norm_before_residual: bool = Field(
        True, description="The layer's residual stream begins with the normed hidden state."
    )
    fc_norm: bool = Field(
        True, description="An RMS norm over the features of each layer before they are fused."
    )


class DraftOptions(SpeculatorOptions):
    """Options of a draft model made from the target."""

    loss: Kind = Field("kl", description="See `compressor.speculate.losses`.")
    depth: int = Field(
        4, ge=1, le=16, description="Tokens in a row that its figures, and its score, count with."
    )
    learning_rate: float = Field(
        3e-4,
        gt=0,
        description="At its peak (AdamW, cosine to zero): it starts from a trained model.",
    )


class DraftModelOptions(DraftOptions):
    """Options of a draft model: some of the target's own blocks, or a given smaller model of the
    same tokenizer."""

    blocks: int | None = Field(
        None, ge=1, description="Decoder blocks of the target that the draft keeps."
    )
    chosen_by: ChosenBy = Field(
        "influence",
        description="Which blocks stay: those that change their input most (influence), or those "
        "left when one after the other goes whose loss changes the output least (divergence, "
        "slower).",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="Instead of `blocks`: a smaller model, as of `model.source`, whose tokenizer "
        "and vocabulary size are the target's.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of `model` on the Hub.")
    epochs: int = Field(
        10,
        ge=0,
        description="Times that every sample is trained on; 0 leaves a given `model` as it is.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.blocks is None) == (self.model is None):
            raise ValueError(
                "give `blocks`, to make the draft from the target, or `model`, a smaller one"
            )
        if self.model is None and self.revision is not None:
            raise ValueError("`revision` is of `model`, which is not given")
        if self.model is None and not self.epochs:
            raise ValueError(
                "a draft of some of the target's blocks must be trained: epochs from 1"
            )
        return self


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
