"""The load generator: requests in flight, or requests per second, against any `Client`.

*Closed loop*: a fixed number of requests is in flight; the next starts when one has ended. It finds
what a server can do, but a slow server also slows its own load down.

*Open loop*: requests are sent at times that were fixed before, whatever the answers do, as users
do. Latencies count from the time a request was due (`RequestSample.scheduled_s`), so that neither
a late generator nor a full server is hidden (coordinated omission; Schroeder, Wierman and
Harchol-Balter, "Open Versus Closed: A Cautionary Tale", NSDI 2006).

All times are of `time.perf_counter`. No request is left out of the result: what belongs to the
warm-up or to the ramps is found afterwards (`measure/steady.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compressor.measure.client import CLOCK_DIGITS
from compressor.measure.engines.base import Client, RequestSample

Arrival = Literal["poisson", "constant"]
NOT_SENT = "not sent: too many requests in flight"
_BEAT_SECONDS = 0.02


@dataclass(frozen=True)
class LoadResult:
    """What a load left, and how well the generator itself kept up.

    Attributes:
        samples: one of every request, in the order in which they were sent or due.
        wall_s: from the first request to the end of the last [s].
        cpu_s: CPU time of this process in that time, all threads [s].
        max_lateness_s: the longest that the event loop was late for a timer or a request that was
            due [s]. Latencies are trustworthy down to about this; about 1 ms is a timer's own
            grain.
    """

    samples: list[RequestSample]
    wall_s: float
    cpu_s: float
    max_lateness_s: float

    @property
    def cpu_share(self) -> float:
        """Share of one core that the generator used; near 1 it was the bottleneck itself."""
        return self.cpu_s / self.wall_s if self.wall_s > 0 else 0.0


def arrival_times(
    rate_per_s: float,
    *,
    arrival: Arrival = "poisson",
    seed: int = 0,
    requests: int | None = None,
    seconds: float | None = None,
) -> list[float]:
    """When requests are due [s], from 0: `requests` of them, or all that fall before `seconds`.

    ``constant`` has equal intervals and starts at 0. ``poisson`` has exponential intervals with the
    mean 1 / `rate_per_s`; the number in a time varies as it does for independent users.
    """
    _one_of(requests, seconds)
    if rate_per_s <= 0:
        raise ValueError("rate_per_s must be more than 0")
    if arrival == "constant":
        count = requests if requests is not None else int(np.ceil((seconds or 0) * rate_per_s))
        return [index / rate_per_s for index in range(count)]
    if arrival != "poisson":
        raise ValueError(f"arrival is poisson or constant, not {arrival!r}")
    random = np.random.default_rng(seed)
    if requests is not None:
        return np.cumsum(random.exponential(1 / rate_per_s, requests)).tolist()
    times, now = [], 0.0
    while (now := now + random.exponential(1 / rate_per_s)) < (seconds or 0):
        times.append(now)
    return times


async def closed_loop(
    client: Client,
    prompts: Sequence[Sequence[int]],
    *,
    concurrency: int,
    output_lengths: int | Sequence[int],
    requests: int | None = None,
    seconds: float | None = None,
    ignore_eos: bool = True,
    first: int = 0,
    give_up_after: int = 100,
) -> LoadResult:
    """Keep exactly `concurrency` requests in flight, until the last ones run out.

    Args:
        client: what sends a request.
        prompts: token ids; may differ in length. Request number i uses row (first + i) modulo
            their count.
        concurrency: requests in flight.
        output_lengths: tokens to make: one number, or one per row of `prompts`.
        requests: how many to send, or
        seconds: how long to start new ones; those in flight then are waited for.
        ignore_eos: go on to the full length past the end-of-sequence token.
        first: row of the first request.
        give_up_after: failures in a row, over all slots, after which no more are sent, so that a
            dead server is not asked millions of times.
    """
    _one_of(requests, seconds)
    if concurrency < 1:
        raise ValueError("concurrency must be at least 1")
    load = _Load(client, prompts, output_lengths, ignore_eos, first, concurrency)
    deadline = None if seconds is None else time.perf_counter() + seconds
    sent = failures = 0

    async def slot() -> None:
        nonlocal sent, failures
        while failures < give_up_after:
            if requests is not None and sent >= requests:
                return
            if deadline is not None and time.perf_counter() >= deadline:
                return
            number, sent = sent, sent + 1
            sample = await load.send(number)
            failures = failures + 1 if sample.error else 0

    async with _Watch() as watch, asyncio.TaskGroup() as group:
        for _ in range(concurrency if requests is None else min(concurrency, requests)):
            group.create_task(slot())
    return load.result(watch)


async def open_loop(
    client: Client,
    prompts: Sequence[Sequence[int]],
    *,
    rate_per_s: float,
    output_lengths: int | Sequence[int],
    arrival: Arrival = "poisson",
    seed: int = 0,
    requests: int | None = None,
    seconds: float | None = None,
    ignore_eos: bool = True,
    first: int = 0,
    max_in_flight: int = 512,
) -> LoadResult:
    """Send requests at the times of `arrival_times`, whatever the answers do.

    `concurrency` of a sample is 0: nobody fixed it (`steady.in_flight` finds it out).

    Args:
        max_in_flight: safety of this process (open files): a request that is due while so many are
            in flight is not sent and has the error `NOT_SENT`. The schedule goes on.

    The other arguments are those of `arrival_times` and `closed_loop`.
    """
    due = arrival_times(rate_per_s, arrival=arrival, seed=seed, requests=requests, seconds=seconds)
    load = _Load(client, prompts, output_lengths, ignore_eos, first, 0)
    in_flight: set[asyncio.Task[RequestSample]] = set()
    async with _Watch() as watch, asyncio.TaskGroup() as group:
        origin = time.perf_counter()
        for number, offset in enumerate(due):
            moment = origin + offset
            # Also without a wait the loop gets its turn, or answers would not be read.
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            watch.note(time.perf_counter() - moment)
            if len(in_flight) >= max_in_flight:
                load.skip(number, moment)
                continue
            task = group.create_task(load.send(number, moment))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)
    return load.result(watch)


def run_load(
    make_client: Callable[[], Client], load: Callable[[Client], Awaitable[LoadResult]]
) -> LoadResult:
    """Run a load from ordinary code: makes the event loop and the client, closes both.

        run_load(engine.client, lambda client: closed_loop(client, prompts, concurrency=8, ...))

    Uses uvloop where it is installed. Objects that exist already are kept out of garbage
    collection meanwhile, since one pass over those of torch stops the event loop for a while.
    """

    async def whole() -> LoadResult:
        client = make_client()
        try:
            return await load(client)
        finally:
            await client.close()

    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(whole())
    finally:
        gc.unfreeze()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _one_of(requests: int | None, seconds: float | None) -> None:
    if (requests is None) == (seconds is None):
        raise ValueError("give either requests or seconds")


class _Load:
    """Sends numbered requests and collects their samples."""

    def __init__(
        self,
        client: Client,
        prompts: Sequence[Sequence[int]],
        output_lengths: int | Sequence[int],
        ignore_eos: bool,
        first: int,
        concurrency: int,
    ) -> None:
        if not len(prompts):
            raise ValueError("there are no prompts")
        if isinstance(output_lengths, int):
            output_lengths = [output_lengths] * len(prompts)
        if len(output_lengths) != len(prompts):
            raise ValueError("output_lengths must be one number, or one per prompt")
        self._client, self._prompts, self._lengths = client, prompts, output_lengths
        self._ignore_eos, self._first, self._concurrency = ignore_eos, first, concurrency
        self._samples: dict[int, RequestSample] = {}

    def _row(self, number: int) -> int:
        return (self._first + number) % len(self._prompts)

    async def send(self, number: int, moment: float | None = None) -> RequestSample:
        """Send request `number`, due at `moment` (open loop)."""
        row = self._row(number)
        sample = await self._client.request(
            self._prompts[row], self._lengths[row], ignore_eos=self._ignore_eos
        )
        return self._keep(number, sample, moment)

    def skip(self, number: int, moment: float) -> None:
        """Note that request `number` was due and not sent."""
        now = round(time.perf_counter(), CLOCK_DIGITS)
        length = len(self._prompts[self._row(number)])
        sample = RequestSample("", length, 0, now, now, (), error=NOT_SENT)
        self._keep(number, sample, moment)

    def _keep(self, number: int, sample: RequestSample, moment: float | None) -> RequestSample:
        kept = dataclasses.replace(
            sample,
            request_id=str(number),
            prompt=self._row(number),
            asked_tokens=self._lengths[self._row(number)],
            concurrency=self._concurrency,
            scheduled_s=None if moment is None else round(moment, CLOCK_DIGITS),
        )
        self._samples[number] = kept
        return kept

    def result(self, watch: _Watch) -> LoadResult:
        """All samples in order of their numbers, with what `watch` saw."""
        samples = [self._samples[number] for number in sorted(self._samples)]
        return LoadResult(samples, watch.wall_s, watch.cpu_s, watch.max_lateness_s)


class _Watch:
    """Measures the generator itself for as long as it is entered."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = self.max_lateness_s = 0.0

    def note(self, lateness_s: float) -> None:
        """Something happened so much after it was due [s]."""
        self.max_lateness_s = max(self.max_lateness_s, lateness_s)

    async def __aenter__(self) -> _Watch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._beats = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self._wall
        self.cpu_s = time.process_time() - self._cpu
        self._beats.cancel()

    async def _beat(self) -> None:
        while True:
            due = time.perf_counter() + _BEAT_SECONDS
            await asyncio.sleep(_BEAT_SECONDS)
            self.note(time.perf_counter() - due)
