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

from compressor.data.tokens import tokens_sha256
from compressor.errors import RecipeError, RunError

PROMPTS = "prompts.jsonl.gz"


@dataclass(frozen=True)
class Workload:
    """Prompts that every variant gets.

    Attributes:
        tokens: ids of each prompt; of one length, or each as long as it is.
        source: where the texts come from, as the recipe names it.
        seed: seed of the order of the texts.
        chat_template: whether each text was put into the model's chat template.
    """

    tokens: tuple[tuple[int, ...], ...]
    source: str
    seed: int
    chat_template: bool = False

    @property
    def input_length(self) -> int | None:
        """Tokens of every prompt; None where they differ."""
        lengths = {len(prompt) for prompt in self.tokens}
        return lengths.pop() if len(lengths) == 1 else None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens))

    def describe(self) -> dict[str, Any]:
        """Facts for the report."""
        return {
            "prompts": self.source,
            "prompt_count": len(self.tokens),
            "input_length": self.input_length,
            "input_tokens": {
                "least": min(map(len, self.tokens)),
                "mean": sum(map(len, self.tokens)) / len(self.tokens),
                "most": self.longest,
            },
            "chat_template": self.chat_template,
            "prompts_seed": self.seed,
            "prompts_sha256": prompts_sha256(self.tokens),
        }


def prompts_sha256(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 (hex) of all prompts: `tokens_sha256` of the array where they have one length, else
    of their `prompt_sha256` one after the other."""
    if len({len(prompt) for prompt in prompts}) == 1:
        return tokens_sha256(np.asarray(prompts, dtype=np.int32))
    return hashlib.sha256("".join(map(prompt_sha256, prompts)).encode()).hexdigest()


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
    input_length: int | None,
    count: int,
    seed: int,
    source: str,
    chat_template: bool = False,
) -> Workload:
    """`count` prompts from `texts`, which are put in a seeded order and gone through as often as it
    takes.

    With an `input_length` every prompt has exactly that many tokens: it starts at the start of a
    text and, when that one is too short, goes on with the next ones (joined by a blank line), so
    each prompt starts like a real request. Without, every prompt is one text, whole.

    Args:
        encode: text -> token ids, in the chat template where `chat_template` says so.

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
    if input_length is None:
        whole = tuple(tuple(encoded[row % len(encoded)]) for row in range(count))
        return Workload(whole, source, seed, chat_template)
    gap = [] if chat_template else list(encode("\n\n"))
    rows = []
    for row in range(count):
        tokens: list[int] = []
        index = row
        while len(tokens) < input_length:
            tokens += (gap if tokens else []) + encoded[index % len(encoded)]
            index += 1
        rows.append(tuple(tokens[:input_length]))
    return Workload(tuple(rows), source, seed, chat_template)


def output_lengths(bounds: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` answer lengths [tokens], each as likely as any other from the first of `bounds` to
    the second, both included."""
    low, high = bounds
    return np.random.default_rng(seed).integers(low, high + 1, size=count).tolist()


def tokenizer_encode(tokenizer: Any, chat_template: bool = False) -> Callable[[str], list[int]]:
    """``text -> token ids`` for a Hugging Face tokenizer: without special tokens, or as the user's
    message in its chat template.

    Raises RecipeError when it has no template.
    """
    if not chat_template:
        return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "the model has no chat template",
            where="measure.workload.chat_template",
            fix="leave it out: prompts are then sent as they are",
        )

    def encode(text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]

    return encode
