from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.measure import metrics
from compressor.measure.client import HttpClient
from compressor.measure.engines.base import RequestSample
from compressor.measure.load import (
    NOT_SENT,
    LoadResult,
    arrival_times,
    closed_loop,
    open_loop,
    run_load,
)
from tests.measure.servers import Answer, Script, event, good, serving


class Pretend:
    """A client without a network: each answer takes a given time, some fail."""

    def __init__(self, seconds: Sequence[float] = (0.0,), failing: Sequence[int] = ()) -> None:
        self.seconds, self.failing = seconds, set(failing)
        self.asked: list[tuple[int, int, bool]] = []
        self.active = self.most_active = 0
        self.closed = False

    async def request(
        self, prompt: Sequence[int], output_length: int, *, ignore_eos: bool = True
    ) -> RequestSample:
        number = len(self.asked)
        self.asked.append((len(prompt), output_length, ignore_eos))
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        start = time.perf_counter()
        await asyncio.sleep(self.seconds[number % len(self.seconds)])
        end = time.perf_counter()
        self.active -= 1
        error = "broken" if number in self.failing else ""
        times = () if error else (end,) * output_length
        return RequestSample("x", len(prompt), len(times), start, end, times, error=error)

    async def close(self) -> None:
        self.closed = True


def closed(client: Pretend, **options: Any) -> LoadResult:
    prompts = options.pop("prompts", [[1, 2, 3]])
    options = {"concurrency": 2, "output_lengths": 4, **options}
    return asyncio.run(closed_loop(client, prompts, **options))


def opened(client: Pretend, **options: Any) -> LoadResult:
    prompts = options.pop("prompts", [[1, 2, 3]])
    options = {"rate_per_s": 100.0, "output_lengths": 4, **options}
    return asyncio.run(open_loop(client, prompts, **options))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 25),
    st.lists(st.floats(0, 0.003), min_size=1, max_size=5),
    st.sets(st.integers(0, 24)),
)
def test_the_closed_loop_keeps_its_slots_full_and_never_more(
    concurrency: int, requests: int, seconds: list[float], failing: set[int]
) -> None:
    client = Pretend(seconds, sorted(failing))
    result = closed(client, concurrency=concurrency, requests=requests)
    assert client.most_active == min(concurrency, requests)
    assert [row.request_id for row in result.samples] == [str(i) for i in range(requests)]
    assert sum(bool(row.error) for row in result.samples) == len(
        [index for index in failing if index < requests]
    )
    assert all(row.concurrency == concurrency for row in result.samples)


def test_a_slot_goes_on_at_once() -> None:
    result = closed(Pretend([0.02]), concurrency=1, requests=5)
    rows = result.samples
    gaps = [b.start_s - a.end_s for a, b in itertools.pairwise(rows)]
    assert min(gaps) >= 0 and sorted(gaps)[2] < 0.05


def test_requests_start_until_the_time_is_over_and_are_waited_for() -> None:
    result = closed(Pretend([0.03]), concurrency=3, seconds=0.1)
    starts = [row.start_s for row in result.samples]
    assert max(starts) - min(starts) < 0.1 and len(starts) >= 3
    assert not any(row.error for row in result.samples)
    assert result.wall_s >= 0.1 and result.wall_s >= max(starts) - min(starts) + 0.03


def test_prompts_and_lengths_go_round_together() -> None:
    client = Pretend()
    prompts = [[1], [1, 2], [1, 2, 3]]
    result = closed(
        client, prompts=prompts, output_lengths=[7, 8, 9], requests=5, first=1, ignore_eos=False
    )
    assert client.asked == [
        (2, 8, False),
        (3, 9, False),
        (1, 7, False),
        (2, 8, False),
        (3, 9, False),
    ]
    assert [row.prompt for row in result.samples] == [1, 2, 0, 1, 2]


def test_a_dead_server_is_not_asked_for_ever() -> None:
    client = Pretend([0.0], range(10_000))
    result = closed(client, concurrency=4, seconds=30, give_up_after=20)
    assert 20 <= len(result.samples) <= 24


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0, "requests": 1},
        {"requests": 1, "seconds": 1.0},
        {},
        {"requests": 1, "output_lengths": [1, 2]},
        {"requests": 1, "prompts": []},
    ],
)
def test_impossible_loads_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        closed(Pretend(), **wrong)


def test_constant_arrivals() -> None:
    assert arrival_times(4, arrival="constant", requests=3) == [0, 0.25, 0.5]
    assert arrival_times(4, arrival="constant", seconds=0.6) == [0, 0.25, 0.5]
    with pytest.raises(ValueError, match="more than 0"):
        arrival_times(0, requests=3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 500), st.integers(0, 10_000))
def test_poisson_arrivals_have_the_rate_and_the_spread(rate: float, seed: int) -> None:
    times = arrival_times(rate, seed=seed, requests=2000)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert min(gaps) >= 0
    assert mean * rate == pytest.approx(1, abs=5 / 2000**0.5)  # five standard errors
    assert spread / mean == pytest.approx(1, abs=0.25)
    assert times == arrival_times(rate, seed=seed, requests=2000)


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 50), st.integers(0, 10_000))
def test_poisson_arrivals_of_a_time_end_before_it(rate: float, seed: int) -> None:
    times = arrival_times(rate, seed=seed, seconds=3)
    assert times == sorted(times) and all(0 < moment < 3 for moment in times)
    assert times == arrival_times(rate, seed=seed, requests=len(times))


