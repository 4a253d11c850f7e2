"""Where a model's answers end."""

from __future__ import annotations

from typing import Any


def end_tokens(model: Any) -> frozenset[int]:
    """End-of-sequence token ids: those of the generation config, else of the config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
