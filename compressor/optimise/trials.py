"""The stages of candidates: each trial is a few stages of an ordinary plan, run into the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError
from compressor.evaluate import gate
from compressor.measure.prices import PriceScenario
from compressor.measure.settings import serves
from compressor.optimise.options import SEARCHED, Limits
from compressor.optimise.proxies import Load
from compressor.optimise.space import Candidate
from compressor.plan import BASELINE, Plan, make_plan
from compressor.progress import Progress
from compressor.quantize.sensitivity import Sensitivity
from compressor.recipe import Recipe, derive
from compressor.run import run_stages
from compressor.store import Store, StoredStage

_PROBE = "probe"  # the variant that the sensitivities are planned for


class Trials:
    """Runs candidates' stages.

    Args:
        recipe: with its `optimise:` section.
        store: where stages are found and kept.
        progress: where to report.
        log: file of what was done.

    Attributes:
        seconds: of every stage that was needed so far, by key, as recorded when it ran.
    """

    def __init__(self, recipe: Recipe, store: Store, progress: Progress, log: Path) -> None:
        assert recipe.optimise is not None and recipe.evaluate is not None
        self.recipe, self.store, self.progress, self.log = recipe, store, progress, log
        self.options, self.evaluate = recipe.optimise, recipe.evaluate
        self.load = Load.of(recipe.measure, self.options.concurrency)
        self.seconds: dict[str, float] = {}

    def _plan(self, variants: Mapping[str, Any], **sections: Any) -> Plan:
        off = {"evaluate": None, "measure": None, "publish": None, "verify": None}
        made = derive(self.recipe, variants=dict(variants), **(off | sections))
        return make_plan(made, self.store, proofs=False)

    def _run(self, plan: Plan, names: Iterable[str]) -> dict[str, StoredStage]:
        done = run_stages(plan, names, self.progress, self.log)
        self.seconds |= {stored.key: stored.manifest["seconds"] for stored in done.values()}
        return done

    def facts(self) -> Plan:
        """The plan of the model alone."""
        return self._plan({_PROBE: {"quantize": []}})

    def sensitivities(self, schemes: Sequence[str], group_size: int) -> list[Sensitivity]:
        """Of every linear to each of the schemes; none without a calibration text."""
        if self.recipe.calibration is None or not schemes:
            return []
        listed = list(dict.fromkeys(schemes))
        if len(listed) < 2:  # a budget chooses among two at least
            listed += [name for name in ("W8A16", "W4A16") if name not in listed][:1]
        precision = {
            "schemes": listed,
            "mean_bits": 8,
            "samples": self.options.sensitivity_samples,
        }
        quantizer = {"rtn": {"scheme": listed[0], "group_size": group_size}}
        plan = self._plan({_PROBE: {"quantize": [quantizer], "precision": precision}})
        name = next(stage.name for stage in plan.stages if stage.kind == "sensitivity")
        found = self._run(plan, [name])[name].result["linears"]
        return [Sensitivity(**one) for one in found]

    def baseline(self, tokens: int) -> None:
        """Evaluate the baseline on so many tokens of each text."""
        plan = self._plan({_PROBE: {"quantize": []}}, evaluate=self._evaluate(tokens))
        self._run(plan, [f"evaluate:{BASELINE}"])

    def quality(self, candidate: Candidate, tokens: int | None) -> dict[str, Any]:
        """What the evaluation finds: ``quality`` by text, and ``drift``.

        Args:
            candidate: to evaluate.
            tokens: of each text, behind those of the recipe; None for the recipe's own.
        """
        plan = self._plan({candidate.name: candidate.variant}, evaluate=self._evaluate(tokens))
        name = f"evaluate:{candidate.name}"
        result = self._run(plan, [name])[name].result
        return {"quality": result["quality"], "retained": [], "drift": result["drift"]}

    def _evaluate(self, tokens: int | None) -> dict[str, Any]:
        """The recipe's section without tasks and limits. In the search positions are left out too,
        and drift where it is not limited; else it is the evaluation of the final run."""
        section = self.evaluate.model_dump(mode="json")
        section |= {"tasks": [], "tasks_served": False, "gate": None}
        if tokens is None:
            return section
        section["positions"] = {}
        if "drift" not in self.options.subject_to.limits:
            section["drift"] = None
        section["texts"] = [
            text | {"skip": text["skip"] + text["max_tokens"], "max_tokens": tokens}
            for text in section["texts"]
        ]
        return section

    def artifact(self, candidate: Candidate) -> tuple[int, int]:
        """Sizes of the exported artifact and of the baseline's [bytes]."""
        plan = self._plan({candidate.name: candidate.variant})
        own = self._exports(plan, candidate.name)[:1]
        done = self._run(plan, [*own, f"export:{BASELINE}:compressed-tensors"])
        sizes = {name: stored.result["size_bytes"] for name, stored in done.items()
                 if stored.manifest["kind"] == "export"}  # fmt: skip
        first = sizes[f"export:{BASELINE}:compressed-tensors"]
        return (sizes[own[0]] if own else first), first

    def _exports(self, plan: Plan, variant: str) -> list[str]:
        """Export stages of a variant, the one that is served first."""
        engine = self.recipe.measure.engine if self.recipe.measure is not None else "vllm"
        found = [
            stage
            for stage in plan.stages
            if stage.kind == "export" and stage.variant == variant and "method" not in stage.config
        ]
        found.sort(key=lambda stage: not serves(engine, stage.config["format"]))
        return [stage.name for stage in found]

    def measured(self, candidate: Candidate) -> dict[str, Any]:
        """The candidate's row of performance at the point that counts, under ``own``, and the
        ``baseline``'s, measured beside it."""
        assert self.recipe.measure is not None
        section = self.recipe.measure.model_dump(mode="json")
        section["waterfall"] = []
        section["workload"] |= {
            "prompts": self.options.prompts,
            "concurrency": [self.load.concurrency],
            "rate_per_s": [],
            "split": False,
        }
        plan = self._plan({candidate.name: candidate.variant}, measure=section)
        result = self._run(plan, ["measure"])["measure"].result
        if why := result["errors"].get(candidate.name):
            raise RecipeError(why, where=candidate.name)
        rows = result["performance"]
        return {"own": rows[candidate.name][0], "baseline": rows[BASELINE][0]}

    @property
    def currency(self) -> str:
        """Of the recipe's prices."""
        given = self.recipe.measure.prices.currency if self.recipe.measure is not None else None
        return given or str(PriceScenario.__dataclass_fields__["currency"].default)


