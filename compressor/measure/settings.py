"""The declared load and engine of a measurement, as the recipe's ``measure`` section has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from compressor.errors import RecipeError
from compressor.export.options import NOT_MEASURED
from compressor.measure import metrics
from compressor.measure.load import Arrival
from compressor.measure.workload import output_lengths

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ENGINES = ("transformers", "vllm", "llama.cpp", "endpoint")
Batching = Literal["continuous", "static"]
PARTS = ("prefill", "decode")
DECODE_PROMPT = 16  # tokens


@dataclass(frozen=True)
class MeasureSettings:
    """The declared load.

    Attributes:
        engine: what serves.
        batching: of the transformers engine.
        dtype: ``auto`` takes the fastest that the engine offers for each variant.
        flags, variables: further arguments and environment of a server.
        program: the server's interpreter or binary; found where it is None.
        start_timeout_s: how long a server may take to become healthy [s].
        endpoints: for engine ``endpoint``, by variant: url, model, key_variable, chat and list
            prices.
        input_length: tokens of every prompt; None leaves prompts as long as they are.
        chat_template: wrap every prompt in the model's chat template.
        output_length: tokens of every answer, or the most with `ignore_eos` false.
        output_length_range: lowest and highest, where each prompt has a length of its own.
        ignore_eos: go on past the end-of-sequence token, so that all variants do equal work.
        concurrency: points of the closed loop: requests in flight.
        rate_per_s: points of the open loop: requests that arrive per second, after `arrival`.
        requests: requests per point and variant over all rounds; rounded up to as many for every
            slot in each round.
        rounds: how often the variants take turns; the confidence intervals rest on rounds.
        split: measure prompts and answers alone too, beside every point of the closed loop.
        prices: overrides of the price table, see `prices.resolve_prices`.
        keep_loaded: None keeps all engines in memory when they fit, else starts one at a time.
        ttft_ms, tpot_ms: service level objective [ms]; only requests inside it count as goodput.
        serve: by variant, what stands in for batching, dtype, flags and variables; see `of`.
        waterfall: ``{"variant", "technique"}`` of each step; see `techniques.gains`.
    """

    engine: str = "transformers"
    batching: Batching = "continuous"
    dtype: str = "auto"
    flags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    program: str | None = None
    start_timeout_s: float = 600.0
    endpoints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    input_length: int | None = 128
    chat_template: bool = False
    output_length: int = 64
    output_length_range: tuple[int, int] | None = None
    ignore_eos: bool = True
    concurrency: tuple[int, ...] = (1, 4)
    rate_per_s: tuple[float, ...] = ()
    arrival: Arrival = "poisson"
    requests: int = 8
    rounds: int = 5
    seed: int = 0
    split: bool = False
    prompts: str = "prompts"
    prices: Mapping[str, Any] = field(default_factory=dict)
    keep_loaded: bool | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    serve: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    waterfall: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Sort the sweep; raise RecipeError for a load that cannot be run."""
        object.__setattr__(self, "concurrency", tuple(sorted(set(self.concurrency))))
        object.__setattr__(self, "rate_per_s", tuple(sorted(set(self.rate_per_s))))
        counts = [self.output_length, self.requests, self.rounds, *self.concurrency]
        if self.input_length is not None:
            counts.append(self.input_length)
        if min(counts) < 1:
            raise RecipeError(
                "lengths, requests, rounds and concurrency must all be at least 1",
                where="measure.workload",
                fix="for example input_length: 128, output_length: 64, concurrency: [1, 4]",
            )
        if not self.concurrency and not self.rate_per_s:
            raise RecipeError(
                "there is no point to measure",
                where="measure.workload.concurrency",
                fix="give concurrency: [1, 4], or rate_per_s: [2]",
            )
        if any(rate <= 0 for rate in self.rate_per_s):
            raise RecipeError(
                "requests per second must be more than 0",
                where="measure.workload.rate_per_s",
                fix="for example rate_per_s: [0.5, 1, 2]",
            )
        if min([self.output_length, *(self.output_length_range or ())]) < 2:
            raise RecipeError(
                "output_length must be at least 2, else there is no time per output token",
                where="measure.workload.output_length",
                fix="for example 64",
            )
        if self.engine not in ENGINES:
            raise RecipeError(
                f"engine {self.engine!r} is not known",
                where="measure.engine",
                fix=f"use one of {', '.join(ENGINES)}",
            )
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise RecipeError(
                f"dtype {self.dtype!r} is not known",
                where="measure.dtype",
                fix=f"use auto, {', '.join(DTYPES)}",
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MeasureSettings:
        """Settings from the recipe's ``measure`` section as a plain dict; absent keys default.

        ``workload.slo`` may hold ``ttft_ms`` and ``tpot_ms``.
        """
        load = dict(config.get("workload") or {})
        load |= {key: value for key, value in config.items() if key not in ("workload", "prices")}
        load |= load.pop("slo", None) or {}
        names = {item.name for item in dataclasses.fields(cls)}
        values = {key: value for key, value in load.items() if key in names and value is not None}
        if load.get("input_length", 0) is None:
            values["input_length"] = None
        for key in ("concurrency", "rate_per_s", "flags", "output_length_range", "waterfall"):
            if key in values:
                values[key] = tuple(values[key])
        return cls(**values, prices=dict(config.get("prices") or {}))

    def of(self, variant: str) -> MeasureSettings:
        """The settings with those of its own that a variant is served by."""
        own = dict(self.serve.get(variant, {}))
        if "flags" in own:
            own["flags"] = tuple(own["flags"])
        return dataclasses.replace(self, **own)

    def serving(self, variant: str) -> dict[str, Any]:
        """How a variant is served, as the record has it; ``batching`` of transformers alone."""
        own = self.of(variant)
        return {
            "batching": own.batching if own.engine == "transformers" else None,
            "dtype": own.dtype,
            "flags": list(own.flags),
            "variables": dict(own.variables),
        }

    def output_lengths(self, prompts: int) -> list[int]:
        """Tokens to ask for with each of so many prompts, in their order."""
        if self.output_length_range is None:
            return [self.output_length] * prompts
        return output_lengths(self.output_length_range, prompts, self.seed)

    @property
    def longest_output(self) -> int:
        """The most tokens of an answer."""
        return max(self.output_length_range or (self.output_length,))

    @property
    def points(self) -> list[Point]:
        """The sweep: closed loops, each with its parts where they are asked for, then open ones."""
        parts = ("", *PARTS) if self.split else ("",)
        closed = [Point(size, part=part) for size in self.concurrency for part in parts]
        return closed + [Point(rate_per_s=rate) for rate in self.rate_per_s]

    def per_round(self, point: Point) -> int:
        """Requests that one variant serves at a point in each round."""
        slots = point.concurrency or 1
        return math.ceil(self.requests / (self.rounds * slots)) * slots

    def served(self, point: Point) -> int:
        """Requests that one variant really serves at a point of the sweep."""
        return self.per_round(point) * self.rounds

    @property
    def goal(self) -> metrics.Goal:
        """The service level objective."""
        return metrics.Goal(self.ttft_ms, self.tpot_ms)


def serves(engine: str, fmt: str) -> bool:
    """Whether an engine serves artifacts of a format."""
    if fmt in NOT_MEASURED or engine == "endpoint":
        return False
    return (fmt == "gguf") == (engine == "llama.cpp")


@dataclass(frozen=True)
class Point:
    """A point of the sweep: so many requests in flight, or so many arriving per second.

    Attributes:
        part: ``prefill`` has the load's prompts with one output token each, ``decode`` their first
            `DECODE_PROMPT` tokens with whole answers; empty is the load itself.
    """

    concurrency: int = 0
    rate_per_s: float | None = None
    part: str = ""

    @property
    def name(self) -> str:
        """As it stands in the ids of requests: ``c4``, ``q2.5``, or ``c4-prefill``."""
        load = f"c{self.concurrency}" if self.rate_per_s is None else f"q{self.rate_per_s:g}"
        return f"{load}-{self.part}" if self.part else load

    def prompt_length(self, whole: int) -> int:
        """Tokens of a prompt that are sent, of so many."""
        return min(whole, DECODE_PROMPT) if self.part == "decode" else whole

    def output_lengths(self, whole: Sequence[int]) -> list[int]:
        """Tokens that are asked for with each prompt, instead of so many."""
        return [1] * len(whole) if self.part == "prefill" else list(whole)
