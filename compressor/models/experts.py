"""Fused experts of transformers 5, taken apart into linears.

transformers 5 holds all experts of a layer in one 3-D parameter (``gate_up_proj`` [E, 2I, H],
``down_proj`` [E, H, I]), which no quantizer of linears sees. Most checkpoints on disk, and engines,
have one matrix per expert: `UnfusedExperts` computes the same from those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Expert(nn.Module):
    """One gated feed-forward: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)


class UnfusedExperts(nn.ModuleList):
    """Experts as a list, called as transformers calls the fused module.

    Args:
        fused: the module to stand in for, one that `is_fused`.

    Attributes:
        every_token: run each token through every expert, so that hooks on an expert's linears see
            them all; the result is still that of the experts the router chose.
    """

    every_token: bool

    def __init__(self, fused: Any) -> None:
        count, double, hidden = fused.gate_up_proj.shape
        super().__init__(Expert(hidden, double // 2) for _ in range(count))
        # Not as a submodule: a ModuleList would count it as one more expert.
        object.__setattr__(self, "_act", fused.act_fn)
        self.every_token = False

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], chosen experts.
            top_k_weights: [tokens, k], their weights.
        """
        result = torch.zeros_like(hidden_states)
        act: Any = self._act
        experts: list[Any] = list(self)
        chosen = range(len(experts)) if self.every_token else top_k_index.unique().tolist()
        for index in chosen:
            if index >= len(experts):
                continue  # a router marks a slot that is not to be computed by E
            expert = experts[index]
            token, position = torch.where(top_k_index == index)
            x = hidden_states if self.every_token else hidden_states[token]
            y = expert.down_proj(act(expert.gate_proj(x)) * expert.up_proj(x))
            if self.every_token:
                y = y[token]
            y = y * top_k_weights[token, position, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result


def is_fused(module: Any) -> bool:
    """Whether a module holds fused gated experts of the plain kind that can be taken apart."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    return (
        gate_up.ndim == down.ndim == 3
        and gate_up.shape[1] == 2 * down.shape[2]
        and gate_up.shape[2] == down.shape[1]
        and hasattr(module, "act_fn")
        and getattr(gate, "__name__", "") == "_default_apply_gate"
        and getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "has_post_expert_norm", False)
    )
