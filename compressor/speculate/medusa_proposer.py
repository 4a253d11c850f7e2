"""Medusa: heads on the target's last hidden state each guess one of the tokens ahead.

Cai et al.: "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
arXiv 2401.10774. The state that the newest settled token was chosen from also says something about
those after it: head i guesses the token i + 2 places behind that state. The heads know nothing of
each other, so that every guess of one may follow every guess of another, and what is proposed is a
tree (`tree.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from compressor.errors import RunError
from compressor.speculate.candidates import Candidates
from compressor.speculate.proposer import States
from compressor.speculate.tree import Tree

_ROWS = 64  # positions whose logits are in memory at once

Heads = Callable[[torch.Tensor], Sequence[torch.Tensor]]


class MedusaProposer:
    """Proposes a tree of the heads' best guesses. Nothing is drawn, whatever the temperature.

    Args:
        heads: hidden states [n, hidden] -> logits [n, draft vocabulary] of each head, first to
            last, such as `medusa.MedusaHeads`. An attribute ``token_map``, int64 [draft
            vocabulary], says which tokens of the target those are, where they are not all of them.
        tree: which guesses; by default the chain of the best ones, as deep as there are heads.
    """

    aux_layers: tuple[int, ...] = ()

    def __init__(self, heads: Heads, tree: Tree | None = None) -> None:
        self.heads = heads
        self.tree = tree
        self._states: list[torch.Tensor] = []  # [hidden] each: what the newest token came from

    def start(
        self,
        sequences: Sequence[States],
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """As `Proposer`."""
        self._states = [sequence.hidden[-1] for sequence in sequences]

    def propose(self, last: Sequence[int], depth: int) -> list[Candidates]:
        """As `Proposer`.

        Raises:
            RunError: the tree needs more heads, or more guesses of one, than there are.
        """
        logits = self.heads(torch.stack(self._states))
        tree = self._tree(len(logits), depth)
        if not tree.paths:
            return [Candidates.none() for _ in last]
        widths = [tree.width(i + 1) for i in range(tree.depth)]
        guesses = torch.zeros(len(last), tree.depth, max(widths), dtype=torch.int64)
        for i, width in enumerate(widths):
            guesses[:, i, :width] = best_tokens(self.heads, logits[i], width).cpu()
        depths = [len(path) - 1 for path in tree.paths]
        tokens = guesses[:, depths, [path[-1] for path in tree.paths]]
        parents = tree.parents()
        return [Candidates(row, parents) for row in tokens]

    def drop(self, rows: Sequence[int]) -> None:
        """As `Proposer`."""
        gone = set(rows)
        self._states = [state for row, state in enumerate(self._states) if row not in gone]

    def accept(self, states: Sequence[States]) -> None:
        """As `Proposer`."""
        self._states = [settled.hidden[-1] for settled in states]

    def _tree(self, heads: int, depth: int) -> Tree:
        tree = Tree.chain(heads) if self.tree is None else self.tree
        if tree.depth > heads:
            raise RunError(
                f"the tree of candidates is {tree.depth} tokens deep, and there are {heads} heads",
                where="Medusa",
                fix="choose the tree from what was measured with these heads",
            )
        return tree.cut(depth)


def best_tokens(heads: Heads, logits: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [n, count]: the target's tokens that one head finds likeliest, best first.

    Args:
        heads: see `MedusaProposer`.
        logits: [n, draft vocabulary], of that head.
        count: how many.

    Raises:
        RunError: the draft vocabulary has fewer.
    """
    if count > logits.shape[-1]:
        raise RunError(
            f"the tree of candidates takes {count} guesses of a head that knows "
            f"{logits.shape[-1]} tokens",
            where="Medusa",
            fix="choose the tree from what was measured with these heads",
        )
    found = logits.topk(count, -1).indices
    names: torch.Tensor | None = getattr(heads, "token_map", None)
    return found if names is None else names.to(found.device)[found]


@torch.inference_mode()
def measure_ranks(
    heads: Heads, sequences: Iterable[tuple[torch.Tensor, torch.Tensor, int]], *, most: int = 10
) -> torch.Tensor:
    """Which guess of each head was right, at every position that a step could begin at.

    Args:
        heads: see `MedusaProposer`.
        sequences: of each: the target's hidden states [n, hidden], in any dtype and on any device,
            tokens int64 [n], and where its answer starts: only positions whose next token belongs
            to the answer count, and of those the ones with a token ahead for every head.
        most: guesses of a head that are looked at.

    Returns:
        int16 [positions, heads]: the rank, from 0 on, of what really came i + 2 tokens after the
        position among the guesses of head i; -1 where it was not among the first ``most``.
    """
    found: list[torch.Tensor] = []
    count = 0
    parameter = next(heads.parameters(), None) if isinstance(heads, nn.Module) else None
    for hidden, tokens, start in sequences:
        for at in torch.arange(max(start - 1, 0), max(start - 1, len(tokens), 0)).split(_ROWS):
            states = hidden[at.to(hidden.device)]
            logits = heads(states if parameter is None else states.to(parameter))
            count = len(logits)
            complete = int((at < len(tokens) - 1 - count).sum())
            if not complete:
                break
            columns = []
            for i, row in enumerate(logits):
                guesses = best_tokens(heads, row[:complete], min(most, row.shape[-1])).cpu()
                right = guesses == tokens[at[:complete] + 2 + i, None]
                rank = right.byte().argmax(1).to(torch.int16)
                columns.append(torch.where(right.any(1), rank, -1).to(torch.int16))
            found.append(torch.stack(columns, 1))
    return torch.cat(found) if found else torch.empty(0, count, dtype=torch.int16)
