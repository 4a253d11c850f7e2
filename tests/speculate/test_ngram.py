"""Prompt lookup against its definition, and as a proposer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.speculate.decoding import speculative_decode
from compressor.speculate.ngram import NgramProposer, continuation
from compressor.speculate.proposer import States
from tests.speculate.decoders import target


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 6),
)
def test_the_longest_match_is_taken_and_of_several_the_earliest(
    tokens: list[int], shortest: int, more: int, count: int
) -> None:
    found = continuation(np.array(tokens), shortest, shortest + more, count).tolist()
    matches = [
        (-size, start)
        for size in range(shortest, shortest + more + 1)
        for start in range(len(tokens) - size)
        if tokens[start : start + size] == tokens[len(tokens) - size :]
    ]
    if not matches:
        assert found == []
        return
    size, start = min(matches)
    after = start - size
    assert found == tokens[after : after + count]


def states(tokens: list[int]) -> States:
    return States(torch.tensor(tokens), torch.zeros(len(tokens), 1))


def test_rows_keep_their_own_texts() -> None:
    proposer = NgramProposer(2, 3)
    proposer.start([states([5, 6, 7, 5]), states([1, 2]), states([8, 9, 8])])
    assert [each.tokens.tolist() for each in proposer.propose([6, 3, 9], 2)] == [[7, 5], [], [8, 9]]
    proposer.drop([1])
    proposer.accept([states([6, 7]), states([9])])
    assert [each.tokens.tolist() for each in proposer.propose([5, 1], 4)] == [[6, 7, 5], []]


def test_a_text_longer_than_its_buffer(tmp_path: Path) -> None:
    cached = target(tmp_path / "model")
    text = [11, 12, 13, 14] * 80
    alone = speculative_decode(cached, None, [text], output_length=40)
    found = speculative_decode(cached, NgramProposer(), [text], output_length=40)
    assert found[0].tokens == alone[0].tokens
    assert found[0].drafted[0] >= 0


def test_bounds_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="shortest <= longest"):
        NgramProposer(3, 2)
    with pytest.raises(ValueError, match="shortest <= longest"):
        NgramProposer(0, 2)
