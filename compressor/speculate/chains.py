"""How far a chain of drafted tokens gets, from whether each of them was right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def chain_figures(right: Iterable[torch.Tensor]) -> dict[str, Any]:
    """What a lossless greedy decoder comes to with chains of the likeliest tokens.

    Args:
        right: bool [positions, k] of each text: whether token i of the chain that begins at a
            position is what the text says there; False behind the text's end.

    Returns:
        ``expected_length``: tokens per step of the target, its own included, over all positions
        alike. ``tokens_per_step``: the same of decoding these texts, which visits some positions
        only. ``per_position``: share of chains whose first i + 1 tokens are all right, of k.
    """
    reached: torch.Tensor | None = None
    positions = steps = 0
    for text in right:
        together = text.long().cumprod(-1)
        reached = together.sum(0) if reached is None else reached + together.sum(0)
        positions += len(together)
        runs = together.sum(-1).tolist()
        place = 0
        while place < len(runs):
            place += 1 + runs[place]
            steps += 1
    shares = [] if reached is None else (reached.double() / max(positions, 1)).tolist()
    return {
        "expected_length": 1 + sum(shares),
        "tokens_per_step": positions / max(steps, 1),
        "per_position": shares,
    }
