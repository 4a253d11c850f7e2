"""GGUF headers that lie are refused before anything is made of what they say."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from compressor.errors import RunError
from compressor.models.gguf_file import count_field, open_gguf, text_field


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("llama.attention.head_count_kv", [2, 3])
    writer.add_token_list([f"t{i}" for i in range(100)])
    writer.add_float32("general.x", 0.5)
    writer.add_tensor("a", np.arange(96, dtype=np.float32).reshape(3, 32))
    rows = np.zeros((5, 36), dtype=np.uint8)
    writer.add_tensor("b", rows, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_sound_file_is_what_the_library_reads(sound: Path) -> None:
    reader, theirs = open_gguf(sound), GGUFReader(sound)
    assert [t.name for t in reader.tensors] == [t.name for t in theirs.tensors] == ["a", "b"]
    assert text_field(reader, "general.architecture") == "llama"
    assert text_field(reader, "llama.block_count", "none") == "none"
    assert count_field(reader, "llama.block_count", 9) == 2
    assert count_field(reader, "llama.attention.head_count_kv", 9) == 2
    assert count_field(reader, "llama.nothing", 9) == 9
    with pytest.raises(RunError, match=r"general\.x is not a count"):
        count_field(reader, "general.x", 1)


def place(data: bytes, text: bytes) -> int:
    """Where the bytes behind a text begin."""
    return data.index(text) + len(text)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda d: b"GGML" + d[4:], "does not start as a GGUF file"),
    "version": (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "version 1"),
    "tensors": (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "fields and"),
    "fields": (lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], "fields and"),
    "cut in the header": (lambda d: d[:200], "ends inside its header|fields and"),
    "cut in the weights": (lambda d: d[:-100], "goes beyond the end"),
    "strings": (
        lambda d: _put(d, place(d, b"tokenizer.ggml.tokens") + 8, struct.pack("<Q", 1 << 50)),
        "strings",
    ),
    "one string": (
        lambda d: _put(d, place(d, b"tokenizer.ggml.tokens") + 16, struct.pack("<Q", 1 << 62)),
        "ends inside its header",
    ),
    "key": (lambda d: _put(d, 24, struct.pack("<Q", 1 << 40)), "a text of"),
    "type": (lambda d: _put(d, place(d, b"llama.block_count"), b"\x63"), "unknown type"),
    "dimensions": (lambda d: _put(d, _tensor(d), struct.pack("<I", 9)), "9 dimensions"),
    "shape": (lambda d: _put(d, _tensor(d) + 4, struct.pack("<Q", 1 << 61)), "beyond the end"),
    "no elements": (lambda d: _put(d, _tensor(d) + 4, struct.pack("<Q", 0)), "has the shape"),
    "quantization": (lambda d: _put(d, _tensor(d) + 20, struct.pack("<I", 250)), "unknown type"),
    "offset": (lambda d: _put(d, _tensor(d) + 24, struct.pack("<Q", 3)), "not aligned"),
    "overlap": (
        lambda d: _put(d, _tensor(d, b"b") + 24, struct.pack("<Q", 32)), "lies over another",
    ),
    "twice": (lambda d: _put(d, _tensor(d, b"b") - 1, b"a"), "there twice"),
    "text": (lambda d: d.replace(b"general.x", b"general.\xff"), "not UTF-8"),
}  # fmt: skip


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _tensor(data: bytes, name: bytes = b"a") -> int:
    """Where the number of a tensor's dimensions stands."""
    return place(data, struct.pack("<Q", 1) + name + struct.pack("<I", 2)) - 4


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_header_that_lies_is_one_error_at_once(sound: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    data = sound.read_bytes()
    changed = change(data)
    assert changed != data
    sound.write_bytes(changed)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(RunError, match=message) as caught:
        open_gguf(sound)
    assert time.monotonic() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    assert caught.value.where == str(sound) and caught.value.fix
