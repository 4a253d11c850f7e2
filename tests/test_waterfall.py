"""Variants that differ in how they are served, and the waterfall, from a recipe to `verify`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.measure.samples import read_samples, write_samples
from compressor.plan import Plan, make_plan
from compressor.progress import SilentProgress
from compressor.recipe import load_recipe
from compressor.record import recorded_key, write_manifest
from compressor.run import execute
from compressor.store import Store
from compressor.verify import verify
from tests import tiny
from tests.edits import edit, named

INT4 = [{"rtn": {"scheme": "W4A16", "group_size": 32}}]
RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "model"},
    "variants": {
        "int4": {"quantize": INT4},
        "int4-continuous": {"quantize": INT4, "serve": {"batching": "continuous"}},
        "plain-continuous": {"serve": {"batching": "continuous"}},
    },
    "evaluate": {
        "texts": [{"name": "novel", "source": "builtin:novel", "max_tokens": 256}],
        "length": 64,
    },
    "measure": {
        "batching": "static",
        "dtype": "float32",
        "workload": {
            "input_length": 8, "output_length_range": [2, 6], "concurrency": [2], "requests": 4,
            "rounds": 2,
        },
        "waterfall": [
            {"variant": "int4", "technique": "int4"},
            {"variant": "int4-continuous", "technique": "continuous-batching"},
        ],
    },
}  # fmt: skip
SAMPLES = "samples/int4-continuous.jsonl.gz"


def planned(path: Path, recipe: dict[str, Any], only: tuple[str, ...] = ()) -> Plan:
    file = path / "r.yaml"
    file.write_text(json.dumps(recipe))  # which is YAML, without aliases
    loaded = load_recipe(file)
    return make_plan(loaded, Store(loaded.store_dir), only)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("waterfall")
    tiny.build("llama", path / "model")
    return path


@pytest.fixture(scope="module")
def made(project: Path) -> Path:
    done = execute(planned(project, RECIPE), SilentProgress())
    assert not done.failed_variants
    return done.run_dir


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "moved"))


def test_stages_of_equal_compression_have_equal_keys(project: Path) -> None:
    keys = {stage.name: stage.key for stage in planned(project, RECIPE).stages}
    for kind, end in (("quantize", ""), ("export", ":compressed-tensors"), ("evaluate", "")):
        assert keys[f"{kind}:int4{end}"] == keys[f"{kind}:int4-continuous{end}"]
        if kind != "quantize":
            assert keys[f"{kind}:plain-continuous{end}"] == keys[f"{kind}:baseline{end}"]
    assert "quantize:plain-continuous" not in keys
    changed = json.loads(json.dumps(RECIPE))
    changed["variants"]["int4-continuous"]["serve"]["dtype"] = "float32"
    again = {stage.name: stage.key for stage in planned(project, changed).stages}
    assert {name for name in keys if keys[name] != again[name]} == {"measure"}


def test_llama_cpp_measures_the_gguf_artifacts_with_the_flags_of_each(project: Path) -> None:
    flags = {"flags": ["--threads", "1"]}
    recipe = {key: RECIPE[key] for key in ("version", "model")} | {
        "variants": {"int4": {"quantize": INT4}, "one": {"serve": flags}},
        "measure": {"engine": "llama.cpp"},
        "export": ["compressed-tensors", "gguf"],
    }
    (measured,) = [s for s in planned(project, recipe).stages if s.kind == "measure"]
    assert {f"export:{name}:gguf" for name in ("baseline", "int4", "one")} <= {*measured.inputs}
    assert measured.config["serve"] == {"one": flags}


def test_report_has_a_gain_for_every_step(made: Path) -> None:
    report = json.loads((made / "report" / "report.json").read_text())
    (point,) = report["techniques"]
    assert point["concurrency"] == 2 and not point["left_out"]
    assert [step["name"] for step in point["steps"]] == ["baseline", "int4", "int4-continuous"]
    rows = {v["name"]: v["performance"][0] for v in report["variants"]}
    rates = [rows[step["name"]]["throughput_tok_s"]["value"] for step in point["steps"]]
    for before, after, step in zip(rates, rates[1:], point["steps"][1:], strict=False):
        assert step["step_gain"]["value"] == pytest.approx(after / before)
        assert step["step_gain"]["low"] < step["step_gain"]["value"] < step["step_gain"]["high"]
        assert step["total_gain"]["value"] == pytest.approx(
            step["throughput_tok_s"]["value"] / rates[0]
        )
    assert point["steps"][2]["total_gain"] != point["steps"][2]["step_gain"]
    assert point["steps"][1]["claim"] is None
    assert point["steps"][2]["claim"]["low"] == 3.0
    serving = {v["name"]: v["serving"]["batching"] for v in report["variants"]}
    assert serving == {
        "baseline": "static", "int4": "static", "int4-continuous": "continuous",
        "plain-continuous": "continuous",
    }  # fmt: skip
    plain = report["variants"][3]
    assert plain["algorithm"] is None and plain["quality"][0]["kl_mean"] == 0
    assert plain["size_bytes"] == report["variants"][0]["size_bytes"]
    assert {"waterfall.svg", "waterfall.png"} <= {p.name for p in (made / "report").iterdir()}
    text = (made / "report" / "report.md").read_text()
    assert "Gain of each technique" in text and "waterfall.svg" in text and "Orca" in text
    assert "continuous batching" in text


def test_a_moved_run_holds(run: Path) -> None:
    found = verify(run)
    assert found.ok, [one.sentence for one in found.failures]


def test_lengths_are_spread_and_equal_for_all_variants(made: Path) -> None:
    asked: dict[str, list[int]] = {}
    for path in (made / "samples").iterdir():
        rows = sorted(read_samples(path), key=lambda row: row.request_id)
        asked[path.name] = [row.asked_tokens for row in rows if row.asked_tokens is not None]
        assert asked[path.name] == [row.output_tokens for row in rows]
    assert len(asked) == 4 and len(set(map(tuple, asked.values()))) == 1
    assert len(set(next(iter(asked.values())))) > 1


def test_another_length_is_named_although_the_hash_was_fixed(run: Path) -> None:
    rows = read_samples(run / SAMPLES)
    longer = (*rows[0].token_times_s, rows[0].end_s + 1e-4)
    rows[0] = dataclasses.replace(
        rows[0], token_times_s=longer, output_tokens=len(longer), asked_tokens=len(longer)
    )
    digest = write_samples(run / SAMPLES, rows)
    edit(
        run / "ledger.json",
        lambda ledger: ledger["samples"]["int4-continuous"].update(sha256=digest),
    )
    write_manifest(run)
    sentence = named(run)[SAMPLES, rows[0].request_id]
    assert "its prompt's length is" in sentence


def test_altered_serving_settings_are_named(run: Path) -> None:
    def static(ledger: dict[str, Any]) -> None:
        ledger["serving"]["int4-continuous"]["batching"] = "static"
        ledger["engines"]["plain-continuous"]["batching"] = "static"

    edit(run / "ledger.json", static)
    lock = yaml.safe_load((run / "recipe.lock.yaml").read_text())
    lock["variants"]["plain-continuous"]["serve"]["batching"] = "static"
    (run / "recipe.lock.yaml").write_text(yaml.safe_dump(lock, sort_keys=False))
    write_manifest(run)
    failures = named(run)
    assert ("ledger.json", 'serving["int4-continuous"].batching') in failures
    assert ("ledger.json", 'engines["plain-continuous"].batching') in failures
    assert ("recipe.lock.yaml", "variants.plain-continuous.serve.batching") in failures


def test_altered_gain_is_named_although_the_stages_were_forged_too(run: Path) -> None:
    def better(ledger: dict[str, Any]) -> None:
        ledger["techniques"][0]["steps"][2]["step_gain"]["value"] = 8.0
        ledger["waterfall"][0]["technique"] = "int8"

    def forge(stages: list[dict[str, Any]]) -> None:
        (stage,) = [stage for stage in stages if stage["kind"] == "measure"]
        assert recorded_key(stage) == stage["key"]
        stage["result"] = json.loads((run / "ledger.json").read_text())

    edit(run / "ledger.json", better)
    edit(run / "stages.json", forge)
    write_manifest(run)
    failures = named(run)
    assert ("ledger.json", "techniques[0].steps[2].step_gain.value") in failures
    assert ("ledger.json", "waterfall[0].technique") in failures


def test_variants_that_share_a_stage_share_its_failure(project: Path) -> None:
    recipe = {key: RECIPE[key] for key in ("version", "model")}
    odd = {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 24}}]}
    done = execute(planned(project, recipe | {"variants": {"a": odd, "b": odd}}), SilentProgress())
    assert set(done.failed_variants) == {"a", "b"}
    assert done.failed_variants["a"] == done.failed_variants["b"]
    log = [json.loads(line) for line in (done.run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log if line["event"] == "start" and "quan" in line["stage"]] \
        == ["quantize:a"]  # fmt: skip


def test_a_step_that_is_left_out_ends_the_waterfall(project: Path, made: Path) -> None:
    done = execute(planned(project, RECIPE, ("int4-continuous",)), SilentProgress())
    (point,) = done.report["techniques"]
    assert point["left_out"] == ["int4", "int4-continuous"] and len(point["steps"]) == 1
    assert verify(done.run_dir).ok
