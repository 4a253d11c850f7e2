"""Generation drift: where a variant's greedy continuation leaves the baseline's.

Both continue the same prompts, each by its likeliest token. A token that differs changes all that
comes after it, so what counts is the first.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.errors import RunError

FILE = "drift.jsonl"


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt.

    Attributes:
        prompt: in words.
        tokens: the new ones, up to and with the first end token.
        text: the same in words.
    """

    prompt: str
    tokens: list[int]
    text: str


def until_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and with the first one that ends an answer."""
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    return list(tokens)


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token that is not the same (or is there in one alone); None if all are."""
    for place, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return place
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def summarise_drift(
    own: Sequence[Continuation], baseline: Sequence[Continuation], output_length: int
) -> dict[str, Any]:
    """Figures over all prompts.

    Returns:
        ``prompts``; ``equal``: continued exactly as by the baseline; ``first_difference`` by
        prompt, None where there is none, and its median, where such prompts count with the whole
        length; ``equal_after``: share of the prompts whose first so many tokens are the same.
    """
    found = [
        first_difference(mine.tokens, other.tokens)
        for mine, other in zip(own, baseline, strict=True)
    ]
    lengths = [*_powers(output_length), output_length]
    return {
        "prompts": len(found),
        "output_length": output_length,
        "equal": sum(place is None for place in found),
        "first_difference": found,
        "median_first_difference": statistics.median(
            output_length if place is None else place for place in found
        ),
        "equal_after": [
            {
                "tokens": length,
                "share": sum(p is None or p >= length for p in found) / len(found),
            }
            for length in lengths
        ],
    }


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... below a limit."""
    return [1 << power for power in range(limit.bit_length()) if 1 << power < limit]


def write_continuations(rows: Sequence[Continuation], path: Path) -> None:
    """One JSON object a line, in the order of the prompts."""
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def read_continuations(path: Path) -> list[Continuation]:
    """What `write_continuations` wrote; RunError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [Continuation(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"the continuations cannot be read ({error})", where=str(path), fix="run again"
        ) from error
