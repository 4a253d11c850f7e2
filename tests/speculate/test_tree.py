"""Trees chosen from measurements against all trees there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.speculate.tree import (
    Path,
    Tree,
    accuracies_by_rank,
    expected_tokens,
    tree_from_accuracies,
    tree_from_ranks,
)


def all_trees(heads: int, ranks: int, nodes: int) -> list[Tree]:
    every: list[Path] = [
        path for depth in range(heads) for path in itertools.product(range(ranks), repeat=depth + 1)
    ]
    found = []
    for size in range(1, nodes + 1):
        for paths in itertools.combinations(every, size):
            known = {(), *paths}
            if all(path[:-1] in known for path in paths):
                found.append(Tree.of(paths))
    return found


ALL = all_trees(2, 3, 4)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2)).map(list), min_size=1, max_size=30),
    st.integers(1, 4),
)
def test_the_tree_from_ranks_is_the_best_of_its_size(rows: list[list[int]], nodes: int) -> None:
    ranks = torch.tensor(rows, dtype=torch.int16)
    tree = tree_from_ranks(ranks, nodes)
    got = expected_tokens(tree, ranks)
    assert len(tree.paths) <= nodes
    assert len(tree.expected) == len(tree.paths) + 1
    assert tree.expected[0] == 1
    assert tree.expected[-1] == pytest.approx(got)
    best = max(expected_tokens(each, ranks) for each in ALL if len(each.paths) <= nodes)
    assert got == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 8), min_size=3, max_size=3).map(lambda row: [x / 24 for x in row]),
        min_size=2,
        max_size=2,
    ),
    st.integers(1, 4),
)
def test_the_papers_tree_has_the_largest_sum_of_products(
    accuracies: list[list[float]], nodes: int
) -> None:
    def value(tree: Tree) -> float:
        total = 1.0
        for path in tree.paths:
            product = 1.0
            for head, rank in enumerate(path):
                product *= accuracies[head][rank]
            total += product
        return total

    tree = tree_from_accuracies(accuracies, nodes)
    assert tree.expected[-1] == pytest.approx(value(tree))
    best = max(value(each) for each in ALL if len(each.paths) <= nodes)
    assert value(tree) == pytest.approx(max(best, 1.0))


def test_heads_that_are_right_together_are_seen_together() -> None:
    """The second head is right exactly where the first is: products do not know that."""
    ranks = torch.tensor([[0, 0]] * 5 + [[1, -1]] * 4 + [[2, -1]] * 1, dtype=torch.int16)
    assert tree_from_ranks(ranks, 2).paths == ((0,), (0, 0))
    assert accuracies_by_rank(ranks, 3) == [
        pytest.approx([0.5, 0.4, 0.1]),
        pytest.approx([0.5, 0.0, 0.0]),
    ]
    papers = tree_from_accuracies(accuracies_by_rank(ranks, 3), 2)
    assert papers.paths == ((0,), (1,))
    assert expected_tokens(papers, ranks) == pytest.approx(1.9)
    assert expected_tokens(tree_from_ranks(ranks, 2), ranks) == pytest.approx(2.0)


def test_the_form_of_a_tree() -> None:
    tree = Tree.of([(0, 1), (1,), (0,), (0, 0), (0, 1, 0)])
    assert tree.paths == ((0,), (1,), (0, 0), (0, 1), (0, 1, 0))
    assert tree.parents().tolist() == [-1, -1, 0, 0, 3]
    assert tree.depth == 3
    assert [tree.width(depth) for depth in (1, 2, 3, 4)] == [2, 2, 1, 0]
    assert tree.cut(1).paths == ((0,), (1,))
    assert Tree.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert Tree(()).depth == 0
    ranks = torch.tensor([[0, 1], [1, 1]], dtype=torch.int16)
    assert tree_from_ranks(ranks, 9, depth=1).depth == 1
    assert tree_from_accuracies([[0.5], [0.5]], 9, depth=1).depth == 1


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (((0, 0),), "without its parent"),
        (((0,), (0,)), "different"),
        (((0, 0), (0,)), "order of depth"),
        (((-1,),), "negative"),
        (((),), "different"),
    ],
)
def test_what_is_no_tree_is_refused(paths: tuple[Path, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree(paths)


def test_a_tree_needs_measurements() -> None:
    with pytest.raises(ValueError, match="positions to measure"):
        tree_from_ranks(torch.empty(0, 2, dtype=torch.int16), 4)
    with pytest.raises(ValueError, match="at least one node"):
        tree_from_ranks(torch.zeros(3, 2, dtype=torch.int16), 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        tree_from_accuracies([[1.5]], 4)
