"""Documents of the built-in tasks, which their YAML files name: read, and disturbed on purpose.

How a document is disturbed depends on its place and the seed alone, so every model and every run
sees the same one, whatever the number of documents that are taken.
"""

from __future__ import annotations

import gzip
import json
import random
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

BUILTIN = files("compressor.evaluate") / "builtin"
SHORTEST = 4  # letters of a word that may have a typo
# Neighbours on a QWERTY keyboard.
_NEAR = {
    key: row[max(place - 1, 0) : place] + row[place + 1 : place + 2]
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for place, key in enumerate(row)
}


def social_iqa(
    *, typo_rate: float = 0.0, shuffled: bool = False, seed: int = 0, **_: Any
) -> dict[str, Dataset]:
    """SocialIQA's test split: context, question, choices (three) and label (the right one's index).

    Args:
        typo_rate: share of the longer words of context and question that get a typo.
        shuffled: put the choices in another order; never in the one that they had.
        seed: of either.
    """
    from datasets import Dataset

    rows = [json.loads(line) for line in _lines("social_iqa.jsonl.gz")]
    for place, row in enumerate(rows):
        chance = random.Random(f"{seed}/{place}")
        if typo_rate:
            row["context"] = with_typos(row["context"], typo_rate, chance)
            row["question"] = with_typos(row["question"], typo_rate, chance)
        if shuffled:
            row["choices"], row["label"] = reordered(row["choices"], row["label"], chance)
    return {"test": Dataset.from_list(rows)}


def safety(*, kind: str, **_: Any) -> dict[str, Dataset]:
    """Prompts of one kind, harmful or harmless, and what is expected: refused or answered."""
    from datasets import Dataset

    rows = [json.loads(line) for line in _lines("safety.jsonl")]
    expected = "refused" if kind == "harmful" else "answered"
    return {
        "test": Dataset.from_list(
            [{"prompt": r["prompt"], "expected": expected} for r in rows if r["kind"] == kind]
        )
    }


def listed(document: dict[str, Any]) -> str:
    """A prompt that names the choices, so that their order can matter."""
    choices = "".join(f"- {choice}\n" for choice in document["choices"])
    return f"{document['context']}\nQ: {document['question']}\n{choices}A:"


def _lines(name: str) -> list[str]:
    data = (BUILTIN / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
    return text.rstrip("\n").split("\n")


def with_typos(text: str, rate: float, chance: random.Random) -> str:
    """The text with one typo in that share of its words of `SHORTEST` letters or more.

    A typo swaps two letters, leaves one out, doubles one or hits the key beside it; the first
    letter stays. Spaces stay as they are.
    """
    words = text.split(" ")
    for place, word in enumerate(words):
        letters = [i for i, letter in enumerate(word) if letter.isalpha()]
        if len(letters) >= SHORTEST and chance.random() < rate:
            words[place] = _typo(word, chance.choice(letters[1:]), chance)
    return " ".join(words)


def _typo(word: str, at: int, chance: random.Random) -> str:
    kind = chance.choice(("swap", "drop", "double", "near"))
    letter = word[at]
    if kind == "swap" and at > 1 and word[at - 1] != letter:
        return word[: at - 1] + letter + word[at - 1] + word[at + 1 :]
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    near = _NEAR.get(letter.lower(), "")
    if kind == "near" and near:
        other = chance.choice(near)
        return word[:at] + (other.upper() if letter.isupper() else other) + word[at + 1 :]
    return word[:at] + letter + word[at:]


def reordered(choices: list[str], label: int, chance: random.Random) -> tuple[list[str], int]:
    """(choices in another order, where the right one is now)."""
    order = list(range(len(choices)))
    while order == sorted(order) and len(order) > 1:
        chance.shuffle(order)
    return [choices[i] for i in order], order.index(label)
