"""Checkpoints of other tools as variants: what is read, what is refused, and a whole run."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import RunError
from compressor.export import awq, compressed_tensors, gguf, gptq
from compressor.imports.codes import import_model
from compressor.imports.packed import open_packed
from compressor.models.architecture import CausalLM
from compressor.models.source import resolve_source
from compressor.quantize.codes import iterate_quantized, read_layers, replaced_tensors
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests import tiny
from tests.export.test_gptq import quantized
from tests.projects import RECIPE, completed


def read(model: Path, source: Path, directory: Path) -> dict[str, Any]:
    directory.mkdir()
    resolved = resolve_source(str(source), base_dir=Path(), quantized=True)
    return import_model(CausalLM.open(model), resolved, directory)


@pytest.mark.parametrize("write", [gptq.export, awq.export, compressed_tensors.export])
def test_codes_come_back_as_they_were(tmp_path: Path, write: Any) -> None:
    """With a norm that differs, as AWQ leaves them."""
    ignore = quantized(tmp_path, "qwen2", scheme="W4A16", group_size=32, symmetric=False)
    norm = "model.layers.1.input_layernorm.weight"
    changed = {norm: torch.full((tiny.HIDDEN,), 1.5)}
    codes = iterate_quantized(tmp_path / "codes")
    write(tmp_path / "model", codes, ignore, {}, tmp_path / "theirs", replaced=changed)
    facts = read(tmp_path / "model", tmp_path / "theirs", tmp_path / "read")
    own = {name: tensor for name, tensor, _ in iterate_quantized(tmp_path / "codes")}
    back = {name: tensor for name, tensor, _ in iterate_quantized(tmp_path / "read")}
    assert set(own) == set(back)
    for name, tensor in own.items():
        assert torch.equal(back[name].codes, tensor.codes)
        assert torch.equal(back[name].dequantize(), tensor.dequantize())
    assert list(replaced_tensors(tmp_path / "read")) == [norm]
    assert facts["coverage"]["skipped"] and 0 < facts["coverage"]["share"] < 1
    for layer in read_layers(tmp_path / "read"):
        weight = CausalLM.open(tmp_path / "model").checkpoint.tensor(f"{layer['name']}.weight")
        off = own[layer["name"]].dequantize() - weight
        assert layer["error"] == pytest.approx(
            float(off.square().sum() / weight.square().sum()), rel=1e-4
        )


def test_a_gguf_file_is_what_it_stands_for(tmp_path: Path) -> None:
    quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    gguf.export(tmp_path / "model", iterate_quantized(tmp_path / "codes"), {}, tmp_path / "theirs")
    facts = read(tmp_path / "model", tmp_path / "theirs" / "model.gguf", tmp_path / "read")
    assert facts["dense"] and facts["scheme"]["name"] == "F32/Q4_0"
    ids = torch.arange(5, 25).unsqueeze(0)

    def logits(directory: Path, result: dict[str, Any]) -> torch.Tensor:
        stage = StoredStage("", directory, {"result": result})
        with torch.no_grad():
            return quantized_model(tmp_path / "model", stage, "cpu")(ids).logits

    expected = logits(tmp_path / "codes", {})
    # The tiny model's scales are float16 in the codes too: nothing is rounded.
    torch.testing.assert_close(logits(tmp_path / "read", facts), expected, rtol=1e-4, atol=1e-4)


def test_an_older_gptq_checkpoint_has_its_settings_beside(tmp_path: Path) -> None:
    """AutoGPTQ wrote quantize_config.json alone, without checkpoint_format."""
    ignore = quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    theirs = tmp_path / "theirs"
    gptq.export(tmp_path / "model", iterate_quantized(tmp_path / "codes"), ignore, {}, theirs)
    config = json.loads((theirs / "config.json").read_text())
    del config["quantization_config"]
    (theirs / "config.json").write_text(json.dumps(config))
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    (theirs / "quantize_config.json").write_text(json.dumps(settings))
    back = open_packed(theirs)
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        assert torch.equal(back.read(name)[0].dequantize(), tensor.dequantize())


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    ignore = quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    codes = iterate_quantized(tmp_path / "codes")
    gptq.export(tmp_path / "model", codes, ignore, {}, tmp_path / "theirs")
    return tmp_path / "theirs"


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "aqlm"}, "'aqlm' are not read"),
        ({"bits": 3}, "3 bits is not read"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not read"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv"),
        ({"group_size": 16}, "do not belong together"),
    ],
)
def test_what_is_not_read_is_refused(
    tmp_path: Path, theirs: Path, changes: dict[str, Any], message: str
) -> None:
    edit(theirs, **changes)
    with pytest.raises(RunError, match=message):
        read(tmp_path / "model", theirs, tmp_path / "read")


def test_another_model_is_refused(tmp_path: Path, theirs: Path) -> None:
    tiny.build("llama", tmp_path / "wide", hidden_size=128)
    tiny.build("llama", tmp_path / "short", layers=1)
    for other in ("wide", "short"):
        with pytest.raises(RunError, match="another model than the baseline"):
            read(tmp_path / other, theirs, tmp_path / f"read-{other}")
    with pytest.raises(RunError, match="not quantized"):
        open_packed(tmp_path / "model")


def test_a_damaged_scale_is_found(tmp_path: Path, theirs: Path) -> None:
    tensors = load_file(theirs / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="not finite"):
        read(tmp_path / "model", theirs, tmp_path / "read")


@pytest.mark.parametrize("before", [[], ["rotation"]])
def test_a_run_compares_it_with_our_own(project: Path, before: list[str]) -> None:
    """The same codes, once as our variant and once imported, are judged alike; also where the
    output layer had the embeddings' weight and has one of its own since a rotation."""
    recipe = copy.deepcopy(RECIPE)
    steps = [*before, {"rtn": {"scheme": "W4A16", "group_size": 32}}]
    recipe["variants"] = {"ours": {"quantize": steps}}
    recipe["export"] = ["compressed-tensors", "gptq", "awq", "safetensors"]
    first = completed(project, recipe)
    (run,) = (project / "runs" / "recipe").iterdir()
    for fmt in ("gptq", "awq", "compressed-tensors"):
        shutil.copytree(run / "artifacts" / "ours" / fmt, project / f"theirs-{fmt}")
        recipe["variants"][fmt] = {"import": {"source": f"theirs-{fmt}"}}
    second = completed(project, recipe)
    scores = {one["name"]: one["quality"] for one in second["variants"]}
    assert scores["ours"] == next(v for v in first["variants"] if v["name"] == "ours")["quality"]
    for fmt in ("gptq", "awq", "compressed-tensors"):
        for mine, imported in zip(scores["ours"], scores[fmt], strict=True):
            assert imported["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-3)
        entry = next(v for v in second["variants"] if v["name"] == fmt)
        assert entry["algorithm"] == "import" and entry["scheme"] == "W4A16"
        assert {a["format"] for a in entry["artifacts"]} == set(recipe["export"])
        assert not any(a["verification"]["verified"] is False for a in entry["artifacts"])
        layers = entry["quantization"]["layers"]
        assert all((layer["error"] is None) == bool(before) for layer in layers)
