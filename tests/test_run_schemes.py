"""Whole runs on a tiny model, scheme by scheme: from the recipe to artifacts and report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from compressor.verify import verify
from tests import tiny
from tests.projects import RECIPE, completed, compress, report, write


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_gguf_embeddings_are_rounded_in_variants_and_the_report_says_so(project: Path) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["variants"] = {"int4": RECIPE["variants"]["int4-rtn"]}
    recipe["export"] = ["compressed-tensors", "gguf"]
    plain = completed(project, recipe)
    recipe["gguf"] = {"embeddings": "Q8_0"}
    made = completed(project, recipe)
    stages = {stage["name"]: stage["cached"] for stage in made["stages"]}
    changed = ["export:int4:gguf", "verify:int4:gguf"]
    assert [name for name, cached in stages.items() if not cached] == changed
    kinds = [
        [set(v["artifacts"][1]["tensors"]["bytes_by_scheme"]) for v in run["variants"]]
        for run in (plain, made)
    ]
    assert kinds[0] == [{"F32"}, {"F32", "W4A16, Q4_0"}]
    assert kinds[1] == [{"F32"}, {"F32", "W4A16, Q4_0", "Q8_0"}]
    (note,) = set(made["notes"]) - set(plain["notes"])
    assert note.startswith("int4, gguf: the embeddings are rounded to Q8_0")
    for run in (project / "runs" / "recipe").iterdir():
        assert verify(run).ok


@pytest.mark.slow
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
