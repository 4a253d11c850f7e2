"""What every measured engine offers, and the raw sample that it yields per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class RequestSample:
    """Raw timing of one request. All times are seconds on one monotonic clock of the run.

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

    @property
    def end_s(self) -> float:
        """The moment of the last output token [s]."""
        return self.token_times_s[-1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with the attribute names as keys."""
        return asdict(self) | {"token_times_s": list(self.token_times_s)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> RequestSample:
        """The inverse of `to_dict`; raises TypeError on a missing or surplus key."""
        return cls(**(row | {"token_times_s": tuple(row["token_times_s"])}))


class Engine(Protocol):
    """An inference engine under measurement."""

    name: str

    def start(self) -> None:
        """Load the model; after this `generate` may be called."""

    def stop(self) -> None:
        """Free the model's memory."""

    def metadata(self) -> dict[str, Any]:
        """Name, version, flags, kernel and dtype of the started engine."""

    def generate(self, prompts: Sequence[Sequence[int]], output_length: int) -> list[RequestSample]:
        """Serve all prompts at the same time; exactly `output_length` greedy tokens each."""
