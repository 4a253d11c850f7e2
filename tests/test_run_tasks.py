"""Whole runs with tasks on a tiny model: shared, recomputed, and asked of a server too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.errors import RecipeError
from compressor.evaluate.samples import read_samples
from compressor.recipe import load_recipe
from compressor.record import write_manifest
from compressor.verify import verify
from tests.completions import serving
from tests.edits import edit, named
from tests.projects import RECIPE, completed, compress, write

TASKS = ["builtin:social_iqa", {"task": "builtin:social_iqa_typos", "limit": 4}, "builtin:refusal"]


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        **{key: RECIPE[key] for key in ("version", "model", "export")},
        "variants": {"int4": RECIPE["variants"]["int4-rtn"], "again": {"quantize": []}},
        "evaluate": {**RECIPE["evaluate"], "drift": None, "tasks": TASKS, "tasks_limit": 6},
    } | changes


def stages(project: Path) -> dict[str, dict[str, Any]]:
    newest = max((project / "runs" / "recipe").iterdir(), key=lambda p: p.stat().st_mtime)
    return {stage["name"]: stage for stage in json.loads((newest / "stages.json").read_text())}


def test_tasks_are_kept_document_by_document_shared_and_made_again(project: Path) -> None:
    completed(project, recipe())
    (run,) = (project / "runs" / "recipe").iterdir()
    done = stages(project)
    files = {
        "builtin_social_iqa.jsonl": 6, "builtin_social_iqa_typos.jsonl": 4,
        "builtin_refusal.jsonl": 6,
    }  # fmt: skip
    for variant in ("baseline", "int4", "again"):
        result = done[f"tasks:{variant}"]["result"]
        assert [task["task"] for task in result["tasks"]] == [
            "builtin:social_iqa", "builtin:social_iqa_typos", "builtin:refusal"
        ]  # fmt: skip
        assert result["tokens"] > 1.5 * result["tokens_computed"] > 0
        for name, count in files.items():
            assert len(read_samples(run / "tasks" / variant / name)) == count
    samples = {v: (run / "tasks" / v / "builtin_social_iqa.jsonl").read_text() for v in
               ("baseline", "int4", "again")}  # fmt: skip
    assert samples["again"] == samples["baseline"] != samples["int4"]
    assert done["tasks:again"]["key"] != done["tasks:baseline"]["key"]  # asked anew
    found = verify(run)
    assert found.ok, [failure.sentence for failure in found.failures]
    assert {c.name: c.count for c in found.checks}["task figures recomputed"] > 30

    other = recipe(variants={"int8": {"quantize": [{"rtn": {"scheme": "W8A16"}}]}})
    completed(project, other)
    done = stages(project)
    assert done["tasks:baseline"]["cached"] and not done["tasks:int8"]["cached"]

    path = run / "tasks" / "int4" / "builtin_social_iqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["scores"]["acc"] = 1 - rows[0]["scores"]["acc"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(run)
    failures = named(run)
    assert ("tasks/int4/builtin_social_iqa.jsonl", "sha256") in failures
    assert any(key.endswith("metrics.acc.value") for _, key in failures)


def test_what_another_tool_quantized_is_asked_itself(project: Path) -> None:
    """Not the baseline in its place: the same codes answer the same."""
    completed(project, recipe())
    (first,) = (project / "runs" / "recipe").iterdir()
    source = str(first / "artifacts" / "int4" / "compressed-tensors")
    completed(project, recipe(variants={"theirs": {"import": {"source": source}}}))
    (run,) = (path for path in (project / "runs" / "recipe").iterdir() if path != first)
    file = "builtin_social_iqa.jsonl"
    theirs = (run / "tasks" / "theirs" / file).read_text()
    assert theirs == (first / "tasks" / "int4" / file).read_text()
    assert theirs != (run / "tasks" / "baseline" / file).read_text()


def test_an_altered_figure_of_a_task_is_named(project: Path) -> None:
    completed(project, recipe())
    (run,) = (project / "runs" / "recipe").iterdir()

    def better(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["name"] == "tasks:int4":
                row["result"]["tasks"][0]["metrics"]["acc"]["value"] += 0.1

    edit(run / "stages.json", better)
    write_manifest(run)
    keys = [key for file, key in named(run) if file == "stages.json"]
    assert any(key.endswith(".result.tasks[0].metrics.acc.value") for key in keys)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["builtin:social_iq"], "did you mean 'builtin:social_iqa'"),
        ([{"path": "mine.yaml"}], "no YAML file or directory 'mine.yaml'"),
        ([{"axes": "safety", "task": "builtin:refusal"}], "did you mean 'axis'"),
        ([{"axis": "safety"}], "give `task`"),
    ],
)
def test_a_wrong_task_is_refused_before_anything_runs(
    project: Path, tasks: list[Any], words: str
) -> None:
    made = recipe()
    made["evaluate"] = {**made["evaluate"], "tasks": tasks}
    write(project, made)
    lines = (project / "recipe.yaml").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.strip() == "tasks:") + 1
    done = compress(project, "plan", "recipe.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in done.stderr and f"recipe.yaml:{line}" in done.stderr
    assert not (project / "runs").exists()


def test_tasks_that_cannot_be_computed_as_asked_are_refused(project: Path) -> None:
    endpoint = {"url": "https://example.com/v1", "model": "m", "chat": True}
    chat = {"engine": "endpoint", "endpoints": {"baseline": endpoint}}
    for changes, settings, words in (
        ({}, {"tasks_served": True}, "engine vllm or endpoint"),
        ({"measure": chat}, {"tasks_served": True}, "gives no log-probabilities"),
        (
            {"variants": {"nf4": {"quantize": ["bitsandbytes"]}}},
            {"tasks_dtype": "bfloat16"},
            "nf4 is evaluated in float32",
        ),
    ):
        made = recipe(**changes)
        made["evaluate"] = {**made["evaluate"], **settings}
        with pytest.raises(RecipeError, match=words):
            load_recipe(write(project, made))


def test_an_endpoint_gives_the_figures_of_the_model_that_it_serves(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a real HTTP interface; the key comes from the environment."""
    from compressor.plan import make_plan
    from compressor.progress import SilentProgress
    from compressor.run import _Outcome, _run_stage
    from compressor.store import Store

    model = AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32).eval()
    with serving(model, AutoTokenizer.from_pretrained(project / "model"), key="secret") as url:
        made = recipe(
            measure={
                "engine": "endpoint",
                "endpoints": {"baseline": {"url": url, "model": "m", "key_variable": "KEY"}},
            }
        )
        made["evaluate"] = {**made["evaluate"], "tasks_served": True}
        plan = make_plan(load_recipe(write(project, made)), Store(project / "store"))
        monkeypatch.setenv("KEY", "secret")
        outcome = _Outcome({}, set(), {})
        wanted = ("load", "tasks:baseline", "served:baseline")
        for stage in plan.stages:
            if stage.name in wanted:
                _run_stage(plan, stage, outcome, SilentProgress(), project / "log.jsonl")
    assert "served:int4" not in {stage.name for stage in plan.stages}
    local, served = (outcome.done[name] for name in wanted[1:])
    for own, other in zip(local.result["tasks"], served.result["tasks"], strict=True):
        assert own["metrics"] == other["metrics"]
        samples = (read_samples(stored.path / own["file"]) for stored in (local, served))
        for one, two in zip(*samples, strict=True):
            assert (one.id, one.prompt_sha256, one.choice, one.response) == (
                two.id, two.prompt_sha256, two.choice, two.response
            )  # fmt: skip
            if one.loglikelihoods:
                assert one.loglikelihoods == pytest.approx(two.loglikelihoods, rel=1e-4)
