"""A recipe with `optimise:` from beginning to end: search, judge the best anew, and report.

The search looked at its own tokens and prompts, and took the best of many: the luckiest looks
better than it is. So the best are evaluated on the recipe's own texts, which nothing was chosen on,
and those that keep the limits there are measured together, on the recipe's prompts. The variant to
deploy is the best of that.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import CompressorError
from compressor.optimise import trials as tried
from compressor.optimise.options import MEASURED, Optimise
from compressor.optimise.record import (
    DIRECTORY,
    Finalist,
    ProxyErrors,
    SearchRecord,
    TrialRecord,
)
from compressor.optimise.search import Found, search
from compressor.optimise.space import Candidate
from compressor.plan import BASELINE, Plan, make_plan
from compressor.progress import Progress
from compressor.recipe import Recipe, derive, derived_value, variant_values
from compressor.record import OPTIMISE, OPTIMISED
from compressor.report.verdict import certainly_cheaper, row_at
from compressor.run import RunResult, execute
from compressor.store import Store

_HEADER = """\
# The variant that a search chose (optimise.json has the whole of it): an ordinary recipe. Its paths
# are relative to the directory of the recipe that was searched from.
"""
_DOWN = {
    "cost": "costs {gain} less per output token than",
    "latency": "answers in {gain} less time than",
    "size": "is {gain} smaller than",
    "energy": "takes {gain} less energy per output token than",
}


@dataclass(frozen=True)
class Optimised:
    """Outcome: the final run, the plan that it was, and the record of the search."""

    result: RunResult
    plan: Plan
    record: SearchRecord


def optimise(recipe: Recipe, store: Store, progress: Progress) -> Optimised:
    """Search, judge the finalists anew and write the run's directory.

    Args:
        recipe: with an `optimise:` section.
        store: of finished stages.
        progress: where to report.

    Raises:
        CompressorError: nothing could be tried, a stage that every variant needs failed, or what
            the recipe names (a library of one of its variants, a text) is not there.
    """
    assert recipe.optimise is not None
    make_plan(_final(recipe, ()), store)  # what the end lacks is told before an hour of search
    log = store.root / DIRECTORY / f"{recipe.name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    found = search(recipe, store, progress, log)
    judged = _judged(recipe.optimise, found, progress)
    finalists = [candidate for candidate, finalist in judged if finalist.passed]
    final = _final(recipe, finalists)
    plan = make_plan(final, store)
    result = execute(plan, progress)
    record = _record(recipe, found, [finalist for _, finalist in judged], result.report)
    if recipe._value.get("publish") and record.chosen is not None:
        section = {**recipe._value["publish"], "variants": [record.chosen]}
        plan = make_plan(_final(recipe, finalists, publish=section), store)
    text = record.model_dump_json(indent=1) + "\n"
    files = {OPTIMISE: text} | deployed(recipe, record.chosen, finalists)
    return Optimised(execute(plan, progress, search=files), plan, record)


def _judged(
    options: Optimise, found: Found, progress: Progress
) -> list[tuple[Candidate, Finalist]]:
    """The best candidates on the recipe's own texts, until enough of them keep the limits. Of those
    that compute the same one is enough: the first that keeps them."""
    made: list[tuple[Candidate, Finalist]] = []
    classes: set[str] = set()
    with progress.task("judge on held-out texts", options.finalists) as task:
        for candidate, trial in found.ranked:
            if candidate.speed_class in classes:
                continue
            facts: dict[str, Any] = {"passed": False, "loss": None}
            try:
                quality = found.runner.quality(candidate, None)
                facts["loss"] = tried.worst_loss(quality)
                facts["passed"] = tried.violation(options.subject_to, quality) <= 0
            except CompressorError:
                pass
            finalist = Finalist(
                name=candidate.name,
                search_loss=trial.loss,
                search_objective=trial.objective,
                objective=None,
                **facts,
            )
            made.append((candidate, finalist))
            if finalist.passed:
                classes.add(candidate.speed_class)
                task.advance()
            if sum(one.passed for _, one in made) == options.finalists:
                break
    return made


def _final(recipe: Recipe, finalists: Sequence[Candidate], **sections: Any) -> Recipe:
    """The ordinary recipe of the last judgement: the recipe's own variants and the finalists, with
    the search's limits as its gate."""
    options = recipe.optimise
    assert options is not None
    limits = options.subject_to
    variants = variant_values(recipe)
    for candidate in finalists:
        variants.setdefault(candidate.name, candidate.variant)
    gate = {
        "metrics": {name: limit for name, limit in limits.limits.items()},
        "decide_on": limits.decide_on,
    }
    evaluate = {**recipe._value["evaluate"], "gate": gate}
    variants = variants or {"unchanged": {"quantize": []}}
    publish = sections.pop("publish", None)
    return derive(recipe, variants=variants, evaluate=evaluate, publish=publish, **sections)


