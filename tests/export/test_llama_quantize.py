"""llama.cpp's quantizer: the importance matrix as it reads it, and the real program."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from compressor.errors import RecipeError, RunError
from compressor.export import gguf, llama_quantize
from compressor.export.gguf_model import Layout
from compressor.models.architecture import CausalLM
from compressor.quantize.imatrix import squared_inputs
from compressor.quantize.llama_cpp import llama_quantize as program
from compressor.recipe import load_recipe
from tests import tiny
from tests.projects import RECIPE, completed, write

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def binary(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    try:
        return program()
    except RunError as error:
        pytest.skip(str(error))


def tokens(samples: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(4, 300, (samples, 32)).astype(np.int32)


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_statistics_are_those_of_the_whole_model(tmp_path: Path, arch: str) -> None:
    """Against hooks on the whole model, run at once."""
    tiny.build(arch, tmp_path / "model")
    found = squared_inputs(CausalLM.open(tmp_path / "model"), tokens(), tmp_path, batch_size=2)
    model = CausalLM.open(tmp_path / "model")
    refs = [ref for index in range(2) for ref in model.linears(index)]
    seen: dict[str, list[torch.Tensor]] = {ref.name: [] for ref in refs}
    for ref in refs:
        ref.module.register_forward_pre_hook(
            lambda _, args, name=ref.name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        model.load_full(torch.float32)(torch.from_numpy(tokens().astype(np.int64)))
    for name, inputs in seen.items():
        rows = torch.cat(inputs) if inputs else torch.zeros(0, len(found[name].sums))
        assert found[name].tokens == len(rows)
        torch.testing.assert_close(
            found[name].sums.float(), rows.square().sum(0), rtol=1e-3, atol=1e-4
        )


def matrix(tmp_path: Path) -> Path:
    model = CausalLM.open(tmp_path / "model")
    layout = Layout(model.config)
    found = squared_inputs(model, tokens(), tmp_path)
    sums = {name: (one.sums, one.tokens) for name, one in found.items()}
    path = tmp_path / "imatrix.gguf"
    llama_quantize.write_imatrix(path, layout, sums, dataset="text", chunks=4, chunk_size=32)
    return path


def test_the_matrix_has_what_llama_cpp_looks_for(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    reader = GGUFReader(matrix(tmp_path))
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["text"]
    assert reader.get_field("imatrix.chunk_count").contents() == 4
    assert reader.get_field("imatrix.chunk_size").contents() == 32
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7
    sums, counts = (tensors[f"blk.1.ffn_down.weight.{p}"] for p in ("in_sum2", "counts"))
    assert list(sums.shape) == [tiny.INTERMEDIATE, 1] and list(counts.shape) == [1, 1]
    assert counts.data.item() == 128 and (np.asarray(sums.data) > 0).all()


def test_the_program_weighs_columns_by_it(tmp_path: Path, binary: Path) -> None:
    """Where some columns carry far larger inputs, the output's error falls."""
    tiny.build("llama", tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    model = CausalLM.open(tmp_path / "model")
    gguf.export(tmp_path / "model", (), {}, tmp_path / "plain")
    source = (tmp_path / "plain" / "model.gguf").rename(tmp_path / "model.gguf")
    layout = Layout(model.config)
    scale = torch.logspace(-2, 2, 256, dtype=torch.float64)[torch.randperm(256)]
    refs = [ref for index in range(2) for ref in model.linears(index)]
    sums = {
        ref.name: (scale if ref.module.in_features == 256 else torch.ones(512), 1) for ref in refs
    }
    path = tmp_path / "imatrix.gguf"
    llama_quantize.write_imatrix(path, layout, sums, dataset="x", chunks=1, chunk_size=1)
    errors = {}
    for name, given in (("with", path), ("without", None)):
        target = tmp_path / f"{name}.gguf"
        llama_quantize.quantize_file(binary, source, target, "Q3_K_S", imatrix=given)
        (found,) = [t for t in GGUFReader(target).tensors if t.name == "blk.0.ffn_up.weight"]
        assert found.tensor_type.name.endswith("_K")
        back = torch.from_numpy(dequantize(found.data, found.tensor_type))
        weight = model.checkpoint.tensor("model.layers.0.mlp.up_proj.weight").float()
        errors[name] = float(((back - weight).square() * scale).sum())
    assert errors["with"] < 0.8 * errors["without"]


def test_layers_that_are_left_keep_their_dtype(tmp_path: Path, binary: Path) -> None:
    tiny.build("llama", tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    gguf.export(tmp_path / "model", (), {}, tmp_path / "plain")
    target = tmp_path / "out.gguf"
    llama_quantize.quantize_file(
        binary, tmp_path / "plain" / "model.gguf", target, "Q4_K_M", kept=["blk.1.attn_q"]
    )
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(target).tensors}
    assert kinds["blk.1.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_q.weight"].startswith("Q4_K")


def test_a_failure_is_told(tmp_path: Path, binary: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(RunError, match="could not make Q4_K_M"):
        llama_quantize.quantize_file(
            binary, tmp_path / "model.gguf", tmp_path / "out.gguf", "Q4_K_M"
        )


def test_a_recipe_says_type_and_matrix(tmp_path: Path) -> None:
    recipe: dict[str, Any] = copy.deepcopy(RECIPE)
    recipe["variants"] = {"k": {"quantize": [{"llama_cpp": {"type": "Q4_K_M"}}]}}
    assert load_recipe(write(tmp_path, recipe)).variants["k"].library.format == "gguf"
    recipe["variants"] = {"k": {"quantize": [{"llama_cpp": {"type": "IQ2_XS", "imatrix": False}}]}}
    with pytest.raises(RecipeError, match="only with imatrix"):
        load_recipe(write(tmp_path, recipe))
    del recipe["calibration"]
    recipe["variants"] = {"k": {"quantize": [{"llama_cpp": {"type": "Q4_K_M"}}]}}
    with pytest.raises(RecipeError, match="calibration"):
        load_recipe(write(tmp_path, recipe))


def test_a_run_evaluates_what_it_made(project: Path, binary: Path) -> None:
    tiny.build("llama", project / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    recipe: dict[str, Any] = copy.deepcopy(RECIPE)
    recipe["variants"] = {
        "q6": {"quantize": [{"llama_cpp": {"type": "Q6_K"}}]},
        "q3": {"quantize": [{"llama_cpp": {"type": "Q3_K_S", "imatrix": False}}]},
    }
    report = completed(project, recipe, COMPRESSOR_LLAMA_QUANTIZE=str(binary))
    made = {variant["name"]: variant for variant in report["variants"]}
    assert made["q6"]["scheme"] == "Q6_K" and made["q6"]["algorithm"] == "llama_cpp"
    kl = {name: made[name]["quality"][0]["kl_mean"] for name in ("q6", "q3")}
    assert 0 < kl["q6"] < kl["q3"]
    ((artifact,),) = ([a for a in made["q6"]["artifacts"]],)
    assert artifact["format"] == "gguf"
