"""Medusa heads: K small heads on the target's last hidden state, each a token further ahead.

Cai, Li, Geng, Peng, Lee, Chen, Dao: "Medusa: Simple LLM Inference Acceleration Framework with
Multiple Decoding Heads", arXiv 2401.10774. From the state at position t the target itself predicts
the token at t + 1, head i (from 0) the token at t + 2 + i. A head is ``layers`` residual blocks
x + SiLU(W x + b), W and b starting at zero, and an output layer that starts as the target's.

Medusa-1 (`train_medusa`) leaves the target as it is, quantized or not, and reads its states from
disk. Medusa-2 goes on from there: see `medusa_joint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressor.errors import RunError
from compressor.models.head import CausalModel, Head, last_hidden
from compressor.speculate.chains import chain_figures
from compressor.speculate.corpus import Corpus, Part
from compressor.speculate.features import Features
from compressor.speculate.losses import Target, output_losses, ranks, top_k_accuracy
from compressor.speculate.options import Kind, MedusaOptions, Output
from compressor.speculate.training import train

States = Callable[[int], torch.Tensor]

TOP = 5  # the likeliest tokens that accuracies are given for


class _Block(nn.Module):
    """The residual blocks of one head; named as vLLM names them."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + functional.silu(layer(x))
        return x