def deployed(recipe: Recipe, chosen: str | None, finalists: Sequence[Candidate]) -> dict[str, str]:
    """The recipe of the chosen variant alone, as a file; none where nothing was chosen."""
    if chosen is None:
        return {}
    variants = {candidate.name: candidate.variant for candidate in finalists}
    variants |= variant_values(recipe)
    value = derived_value(recipe, variants={chosen: variants[chosen]}, publish=None)
    value["name"] = f"{recipe.name}-optimised"[:64]
    value.pop("output")  # which the command line may have moved
    if "output" in recipe._value:
        value["output"] = recipe._value["output"]
    if isinstance(measure := value.get("measure"), dict):  # steps of variants that are not in it
        value["measure"] = {key: part for key, part in measure.items() if key != "waterfall"}
    return {OPTIMISED: _HEADER + yaml.safe_dump(value, sort_keys=False)}


def _record(
    recipe: Recipe, found: Found, finalists: Sequence[Finalist], report: dict[str, Any]
) -> SearchRecord:
    options = recipe.optimise
    assert options is not None
    runner = found.runner
    objectives = final_objectives(options, runner.load.concurrency, report)
    judged = [
        one.model_copy(update={"objective": objectives.get(one.name), "passed": one.passed
                               and _passed(options, report, one.name)})
        for one in finalists
    ]  # fmt: skip
    baseline = objectives.get(BASELINE)
    given = {name for name, variant in recipe.variants.items() if not variant.is_null}
    may = given | {one.name for one in judged}
    names = [
        name
        for name in objectives
        if name in may
        and _passed(options, report, name)
        and _cheaper(options, runner.load.concurrency, report, name)
    ]
    best = min(names, key=lambda name: (objectives[name], name), default=None)
    if best is not None and baseline is not None and objectives[best] >= baseline:
        best = None
    records = [record for _, record in found.trials]
    return SearchRecord(
        minimise=options.minimise,
        unit=tried.unit_of(options.minimise, runner.currency),
        concurrency=runner.load.concurrency if options.minimise in MEASURED else None,
        limits=options.subject_to.limits
        | options.subject_to.model_dump(
            include={"size_gb", "memory_gb", "goal_met"}, exclude_none=True
        ),
        decide_on=options.subject_to.decide_on,
        seed=options.seed,
        candidates=found.pool,
        excluded=found.excluded,
        untried=found.untried,
        stopped=found.stopped,
        seconds=sum(runner.seconds.values()),
        chosen=best,
        sentence=_sentence(options, best, objectives, report),
        baseline_objective=baseline,
        trials=records,
        frontier=frontier(records),
        finalists=judged,
        errors=_errors(records, judged),
    )


def final_objectives(
    options: Optimise, concurrency: int, report: dict[str, Any]
) -> dict[str, float]:
    """The objective of every variant of the final run that has one, the baseline's included."""
    made = {}
    for variant in report["variants"]:
        if variant["status"] != "ok":
            continue
        row = row_at(variant, concurrency) if options.minimise in MEASURED else {}
        if row is None:
            continue
        try:
            made[variant["name"]] = tried.objective_of(
                options.minimise, row, variant["size_bytes"] or 0
            )
        except CompressorError:
            continue
    return made


