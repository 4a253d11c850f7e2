"""Whole runs on a tiny model: results, reuse, and failure."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.projects import RECIPE, artifacts, compress, report, write


def test_run_makes_artifacts_figures_and_reports(project: Path) -> None:
    done = compress(project)
    assert done.returncode == 0, done.stderr
    made = report(project)
    variants = {v["name"]: v for v in made["variants"]}
    assert list(variants) == ["baseline", "int8", "int4-rtn", "int4"]
    assert all(v["status"] == "ok" for v in variants.values())
    assert variants["baseline"]["quality"][0]["perplexity_change"] == 0
    assert 0 < variants["int8"]["quality"][0]["kl_mean"] < variants["int4"]["quality"][0]["kl_mean"]
    assert all(layer["error"] <= layer["rtn_error"] * (1 + 1e-6)
               for layer in variants["int4"]["quantization"]["layers"])  # fmt: skip
    coverage = variants["int4"]["coverage"]
    assert coverage["share"] > 0.3
    assert coverage["quantized_parameters"] == coverage["block_parameters"]
    for name, scheme in (("baseline", None), ("int8", "W8A8"), ("int4", "W4A16")):
        tensors = variants[name]["artifacts"][0]["tensors"]
        assert not tensors["missing"] and not tensors["added"]
        assert set(tensors["bytes_by_scheme"]) == {"float32", scheme} - {None}
    assert "will not load" not in done.stderr and "warning" not in done.stdout
    assert variants["int4"]["size_bytes"] < variants["baseline"]["size_bytes"]
    (run,) = (project / "runs" / "recipe").iterdir()
    for name in ("index.html", "report.md", "report.json"):
        assert (run / "report" / name).stat().st_size > 500
    for name in ("recipe.lock.yaml", "plan.json", "environment.json", "log.jsonl"):
        assert (run / name).exists()
    for variant in variants:
        directory = run / "artifacts" / variant / "compressed-tensors"
        check = subprocess.run(
            ["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=directory, capture_output=True
        )
        assert check.returncode == 0
        listed = {
            line.split("  ")[1]
            for line in (directory / "SHA256SUMS").read_text().split("\n")
            if line
        }
        assert listed == {p.name for p in directory.iterdir()} - {"SHA256SUMS"}


def test_second_run_does_no_work_and_changed_evaluation_requantizes_nothing(project: Path) -> None:
    assert compress(project).returncode == 0
    first = artifacts(project)
    assert compress(project).returncode == 0
    assert all(stage["cached"] for stage in report(project)["stages"])
    assert artifacts(project) == first

    changed = json.loads(json.dumps(RECIPE))
    changed["evaluate"]["texts"][0]["max_tokens"] = 256
    write(project, changed)
    assert compress(project).returncode == 0
    cached = {stage["name"]: stage["cached"] for stage in report(project)["stages"]}
    assert cached["load"] and cached["calibrate"]
    assert all(cached[f"quantize:{v}"] for v in RECIPE["variants"])
    assert not cached["texts"] and not cached["evaluate:int4"]


def test_failed_variant_is_named_and_the_others_go_on(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["variants"]["broken"] = {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 48}}]}
    write(project, recipe)
    done = compress(project)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    variants = {v["name"]: v for v in report(project)["variants"]}
    assert variants["broken"]["status"] == "failed" and "48" in variants["broken"]["error"]
    assert variants["int4"]["status"] == "ok" and variants["int4"]["artifacts"]
    assert not variants["broken"]["artifacts"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model": {"source": "missing-dir"}}, (1, 2), "missing-dir"),
        ({"calibration": {"source": "empty.txt"}}, (1, 2), "empty"),
        ({"calibration": {"source": "short.txt", "samples": 999, "length": 64}}, (1, 2), "token"),
        ({"evaluate": {"texts": [{"name": "n", "source": "nowhere.txt"}]}}, (1, 2), "nowhere"),
    ],
)
def test_bad_input_is_one_clear_error(
    project: Path, change: dict[str, Any], code: tuple[int, ...], words: str
) -> None:
    (project / "empty.txt").write_text("")
    (project / "short.txt").write_text("Too short a text.")
    write(project, RECIPE | change)
    done = compress(project)
    assert done.returncode in code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (
        not list((project / "runs").glob("*/*/artifacts")) if (project / "runs").exists() else True
    )


def test_plan_counts_the_output_layer_and_changes_nothing_else(project: Path) -> None:
    from compressor.plan import make_plan
    from compressor.recipe import load_recipe
    from compressor.store import Store

    def stages() -> dict[str, Any]:
        plan = make_plan(load_recipe(project / "recipe.yaml"), Store(project / "store"))
        return {stage.name: stage for stage in plan.stages}

    recipe = json.loads(json.dumps(RECIPE))
    before = stages()
    recipe["variants"]["int4"]["lm_head"] = {"scheme": "W4A16"}
    write(project, recipe)
    after = stages()
    own = {"quantize:int4", "evaluate:int4"}
    own |= {f"{kind}:int4:compressed-tensors" for kind in ("export", "verify")}
    assert set(before) == set(after)
    assert {name for name in after if after[name].key != before[name].key} == own
    assert after["quantize:int4"].config["lm_head"]["gptq"]["group_size"] == 32
    for name in ("quantize:int4", "export:int4:compressed-tensors"):
        assert after[name].estimate.disk_bytes > before[name].estimate.disk_bytes
        assert after[name].estimate.memory_bytes >= before[name].estimate.memory_bytes


def test_full_disk_is_refused_before_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from compressor.errors import RunError
    from compressor.plan import make_plan
    from compressor.recipe import load_recipe
    from compressor.store import Store

    plan = make_plan(load_recipe(project / "recipe.yaml"), Store(project / "store"))
    usage = shutil.disk_usage(project)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match="of disk"):
        plan.check_disk()
