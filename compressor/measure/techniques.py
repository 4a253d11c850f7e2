"""What each serving technique gained here, beside what the field claims for it.

The claims are ranges that are commonly quoted, each with the work it goes back to and what that
work itself reports. They were found on other models and devices: a gain outside of one is no error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from compressor.errors import RecipeError
from compressor.measure import metrics
from compressor.measure.engines.base import RequestSample
from compressor.measure.metrics import Interval

Position = Literal["below", "inside", "above"]


@dataclass(frozen=True)
class Claim:
    """Throughput with a technique / without it, as the field has it."""

    technique: str
    over: str
    low: float
    high: float
    source: str
    reported: str


CLAIMS: Mapping[str, Claim] = {
    claim.technique: claim
    for claim in (
        Claim(
            "int8",
            "16-bit weights and activations",
            1.5,
            2.0,
            "Xiao et al., SmoothQuant, ICML 2023, arXiv:2211.10438",
            "up to 1.56x faster and half the memory",
        ),
        Claim(
            "continuous-batching",
            "static batching",
            3.0,
            10.0,
            "Yu et al., Orca, OSDI 2022, https://www.usenix.org/conference/osdi22/presentation/yu; "
            "Anyscale, How continuous batching enables 23x throughput in LLM inference, 2023, "
            "https://www.anyscale.com/blog/continuous-batching-llm-inference",
            "Orca: up to 36.9x over FasterTransformer at equal latency for a model of 175 billion "
            "parameters; Anyscale: up to 23x together with PagedAttention",
        ),
        Claim(
            "speculative-decoding",
            "one token per step",
            2.0,
            3.0,
            "Leviathan et al., ICML 2023, arXiv:2211.17192; Cai et al., Medusa, arXiv:2401.10774",
            "Leviathan: 2x to 3x; Medusa: 2.2x to 3.6x, both for few requests at a time",
        ),
        Claim(
            "paged-attention",
            "contiguous key and value caches",
            1.5,
            2.5,
            "Kwon et al., vLLM, SOSP 2023, arXiv:2309.06180",
            "2x to 4x at equal latency over FasterTransformer and Orca",
        ),
    )
}


@dataclass(frozen=True)
class Step:
    """A configuration and its measured throughput [tok/s].

    `technique` is what it adds to the step before: a key of `CLAIMS`, another word, or empty.
    """

    name: str
    throughput_tok_s: Interval
    technique: str = ""


@dataclass(frozen=True)
class Gain:
    """One step of the waterfall.

    `step_gain` is against the step before and `total_gain` against the first, each with an interval
    where both throughputs have one. `position` is where the step's gain lies beside the claim, and
    `certain` whether its whole interval lies there; None without a claim.
    """

    name: str
    technique: str
    throughput_tok_s: Interval
    step_gain: Interval
    total_gain: Interval
    claim: Claim | None
    position: Position | None
    certain: bool | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def ratio(after: Interval, before: Interval) -> Interval:
    """after / before, with an interval where both have one.

    The two are taken as independent: the distances of the ends add up as squares of logarithms.
    For measurements paired by round this is wider than `metrics.speedup_interval`, never a claim
    too much. Raises ZeroDivisionError where `before` is 0.
    """
    value = after.value / before.value
    if None in (after.low, after.high, before.low, before.high):
        return Interval(value, None, None)
    ends = (after.low, after.high, before.low, before.high)
    after_low, after_high, before_low, before_high = (float(end or 0.0) for end in ends)
    if min(after_low, before_low) <= 0:
        return Interval(value, None, None)

    def distance(first: float, second: float) -> float:
        return math.exp(math.hypot(math.log(first), math.log(second)))

    down = distance(after.value / after_low, before_high / before.value)
    up = distance(after_high / after.value, before.value / before_low)
    return Interval(value, value / down, value * up)


def place(gain: Interval, claim: Claim) -> tuple[Position, bool]:
    """Where a gain lies beside a claim, and whether its whole interval lies there."""
    low, high = gain.low, gain.high
    if gain.value < claim.low:
        return "below", high is not None and high < claim.low
    if gain.value > claim.high:
        return "above", low is not None and low > claim.high
    known = low is not None and high is not None
    return "inside", known and (low or 0.0) >= claim.low and (high or 0.0) <= claim.high


def _sentence(step: Step, gain: Interval, claim: Claim | None, position: Position | None) -> str:
    words = f"{step.name}: {gain.value:.3g}x"
    if gain.low is not None and gain.high is not None:
        words += f" ({gain.low:.3g} to {gain.high:.3g})"
    if claim is None or position is None:
        return f"{words}; no claim is on record for it."
    return (
        f"{words}, {position} the {claim.low:g}x to {claim.high:g}x that are claimed over "
        f"{claim.over} ({claim.source})."
    )


def waterfall(
    steps: Sequence[Step],
    *,
    paired: Mapping[str, Interval] | None = None,
    paired_totals: Mapping[str, Interval] | None = None,
) -> tuple[Gain, ...]:
    """Step and total gains of measured configurations, in order; the first is the baseline.

    Args:
        steps: each adds its technique to the one before.
        paired: gains against the step before by name, where they were measured paired by round
            (`metrics.speedup_interval`); they replace the ratio of independent intervals.
        paired_totals: the same against the first step.

    Raises RecipeError without steps, for a name that is there twice, or a throughput of 0.
    """
    names = [step.name for step in steps]
    if not steps or len(set(names)) < len(names):
        raise RecipeError(
            "a waterfall needs steps with names of their own",
            where="techniques",
            fix="give the baseline first, then one step per technique",
        )
    for step in steps:
        if step.throughput_tok_s.value <= 0:
            raise RecipeError(
                f"{step.name} made no tokens",
                where="techniques",
                fix="leave it out, or loosen the service level objective",
            )
    one = Interval(1.0, None, None)
    first = steps[0]
    rows = [Gain(first.name, "", first.throughput_tok_s, one, one, None, None, None, "")]
    for before, step in pairwise(steps):
        rate = step.throughput_tok_s
        gain = (paired or {}).get(step.name) or ratio(rate, before.throughput_tok_s)
        claim = CLAIMS.get(step.technique)
        row = Gain(
            step.name,
            step.technique,
            rate,
            gain,
            (paired_totals or {}).get(step.name) or ratio(rate, first.throughput_tok_s),
            claim,
            None,
            None,
            _sentence(step, gain, None, None),
        )
        if claim is not None:
            position, certain = place(gain, claim)
            text = _sentence(step, gain, claim, position)
            row = replace(row, position=position, certain=certain, sentence=text)
        rows.append(row)
    return tuple(rows)


def gains(
    declared: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Mapping[tuple[int, float | None], Sequence[RequestSample]]],
    *,
    baseline: str,
    seed: int,
    goal: metrics.Goal,
) -> list[dict[str, Any]]:
    """The declared waterfall at every point of the sweep, from raw samples.

    Throughputs are those that costs rest on: output tokens of requests inside the goal, per second
    of the whole window. Gains are paired by round.

    Args:
        declared: ``{"variant", "technique"}`` of each step; the baseline is the starting point
            where the first one has a technique.
        groups: by variant and by (concurrency, arrivals per second) of the point, in order; every
            variant has the points of the baseline.
        seed: of the intervals' bootstrap.
        goal: service level objective.

    Returns, JSON-ready, by point: ``concurrency``, ``rate_per_s``, ``steps`` (`Gain.to_dict`) and
    ``left_out``, the variants from the first on that has no samples, or no request inside the goal:
    what comes after it would not be a gain over the step before.
    """
    steps = [(str(step["variant"]), step["technique"] or "") for step in declared]
    if steps[0][1]:
        steps.insert(0, (baseline, ""))
    return [_gains_at(point, steps, groups, seed=seed, goal=goal) for point in groups[baseline]]


def _gains_at(
    point: tuple[int, float | None],
    steps: Sequence[tuple[str, str]],
    groups: Mapping[str, Mapping[tuple[int, float | None], Sequence[RequestSample]]],
    *,
    seed: int,
    goal: metrics.Goal,
) -> dict[str, Any]:
    """One entry of `gains`."""
    rows: list[tuple[Step, Sequence[RequestSample]]] = []
    paired, totals = {}, {}
    for name, technique in steps:
        samples = groups.get(name, {}).get(point, ())
        rate = metrics.throughput_interval(samples, seed=seed, goal=goal)
        if rate.value <= 0:
            break
        if rows:
            paired[name] = metrics.speedup_interval(rows[-1][1], samples, seed=seed, goal=goal)
            totals[name] = metrics.speedup_interval(rows[0][1], samples, seed=seed, goal=goal)
        rows.append((Step(name, rate, technique), samples))
    found = [step for step, _ in rows]
    chain = waterfall(found, paired=paired, paired_totals=totals) if found else ()
    return {
        "concurrency": point[0],
        "rate_per_s": point[1],
        "steps": [gain.to_dict() for gain in chain],
        "left_out": [name for name, _ in steps[len(found) :]],
    }