def _passed(options: Optimise, report: dict[str, Any], name: str) -> bool:
    """Whether a variant of the final run keeps every limit."""
    limits = options.subject_to
    variant = next(one for one in report["variants"] if one["name"] == name)
    if variant["status"] != "ok" or not (variant["gate"] and variant["gate"]["passed"]):
        return False
    return limits.size_gb is None or (variant["size_bytes"] or 0) <= limits.size_gb * 1e9


def _cheaper(options: Optimise, concurrency: int, report: dict[str, Any], name: str) -> bool:
    """Whether a variant's tokens are shown to be cheaper: chance does not explain its gain over the
    baseline. True for other objectives, of which no interval is known."""
    if options.minimise != "cost":
        return True
    variant = next(one for one in report["variants"] if one["name"] == name)
    row = row_at(variant, concurrency)
    one_round = row is not None and row["cost_ratio"]["low"] is None
    return one_round or certainly_cheaper(row)


def _sentence(
    options: Optimise, best: str | None, objectives: dict[str, float], report: dict[str, Any]
) -> str:
    if best is None:
        return (
            "No candidate that keeps the limits is shown to be better than the baseline: deploy "
            "that."
        )
    first = objectives[BASELINE]
    gain = f"{1 - objectives[best] / first:.0%}"
    variant = next(one for one in report["variants"] if one["name"] == best)
    loss = max((row["perplexity_change"] for row in variant["quality"]), default=0.0)
    words = _DOWN[options.minimise].format(gain=gain)
    return (
        f"Deploy {best}: it {words} the baseline; perplexity {loss:+.2%} on the text where it is "
        "worst, held out from the search."
    )


def frontier(records: Sequence[TrialRecord]) -> list[str]:
    """Names of the trials that none beats in both objective and loss, the best objective first."""
    known = []
    for record in records:
        objective = record.estimated if record.objective is None else record.objective
        if objective is not None and record.loss is not None:
            known.append((objective, record.loss, record.name))
    kept: list[str] = []
    least = float("inf")
    for _, loss, name in sorted(known):
        if loss < least:
            kept.append(name)
            least = loss
    return kept


def _errors(records: Sequence[TrialRecord], finalists: Sequence[Finalist]) -> ProxyErrors:
    own = [r for r in records if r.reached == "measured" and r.shared is None]
    objective = [
        (r.estimated, r.objective)
        for r in own
        if r.estimated is not None and r.objective is not None
    ]
    full = [r for r in records if r.loss is not None]
    few = [(r.few_loss, r.loss) for r in full if r.few_loss is not None and r.loss is not None]
    seen = [
        (r.predicted_loss, r.loss if r.loss is not None else r.few_loss)
        for r in records
        if r.predicted_loss is not None and (r.loss is not None or r.few_loss is not None)
    ]
    held = [
        (f.loss, f.search_loss)
        for f in finalists
        if f.loss is not None and f.search_loss is not None
    ]
    return ProxyErrors(
        objective=_median_error(objective),
        rank_objective=_rank_correlation(objective),
        rank_predicted=_rank_correlation([(a, b) for a, b in seen if b is not None]),
        few=_difference(few),
        rank_few=_rank_correlation(few),
        held_out=_difference(held),
    )


def _median_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Median of |estimate / measured - 1|."""
    found = [abs(estimate / measured - 1) for estimate, measured in pairs if measured]
    return statistics.median(found) if found else None


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's; None below three pairs, or where one side is all the same."""
    from scipy.stats import spearmanr

    first, second = {a for a, _ in pairs}, {b for _, b in pairs}
    if len(pairs) < 3 or len(first) < 2 or len(second) < 2:
        return None
    return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)


def _difference(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Median of the difference's size."""
    return statistics.median(abs(a - b) for a, b in pairs) if pairs else None


def write_recipe(run_dir: Path, target: Path) -> None:
    """Copy the chosen variant's recipe out of a run's directory."""
    target.write_text((run_dir / OPTIMISED).read_text(encoding="utf-8"), encoding="utf-8")
