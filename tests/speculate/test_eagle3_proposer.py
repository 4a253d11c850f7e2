"""What an EAGLE-3 head proposes with its cache, against the head run over whole sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.speculate.candidates import Candidates
from compressor.speculate.eagle3 import Eagle3
from compressor.speculate.eagle3_proposer import Eagle3Proposer
from compressor.speculate.proposer import States
from tests.speculate.test_eagle3 import chain, head_of

LAYERS = 96  # width of the features


class Text:
    """A sequence whose tokens and features are drawn as it grows."""

    def __init__(self, length: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(50, (length,), generator=self.generator)
        self.aux = torch.randn(length, LAYERS, generator=self.generator)
        self.seen = 0

    def states(self) -> States:
        """Those that were not asked for yet."""
        since, self.seen = self.seen, len(self.tokens)
        return States(self.tokens[since:], torch.zeros(self.seen - since, 1), self.aux[since:])

    def grow(self, tokens: list[int]) -> None:
        new = torch.tensor(tokens)
        self.tokens = torch.cat([self.tokens, new])
        more = torch.randn(len(new), LAYERS, generator=self.generator)
        self.aux = torch.cat([self.aux, more])

    def logits(self, head: Eagle3, after: list[int]) -> torch.Tensor:
        """float32 [draft]: the head's after so many further tokens, the first one settled."""
        tokens = torch.cat([self.tokens, torch.tensor(after)])
        start = len(self.tokens) - 1
        with torch.no_grad():
            return head.logits(chain(head, tokens, self.aux, start, len(after))[-1])


def greedy(head: Eagle3, text: Text, last: int, depth: int) -> list[int]:
    after = [last]
    for _ in range(depth):
        after.append(int(head.token_map[text.logits(head, after).argmax()]))
    return after[1:]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_chains_are_those_of_whole_sequences(seed: int, depth: int) -> None:
    head = head_of(seed)
    proposer = Eagle3Proposer(head)
    texts = [Text(length, seed + length) for length in (5, 1, 9)]
    pick = torch.Generator().manual_seed(seed)
    proposer.start([text.states() for text in texts])
    for turn in range(4):
        last = torch.randint(50, (len(texts),), generator=pick).tolist()
        candidates = proposer.propose(last, depth)
        for text, token, made in zip(texts, last, candidates, strict=True):
            assert made.tokens.tolist() == greedy(head, text, token, depth)
            assert made.parents.tolist() == list(range(-1, depth - 1))
            assert made.probabilities is None
        if turn == 1:
            proposer.drop([1])
            del texts[1], last[1], candidates[1]
        for text, token, made in zip(texts, last, candidates, strict=True):
            accepted = int(torch.randint(depth + 1, (), generator=pick))
            text.grow([token, *made.tokens[:accepted].tolist()])
        proposer.accept([text.states() for text in texts])


def tree_of(head: Eagle3, text: Text, last: int, depth: int, k: int, count: int) -> set[tuple]:
    """Paths of EAGLE-2's tree, from its definition: grow, then take the likeliest."""
    made: dict[tuple[int, ...], float] = {}
    grown: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(depth):
        level = {}
        for path, score in grown.items():
            chances = torch.log_softmax(text.logits(head, [last, *path]), -1)
            for value, index in zip(*(x.tolist() for x in chances.topk(k)), strict=True):
                level[(*path, int(head.token_map[index]))] = score + value
        made |= level
        grown = dict(sorted(level.items(), key=lambda item: -item[1])[:k])
    return set(sorted(made, key=lambda path: -made[path])[:count])


def paths(candidates: Candidates) -> set[tuple[int, ...]]:
    tokens = candidates.tokens.tolist()
    return {
        tuple(tokens[i] for i in candidates.path(node)) for node in range(len(candidates.tokens))
    }


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 4), st.integers(4, 12))
def test_trees_hold_the_likeliest_paths(seed: int, depth: int, k: int, count: int) -> None:
    head = head_of(seed)
    proposer = Eagle3Proposer(head, branches=k, nodes=count)
    texts = [Text(length, seed + length) for length in (6, 3)]
    proposer.start([text.states() for text in texts], temperature=0.7)
    for turn in range(2):
        last = [7 + turn, 30]
        candidates = proposer.propose(last, depth)
        for text, token, made in zip(texts, last, candidates, strict=True):
            made.validate(50)
            assert paths(made) == tree_of(head, text, token, depth, k, count)
            assert made.probabilities is None
            text.grow([token, *(int(made.tokens[i]) for i in made.path(len(made) - 1))])
        proposer.accept([text.states() for text in texts])


def test_drawn_chains_come_with_the_distributions_they_were_drawn_from() -> None:
    head = head_of(1)
    texts = [Text(length, length) for length in (4, 8)]
    proposer = Eagle3Proposer(head)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    proposer.start([t.states() for t in texts], temperature=0.6, generators=generators())
    both = proposer.propose([3, 4], 3)
    for text, token, made in zip(texts, (3, 4), both, strict=True):
        assert made.probabilities is not None
        made.validate(50)
        after = [token]
        for chosen, got in zip(made.tokens.tolist(), made.probabilities, strict=True):
            expected = torch.zeros(50)
            expected[head.token_map] = torch.softmax(text.logits(head, after) / 0.6, -1)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
            assert got[chosen] > 0
            after.append(chosen)
    texts[1].seen = 0
    proposer.start([texts[1].states()], temperature=0.6, generators=generators()[1:])
    alone = proposer.propose([4], 3)[0]
    assert alone.tokens.tolist() == both[1].tokens.tolist()


def test_drawn_tokens_follow_the_heads_distribution() -> None:
    head, text = head_of(2), Text(6, 0)
    proposer = Eagle3Proposer(head)
    states, rows = text.states(), 4000
    proposer.start(
        [states] * rows,
        temperature=1.0,
        generators=[torch.Generator().manual_seed(i) for i in range(rows)],
    )
    drawn = torch.tensor([int(one.tokens[0]) for one in proposer.propose([9] * rows, 1)])
    expected = torch.softmax(text.logits(head, [9]), -1) * rows
    observed = (drawn[:, None] == head.token_map).sum(0)
    likely = expected >= 5
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    from scipy.stats import chi2

    assert chi2.sf(float(statistic), int(likely.sum()) - 1) > 1e-4


def test_a_tree_needs_nodes_for_its_branches() -> None:
    for branches, nodes in ((0, 0), (4, 3), (21, 30)):
        with pytest.raises(RunError, match="EAGLE-3 proposer"):
            Eagle3Proposer(head_of(), branches=branches, nodes=nodes)


def test_states_without_features_are_refused() -> None:
    with pytest.raises(ValueError, match="aux"):
        Eagle3Proposer(head_of()).start([States(torch.tensor([1, 2]), torch.zeros(2, 32))])
