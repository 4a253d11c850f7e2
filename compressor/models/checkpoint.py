"""Safetensors checkpoints read tensor by tensor and written shard by shard.

Format: https://huggingface.co/docs/safetensors; sharded ones carry ``model.safetensors.index.json``
with a ``weight_map`` from tensor to file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compressor.errors import RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
UNFINISHED = "unfinished"  # directory beside the files that are being written
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class _Entry:
    """A tensor's place: file, first byte, shape, dtype."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of a directory, read one at a time.

    Args:
        directory: holds ``model.safetensors``, or shards with their index.

    Raises:
        RunError: no safetensors there, a shard missing, or a header that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[str, _Entry] = {}
        for file in self._shards():
            self._entries.update(_read_header(directory / file))

    def _shards(self) -> list[str]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                files = sorted(
                    set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                )
            except (ValueError, KeyError, AttributeError) as error:
                raise RunError(
                    "not a shard index", where=str(index), fix="download it again"
                ) from error
        else:
            files = [SINGLE]
        for file in files:
            if not (self.directory / file).is_file() or Path(file).name != file:
                raise RunError(
                    "the weights are not there",
                    where=str(self.directory / file),
                    fix="give a directory with safetensors, or download the missing shard",
                )
        return files

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def numel(self, name: str) -> int:
        return math.prod(self._entries[name].shape)

    @property
    def total_bytes(self) -> int:
        return sum(self.numel(name) * self.dtype(name).itemsize for name in self._entries)

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        """One tensor, converted to ``dtype`` when given; ``pinned`` for quick copies to a GPU.

        It is read into memory of its own, aligned as torch aligns: results never depend on where
        in the file it lay, and no part of the file stays mapped.
        """
        entry = self._entries[name]
        value = torch.empty(entry.shape, dtype=entry.dtype, pin_memory=pinned)
        _read(name, entry, value)
        return value if dtype is None else value.to(dtype)


def read_file(
    path: Path, make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All tensors of one file, each read into what ``make`` gives for its shape and dtype."""
    found = {}
    for name, entry in _read_header(path).items():
        found[name] = make(entry.shape, entry.dtype)
        _read(name, entry, found[name])
    return found


def _read(name: str, entry: _Entry, into: torch.Tensor) -> None:
    """Fill a contiguous tensor on the CPU with one from disk."""
    if not into.numel():
        return
    array: Any = into.view(-1).view(torch.uint8).numpy()
    buffer = memoryview(array)
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.offset)
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise RunError(
                    f"the file ends inside tensor {name}",
                    where=str(entry.path),
                    fix="it was cut short while in use: download it again",
                )
            done += count


def _read_header(path: Path) -> dict[str, _Entry]:
    """Where each tensor of a safetensors file lies."""
    try:
        with safe_open(path, "pt"):  # checks header, offsets and the file's length
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(
            f"cannot be read as safetensors ({error})",
            where=str(path),
            fix="download it again: it is cut short or altered",
        ) from error
    header.pop("__metadata__", None)
    entries = {}
    for name, part in header.items():
        dtype = _DTYPES.get(part["dtype"])
        if dtype is None:
            raise RunError(
                f"tensor {name} has the unknown dtype {part['dtype']}",
                where=str(path),
                fix="convert the checkpoint to bfloat16, float16 or float32",
            )
        offset = 8 + length + part["data_offsets"][0]
        entries[name] = _Entry(path, offset, tuple(part["shape"]), dtype)
    return entries


def save_whole(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that is whole and synced before it gets its name.

    safetensors writes to a file of a random name beside it, which after a kill nobody would know
    to remove. Here that lies in a directory of a fixed name, which the next call removes, as does
    `drop_unfinished`. The file may be read by whoever may read its directory's others.
    """
    drop_unfinished(path.parent)
    scratch = path.parent / UNFINISHED
    scratch.mkdir()
    try:
        temporary = scratch / path.name
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(scratch.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        drop_unfinished(path.parent)


def drop_unfinished(directory: Path) -> None:
    """Remove what a killed `save_whole` left in a directory."""
    shutil.rmtree(directory / UNFINISHED, ignore_errors=True)


def copy_others(source: Path, target: Path) -> None:
    """Copy what lies beside a checkpoint's weights: config, tokenizer and so on."""
    for path in source.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, target / path.name)


def untie(config: dict[str, Any]) -> None:
    """Say in a config.json that the output layer has a weight of its own."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False


class TensorWriter:
    """Writes tensors as they come, with one shard in memory; equal input gives equal bytes.

    A model that fits one shard becomes ``model.safetensors``; ``close`` must be called.

    Args:
        directory: must exist.
        max_shard_bytes: a shard is closed before it would grow beyond this.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._bytes + size > self.max_shard_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def close(self) -> None:
        """Write what is left, name the shards ``model-0000i-of-0000n`` and write the index."""
        if self._shard or not self._written:
            self._flush()
        count = len(self._written)
        if count == 1:
            os.replace(self._part(0), self.directory / SINGLE)
            return
        weight_map = {}
        for i, names in enumerate(self._written):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._part(i), self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.directory / INDEX).write_text(text, encoding="utf-8")

    def _part(self, i: int) -> Path:
        return self.directory / f"part-{i:05d}.tmp"

    def _flush(self) -> None:
        save_whole(self._shard, self._part(len(self._written)), {"format": "pt"})
        self._written.append(sorted(self._shard))
        self._shard = {}
        self._bytes = 0


def write_checkpoint(
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: Path,
    directory: Path,
    max_shard_bytes: int,
) -> None:
    """Write a checkpoint's weights, and beside them what lies beside those of another.

    Args:
        tensors: by key, read once.
        source: the checkpoint whose config, tokenizer and so on are taken.
        directory: made anew.
        max_shard_bytes: size at which a shard is closed.
    """
    shutil.rmtree(directory, ignore_errors=True)  # what a killed attempt left
    directory.mkdir(parents=True)
    writer = TensorWriter(directory, max_shard_bytes)
    for key, value in tensors:
        writer.add(key, value)
    writer.close()
    copy_others(source, directory)
