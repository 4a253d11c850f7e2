"""The search itself: candidates race through evaluations that get dearer, as far as they can win.

A candidate is scored on few tokens, then on all tokens of the search, then exported and measured
under the load. It is dropped as soon as it cannot win: limits missed by more than chance allows, or
an objective that cannot come below the best so far. (The first that a kernel computes is measured
even where it misses a limit, for what that says of the others.) Proxies order the candidates, and
leave out untried those that cannot win. From the `_STARTUP`-th trial on every second one is
proposed by Optuna's multi-objective TPE (Ozaki et al., GECCO 2020; constrained as in
arXiv:2211.14411) from what the trials showed; the others are the most promising by the proxies,
corrected by the trials.

Trials are kept in SQLite. What is decided follows from the finished trials and from the seed alone,
and time is what stages took when they ran: a search that was interrupted ends with the same answer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError, RunError, first_line
from compressor.measure.devices import Device, devices, this_device
from compressor.models.dimensions import read_dimensions
from compressor.models.shapes import linear_shapes
from compressor.numerics.scheme import Scheme
from compressor.optimise import trials as run
from compressor.optimise.options import MEASURED
from compressor.optimise.proxies import Proxies
from compressor.optimise.record import DIRECTORY, TrialRecord
from compressor.optimise.space import Candidate, CandidateSpace
from compressor.optimise.state import Pooled, State, keeps
from compressor.optimise.trials import Trials
from compressor.plan import Plan, code_version
from compressor.progress import Progress
from compressor.recipe import Recipe, variant_values
from compressor.store import Store, content_key
from compressor.support import Target

if TYPE_CHECKING:
    from optuna import Study

_STARTUP = 6
_DRAWS = 24  # of the sampler, of which it proposes the best
_ATTEMPTS = 24  # proposals of the sampler that were tried already, before it is passed over
_MOST = 1e6  # of a violation: databases have no infinity
_FEW_SLACK = 0.5  # share of a limit that few tokens may miss it by
_RECORD, _DEVICE = "record", "device"
_KINDS = ("load", "texts", "quantize", "sensitivity", "evaluate", "export", "measure", "search")


@dataclass(frozen=True)
class Found:
    """Outcome of the search, before the final judgement.

    Attributes:
        trials: in their order.
        excluded: candidates that were not tried, by why they cannot win.
        untried: further ones, for which there was no time.
        pool: all candidates.
        stopped: why it ended.
    """

    trials: tuple[tuple[Candidate, TrialRecord], ...]
    excluded: dict[str, int]
    untried: int
    pool: int
    stopped: str
    runner: Trials

    @property
    def ranked(self) -> list[tuple[Candidate, TrialRecord]]:
        """Those that keep the limits, the best first."""
        kept = [(c, r) for c, r in self.trials if keeps(r)]
        return sorted(kept, key=lambda one: (one[1].objective, one[1].violation, one[1].name))


def search(recipe: Recipe, store: Store, progress: Progress, log: Path) -> Found:
    """Search for the candidates that are best within the limits.

    Args:
        recipe: with an `optimise:` section.
        store: of stages; the study lies beside them.
        progress: where to report.
        log: file that stages are listed in.

    Raises:
        CompressorError: a stage that every candidate needs failed.
    """
    return _Search(recipe, store, progress, log).run()


class _Search:
    def __init__(self, recipe: Recipe, store: Store, progress: Progress, log: Path) -> None:
        assert recipe.optimise is not None
        self.recipe, self.options = recipe, recipe.optimise
        self.space = CandidateSpace(recipe)
        self.runner = Trials(recipe, store, progress, log)
        self.progress = progress
        self.plan = self.runner.facts()
        self.study = _study(store, _key(recipe, self.plan), self.options.seed)
        self.proxies = self._proxies()
        self.pool = [self._pooled(candidate) for candidate in self.space.pool]
        self.state = State(self.options, self.proxies.baseline().objective)
        self.stopped = ""

    def _proxies(self) -> Proxies:
        measure = self.recipe.measure
        device = next(iter(devices().values()))  # sizes are the same on any
        if self.options.minimise in MEASURED:
            if _DEVICE not in self.study.user_attrs:  # once: else it would not be repeatable
                self.study.set_user_attr(_DEVICE, this_device().to_dict())
            device = Device.from_dict(self.study.user_attrs[_DEVICE])
        source = self.recipe.model
        dims = read_dimensions(
            source.source,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            base_dir=self.recipe.base_dir,
        )
        space = self.options.space
        listed = [*space.schemes, *(n for one in space.precision for n in one.schemes)]
        schemes = [name for name in listed if Scheme.parse(name).weights.type == "int"]
        given = measure.prices.model_dump(mode="json") if measure is not None else {}
        return Proxies(
            dims,
            device,
            _target(measure),
            linear_shapes(self.plan.facts.tensors),
            self.runner.load,
            self.options.minimise,
            given,
            _cpus(),
            self.runner.sensitivities(schemes, space.group_sizes[0]),
        )

    def _pooled(self, candidate: Candidate) -> Pooled:
        return Pooled(candidate, self.proxies.estimate(candidate), self.proxies.loss(candidate))

    def run(self) -> Found:
        for tokens in (self.options.few_tokens, self.options.tokens):
            self.runner.baseline(tokens)
        own = self._given()
        inside = {one.candidate.identity: one for one in self.pool}
        for pooled in own:  # one that the space has too is a trial of the study
            if pooled.candidate.identity not in inside:
                self.state.add(pooled, self._trial(pooled, "recipe"))
        self._replay(inside)
        for pooled in own:
            found = inside.get(pooled.candidate.identity)
            if found is not None and found.candidate.identity not in self.state.tried:
                self._ask(found, "recipe")
        while not self._over():
            left = [
                one
                for one in self.pool
                if one.candidate.identity not in self.state.tried and not self.state.hopeless(one)
            ]
            if not left:
                self.stopped = "no other candidate can win"
                break
            pooled, origin = self._next(left)
            self._ask(pooled, origin)
        return self._found()

    def _given(self) -> list[Pooled]:
        """The recipe's own variants."""
        made = []
        for name, value in variant_values(self.recipe).items():
            parsed = self.recipe.variants[name]
            if not parsed.is_null:
                made.append(self._pooled(Candidate(name, {}, value, parsed)))
        return made

    def _over(self) -> bool:
        if len(self.state.trials) >= self.options.trials:
            self.stopped = f"{self.options.trials} trials"
        elif sum(self.runner.seconds.values()) >= self.options.minutes * 60:
            self.stopped = f"{self.options.minutes:g} minutes"
        return bool(self.stopped)

    def _replay(self, inside: dict[str, Pooled]) -> None:
        """Take in the trials that an earlier, interrupted search finished."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials():
            text = trial.user_attrs.get(_RECORD)
            if trial.state == TrialState.WAITING:  # `ask` hands out the first of those
                self.study.tell(self.study.ask(), state=TrialState.FAIL)
            elif text is None and trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
            elif text is not None:
                record = TrialRecord.model_validate_json(text)
                candidate = self.space.at(record.choice)
                if candidate is None or self._over():
                    continue
                self.state.add(inside[candidate.identity], record)
                self.runner.seconds |= record.seconds
                if trial.state == TrialState.RUNNING:
                    self._tell(trial.number, inside[candidate.identity], record)

    def _next(self, left: Sequence[Pooled]) -> tuple[Pooled, str]:
        """The next candidate, and who proposes it."""
        number = len(self.state.trials)
        if number >= _STARTUP and number % 2 and self.space.open:
            found = self._sampled({one.candidate.identity: one for one in left})
            if found is not None:
                return found, "sampler"
        return self.state.promising(left), "proxies"

    def _sampled(self, left: dict[str, Pooled]) -> Pooled | None:
        """What Optuna proposes of the candidates that are left; None where it has nothing new."""
        from optuna.trial import TrialState

        for attempt in range(_ATTEMPTS):
            # Anew for each proposal, so that it follows from the trials and not from earlier draws.
            seed = [self.options.seed, len(self.state.trials), attempt]
            # The best of many draws comes again and again in a small space: then single ones.
            self.study.sampler = _sampler(int(content_key(seed)[:8], 16), 1 if attempt else _DRAWS)
            trial = self.study.ask()
            choice = self._suggested(trial)
            self.study.tell(trial, state=TrialState.FAIL)  # it is asked again where it is taken
            candidate = self.space.at(choice)
            if candidate is not None and candidate.identity in left:
                return left[candidate.identity]
        return None

    def _suggested(self, trial: Any) -> dict[str, str]:
        return {
            key: trial.suggest_categorical(key, labels) for key, labels in self.space.open.items()
        }

    def _ask(self, pooled: Pooled, origin: str) -> None:
        """Try a candidate, and keep what came of it in the study."""
        self.study.enqueue_trial(pooled.candidate.choice)
        trial = self.study.ask()
        self._suggested(trial)
        record = self._trial(pooled, origin)
        if record.violation is not None:
            trial.set_constraint("limits", min(record.violation, _MOST))
        trial.set_user_attr(_RECORD, record.model_dump_json())
        self.state.add(pooled, record)
        self._tell(trial.number, pooled, record)

    def _tell(self, number: int, pooled: Pooled, record: TrialRecord) -> None:
        """Tell the study what came of a trial."""
        from optuna.trial import TrialState

        if record.violation is None or record.reached == "failed":  # nothing to learn from
            self.study.tell(number, state=TrialState.FAIL)
            return
        objective = record.objective
        if objective is None:
            objective = self.state.objective(pooled)[0]
        self.study.tell(number, [objective, min(record.violation, _MOST)])

    def _trial(self, pooled: Pooled, origin: str) -> TrialRecord:
        """Run a candidate's stages as far as it can win."""
        before = set(self.runner.seconds)
        candidate = pooled.candidate
        facts: dict[str, Any] = {"reached": "failed", "why": ""}
        with self.progress.task(
            f"trial {len(self.state.trials) + 1}: {candidate.name}, {candidate.algorithm} "
            f"{candidate.scheme}".rstrip(),
            None,
        ):
            try:
                self._race(pooled, facts)
            except CompressorError as error:
                facts |= {"reached": "failed", "why": error.what}
        new = {key: s for key, s in self.runner.seconds.items() if key not in before}
        estimate = self.state.objective(pooled)[0]
        if not self.state.measured and facts.get("baseline_objective"):  # calibrated on that
            estimate = pooled.estimate.objective * facts["baseline_objective"] / self.state.baseline
        return TrialRecord(
            name=candidate.name,
            origin=origin,  # type: ignore[arg-type]
            choice=candidate.choice,
            variant=candidate.variant,
            estimated=estimate,
            predicted_loss=self.state.loss(pooled),
            seconds=new,
            **facts,
        )

    def _race(self, pooled: Pooled, facts: dict[str, Any]) -> None:
        limits, candidate = self.options.subject_to, pooled.candidate
        if why := self.state.hopeless(pooled):
            facts |= {"reached": "proxies", "why": why}
            return
        few = self.runner.quality(candidate, self.options.few_tokens)
        facts |= {"reached": "few", "few_loss": run.worst_loss(few)}
        facts["violation"] = run.violation(limits, few)
        if run.surely_missed(limits, few, _FEW_SLACK):
            facts["why"] = "limits missed on few tokens"
            return
        full = self.runner.quality(candidate, self.options.tokens)
        facts |= {"reached": "full", "loss": run.worst_loss(full)}
        facts["violation"] = run.violation(limits, full)
        if facts["violation"] > 0:
            facts["why"] = "limits missed"
            if self.options.minimise not in MEASURED or self.state.knows(candidate):
                return  # else it is measured for what that says of others
        facts["size_bytes"], first = self.runner.artifact(candidate)
        if limits.size_gb is not None and facts["size_bytes"] > limits.size_gb * 1e9:
            facts["why"] = facts["why"] or "size"
            return
        self._weigh(pooled, facts, first)

    def _weigh(self, pooled: Pooled, facts: dict[str, Any], baseline_bytes: int) -> None:
        """Measure the objective, where no candidate that computes the same was measured before."""
        minimise, limits = self.options.minimise, self.options.subject_to
        known = self.state.measured.get(pooled.candidate.speed_class)
        if minimise not in MEASURED:
            facts["objective"] = float(facts["size_bytes"])
            facts["baseline_objective"] = float(baseline_bytes)
        elif known is not None:
            facts |= {
                "objective": known.objective,
                "baseline_objective": known.baseline_objective,
                "goal_met": known.goal_met,
                "shared": known.shared or known.name,
            }
        else:
            rows = self.runner.measured(pooled.candidate)
            facts["goal_met"] = rows["own"]["goal_met_share"]
            beside = run.objective_of(minimise, rows["baseline"], baseline_bytes)
            own = run.objective_of(minimise, rows["own"], facts["size_bytes"])
            facts["baseline_objective"] = beside
            # Machines are faster at one hour than at another.
            facts["objective"] = own * (self.state.unit or beside) / beside
        facts["reached"] = "measured"
        if limits.goal_met is not None and (facts["goal_met"] or 0) < limits.goal_met:
            facts["why"] = facts["why"] or "the SLO is not met often enough"

    def _found(self) -> Found:
        left = [one for one in self.pool if one.candidate.identity not in self.state.tried]
        reasons = Counter(self.state.hopeless(one) for one in left)
        untried = reasons.pop("", 0)
        return Found(
            tuple((pooled.candidate, record) for pooled, record in self.state.trials),
            dict(sorted(reasons.items())),
            untried,
            len(self.pool),
            self.stopped,
            self.runner,
        )