def test_the_open_loop_keeps_its_schedule_while_the_server_stalls() -> None:
    client = Pretend([0.3])
    result = opened(client, rate_per_s=100, arrival="constant", requests=20)
    due = [row.scheduled_s for row in result.samples]
    assert all(moment is not None for moment in due)
    first = due[0] or 0.0
    assert due == pytest.approx([first + index / 100 for index in range(20)], abs=1e-6)
    late = [row.start_s - (row.scheduled_s or 0) for row in result.samples]
    assert min(late) >= 0 and max(late) < 1 and max(late) <= result.max_lateness_s + 0.01
    assert client.most_active > 10
    assert {row.concurrency for row in result.samples} == {0}


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["poisson", "constant"]), st.integers(0, 99), st.floats(200, 2000),
    st.lists(st.floats(0, 0.05), min_size=1, max_size=4),
)  # fmt: skip
def test_requests_are_due_as_scheduled_whatever_the_answers_do(
    arrival: Any, seed: int, rate: float, seconds: list[float]
) -> None:
    load = {"rate_per_s": rate, "arrival": arrival, "seed": seed, "requests": 15}
    result = opened(Pretend(seconds), **load)
    offsets = arrival_times(rate, arrival=arrival, seed=seed, requests=15)
    due = [row.scheduled_s or 0.0 for row in result.samples]
    assert [b - a for a, b in itertools.pairwise(due)] == pytest.approx(
        [b - a for a, b in itertools.pairwise(offsets)], abs=1e-6
    )
    assert all(row.start_s >= (row.scheduled_s or 0) for row in result.samples)


def test_a_late_generator_shows_in_the_latency() -> None:
    class Blocking(Pretend):
        async def request(self, *args: Any, **options: Any) -> RequestSample:
            time.sleep(0.05)  # stops the event loop
            return await super().request(*args, **options)

    result = opened(Blocking(), rate_per_s=1000, arrival="constant", requests=5)
    last = result.samples[-1]
    assert metrics.ttft_ms(last) > 100 > (last.first_token_s - last.start_s) * 1e3
    assert result.max_lateness_s > 0.1


def test_too_many_in_flight_are_errors_and_the_schedule_goes_on() -> None:
    result = opened(
        Pretend([0.5]), rate_per_s=200, arrival="constant", requests=10, max_in_flight=4
    )
    errors = [row.error for row in result.samples]
    assert errors[:4] == [""] * 4 and errors[4:] == [NOT_SENT] * 6
    assert result.samples[9].scheduled_s == pytest.approx(
        (result.samples[0].scheduled_s or 0) + 9 / 200, abs=1e-6
    )


def test_the_generators_own_time_is_known() -> None:
    class Busy(Pretend):
        async def request(self, *args: Any, **options: Any) -> RequestSample:
            until = time.process_time() + 0.1
            while time.process_time() < until:
                pass
            return await super().request(*args, **options)

    busy = closed(Busy(), concurrency=1, requests=1)
    idle = closed(Pretend([0.2]), concurrency=1, requests=1)
    assert busy.cpu_s >= 0.1 and busy.wall_s >= 0.1 and busy.max_lateness_s > 0.02
    assert idle.cpu_share < 0.5 and idle.wall_s >= 0.2


def test_a_client_that_breaks_is_not_hidden() -> None:
    class Broken(Pretend):
        async def request(self, *args: Any, **options: Any) -> RequestSample:
            raise RuntimeError("a bug")

    client = Broken()
    with pytest.raises(ExceptionGroup) as caught:
        run_load(
            lambda: client,
            lambda c: closed_loop(c, [[1]], concurrency=2, requests=3, output_lengths=4),
        )
    assert caught.group_contains(RuntimeError, match="a bug") and client.closed


@contextmanager
def thread_of(script: Script) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    ready, stop, found = threading.Event(), threading.Event(), []

    async def whole() -> None:
        async with serving(script) as server:
            found.append(server.url)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=asyncio.run, args=(whole(),))
    thread.start()
    ready.wait(10)
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join()


def test_load_over_http() -> None:
    with thread_of(good) as url:
        result = run_load(
            lambda: HttpClient(f"{url}/v1/completions", model="m"),
            lambda client: closed_loop(
                client, [[1, 2], [3]], concurrency=4, requests=20, output_lengths=[5, 2]
            ),
        )
    assert [row.output_tokens for row in result.samples] == [5, 2] * 10
    assert metrics.error_rate(result.samples) == 0
    assert metrics.throughput(result.samples) > 0


def test_a_server_that_stalls_does_not_hold_up_the_schedule() -> None:
    async def stalls(answer: Answer) -> None:
        await answer.head()
        await asyncio.sleep(60)

    with thread_of(stalls) as url:
        result = run_load(
            lambda: HttpClient(f"{url}/v1/completions", model="m", total_s=0.5),
            lambda client: open_loop(
                client, [[1]], rate_per_s=100, arrival="constant", requests=20, output_lengths=3
            ),
        )
    due = [row.scheduled_s or 0.0 for row in result.samples]
    assert due[-1] - due[0] == pytest.approx(0.19, abs=1e-6)
    assert {row.error for row in result.samples} == {"timeout: not done after 0.5 s"}


def test_a_server_that_fails_now_and_then_leaves_the_rest() -> None:
    turns = iter(range(1000))

    async def moody(answer: Answer) -> None:
        if next(turns) % 4 == 1:
            await answer.head()
            await answer.send(event())
            answer.die()
        else:
            await good(answer)

    with thread_of(moody) as url:
        result = run_load(
            lambda: HttpClient(f"{url}/v1/completions", model="m"),
            lambda client: closed_loop(client, [[1]], concurrency=2, requests=20, output_lengths=3),
        )
    assert metrics.error_rate(result.samples) == 0.25
    assert {row.output_tokens for row in result.samples if not row.error} == {3}
