"""Trees of candidates for proposers whose guesses at every depth are ranked lists, such as Medusa.

A node is a path of ranks: (0, 2) is the third best guess of the second head, after the best of the
first. Which nodes are worth their place in the target's pass is chosen from what was measured on
text that the target wrote. `tree_from_ranks` has for every position the rank that each head gave to
what really came, and takes the paths that came most often: since a path never comes more often than
its beginning, the most frequent ones are the best tree of that size. `tree_from_accuracies` knows
each head's accuracy by rank alone and takes products of them, as Cai et al., "Medusa", arXiv
2401.10774, section 2.3.3: it holds that heads err independently, which they do not.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Path = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Which guesses are proposed.

    Attributes:
        paths: of ranks, in topological order, each node's siblings by rank.
        expected: predicted tokens per step of the target, its own included, of the best tree of
            each number of nodes, [nodes + 1]: first without candidates, which makes 1; last of
            this one. Empty where nothing was measured.
    """

    paths: tuple[Path, ...]
    expected: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known = {()} | set(self.paths)
        if len(known) != len(self.paths) + 1 or any(path[:-1] not in known for path in self.paths):
            raise ValueError("the paths of a tree must be different, and none without its parent")
        if list(self.paths) != sorted(self.paths, key=_order):
            raise ValueError("the paths of a tree must stand in order of depth, then of ranks")
        if any(rank < 0 for path in self.paths for rank in path):
            raise ValueError("ranks of a tree must not be negative")

    @classmethod
    def of(cls, paths: Sequence[Path], expected: Sequence[float] = ()) -> Tree:
        """From paths in any order. ValueError if a path comes twice, or without its parent."""
        return cls(tuple(sorted(paths, key=_order)), tuple(expected))

    @classmethod
    def chain(cls, depth: int) -> Tree:
        """The best guess of every head: what vLLM proposes with Medusa."""
        return cls(tuple((0,) * (i + 1) for i in range(depth)))

    @property
    def depth(self) -> int:
        """Most tokens ahead."""
        return max(map(len, self.paths), default=0)

    def width(self, depth: int) -> int:
        """Guesses that are needed of the head at a depth, from 1 on."""
        return 1 + max((path[-1] for path in self.paths if len(path) == depth), default=-1)

    def parents(self) -> torch.Tensor:
        """int64 [nodes], as `Candidates.parents`."""
        index = {path: i for i, path in enumerate(self.paths)} | {(): -1}
        return torch.tensor([index[path[:-1]] for path in self.paths], dtype=torch.int64)

    def cut(self, depth: int) -> Tree:
        """Without what is deeper."""
        return Tree(tuple(path for path in self.paths if len(path) <= depth))


def tree_from_ranks(ranks: torch.Tensor, nodes: int, *, depth: int | None = None) -> Tree:
    """The tree of a number of nodes that would have had the most tokens accepted.

    Args:
        ranks: int [positions, heads]: the rank, from 0 on, of what came i + 1 tokens after the
            newest settled one among the guesses of head i; -1 where it was not among them. See
            `medusa_proposer.measure_ranks`.
        nodes: most nodes; fewer where no more paths were ever right.
        depth: most tokens ahead; the number of heads if not given.

    Returns:
        the tree and its expected tokens per step on these positions, where every step begins as
        often at one position as at another.

    Raises:
        ValueError: no positions, or fewer than one node.
    """
    if not len(ranks) or nodes < 1:
        raise ValueError("a tree needs positions to measure and at least one node")
    counts: Counter[Path] = Counter()
    for row in ranks[:, :depth].tolist():
        for end, rank in enumerate(row, 1):
            if rank < 0:
                break
            counts[tuple(row[:end])] += 1
    # Of equals the shorter path first: a parent before its child.
    chosen = sorted(counts, key=lambda path: (-counts[path], _order(path)))[:nodes]
    return Tree.of(chosen, _running([counts[path] / len(ranks) for path in chosen]))


def tree_from_accuracies(
    accuracies: Sequence[Sequence[float]], nodes: int, *, depth: int | None = None
) -> Tree:
    """The tree that the Medusa paper chooses: the nodes with the largest products of accuracies.

    Args:
        accuracies: [heads][ranks]: how often a head's guess of that rank alone is right.
        nodes: most nodes.
        depth: most tokens ahead; the number of heads if not given.

    Raises:
        ValueError: not every accuracy is between 0 and 1, or fewer than one node.
    """
    heads = [list(row) for row in accuracies[:depth]]
    if nodes < 1 or not heads or not all(0 <= a <= 1 for row in heads for a in row):
        raise ValueError("a tree needs at least one node, and accuracies between 0 and 1")
    # The next nodes are always children of chosen ones, since products only fall with depth.
    chosen: list[Path] = []
    values: list[float] = []
    open_nodes: list[tuple[float, Path]] = [
        (-a, (rank,)) for rank, a in enumerate(heads[0]) if a > 0
    ]
    heapq.heapify(open_nodes)
    while open_nodes and len(chosen) < nodes:
        value, path = heapq.heappop(open_nodes)
        chosen.append(path)
        values.append(-value)
        if len(path) < len(heads):
            for rank, a in enumerate(heads[len(path)]):
                if a > 0:
                    heapq.heappush(open_nodes, (value * a, (*path, rank)))
    return Tree.of(chosen, _running(values))


def accuracies_by_rank(ranks: torch.Tensor, most: int) -> list[list[float]]:
    """How often the guess of each rank, below ``most``, of each head is right, [heads][most]; from
    ranks as of `tree_from_ranks`."""
    return [[float((column == rank).float().mean()) for rank in range(most)] for column in ranks.T]


def expected_tokens(tree: Tree, ranks: torch.Tensor) -> float:
    """Tokens per step, the target's own included, that a tree would make at these positions; ranks
    as of `tree_from_ranks`."""
    right = [
        (ranks[:, : len(path)] == torch.tensor(path, dtype=ranks.dtype)).all(1)
        for path in tree.paths
        if len(path) <= ranks.shape[1]
    ]
    return 1.0 + float(sum(float(column.double().mean()) for column in right))


def _order(path: Path) -> tuple[int, Path]:
    return len(path), path


def _running(values: Sequence[float]) -> list[float]:
    """1, then 1 and the first value, and so on."""
    return [1.0 + math.fsum(values[:end]) for end in range(len(values) + 1)]
