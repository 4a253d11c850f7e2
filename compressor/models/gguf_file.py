"""GGUF files of unknown origin: the header is checked before anything is made of its figures.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
The library `gguf` believes what counts, lengths and offsets it reads.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from compressor.errors import RunError, first_line

if TYPE_CHECKING:
    from gguf import GGUFReader

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARRAY, _STRING = 9, 8
# Bytes of a value by its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_LONGEST_KEY = (1 << 16) - 1
_MOST_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"
_FIX = "download it again: it is cut short or altered"


def check_gguf(path: Path) -> None:
    """See that a GGUF file's header holds what it claims to; quick, where `open_gguf` takes seconds
    for a vocabulary.

    Raises:
        RunError: it is no such file, is cut short, or has counts, lengths, types or offsets that
            cannot be.
    """
    with _refused(path), open(path, "rb") as file:
        _Header(file, os.fstat(file.fileno()).st_size).check()


def open_gguf(path: Path) -> GGUFReader:
    """A GGUF file with its metadata, once `check_gguf` found it sound.

    Raises:
        RunError: as `check_gguf`.
    """
    from gguf import GGUFReader

    check_gguf(path)
    with _refused(path):
        return GGUFReader(path)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise RunError(
            f"cannot be read as GGUF ({first_line(error)})", where=str(path), fix=_FIX
        ) from error


def text_field(reader: GGUFReader, key: str, default: str = "?") -> str:
    """A field of text; the default where there is none."""
    found = reader.get_field(key)
    value = found.contents() if found else default
    return value if isinstance(value, str) else default


def count_field(reader: GGUFReader, key: str, default: int) -> int:
    """A field that is a count, or the first of a list of them; the default where there is none.

    Raises:
        RunError: it is something else, or negative.
    """
    found = reader.get_field(key)
    value: Any = found.contents() if found else default
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RunError(f"{key} is not a count: {value!r:.40}", where=str(key), fix=_FIX)
    return value


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.alignment = 32

    def check(self) -> None:
        """Raise ValueError, saying what is wrong."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.take(4) != _MAGIC:
            raise ValueError("the file does not start as a GGUF file does")
        version = self.number(4)
        if version not in _VERSIONS:
            raise ValueError(f"version {version}")
        tensors, fields = self.number(8), self.number(8)
        # A field takes 13 bytes at least, a tensor 32.
        if 13 * fields + 32 * tensors > self.left:
            raise ValueError(f"{fields} fields and {tensors} tensors in {self.size} bytes")
        self.fields(fields)
        spans: list[tuple[int, int, str]] = []
        names = set()
        for _ in range(tensors):
            name = self.string(_LONGEST_KEY)
            if name in names:
                raise ValueError(f"tensor {name!r} is there twice")
            names.add(name)
            dimensions = self.number(4)
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
            shape = [self.number(8) for _ in range(dimensions)]
            kind, offset = self.number(4), self.number(8)
            try:
                block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise ValueError(f"tensor {name!r} has the unknown type {kind}") from None
            if not all(shape) or shape[0] % block:
                raise ValueError(f"tensor {name!r} has the shape {shape}")
            if offset % self.alignment:
                raise ValueError(f"tensor {name!r} is not aligned")
            spans.append((offset, math.prod(shape) // block * width, name))
        start = -(-self.file.tell() // self.alignment) * self.alignment
        end = 0
        for offset, length, name in sorted(spans):
            if offset < end:
                raise ValueError(f"tensor {name!r} lies over another")
            end = offset + length
            if start + end > self.size:
                raise ValueError(f"tensor {name!r} goes beyond the end of the file")

    def fields(self, count: int) -> None:
        """Go over the metadata."""
        names = set()
        for _ in range(count):
            name = self.string(_LONGEST_KEY)
            if name in names:
                raise ValueError(f"field {name!r} is there twice")
            names.add(name)
            kind = self.number(4)
            if name == _ALIGNMENT:
                if kind != 4:
                    raise ValueError(f"{name} is no 32-bit number")
                self.alignment = self.number(4)
                known = self.alignment and not self.alignment & (self.alignment - 1)
                if not known or self.alignment > 1 << 16:
                    raise ValueError(f"{name} is {self.alignment}")
            else:
                self.value(kind, name)

    def value(self, kind: int, name: str) -> None:
        if kind == _STRING:
            self.string(self.left)
        elif kind == _ARRAY:
            inner, count = self.number(4), self.number(8)
            if inner == _STRING:
                if 8 * count > self.left:
                    raise ValueError(f"{name!r} has {count} strings")
                for _ in range(count):
                    self.skip(self.number(8))
            elif inner in _SIZES:
                self.skip(count * _SIZES[inner])
            else:
                raise ValueError(f"{name!r} is a list of the unknown type {inner}")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"{name!r} has the unknown type {kind}")

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def take(self, count: int) -> bytes:
        found = self.file.read(count) if count <= self.left else b""
        if len(found) < count:
            raise ValueError("the file ends inside its header")
        return found

    def skip(self, count: int) -> None:
        if count > self.left:
            raise ValueError("the file ends inside its header")
        self.file.seek(count, os.SEEK_CUR)

    def number(self, width: int) -> int:
        return int(struct.unpack("<I" if width == 4 else "<Q", self.take(width))[0])

    def string(self, longest: int) -> str:
        length = self.number(8)
        if length > longest:
            raise ValueError(f"a text of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("a text that is not UTF-8") from None
