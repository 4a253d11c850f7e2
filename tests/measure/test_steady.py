from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.measure import steady
from compressor.measure.engines.base import RequestSample


def request(
    start: float, first: float, step: float, tokens: int = 5, error: str = ""
) -> RequestSample:
    times = tuple(first + step * index for index in range(tokens))
    return RequestSample("x", 10, tokens, start, first, times, error=error)


def closed(
    slots: int, requests: int, *, seed: int = 0, slow: float = 1.0, drift: float = 0.0
) -> list[RequestSample]:
    """A closed loop of requests of about 1 s: the first of every slot takes `slow` times as long,
    and each later one `drift` more per second."""
    random = np.random.default_rng(seed)
    free = np.zeros(slots)
    rows = []
    for number in range(requests):
        slot = int(free.argmin())
        start = float(free[slot])
        length = random.uniform(0.8, 1.2) * (slow if number < slots else 1.0) * (1 + drift * start)
        rows.append(request(start, start + length / 5, length / 5))
        free[slot] = rows[-1].end_s
    return rows


def test_bounds_of_a_closed_loop() -> None:
    rows = [request(0, 1, 0.5), request(0.5, 1, 0.25), request(2.0, 3, 0.5), request(3.0, 4, 0.5)]
    assert steady.busy_bounds(rows, concurrency=2) == (2.0, 3.0)
    assert steady.busy_bounds(rows) == (2.0, 3.0)
    assert steady.busy_bounds(rows, concurrency=2, warm_up=3) == (3.0, 3.0)
    assert steady.busy_bounds(rows, concurrency=9)[0] == np.inf
    with pytest.raises(ValueError, match="no samples"):
        steady.busy_bounds([])


def test_a_failure_does_not_end_the_ramp_up() -> None:
    rows = [request(0, 0.1, 0, tokens=0, error="x"), request(0, 1, 0.5), request(5, 6, 0.5)]
    assert steady.busy_bounds(rows)[0] == 3.0


def test_in_flight() -> None:
    rows = [
        request(0, 1, 0.5, tokens=3),
        request(2, 3, 0.5, tokens=3),
        request(2.5, 3, 0, tokens=1),
    ]
    assert steady.in_flight(rows) == [(0, 1), (2.0, 0), (2, 1), (2.5, 2), (3.0, 1), (4.0, 0)]


def test_a_closed_loop_is_steady_after_its_ramp() -> None:
    window = steady.find_window(closed(8, 400), concurrency=8)
    assert window.steady and window.reason == ""
    rows = closed(8, 400)
    first_end = min(row.end_s for row in rows)
    assert first_end <= window.start_s < window.end_s == max(row.start_s for row in rows)
    assert steady.token_rate(rows, window) == pytest.approx(8 * 5 / 1.0, rel=0.05)


def test_a_transient_is_cut_off_and_half_is_the_most() -> None:
    slow = closed(8, 400, slow=8)
    window = steady.find_window(slow, concurrency=8)
    assert window.start_s >= min(row.end_s for row in slow)
    assert steady.token_rate(slow, window) == pytest.approx(8 * 5 / 1.0, rel=0.05)


def test_a_load_that_slows_down_is_not_steady() -> None:
    window = steady.find_window(closed(8, 400, drift=0.02), concurrency=8)
    assert not window.steady and "output rate changed by -" in window.reason
    assert window.rate is not None and window.rate.matters


def test_a_queue_that_grows_is_not_steady() -> None:
    """An open loop at twice the rate of a server that serves one request in 0.1 s."""
    rows, free = [], 0.0
    for number in range(200):
        start = number * 0.05
        begin = max(free, start)
        rows.append(request(start, begin + 0.02, 0.02))
        free = begin + 0.1
    window = steady.find_window(rows)
    assert not window.steady and "time to first token changed by +" in window.reason


@pytest.mark.parametrize(("slots", "count"), [(8, 8), (8, 4), (4, 9)])
def test_too_few_requests_are_said_to_be_so(slots: int, count: int) -> None:
    rows = closed(slots, count)
    window = steady.find_window(rows, concurrency=slots)
    assert not window.steady and window.reason.startswith("too few requests")
    assert window.seconds > 0


def test_noise_alone_is_steady_nearly_always() -> None:
    found = [steady.find_window(closed(4, 200, seed=seed), concurrency=4) for seed in range(40)]
    assert sum(window.steady for window in found) >= 39


def test_latencies_are_of_requests_that_start_in_the_window_and_tokens_by_their_time() -> None:
    rows = [request(0, 1, 1), request(2, 3, 1), request(5, 6, 1, error="x"), request(9, 10, 1)]
    window = steady.Window(2, 6, steady=True)
    assert steady.started_in(rows, window) == rows[1:3]
    assert steady.token_rate(rows, window) == pytest.approx((4 + 3) / 4)  # 2 3 4 5 and 3 4 5
    assert steady.token_rate(rows, steady.Window(6, 6, steady=True)) == 0


def test_mser_finds_the_end_of_a_transient() -> None:
    random = np.random.default_rng(0)
    values = random.normal(1.0, 0.05, 100)
    values[:20] += np.linspace(3, 0.5, 20)
    assert 18 <= steady.mser(values) <= 26
    assert steady.mser([1.0] * 10) == 0 and steady.mser([]) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), max_size=40))
def test_mser_drops_half_at_most(values: list[float]) -> None:
    assert 0 <= steady.mser(values) <= len(values) // 2


def test_batch_means() -> None:
    assert steady.batch_means([1, 3, 5, 7, 100], 2).tolist() == [2, 6]


def test_trend_agrees_with_the_textbook() -> None:
    """Mann-Kendall against scipy's exact tau on data without ties; Theil-Sen on a line."""
    from scipy.stats import kendalltau

    line = steady.trend(np.linspace(1, 2, 20))
    assert line.change == pytest.approx(1 / 1.5) and line.p_value < 1e-6 and line.matters
    random = np.random.default_rng(2)
    for _ in range(20):
        values = random.normal(10, 1, 20)
        expected = kendalltau(np.arange(20), values, method="exact").pvalue
        assert steady.trend(values).p_value == pytest.approx(expected, abs=0.03)


def test_no_trend_in_few_or_equal_values() -> None:
    assert steady.trend([1, 2, 3]).p_value == 1
    assert steady.trend([5.0] * 20).p_value == 1
    assert steady.trend([]) == steady.Trend(0.0, 1.0)
