"""What vLLM is told of a speculator that it is to serve with."""

from __future__ import annotations

import json
from pathlib import Path

_NAMES = {"draft": "draft_model"}
# vLLM (0.32) counts a Medusa head's `token_map` among the weights that were not loaded, though its
# loader has read it (model_executor/models/medusa.py), and stops; this turns the count off.
_UNCHECKED = ("--model-loader-extra-config", json.dumps({"enable_weights_track": False}))


def speculative_config(
    method: str, tokens: int, directory: Path | str | None = None, **lookup: int
) -> str:
    """What follows ``vllm serve TARGET --speculative-config``, as one line of JSON.

    Args:
        method: ``medusa``, ``eagle3``, ``draft`` or ``ngram``.
        tokens: drafted per step.
        directory: the exported speculator; None for prompt lookup.
        lookup: ``prompt_lookup_min`` and ``prompt_lookup_max``, of prompt lookup.
    """
    model = {} if directory is None else {"model": str(directory)}
    method = _NAMES.get(method, method)
    return json.dumps({"method": method, **model, "num_speculative_tokens": tokens, **lookup})


def serving_flags(
    method: str, tokens: int, directory: Path | None = None, **lookup: int
) -> tuple[str, ...]:
    """The flags that vLLM serves a target with a speculator with; arguments as of
    `speculative_config`."""
    flags = ("--speculative-config", speculative_config(method, tokens, directory, **lookup))
    reduced = directory is not None and method == "medusa" and _reduced(directory)
    return flags + _UNCHECKED if reduced else flags


def _reduced(directory: Path) -> bool:
    """Whether exported Medusa heads know a part of the vocabulary only."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return bool(config["truncated_vocab_size"] < config["vocab_size"])
