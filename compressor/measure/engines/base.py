"""What every measured engine offers, and the raw sample that it yields per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class RequestSample:
    """Raw timing of one request. All times are seconds on one monotonic clock of the run.

    A request that failed has an `error` and the tokens that came before it, perhaps none;
    `first_token_s` is then the moment of the failure.

    Attributes:
        request_id: unique in the run.
        prompt_tokens: prompt length [tokens].
        output_tokens: tokens produced [tokens].
        start_s: the moment the request was handed to the engine.
        first_token_s: the moment the first output token was known to the caller.
        token_times_s: the moment of every output token, the first included.
        concurrency: requests in flight at the same time.
        round: round of the interleaved schedule, from 0.
        variant: the measured variant's name.
        prompt: which of the workload's prompts it was (its row).
        scheduled_s: open loop: the moment it was due. Latencies count from here, so that a
            generator or server that falls behind cannot hide it (coordinated omission).
        error: why it failed; empty when it did not.
        rate_per_s: open loop: declared arrivals per second.
        asked_tokens: the most output tokens that were asked for; None where nobody noted it.
        part: of a request that is served for the split of costs alone: ``prefill`` or ``decode``.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    start_s: float
    first_token_s: float
    token_times_s: tuple[float, ...]
    concurrency: int = 1
    round: int = 0
    variant: str = ""
    prompt: int = 0
    scheduled_s: float | None = None
    error: str = ""
    rate_per_s: float | None = None
    asked_tokens: int | None = None
    part: str = ""

    @property
    def end_s(self) -> float:
        """The moment of the last output token, or of the failure [s]."""
        return self.token_times_s[-1] if self.token_times_s else self.first_token_s

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with the attribute names as keys."""
        return asdict(self) | {"token_times_s": list(self.token_times_s)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> RequestSample:
        """The inverse of `to_dict`; raises TypeError on a missing or surplus key."""
        return cls(**(row | {"token_times_s": tuple(row["token_times_s"])}))


class Client(Protocol):
    """Sends one request at a time per call, many at once, and takes the time of every token.

    What the load generator (`measure/load.py`) drives: over HTTP, or straight into a model of this
    process.
    """

    async def request(
        self, prompt: Sequence[int], output_length: int, *, ignore_eos: bool = True
    ) -> RequestSample:
        """Serve one prompt greedily, streaming; a failure is a sample with `error`, never raised.

        Args:
            prompt: token ids.
            output_length: the most tokens to make; exactly as many with `ignore_eos`.
            ignore_eos: go on past the end-of-sequence token, so that all variants do equal work.
        """

    async def close(self) -> None:
        """Free connections."""


class ServedEngine(Protocol):
    """An engine that takes requests as they come: a process, an address, or a model in here."""

    name: str

    def start(self) -> None:
        """Start and wait until healthy; RunError with the tail of the log when that fails."""

    def healthy(self) -> bool:
        """Whether it answers now."""

    def client(self) -> Client:
        """A new client, for the event loop that is running."""

    def metadata(self) -> dict[str, Any]:
        """Name, version, flags, command, address, kernel and dtype of the started engine."""

    def stop(self) -> None:
        """End it and free its memory; does nothing when it is not running."""
