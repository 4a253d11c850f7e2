"""The search against trying everything, after an interruption, and twice."""

from __future__ import annotations

import itertools
import json
import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import RunError
from compressor.optimise import search as module
from compressor.optimise import trials
from compressor.optimise.job import Optimised, optimise
from compressor.optimise.search import _Search, search
from compressor.optimise.space import Candidate
from compressor.plan import make_plan
from compressor.progress import SilentProgress
from compressor.recipe import load_recipe
from compressor.store import Store
from compressor.verify import verify
from tests import tiny

SPACE: dict[str, Any] = {
    "algorithms": [["rtn"], ["gptq"]],
    "schemes": ["W8A16", "W4A16", "W3A16"],
    "group_sizes": [32, 64],
}
RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "model"},
    "calibration": {"source": "builtin:calibration", "samples": 4, "length": 64},
    "optimise": {
        "minimise": "size",
        "subject_to": {"max_loss": "2%", "decide_on": "point"},
        "space": SPACE,
        "tokens": 384,
        "few_tokens": 128,
        "sensitivity_samples": 4,
    },
    "evaluate": {
        "texts": [{"name": "novel", "source": "builtin:novel", "max_tokens": 384}],
        "length": 64,
        "drift": None,
    },
}

COSTS = {"W8A16": 9.0, "W4A16": 7.0}  # where the baseline costs 10


def write(directory: Path, recipe: dict[str, Any]) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("search")
    tiny.build("llama", directory / "model")
    write(directory, RECIPE)
    return directory


def run(directory: Path, store: Path) -> Optimised:
    recipe = load_recipe(directory / "recipe.yaml")
    return optimise(recipe, Store(store), SilentProgress())


@pytest.fixture(scope="module")
def made(place: Path) -> Optimised:
    return run(place, place / "store")


