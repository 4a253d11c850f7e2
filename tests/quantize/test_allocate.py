"""The allocation against trying every combination."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.quantize.allocate import Choice, allocate

choices = st.lists(
    st.builds(Choice, st.just("W4A16"), st.integers(1, 1000), st.floats(0, 10)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(choices, min_size=1, max_size=5), share=st.floats(0, 1), by=st.booleans())
def test_no_combination_is_better(groups: list[list[Choice]], share: float, by: bool) -> None:
    def limited(c: Choice) -> float:
        return c.size if by else c.loss

    def minimised(c: Choice) -> float:
        return c.loss if by else c.size

    low = sum(min(map(limited, g)) for g in groups)
    high = sum(max(map(limited, g)) for g in groups)
    limit = low + share * (high - low)
    if limit <= 1e-9:
        return
    found = allocate(groups, **{"most_bytes" if by else "most_loss": limit})
    taken = [g[i] for g, i in zip(groups, found, strict=True)]
    assert sum(map(limited, taken)) <= limit * (1 + 1e-5)
    best = min(
        sum(map(minimised, combination))
        for combination in itertools.product(*groups)
        if sum(map(limited, combination)) <= limit
    )
    assert sum(map(minimised, taken)) <= best * (1 + 1e-4) + 1e-6


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(RunError, match="least possible is 5"):
        allocate([[Choice("W4A16", 5, 1.0), Choice("W8A16", 9, 0.1)]], most_bytes=4)