def _key(recipe: Recipe, plan: Plan) -> str:
    """Equal for searches whose trials mean the same: how long they may go on is left out."""
    options = recipe.optimise
    assert options is not None
    return content_key(
        {
            "recipe": recipe.lock(),
            "optimise": options.model_dump(
                mode="json", exclude={"minutes", "trials", "finalists"}, exclude_unset=True
            ),
            "load": next(stage.key for stage in plan.stages if stage.kind == "load"),
            "code": {kind: code_version(kind) for kind in _KINDS},
        }
    )


def _study(store: Store, key: str, seed: int) -> Study:
    """The study of a search, made or found again.

    Raises RunError when its file cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    path = store.root / DIRECTORY / f"{key[:16]}.sqlite3"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name="search",
            directions=["minimize", "minimize"],
            sampler=_sampler(seed),
            load_if_exists=True,
        )
    except Exception as error:  # of SQLite, SQLAlchemy or Alembic
        raise RunError(
            f"the search's record cannot be used: {first_line(error)}",
            where=str(path),
            fix="delete that file: trials are then taken from the store again",
        ) from error


def _sampler(seed: int, draws: int = _DRAWS) -> Any:
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, multivariate=True, n_startup_trials=1, n_ei_candidates=draws)


def _target(measure: Any) -> Target | None:
    """The engine that serves, on this machine."""
    from compressor.preflight import llama_cpp_targets, own_target, vllm_targets

    if measure is None:
        return None
    if measure.engine == "vllm":
        return vllm_targets()[0]
    if measure.engine == "llama.cpp":
        return llama_cpp_targets()[0]
    return own_target(measure.dtype)


def _cpus() -> int:
    from compressor.measure.runner import available_cpus

    return available_cpus()
