"""What a search leaves behind: ``optimise.json`` of a run, and the report's section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compressor.optimise.options import Objective

DIRECTORY = "optimise"  # of studies and logs of searches, in the store
Reached = Literal["failed", "proxies", "few", "full", "measured"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TrialRecord(_Strict):
    """One candidate that was tried.

    `origin`: ``recipe`` a variant of the recipe, ``proxies`` the most promising by the proxies,
    ``sampler`` proposed by Optuna. `reached`: how far it came: judged by the proxies, scored on few
    tokens, on all tokens of the search, or exported and measured too. `why` says why it went no
    further, or lost.

    Losses are the growth of the perplexity on the worst text: `predicted_loss` from the layers'
    sensitivities alone, `few_loss` and `loss` from the evaluations. `violation`: how far the limits
    are missed, the worst one, relative; 0 or less keeps them all. `objective` is `estimated` before
    it is measured, in the objective's unit. `baseline_objective` is the baseline's, measured beside
    it; a measured `objective` is given as if the baseline's had been that of the search's first
    measurement, since a machine's speed drifts. `shared`: it was measured with another candidate
    that computes the same in serving. `seconds`: of its stages, by key.
    """

    name: str
    origin: Literal["recipe", "proxies", "sampler"]
    choice: dict[str, str]
    variant: dict[str, Any]
    reached: Reached
    why: str
    estimated: float | None = None
    predicted_loss: float | None = None
    few_loss: float | None = None
    loss: float | None = None
    violation: float | None = None
    objective: float | None = None
    baseline_objective: float | None = None
    goal_met: float | None = None
    size_bytes: int | None = None
    shared: str | None = None
    seconds: dict[str, float] = {}


class ProxyErrors(_Strict):
    """How far the proxies were off: medians of the error's size.

    `objective`: |estimated / measured - 1|, the estimate calibrated on the baseline, or on earlier
    candidates of the same form. `few` and `held_out`: |difference| of the perplexity's growth
    against that on the search's tokens. `rank_*`: Spearman's rank correlation with the full figure;
    None below three pairs.
    """

    objective: float | None
    rank_objective: float | None
    rank_predicted: float | None
    few: float | None
    rank_few: float | None
    held_out: float | None


class Finalist(_Strict):
    """A candidate judged on held-out texts and fresh prompts; figures are None where it failed the
    limits before it was measured."""

    name: str
    passed: bool
    search_loss: float | None
    loss: float | None
    search_objective: float | None
    objective: float | None


class SearchRecord(_Strict):
    """The whole search.

    `chosen` is the variant to deploy; None where none that keeps the limits is better than the
    baseline. `frontier`: candidates that no other beats in both objective and loss, cheapest first.
    `excluded`: candidates that were not tried since the proxies showed that they cannot win, by
    reason. `seconds`: of all its stages.
    """

    minimise: Objective
    unit: str
    concurrency: int | None
    limits: dict[str, float]
    decide_on: str
    seed: int
    candidates: int
    excluded: dict[str, int]
    untried: int
    stopped: str
    seconds: float
    chosen: str | None
    sentence: str
    baseline_objective: float | None
    trials: list[TrialRecord]
    frontier: list[str]
    finalists: list[Finalist]
    errors: ProxyErrors
