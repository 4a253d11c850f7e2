"""What the trials of a search have shown so far, and what follows for candidates not yet tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from compressor.optimise.options import Optimise
from compressor.optimise.proxies import Estimate
from compressor.optimise.record import TrialRecord
from compressor.optimise.space import Candidate

OBJECTIVE_SLACK = 1.3  # an estimate that no measurement of the same form has corrected
SAME_FORM_SLACK = 1.1
SIZE_SLACK = 1.05  # headers and paddings
LOSS_SLACK = 2.0
_ENOUGH = 3  # trials from which predicted losses are believed


@dataclass(frozen=True)
class Pooled:
    """A candidate with what the proxies say of it."""

    candidate: Candidate
    estimate: Estimate
    loss: float


@dataclass
class State:
    """Everything that decisions rest on: the trials alone, so that it can be made again.

    Attributes:
        options: of the search.
        baseline: the roofline's objective for the untouched model.
        trials: so far, in their order.
    """

    options: Optimise
    baseline: float
    trials: list[tuple[Pooled, TrialRecord]] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    measured: dict[str, TrialRecord] = field(default_factory=dict)  # by class of speed

    def add(self, pooled: Pooled, record: TrialRecord) -> None:
        """Take in a trial."""
        self.trials.append((pooled, record))
        self.tried.add(pooled.candidate.identity)
        if record.reached == "measured":
            self.measured.setdefault(pooled.candidate.speed_class, record)

    def knows(self, candidate: Candidate) -> bool:
        """Whether one that the same kernels compute was measured."""
        return any(
            other.candidate.arithmetic == candidate.arithmetic
            for other, record in self.trials
            if record.reached == "measured"
        )

    @property
    def best(self) -> TrialRecord | None:
        """The trial with the least objective of those that keep the limits."""
        found = [record for _, record in self.trials if keeps(record)]
        return min(found, key=lambda r: (r.objective, r.violation), default=None)

    @property
    def unit(self) -> float | None:
        """The baseline's objective as it was first measured: what measured objectives are in."""
        found = (record.baseline_objective for record in self.measured.values())
        return next((value for value in found if value), None)

    @property
    def scale(self) -> float:
        """Measured / estimated objective of the baseline; 1 before anything was measured."""
        return self.unit / self.baseline if self.unit and self.baseline else 1.0

    def objective(self, pooled: Pooled) -> tuple[float, float]:
        """(objective as expected, the least that it may turn out to be)."""
        known = self.measured.get(pooled.candidate.speed_class)
        if known is not None and known.objective is not None:
            return known.objective, known.objective
        own = pooled.candidate
        seen = [
            (other.candidate, record.objective / other.estimate.objective)
            for other, record in self.trials
            if record.reached == "measured"
            and record.objective is not None
            and other.estimate.objective
        ]
        alike = [(other, ratio) for other, ratio in seen if other.arithmetic == own.arithmetic]
        same = [ratio for other, ratio in alike if other.form == own.form]
        scale, slack = self.scale, self._slack
        if same:
            scale, slack = statistics.median(same), SAME_FORM_SLACK
        elif alike:
            scale = statistics.median(ratio for _, ratio in alike)
            slack = min(OBJECTIVE_SLACK, slack)
        expected = pooled.estimate.objective * scale
        return expected, expected / slack

    @property
    def _slack(self) -> float:
        """How much better than estimated a candidate may be: as much as any was, and some more."""
        gains = [
            other.estimate.objective * self.scale / record.objective
            for other, record in self.trials
            if record.reached == "measured" and record.objective and record.shared is None
        ]
        if self.options.minimise == "size":
            return SIZE_SLACK
        return max(OBJECTIVE_SLACK, SAME_FORM_SLACK * max(gains, default=1.0))

    def _ratios(self, pooled: Iterable[tuple[Pooled, TrialRecord]]) -> list[float]:
        """Seen / predicted losses [nats per token]."""
        found = []
        for other, record in pooled:
            seen = record.loss if record.loss is not None else record.few_loss
            if seen is not None and other.loss > 0:
                found.append(max(math.log1p(max(seen, -0.9)), 1e-5) / other.loss)
        return found

    def loss(self, pooled: Pooled) -> float:
        """Growth of the perplexity as expected from the prediction, and from what candidates like
        it showed: with its method, else its algorithms and scheme, else its scheme (and how its
        algorithms compare in others), else any."""
        own = pooled.candidate
        same = [
            (other, record) for other, record in self.trials if other.candidate.scheme == own.scheme
        ]
        alike = [
            (other, record) for other, record in same if other.candidate.algorithm == own.algorithm
        ]
        ratio = 1.0
        for group in (self._by_method(own), alike, same, self.trials):
            if ratios := self._ratios(group):
                ratio = statistics.median(ratios)
                ratio *= self._elsewhere(own) if group is same else 1.0
                break
        return math.expm1(min(pooled.loss * ratio, 50.0))

    def _elsewhere(self, own: Candidate) -> float:
        """How the losses of some algorithms compare with others', in schemes where both were tried;
        1 where they were not."""
        found = []
        for scheme in {other.candidate.scheme for other, _ in self.trials}:
            parts: dict[bool, list[tuple[Pooled, TrialRecord]]] = {True: [], False: []}
            for other, record in self.trials:
                if other.candidate.scheme == scheme:
                    parts[other.candidate.algorithm == own.algorithm].append((other, record))
            mine, others = self._ratios(parts[True]), self._ratios(parts[False])
            if mine and others:
                found.append(statistics.median(mine) / statistics.median(others))
        return statistics.median(found) if found else 1.0

    def _by_method(self, own: Candidate) -> list[tuple[Pooled, TrialRecord]]:
        return [one for one in self.trials if one[0].candidate.method == own.method]

    def _may_lose_less(self, pooled: Pooled, best: TrialRecord) -> bool:
        """Whether a candidate of equal cost may lose less than the best: its method was not tried
        yet, or showed elsewhere that it does."""
        seen = self._ratios(self._by_method(pooled.candidate))
        return not seen or best.loss is None or self.loss(pooled) < best.loss

    def hopeless(self, pooled: Pooled) -> str:
        """Why a candidate cannot win, by the proxies; empty where it may."""
        limits = self.options.subject_to
        if pooled.estimate.fails:
            return "the engine does not load it"
        if limits.memory_gb is not None and pooled.estimate.memory_bytes > limits.memory_gb * 1e9:
            return "memory"
        if (
            limits.size_gb is not None
            and pooled.estimate.weight_bytes / OBJECTIVE_SLACK > limits.size_gb * 1e9
        ):
            return "size"
        best = self.best
        if best is not None and best.objective is not None:
            least = self.objective(pooled)[1]
            if least > best.objective:
                return f"{self.options.minimise} above that of {best.name}"
            same = self.measured.get(pooled.candidate.speed_class)
            if (
                same is not None
                and least >= best.objective
                and not self._may_lose_less(pooled, best)
            ):
                return f"{self.options.minimise} of {best.name}, and a greater loss"
        limit = limits.limits.get("perplexity")
        ratios = self._ratios(self.trials)
        if limit is not None and len(ratios) >= _ENOUGH:
            least_loss = pooled.loss * min(ratios) / LOSS_SLACK
            if least_loss > math.log1p(limit):
                return "predicted loss"
        return ""

    def promising(self, pool: Iterable[Pooled]) -> Pooled:
        """The next to try: the best objective among those expected to keep the limits; where none
        is, the least expected loss."""
        limit = self.options.subject_to.limits.get("perplexity", 0.01)

        def order(one: Pooled) -> tuple[bool, float, float, str]:
            loss, objective = self.loss(one), self.objective(one)[0]
            fits = loss <= limit
            return (not fits, objective if fits else loss, loss, one.candidate.name)

        return min(pool, key=order)


def keeps(record: TrialRecord) -> bool:
    """Whether a trial was measured and keeps every limit."""
    return record.reached == "measured" and not record.why and record.objective is not None
