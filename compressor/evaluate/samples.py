"""Results of a task, document by document: what every figure of accuracy is made from.

A file is JSON Lines, one object per document, in the order of the documents, so that the same line
of two variants' files is about the same document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from compressor.errors import RunError


@dataclass(frozen=True)
class TaskSample:
    """What became of one document.

    Attributes:
        id: of the document, the same in every variant.
        prompt_sha256: hex digest of the prompt.
        target: index of the right choice, or the right answer; None where there is neither.
        choice: index of the likeliest choice; None where text was generated.
        loglikelihoods: of each choice, in nats.
        bytes: UTF-8 bytes of each choice's continuation, which acc_norm divides by.
        response: what was generated.
        scores: one number by metric; acc and its like are 0 or 1.
    """

    id: str
    prompt_sha256: str
    target: int | str | None
    choice: int | None
    loglikelihoods: tuple[float, ...] | None
    bytes: tuple[int, ...] | None
    response: str | None
    scores: Mapping[str, float]


def write_samples(samples: Iterable[TaskSample], path: Path) -> None:
    """Write a file of samples; the directory is made when it is not there.

    Raises ValueError for a number that is not finite, which JSON does not hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False) + "\n")


def read_samples(path: Path) -> list[TaskSample]:
    """The samples of a file, in its order.

    Raises:
        RunError: it cannot be read, or a line is not a sample; with the line's number.
    """
    samples = []
    try:
        # Not splitlines: it also breaks at characters that JSON strings may hold.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"the samples cannot be read ({error})", where=str(path), fix="run the recipe again"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line and len(lines) == 1:
            break
        try:
            samples.append(_sample(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"not a task's sample ({error})", where=f"{path}:{number}", fix="run it again"
            ) from error
    return samples


_NAMES = frozenset(field.name for field in fields(TaskSample))


def _sample(value: Any) -> TaskSample:
    if not isinstance(value, dict) or value.keys() != _NAMES:
        raise ValueError(f"expected an object with {', '.join(sorted(_NAMES))}")
    if not isinstance(value["id"], str) or not isinstance(value["prompt_sha256"], str):
        raise ValueError("id and prompt_sha256 must be text")
    scores = {name: float(score) for name, score in value["scores"].items()}
    likelihoods, sizes = value["loglikelihoods"], value["bytes"]
    if likelihoods is not None:
        likelihoods = tuple(float(one) for one in likelihoods)
    if sizes is not None:
        sizes = tuple(int(one) for one in sizes)
    if not all(map(math.isfinite, (*scores.values(), *(likelihoods or ())))):
        raise ValueError("a number is not finite")
    choice, response = value["choice"], value["response"]
    if choice is not None and not (isinstance(choice, int) and choice >= 0):
        raise ValueError("choice must be an index")
    if likelihoods is not None and choice is not None and choice >= len(likelihoods):
        raise ValueError("choice is none of the choices")
    if likelihoods is not None and sizes is not None and len(likelihoods) != len(sizes):
        raise ValueError("loglikelihoods and bytes differ in number")
    if response is not None and not isinstance(response, str):
        raise ValueError("response must be text")
    return TaskSample(
        value["id"], value["prompt_sha256"], value["target"], choice, likelihoods, sizes, response,
        scores,
    )  # fmt: skip
