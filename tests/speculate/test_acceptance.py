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

# As vLLM 0.32 serves them, of two engines.
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 40.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 10.0
# HELP vllm:spec_decode_num_drafts_created Number of spec decoding drafts.
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 120.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 50.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 1.2e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="1"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="2"} 2.0
vllm:generation_tokens_total{engine="0",model_name="m"} 112.0
"""


def test_vllms_counters_are_read() -> None:
    found = Acceptance.from_metrics(METRICS)
    assert found == Acceptance(50, 150, 62, (36, 19, 7))
    assert found.mean_length == pytest.approx(1 + 62 / 50)
    assert found.rate == pytest.approx(62 / 150)
    assert found.rates_by_position == pytest.approx([0.72, 0.38, 0.14])
    later = Acceptance(60, 180, 70, (41, 21, 8, 0))
    assert later - found == Acceptance(10, 30, 8, (5, 2, 1, 0))
    with pytest.raises(ValueError, match="does not speculate"):
        Acceptance.from_metrics("vllm:generation_tokens_total 3.0\n")


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
