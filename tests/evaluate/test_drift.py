"""Where two continuations part."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.evaluate.drift import (
    Continuation,
    first_difference,
    read_continuations,
    summarise_drift,
    until_end,
    write_continuations,
)

_TOKENS = st.lists(st.integers(0, 3), max_size=8)


@given(_TOKENS, _TOKENS)
def test_first_difference_is_behind_the_longest_common_beginning(a, b) -> None:
    place = first_difference(a, b)
    assert place == first_difference(b, a)
    if place is None:
        assert a == b
    else:
        assert a[:place] == b[:place] and a[: place + 1] != b[: place + 1]


def test_answers_end_with_their_end_token() -> None:
    assert until_end([5, 2, 7, 2], {2}) == [5, 2]
    assert until_end([5, 7], {2}) == [5, 7]
    assert until_end([5, 7], ()) == [5, 7]


def rows(*tokens: list[int]) -> list[Continuation]:
    return [Continuation("p", each, "") for each in tokens]


def test_figures_of_known_continuations() -> None:
    base = rows([1, 1, 1, 1], [1, 1, 1, 1], [1, 2], [1, 1, 1, 1])
    own = rows([1, 1, 1, 1], [9, 1, 1, 1], [1, 2], [1, 1, 1, 9])
    made = summarise_drift(own, base, 4)
    assert made["first_difference"] == [None, 0, None, 3]
    assert made["equal"] == 2 and made["prompts"] == 4
    assert made["median_first_difference"] == 3.5
    shares = {row["tokens"]: row["share"] for row in made["equal_after"]}
    assert shares == {1: 0.75, 2: 0.75, 4: 0.5}


def test_continuations_survive_the_file(tmp_path: Path) -> None:
    made = [Continuation("a\u2028b", [1], "line\nline"), Continuation("", [], "é")]
    write_continuations(made, tmp_path / "d.jsonl")
    assert read_continuations(tmp_path / "d.jsonl") == made
    (tmp_path / "d.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(RunError, match="cannot be read"):
        read_continuations(tmp_path / "d.jsonl")
