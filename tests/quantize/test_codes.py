"""Files of a quantized directory: what is written is what is read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from compressor.quantize import codes
from compressor.quantize.gptq import GPTQ, GPTQOptions


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_written_is_read(tmp_path: Path, symmetric: bool) -> None:
    options = GPTQOptions(
        scheme="W4A16", group_size=16, symmetric=symmetric, desc_act=True, static_groups=False
    )
    algorithm = GPTQ(options)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 64, generator=random) * torch.linspace(0.1, 4, 64)
    weight = torch.randn(8, 64, generator=random)
    written = algorithm.quantize(weight, inputs.T @ inputs).tensor
    assert written.g_idx is not None
    norm = torch.randn(64, generator=random)
    tensors = codes.flatten("a.q_proj", written) | {"a.norm.weight.replaced": norm}
    codes.save_synced(tensors, codes.block_file(tmp_path, 0), {})
    record = {"name": "a.q_proj", "scheme": algorithm.scheme.to_dict()}
    codes.append_synced(tmp_path / codes.LAYERS, [json.dumps(record)])
    ((name, found, scheme),) = codes.iterate_quantized(tmp_path)
    assert (name, scheme) == ("a.q_proj", algorithm.scheme)
    found.validate()
    assert torch.equal(found.codes, written.codes) and torch.equal(found.g_idx, written.g_idx)
    assert torch.equal(found.dequantize(), written.dequantize())
    assert torch.equal(codes.replaced_tensors(tmp_path)["a.norm.weight"], norm)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_record_cut_short_is_not_read(tmp_path: Path) -> None:
    assert codes.read_layers(tmp_path) == []
    codes.write_synced(tmp_path / codes.LAYERS, ['{"block": 0}', '{"block": 1, "na'])
    assert codes.read_layers(tmp_path) == [{"block": 0}]


def test_blocks_behind_the_last_that_counts_are_dropped(tmp_path: Path) -> None:
    for index in range(4):
        codes.save_synced({"a": torch.zeros(1)}, codes.block_file(tmp_path, index), {})
        codes.append_synced(tmp_path / codes.LAYERS, [f'{{"block": {index}}}'])
    codes.drop_from(tmp_path, 2)
    assert [record["block"] for record in codes.read_layers(tmp_path)] == [0, 1]
    left = sorted(tmp_path.glob("block-*"))
    assert left == [codes.block_file(tmp_path, index) for index in range(2)]


def test_saving_and_reading_back_copy_nothing(tmp_path: Path) -> None:
    """torch's own memory is not traced, that of bytes objects is: saving must make none."""
    from compressor.models.checkpoint import read_file

    value = torch.randn(1 << 20)
    tracemalloc.start()
    codes.save_synced({"hidden": value}, tmp_path / "resume.safetensors", {"block": "1"})
    kept: list[torch.Tensor] = []

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        kept.append(torch.empty(shape, dtype=dtype))
        return kept[-1]

    found = read_file(tmp_path / "resume.safetensors", make)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["hidden"] is kept[0] and torch.equal(kept[0], value)
    assert peak < value.nbytes / 4