def test_what_the_end_lacks_is_told_before_the_search(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("compressor.numerics.bitsandbytes.version", missing)
    variants = {"nf4": {"quantize": [{"bitsandbytes": {}}]}}
    path = place / "bitsandbytes.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "variants": variants}))
    with pytest.raises(RunError, match="bitsandbytes is not installed"):
        optimise(load_recipe(path), Store(tmp_path / "store"), SilentProgress())
    assert not list((tmp_path / "store").glob("**/*.safetensors"))  # nothing was computed


def test_the_winner_is_that_of_trying_everything(place: Path, made: Optimised) -> None:
    searcher = _Search(
        load_recipe(place / "recipe.yaml"), Store(place / "store"), SilentProgress(), place / "log"
    )
    every = searcher.space.pool
    assert len(every) == 10  # 2 x (W8A16 + 2 schemes x 2 group sizes)
    best = {}
    for candidate in every:
        quality = searcher.runner.quality(candidate, 384)
        if trials.violation(searcher.options.subject_to, quality) <= 0:
            best[candidate.name] = searcher.runner.artifact(candidate)[0]
    record = made.record
    smallest = min(best.values())
    winners = {name for name, size in best.items() if size == smallest}
    ranked = sorted(
        (trial for trial in record.trials if trial.name in best and trial.objective is not None),
        key=lambda trial: trial.objective or 0,
    )
    assert ranked[0].name in winners and ranked[0].objective == smallest
    classes = {candidate.name: candidate.speed_class for candidate in every}
    passed = [classes[one.name] for one in record.finalists if one.passed]
    assert len(passed) == len(set(passed)) == 3  # none of them computes the same as another
    full = [trial for trial in record.trials if trial.loss is not None]
    assert len(full) <= len(every) // 2
    assert len(record.trials) + sum(record.excluded.values()) + record.untried == len(every)


def test_the_choice_is_judged_anew_and_written_as_an_ordinary_recipe(
    place: Path, made: Optimised
) -> None:
    record, run_dir = made.record, made.result.run_dir
    assert record.chosen is not None
    chosen = next(v for v in made.result.report["variants"] if v["name"] == record.chosen)
    assert chosen["gate"]["passed"] and chosen["size_bytes"] == min(
        one.objective for one in record.finalists if one.passed and one.objective is not None
    )
    assert made.result.report["optimise"] == record.model_dump(mode="json")
    assert json.loads((run_dir / "optimise.json").read_text()) == record.model_dump(mode="json")
    page = (run_dir / "report" / "report.md").read_text()
    assert "Search: the finalists" in page and record.sentence in page.replace("\\", "")
    assert verify(run_dir).ok
    (place / "optimised.yaml").write_text((run_dir / "optimised.yaml").read_text())
    plain = load_recipe(place / "optimised.yaml")
    assert plain.optimise is None and list(plain.variants) == [record.chosen]
    plan = make_plan(plain, Store(place / "store"))
    assert not plan.remaining  # every stage is one that the search made


def test_a_search_again_does_nothing_and_says_the_same(place: Path, made: Optimised) -> None:
    stages = sorted((place / "store" / "objects").glob("*/*"))
    again = run(place, place / "store")
    assert again.record == made.record
    assert sorted((place / "store" / "objects").glob("*/*")) == stages


def test_an_interrupted_search_ends_with_the_same_answer(
    place: Path, made: Optimised, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The stages are there already, so that times are the same; the study is begun anew.
    store = Store(place / "store")
    (study,) = (store.root / module.DIRECTORY).glob("*.sqlite3")
    study.rename(tmp_path / "kept")
    recipe = load_recipe(place / "recipe.yaml")
    calls = 0
    race = _Search._race

    def stopped(self: _Search, pooled: Any, facts: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        race(self, pooled, facts)

    monkeypatch.setattr(_Search, "_race", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(recipe, store, SilentProgress(), tmp_path / "log")
    found = search(recipe, store, SilentProgress(), tmp_path / "log")
    assert calls == 1 + len(found.trials)  # two were done before, and one was begun again
    assert [record for _, record in found.trials] == made.record.trials


def test_proposals_follow_from_the_seed_and_the_trials(
    place: Path, made: Optimised, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    assert recipe.optimise is not None
    store = Store(place / "store")
    monkeypatch.setattr(module, "_STARTUP", 1)
    monkeypatch.setattr(module.State, "hopeless", lambda *_: "")  # all candidates are tried
    orders = []
    for seed in (1, 1, 2):
        options = recipe.optimise.model_copy(update={"seed": seed, "trials": 8})
        found = search(
            recipe.model_copy(update={"optimise": options}),
            store,
            SilentProgress(),
            place / "log",
        )
        for study in (store.root / module.DIRECTORY).glob("*.sqlite3"):
            study.unlink()
        orders.append([record.name for _, record in found.trials])
        assert {record.origin for _, record in found.trials} == {"proxies", "sampler"}
        assert found.stopped == "8 trials"
    assert orders[0] == orders[1] != orders[2]


def test_a_variant_of_the_recipe_is_a_candidate_under_its_name(
    place: Path, made: Optimised, tmp_path: Path
) -> None:
    value = json.loads(json.dumps(RECIPE))
    value["model"]["source"] = str(place / "model")
    value["variants"] = {
        "mine": {"quantize": [{"gptq": {"scheme": "W4A16", "group_size": 32, "damp": 0.02}}]}
    }
    value["optimise"]["trials"] = 1
    done = run(write(tmp_path, value).parent, place / "store")
    assert [trial.name for trial in done.record.trials] == ["mine"]
    assert done.record.stopped == "1 trials"
    assert any(v["name"] == "mine" for v in done.result.report["variants"])


@pytest.fixture
def priced(place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that minimises cost, on a machine that is half as fast at each further measurement
    (`COSTS` on the first). All candidates are tried, in their order."""
    value = json.loads(json.dumps(RECIPE))
    value["model"]["source"] = str(place / "model")
    value["optimise"] |= {
        "minimise": "cost",
        "subject_to": {"max_loss": 1, "decide_on": "point"},
        "space": {
            "algorithms": [["rtn"], [{"rtn": {"observer": "mse"}}]],
            "schemes": ["W8A16", "W4A16"],
            "group_sizes": [32],
            "ignore": [[], [".*down_proj"]],
        },
    }
    value["measure"] = {"engine": "transformers"}
    pace = itertools.count()

    def measured(self: trials.Trials, candidate: Candidate) -> dict[str, Any]:
        times = 2.0 ** next(pace)
        costs = {"own": COSTS[candidate.scheme], "baseline": 10.0}
        return {
            name: {"goal_met_share": 1.0, "cost_usd_per_mtok_output": {"value": cost * times}}
            for name, cost in costs.items()
        }

    monkeypatch.setattr(trials.Trials, "measured", measured)
    monkeypatch.setattr(module.State, "hopeless", lambda *_: "")
    monkeypatch.setattr(module.State, "promising", lambda _, pool: pool[0])
    monkeypatch.setattr(module, "_STARTUP", 100)
    return value


def searched(value: dict[str, Any], place: Path, directory: Path) -> module.Found:
    recipe = load_recipe(write(directory, value))
    return search(recipe, Store(place / "store"), SilentProgress(), directory / "log")


def test_a_machine_that_gets_slower_does_not_decide(
    priced: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    found = searched(priced, place, tmp_path)
    own = [(candidate, trial) for candidate, trial in found.trials if trial.shared is None]
    assert [trial.baseline_objective for _, trial in own] == [10.0, 20.0, 40.0, 80.0]
    for candidate, trial in found.trials:
        assert trial.objective == pytest.approx(COSTS[candidate.scheme])
    assert found.ranked[0][0].scheme == "W4A16"


def test_one_that_misses_a_limit_is_measured_for_the_others_that_its_kernel_computes(
    priced: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced["optimise"]["subject_to"] = {"metrics": {"kl_mean": 0.0}}
    monkeypatch.setattr(module, "_FEW_SLACK", math.inf)  # all tokens decide
    found = searched(priced, place, tmp_path)
    measured = [candidate for candidate, trial in found.trials if trial.reached == "measured"]
    assert len(found.trials) == 8
    assert sorted(candidate.scheme for candidate in measured) == ["W4A16", "W8A16"]
    assert all(trial.why == "limits missed" for _, trial in found.trials)
    assert not found.ranked


def test_nothing_that_keeps_the_limits_means_the_baseline(place: Path, tmp_path: Path) -> None:
    value = json.loads(json.dumps(RECIPE))
    value["model"]["source"] = str(place / "model")
    value["optimise"]["subject_to"] = {"metrics": {"kl_mean": 0.0}}
    value["optimise"]["space"]["schemes"] = ["W4A16"]
    done = run(write(tmp_path, value).parent, place / "store")
    assert done.record.chosen is None and "deploy that" in done.record.sentence
    assert all(trial.why for trial in done.record.trials)
    assert not (done.result.run_dir / "optimised.yaml").exists()


def test_a_broken_study_is_one_clear_error(place: Path, tmp_path: Path) -> None:
    path = tmp_path / module.DIRECTORY / f"{'a' * 16}.sqlite3"
    path.parent.mkdir()
    path.write_text("no database")
    with pytest.raises(RunError, match="delete that file"):
        module._study(Store(tmp_path), "a" * 64, 0)


def test_equal_work_has_one_key_whatever_a_variant_is_called(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    steps = {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]}
    from compressor.recipe import derive

    plans = [
        make_plan(derive(recipe, variants={name: steps}), Store(place / "store"))
        for name in ("mine", "yours")
    ]
    keys = [{stage.kind: stage.key for stage in plan.stages} for plan in plans]
    assert keys[0]["quantize"] == keys[1]["quantize"]
    assert keys[0]["evaluate"] == keys[1]["evaluate"]
    assert keys[0]["export"] != keys[1]["export"]  # whose card and record name the variant
