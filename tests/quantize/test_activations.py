"""Activations in a mapped file: the same bytes, nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.quantize import activations, driver, registry, stream
from tests import tiny
from tests.quantize.cuts import Cut, cut_after

TOKENS = np.random.default_rng(0).integers(4, 300, (6, 32)).astype(np.int32)


def made(name: str, **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**options))


def quantize(root: Path, out: str, advance: Any = lambda note: None, **settings: Any) -> Any:
    return driver.quantize_model(
        CausalLM.open(root / "model"), made("gptq", scheme="W4A16", group_size=16), root / out,
        tokens=TOKENS, batch_size=2, advance=advance, **settings,
    )  # fmt: skip


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_bytes_that_memory_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: bool, dtype: torch.dtype
) -> None:
    """Undisturbed, and cut short and resumed."""
    tiny.build("llama", tmp_path / "model", layers=3)
    monkeypatch.setattr(stream, "CHECKPOINT_SECONDS", 0.0)
    settings: dict[str, Any] = {"dtype": dtype}
    if follow:
        settings["refinements"] = [made("signround", iterations=3)]
    assert quantize(tmp_path, "memory", **settings)["activations"] == "memory"
    monkeypatch.setattr(activations, "ACTIVATIONS_SHARE", 0.0)
    notes: list[str] = []
    assert quantize(tmp_path, "disk", notes.append, **settings)["activations"] == "disk"
    assert all("on disk" in note for note in notes)
    assert files(tmp_path / "disk") == files(tmp_path / "memory")

    with pytest.raises(Cut):
        quantize(tmp_path, "parts", cut_after(), **settings)
    # No name in the directory that a kill could leave there.
    assert sorted(files(tmp_path / "parts")) == [
        "block-00000.safetensors", "layers.jsonl", "resume.safetensors",
    ]  # fmt: skip
    assert quantize(tmp_path, "parts", **settings)["resumed_at_block"] == 1
    assert files(tmp_path / "parts") == files(tmp_path / "memory")


def test_one_file_takes_up_what_memory_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk may be resumed on a machine with less memory, or more."""
    tiny.build("llama", tmp_path / "model", layers=3)
    monkeypatch.setattr(stream, "CHECKPOINT_SECONDS", 0.0)

    quantize(tmp_path, "whole")
    with pytest.raises(Cut):
        quantize(tmp_path, "parts", cut_after())
    monkeypatch.setattr(activations, "ACTIVATIONS_SHARE", 0.0)
    assert quantize(tmp_path, "parts")["activations"] == "disk"
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_tensor_is_a_file_without_a_name(tmp_path: Path, dtype: torch.dtype) -> None:
    free = os.statvfs(tmp_path).f_bfree
    tensor = activations.allocate((4, 1024, 1024), dtype, tmp_path)
    assert tensor.shape == (4, 1024, 1024) and tensor.dtype == dtype
    value = torch.randn(4, 1024, 1024).to(dtype)
    tensor[1:3] = value[1:3]
    assert torch.equal(tensor[1:3], value[1:3])
    assert not list(tmp_path.iterdir())
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "rw-s" in line]
    assert any(str(tmp_path) in line for line in lines)
    del tensor
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "rw-s" in line]
    assert not any(str(tmp_path) in line for line in lines), (free, lines)


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"No space left.*\n.*calibration\.samples"):
        activations.allocate((8,), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_share_of_the_free_memory_is_used() -> None:
    assert activations.kept_on(1000, "cpu") == "memory"
    assert activations.kept_on(1 << 60, "cpu") == "disk"
