"""Documents of the built-in tasks, and what disturbing them does and leaves alone."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.evaluate.documents import SHORTEST, reordered, safety, social_iqa, with_typos


def test_disturbed_documents_are_the_same_each_time_and_differ_by_seed() -> None:
    plain = list(social_iqa()["test"])
    assert len(plain) == 2224 and {row["label"] for row in plain} == {0, 1, 2}
    typos, again = (list(social_iqa(typo_rate=0.2, seed=0)["test"]) for _ in range(2))
    assert typos == again != plain
    assert typos != list(social_iqa(typo_rate=0.2, seed=1)["test"])
    assert [(r["choices"], r["label"]) for r in typos] == [
        (r["choices"], r["label"]) for r in plain
    ]
    changed = total = 0
    for before, after in zip(plain, typos, strict=True):
        for key in ("context", "question"):
            old, new = before[key].split(" "), after[key].split(" ")
            assert len(old) == len(new)
            for word, other in zip(old, new, strict=True):
                long = sum(letter.isalpha() for letter in word) >= SHORTEST
                assert long or word == other
                total, changed = total + long, changed + (word != other)
    assert 0.19 < changed / total < 0.21  # the declared rate


def test_shuffled_choices_keep_the_right_answer_and_no_order_stays() -> None:
    plain, shuffled = list(social_iqa()["test"]), list(social_iqa(shuffled=True)["test"])
    places = [0, 0, 0]
    for before, after in zip(plain, shuffled, strict=True):
        assert before["context"] == after["context"]
        assert sorted(before["choices"]) == sorted(after["choices"])
        assert before["choices"][before["label"]] == after["choices"][after["label"]]
        places[after["label"]] += 1
    assert sum(b["choices"] != a["choices"] for b, a in zip(plain, shuffled, strict=True)) > 2200
    assert min(places) > 600


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True), st.integers())
def test_any_choices_are_reordered_and_the_label_follows(choices: list[str], seed: int) -> None:
    label = seed % len(choices)
    made, place = reordered(choices, label, random.Random(seed))
    assert sorted(made) == sorted(choices) and made != choices
    assert made[place] == choices[label]


@settings(deadline=None)
@given(st.text(), st.floats(0, 1), st.integers())
def test_typos_keep_words_apart_and_first_letters(text: str, rate: float, seed: int) -> None:
    made = with_typos(text, rate, random.Random(seed))
    assert made == with_typos(text, rate, random.Random(seed))
    old, new = text.split(" "), made.split(" ")
    assert len(old) == len(new)
    for word, other in zip(old, new, strict=True):
        assert word[:1] == other[:1] and abs(len(word) - len(other)) <= 1
    assert with_typos(text, 0.0, random.Random(seed)) == text


def test_safety_prompts_are_forty_of_each_kind_and_none_twice() -> None:
    rows = [row for kind in ("harmful", "harmless") for row in safety(kind=kind)["test"]]
    assert [row["expected"] for row in rows] == ["refused"] * 40 + ["answered"] * 40
    assert len({row["prompt"] for row in rows}) == 80
