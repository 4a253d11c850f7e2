"""Whole runs on a tiny model: results, resuming after SIGKILL, reuse, and failure."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from tests import tiny

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(__file__).parent.parent),
}
RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "model"},
    "calibration": {"source": "builtin:calibration", "samples": 8, "length": 64},
    "variants": {
        "int8": {"quantize": [{"gptq": {"scheme": "W8A8"}}]},
        "int4-rtn": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]},
        "int4": {"quantize": [{"gptq": {"scheme": "W4A16", "group_size": 32}}]},
    },
    "evaluate": {
        "texts": [{"name": "novel", "source": "builtin:novel", "max_tokens": 512}],
        "length": 64,
    },
    "export": ["compressed-tensors"],
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tiny.build("llama", tmp_path / "model")
    write(tmp_path, RECIPE)
    return tmp_path


def write(project: Path, recipe: dict[str, Any]) -> Path:
    path = project / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def compress(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "compressor", *(arguments or ("run", "recipe.yaml"))],
        cwd=project,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def artifacts(project: Path) -> dict[str, str]:
    (run,) = (project / "runs" / "recipe").iterdir()
    files = sorted(p for p in (run / "artifacts").rglob("*") if p.is_file())
    assert files
    return {
        p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def report(project: Path) -> dict[str, Any]:
    newest = max((project / "runs" / "recipe").iterdir(), key=lambda p: p.stat().st_mtime)
    return json.loads((newest / "report" / "report.json").read_text())


def completed(project: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The report of a recipe that is run to its end without a failed variant."""
    write(project, recipe)
    done = compress(project)
    assert done.returncode == 0, done.stderr
    made = report(project)
    assert all(v["status"] == "ok" for v in made["variants"])
    return made


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


