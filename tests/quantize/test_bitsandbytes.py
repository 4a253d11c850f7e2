"""bitsandbytes as a quantizer: coverage, records, resuming, and what a recipe may say."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compressor.errors import RecipeError, RunError
from compressor.models.architecture import CausalLM
from compressor.numerics import bitsandbytes as formats
from compressor.plan import make_plan
from compressor.quantize.bitsandbytes import BitsAndBytes, BitsAndBytesOptions, iterate_tensors
from compressor.quantize.codes import read_layers
from compressor.recipe import load_recipe
from compressor.store import Store
from tests import tiny


def algorithm(**options: Any) -> BitsAndBytes:
    return BitsAndBytes(BitsAndBytesOptions(**options))


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"quant_type": "int8"}], ids=str)
def test_every_linear_of_the_blocks_is_quantized_and_recorded(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tiny.build("llama", tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    one = algorithm(**options)
    facts = one.quantize_checkpoint(model, tmp_path / "out")
    made = dict(iterate_tensors(tmp_path / "out"))
    refs = {ref.name: ref for i in range(2) for ref in model.linears(i)}
    assert set(made) == set(refs)
    layers = read_layers(tmp_path / "out")
    assert [layer["name"] for layer in layers] == list(refs)
    for layer in layers:
        whole = model.checkpoint.tensor(f"{layer['name']}.weight")
        back = formats.dequantize(made[layer["name"]])
        error = float((back - whole).square().sum() / whole.square().sum())
        assert layer["error"] == pytest.approx(error, rel=1e-5) and 0 < error < 0.02
        assert layer["scheme"] == one.scheme
    quantized = sum(ref.module.weight.numel() for ref in refs.values())
    assert facts["coverage"]["quantized_parameters"] == quantized
    assert facts["coverage"]["share"] == quantized / model.num_parameters
    assert [entry["name"] for entry in facts["coverage"]["skipped"]] == ["lm_head"]


def test_ignored_linears_and_experts_are_left_and_named(tmp_path: Path) -> None:
    tiny.build("mixtral", tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    facts = algorithm().quantize_checkpoint(
        model, tmp_path / "out", ignore=[r".*\.0\.self_attn\.[qk]_proj"]
    )
    reasons = {entry["name"]: entry["reason"] for entry in facts["coverage"]["skipped"]}
    ignored = [name for name, reason in reasons.items() if reason == "ignored by the recipe"]
    assert ignored == [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qk"]
    experts = [name for name, reason in reasons.items() if reason.startswith("expert")]
    assert len(experts) == 2 * tiny.EXPERTS * 3
    assert {name.partition(".self_attn.")[2] for name, _ in iterate_tensors(tmp_path / "out")} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    skipped = facts["settings"]["llm_int8_skip_modules"]
    assert set(ignored) | {"lm_head"} <= set(skipped)
    assert not any("experts" in path for path in skipped)


def test_blocks_never_span_two_rows(tmp_path: Path) -> None:
    model = CausalLM.open(tiny.build("llama", tmp_path / "model", intermediate_size=96))
    facts = algorithm().quantize_checkpoint(model, tmp_path / "out")
    reasons = {entry["name"]: entry["reason"] for entry in facts["coverage"]["skipped"]}
    reason = "its 96 inputs are not a multiple of the blocksize 64"
    assert reasons["model.layers.0.mlp.down_proj"] == reason
    assert "model.layers.0.mlp.up_proj" not in reasons
    assert "model.layers.0.mlp.down_proj" in facts["settings"]["llm_int8_skip_modules"]
    whole = algorithm(quant_type="int8").quantize_checkpoint(model, tmp_path / "int8")
    assert [entry["name"] for entry in whole["coverage"]["skipped"]] == ["lm_head"]


def test_nothing_left_to_quantize_is_an_error(tmp_path: Path) -> None:
    model = CausalLM.open(tiny.build("llama", tmp_path / "model"))
    with pytest.raises(RunError, match="no linear was quantized"):
        algorithm().quantize_checkpoint(model, tmp_path / "out", ignore=[".*"])


def test_a_killed_stage_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model = CausalLM.open(tiny.build("llama", tmp_path / "model", layers=3))
    algorithm().quantize_checkpoint(model, tmp_path / "whole")
    notes: list[str] = []

    def stop(note: str) -> None:
        notes.append(note)
        if len(notes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        algorithm().quantize_checkpoint(model, tmp_path / "part", advance=stop)
    assert not (tmp_path / "part" / "layers.jsonl").exists()
    notes.clear()
    algorithm().quantize_checkpoint(model, tmp_path / "part", advance=notes.append)
    assert notes[:2] == ["already done"] * 2 and notes[2].startswith("block 2")
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "part")
    ]
    assert contents[0] == contents[1]


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny.build("llama", tmp_path / "model") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        algorithm().quantize_checkpoint(CausalLM.open(path.parent), tmp_path / "out")


def recipe(tmp_path: Path, variant: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    value = {
        "version": 1,
        "model": {"source": "model"},
        "calibration": {"source": "builtin:calibration"},
        "variants": {"v": variant},
    }
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"quantize": ["awq", "bitsandbytes"]}, "only rotation goes with it"),
        ({"quantize": ["bitsandbytes", "signround"]}, "only rotation goes with it"),
        ({"quantize": ["rtn", "bitsandbytes"]}, "exactly one step must be a quantizer"),
        (
            {"quantize": ["bitsandbytes"], "precision": {"mean_bits": 5}},
            "`precision:` does not go with bitsandbytes",
        ),
        (
            {"quantize": ["bitsandbytes"], "kv_cache": "fp8"},
            "`kv_cache:` does not go with bitsandbytes",
        ),
        ({"quantize": ["bitsandbytes"], "lm_head": {}}, "`lm_head:` does not go with bitsandbytes"),
        ({"quantize": [{"bitsandbytes": {"threshold": 5.0}}]}, "threshold is not an option"),
        (
            {"quantize": [{"bitsandbytes": {"quant_type": "int8", "blocksize": 64}}]},
            "blocksize is not an option of quant_type int8",
        ),
        ({"quantize": [{"bitsandbytes": {"quant_type": "int4"}}]}, "nf4"),
    ],
)
def test_what_cannot_be_is_refused_by_the_recipe(
    tmp_path: Path, variant: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe(tmp_path, variant))


def test_the_plan_needs_no_calibration_and_exports_the_librarys_format(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    path = recipe(tmp_path, {"quantize": ["rotation", "bitsandbytes"]})
    loaded = load_recipe(path)
    plan = make_plan(loaded, Store(tmp_path / "store"))
    stages = {stage.name: stage for stage in plan.stages}
    assert stages["quantize:v"].inputs == ("load", "rotate:0")
    assert stages["quantize:v"].config["library"] == formats.check_installed()
    assert "export:v:bitsandbytes" in stages and "export:v:compressed-tensors" not in stages
    lock = tmp_path / "lock.yaml"
    lock.write_text(yaml.safe_dump(loaded.lock()))
    again = load_recipe(lock).lock()
    assert json.dumps(again) == json.dumps(loaded.lock())


def test_the_plan_names_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build("llama", tmp_path / "model")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(formats, "version", missing)
    loaded = load_recipe(recipe(tmp_path, {"quantize": ["bitsandbytes"]}))
    with pytest.raises(RunError, match=r"pip install 'compressor\[bitsandbytes\]'"):
        make_plan(loaded, Store(tmp_path / "store"))