class MedusaHeads(nn.Module):
    """K heads in float32. Names of parameters are those of vLLM's layout.

    Args:
        hidden: width of the target's last hidden state.
        vocabulary: of the target.
        heads: K.
        layers: residual blocks of each.
        output: `MedusaOptions.output`. The target's own is not trained.
        token_map: int64 [draft], ascending: the tokens that the heads know; None for all.
        scale: of the logits, as of the target's head.
    """

    token_map: torch.Tensor | None

    def __init__(
        self,
        hidden: int,
        vocabulary: int,
        heads: int,
        *,
        layers: int = 1,
        output: Output = "own",
        token_map: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.hidden, self.vocabulary, self.output, self.scale = hidden, vocabulary, output, scale
        self.register_buffer("token_map", token_map)
        self.blocks = nn.ModuleList(_Block(hidden, layers) for _ in range(heads))
        draft = vocabulary if token_map is None else len(token_map)
        self.lm_heads = nn.ModuleList(
            nn.Linear(hidden, draft, bias=False) for _ in range(heads if output == "own" else 1)
        )
        if output == "original":
            self.lm_heads.requires_grad_(False)

    @classmethod
    def start(
        cls, head: Head, hidden: int, options: MedusaOptions, token_map: torch.Tensor | None
    ) -> MedusaHeads:
        """Heads that all predict what the target does: the token at t + 1.

        Args:
            head: the target's.
            hidden: width of what it reads.
            options: of the heads.
            token_map: int64 [draft] of a reduced vocabulary.
        """
        weight = output_weight(head.lm_head, hidden)
        made = cls(
            hidden,
            len(weight),
            options.heads,
            layers=options.layers,
            output=options.output,
            token_map=token_map,
            scale=head.scale,
        )
        rows = weight if token_map is None else weight[token_map.to(weight.device)]
        for parameter in made.lm_heads.parameters():
            parameter.data.copy_(rows)
        return made.to(weight.device)

    @classmethod
    def from_state(cls, shape: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> MedusaHeads:
        """What `shape` and ``state_dict`` describe."""
        made = cls(**shape, token_map=state.get("token_map"))
        made.load_state_dict(state)
        return made

    def shape(self) -> dict[str, Any]:
        """The arguments to make such heads again, but for the token map; JSON."""
        return {
            "hidden": self.hidden,
            "vocabulary": self.vocabulary,
            "heads": len(self.blocks),
            "layers": len(self.blocks[0].layers),  # type: ignore[arg-type]
            "output": self.output,
            "scale": self.scale,
        }

    def output_weight(self, head: int) -> torch.Tensor:
        """[draft, hidden] of a head's output layer."""
        weight: torch.Tensor = self.lm_heads[head if self.output == "own" else 0].weight  # type: ignore[assignment]
        return weight

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each head, [..., draft], of the target's hidden states [..., hidden]."""
        hidden = hidden.to(self.output_weight(0).dtype)
        return [
            functional.linear(block(hidden), self.output_weight(i)) * self.scale
            for i, block in enumerate(self.blocks)
        ]

    def to_vocabulary(self, places: torch.Tensor) -> torch.Tensor:
        """Token ids of places in the heads' vocabulary."""
        return places if self.token_map is None else self.token_map[places]


def output_weight(module: nn.Module, width: int) -> torch.Tensor:
    """What an output layer without bias multiplies by, float32 [vocabulary, width]; of one that
    holds no weight (quantized) by running the unit vectors through it."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.detach().float()
    tensors = [*module.parameters(), *module.buffers()]
    device = next(t.device for t in tensors)
    with torch.no_grad():
        zero = torch.zeros(1, width, device=device)
        rows = [module(unit).float() for unit in torch.eye(width, device=device).split(64)]
        return (torch.cat(rows) - module(zero).float()).T.contiguous()


def make_token_map(corpus: Corpus, options: MedusaOptions, vocabulary: int) -> torch.Tensor | None:
    """The tokens that the heads are to know, int64 ascending; None for all."""
    count = options.draft_vocabulary
    if count is None or count >= vocabulary:
        return None
    return torch.from_numpy(corpus.frequent_tokens(count, vocabulary))


def train_medusa(
    head: Head,
    corpus: Corpus,
    features: Features,
    options: MedusaOptions,
    directory: Path,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> tuple[MedusaHeads, dict[str, Any]]:
    """Medusa-1: heads on a frozen target. Resumes what a killed call left.

    Args:
        head: of the target, on the device to train on.
        corpus: what is trained on, and what is held out.
        features: what the target makes of it.
        options: see `MedusaOptions`.
        directory: for checkpoints.
        advance: called with a note after each step.

    Returns:
        the heads, and what `training.train` returns; evaluations are `held_out_accuracy`'s.

    Raises:
        RunError: nothing to train on or to evaluate with, or training did not stay finite.
    """
    width = features.size
    vocabulary = len(output_weight(head.lm_head, width))
    heads = MedusaHeads.start(head, width, options, make_token_map(corpus, options, vocabulary))
    device = heads.blocks[0].layers[0].weight.device  # type: ignore[union-attr,index]

    def states(row: int) -> torch.Tensor:
        return features.hidden(row).to(device).float()

    def backward(rows: Sequence[int], weight: float) -> dict[str, float]:
        batch = Batch(corpus, rows, states, device)
        target = batch.target(options.loss, head, heads.token_map)
        loss = batch.loss(heads, target, options, weight)
        loss.backward()
        return {"loss": float(loss.detach()) / weight}

    facts = train(
        {name: p for name, p in heads.named_parameters() if p.requires_grad},
        backward,
        lambda: held_out_accuracy(heads, corpus, states),
        trainable(corpus),
        options,
        directory,
        size=lambda row: places(corpus, row),
        advance=advance,
    )
    return heads, facts


def places(corpus: Corpus, row: int) -> int:
    """Positions of a sample from which the first head predicts a token of the answer."""
    return max(int(corpus.lengths[row]) - int(corpus.starts[row]) - 1, 0)


def trainable(corpus: Corpus) -> list[int]:
    """Samples of the training part that are long enough to say something.

    Raises:
        RunError: nothing is held out that is.
    """
    if not any(places(corpus, row) for row in corpus.rows("held_out")):
        raise RunError(
            "no sample is held out whose answer has two tokens or more",
            where="speculator",
            fix="hold out some samples: when to stop is decided on them",
        )
    return [row for row in corpus.rows("train") if places(corpus, row)]


def current_states(model: CausalModel, corpus: Corpus, rows: Sequence[int]) -> States:
    """Hidden states of these samples by the model as it is, all in one pass."""
    longest = int(corpus.lengths[list(rows)].max())
    ids = torch.from_numpy(corpus.tokens[list(rows), :longest].astype("int64"))
    made = last_hidden(model, ids.to(next(model.parameters()).device))
    return {row: made[i, : corpus.lengths[row]] for i, row in enumerate(rows)}.__getitem__


class Batch:
    """Samples laid out by the place s whose next token, at s + 1, is predicted: by the target from
    its state at s, by head i from the state at s - 1 - i.

    Places run from an answer's first token to its last but one. A head starts where the state of
    the prompt's last token can reach, as when served.

    Args:
        corpus: of the samples.
        rows: which.
        states: float32 [length, hidden] of a sample.
        device: of everything.
    """

    def __init__(
        self, corpus: Corpus, rows: Iterable[int], states: States, device: torch.device
    ) -> None:
        tokens, hidden, at, first = [], [], [], []
        offset = 0
        for row in rows:
            start, length = int(corpus.starts[row]), int(corpus.lengths[row])
            tokens.append(torch.from_numpy(corpus.row(row)[start + 1 :].astype("int64")))
            hidden.append(states(row))
            at.append(torch.arange(start, length - 1) + offset)
            first.append(torch.full((length - 1 - start,), start - 1 + offset))
            offset += length
        self.tokens = torch.cat(tokens).to(device)
        self.hidden = torch.cat(hidden)
        self.at = torch.cat(at).to(device)
        self.first = torch.cat(first).to(device)

    def target(self, kind: Kind, head: Head, token_map: torch.Tensor | None) -> Target:
        """What the target says there, from the states that the batch was made with."""
        if kind == "cross_entropy":
            return Target(self.tokens, token_map=token_map)
        return Target(self.tokens, self.hidden[self.at].detach(), head, token_map)

    def loss(
        self, heads: MedusaHeads, target: Target, options: MedusaOptions, weight: float
    ) -> torch.Tensor:
        """The heads' losses summed over places, each head's by its share of ``weight``."""
        inputs, counts = [], []
        for i, block in enumerate(heads.blocks):
            source = self.at - 1 - i
            inputs.append(block(self.hidden[source.clamp_min(0)]))
            counts.append((source >= self.first).float() * (weight * options.decay**i))
        return output_losses(
            inputs,
            [heads.output_weight(i) for i in range(len(heads.blocks))],
            target,
            options.loss,
            counts,
            scale=heads.scale,
        ).total


@torch.no_grad()
def held_out_accuracy(
    heads: MedusaHeads, corpus: Corpus, states: States, part: Part = "held_out"
) -> dict[str, Any]:
    """How often the heads are right about what the target said.

    Args:
        heads: the heads.
        corpus: of the target's answers.
        states: the target's hidden states of a sample, [length, hidden], on the heads' device.
        part: of the corpus.

    Returns:
        `chain_figures`, ``score`` (its ``expected_length``), and ``top``: of each head, the shares
        of positions at which its `TOP` likeliest tokens, the first one, two, ... of them, hold the
        right one.
    """
    count = len(heads.blocks)
    by_head: list[list[torch.Tensor]] = [[] for _ in range(count)]
    chains = []
    for row in corpus.rows(part):
        start, length = int(corpus.starts[row]), int(corpus.lengths[row])
        tokens = torch.from_numpy(corpus.row(row).astype("int64"))
        hidden = states(row)[start - 1 : length - 1]
        right = torch.zeros(len(hidden), count, dtype=torch.bool)
        for i, block in enumerate(heads.blocks):
            there = max(len(hidden) - 1 - i, 0)  # positions whose token i is still in the answer
            rank = ranks(
                block(hidden[:there].to(heads.output_weight(i).dtype)),
                heads.output_weight(i),
                tokens[start + 1 + i :].to(hidden.device),
                token_map=heads.token_map,
            ).cpu()
            by_head[i].append(rank)
            right[:there, i] = rank == 0
        chains.append(right)
    figures = chain_figures(chains)
    return {
        "score": figures["expected_length"],
        **figures,
        "top": [top_k_accuracy(torch.cat(ranked), TOP) for ranked in by_head],
    }
