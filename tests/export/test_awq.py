"""AWQ artifacts: what independent code makes of them, and our own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import RunError
from compressor.export import awq
from compressor.imports.packed import open_packed
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.quantize.codes import iterate_quantized
from tests.export.test_gptq import quantized


def unpacked(directory: Path, name: str) -> torch.Tensor:
    """A linear's weight, AutoAWQ's packer undone (awq/modules/linear/gemm.py, `from_linear`:
    bits 4 i of a word are column order_map[i] of its eight): numpy, none of our code."""
    tensors = load_file(directory / "model.safetensors")
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]
    found = {}
    for part in ("qweight", "qzeros"):
        words = tensors[f"{name}.{part}"].numpy().view(np.uint32)
        values = np.zeros((words.shape[0], words.shape[1] * 8), np.int64)
        for column in range(words.shape[1]):
            for i, place in enumerate(order_map):
                values[:, column * 8 + place] = (words[:, column] >> np.uint32(4 * i)) & 15
        found[part] = values
    scales = tensors[f"{name}.scales"].float().numpy()
    width = len(found["qweight"]) // len(scales)
    zeros, spread = (np.repeat(value, width, 0) for value in (found["qzeros"], scales))
    return torch.from_numpy(((found["qweight"] - zeros) * spread).T.astype(np.float32))


GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"scheme": "W4A16", "group_size": 32}),
    ("rtn", {"scheme": "W4A16", "group_size": 16, "symmetric": False}),
    ("rtn", {"scheme": "W4A16", "group_size": -1, "symmetric": False}),
    ("rtn", {"scheme": "W3A16", "group_size": 16, "symmetric": False}),
    ("gptq", {"scheme": "W4A16", "group_size": 16, "desc_act": True}),
]


@pytest.mark.parametrize(("algorithm", "options"), GRIDS, ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_independent_code_reads_the_same_weights(
    tmp_path: Path, arch: str, algorithm: str, options: dict[str, Any]
) -> None:
    ignore = quantized(tmp_path, arch, algorithm, **options)
    out = tmp_path / "out"
    awq.export(tmp_path / "model", iterate_quantized(tmp_path / "codes"), ignore, {}, out)
    back = open_packed(out)
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        assert torch.equal(unpacked(out, name), tensor.dequantize())
        assert torch.equal(back.read(name)[0].dequantize(), tensor.dequantize())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "version", "bits", "zero_point")} == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True,
    }  # fmt: skip
    assert config["group_size"] == options["group_size"]
    assert config["modules_to_not_convert"] == sorted(ignore)


def test_a_symmetric_grid_has_zero_points_of_8(tmp_path: Path) -> None:
    ignore = quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    codes = iterate_quantized(tmp_path / "codes")
    awq.export(tmp_path / "model", codes, ignore, {}, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    zeros = tensors["model.layers.1.self_attn.k_proj.qzeros"].numpy().view(np.uint32)
    assert (zeros == 0x88888888).all()


def test_what_it_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    def tensor(rows: int, **grid: Any) -> tuple[QuantizedTensor, Scheme, torch.dtype]:
        scheme = Scheme.parse(**grid)
        codes = torch.zeros(rows, 32, dtype=torch.int8)
        scales = torch.full((rows, scheme.weights.groups(32)), 0.01)
        made = QuantizedTensor(codes, scales, None, None, scheme.weights)
        return made, scheme, torch.float16

    for found, message in (
        (tensor(8, name="W8A16"), "4 bits"),
        (tensor(8, name="W4A8", group_size=32), "not W4A8"),
        (tensor(12, name="W4A16", group_size=32), "12 x 32"),
    ):
        with pytest.raises(RunError, match=message):
            awq.tensors("layer", *found)
    ordered, scheme, dtype = tensor(8, name="W4A16", group_size=16)
    ordered.g_idx = torch.arange(32, dtype=torch.int32) % 2
    with pytest.raises(RunError, match="static_groups"):
        awq.tensors("layer", ordered, scheme, dtype)
    quantized(tmp_path, "llama", scheme="W4A16", group_size=32)
    mixed = list(iterate_quantized(tmp_path / "codes"))
    name, one, _ = mixed[0]
    wide = QuantizedTensor(
        one.codes, one.scale[:, :1], None, None, Scheme.parse("W4A16", -1).weights
    )
    mixed[0] = (name, wide, Scheme.parse("W4A16", -1))
    with pytest.raises(RunError, match="one group size"):
        awq.export(tmp_path / "model", mixed, [], {}, tmp_path / "out")
