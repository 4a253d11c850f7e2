"""Trees of Medusa's guesses, and what is measured of the heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.errors import RunError
from compressor.speculate.acceptance import tokens_per_step
from compressor.speculate.decoding import speculative_decode
from compressor.speculate.medusa_proposer import MedusaProposer, measure_ranks
from compressor.speculate.proposer import States
from compressor.speculate.tree import Tree, expected_tokens, tree_from_ranks
from compressor.speculate.verification import Sampling
from tests.speculate.decoders import prompts, target

HIDDEN, VOCABULARY = 64, 384


class Heads(nn.Module):
    """Linear heads, over some of the vocabulary."""

    def __init__(self, count: int = 3, kept: int = VOCABULARY) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(count, kept, HIDDEN, generator=random))
        self.token_map: torch.Tensor | None = None
        if kept < VOCABULARY:
            self.token_map = torch.randperm(VOCABULARY, generator=random)[:kept]

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        return [hidden @ weight.T for weight in self.weights]


def fitted(cached: object, outputs: list[list[int]]) -> Heads:
    """Heads that know some of what the target says: least squares on its own states."""
    heads = Heads()
    rows, wanted = [], []
    for whole in outputs:
        states = cached.prefill([whole])[0]  # type: ignore[attr-defined]
        rows.append(states.hidden[: len(whole) - 4])
        wanted.append(torch.tensor([whole[i + 2 : i + 5] for i in range(len(whole) - 4)]))
    hidden, tokens = torch.cat(rows), torch.cat(wanted)
    with torch.no_grad():
        for i in range(3):
            one_hot = nn.functional.one_hot(tokens[:, i], VOCABULARY).float()
            heads.weights[i] = torch.linalg.lstsq(hidden, one_hot).solution.T
    return heads


@pytest.mark.parametrize("kept", [VOCABULARY, 100])
def test_nodes_are_the_ranked_guesses_of_the_head_of_their_depth(kept: int) -> None:
    heads = Heads(kept=kept)
    tree = Tree.of([(0,), (2,), (2, 1), (2, 0), (0, 3), (2, 1, 1)])
    proposer = MedusaProposer(heads, tree)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, HIDDEN, generator=random)
    proposer.start([States(torch.arange(5), each) for each in hidden])
    for row, candidates in enumerate(proposer.propose([7, 8], 3)):
        candidates.validate(VOCABULARY)
        assert torch.equal(candidates.parents, tree.parents())
        for node, path in enumerate(tree.paths):
            logits = heads(hidden[row, -1])[len(path) - 1]
            guess = logits.argsort(descending=True)[path[-1]]
            if heads.token_map is not None:
                guess = heads.token_map[guess]
            assert candidates.tokens[node] == guess
    assert len(proposer.propose([7, 8], 1)[0]) == 2
    proposer.drop([0])
    proposer.accept([States(torch.arange(2), hidden[0, :2])])
    (candidates,) = proposer.propose([9], 3)
    assert len(candidates) == 6
    alone = MedusaProposer(heads, tree)
    alone.start([States(torch.arange(2), hidden[0, :2])])
    assert torch.equal(alone.propose([9], 3)[0].tokens, candidates.tokens)


def test_the_default_is_the_chain_of_best_guesses() -> None:
    heads, hidden = Heads(), torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    proposer = MedusaProposer(heads)
    proposer.start([States(torch.tensor([4]), hidden)])
    (candidates,) = proposer.propose([5], 9)
    assert candidates.parents.tolist() == [-1, 0, 1]
    assert candidates.tokens.tolist() == [int(logits.argmax()) for logits in heads(hidden)]


def test_a_tree_that_the_heads_cannot_fill_is_refused() -> None:
    start = [States(torch.tensor([4]), torch.ones(1, HIDDEN))]
    deep = MedusaProposer(Heads(2), Tree.chain(3))
    deep.start(start)
    with pytest.raises(RunError, match="3 tokens deep, and there are 2 heads"):
        deep.propose([5], 3)
    wide = MedusaProposer(Heads(2, kept=2), Tree.of([(2,)]))
    wide.start(start)
    with pytest.raises(RunError, match="takes 3 guesses of a head that knows 2 tokens"):
        wide.propose([5], 3)


def test_ranks_are_counted_where_a_step_can_begin() -> None:
    heads = Heads(2)
    random = torch.Generator().manual_seed(2)
    cases = []
    for length, start in ((150, 7), (3, 1), (12, 0), (5, 5)):
        tokens = torch.randint(0, VOCABULARY, (length,), generator=random)
        cases.append((torch.randn(length, HIDDEN, generator=random), tokens, start))
    found = measure_ranks(heads, cases, most=200)
    expected = []
    for hidden, tokens, start in cases:
        for at in range(len(tokens) - 3):
            if at + 1 >= start:
                row = []
                for i, logits in enumerate(heads(hidden[at])):
                    rank = int((logits > logits[tokens[at + 2 + i]]).sum())
                    row.append(rank if rank < 200 else -1)
                expected.append(row)
    assert found.dtype == torch.int16
    assert found.tolist() == expected
    assert measure_ranks(heads, []).shape == (0, 0)


def test_a_measured_tree_makes_the_tokens_that_it_predicts(tmp_path: Path) -> None:
    cached = target(tmp_path / "model")
    texts = prompts(40)
    alone = speculative_decode(cached, None, texts, output_length=40)
    outputs = [[*text, *each.tokens] for text, each in zip(texts, alone, strict=True)]
    heads = fitted(cached, outputs)
    states = [cached.prefill([whole])[0] for whole in outputs]
    ranks = measure_ranks(
        heads,
        [(s.hidden, s.tokens, len(text)) for s, text in zip(states, texts, strict=True)],
    )
    tree = tree_from_ranks(ranks, 12)
    assert tree.expected[-1] > expected_tokens(Tree.chain(3), ranks) > 1.05
    means = []
    for proposer in (MedusaProposer(heads), MedusaProposer(heads, tree)):
        found = speculative_decode(cached, proposer, texts, output_length=40)
        assert [each.tokens for each in found] == [each.tokens for each in alone]
        means.append(tokens_per_step(found).mean)
    assert means[1] > means[0]
    assert means[1] == pytest.approx(tree.expected[-1], rel=0.1)
    sampled = speculative_decode(
        cached, MedusaProposer(heads, tree), texts, output_length=40,
        sampling=Sampling("rejection", 1.0),
    )  # fmt: skip
    assert all(len(each.tokens) == 40 for each in sampled)
