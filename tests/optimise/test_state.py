"""What trials say of candidates that were not tried."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.optimise.job import frontier
from compressor.optimise.proxies import Estimate
from compressor.optimise.record import TrialRecord
from compressor.optimise.space import Candidate
from compressor.optimise.state import LOSS_SLACK, OBJECTIVE_SLACK, SIZE_SLACK, Pooled, State
from tests.optimise.test_space import recipe, space

LISTS: dict[str, Any] = {
    "algorithms": [["rtn"], [{"rtn": {"observer": "mse"}}]],
    "schemes": ["W8A16", "W4A16", "W3A16"],
}
# What the roofline says of each scheme, and the predicted loss [nats per token].
PROXIES = {"W8A16": (200.0, 1e-4), "W4A16": (100.0, 2e-2), "W3A16": (80.0, 1e-1)}


def pooled(candidate: Candidate, **changes: Any) -> Pooled:
    objective, loss = PROXIES[candidate.scheme]
    facts = {"objective": objective, "memory_bytes": 1e9, "weight_bytes": 1e9} | changes
    return Pooled(candidate, Estimate(**facts), loss)


def trial(one: Pooled, loss: float, objective: float | None = None, why: str = "") -> TrialRecord:
    return TrialRecord(
        name=one.candidate.name,
        origin="proxies",
        choice=one.candidate.choice,
        variant=one.candidate.variant,
        reached="full" if objective is None else "measured",
        why=why,
        loss=loss,
        violation=loss / 0.01 - 1,
        objective=objective,
        baseline_objective=None if objective is None else 300.0,
    )


def partial(one: Pooled) -> Candidate:
    """The candidate with some layers left alone."""
    parsed = one.candidate.parsed.model_copy(update={"ignore": [".*down_proj"]})
    return replace(one.candidate, parsed=parsed)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(recipe(tmp_path, optimise__space=LISTS, optimise__minimise="size").optimise, 250.0)


@pytest.fixture
def pool(tmp_path: Path) -> dict[tuple[str, bool], Pooled]:
    found = space(tmp_path, **LISTS).pool
    return {(c.scheme, "mse" in str(c.variant)): pooled(c) for c in found}


def test_the_first_is_the_best_of_those_expected_to_keep_the_limit(
    state: State, pool: dict[tuple[str, bool], Pooled]
) -> None:
    assert state.promising(pool.values()).candidate.scheme == "W8A16"
    del pool["W8A16", False], pool["W8A16", True]
    assert state.promising(pool.values()).candidate.scheme == "W4A16"  # the least loss


def test_estimates_are_corrected_by_the_baseline_then_by_the_form(
    state: State, pool: dict[tuple[str, bool], Pooled]
) -> None:
    assert state.objective(pool["W4A16", False])[0] == 100.0
    first = pool["W8A16", False]
    state.add(first, trial(first, 0.001, 270.0))
    assert state.objective(pool["W4A16", False])[0] == pytest.approx(100 * 300 / 250)
    # The same codes' form: the measurement itself.
    assert state.objective(pool["W8A16", True]) == (270.0, 270.0)


def test_one_kernel_corrects_estimates_of_other_forms_too(tmp_path: Path) -> None:
    lists = {
        "algorithms": [["rtn"]],
        "schemes": ["W8A16", "W4A16"],
        "ignore": [[], [".*down_proj"]],
    }
    found = space(tmp_path, **lists).pool
    state = State(recipe(tmp_path, optimise__space=lists).optimise, 250.0)
    by = {(c.scheme, bool(c.parsed.ignore)): pooled(c) for c in found}
    first = by["W8A16", False]
    state.add(first, trial(first, 0.001, 480.0))  # twice what the baseline makes one expect
    expected, least = state.objective(by["W8A16", True])
    assert (expected, least) == (pytest.approx(480.0), pytest.approx(480.0 / SIZE_SLACK))
    assert state.objective(by["W4A16", True])[0] == pytest.approx(100 * 300 / 250)


def test_what_cannot_come_below_the_best_is_left_out(
    state: State, pool: dict[tuple[str, bool], Pooled]
) -> None:
    assert all(state.hopeless(one) == "" for one in pool.values())
    first = pool["W4A16", False]
    state.add(first, trial(first, 0.001, 110.0))
    assert "above" in state.hopeless(pool["W8A16", False])
    assert state.hopeless(pool["W3A16", False]) == ""


def test_one_of_equal_cost_is_tried_where_it_may_lose_less(
    state: State, pool: dict[tuple[str, bool], Pooled]
) -> None:
    best, other = pool["W4A16", False], pool["W4A16", True]  # it computes the same
    state.add(best, trial(best, 0.005, 110.0))
    assert state.hopeless(other) == ""  # nothing is known of its method
    # Its method is tried elsewhere.
    for loss, hopeless in ((0.004, False), (0.1, True)):
        made = State(state.options, state.baseline)
        for one, seen in ((best, 0.005), (replace(other, candidate=partial(other)), loss)):
            made.add(one, trial(one, seen, 110.0 if one is best else 200.0))
        assert ("greater loss" in made.hopeless(other)) is hopeless


def test_a_candidate_that_missed_a_limit_excludes_nothing_by_its_objective(
    state: State, pool: dict[tuple[str, bool], Pooled]
) -> None:
    first = pool["W3A16", False]
    state.add(first, trial(first, 0.3, 10.0, why="limits missed"))
    assert state.best is None
    assert state.hopeless(pool["W8A16", False]) == ""


def test_losses_are_believed_after_three_trials(
    state: State, pool: dict[tuple[str, bool], Pooled]
) -> None:
    hard = pool["W3A16", True]
    for number, key in enumerate([("W8A16", False), ("W8A16", True), ("W4A16", False)]):
        assert state.hopeless(hard) == "", number
        one = pool[key]
        # Seen is what was predicted: a factor of 1.
        state.add(one, trial(one, math.expm1(one.loss), why="limits missed"))
    assert hard.loss / LOSS_SLACK > math.log1p(0.01)
    assert state.hopeless(hard) == "predicted loss"
    assert state.loss(hard) == pytest.approx(math.expm1(0.1))


def test_algorithms_take_along_what_they_showed_in_another_scheme(tmp_path: Path) -> None:
    lists = {"algorithms": [["rtn"], ["gptq"]], "schemes": ["W8A16", "W4A16"]}
    state = State(recipe(tmp_path, optimise__space=lists).optimise, 250.0)
    by = {(c.algorithm, c.scheme): pooled(c) for c in space(tmp_path, **lists).pool}

    def seen(key: tuple[str, str], ratio: float) -> None:
        state.add(by[key], trial(by[key], math.expm1(by[key].loss * ratio), why="limits missed"))

    seen(("rtn", "W4A16"), 0.8)
    seen(("rtn", "W8A16"), 2.0)
    wanted = by["gptq", "W8A16"]
    assert state.loss(wanted) == pytest.approx(math.expm1(wanted.loss * 2.0))  # as its scheme
    seen(("gptq", "W4A16"), 0.4)  # half of what the other loses
    assert state.loss(wanted) == pytest.approx(math.expm1(wanted.loss * 1.0))


def test_limits_of_memory_and_engines_that_do_not_load(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        optimise__space=LISTS,
        optimise__subject_to={"max_loss": 0.01, "memory_gb": 2, "size_gb": 1.5},
    )
    state = State(made.optimise, 250.0)
    one = space(tmp_path, **LISTS).pool[0]
    assert state.hopeless(pooled(one)) == ""
    assert state.hopeless(pooled(one, memory_bytes=2.1e9)) == "memory"
    assert state.hopeless(pooled(one, weight_bytes=1.5e9 * OBJECTIVE_SLACK * 1.01)) == "size"
    assert "load" in state.hopeless(pooled(one, fails="no kernel"))


def test_the_frontier_has_what_none_beats_in_both(pool: dict[tuple[str, bool], Pooled]) -> None:
    ones = list(pool.values())
    figures = [(100.0, 0.02), (120.0, 0.01), (130.0, 0.015), (90.0, 0.5), (140.0, 0.001)]
    records = [
        trial(one, loss, objective) for one, (objective, loss) in zip(ones, figures, strict=False)
    ]
    names = [record.name for record in records]
    assert frontier(records) == [names[3], names[0], names[1], names[4]]
