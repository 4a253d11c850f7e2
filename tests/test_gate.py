"""The gate and `compress compare` through the command line: null, damaged and crude variants."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from junitparser import JUnitXml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.quality import gate_refusals
from compressor.store import file_sha256
from compressor.verify import verify
from tests import tiny
from tests.projects import compress

RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "model"},
    "variants": {
        "again": {"quantize": []},
        "int8": {"quantize": [{"rtn": {"scheme": "W8A16", "group_size": -1}}]},
        "int2": {"quantize": [{"rtn": {"scheme": "W2A16", "group_size": 128}}]},
    },
    "evaluate": {
        "texts": [{"name": "novel", "source": "builtin:novel", "max_tokens": 1024}],
        "length": 64,
        "positions": {"length": 256, "bins": 3, "max_tokens": 1024},
        "drift": {"samples": 5, "output_length": 12, "batch_size": 2},
        "gate": {"metrics": {"kl_mean": 0.02, "top1_agreement": "90%"}},
    },
}


def recipe(path: Path, name: str, **changes: Any) -> None:
    made = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        made[key] = value
    plain = json.loads(json.dumps(made))  # no value twice: YAML would alias it
    (path / f"{name}.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate")
    tiny.build("llama", path / "model", hidden_size=128, intermediate_size=256)
    recipe(path, "r")
    done = compress(path, "run", "r.yaml")
    assert done.returncode == 3, done.stdout + done.stderr
    (path / "shown").write_text(done.stdout + done.stderr)
    return path


def run_of(project: Path, name: str = "r") -> Path:
    (found,) = (project / "runs" / name).iterdir()
    return found


def report(run: Path) -> dict[str, Any]:
    made = json.loads((run / "report" / "report.json").read_text())
    return {variant["name"]: variant for variant in made["variants"]}


def test_the_baseline_again_loses_nothing_and_passes(project: Path) -> None:
    null = report(run_of(project))["again"]
    (row,) = null["quality"]
    assert row["kl_mean"] == row["kl_p99"] == row["perplexity_change"] == 0.0
    assert row["top1_agreement"] == 1.0 and row["kl_ci"] == [0.0, 0.0]
    assert null["drift"]["equal"] == null["drift"]["prompts"] == 5
    assert {part["perplexity_change"] for part in null["positions"][0]["bins"]} == {0.0}
    assert [row["finding"] for row in null["retained"]] == ["equal"]
    assert null["gate"]["passed"]
    # It was scored anew: what it shows is not the baseline's own record.
    stages = json.loads((run_of(project) / "stages.json").read_text())
    keys = {stage["name"]: stage["key"] for stage in stages}
    assert keys["evaluate:again"] != keys["evaluate:baseline"]


def test_two_bits_fail_and_every_limit_is_named(project: Path) -> None:
    run = run_of(project)
    variants = report(run)
    assert variants["baseline"]["gate"] is None
    assert variants["int8"]["gate"]["passed"], variants["int8"]["gate"]
    failed = variants["int2"]["gate"]
    assert not failed["passed"]
    assert [limit["metric"] for limit in failed["limits"] if not limit["passed"]] == [
        "kl_mean",
        "top1_agreement",
    ]
    shown = (project / "shown").read_text()
    assert "int2 failed the gate" in shown.replace("\n", " ") and "Traceback" not in shown
    refused = gate_refusals(run)
    assert set(refused) == {"int2"} and len(refused["int2"]) == 2
    marked = json.loads((run / "gate.json").read_text())["variants"]
    assert marked["int2"]["artifacts"] == ["artifacts/int2/compressed-tensors"]
    assert marked["again"] == {
        "passed": True, "failed": [], "artifacts": ["artifacts/again/compressed-tensors"],
    }  # fmt: skip


def test_a_run_without_a_failing_variant_exits_with_0_and_the_quiet_one_says_why(
    project: Path,
) -> None:
    some = ("run", "r.yaml", "--output", "some", "--quiet")
    done = compress(project, *some, "--only", "again", "--only", "int8")
    assert done.returncode == 0, done.stderr
    done = compress(project, *some, "--only", "int2")
    assert done.returncode == 3 and "int2 failed the gate" in done.stderr


def test_a_gate_that_is_gone_leaves_no_mark(project: Path) -> None:
    open_gate = copy.deepcopy(RECIPE["evaluate"])
    recipe(project, "gone")
    assert compress(project, "run", "gone.yaml", "--quiet").returncode == 3
    del open_gate["gate"]
    recipe(project, "gone", evaluate=open_gate)
    assert compress(project, "run", "gone.yaml", "--quiet").returncode == 0
    run = run_of(project, "gone")
    assert not (run / "gate.json").exists() and gate_refusals(run) == {}


def test_doubled_scales_of_one_block_fail(project: Path, tmp_path: Path) -> None:
    """The store's own codes are damaged, and the variant is evaluated anew."""
    for name in ("model", ".compressor"):
        shutil.copytree(project / name, tmp_path / name)
    recipe(tmp_path, "r", variants={"int8": RECIPE["variants"]["int8"]})
    done = compress(tmp_path, "run", "r.yaml", "--quiet")
    assert done.returncode == 0, done.stderr
    stages = {
        stage["name"]: stage for stage in json.loads((run_of(tmp_path) / "stages.json").read_text())
    }
    objects = tmp_path / ".compressor" / "objects"

    def stored(name: str) -> Path:
        key = stages[name]["key"]
        return objects / key[:2] / key

    blocks = sorted(stored("quantize:int8").glob("*.safetensors"))
    damaged = 0
    for path in blocks[:1]:
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("scale"):
                tensors[name] = tensors[name] * 2
                damaged += 1
        path.unlink()  # a link of the first run's
        save_file(tensors, path)
        manifest = stored("quantize:int8") / "stage.json"  # as if it had been made like that
        made = json.loads(manifest.read_text())
        entry = next(one for one in made["files"] if one["path"] == path.name)
        entry |= {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        manifest.unlink()
        manifest.write_text(json.dumps(made))
    assert damaged, [path.name for path in blocks]
    shutil.rmtree(stored("evaluate:int8"))
    done = compress(tmp_path, "run", "r.yaml", "--quiet")
    assert done.returncode == 3, done.stderr
    assert "int8 failed the gate" in done.stderr


def test_continuations_are_the_models_own_greedy_ones(project: Path) -> None:
    run = run_of(project)
    model = AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32)
    prompts = json.loads((run / "texts" / "prompts.json").read_text())
    lines = (run / "drift" / "baseline.jsonl").read_text().splitlines()
    for prompt, line in zip(prompts, lines, strict=True):
        ids = torch.tensor([prompt["tokens"]])
        golden = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert json.loads(line)["tokens"] == golden[0, ids.shape[1] :].tolist()
    drift = report(run)["int2"]["drift"]
    assert drift["equal"] < 5 and len(drift["examples"]) == 3
    own = [json.loads(x) for x in (run / "drift" / "int2.jsonl").read_text().splitlines()]
    assert drift["examples"][0]["variant"] == own[0]["text"]


