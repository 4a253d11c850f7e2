"""Trees of candidates against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.speculate.candidates import ROOT, Candidates, tree_depths, tree_mask


@st.composite
def trees(draw: st.DrawFn) -> Candidates:
    size = draw(st.integers(0, 12))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(size)]
    tokens = [draw(st.integers(0, 7)) for _ in range(size)]
    return Candidates(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(parents, dtype=torch.int64),
        torch.rand(size, 8) if draw(st.booleans()) else None,
    )


@settings(deadline=None)
@given(trees())
def test_a_node_sees_itself_and_its_ancestors(tree: Candidates) -> None:
    tree.validate(8)
    mask, depths = tree_mask(tree.parents), tree.depths()
    assert torch.equal(tree_depths(tree.parents) + 1, depths)
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[-1] == node
        assert len(path) == depths[node]
        assert mask[node].nonzero().flatten().tolist() == sorted(path)
        assert [ROOT, *path[:-1]] == tree.parents[path].tolist()
    assert tree.path(ROOT) == []


@settings(deadline=None)
@given(trees())
def test_children_are_those_of_the_parents(tree: Candidates) -> None:
    found = tree.children()
    assert len(found) == len(tree) + 1
    for parent, below in enumerate(found, ROOT):
        assert below == [i for i, p in enumerate(tree.parents.tolist()) if p == parent]


@settings(deadline=None)
@given(trees(), st.integers(0, 5))
def test_a_cut_tree_has_the_paths_that_are_short_enough(tree: Candidates, depth: int) -> None:
    def paths(of: Candidates) -> list[list[int]]:
        return [of.tokens[of.path(node)].tolist() for node in range(len(of))]

    cut = tree.cut(depth)
    cut.validate(8)
    assert paths(cut) == [path for path in paths(tree) if len(path) <= depth]
    if tree.probabilities is not None:
        assert cut.probabilities is not None
        assert torch.equal(cut.probabilities, tree.probabilities[tree.depths() <= depth])


def test_a_chain_and_nothing() -> None:
    chain = Candidates.chain([5, 6, 7])
    assert chain.parents.tolist() == [-1, 0, 1]
    assert torch.equal(tree_mask(chain.parents), torch.ones(3, 3, dtype=torch.bool).tril())
    nothing = Candidates.none()
    nothing.validate(8)
    assert len(nothing) == 0
    assert nothing.children() == [[]]


@pytest.mark.parametrize(
    ("tokens", "parents", "probabilities", "message"),
    [
        ([1, 2], [-1], None, "one length"),
        ([1, 2], [-1, 1], None, "before its children"),
        ([1, 2], [-1, -2], None, "before its children"),
        ([1, 8], [-1, 0], None, "not in the vocabulary of 8"),
        ([1, -1], [-1, 0], None, "not in the vocabulary of 8"),
        ([1, 2], [-1, 0], torch.rand(2, 7), r"float32 \[2, 8\]"),
        ([1, 2], [-1, 0], torch.rand(2, 8).double(), r"float32 \[2, 8\]"),
    ],
)
def test_what_is_no_tree_is_refused(
    tokens: list[int], parents: list[int], probabilities: torch.Tensor | None, message: str
) -> None:
    tree = Candidates(torch.tensor(tokens), torch.tensor(parents), probabilities)
    with pytest.raises(ValueError, match=message):
        tree.validate(8)
    with pytest.raises(ValueError, match="int64"):
        Candidates(torch.tensor([1.0]), torch.tensor([-1])).validate(8)
