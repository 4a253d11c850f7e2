"""Perplexity of a model, and its divergence from the baseline, token by token.

Definitions (natural logarithms, per predicted token):

- perplexity: exp(mean negative log-likelihood) over all predicted tokens of a text;
- KL: KL(baseline || variant) = sum_v p_b(v) (log p_b(v) - log p_v(v)), over the full vocabulary;
- top-1 agreement: share of positions where both models' likeliest token is the same;
- bits/byte: total negative log-likelihood in bits over the UTF-8 bytes of the predicted text.

Intervals are 95% paired bootstrap intervals over evaluation windows (windows, and not tokens, are
resampled, since tokens of one window depend on each other).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from compressor.models.checkpoint import save_whole
from compressor.models.head import CausalModel, Head, last_hidden, split

TOKENS_PER_STEP = 256
BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class Scores:
    """Per-token results on one text: arrays of shape [windows, length - 1].

    Attributes:
        nll: float32, negative log-likelihood in nats.
        top1: int32, the likeliest token.
        kl: float32, KL(baseline || this) in nats; None for the baseline itself.
    """

    nll: np.ndarray
    top1: np.ndarray
    kl: np.ndarray | None = None

    def save(self, path: Path) -> None:
        arrays = {"nll": self.nll, "top1": self.top1}
        if self.kl is not None:
            arrays["kl"] = self.kl
        save_whole({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Scores:
        tensors = {k: v.numpy() for k, v in load_file(path).items()}
        return cls(tensors["nll"], tensors["top1"], tensors.get("kl"))


@torch.no_grad()
def score_baseline(
    model: CausalModel,
    windows: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Scores, torch.Tensor]:
    """Scores of the baseline, and its hidden states float32 [tokens, hidden], for reuse.

    Args:
        model: a loaded causal LM.
        windows: int32 [windows, length] token ids.
        batch_size: windows per forward.
        advance: called with the number of windows done.
    """
    head = split(model)
    nll, top1 = _arrays(windows)
    kept = torch.empty(nll.size, model.get_output_embeddings().weight.shape[1])
    for part, hidden, expected in _steps(model, windows, batch_size, advance):
        kept[part] = hidden.float().cpu()
        _fill(nll, top1, part, head(hidden), expected)
    shape = (len(windows), -1)
    return Scores(nll.reshape(shape), top1.reshape(shape)), kept


@torch.no_grad()
def score_variant(
    model: CausalModel,
    windows: np.ndarray,
    batch_size: int,
    baseline_hidden: torch.Tensor,
    baseline_head: Head,
    advance: Callable[[int], None] = lambda n: None,
) -> Scores:
    """Scores of a variant and its exact KL divergence from the baseline.

    Args:
        baseline_hidden: float32 [tokens, hidden] from `score_baseline`.
        baseline_head: the baseline's own head.
    """
    head = split(model)
    nll, top1 = _arrays(windows)
    kl = np.zeros(nll.shape, dtype=np.float32)
    for part, hidden, expected in _steps(model, windows, batch_size, advance):
        log_q = _fill(nll, top1, part, head(hidden), expected)
        reference = baseline_hidden[part].to(hidden.device)
        log_p = torch.log_softmax(baseline_head(reference), dim=-1)
        divergence = torch.sum(log_p.exp() * (log_p - log_q), dim=-1)
        kl[part] = divergence.clamp_min(0.0).cpu().numpy()
    shape = (len(windows), -1)
    return Scores(nll.reshape(shape), top1.reshape(shape), kl.reshape(shape))


def summarise(scores: Scores, baseline: Scores, n_bytes: int, seed: int = 0) -> dict[str, Any]:
    """Figures of one text: tokens, perplexity, its change and interval, KL, agreement.

    ``perplexity_change`` is the ratio to the baseline's perplexity minus one.
    """
    perplexity = math.exp(float(scores.nll.mean(dtype=np.float64)))
    reference = math.exp(float(baseline.nll.mean(dtype=np.float64)))
    result: dict[str, Any] = {
        "tokens": int(scores.nll.size),
        "perplexity": perplexity,
        "perplexity_change": perplexity / reference - 1,
        "perplexity_ci": list(_interval(scores.nll, baseline.nll, seed)),
        "bits_per_byte": float(scores.nll.sum(dtype=np.float64)) / math.log(2) / n_bytes,
        "top1_agreement": float((scores.top1 == baseline.top1).mean()),
        "kl_mean": 0.0,
        "kl_p99": 0.0,
    }
    if scores.kl is not None:
        result["kl_mean"] = float(scores.kl.mean(dtype=np.float64))
        result["kl_p99"] = float(np.quantile(scores.kl, 0.99))
    return result


def _interval(nll: np.ndarray, baseline: np.ndarray, seed: int) -> tuple[float, float]:
    """95% interval of the perplexity's relative change, by paired bootstrap over windows."""
    difference = (nll.astype(np.float64) - baseline.astype(np.float64)).mean(axis=1)
    draws = np.random.default_rng(seed).integers(
        len(difference), size=(BOOTSTRAP_RESAMPLES, len(difference))
    )
    changes = np.expm1(difference[draws].mean(axis=1))
    return float(np.quantile(changes, 0.025)), float(np.quantile(changes, 0.975))


def _arrays(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = len(windows) * (windows.shape[1] - 1)
    return np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.int32)


def _steps(
    model: CausalModel, windows: np.ndarray, batch_size: int, advance: Callable[[int], None]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (where in the flat token arrays, hidden [n, hidden], next tokens [n]) step by step."""
    device = next(model.parameters()).device
    predicted = windows.shape[1] - 1
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        ids = torch.from_numpy(rows.astype(np.int64)).to(device)
        hidden = last_hidden(model, ids)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        for step in range(0, len(hidden), TOKENS_PER_STEP):
            part = slice(step, step + TOKENS_PER_STEP)
            first = start * predicted + step
            yield slice(first, first + len(hidden[part])), hidden[part], targets[part]
        advance(len(rows))


def _fill(
    nll: np.ndarray, top1: np.ndarray, part: slice, logits: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Record a step's likelihoods and likeliest tokens; returns the log-probabilities."""
    log_q = torch.log_softmax(logits, dim=-1)
    nll[part] = -log_q.gather(1, expected.unsqueeze(1)).squeeze(1).cpu().numpy()
    top1[part] = logits.argmax(dim=-1).cpu().numpy()
    return log_q
