"""Acceptance figures against vLLM's definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.speculate.acceptance import (
    Acceptance,
    Comparison,
    compare,
    histogram,
    tokens_per_step,
)
from compressor.speculate.decoding import Decoded


def test_counts_of_an_engine_are_added_up() -> None:
    found = Acceptance.total(
        [
            {
                "drafts": 40, "draft_tokens": 120, "accepted_tokens": 50,
                "accepted_by_position": [30, 15, 5],
            },
            {
                "drafts": 10, "draft_tokens": 30, "accepted_tokens": 12,
                "accepted_by_position": [6, 4, 2],
            },
        ]
    )  # fmt: skip
    assert found == Acceptance(50, 150, 62, (36, 19, 7))
    assert found.mean_length == pytest.approx(1 + 62 / 50)
    assert found.rate == pytest.approx(62 / 150)
    assert found.rates_by_position == pytest.approx([0.72, 0.38, 0.14])
    assert Acceptance.total([]) == Acceptance(0, 0, 0, ())


@st.composite
def decodings(draw: st.DrawFn) -> list[Decoded]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        depths = draw(st.lists(st.integers(0, 4), max_size=8))
        accepted = [draw(st.integers(0, depth)) for depth in depths]
        drafted = [draw(st.integers(depth, 3 * depth)) for depth in depths]
        made = sum(accepted) + len(accepted) + 1
        found.append(Decoded([7] * made, accepted, drafted, depths))
    return found


@settings(deadline=None)
@given(decodings())
def test_our_counts_are_those_that_vllm_would_make(decoded: list[Decoded]) -> None:
    # SpecDecodingStats.observe_draft of vllm/v1/spec_decode/metrics.py
    drafts, draft_tokens, accepted_tokens, per_position = 0, 0, 0, [0] * 4
    for each in decoded:
        for drafted, accepted in zip(each.drafted, each.accepted, strict=True):
            if drafted:
                drafts += 1
                draft_tokens += drafted
                accepted_tokens += accepted
                for place in range(accepted):
                    per_position[place] += 1
    found = Acceptance.of(decoded)
    assert (found.drafts, found.draft_tokens, found.accepted_tokens) == (
        drafts, draft_tokens, accepted_tokens,
    )  # fmt: skip
    padded = [*found.accepted_by_position, 0, 0, 0, 0][:4]
    assert padded == per_position
    if drafts:
        assert found.mean_length == 1 + accepted_tokens / drafts
        assert sum(found.rates_by_position) + 1 == pytest.approx(found.mean_length)
    else:
        assert math.isnan(found.mean_length)
    counts = histogram(decoded)
    steps = sum(each.steps for each in decoded)
    assert sum(counts) == steps
    if steps:
        mean = sum(i * n for i, n in enumerate(counts)) / steps + 1
        assert tokens_per_step(decoded).mean == pytest.approx(mean)
        assert tokens_per_step(decoded).steps == steps
    else:
        with pytest.raises(ValueError, match="took a step"):
            tokens_per_step(decoded)


def test_the_standard_error_is_that_of_repeated_experiments() -> None:
    random = np.random.default_rng(0)

    def experiment() -> list[Decoded]:
        found = []
        for _ in range(60):  # the steps of a sequence are alike
            rate = random.uniform(0.1, 0.9)
            accepted = random.binomial(4, rate, int(random.integers(5, 40))).tolist()
            found.append(Decoded([], accepted))
        return found

    results = [tokens_per_step(experiment()) for _ in range(400)]
    spread = float(np.std([result.mean for result in results]))
    assert np.mean([result.error for result in results]) == pytest.approx(spread, rel=0.1)
    assert math.isnan(tokens_per_step([Decoded([], [1, 2])]).error)


def test_outputs_are_compared_up_to_their_first_difference() -> None:
    plain = [
        Decoded([1, 2, 3], margins=[0.5, 0.25, 1.0]),
        Decoded([4, 5, 6], margins=[0.5, 1e-7, 1.0]),
        Decoded([7, 8], margins=[2.0, 0.5]),
    ]
    other = [Decoded([1, 2, 3]), Decoded([4, 9, 1]), Decoded([9, 9])]
    found = compare(plain, other)
    assert found == Comparison(1, (1e-7, 2.0))
    assert found.sequences == 3
    with pytest.raises(ValueError, match="the other's beginning"):
        compare(plain[:1], [Decoded([1, 2])])
