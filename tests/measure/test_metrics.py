from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.measure import metrics
from compressor.measure.engines.base import RequestSample


def sample(start: float, first: float, step: float, tokens: int = 5, **extra: Any) -> RequestSample:
    times = tuple(first + step * index for index in range(tokens))
    return RequestSample("x", 10, tokens, start, first, times, **extra)


def test_latencies_of_one_request() -> None:
    row = sample(1.0, 1.5, 0.1)
    assert metrics.ttft_ms(row) == pytest.approx(500)
    assert metrics.tpot_ms(row) == pytest.approx(100)
    assert np.isnan(metrics.tpot_ms(sample(0, 1, 0.1, tokens=1)))


def test_window_is_the_union_so_parallel_requests_and_gaps_do_not_count_twice() -> None:
    assert metrics.covered_seconds([(0, 2), (1, 3), (10, 11), (1, 2)]) == pytest.approx(4)
    together = [sample(0, 1, 0.25), sample(0, 1, 0.25), sample(100, 101, 0.25)]
    assert metrics.window_seconds(together) == pytest.approx(4)
    assert metrics.throughput(together) == pytest.approx(15 / 4)
    assert metrics.prefill_rate(together) == pytest.approx(30 / 2)
    assert metrics.decode_rate(together) == pytest.approx(12 / 2)


def test_decode_rate_does_not_exist_for_single_tokens() -> None:
    assert metrics.decode_rate([sample(0, 1, 0.1, tokens=1)]) is None


def test_goodput_counts_only_requests_inside_the_goal_but_the_whole_window() -> None:
    rows = [sample(0, 0.1, 0.1), sample(1, 1.9, 0.1)]
    goal = metrics.Goal(ttft_ms=500)
    assert metrics.throughput(rows, goal) == pytest.approx(metrics.throughput(rows) / 2)
    assert metrics.throughput(rows, metrics.Goal(tpot_ms=1)) == 0


def test_percentiles() -> None:
    assert metrics.percentiles([1, 2, 3, float("nan")]) == {"p50": 2, "p90": 2.8, "p99": 2.98}
    assert metrics.percentiles([]) == {"p50": None, "p90": None, "p99": None}


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (200, 1.9719)]
)
def test_student_quantile_matches_the_tables(degrees: int, expected: float) -> None:
    assert metrics.student_quantile(0.975, degrees) == pytest.approx(expected, abs=2e-4)


def test_interval_is_that_of_student_on_the_log_scale() -> None:
    values = [1.0, 1.1, 0.95, 1.2, 1.05]
    result = metrics.bootstrap_interval(1.05, values, seed=0, resamples=40_000)
    logs = np.log(values)
    reach = 2.7764 * logs.std(ddof=1) / np.sqrt(5)
    assert result.low == pytest.approx(1.05 * np.exp(-reach), rel=0.01)
    assert result.high == pytest.approx(1.05 * np.exp(reach), rel=0.01)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        values = np.exp(rng.normal(0, 0.1, size=4))
        interval = metrics.bootstrap_interval(
            float(np.exp(np.log(values).mean())), list(values), seed=trial, resamples=400
        )
        assert interval.low is not None and interval.high is not None
        hits += interval.low <= 1 <= interval.high
    assert 0.91 <= hits / 300 <= 0.985


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 0.0]])
def test_no_interval_without_enough_rounds(values: list[float]) -> None:
    assert metrics.bootstrap_interval(1.0, values, seed=0) == metrics.Interval(1.0, None, None)


def rounds(scale: float, drift: list[float]) -> list[RequestSample]:
    return [
        sample(turn * 10, turn * 10 + scale * slow, scale * slow, round=turn)
        for turn, slow in enumerate(drift)
    ]


def test_pairing_by_round_cancels_the_drift_of_the_machine() -> None:
    drift = [0.1, 0.2, 0.15, 0.3, 0.12]
    baseline, candidate = rounds(1.0, drift), rounds(0.5, drift)
    paired = metrics.speedup_interval(baseline, candidate, seed=0)
    assert paired.value == pytest.approx(2)
    assert paired.low == pytest.approx(2) and paired.high == pytest.approx(2)
    alone = metrics.throughput_interval(candidate, seed=0)
    assert alone.low is not None and alone.low < 0.8 * alone.value


