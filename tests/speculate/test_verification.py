"""Acceptance rules: what is drawn with candidates is distributed as what is drawn without."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from compressor.speculate.candidates import ROOT, Candidates
from compressor.speculate.verification import Sampling, draw, verify
from tests.speculate.decoders import chi_square

VOCABULARY = 5
LENGTH = 3  # tokens of a sequence
TRIALS = 4000
TEMPERATURE = 0.8

Propose = Callable[[int, torch.Generator], Candidates]


def tables(seed: int) -> torch.Tensor:
    """Logits [vocabulary, vocabulary] of the next token by the last one; one is impossible."""
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[seed % VOCABULARY, (seed + 2) % VOCABULARY] = -torch.inf
    return logits


TARGET, DRAFT = tables(1), torch.softmax(tables(4), -1)


def chain(last: int, random: torch.Generator) -> Candidates:
    """Drawn from the draft, one after the other."""
    tokens, rows = [], []
    for _ in range(2):
        rows.append(DRAFT[last])
        last = draw(DRAFT[last], random)
        tokens.append(last)
    return Candidates.chain(tokens, torch.stack(rows))


def _tree(last: int, random: torch.Generator, replaced: bool) -> Candidates:
    """Three children of the newest token and two of each of those, drawn with or without
    replacement."""
    tokens: list[int] = []
    parents: list[int] = []
    rows: list[torch.Tensor] = []
    for parent, count in ((ROOT, 3), (0, 2), (1, 2), (2, 2)):
        q = DRAFT[last if parent == ROOT else tokens[parent]].clone()
        for _ in range(count):
            tokens.append(draw(q, random))
            parents.append(parent)
            rows.append(q / q.sum())
            if not replaced:
                q = q.clone()
                q[tokens[-1]] = 0
    return Candidates(torch.tensor(tokens), torch.tensor(parents), torch.stack(rows))


def tree_with_replacement(last: int, random: torch.Generator) -> Candidates:
    return _tree(last, random, True)


def tree_without_replacement(last: int, random: torch.Generator) -> Candidates:
    return _tree(last, random, False)


def chosen(last: int, random: torch.Generator) -> Candidates:
    """The draft's best two, and the best after each: nothing is drawn."""
    first = DRAFT[last].topk(2).indices
    return Candidates(torch.cat([first, DRAFT[first].argmax(-1)]), torch.tensor([ROOT, ROOT, 0, 1]))


def untold(last: int, random: torch.Generator) -> Candidates:
    """Drawn from the draft, which the target is not told."""
    drawn = chain(last, random)
    return Candidates(drawn.tokens, drawn.parents)


def pretended(last: int, random: torch.Generator) -> Candidates:
    """The draft's best, said to be drawn."""
    first = DRAFT[last].argmax()
    return Candidates.chain([int(first)], DRAFT[last : last + 1])


def p_value(propose: Propose, sampling: Sampling) -> float:
    """Of the sequences that decoding makes, under the target's own distribution."""
    random = torch.Generator().manual_seed(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(TRIALS):
        made: list[int] = []
        last = 0
        while len(made) < LENGTH:
            candidates = propose(last, random)
            rows = TARGET[torch.cat([torch.tensor([last]), candidates.tokens])]
            verdict = verify(candidates, rows, sampling, random)
            made += [*candidates.tokens[verdict.path].tolist(), verdict.token]
            last = made[-1]
        counts[tuple(made[:LENGTH])] += 1
    p = torch.softmax(TARGET.double() / TEMPERATURE, -1)
    expected = {
        (a, b, c): float(p[0, a] * p[a, b] * p[b, c])
        for a, b, c in itertools.product(range(VOCABULARY), repeat=LENGTH)
    }
    return chi_square(counts, expected)


@pytest.mark.parametrize(
    "propose", [chain, tree_with_replacement, tree_without_replacement, chosen, untold]
)
def test_rejection_leaves_the_targets_distribution(propose: Propose) -> None:
    assert p_value(propose, Sampling("rejection", TEMPERATURE)) > 1e-3


@pytest.mark.parametrize(
    ("propose", "sampling"),
    [
        (pretended, Sampling("rejection", TEMPERATURE)),
        (chain, Sampling("typical", TEMPERATURE)),
        (chain, Sampling("rejection", 1.0)),
    ],
)
def test_what_is_not_lossless_shows(propose: Propose, sampling: Sampling) -> None:
    assert p_value(propose, sampling) < 1e-9


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.softmax(TARGET / TEMPERATURE, -1)
    for _ in range(200):
        token = draw(q[0], random)
        candidates = Candidates.chain([token], q[:1])
        rows = TARGET[torch.tensor([0, token])]
        assert verify(candidates, rows, Sampling("rejection", TEMPERATURE), random).path == [0]


def test_draws_follow_weights_and_leave_out_what_has_none() -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])
    counts = Counter(draw(weights, random) for _ in range(4000))
    assert set(counts) == {1, 3}
    assert chisquare([counts[1], counts[3]], [3000, 1000]).pvalue > 1e-3
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    draw(weights, one)
    torch.rand((), dtype=torch.float64, generator=other)
    assert torch.equal(one.get_state(), other.get_state())