def objective_of(minimise: str, row: Mapping[str, Any], size_bytes: int) -> float:
    """The objective in a row of performance.

    Raises RecipeError where it was not measured on this machine, or no request met the SLO.
    """
    if minimise == "size":
        return float(size_bytes)
    if minimise == "latency":
        found = row["end_to_end_ms"]["p50"]
    elif minimise == "energy":
        found = row["energy"] and row["energy"]["joules_per_output_token"]
        if not found:
            raise RecipeError(
                "energy is not measured on this machine",
                where="optimise.minimise",
                fix="minimise cost or latency, or measure where NVML or RAPL can be read",
            )
    else:
        found = row["cost_usd_per_mtok_output"] and row["cost_usd_per_mtok_output"]["value"]
    if found is None:
        raise RecipeError("no request was answered within the SLO", where="measure.workload.slo")
    return float(found)


def unit_of(minimise: str, currency: str) -> str:
    """Unit of an objective."""
    return {
        "cost": f"{currency} per million output tokens",
        "latency": "ms per request",
        "size": "bytes",
        "energy": "joules per output token",
    }[minimise]


def violation(limits: Limits, found: Mapping[str, Any], decide_on: str | None = None) -> float:
    """How far the evaluation's limits are missed, the worst one, relative to the limit; at most 0
    where all are kept."""
    known = {name: limit for name, limit in limits.limits.items() if name in SEARCHED}
    rows = gate.judge(known, decide_on or limits.decide_on, found)["limits"]
    return max(_missed(row) for row in rows)


def _missed(row: Mapping[str, Any]) -> float:
    if row["decided"] is None:
        return float("inf")
    over = row["decided"] - row["limit"]
    return (over if row["kind"] == "most" else -over) / max(abs(row["limit"]), 1e-6)


def surely_missed(limits: Limits, found: Mapping[str, Any], slack: float) -> bool:
    """Whether a limit is missed by the favourable ends of the intervals too, by more than a share
    of it."""
    ends = ("perplexity_ci", "kl_ci", "top1_ci")
    turned = [row | {end: row[end][::-1] for end in ends if row.get(end)}
              for row in found["quality"]]  # fmt: skip
    return violation(limits, {**found, "quality": turned}, "bound") > slack


def worst_loss(found: Mapping[str, Any]) -> float:
    """Growth of the perplexity on the text where it is worst."""
    return max(row["perplexity_change"] for row in found["quality"])
