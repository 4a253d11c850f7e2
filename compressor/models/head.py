"""A causal LM cut in two: the decoder up to its last hidden state, and the head to logits.

Logits of a whole batch are 85 times as large as the hidden states they come from (SmolLM2: 49,152
against 576), so the baseline's hidden states are what is kept, and full-vocabulary distributions
are made again from them a few tokens at a time. That keeps divergences exact and disk use small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compressor.errors import RunError

CausalModel = Any  # a transformers causal LM; torch types its attributes as Tensor | Module


class Head:
    """Hidden state -> logits of a causal LM, with the scalings that some families apply.

    Args:
        lm_head: module mapping [n, hidden] to [n, vocab]; one without parameters (quantized) takes
            hidden states in any dtype.
        config: the model's config; ``final_logit_softcapping`` (Gemma 2), ``logit_scale``
            (Cohere) and ``logits_scaling`` (Granite) are honoured.
    """

    def __init__(self, lm_head: nn.Module, config: object) -> None:
        self.lm_head = lm_head
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None) or 1.0
        scaling = getattr(config, "logits_scaling", None)
        if scaling:
            self.scale /= scaling

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [n, vocab] of hidden states [n, hidden]."""
        weight = next(self.lm_head.parameters(), None)
        logits = self.lm_head(hidden if weight is None else hidden.to(weight.dtype)).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def split(model: CausalModel) -> Head:
    """The head of a loaded causal LM, checked against the model's own logits.

    Raises:
        RunError: the model computes its logits in a way that `Head` does not reproduce, or they
            are not finite.
    """
    head = Head(model.get_output_embeddings(), model.config)
    device = next(model.parameters()).device
    probe = torch.arange(3, 11, device=device).unsqueeze(0) % model.config.vocab_size
    with torch.no_grad():
        expected = model(probe, use_cache=False).logits[0].float()
        got = head(last_hidden(model, probe)[0])
    if not bool(torch.isfinite(expected).all()):
        raise RunError(
            "the model's output holds NaN or infinite values, though its weights are finite",
            where=type(model).__name__,
            fix="its activations overflow: download it again, or load it in a wider `model.dtype`",
        )
    scale = max(float(expected.abs().max()), 1.0)
    if not torch.allclose(expected, got, atol=1e-2 * scale, rtol=0):
        raise RunError(
            "logits cannot be recomputed from the last hidden state of this architecture",
            where=type(model).__name__,
            fix="report the architecture: it applies a logit transform unknown to the evaluator",
        )
    return head


def last_hidden(model: CausalModel, ids: torch.Tensor) -> torch.Tensor:
    """Input of the head, [batch, length, hidden], for token ids [batch, length]."""
    return model.base_model(ids, use_cache=False).last_hidden_state
