"""In-process engine that batches statically, driven by the same clients as a continuous one.

Requests wait in a queue. When the engine is idle it takes those that wait, up to `max_batch`, and
serves them as one batch of `TransformersEngine` to the end of the longest; whoever comes meanwhile
waits, and a request that ends early leaves its place empty. This is what serving without a
scheduler does, and what continuous batching is measured against.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.measure.engines.inflight import InProcessClient, Ticket, message
from compressor.measure.engines.threads import release_workers
from compressor.measure.engines.transformers import CacheKind, Loader, TransformersEngine
from compressor.models.end_tokens import end_tokens

_STOP_SECONDS = 60.0
_STOPPED = "the engine was stopped before the request ended"


class StaticEngine:
    """Serves one batch after the other.

    A batch that fails ends its requests with an error; the next one is tried.

    Args:
        loader, dtype, cache, batches, longest: as for `TransformersEngine`.
        max_batch: most requests in a batch; more prompts of unequal length are padded.
        wait_s: how long a batch that is not full waits for more after its first request [s], as
            serving systems do; without it the first of several clients would be served alone.
    """

    name = "transformers-static"

    def __init__(
        self,
        loader: Loader,
        *,
        dtype: torch.dtype = torch.float32,
        cache: CacheKind = "dynamic",
        batches: Sequence[int] = (1,),
        longest: int = 0,
        max_batch: int = 8,
        wait_s: float = 0.005,
    ) -> None:
        if max_batch < 1:
            raise ValueError("max_batch must be at least 1")
        self._engine = TransformersEngine(
            loader, dtype=dtype, cache=cache, batches=batches, longest=longest
        )
        self._max_batch, self._wait_s = max_batch, wait_s
        self._thread: threading.Thread | None = None
        self._threads = 0
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._numbers = itertools.count()

    @property
    def model(self) -> nn.Module:
        """The loaded model; RuntimeError before `start`."""
        return self._engine.model

    def start(self) -> None:
        """Load the model and start the thread, once."""
        if self._thread is not None:
            return
        self._engine.start()
        self._stopping, self._threads = False, torch.get_num_threads()
        release_workers()
        self._thread = threading.Thread(target=self._run, name="static-batching", daemon=True)
        self._thread.start()

    def healthy(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def client(self) -> InProcessClient:
        """A client for the running event loop; RuntimeError before `start`."""
        _ = self.model
        return InProcessClient(self, self.name, self._numbers)

    def submit(self, ticket: Ticket) -> None:
        """Queue a request; it ends with an error at once when the engine does not run."""
        with self._changed:
            if self.healthy():
                self._waiting.append(ticket)
                self._changed.notify_all()
                return
        ticket.end("the engine is not running")

    def withdraw(self, ticket: Ticket) -> None:
        """Take a request out of the queue; in a batch that runs, its place is lost."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        ticket.end("withdrawn")

    def end_tokens(self) -> frozenset[int]:
        """The model's end-of-sequence tokens."""
        return end_tokens(self.model)

    def metadata(self) -> dict[str, Any]:
        """Facts about the started engine, for the report and the recomputation."""
        return {
            **self._engine.metadata(),
            "engine": self.name,
            "batching": "static",
            "max_batch": self._max_batch,
            "wait_s": self._wait_s,
            "decoding": "greedy",
        }

    def stop(self) -> None:
        """End the thread after its present step, answer what is open, drop the model."""
        thread, self._thread = self._thread, None
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if thread is not None:
            thread.join(_STOP_SECONDS)
        self._engine.stop()

    def _run(self) -> None:
        if next(self.model.parameters()).device.type == "cpu":
            torch.set_num_threads(self._threads)  # OpenMP keeps the number by thread
        batch: list[Ticket] = []
        try:
            while batch := self._next_batch():
                try:
                    self._serve(batch)
                except Exception as error:
                    self._end(batch, message(error))
        finally:
            with self._changed:
                self._stopping = True
                left = [*batch, *self._waiting]
                self._waiting.clear()
            self._end(left, _STOPPED)

    def _next_batch(self) -> list[Ticket]:
        """Wait for requests and take up to `max_batch`; empty when the engine stops."""
        with self._changed:
            if not self._waiting:  # other engines may be served meanwhile
                release_workers()
            while True:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                deadline = time.perf_counter() + self._wait_s
                while len(self._waiting) < self._max_batch and not self._stopping:
                    left = deadline - time.perf_counter()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                if self._stopping:
                    return []
                if self._waiting:  # else all of them were withdrawn
                    count = min(self._max_batch, len(self._waiting))
                    return [self._waiting.popleft() for _ in range(count)]

    def _serve(self, batch: list[Ticket]) -> None:
        """Make tokens until every request of the batch has ended."""
        open_ = len(batch)
        steps = self._engine.steps([t.prompt for t in batch], max(t.limit for t in batch))
        for tokens, moment in steps:
            for ticket, (token,) in zip(batch, tokens.tolist(), strict=True):
                if ticket.ended_s is None and ticket.add(token, moment):
                    ticket.end()
            open_ = sum(ticket.ended_s is None for ticket in batch)
            if not open_ or self._stopping:
                break
        if open_:
            self._end(batch, _STOPPED)

    @staticmethod
    def _end(tickets: list[Ticket], error: str) -> None:
        for ticket in tickets:
            ticket.end(error)
