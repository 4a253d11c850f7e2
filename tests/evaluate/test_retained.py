"""The quality table: counts and figures that are known, and what may be said of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RunError
from compressor.evaluate.retained import TaskResult, retained_quality
from compressor.evaluate.samples import TaskSample


def sample(number: int, right: bool, *, sure: float = 2.0, changed: int = 0) -> TaskSample:
    """Of a question with three choices, the first of which is right."""
    choice = 0 if right else 1 + changed
    likelihoods = [-5.0, -5.0, -5.0]
    likelihoods[choice] += sure
    return TaskSample(
        str(number), f"{number:064x}", 0, choice, tuple(likelihoods), (4, 4, 4), None,
        {"acc": float(right)},
    )  # fmt: skip


def result(rights: list[bool], *, task: str = "t", axis: str = "accuracy", **facts: float):
    made = [sample(i, bool(right), **facts) for i, right in enumerate(rights)]
    return TaskResult(task, axis, "acc", made)


def answers(broken: int, mended: int, both: int, neither: int) -> tuple[list[bool], list[bool]]:
    """(baseline's, variant's)."""
    before = [True] * broken + [False] * mended + [True] * both + [False] * neither
    after = [False] * broken + [True] * mended + [True] * both + [False] * neither
    return before, after


def rows(before, after, *, tolerance: float = 0.01, **facts):
    made = retained_quality([result(after, **facts)], [result(before)], [], [], tolerance)
    return {row["axis"]: row for row in made}


def test_a_table_of_known_flips() -> None:
    row = rows(*answers(30, 10, 500, 460), sure=2.5)["accuracy"]
    assert row["documents"] == 1000
    assert row["baseline"] == pytest.approx(0.53) and row["value"] == pytest.approx(0.51)
    assert row["loss"]["value"] == pytest.approx(0.02)
    assert row["loss"]["low"] == pytest.approx(0.02 - 1.96 * 0.0063, abs=0.002)
    assert row["retained"]["value"] == pytest.approx(0.51 / 0.53)
    assert row["retained"]["low"] < row["retained"]["value"] < row["retained"]["high"]
    flips = row["flips"]
    assert (flips["broken"], flips["mended"], flips["changed"]) == (30, 10, 40)
    assert flips["share"]["value"] == 0.04 and 0.02 < flips["share"]["low"] < 0.04
    assert row["test"] == "McNemar, exact" and row["p"] == pytest.approx(0.00222, abs=1e-4)
    assert row["finding"] == "loss"


def test_a_wrong_answer_that_turned_into_another_wrong_one_is_a_change_but_no_flip() -> None:
    before = result([False] * 50)
    after = result([False] * 50, changed=1)
    (row, calibration) = retained_quality([after], [before], [], [], 0.01)
    assert row["flips"]["changed"] == 50
    assert row["flips"]["broken"] == row["flips"]["mended"] == 0
    assert row["retained"] is None  # the baseline got nothing right
    # No document tells the two apart, so the bootstrap would call 50 documents certain.
    assert row["loss"]["high"] == pytest.approx(1 - 0.025 ** (1 / 50))
    assert row["finding"] == "not-shown" and calibration["axis"] == "calibration"


def test_no_loss_is_only_said_where_it_would_have_been_seen() -> None:
    few = rows(*answers(1, 1, 50, 48), sure=2.1)["accuracy"]
    assert few["finding"] == "not-shown" and few["visible_loss"] > 0.05
    many = rows(*answers(20, 20, 10_000, 9_960), sure=2.1)["accuracy"]
    assert many["finding"] == "no-loss" and many["visible_loss"] < 0.002
    strict = rows(*answers(20, 20, 10_000, 9_960), tolerance=0.0005, sure=2.1)["accuracy"]
    assert strict["finding"] == "not-shown"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 400), st.integers(1, 400))
def test_findings_follow_from_their_figures(broken, mended, both, neither) -> None:
    row = rows(*answers(broken, mended, both, neither), sure=2.1)["accuracy"]
    assert row["loss"]["value"] == pytest.approx(
        (broken - mended) / (broken + mended + both + neither)
    )
    worse, p, visible = row["loss"]["value"] > 0, row["p"], row["visible_loss"]
    if row["finding"] == "loss":
        assert worse and p < 0.05
    elif row["finding"] == "gain":
        assert not worse and row["p_holm"] < 0.05
    else:
        assert not (worse and p < 0.05)
        small = visible is not None and visible <= 0.01
        assert row["finding"] == ("no-loss" if small else "not-shown")


def test_the_baseline_again_is_equal_everywhere() -> None:
    before, _ = answers(10, 0, 40, 30)
    made = rows(before, before)
    assert set(made) == {"accuracy", "calibration"}
    for row in made.values():
        assert row["finding"] == "equal" and row["p"] == 1.0
        assert row["loss"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert made["accuracy"]["flips"] == {
        "broken": 0, "mended": 0, "changed": 0, "share": {"value": 0.0, "low": 0.0, "high": 0.0},
    }  # fmt: skip


def test_equal_answers_at_other_likelihoods_are_not_called_equal() -> None:
    before, _ = answers(0, 0, 40, 30)
    assert rows(before, before, sure=2.5)["accuracy"]["finding"] == "not-shown"


def test_an_axis_of_several_tasks_counts_documents_and_shows_each_task() -> None:
    own = [
        result([True] * 30, task="a"),
        result([False] * 10, task="b"),
        result([True] * 5, task="c", axis="language:de"),
    ]
    base = [
        result([True] * 30, task="a"),
        result([True] * 10, task="b"),
        result([True] * 5, task="c", axis="language:de"),
    ]
    made = retained_quality(own, base, [], [], 0.01)
    assert [(row["axis"], row["task"], row["overall"]) for row in made] == [
        ("accuracy", None, True),
        ("accuracy", "a", False),
        ("accuracy", "b", False),
        ("language:de", "c", True),
        ("calibration", None, True),
    ]
    assert made[0]["value"] == 0.75 and made[0]["finding"] == "loss"
    assert made[1]["p_holm"] is None and made[0]["p_holm"] >= made[0]["p"]


def test_a_gain_must_survive_the_number_of_tests() -> None:
    before, after = answers(5, 17, 400, 300)  # p = 0.017
    own = [result(after, task=name, axis=f"language:{name}") for name in "abcd"]
    base = [result(before, task=name, axis=f"language:{name}") for name in "abcd"]
    own[1:] = base[1:]
    one = retained_quality(own[:1], base[:1], [], [], 0.01)[0]
    four = retained_quality(own, base, [], [], 0.01)[0]
    assert one["finding"] == "gain" and four["finding"] != "gain"
    lost = retained_quality(base, own, [], [], 0.01)[0]  # a loss of that size is not let off
    assert lost["finding"] == "loss" and lost["p_holm"] > 0.05


def test_scores_between_right_and_wrong_are_tested_by_the_bootstrap() -> None:
    rng = np.random.default_rng(0)

    def scored(values):
        made = [
            TaskSample(str(i), "", None, None, None, None, "text", {"f1": float(v)})
            for i, v in enumerate(values)
        ]
        return TaskResult("t", "accuracy", "f1", made)

    values = rng.uniform(0.2, 1, 300)
    worse = np.clip(values - rng.uniform(0, 0.1, 300), 0, 1)
    (row,) = retained_quality([scored(worse)], [scored(values)], [], [], 0.01)
    assert row["test"] == "bootstrap" and row["flips"] is None and row["finding"] == "loss"
    assert row["loss"]["low"] < values.mean() - worse.mean() < row["loss"]["high"]


def test_perplexity_rows_are_those_of_the_texts() -> None:
    text = {
        "text": "novel", "windows": 20, "perplexity": 11.0, "perplexity_change": 0.1,
        "perplexity_ci": [0.08, 0.12], "change_p": 0.001, "visible_change": 0.02, "kl_mean": 0.1,
    }  # fmt: skip
    (row,) = retained_quality([], [], [text], [{"text": "novel", "perplexity": 10.0}], 0.01)
    assert row["retained"]["value"] == pytest.approx(1 / 1.1)
    assert row["retained"]["low"] == pytest.approx(1 / 1.12)
    assert row["finding"] == "loss" and row["baseline"] == 10.0
    null = text | {
        "perplexity_change": 0.0, "perplexity_ci": [0.0, 0.0], "change_p": 1.0, "kl_mean": 0.0,
    }  # fmt: skip
    (row,) = retained_quality([], [], [null], [{"text": "novel", "perplexity": 11.0}], 0.01)
    assert row["finding"] == "equal"


def test_other_documents_are_refused() -> None:
    own, base = result([True] * 4), result([True] * 5)
    with pytest.raises(RunError, match="not asked the same documents"):
        retained_quality([own], [base], [], [], 0.01)
    with pytest.raises(RunError, match="no such task"):
        retained_quality([own], [], [], [], 0.01)
    other = dataclasses.replace(own, metric="f1")
    with pytest.raises(RunError, match="no score 'f1'"):
        retained_quality([other], [own], [], [], 0.01)
