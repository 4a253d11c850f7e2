"""A declared load: prompts of one fixed token length, seeded, hashed."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import RecipeError, RunError

PROMPTS = "prompts.jsonl.gz"


@dataclass(frozen=True)
class Workload:
    """Prompts of equal length.

    Attributes:
        tokens: int32 [prompts, input_length].
        source: where the texts come from, as the recipe names it.
        seed: seed of the order of the texts.
        sha256: hash of the shape and the little-endian int32 tokens.
    """

    tokens: np.ndarray
    source: str
    seed: int
    sha256: str

    def batch(self, first: int, size: int) -> list[list[int]]:
        """`size` prompts from row `first` on, wrapping round at the end."""
        rows = [(first + offset) % len(self.tokens) for offset in range(size)]
        return self.tokens[rows].tolist()

    def describe(self) -> dict[str, Any]:
        """Facts for the report."""
        return {
            "prompts": self.source,
            "prompt_count": int(self.tokens.shape[0]),
            "input_length": int(self.tokens.shape[1]),
            "prompts_seed": self.seed,
            "prompts_sha256": self.sha256,
        }


def tokens_sha256(tokens: np.ndarray) -> str:
    """SHA-256 (hex) of shape and content of an integer array, independent of byte order."""
    data = np.ascontiguousarray(tokens, dtype="<i4")
    return hashlib.sha256(str(data.shape).encode() + data.tobytes()).hexdigest()


def prompt_sha256(tokens: Sequence[int]) -> str:
    """SHA-256 (hex) of one prompt's token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).hexdigest()


def write_prompts(path: Path, prompts: Iterable[Sequence[int]]) -> dict[str, Any]:
    """Write one JSON list of token ids a line, gzipped, byte-identical for equal prompts.

    Returns ``path`` (the file's name), its ``sha256``, and ``prompt_sha256`` of every line.
    """
    rows = [[int(token) for token in prompt] for prompt in prompts]
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    data = gzip.compress(text.encode(), mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {
        "path": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "prompt_sha256": [prompt_sha256(row) for row in rows],
    }


def read_prompts(path: Path) -> list[list[int]]:
    """The inverse of `write_prompts`; RunError when the file is not what it wrote."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [[int(token) for token in json.loads(line)] for line in file]
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise RunError(
            f"the workload's prompts cannot be read: {error}",
            where=str(path),
            fix="run the measurement again",
        ) from error


def build_workload(
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    input_length: int,
    count: int,
    seed: int,
    source: str,
) -> Workload:
    """Cut `count` prompts of exactly `input_length` tokens from `texts`.

    The texts are put in a seeded order; a prompt starts at the start of a text and, when that one
    is too short, goes on with the next ones (joined by a blank line), so each prompt starts like a
    real request. When there are fewer texts than prompts the order is gone through again.

    Raises RecipeError when the texts hold no token at all.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = [list(encode(texts[index])) for index in order if texts[index].strip()]
    encoded = [tokens for tokens in encoded if tokens]
    if not encoded:
        raise RecipeError(
            "the prompts of the workload hold no text",
            where=f"measure.workload.prompts ({source})",
            fix="name a source with at least one prompt that is not empty",
        )
    gap = list(encode("\n\n"))
    rows = np.empty((count, input_length), dtype=np.int32)
    for row in range(count):
        tokens: list[int] = []
        index = row
        while len(tokens) < input_length:
            tokens += (gap if tokens else []) + encoded[index % len(encoded)]
            index += 1
        rows[row] = tokens[:input_length]
    return Workload(rows, source, seed, tokens_sha256(rows))


def tokenizer_encode(tokenizer: Any) -> Callable[[str], list[int]]:
    """`text -> token ids` without special tokens, for a Hugging Face tokenizer."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
