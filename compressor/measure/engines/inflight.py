"""Requests in flight in an engine of this process: written by its thread, awaited by event loops.

The thread that computes tokens stamps them itself, as soon as they are on the host, so that neither
another thread's turn at the interpreter's lock nor a busy event loop is counted as the model's
time; the event loop is woken once, when a request has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compressor.measure.engines.base import RequestSample

_CLOCK_DIGITS = 7  # as in `transformers.py`


@dataclass(eq=False)
class Ticket:
    """One request.

    Attributes:
        request_id: unique in the engine.
        prompt: token ids.
        limit: the most tokens to make.
        ends: token ids after which it ends early; empty to go on past them.
        loop: where it is awaited.
        done: resolved there when it has ended, however it ended.
        tokens, times: what was made, and when [s, `time.perf_counter`].
        error: why it failed; empty when it did not.
        ended_s: when it ended [s]; None while it runs.
    """

    request_id: str
    prompt: list[int]
    limit: int
    ends: frozenset[int]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""
    ended_s: float | None = None

    def add(self, token: int, moment: float) -> bool:
        """Note a token; whether it was the last one."""
        self.tokens.append(token)
        self.times.append(moment)
        return len(self.tokens) >= self.limit or token in self.ends

    def end(self, error: str = "") -> None:
        """Wake whoever waits; the first call counts. From any thread."""
        if self.ended_s is not None:
            return
        self.ended_s, self.error = time.perf_counter(), error
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def sample(self, start_s: float) -> RequestSample:
        """What is known of it at its end."""
        times = tuple(round(moment, _CLOCK_DIGITS) for moment in self.times)
        failed = time.perf_counter() if self.ended_s is None else self.ended_s
        return RequestSample(
            request_id=self.request_id,
            prompt_tokens=len(self.prompt),
            output_tokens=len(self.tokens),
            start_s=round(start_s, _CLOCK_DIGITS),
            first_token_s=times[0] if times else round(failed, _CLOCK_DIGITS),
            token_times_s=times,
            error=self.error,
        )


class Taker(Protocol):
    """The side of an engine that its clients see."""

    def submit(self, ticket: Ticket) -> None:
        """Begin to serve; whatever is wrong with the request or the engine ends the ticket."""

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits any more."""

    def end_tokens(self) -> frozenset[int]:
        """The model's end-of-sequence tokens."""


class InProcessClient:
    """A `Client` of an engine in this process, for one event loop; see `Ticket` for its clock."""

    def __init__(self, engine: Taker, name: str, numbers: itertools.count[int]) -> None:
        self._engine, self._name, self._numbers = engine, name, numbers

    async def serve(
        self, prompt: Sequence[int], output_length: int, *, ignore_eos: bool = True
    ) -> tuple[list[int], RequestSample]:
        """The tokens and the sample of one greedy request; arguments as for `request`."""
        loop = asyncio.get_running_loop()
        ends: frozenset[int] = frozenset() if ignore_eos else self._engine.end_tokens()
        request_id = f"{self._name}-{next(self._numbers)}"
        ticket = Ticket(request_id, list(prompt), output_length, ends, loop, loop.create_future())
        start = time.perf_counter()
        if not ticket.prompt or output_length < 1:
            ticket.end("a request needs at least one prompt token and one output token")
        else:
            self._engine.submit(ticket)
        try:
            await ticket.done
        except asyncio.CancelledError:
            self._engine.withdraw(ticket)
            raise
        return ticket.tokens, ticket.sample(start)

    async def request(
        self, prompt: Sequence[int], output_length: int, *, ignore_eos: bool = True
    ) -> RequestSample:
        """Serve one prompt greedily; a failure is a sample with `error`, never raised."""
        return (await self.serve(prompt, output_length, ignore_eos=ignore_eos))[1]

    async def close(self) -> None:
        """There are no connections."""


def message(error: BaseException) -> str:
    """What to tell of an error, whose own text may be empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
