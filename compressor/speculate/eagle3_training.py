"""Trains an EAGLE-3 head (arXiv 2503.01840) on what the target says, by its training-time test.

The target is never run: its features lie on disk. All steps of the test that predict the same token
are compared with the target's distribution at one place, which is made once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from compressor.errors import RunError
from compressor.models.head import Head
from compressor.speculate.chains import chain_figures
from compressor.speculate.corpus import Corpus, Part
from compressor.speculate.eagle3 import Eagle3, start_from_target
from compressor.speculate.eagle3_config import config_for
from compressor.speculate.features import Features
from compressor.speculate.losses import Target, output_losses, ranks, top_k_accuracy
from compressor.speculate.medusa import TOP, places, trainable
from compressor.speculate.options import Eagle3Options, Kind
from compressor.speculate.training import train


def make_head(
    config: Any,
    embeddings: torch.Tensor,
    output: Head,
    corpus: Corpus,
    options: Eagle3Options,
) -> Eagle3:
    """An untrained head, float32, on the device of the target's embeddings.

    Args:
        config: transformers config of the target.
        embeddings: [vocabulary, hidden], the target's.
        output: the target's.
        corpus: its most frequent tokens are the draft vocabulary.
        options: see `Eagle3Options`.

    Raises:
        RunError: options that do not fit the target.
    """
    vocabulary = config.get_text_config().vocab_size
    count = min(options.draft_vocabulary or vocabulary, vocabulary)
    sizes = config_for(
        config,
        count,
        aux_layers=options.aux_layers,
        norm_before_residual=options.norm_before_residual,
        fc_norm=options.fc_norm,
    )
    head = Eagle3(sizes, torch.from_numpy(corpus.frequent_tokens(count, vocabulary)))
    head.to(embeddings.device)
    start_from_target(head, embeddings, output, options.seed)
    return head


def train_eagle3(
    head: Eagle3,
    output: Head,
    corpus: Corpus,
    features: Features,
    options: Eagle3Options,
    directory: Path,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Train a head in place. Resumes what a killed call left.

    Args:
        head: from `make_head`.
        output: the target's head, on the same device.
        corpus: what is trained on, and what is held out.
        features: what the target makes of it, with the head's layers.
        options: see `Eagle3Options`.
        directory: for checkpoints.
        advance: called with a note after each step.

    Returns:
        What `training.train` returns; evaluations are those of `held_out_accuracy`.

    Raises:
        RunError: nothing to train on or to evaluate with, features of other layers, or training
            did not stay finite.
    """
    if tuple(features.layers) != head.config.aux_layers:
        raise RunError(
            f"the features are those after blocks {_listed(features.layers)}, the head reads those "
            f"after {_listed(head.config.aux_layers)}",
            where="EAGLE-3 training",
            fix="write the features with the head's layers",
        )
    shares = [options.decay**k for k in range(options.depth)]

    def backward(rows: Sequence[int], weight: float) -> dict[str, float]:
        batch = Batch(corpus, rows, features, head.fc.weight.device)
        inputs, counts = [], []
        for k, (states, known) in enumerate(batch.steps(head, options.depth)):
            inputs.append(head.norm(states))
            counts.append(known.float() * (shares[k] / sum(shares)))
        losses = output_losses(
            inputs,
            [head.lm_head.weight] * len(inputs),
            batch.target(options.loss, output, head.token_map),
            options.loss,
            counts,
        )
        (losses.total * weight).backward()
        hits = losses.hits.tolist() + [0.0] * (options.depth - len(inputs))
        return {"loss": float(losses.total.detach())} | {
            f"right_{k + 1}": value for k, value in enumerate(hits)
        }

    return train(
        head.trained(),
        backward,
        lambda: held_out_accuracy(head, corpus, features, options.depth),
        trainable(corpus),
        options,
        directory,
        size=lambda row: places(corpus, row),
        advance=advance,
    )


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


