"""Candidates: the tokens that a proposer guesses for one sequence, as a tree (or a chain).

Node i is the token that may come after its parent; the children of -1 may come after the newest
settled token. Nodes stand in topological order: a parent before its children, and siblings in the
order in which they were drawn. One pass of the target over all nodes, each of which sees the
settled tokens and its own ancestors only, gives the target's distribution after every node
(Miao et al., "SpecInfer", arXiv 2305.09781; Cai et al., "Medusa", arXiv 2401.10774).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROOT = -1  # as a parent: the newest settled token


@dataclass(frozen=True)
class Candidates:
    """Tokens guessed for one sequence.

    Attributes:
        tokens: int64 [n].
        parents: int64 [n], each less than its node's own index; `ROOT` for a child of the newest
            settled token.
        probabilities: float32 [n, vocabulary] or None. Row i is the distribution that token i was
            drawn from, given its ancestors and the siblings drawn before it: the same for all
            siblings drawn with replacement, without those drawn before (and made to sum to 1) for
            siblings drawn without. None: the tokens were chosen (greedy, top-k, n-gram); this also
            serves for drawn ones, of which fewer are accepted then.

    Where there are probabilities, sampling leaves the target's distribution as it is only if no
    node was left out because of what it, or its probability, turned out to be: the tree's shape may
    depend on nothing that was drawn after the parent. Without them it does in any case.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    probabilities: torch.Tensor | None = None

    @classmethod
    def chain(
        cls, tokens: Sequence[int] | torch.Tensor, probabilities: torch.Tensor | None = None
    ) -> Candidates:
        """One token after the other; ``probabilities`` as the attribute."""
        made = torch.as_tensor(tokens, dtype=torch.int64).cpu()
        return cls(made, torch.arange(-1, len(made) - 1), probabilities)

    @classmethod
    def none(cls) -> Candidates:
        """Nothing was guessed: the target makes its next token alone."""
        return cls.chain([])

    def __len__(self) -> int:
        return len(self.tokens)

    def validate(self, vocabulary: int) -> None:
        """Raise ValueError where this is no tree of tokens below ``vocabulary``."""
        n = len(self.tokens)
        if self.tokens.shape != (n,) or self.parents.shape != (n,):
            raise ValueError("tokens and parents of candidates must be of one length")
        if self.tokens.dtype != torch.int64 or self.parents.dtype != torch.int64:
            raise ValueError("tokens and parents of candidates must be int64")
        if bool((self.parents >= torch.arange(n)).any() or (self.parents < ROOT).any()):
            raise ValueError("a parent must stand before its children")
        if bool((self.tokens < 0).any() or (self.tokens >= vocabulary).any()):
            raise ValueError(f"a candidate is not in the vocabulary of {vocabulary} tokens")
        q = self.probabilities
        if q is not None and (q.shape != (n, vocabulary) or q.dtype != torch.float32):
            raise ValueError(f"probabilities must be float32 [{n}, {vocabulary}]")

    def children(self) -> list[list[int]]:
        """Nodes below the root, then below node 0, 1, ...: [n + 1], each in order."""
        found: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents.tolist()):
            found[parent + 1].append(node)
        return found

    def depths(self) -> torch.Tensor:
        """int64 [n]: how many tokens after the newest settled one; its children have 1."""
        return tree_depths(self.parents) + 1

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the root down to this one; nothing for `ROOT`."""
        found = []
        while node != ROOT:
            found.append(node)
            node = int(self.parents[node])
        return found[::-1]

    def cut(self, depth: int) -> Candidates:
        """Without the nodes that are more than so many tokens after the newest settled one."""
        kept = (self.depths() <= depth).nonzero().flatten()
        if len(kept) == len(self):
            return self
        moved = torch.full((len(self) + 1,), ROOT)  # the last entry is read for the root, -1
        moved[kept] = torch.arange(len(kept))
        q = self.probabilities
        return Candidates(
            self.tokens[kept],
            moved[self.parents[kept]],
            None if q is None else q[kept.to(q.device)],
        )


def tree_depths(parents: torch.Tensor) -> torch.Tensor:
    """int64 [n]: number of ancestors of every node of a tree, or forest, given by parents [n]."""
    depths: list[int] = []
    for parent in parents.tolist():
        depths.append(0 if parent == ROOT else depths[parent] + 1)
    return torch.tensor(depths, dtype=torch.int64)


def tree_mask(parents: torch.Tensor) -> torch.Tensor:
    """bool [n, n]: row i is True at node i and its ancestors, from parents [n]."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents.tolist()):
        if parent != ROOT:
            mask[node] |= mask[parent]
    return mask
