"""What vLLM is told of a speculator that it is to serve with."""

from __future__ import annotations

import json
from pathlib import Path

_NAMES = {"draft": "draft_model"}


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
