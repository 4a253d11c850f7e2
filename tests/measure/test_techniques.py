from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.measure import metrics
from compressor.measure.engines.base import RequestSample
from compressor.measure.metrics import Interval
from compressor.measure.techniques import CLAIMS, Step, gains, place, ratio, waterfall


def exact(value: float) -> Interval:
    return Interval(value, None, None)


def test_ratio_by_hand() -> None:
    gain = ratio(Interval(200.0, 160.0, 250.0), Interval(100.0, 80.0, 125.0))
    reach = math.exp(math.sqrt(2) * math.log(1.25))
    assert gain.value == 2.0
    assert gain.low == pytest.approx(2 / reach) and gain.high == pytest.approx(2 * reach)
    assert ratio(exact(3.0), Interval(1.0, 0.9, 1.1)) == Interval(3.0, None, None)
    assert ratio(Interval(3.0, 0.0, 4.0), Interval(1.0, 0.9, 1.1)).low is None


@given(
    a=st.floats(1, 1e4), b=st.floats(1, 1e4), wide=st.floats(1.0, 2.0), narrow=st.floats(1.0, 2.0)
)
def test_ratio_holds_its_value_and_is_narrower_than_the_corners(
    a: float, b: float, wide: float, narrow: float
) -> None:
    after = Interval(a, a / wide, a * wide)
    before = Interval(b, b / narrow, b * narrow)
    gain = ratio(after, before)
    assert gain.low is not None and gain.high is not None
    assert gain.low <= gain.value * (1 + 1e-9) and gain.value <= gain.high * (1 + 1e-9)
    assert gain.low >= gain.value / wide / narrow * (1 - 1e-9)
    assert gain.high <= gain.value * wide * narrow * (1 + 1e-9)


def test_waterfall_steps_multiply_to_the_total() -> None:
    rows = waterfall(
        [
            Step("baseline", exact(100.0)),
            Step("W8A8", exact(160.0), "int8"),
            Step("W4A16", exact(176.0), "int4"),
            Step("batched", exact(880.0), "continuous-batching"),
            Step("drafted", exact(1056.0), "speculative-decoding"),
        ]
    )
    assert [row.step_gain.value for row in rows] == pytest.approx([1, 1.6, 1.1, 5.0, 1.2])
    assert rows[-1].total_gain.value == pytest.approx(10.56)
    assert math.prod(row.step_gain.value for row in rows) == pytest.approx(10.56)
    assert [row.position for row in rows] == [None, "inside", None, "inside", "below"]
    assert "no claim is on record" in rows[2].sentence
    assert "below the 2x to 3x" in rows[4].sentence and "2211.17192" in rows[4].sentence
    json.dumps([row.to_dict() for row in rows])


def test_position_is_certain_only_with_the_whole_interval() -> None:
    claim = CLAIMS["int8"]
    assert place(Interval(1.7, 1.6, 1.9), claim) == ("inside", True)
    assert place(Interval(1.7, 1.4, 1.9), claim) == ("inside", False)
    assert place(Interval(1.2, 1.1, 1.3), claim) == ("below", True)
    assert place(Interval(1.2, 1.1, 1.6), claim) == ("below", False)
    assert place(Interval(2.5, 2.2, 2.8), claim) == ("above", True)
    assert place(exact(1.7), claim) == ("inside", False)


def test_paired_gains_replace_the_independent_ratio() -> None:
    steps = [
        Step("baseline", Interval(100.0, 80.0, 125.0)),
        Step("W8A8", Interval(160.0, 128.0, 200.0), "int8"),
    ]
    alone = waterfall(steps)[1].step_gain
    paired = waterfall(steps, paired={"W8A8": Interval(1.6, 1.58, 1.62)})[1]
    assert paired.step_gain.low == 1.58 and paired.certain
    assert alone.low is not None and alone.low < 1.58


def test_every_claim_has_a_source_and_a_range() -> None:
    for name, claim in CLAIMS.items():
        assert name == claim.technique and 1 < claim.low < claim.high
        assert claim.source and claim.reported and claim.over


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [Step("a", exact(1.0)), Step("a", exact(2.0))],
        [Step("a", exact(0.0)), Step("b", exact(2.0))],
    ],
)
def test_waterfall_refuses_what_has_no_gain(steps: list[Step]) -> None:
    with pytest.raises(RecipeError):
        waterfall(steps)


POINT = (1, None)


def served(*seconds: float, tokens: int = 10) -> dict[tuple[int, None], list[RequestSample]]:
    """One request a round, of so many seconds."""
    times = [tuple(s * (i + 1) / tokens for i in range(tokens)) for s in seconds]
    return {
        POINT: [
            RequestSample(f"{turn}", 5, tokens, 100.0 * turn, row[0] + 100 * turn,
                          tuple(t + 100 * turn for t in row), round=turn)
            for turn, row in enumerate(times)
        ]
    }  # fmt: skip


def test_gains_of_samples_are_paired_by_round() -> None:
    groups = {"base": served(4.0, 8.0), "fast": served(2.0, 4.0), "slow": served(4.0, 8.0)}
    declared = [
        {"variant": "fast", "technique": "int8"}, {"variant": "slow", "technique": "my own"}
    ]  # fmt: skip
    (found,) = gains(declared, groups, baseline="base", seed=0, goal=metrics.Goal())
    first, fast, slow = found["steps"]
    assert (first["name"], first["technique"]) == ("base", "")
    assert found["concurrency"] == 1 and found["left_out"] == []
    # The machine was twice as slow in the second round; the pairs do not see it.
    assert first["throughput_tok_s"]["high"] > 2 * first["throughput_tok_s"]["low"]
    assert fast["step_gain"] == {"value": 2.0, "low": pytest.approx(2.0), "high": pytest.approx(2)}
    assert slow["step_gain"]["value"] == 0.5 and slow["total_gain"]["low"] == pytest.approx(1.0)
    assert fast["position"] == "inside" and slow["position"] is None
    json.dumps(found)


def test_the_first_step_without_a_technique_is_the_starting_point() -> None:
    groups = {"base": served(4.0, 8.0), "a": served(2.0, 2.0), "b": served(1.0, 1.0)}
    declared = [{"variant": "a", "technique": None}, {"variant": "b", "technique": "int4"}]
    (found,) = gains(declared, groups, baseline="base", seed=0, goal=metrics.Goal())
    assert [step["name"] for step in found["steps"]] == ["a", "b"]
    assert found["steps"][1]["total_gain"]["value"] == pytest.approx(2.0)


def test_steps_behind_one_without_figures_are_left_out() -> None:
    groups = {"base": served(4.0, 8.0), "b": served(1.0, 1.0)}
    declared = [{"variant": "a", "technique": "int8"}, {"variant": "b", "technique": "int4"}]
    (found,) = gains(declared, groups, baseline="base", seed=0, goal=metrics.Goal())
    assert [step["name"] for step in found["steps"]] == ["base"]
    assert found["left_out"] == ["a", "b"]
    nobody = metrics.Goal(ttft_ms=1e-9)
    (found,) = gains(declared, groups, baseline="base", seed=0, goal=nobody)
    assert found["steps"] == [] and found["left_out"] == ["base", "a", "b"]