class Batch:
    """Samples laid out by the place s whose next token, at s + 1, is predicted: by the target from
    its state at s, by step k of the head from a chain that began at s - 1 - k.

    Places run from an answer's first token to its last but one, and chains begin at the prompt's
    last token or later, as when served.

    Args:
        corpus: of the samples.
        rows: which.
        features: of the target.
        device: of everything.
    """

    def __init__(
        self, corpus: Corpus, rows: Sequence[int], features: Features, device: torch.device
    ) -> None:
        texts = [torch.from_numpy(corpus.row(row).astype("int64")) for row in rows]
        starts = [int(corpus.starts[row]) for row in rows]
        self.begin = min(starts) - 1
        self.device = device
        self.tokens = pad_sequence(texts, batch_first=True).to(device)
        aux = [features.aux(row) for row in rows]
        self.aux = pad_sequence(aux, batch_first=True).to(device).float()
        at = [torch.arange(start, len(text) - 1) for start, text in zip(starts, texts, strict=True)]
        counts = torch.tensor([len(places) for places in at])
        self.row = torch.arange(len(rows)).repeat_interleave(counts).to(device)
        self.first = (torch.tensor(starts) - 1).repeat_interleave(counts).to(device)
        self.at = torch.cat(at).to(device)
        self._hidden = [features.hidden(row)[places] for row, places in zip(rows, at, strict=True)]

    def target(self, kind: Kind, output: Head, token_map: torch.Tensor) -> Target:
        """What the target says at the places."""
        said = self.tokens[self.row, self.at + 1]
        if kind == "cross_entropy":
            return Target(said, token_map=token_map)
        return Target(said, torch.cat(self._hidden).to(self.device), output, token_map)

    def steps(self, head: Eagle3, depth: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Of each step: its states [places, hidden], and bool [places], whether it has one."""
        for k, states in enumerate(head.unroll(self.tokens, self.aux, depth, self.begin)):
            begin = self.begin if k else 0
            source = self.at - 1 - k
            known = source >= self.first
            place = torch.where(known, source - begin, 0)
            yield states[self.row, place], known


@torch.no_grad()
def held_out_accuracy(
    head: Eagle3, corpus: Corpus, features: Features, depth: int, part: Part = "held_out"
) -> dict[str, Any]:
    """How often the steps are right about what the target said.

    Args:
        head: the head.
        corpus: of the target's answers.
        features: of the target, with the head's layers.
        depth: tokens in a row.
        part: of the corpus.

    Returns:
        `chain_figures`, ``score`` (its ``expected_length``), and ``top``: of each step, the shares
        of chains whose likeliest tokens, the first one, two, ... `TOP` of them, hold the right one,
        given that the tokens before it were right.
    """
    by_step: list[list[torch.Tensor]] = [[] for _ in range(depth)]
    texts = []
    for row in corpus.rows(part):
        start, length = int(corpus.starts[row]), int(corpus.lengths[row])
        if length - start < 2:
            continue
        batch = Batch(corpus, [row], features, head.fc.weight.device)
        right = torch.zeros(length - start, depth, dtype=torch.bool)
        for k, states in enumerate(head.unroll(batch.tokens, batch.aux, depth, batch.begin)):
            states = states[0, batch.begin if k == 0 else 0 :]
            there = max(len(states) - 1, 0)  # of the last one the right token is not known
            rank = ranks(
                head.norm(states[:there]),
                head.lm_head.weight,
                batch.tokens[0, start + 1 + k :],
                token_map=head.token_map,
            ).cpu()
            by_step[k].append(rank)
            right[:there, k] = rank == 0
        texts.append(right)
    figures = chain_figures(texts)
    return {
        "score": figures["expected_length"],
        **figures,
        "top": [
            top_k_accuracy(torch.cat(found) if found else torch.zeros(0), TOP) for found in by_step
        ],
    }