def test_positions_are_of_the_long_windows(project: Path) -> None:
    run = run_of(project)
    (text,) = report(run)["int2"]["positions"]
    assert text["length"] == 256
    assert [(part["first"], part["last"]) for part in text["bins"]] == [
        (1, 85),
        (86, 170),
        (171, 255),
    ]
    scores = load_file(run / "scores" / "int2" / "long" / "novel.safetensors")
    assert text["bins"][1]["perplexity"] == pytest.approx(
        float(scores["nll"][:, 85:170].double().mean().exp())
    )
    assert text["bins"][1]["kl_mean"] == pytest.approx(float(scores["kl"][:, 85:170].mean()))


@pytest.mark.parametrize(
    ("file", "change", "where"),
    [
        (
            "report/report.json",
            lambda r: r["variants"][3]["gate"].update(passed=True),
            ("report/report.json", "variants[3].gate.passed"),
        ),
        (
            "gate.json",
            lambda g: g["variants"]["int2"].update(passed=True),
            ("gate.json", "variants.int2.passed"),
        ),
        (
            "report/report.json",
            lambda r: r["variants"][3]["drift"].update(equal=5),
            ("report/report.json", "variants[3].drift.equal"),
        ),
        (
            "report/report.json",
            lambda r: r["variants"][3]["retained"][0].update(finding="no-loss"),
            ("report/report.json", "variants[3].retained[0].finding"),
        ),
    ],
)
def test_forged_quality_is_found(
    project: Path, tmp_path: Path, file: str, change: Any, where: tuple[str, str]
) -> None:
    run = Path(shutil.copytree(run_of(project), tmp_path / "run"))
    assert verify(run).ok, [one.sentence for one in verify(run).failures]
    content = json.loads((run / file).read_text())
    change(content)
    (run / file).unlink()
    (run / file).write_text(json.dumps(content))
    assert where in {(one.file, one.key) for one in verify(run).failures}


