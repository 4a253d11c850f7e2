"""Distils a draft model on what the target says: its answers, and its distributions after them.

Leviathan, Kalman, Matias: "Fast Inference from Transformers via Speculative Decoding", arXiv
2211.17192, and Zhou, Lyu, Rawat, Menon, Rostamizadeh, Kumar, Kagy, Agarwal: "DistillSpec", arXiv
2310.08461: a draft is accepted as often as its distribution overlaps with the target's, so it is
trained towards that (forward KL, total variation, or the logarithm of the overlap) and not only
towards the tokens. The target is not in memory but for its output layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.head import Head, last_hidden, split
from compressor.speculate.chains import chain_figures
from compressor.speculate.corpus import Corpus, Part
from compressor.speculate.draft import write_draft
from compressor.speculate.features import Features
from compressor.speculate.losses import Target, output_losses, ranks, top_k_accuracy
from compressor.speculate.medusa import TOP, places, trainable
from compressor.speculate.options import DraftOptions
from compressor.speculate.trained import trained_tensors
from compressor.speculate.training import train


def distil_draft(
    source: Path,
    keep: Sequence[int],
    output: Head,
    corpus: Corpus,
    features: Features,
    options: DraftOptions,
    directory: Path,
    work: Path,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Make a draft of some of the target's blocks and train it. Resumes what a killed call left.

    Args:
        source: directory of the target, not quantized.
        keep: its blocks that stay, ascending.
        output: head of the target as it is served.
        corpus: what is trained on, and what is held out.
        features: what the target as it is served makes of it.
        options: see `DraftOptions`.
        directory: gets ``config.json`` and the weights in the source's dtypes.
        work: for the untrained draft and checkpoints.
        advance: called with a note after each step.

    Returns:
        What `training.train` returns; evaluations are those of `held_out_accuracy`.

    Raises:
        RunError: of `write_draft`, `trained_tensors` or `training.train`; or the output layer has
            a bias, which the losses do not know.
    """
    write_draft(source, keep, work)
    opened = CausalLM.open(work)
    model = opened.load_full(torch.float32, _device(output.lm_head))
    trained_tensors(opened, model)  # what cannot be written is found before it is trained
    facts = train_draft(model, output, corpus, features, options, work, advance=advance)
    trained = trained_tensors(opened, model)
    write_draft(source, keep, directory, {name: value.cpu() for name, value in trained.items()})
    return facts


def _device(module: nn.Module) -> torch.device:
    return next(t.device for t in [*module.parameters(), *module.buffers()])


def train_draft(
    model: Any,
    output: Head,
    corpus: Corpus,
    features: Features,
    options: DraftOptions,
    directory: Path,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Train a draft in place, all of its weights.

    Args:
        model: a transformers causal LM in float32, with the target's vocabulary.
        output: head of the target, on the same device.
        corpus: see `distil_draft`.
        features: see `distil_draft`.
        options: see `DraftOptions`.
        directory: for checkpoints.
        advance: called with a note after each step.

    Returns:
        See `distil_draft`.

    Raises:
        RunError: see `distil_draft`.
    """
    head = split(model)
    linear: Any = head.lm_head
    if getattr(linear, "bias", None) is not None:
        raise RunError(
            "its output layer has a bias, and drafts of such models cannot be trained yet",
            where=type(model).__name__,
            fix="use Medusa or EAGLE-3 heads for this model",
        )
    model.requires_grad_(True)

    def backward(rows: Sequence[int], weight: float) -> dict[str, float]:
        tokens, hidden = _batch(model, corpus, rows)
        at = [torch.arange(int(corpus.starts[row]), int(corpus.lengths[row]) - 1) for row in rows]
        states = torch.cat([hidden[i, where.to(hidden.device)] for i, where in enumerate(at)])
        said = torch.cat([tokens[i, where.to(hidden.device) + 1] for i, where in enumerate(at)])
        target = Target(said)
        if options.loss != "cross_entropy":
            wanted = [features.hidden(row)[where] for row, where in zip(rows, at, strict=True)]
            target = Target(said, torch.cat(wanted).to(hidden.device), output)
        losses = output_losses(
            [states],
            [linear.weight],
            target,
            options.loss,
            [torch.ones(len(said), device=hidden.device)],
            scale=head.scale,
            softcap=head.softcap,
        )
        (losses.total * weight).backward()
        return {"loss": float(losses.total.detach()), "right": float(losses.hits[0])}

    try:
        return train(
            dict(model.named_parameters()),
            backward,
            lambda: held_out_accuracy(model, corpus, options.depth),
            trainable(corpus),
            options,
            directory,
            size=lambda row: places(corpus, row),
            advance=advance,
        )
    finally:
        model.requires_grad_(False)


def _batch(model: Any, corpus: Corpus, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [samples, length], padded on the right, and what the draft's output layer reads."""
    device = next(model.parameters()).device
    texts = [torch.from_numpy(corpus.row(row).astype("int64")) for row in rows]
    tokens = pad_sequence(texts, batch_first=True).to(device)
    return tokens, last_hidden(model, tokens)


@torch.no_grad()
def held_out_accuracy(
    model: Any, corpus: Corpus, depth: int, part: Part = "held_out"
) -> dict[str, Any]:
    """How often a draft is right about what the target said.

    Args:
        model: the draft.
        corpus: of the target's answers.
        depth: tokens drafted in a row.
        part: of the corpus.

    Returns:
        `chain_figures`, ``score`` (its ``expected_length``), and ``top``: the shares of positions
        at which the draft's likeliest tokens, the first one, two, ... `TOP` of them, hold the right
        one.
    """
    found, texts = [], []
    for row in corpus.rows(part):
        start, length = int(corpus.starts[row]), int(corpus.lengths[row])
        if length - start < 2:
            continue
        tokens, hidden = _batch(model, corpus, [row])
        weight = model.get_output_embeddings().weight
        rank = ranks(hidden[0, start : length - 1], weight, tokens[0, start + 1 :]).cpu()
        found.append(rank)
        # The chain that follows the token at start + i is right about the k-th after it.
        ahead = torch.cat([rank == 0, torch.zeros(depth, dtype=torch.bool)])
        texts.append(ahead.unfold(0, depth, 1))
    figures = chain_figures(texts)
    return {
        "score": figures["expected_length"],
        **figures,
        "top": top_k_accuracy(torch.cat(found) if found else torch.zeros(0), TOP),
    }