def test_noise_alone_shows_no_speedup() -> None:
    rng = np.random.default_rng(3)
    result = metrics.speedup_interval(
        rounds(1.0, list(rng.uniform(0.1, 0.3, 5))),
        rounds(1.0, list(rng.uniform(0.1, 0.3, 5))),
        seed=0,
    )
    assert result.low is not None and result.high is not None
    assert result.low < 1 < result.high


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 10)), min_size=1, max_size=12))
def test_window_lies_between_the_longest_request_and_their_sum(
    pairs: list[tuple[float, float]],
) -> None:
    spans = [(start, start + length) for start, length in pairs]
    covered = metrics.covered_seconds(spans)
    assert max(end - start for start, end in spans) - 1e-9 <= covered
    assert covered <= sum(end - start for start, end in spans) + 1e-9


def failed(start: float, end: float, tokens: int = 0) -> RequestSample:
    times = tuple(np.linspace(start, end, tokens + 1)[1:].tolist())
    first = times[0] if times else end
    return RequestSample("x", 10, tokens, start, first, times, error="HTTP 500")


def test_failures_count_in_the_error_rate_and_the_window_only() -> None:
    good = [sample(0, 1, 0.25), sample(2, 3, 0.25)]
    rows = [*good, failed(10, 12, tokens=3), failed(20, 20.5)]
    assert metrics.error_rate(rows) == 0.5 and metrics.error_rate(good) == 0
    assert np.isnan(metrics.error_rate([]))
    assert metrics.window_seconds(rows) == pytest.approx(4 + 2 + 0.5)
    assert metrics.throughput(rows) == pytest.approx(10 / 6.5)
    assert metrics.throughput(rows, metrics.Goal()) == metrics.throughput(rows)
    assert metrics.prefill_rate(rows) == metrics.prefill_rate(good)
    assert metrics.decode_rate(rows) == metrics.decode_rate(good)
    figures, without = metrics.serving_figures(rows), metrics.serving_figures(good)
    assert figures == without | {"error_rate": 0.5}
    assert not metrics.Goal().met(rows[2])


def test_nothing_but_failures() -> None:
    rows = [failed(0, 1), failed(5, 5)]
    assert metrics.throughput(rows) == 0 and metrics.prefill_rate(rows) == 0
    assert metrics.decode_rate(rows) is None
    assert metrics.serving_figures(rows)["ttft_ms"]["p50"] is None
    assert metrics.serving_figures(rows)["itl_ms"]["p99"] is None


def test_latencies_count_from_the_moment_that_was_due() -> None:
    late = sample(1.0, 1.5, 0.1, scheduled_s=0.2)
    assert metrics.ttft_ms(late) == pytest.approx(1300)
    assert metrics.end_to_end_ms(late) == pytest.approx(1700)
    assert metrics.tpot_ms(late) == pytest.approx(100)
    assert not metrics.Goal(ttft_ms=600).met(late)


def test_idle_time_of_an_open_loop_is_part_of_its_window() -> None:
    rows = [sample(0, 0.5, 0.1, scheduled_s=0.0), sample(10.1, 10.5, 0.1, scheduled_s=10.0)]
    assert metrics.window_seconds(rows) == pytest.approx(10.9)
    again = [sample(50, 50.5, 0.125, scheduled_s=50.0, round=1)]
    assert metrics.window_seconds([*rows, *again]) == pytest.approx(10.9 + 1.0)
    assert metrics.window_seconds([sample(0, 0.5, 0.1), sample(10, 10.5, 0.1)]) < 2


def test_inter_token_latencies_are_pooled() -> None:
    rows = [sample(0, 1, 0.1, tokens=3), sample(0, 1, 0.3, tokens=2), sample(0, 1, 0, tokens=1)]
    assert sorted(metrics.inter_token_ms(rows)) == pytest.approx([100, 100, 300])
    figures = metrics.serving_figures(rows)
    assert figures["itl_ms"]["p50"] == pytest.approx(100)
    assert figures["end_to_end_ms"]["p50"] == pytest.approx(1200)


def test_a_single_token_has_no_tpot_to_miss() -> None:
    assert metrics.Goal(tpot_ms=1).met(sample(0, 1, 0, tokens=1))
    assert not metrics.Goal(tpot_ms=1, ttft_ms=1).met(sample(0, 1, 0, tokens=1))