def test_compare_finds_what_became_worse_and_ci_reads_it(project: Path) -> None:
    worse = {"int8": RECIPE["variants"]["int2"], "int2": RECIPE["variants"]["int2"]}
    recipe(project, "worse", variants=worse)
    assert compress(project, "run", "worse.yaml", "--quiet").returncode == 3
    first, second = run_of(project), run_of(project, "worse")
    done = compress(project, "compare", str(first), str(first), "--junit", "same.xml")
    assert done.returncode == 0, done.stdout + done.stderr
    same = JUnitXml.fromfile(str(project / "same.xml"))
    assert same.failures == 0 and same.tests == sum(1 for suite in same for _ in suite) > 8
    done = compress(project, "compare", str(first), str(second), "--junit", "worse.xml")
    assert done.returncode == 3, done.stdout + done.stderr
    suites = {suite.name: suite for suite in JUnitXml.fromfile(str(project / "worse.xml"))}
    failed = {
        (name, case.name) for name, suite in suites.items() for case in suite if not case.is_passed
    }
    assert ("int8", "gate") in failed and ("again", "the variant") in failed
    assert not any(name in ("int2", "baseline") for name, _ in failed)
    (case,) = [case for case in suites["again"] if not case.is_passed]
    assert "not in the second run" in case.result[0].message


def test_compare_needs_two_runs_and_shares(project: Path) -> None:
    run = str(run_of(project))
    done = compress(project, "compare", run, "nowhere")
    assert done.returncode == 2 and "no report can be read" in done.stderr
    done = compress(project, "compare", run, run, "--max-loss", "much")
    assert done.returncode == 2 and "'much' is no share" in done.stderr
    done = compress(project, "compare", run, run, "--json")
    assert done.returncode == 0 and {one["kind"] for one in json.loads(done.stdout)} == {
        "quality",
        "size",
        "gate",
    }


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"gate": {"metrics": {"acc": "1%"}}}, "the limit on acc needs `evaluate.tasks:`"),
        ({"gate": {"metrics": {"drift": 0.5}}, "drift": None}, "needs `evaluate.drift:`"),
        ({"gate": {"metrics": {"kl": 0.5}}}, "did you mean 'kl_"),
        ({"gate": {}}, "give `max_loss`"),
        ({"positions": {"length": 4096}}, "asks for 4096"),
        ({"positions": {"length": 1024, "max_tokens": 64}}, ""),
    ],
)
def test_what_cannot_be_judged_is_refused(
    project: Path, evaluate: dict[str, Any], words: str
) -> None:
    recipe(project, "wrong", evaluate=RECIPE["evaluate"] | evaluate)
    done = compress(project, "run", "wrong.yaml", "--only", "again", "--quiet")
    assert done.returncode == (2 if words else 0), done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