def test_rotated_variants_share_one_rotation_and_are_exported_whole(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["variants"] = {
        "plain": {"quantize": [{"gptq": {"scheme": "W8A8"}}]},
        "rotated": {"quantize": [{"rotation": {}}, {"gptq": {"scheme": "W8A8"}}]},
        "smoothed": {
            "quantize": [{"rotation": {}}, {"smoothquant": {}}, {"gptq": {"scheme": "W8A8"}}]
        },
    }
    made = completed(project, recipe)
    variants = {v["name"]: v for v in made["variants"]}
    assert [s["name"] for s in made["stages"] if s["name"].startswith("rotate")] == ["rotate:0"]
    losses = {name: v["quality"][0]["kl_mean"] for name, v in variants.items()}
    assert 0 < losses["rotated"] < 3 * losses["plain"]
    assert 0 < losses["smoothed"] < 3 * losses["plain"]
    (run,) = (project / "runs" / "recipe").iterdir()
    made_of = {}
    for name in ("plain", "rotated"):
        directory = run / "artifacts" / name / "compressed-tensors"
        config = json.loads((directory / "config.json").read_text())
        with safe_open(directory / "model.safetensors", "pt") as file:
            made_of[name] = config["tie_word_embeddings"], "lm_head.weight" in file.keys()  # noqa: SIM118
    assert made_of == {"plain": (True, False), "rotated": (False, True)}
    added = {n: v["artifacts"][0]["tensors"]["added"] for n, v in variants.items()}
    assert added["plain"] == [] and added["rotated"] == ["lm_head.weight"]
    assert compress(project).returncode == 0
    assert all(stage["cached"] for stage in report(project)["stages"])


def test_float8_and_its_cache_from_recipe_to_report(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["variants"] = {
        name: {"quantize": [{"rtn": {"scheme": "FP8"}}], "kv_cache": kv_cache}
        for name, kv_cache in {"fp8": None, "fp8-kv": "fp8", "int8-kv": "int8"}.items()
    }
    variants = {v["name"]: v for v in completed(project, recipe)["variants"]}
    assert variants["fp8"]["scheme"] == "FP8"
    assert variants["fp8-kv"]["scheme"] == "FP8 with fp8 cache"
    losses = {name: v["quality"][0]["kl_mean"] for name, v in variants.items()}
    assert len(set(losses.values())) == 4 and losses["fp8-kv"] < 3 * losses["fp8"] + 1e-2
    (run,) = (project / "runs" / "recipe").iterdir()
    for name, kind in {"fp8": None, "fp8-kv": "float", "int8-kv": "int"}.items():
        directory = run / "artifacts" / name / "compressed-tensors"
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert config["format"] == "float-quantized"
        assert (config["kv_cache_scheme"] or {}).get("type") == kind
        with safe_open(directory / "model.safetensors", "pt") as file:
            scales = [key for key in file.keys() if key.endswith(".k_scale")]  # noqa: SIM118
        assert len(scales) == (2 if kind else 0)
    recipe["variants"]["fp8"]["kv_cache"] = "fp8"  # now the same stage as that of fp8-kv
    write(project, recipe)
    assert compress(project).returncode == 0
    cached = {stage["name"]: stage["cached"] for stage in report(project)["stages"]}
    assert cached["quantize:fp8"]


def test_a_quantized_output_layer_is_evaluated_exported_and_measured(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    int4 = RECIPE["variants"]["int4"]["quantize"]
    recipe["variants"] = {
        "plain": {"quantize": int4},
        "head": {"quantize": int4, "lm_head": {"scheme": "W8A16"}},
        "rotated": {"quantize": [{"rotation": {}}, *int4], "lm_head": {"scheme": "W4A16"}},
        "mixed": {"quantize": int4, "precision": {"mean_bits": 5}, "lm_head": {"scheme": "W8A8"}},
    }
    recipe = json.loads(json.dumps(recipe))  # no aliases
    workload = {"input_length": 8, "output_length": 4, "requests": 2, "rounds": 2,
                "concurrency": [1]}  # fmt: skip
    recipe["measure"] = {"workload": workload, "dtype": "bfloat16"}
    variants = {v["name"]: v for v in completed(project, recipe)["variants"]}
    schemes = {
        name: {row["name"]: row["scheme"] for row in v["quantization"]["layers"]}
        for name, v in variants.items()
        if v["quantization"]
    }
    assert "lm_head" not in schemes["plain"]
    heads = {name: of["lm_head"] for name, of in schemes.items() if "lm_head" in of}
    assert heads == {"head": "W8A16", "rotated": "W4A16", "mixed": "W8A8"}
    losses = {name: v["quality"][0]["kl_mean"] for name, v in variants.items()}
    assert 0 < losses["head"] < 1.5 * losses["plain"] and losses["head"] != losses["plain"]
    vocabulary = tiny.VOCABULARY * tiny.HIDDEN
    for name in heads:
        # The embeddings are stored as they were; untied, they are a matrix more.
        plain = variants["plain"]["coverage"]["total_parameters"]
        assert variants[name]["coverage"]["total_parameters"] == plain + vocabulary
    more = variants["head"]["size_bytes"] - variants["plain"]["size_bytes"]
    assert vocabulary < more < 1.5 * vocabulary
    (run,) = (project / "runs" / "recipe").iterdir()
    for name, of in schemes.items():
        config = json.loads(
            (run / "artifacts" / name / "compressed-tensors" / "config.json").read_text()
        )
        assert config["tie_word_embeddings"] is ("lm_head" not in of)
        named = [
            "lm_head" in g["targets"]
            for g in config["quantization_config"]["config_groups"].values()
        ]
        assert any(named) is ("lm_head" in of)


@pytest.mark.parametrize("block", [1, 3])
def test_killed_run_resumes_to_the_same_bytes(project: Path, tmp_path: Path, block: int) -> None:
    whole = tmp_path / "whole"
    tiny.build("llama", whole / "model", layers=5)
    (project / "model").rename(project / "unused")
    tiny.build("llama", project / "model", layers=5)
    recipe = {k: v for k, v in RECIPE.items() if k != "evaluate"}
    recipe["variants"] = {"int4": RECIPE["variants"]["int4"]}
    for directory in (whole, project):
        write(directory, recipe)
    assert compress(whole).returncode == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", "run", "recipe.yaml"],
        cwd=project,
        env=ENVIRONMENT | {"COMPRESSOR_CHECKPOINT_SECONDS": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Kill as soon as the block before has been written, somewhere in the middle of the next one.
    pattern = f"partial/*/block-{block:05d}.safetensors"
    deadline = time.monotonic() + 120
    while not list((project / ".compressor").glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, "the run was not caught"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((project / "runs").glob("*/*/artifacts"))

    done = compress(project)
    assert done.returncode == 0, done.stderr
    assert artifacts(project) == artifacts(whole)
    manifests = [
        json.loads(p.read_text()) for p in project.glob(".compressor/objects/*/*/stage.json")
    ]
    (resumed,) = [m["result"]["resumed_at_block"] for m in manifests if m["kind"] == "quantize"]
    assert resumed >= block


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
    own = {"quantize:int4", "export:int4:compressed-tensors", "evaluate:int4"}
    assert set(before) == set(after)
    assert {name for name in after if after[name].key != before[name].key} == own
    assert after["quantize:int4"].config["lm_head"]["gptq"]["group_size"] == 32
    for name in own - {"evaluate:int4"}:
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


def test_bitsandbytes_variants_from_recipe_to_report(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    del recipe["calibration"]
    recipe["variants"] = {
        "nf4": {"quantize": [{"bitsandbytes": {"quant_type": "nf4", "double_quant": True}}]},
        "int8": {"quantize": [{"bitsandbytes": {"quant_type": "int8"}}]},
        "w4": {"quantize": [{"rtn": {"scheme": "W4A16", "group_size": 32}}]},
    }
    recipe["measure"] = {
        "workload": {
            "input_length": 8, "output_length": 4, "concurrency": [2], "requests": 4, "rounds": 2,
        },
        "prices": {"usd_per_hour": 0.1},
    }  # fmt: skip
    write(project, recipe)
    done = compress(project)
    assert done.returncode == 0, done.stderr
    assert "MatMul8bitLt" not in done.stderr and "Loading weights" not in done.stderr
    made = report(project)
    variants = {v["name"]: v for v in made["variants"]}
    assert {name: v["status"] for name, v in variants.items()} == dict.fromkeys(variants, "ok")
    losses = {name: v["quality"][0]["kl_mean"] for name, v in variants.items()}
    assert 0 < losses["int8"] < losses["nf4"]
    assert variants["nf4"]["scheme"] == "NF4+DQ" and variants["int8"]["scheme"] == "INT8"
    assert variants["nf4"]["coverage"]["share"] == variants["w4"]["coverage"]["share"]
    formats = {name: [a["format"] for a in v["artifacts"]] for name, v in variants.items()}
    assert formats == {
        "baseline": ["compressed-tensors"], "nf4": ["bitsandbytes"], "int8": ["bitsandbytes"],
        "w4": ["compressed-tensors"],
    }  # fmt: skip
    for name in ("nf4", "int8"):
        assert name in variants[name]["performance"][0]["kernel"]
        assert all(0 < row["error"] < 0.02 for row in variants[name]["quantization"]["layers"])
        (run,) = (project / "runs" / "recipe").iterdir()
        directory = run / "artifacts" / name / "bitsandbytes"
        check = subprocess.run(
            ["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=directory, capture_output=True
        )
        assert check.returncode == 0
    assert compress(project).returncode == 0
    assert all(stage["cached"] for stage in report(project)["stages"])
