"""Which part of a load is the steady state, as pure functions of its samples.

No sample is thrown away: a `Window` says between which moments the server was fully loaded, and
figures are taken from what lies inside.

The window of a load:

1. *Ramp-up* ends when all slots have been busy once and the first request has ended; before, all
   requests were prefilled together, which never happens again. (In an open loop, which has no
   slots: when the first request has ended.) Where requests were declared to be warm-up, it ends no
   earlier than the first request after them starts.
2. *Ramp-down* begins when the last request starts; from then on slots run empty.
3. Between them the *truncation rule MSER-5* drops what is left of the initial transient: of all
   beginnings, the one without which the mean of the rest has the smallest estimated error (White,
   "An Effective Truncation Heuristic for Bias Reduction in Simulation Output", Simulation 69(6),
   1997; batches of 5: White, Cobb and Spratt, "A Comparison of Five Steady-State Truncation
   Heuristics for Simulation", WSC 2000). It looks at the output rate in 100 equal bins and may drop
   half of them at most.

guidellm's ``warmup`` and ``cooldown`` and genai-perf's warm-up requests cut fixed shares or counts
at the same two ends; 1 and 2 are those ends where they can be seen in the samples.

*Steady* is a window whose output rate and time to first token have no trend that is significant
(Mann-Kendall, p < 0.01) and large (Theil-Sen slope over the whole window of more than 10 % of the
median). A queue that grows, since an open loop asks for more than the server can do, shows as a
trend of the time to first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressor.measure import metrics
from compressor.measure.engines.base import RequestSample

BINS = 100
BATCHES = 20  # bins are joined in fives, for MSER-5 and for the trend
SIGNIFICANCE = 0.01
TOLERANCE = 0.10
LEAST_REQUESTS = 10  # fewer answered requests show no trend


@dataclass(frozen=True)
class Trend:
    """A change over a window: of `change` times the median, found by chance with `p_value`."""

    change: float
    p_value: float

    @property
    def matters(self) -> bool:
        """Whether it is both significant and large."""
        return self.p_value < SIGNIFICANCE and abs(self.change) > TOLERANCE


@dataclass(frozen=True)
class Window:
    """The part of a load that counts.

    Attributes:
        start_s, end_s: its bounds, on the clock of the samples [s].
        steady: whether it is known to be free of trends.
        reason: why not; empty when it is.
        rate: trend of the output rate; None when it could not be tested.
        ttft: trend of the time to first token; None when it could not be tested.
    """

    start_s: float
    end_s: float
    steady: bool
    reason: str = ""
    rate: Trend | None = None
    ttft: Trend | None = None

    @property
    def seconds(self) -> float:
        """Its length [s]."""
        return max(0.0, self.end_s - self.start_s)


def in_flight(samples: Sequence[RequestSample]) -> list[tuple[float, int]]:
    """(moment [s], requests in flight from then on), at every change, in order of time.

    Where one request ends at the very moment at which another starts, the end comes first.
    """
    changes = [(sample.start_s, 1) for sample in samples]
    changes += [(sample.end_s, -1) for sample in samples]
    level, found = 0, []
    for moment, change in sorted(changes):
        level += change
        found.append((moment, level))
    return found


def busy_bounds(
    samples: Sequence[RequestSample], *, concurrency: int | None = None, warm_up: int = 0
) -> tuple[float, float]:
    """From the end of the ramp-up to the beginning of the ramp-down [s]; see the module.

    Args:
        samples: of one load.
        concurrency: slots of a closed loop; None for an open loop.
        warm_up: requests that were declared to be warm-up, the first by their start.

    The bounds are in the wrong order when the load never was steady, for instance because it had no
    more requests than slots. ValueError without samples.
    """
    if not samples:
        raise ValueError("there are no samples")
    starts = sorted(sample.start_s for sample in samples)
    ends = [sample.end_s for sample in samples if not sample.error]
    begin = min(ends, default=math.inf)
    if concurrency is not None:
        full = (moment for moment, level in in_flight(samples) if level >= concurrency)
        begin = max(begin, next(full, math.inf))
    if warm_up:
        begin = max(begin, starts[warm_up] if warm_up < len(starts) else math.inf)
    return begin, starts[-1]


def started_in(samples: Sequence[RequestSample], window: Window) -> list[RequestSample]:
    """Requests whose latencies count: those that started in the window, wherever they end.

    Those that also had to end in it would be the short ones.
    """
    return [row for row in samples if window.start_s <= row.start_s <= window.end_s]


def token_rate(samples: Sequence[RequestSample], window: Window) -> float:
    """Output tokens per second of the window [tok/s]: every token by its own time.

    Also those of requests that reach over the bounds, so that no request counts twice or half. 0
    when the window is empty. Tokens of failed requests do not count.
    """
    if window.seconds <= 0:
        return 0.0
    moments = _token_moments(samples)
    inside = (moments >= window.start_s) & (moments < window.end_s)
    return float(inside.sum()) / window.seconds


def _token_moments(samples: Sequence[RequestSample]) -> np.ndarray:
    found = [sample.token_times_s for sample in samples if not sample.error]
    return np.concatenate(found) if found else np.empty(0)


def batch_means(values: Sequence[float] | np.ndarray, size: int = 5) -> np.ndarray:
    """Means of successive groups of `size` values; what is left at the end is dropped."""
    count = len(values) // size
    return np.asarray(values, dtype=np.float64)[: count * size].reshape(count, size).mean(axis=1)


def mser(values: Sequence[float] | np.ndarray) -> int:
    """How many of the first values to drop: the d <= n/2 with the least sum of squared deviations
    of the rest from their mean, divided by (n - d) squared. The smallest of equal ones."""
    data = np.asarray(values, dtype=np.float64)
    count = len(data)
    if count < 2:
        return 0
    scores = [
        float(((data[drop:] - data[drop:].mean()) ** 2).sum()) / (count - drop) ** 2
        for drop in range(count // 2 + 1)
    ]
    return int(np.argmin(scores))


def trend(values: Sequence[float] | np.ndarray) -> Trend:
    """Mann-Kendall's test (normal approximation, ties corrected) and Theil-Sen's slope.

    Kendall, "Rank Correlation Methods", 1975; Sen, JASA 63(324), 1968. Fewer than 8 values, for
    which the approximation is poor, have the p-value 1.
    """
    data = np.asarray(values, dtype=np.float64)
    count = len(data)
    if count < 2:
        return Trend(0.0, 1.0)
    later, earlier = np.tril_indices(count, -1)
    differences = data[later] - data[earlier]
    slope = float(np.median(differences / (later - earlier)))
    middle = float(np.median(data))
    change = slope * (count - 1) / middle if middle else 0.0
    if count < 8:
        return Trend(change, 1.0)
    score = float(np.sign(differences).sum())
    _, ties = np.unique(data, return_counts=True)
    variance = (
        count * (count - 1) * (2 * count + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())
    ) / 18
    if variance <= 0:
        return Trend(0.0, 1.0)
    z = max(abs(score) - 1, 0.0) / math.sqrt(variance)
    return Trend(change, math.erfc(z / math.sqrt(2)))


def find_window(
    samples: Sequence[RequestSample], *, concurrency: int | None = None, warm_up: int = 0
) -> Window:
    """The steady state of one load, by the rules of the module. Arguments as of `busy_bounds`.

    A load that never was steady has a window that is not `steady`, and says why; when even its
    bounds are in the wrong order, it is that of all requests after the declared warm-up.
    """
    begin, end = busy_bounds(samples, concurrency=concurrency, warm_up=warm_up)
    if not begin < end:
        kept = sorted(samples, key=lambda row: row.start_s)[warm_up:] or list(samples)
        return Window(
            min(row.start_s for row in kept),
            max(row.end_s for row in kept),
            steady=False,
            reason="too few requests: the last one started before the ramp-up was over",
        )
    moments = _token_moments(samples)
    width = (end - begin) / BINS
    counts, _ = np.histogram(moments, bins=BINS, range=(begin, end))
    begin += mser(batch_means(counts)) * (BINS // BATCHES) * width
    counts, _ = np.histogram(moments, bins=BATCHES, range=(begin, end))
    window = Window(begin, end, steady=False)
    served = sorted(started_in(samples, window), key=lambda row: row.start_s)
    latencies = [metrics.ttft_ms(row) for row in served if not row.error]
    if len(latencies) < LEAST_REQUESTS:
        reason = f"too few requests: {len(latencies)} answered in it, {LEAST_REQUESTS} are needed"
        return Window(begin, end, steady=False, reason=reason)
    rate = trend(counts)
    ttft = trend(batch_means(latencies, max(1, len(latencies) // BATCHES)))
    reasons = [
        f"{what} changed by {found.change:+.0%} over it"
        for what, found in (("output rate", rate), ("time to first token", ttft))
        if found.matters
    ]
    return Window(begin, end, not reasons, "; ".join(reasons), rate, ttft)
