"""GPTQ artifacts: what independent code makes of them, and our own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from compressor.errors import RunError
from compressor.export import gptq
from compressor.imports.packed import open_packed
from compressor.models.architecture import CausalLM
from compressor.numerics.grid import fit_grid, quantize
from compressor.numerics.packing import pack_words, unpack_words
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.quantize import registry
from compressor.quantize.codes import iterate_quantized
from compressor.quantize.driver import quantize_model
from tests import tiny


def quantized(tmp_path: Path, arch: str, algorithm: str = "rtn", **options: Any) -> list[str]:
    """Codes of a tiny model in ``tmp_path/codes``, the model beside it; names that were skipped."""
    tiny.build(arch, tmp_path / "model")
    cls = registry.get(algorithm)
    tokens = np.random.default_rng(0).integers(4, 300, (4, 64)).astype(np.int32)
    facts = quantize_model(
        CausalLM.open(tmp_path / "model"), cls(cls.Options(**options), torch.float16),
        tmp_path / "codes", tokens=tokens,
    )  # fmt: skip
    return [entry["name"] for entry in facts["coverage"]["skipped"]]


def unpacked(directory: Path, name: str) -> torch.Tensor:
    """A linear's weight as AutoGPTQ 0.7's QuantLinear dequantizes it (qlinear_cuda_old.py): numpy,
    bit by bit, none of our code."""
    config = json.loads((directory / "quantize_config.json").read_text())
    bits = config["bits"]
    tensors = load_file(directory / "model.safetensors")
    qweight, qzeros = (
        tensors[f"{name}.{p}"].numpy().view(np.uint32) for p in ("qweight", "qzeros")
    )
    per = 32 // bits
    weight = np.zeros((qweight.shape[0] * per, qweight.shape[1]), np.int64)
    for row in range(len(weight)):
        weight[row] = (qweight[row // per] >> (bits * (row % per))) & (2**bits - 1)
    zeros = np.zeros((qzeros.shape[0], qzeros.shape[1] * per), np.int64)
    for column in range(zeros.shape[1]):
        zeros[:, column] = (qzeros[:, column // per] >> (bits * (column % per))) & (2**bits - 1)
    if config["checkpoint_format"] == "gptq":
        zeros += 1
    scales = tensors[f"{name}.scales"].float().numpy()
    group = tensors[f"{name}.g_idx"].numpy()
    return torch.from_numpy(((weight - zeros[group]) * scales[group]).T.astype(np.float32))


GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"scheme": "W4A16", "group_size": 32}),
    ("rtn", {"scheme": "W4A16", "group_size": 16, "symmetric": False}),
    ("rtn", {"scheme": "W4A16", "group_size": -1}),
    ("rtn", {"scheme": "W8A16"}),
    ("rtn", {"scheme": "W2A16", "group_size": 16}),
    ("gptq", {"scheme": "W4A16", "group_size": 16, "desc_act": True, "static_groups": False}),
    ("gptq", {"scheme": "W4A16", "group_size": 16, "desc_act": True}),
]


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("algorithm", "options"), GRIDS, ids=str)
def test_independent_code_reads_the_same_weights(
    tmp_path: Path, algorithm: str, options: dict[str, Any], form: Any
) -> None:
    ignore = quantized(tmp_path, "llama", algorithm, **options)
    out = tmp_path / "out"
    gptq.export(
        tmp_path / "model", iterate_quantized(tmp_path / "codes"), ignore, {}, out,
        checkpoint_format=form,
    )  # fmt: skip
    back = open_packed(out)
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        assert torch.equal(unpacked(out, name), tensor.dequantize())
        read, scheme = back.read(name)
        assert torch.equal(read.codes, tensor.codes)
        assert torch.equal(read.dequantize(), tensor.dequantize())
        assert scheme.weights == tensor.scheme
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((out / "quantize_config.json").read_text())
    ordered = options.get("desc_act", False) and not options.get("static_groups", True)
    assert config["desc_act"] is ordered
    assert config["sym"] is options.get("symmetric", True)
    assert config["checkpoint_format"] == form and config["lm_head"] is False


def test_symmetric_zero_points_are_those_that_engines_know(tmp_path: Path) -> None:
    ignore = quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    for form, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        codes = iterate_quantized(tmp_path / "codes")
        gptq.export(tmp_path / "model", codes, ignore, {}, tmp_path / form, checkpoint_format=form)  # type: ignore[arg-type]
        tensors = load_file(tmp_path / form / "model.safetensors")
        zeros = tensors["model.layers.0.mlp.up_proj.qzeros"].numpy().view(np.uint32)
        assert (zeros == word).all()


def test_a_zero_point_of_zero_needs_the_second_format() -> None:
    scheme = Scheme.parse("W4A16", 32, symmetric=False)
    weight = torch.rand(8, 32) + 0.1  # all above zero: the grid begins at its zero point
    tensor = quantize(weight, *fit_grid(weight, scheme.weights), scheme.weights)
    with pytest.raises(RunError, match="gptq_v2"):
        gptq.tensors("layer", tensor, scheme, "gptq")
    made = gptq.tensors("layer", tensor, scheme, "gptq_v2")
    assert int(unpack_words(made["qzeros"], 4, 1).max()) == 0


@pytest.mark.parametrize("arch", ["qwen2", "gpt_neox", "mixtral", "phi3"])
def test_other_layouts(tmp_path: Path, arch: str) -> None:
    """Biases stay, experts are taken apart, and layers that are left out are named."""
    ignore = quantized(tmp_path, arch, scheme="W4A16", group_size=32)
    gptq.export(
        tmp_path / "model", iterate_quantized(tmp_path / "codes"), ignore, {}, tmp_path / "out"
    )
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        assert torch.equal(unpacked(tmp_path / "out", name), tensor.dequantize())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    source = CausalLM.open(tmp_path / "model").checkpoint
    kept = [n for n in source.names if n in tensors]
    assert all(torch.equal(tensors[name], source.tensor(name)) for name in kept)
    assert any(name.endswith("bias") for name in kept) or arch in ("mixtral", "phi3")
    if arch == "mixtral":
        config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
        assert any(key.startswith("-:") and "gate" in key for key in config["dynamic"])


def test_layers_of_their_own_are_found_by_engines_under_the_fused_name() -> None:
    schemes = {
        "model.layers.0.self_attn.q_proj": Scheme.parse("W8A16"),
        "model.layers.0.mlp.down_proj": Scheme.parse("W4A16", 32),
        "model.layers.1.mlp.down_proj": Scheme.parse("W4A16", 32),
    }
    config = gptq.quantization_config(schemes, ["lm_head"])
    assert (config["bits"], config["group_size"]) == (4, 32)
    ((pattern, own),) = config["dynamic"].items()
    assert own == {"bits": 8, "group_size": -1, "sym": True}
    assert pattern == r"+:^model\.layers\.0\.self_attn\.(q_proj|qkv_proj)$"


def test_what_it_cannot_hold_is_refused_by_name() -> None:
    def tensor(rows: int, scale: float = 0.01, **grid: Any) -> tuple[QuantizedTensor, Scheme]:
        scheme = Scheme.parse(**grid)
        codes = torch.zeros(rows, 32, dtype=torch.int8)
        scales = torch.full((rows, scheme.weights.groups(32)), scale)
        return QuantizedTensor(codes, scales, None, None, scheme.weights), scheme

    for found, message in (
        (tensor(8, name="W3A16", group_size=32), "2, 4, 8 bits"),
        (tensor(8, name="W8A8"), "not W8A8"),
        (tensor(7, name="W4A16", group_size=32), "7 x 32"),
        (tensor(8, scale=1e-9, name="W4A16", group_size=32), "too far from float16"),
    ):
        with pytest.raises(RunError, match=message):
            gptq.tensors("layer", *found, "gptq")


@given(
    bits=st.sampled_from([2, 4, 8]),
    rows=st.integers(1, 3),
    words=st.integers(1, 3),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 1000),
)
def test_words_hold_what_was_packed(bits: int, rows: int, words: int, dim: Any, seed: int) -> None:
    shape = [rows, rows]
    shape[dim] = words * 32 // bits
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.int32)
    packed = pack_words(values, bits, dim)
    assert packed.shape[dim] == words
    assert torch.equal(unpack_words(packed, bits, dim), values)
