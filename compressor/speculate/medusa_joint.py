"""Medusa-2: the target is trained together with its heads, after those were trained alone.

Cai et al.: "Medusa", arXiv 2401.10774, section 2.2.2: the target at a lower rate than the heads,
their losses weighing less than its own. Its own is the KL divergence from what it said before
(self-distillation, section 2.3.2), made again from the states on disk: no second model is held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.errors import RunError
from compressor.models.head import CausalModel, Head
from compressor.speculate.corpus import Corpus
from compressor.speculate.features import Features
from compressor.speculate.losses import Target, output_losses
from compressor.speculate.medusa import (
    Batch,
    MedusaHeads,
    States,
    current_states,
    held_out_accuracy,
    places,
    trainable,
)
from compressor.speculate.options import MedusaOptions
from compressor.speculate.training import train


def train_jointly(
    model: CausalModel,
    heads: MedusaHeads,
    corpus: Corpus,
    features: Features,
    options: MedusaOptions,
    directory: Path,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Medusa-2's second stage: heads that are trained already, and the target with them, in place.

    Its loss is KL(target before || target) + ``heads_weight`` x that of the heads; what the target
    was is made again from the features.

    Args:
        model: a transformers causal LM in float32, not quantized.
        heads: from `train_medusa`.
        corpus, features: as there.
        options: with `MedusaOptions.joint`; the losses are the first stage's.
        directory: for checkpoints, another one than the first stage's.
        advance: called with a note after each step.

    Returns:
        the model's changed parameters by name, and what `training.train` returns; evaluations hold
        ``backbone_kl`` too, nats per token from what the target was.

    Raises:
        RunError: the target is quantized, not in float32, or its output layer has a bias; and as
            `train_medusa`.
    """
    joint = options.joint
    assert joint is not None
    output = _check_backbone(model)
    device = output.weight.device
    before = Head(copy.deepcopy(output).requires_grad_(False), model.config)
    model.requires_grad_(True)
    backbone = dict(model.named_parameters())
    after = Head(output, model.config)

    def original(row: int) -> torch.Tensor:
        return features.hidden(row).to(device).float()

    def divergence(rows: Sequence[int], states: States, weight: float) -> torch.Tensor:
        """Weight x KL(target before || target), summed over all tokens of the answers."""
        inside = [slice(int(corpus.starts[row]) - 1, int(corpus.lengths[row]) - 1) for row in rows]
        was = [original(row)[part] for row, part in zip(rows, inside, strict=True)]
        now = torch.cat([states(row)[part] for row, part in zip(rows, inside, strict=True)])
        said = [torch.from_numpy(corpus.row(row)[corpus.starts[row] :]).long() for row in rows]
        return output_losses(
            [now],
            [after.lm_head.weight],  # type: ignore[list-item]
            Target(torch.cat(said).to(device), torch.cat(was), before),
            "kl",
            [torch.full((len(now),), weight, device=device)],
            scale=after.scale,
            softcap=after.softcap,
        ).total

    def backward(rows: Sequence[int], weight: float) -> dict[str, float]:
        states = current_states(model, corpus, rows)
        kept = divergence(rows, states, weight)
        wanted = Batch(corpus, rows, original, device).target(options.loss, before, heads.token_map)
        drafts = Batch(corpus, rows, states, device).loss(
            heads, wanted, options, weight * joint.heads_weight
        )
        (kept + drafts).backward()
        parts = {"backbone_kl": float(kept.detach()), "heads": float(drafts.detach())}
        sums = {name: value / weight for name, value in parts.items()}
        return {**sums, "loss": sum(sums.values())}

    def evaluate() -> dict[str, Any]:
        rows = list(corpus.rows("held_out"))
        total = sum(
            float(divergence([row], current_states(model, corpus, [row]), 1.0)) for row in rows
        )
        figures = held_out_accuracy(
            heads, corpus, lambda row: current_states(model, corpus, [row])(row)
        )
        return {**figures, "backbone_kl": total / corpus.answer_tokens("held_out")}

    drafts = {name: p for name, p in heads.named_parameters() if p.requires_grad}
    try:
        facts = train(
            {
                **{f"heads.{name}": p for name, p in drafts.items()},
                **{f"backbone.{name}": p for name, p in backbone.items()},
            },
            backward,
            evaluate,
            trainable(corpus),
            joint,
            directory,
            size=lambda row: places(corpus, row),
            advance=advance,
            groups={f"backbone.{name}": joint.backbone_rate for name in backbone},
        )
    finally:
        model.requires_grad_(False)
        for parameter in backbone.values():
            parameter.grad = None
    return {name: p.detach() for name, p in backbone.items()}, facts


def _check_backbone(model: CausalModel) -> nn.Linear:
    """The output layer of a model that can be trained with its heads.

    Raises:
        RunError: it cannot.
    """
    output = model.get_output_embeddings()
    dense = all(p.dtype == torch.float32 for p in model.parameters())
    if not isinstance(output, nn.Linear) or output.bias is not None or not dense:
        raise RunError(
            "Medusa-2 trains the target's weights: they must be in float32, none quantized, and "
            "the output layer without a bias",
            where=type(model).__name__,
            fix="train the heads alone (Medusa-1), or on the model before it is quantized",
        )
    return output
