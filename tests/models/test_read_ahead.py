"""Blocks read in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import RunError
from compressor.models import architecture
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint
from compressor.models.read_ahead import ReadAhead
from compressor.quantize import driver, registry
from tests import tiny

TOKENS = np.random.default_rng(0).integers(4, 300, (4, 16)).astype(np.int32)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return tiny.build("llama", tmp_path / "model", layers=3)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(tensor, whether this thread read it) of every reading."""
    seen: list[tuple[str, bool]] = []
    original = Checkpoint.tensor

    def watch(self: Checkpoint, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((name, threading.current_thread() is threading.main_thread()))
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "tensor", watch)
    return seen


def test_tensors_are_taken_once_and_as_stored(model_dir: Path) -> None:
    checkpoint = Checkpoint(model_dir)
    keys = [name for name in checkpoint.names if ".layers.1." in name]
    ahead = ReadAhead(checkpoint, keys, "cpu")
    for key in keys:
        value = ahead.take(key)
        assert value is not None and torch.equal(value, checkpoint.tensor(key))
    assert ahead.take(keys[0]) is None
    assert ahead.take("model.norm.weight") is None


def test_a_block_read_ahead_is_the_block(model_dir: Path, reads: list[tuple[str, bool]]) -> None:
    model, plain = CausalLM.open(model_dir), CausalLM.open(model_dir)
    assert model.read_ahead(1, "cpu")
    model.load_block(1, "cpu", torch.float32)
    assert reads and not any(here for _, here in reads)
    plain.load_block(1, "cpu", torch.float32)
    for name, value in plain.blocks[1].named_parameters():
        assert torch.equal(model.blocks[1].get_parameter(name), value)
    model.unload_block(1)
    model.load_block(1, "cpu", torch.float32)  # from disk again: nothing is kept
    assert torch.equal(model.linears(1)[0].module.weight, plain.linears(1)[0].module.weight)


def test_another_block_than_the_one_read_ahead_is_read_itself(model_dir: Path) -> None:
    model, plain = CausalLM.open(model_dir), CausalLM.open(model_dir)
    model.read_ahead(2, "cpu")
    for one in (model, plain):
        one.load_block(0, "cpu", torch.float32)
    assert torch.equal(model.linears(0)[0].module.weight, plain.linears(0)[0].module.weight)


def test_it_is_off_where_memory_is_short(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, bool]]
) -> None:
    monkeypatch.setattr(architecture, "_AHEAD_SHARE", 0.0)
    model = CausalLM.open(model_dir)
    assert not model.read_ahead(1, "cpu")
    model.load_block(1, "cpu", torch.float32)
    assert reads and all(here for _, here in reads)


def test_the_walk_reads_each_block_once_and_gives_the_same_bytes(
    model_dir: Path, tmp_path: Path, reads: list[tuple[str, bool]]
) -> None:
    cls = registry.get("gptq")
    for out in ("plain", "ahead"):
        reads.clear()
        driver.quantize_model(
            CausalLM.open(model_dir), cls(cls.Options(scheme="W4A16", group_size=16)),
            tmp_path / out, tokens=TOKENS, read_ahead=out == "ahead",
        )  # fmt: skip
    of_blocks = {name: here for name, here in reads if ".layers." in name}
    assert len(of_blocks) == len([name for name, _ in reads if ".layers." in name])
    assert all(here == (".layers.0." in name) for name, here in of_blocks.items())
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "ahead" / path.name).read_bytes(), path.name


def test_a_file_cut_short_is_the_same_clear_error(model_dir: Path) -> None:
    messages = []
    for ahead in (False, True):
        model = CausalLM.open(model_dir)
        path = model_dir / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 8])
        if ahead:
            model.read_ahead(2, "cpu")
        with pytest.raises(RunError, match="ends inside tensor") as caught:
            model.load_block(2, "cpu", torch.float32)
        messages.append(str(caught.value))
        path.write_bytes(whole)
    assert messages[0] == messages[1]