@st.composite
def cases(draw_: st.DrawFn) -> tuple[Candidates, torch.Tensor]:
    size = draw_(st.integers(0, 10))
    parents = [draw_(st.integers(ROOT, node - 1)) for node in range(size)]
    tokens = [draw_(st.integers(0, VOCABULARY - 1)) for _ in range(size)]
    logits = draw_(
        st.lists(st.integers(-20, 20), min_size=(size + 1) * VOCABULARY,
                 max_size=(size + 1) * VOCABULARY)
    )  # fmt: skip
    return (
        Candidates(
            torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64)
        ),
        torch.tensor(logits).view(size + 1, VOCABULARY) / 5,
    )


@settings(deadline=None)
@given(cases())
def test_greedy_accepts_exactly_what_the_target_would_say(
    case: tuple[Candidates, torch.Tensor],
) -> None:
    candidates, logits = case
    verdict = verify(candidates, logits, Sampling(), torch.Generator())
    choices = logits.argmax(-1).tolist()
    at = [0, *(node + 1 for node in verdict.path)]
    said = [*candidates.tokens[verdict.path].tolist(), verdict.token]
    assert said == [choices[i] for i in at]
    last = verdict.path[-1] if verdict.path else ROOT
    below = candidates.children()[last + 1]
    assert verdict.token not in candidates.tokens[below].tolist()
    for margin, i in zip(verdict.margins, at, strict=True):
        best, second = sorted(logits[i].tolist())[-1:-3:-1]
        assert margin == pytest.approx(best - second)


@settings(deadline=None)
@given(cases())
def test_typical_acceptance_is_the_papers(case: tuple[Candidates, torch.Tensor]) -> None:
    candidates, logits = case
    sampling = Sampling("typical", 0.7, epsilon=0.2, delta=0.4)
    verdict = verify(candidates, logits, sampling, torch.Generator())
    p = torch.softmax(logits.double() / 0.7, -1)

    def typical(node: int) -> bool:
        row = p[candidates.parents[node] + 1]
        entropy = -sum(x * math.log(x) for x in row.tolist() if x)
        return row[candidates.tokens[node]] > min(0.2, 0.4 * math.exp(-entropy))

    def likelihood(path: list[int]) -> float:
        rows = candidates.parents[path] + 1
        return float(p[rows, candidates.tokens[path]].log().sum())

    paths = [candidates.path(node) for node in range(-1, len(candidates))]
    right = [path for path in paths if all(typical(node) for node in path)]
    assert verdict.path in right
    best = max(right, key=lambda path: (len(path), likelihood(path)))
    assert len(verdict.path) == len(best)
    assert likelihood(verdict.path) == pytest.approx(likelihood(best), abs=1e-5)
    last = verdict.path[-1] if verdict.path else ROOT
    assert verdict.token == int(logits[last + 1].argmax())


def test_a_temperature_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Sampling("rejection", 0.0)
    assert Sampling("greedy", 0.0).proposal_temperature == 0.0
    assert not Sampling("typical").lossless
