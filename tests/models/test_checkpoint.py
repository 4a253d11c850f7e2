"""Reading and writing safetensors checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compressor.errors import RunError
from compressor.models.checkpoint import (
    INDEX,
    UNFINISHED,
    Checkpoint,
    TensorWriter,
    drop_unfinished,
    save_whole,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"layer.{i}.weight": torch.randn(5 + i, 7, generator=generator).to(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    return {**found, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


def write(directory: Path, values: dict[str, torch.Tensor], limit: int) -> None:
    writer = TensorWriter(directory, limit)
    for name, value in values.items():
        writer.add(name, value)
    writer.close()


@pytest.mark.parametrize("limit", [10**9, 200])
def test_what_is_written_is_read(tmp_path: Path, limit: int) -> None:
    values = tensors()
    write(tmp_path, values, limit)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == sorted(values)
    assert checkpoint.total_bytes == sum(v.nbytes for v in values.values())
    for name, value in values.items():
        assert checkpoint.shape(name) == tuple(value.shape)
        assert checkpoint.dtype(name) == value.dtype
        assert checkpoint.numel(name) == value.numel()
        assert torch.equal(checkpoint.tensor(name), value)
        assert checkpoint.tensor(name).data_ptr() % 64 == 0
    assert checkpoint.tensor("layer.2.weight", torch.float32).dtype == torch.float32
    assert not checkpoint.has("layer.9.weight")
    assert not list(tmp_path.glob("*.tmp"))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    limit=st.integers(40, 400),
)
def test_shards_keep_to_the_limit_and_the_index_is_right(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    values = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    write(directory, values, limit)
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(v.nbytes for v in held.values()) <= limit
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
    else:
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
        for name, file in index["weight_map"].items():
            assert torch.equal(load_file(directory / file)[name], values[name])
        assert set(index["weight_map"]) == set(values)


def test_what_a_kill_left_goes_with_the_next_file(tmp_path: Path) -> None:
    for last in (lambda: save_whole({"a": torch.ones(3)}, tmp_path / "a.safetensors"),
                 lambda: drop_unfinished(tmp_path)):  # fmt: skip
        (tmp_path / UNFINISHED).mkdir()
        (tmp_path / UNFINISHED / ".tmpAbCdEf").write_bytes(b"half")
        last()
        assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(3))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    save_whole({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="contiguous"):
        save_whole({"a": torch.ones(3, 4).T}, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(3))


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_weights_may_be_read_by_whoever_may_read_other_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path, tensors(), 200)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) > 2 and set(modes.values()) == {0o666 & ~mask}


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, tensors(), 200)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_result_does_not_alias_the_file(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)}, 10**9)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensor("a").zero_()
    assert torch.equal(checkpoint.tensor("a"), torch.ones(4))


@pytest.mark.parametrize("damage", ["absent", "cut", "header", "shard", "index", "outside"])
def test_damaged_files_are_one_clear_error(tmp_path: Path, damage: str) -> None:
    write(tmp_path, tensors(), 200 if damage in ("shard", "index", "outside") else 10**9)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    if damage in ("absent", "shard"):
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "header":
        file.write_bytes(b"\xff" * 64)
    elif damage == "index":
        (tmp_path / INDEX).write_text("{}")
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        index["weight_map"]["scalar"] = "../elsewhere.safetensors"
        (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(RunError) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value) and "fix:" in str(caught.value)


def test_file_cut_while_in_use(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(500)
    with pytest.raises(RunError, match="ends inside tensor a"):
        checkpoint.tensor("a")
