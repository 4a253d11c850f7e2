"""Pure functions from raw request samples to figures: latency, throughput, intervals.

Definitions:
    due  the moment from which a request's latencies count: scheduled_s in an open loop, else
        start_s.
    TTFT  time to first token: first_token_s - due [ms].
    TPOT  time per output token after the first: (end_s - first_token_s) / (output_tokens - 1) [ms].
    ITL  inter-token latency: from one token to the next of a request, pooled over requests [ms].
        Tokens that came together are 0 apart, so the mean over a request is its TPOT.
    end to end  end_s - due [ms].
    window  total length of the union of the requests' [start_s, end_s] intervals [s]: the time in
        which at least one request was in flight; idle time between batches does not count. In an
        open loop, where idle time is part of the load, each round counts from the first moment due
        to the last end.
    throughput  output tokens / window [tok/s]: prefill is inside the window.

A request that failed has no latency, meets no goal, and its tokens do not count; the time that it
took is in the window, since the server spent it. It counts in the error rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from compressor.measure.engines.base import RequestSample

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval; `low` and `high` are None if there is none."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """``{"value", "low", "high"}``."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor` times the figure, `factor` > 0."""
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Interval(self.value * factor, low, high)


@dataclass(frozen=True)
class Goal:
    """Service level objective: limits on TTFT and TPOT [ms]; None means no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met(self, sample: RequestSample) -> bool:
        """Whether the request was answered within both limits; a single token has no TPOT."""
        if sample.error:
            return False
        ttft_ok = self.ttft_ms is None or ttft_ms(sample) <= self.ttft_ms
        no_tpot = self.tpot_ms is None or sample.output_tokens < 2
        return ttft_ok and (no_tpot or tpot_ms(sample) <= (self.tpot_ms or 0.0))


def due_s(sample: RequestSample) -> float:
    """The moment from which latencies count [s]."""
    return sample.start_s if sample.scheduled_s is None else sample.scheduled_s


def ttft_ms(sample: RequestSample) -> float:
    """Time to first token [ms]; NaN when the request failed."""
    return math.nan if sample.error else (sample.first_token_s - due_s(sample)) * 1e3


def tpot_ms(sample: RequestSample) -> float:
    """Mean time per output token after the first [ms]; NaN of a single token, or a failure."""
    if sample.error or sample.output_tokens < 2:
        return math.nan
    return (sample.end_s - sample.first_token_s) * 1e3 / (sample.output_tokens - 1)


def end_to_end_ms(sample: RequestSample) -> float:
    """Time to the last token [ms]; NaN when the request failed."""
    return math.nan if sample.error else (sample.end_s - due_s(sample)) * 1e3


def inter_token_ms(samples: Iterable[RequestSample]) -> np.ndarray:
    """Times between successive tokens of every request that did not fail, pooled [ms]."""
    gaps = [np.diff(sample.token_times_s) for sample in samples if not sample.error]
    return np.concatenate(gaps) * 1e3 if gaps else np.empty(0)


def error_rate(samples: Sequence[RequestSample]) -> float:
    """Share of requests that failed; NaN without requests."""
    return sum(bool(row.error) for row in samples) / len(samples) if samples else math.nan


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """p50, p90 and p99 (linear interpolation) of the finite values; None where there are none."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if not finite.size:
        return {"p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.percentile(finite, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}


def covered_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals [s]."""
    total, reach = 0.0, -math.inf
    for start, end in sorted(intervals):
        if end > reach:
            total += end - max(start, reach)
            reach = end
    return total


def window_seconds(samples: Iterable[RequestSample]) -> float:
    """Time in which at least one request was in flight, or was due later in an open loop [s]."""
    spans: list[tuple[float, float]] = []
    rounds: dict[int, tuple[float, float]] = {}
    for sample in samples:
        if sample.scheduled_s is None:
            spans.append((sample.start_s, sample.end_s))
            continue
        start, end = rounds.get(sample.round, (math.inf, -math.inf))
        rounds[sample.round] = min(start, sample.scheduled_s), max(end, sample.end_s)
    return covered_seconds([*spans, *rounds.values()])


def throughput(samples: Sequence[RequestSample], goal: Goal | None = None) -> float:
    """Output tokens per second of window; with a goal only requests that met it count.

    0 when no request did.
    """
    goal = goal or Goal()
    tokens = sum(sample.output_tokens for sample in samples if goal.met(sample))
    return tokens / window_seconds(samples) if tokens else 0.0


def prefill_rate(samples: Sequence[RequestSample]) -> float:
    """Prompt tokens per second of the time in which some request awaited its first token.

    0 when every request failed.
    """
    served = [sample for sample in samples if not sample.error]
    seconds = covered_seconds((sample.start_s, sample.first_token_s) for sample in served)
    return sum(sample.prompt_tokens for sample in served) / seconds if served else 0.0


def decode_rate(samples: Sequence[RequestSample]) -> float | None:
    """Output tokens after the first per second of decoding; None when there are none."""
    served = [sample for sample in samples if not sample.error]
    seconds = covered_seconds((sample.first_token_s, sample.end_s) for sample in served)
    tokens = sum(max(sample.output_tokens - 1, 0) for sample in served)
    return tokens / seconds if seconds > 0 else None


def by_round(samples: Iterable[RequestSample]) -> dict[int, list[RequestSample]]:
    """Samples grouped by round, in order of the round."""
    groups: dict[int, list[RequestSample]] = defaultdict(list)
    for sample in samples:
        groups[sample.round].append(sample)
    return dict(sorted(groups.items()))


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for 0.5 <= probability < 1, by Simpson's rule and bisection.

    With t = sqrt(n) tan(a) the density is proportional to cos(a)^(n-1).
    """

    def mass(angle: float) -> float:
        grid = np.linspace(0.0, angle, 2001)
        values = np.cos(grid) ** (degrees - 1)
        weights = np.ones(2001)
        weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
        return float(values @ weights) * angle / 6000.0

    target = (probability - 0.5) * 2.0 * mass(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < target else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def bootstrap_interval(
    value: float,
    per_round: Sequence[float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Interval of a positive figure from its values in the rounds.

    The rounds are resampled with replacement (rounds, not requests: requests of one round share
    whatever else the machine was doing); the standard error of the mean logarithm, corrected by
    sqrt(n / (n-1)), is widened by Student's t with n-1 degrees of freedom, because plain percentile
    intervals are far too narrow for few rounds (Hesterberg, "What Teachers Should Know About the
    Bootstrap", The American Statistician 69(4), 2015). With one round there is no interval.
    """
    count = len(per_round)
    if count < 2 or value <= 0 or min(per_round) <= 0:
        return Interval(value, None, None)
    logs = np.log(np.asarray(per_round, dtype=np.float64))
    picks = np.random.default_rng(seed).integers(0, count, size=(resamples, count))
    error = float(logs[picks].mean(axis=1).std()) * math.sqrt(count / (count - 1))
    reach = math.exp(student_quantile(0.5 + confidence / 2, count - 1) * error)
    return Interval(value, value / reach, value * reach)


def throughput_interval(
    samples: Sequence[RequestSample], *, seed: int, goal: Goal | None = None
) -> Interval:
    """Throughput over all rounds [tok/s] with its interval over rounds."""
    rounds = [throughput(group, goal) for group in by_round(samples).values()]
    return bootstrap_interval(throughput(samples, goal), rounds, seed=seed)


def speedup_interval(
    baseline: Sequence[RequestSample],
    candidate: Sequence[RequestSample],
    *,
    seed: int,
    goal: Goal | None = None,
) -> Interval:
    """Candidate throughput / baseline throughput, paired by round: drift of the machine cancels.

    The value is the ratio of the pooled throughputs. Without a positive baseline throughput (no
    request inside the goal) the ratio does not exist: ZeroDivisionError.
    """
    first, second = by_round(baseline), by_round(candidate)
    ratios = [
        throughput(second[index], goal) / base
        for index in first
        if index in second and (base := throughput(first[index], goal)) > 0
    ]
    value = throughput(candidate, goal) / throughput(baseline, goal)
    return bootstrap_interval(value, ratios, seed=seed)


def latency_figures(
    samples: Sequence[RequestSample],
) -> Mapping[str, dict[str, float | None]]:
    """Percentiles of TTFT and TPOT over all requests [ms]."""
    return {
        "ttft_ms": percentiles(ttft_ms(sample) for sample in samples),
        "tpot_ms": percentiles(tpot_ms(sample) for sample in samples),
    }


def serving_figures(samples: Sequence[RequestSample]) -> dict[str, Any]:
    """Percentiles of every latency [ms] over the requests answered, and the error rate."""
    return {
        **latency_figures(samples),
        "itl_ms": percentiles(inter_token_ms(samples)),
        "end_to_end_ms": percentiles(map(end_to_end_ms, samples)),
        "error_rate": error_rate(samples),
    }
