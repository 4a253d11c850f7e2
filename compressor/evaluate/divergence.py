"""Perplexity of a model, and its divergence from the baseline, token by token.

Definitions (natural logarithms, per predicted token):

- perplexity: exp(mean negative log-likelihood) over all predicted tokens of a text;
- KL: KL(baseline || variant) = sum_v p_b(v) (log p_b(v) - log p_v(v)), over the full vocabulary;
- top-1 agreement: share of positions where both models' likeliest token is the same;
- bits/byte: total negative log-likelihood in bits over the UTF-8 bytes of the predicted text.

Intervals are 95% paired bootstrap intervals over evaluation windows (windows, and not tokens, are
resampled, since tokens of one window depend on each other); see `significance.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from compressor.evaluate.significance import (
    bootstrap_p,
    interval,
    resampled_means,
    visible_mean,
)
from compressor.models.checkpoint import save_whole
from compressor.models.head import CausalModel, Head, last_hidden, split
from compressor.numerics.memory import in_batches

TOKENS_PER_STEP = 256


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
    lowered: Callable[[int], None] = lambda size: None,
) -> tuple[Scores, torch.Tensor]:
    """Scores of the baseline, and its hidden states float32 [tokens, hidden], for reuse.

    Args:
        model: a loaded causal LM.
        windows: int32 [windows, length] token ids.
        batch_size: windows per forward; halved where memory does not suffice.
        advance: called with the number of windows done.
        lowered: called with each smaller batch.
    """
    head = split(model)
    nll, top1 = _arrays(windows)
    kept = torch.empty(nll.size, model.get_output_embeddings().weight.shape[1])
    for part, hidden, expected in _steps(model, windows, batch_size, advance, lowered):
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
    lowered: Callable[[int], None] = lambda size: None,
) -> Scores:
    """Scores of a variant and its exact KL divergence from the baseline.

    Args:
        baseline_hidden: float32 [tokens, hidden] from `score_baseline`.
        baseline_head: the baseline's own head.
    """
    head = split(model)
    nll, top1 = _arrays(windows)
    kl = np.zeros(nll.shape, dtype=np.float32)
    for part, hidden, expected in _steps(model, windows, batch_size, advance, lowered):
        log_q = _fill(nll, top1, part, head(hidden), expected)
        reference = baseline_hidden[part].to(hidden.device)
        log_p = torch.log_softmax(baseline_head(reference), dim=-1)
        divergence = torch.sum(log_p.exp() * (log_p - log_q), dim=-1)
        kl[part] = divergence.clamp_min(0.0).cpu().numpy()
    shape = (len(windows), -1)
    return Scores(nll.reshape(shape), top1.reshape(shape), kl.reshape(shape))


def summarise(scores: Scores, baseline: Scores, n_bytes: int, seed: int = 0) -> dict[str, Any]:
    """Figures of one text: tokens, perplexity, its change, KL, agreement, and their intervals.

    ``perplexity_change`` is the ratio to the baseline's perplexity minus one, ``change_p`` the
    bootstrap's two-sided p-value of no change, and ``visible_change`` the smallest growth that was
    to be found in 80% of the cases; both are None for the baseline and for a single window.
    """
    perplexity = math.exp(float(scores.nll.mean(dtype=np.float64)))
    reference = math.exp(float(baseline.nll.mean(dtype=np.float64)))
    difference = _by_window(scores.nll) - _by_window(baseline.nll)
    changes = resampled_means(difference, seed=seed)
    agree = scores.top1 == baseline.top1
    result: dict[str, Any] = {
        "tokens": int(scores.nll.size),
        "windows": len(scores.nll),
        "perplexity": perplexity,
        "perplexity_change": perplexity / reference - 1,
        "perplexity_ci": list(interval(np.expm1(changes))),
        "change_p": None,
        "visible_change": None,
        "bits_per_byte": float(scores.nll.sum(dtype=np.float64)) / math.log(2) / n_bytes,
        "top1_agreement": float(agree.mean()),
        "top1_ci": list(interval(resampled_means(_by_window(agree), seed=seed))),
        "kl_mean": 0.0,
        "kl_ci": [0.0, 0.0],
        "kl_p99": 0.0,
    }
    if scores.kl is not None:
        result["kl_mean"] = float(scores.kl.mean(dtype=np.float64))
        result["kl_ci"] = list(interval(resampled_means(_by_window(scores.kl), seed=seed)))
        result["kl_p99"] = float(np.quantile(scores.kl, 0.99))
        if len(difference) > 1:
            result["change_p"] = bootstrap_p(changes)
            result["visible_change"] = math.expm1(visible_mean(difference))
    return result


def by_position(scores: Scores, baseline: Scores, bins: int, seed: int = 0) -> list[dict[str, Any]]:
    """Perplexity where tokens have little and where they have much context.

    Args:
        scores: of a model.
        baseline: its baseline's, on the same windows.
        bins: parts of equal width; fewer where a window has not so many predicted tokens.
        seed: of the bootstrap.

    Returns:
        by part: ``first`` and ``last``, the fewest and most tokens before a predicted one;
        perplexity, its change against the baseline with the interval, and the mean KL divergence.
    """
    predicted = scores.nll.shape[1]
    edges = np.linspace(0, predicted, min(bins, predicted) + 1).round().astype(int)
    rows = []
    for start, stop in pairwise(edges.tolist()):
        own, reference = (_by_window(each.nll[:, start:stop]) for each in (scores, baseline))
        kl = None if scores.kl is None else scores.kl[:, start:stop]
        changes = np.expm1(resampled_means(own - reference, seed=seed))
        rows.append(
            {
                "first": start + 1,
                "last": stop,
                "perplexity": math.exp(float(own.mean())),
                "perplexity_change": math.expm1(float((own - reference).mean())),
                "perplexity_ci": list(interval(changes)),
                "kl_mean": 0.0 if kl is None else float(kl.mean(dtype=np.float64)),
            }
        )
    return rows


def _by_window(values: np.ndarray) -> np.ndarray:
    """Means of windows, float64 [windows]."""
    return values.mean(axis=1, dtype=np.float64)


def _arrays(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = len(windows) * (windows.shape[1] - 1)
    return np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.int32)


def _steps(
    model: CausalModel,
    windows: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None],
    lowered: Callable[[int], None],
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (where in the flat token arrays, hidden [n, hidden], next tokens [n]) step by step."""
    device = next(model.parameters()).device

    def run(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(rows.astype(np.int64)).to(device)
        return last_hidden(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()

    first = 0
    for rows, (hidden, targets) in in_batches(windows, batch_size, run, lowered):
        for step in range(0, len(hidden), TOKENS_PER_STEP):
            part = slice(step, step + TOKENS_PER_STEP)
            last = first + len(hidden[part])
            yield slice(first, last), hidden[part], targets[part]
            first = last
        advance(len(rows))


def _fill(
    nll: np.ndarray, top1: np.ndarray, part: slice, logits: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Record a step's likelihoods and likeliest tokens; returns the log-probabilities."""
    log_q = torch.log_softmax(logits, dim=-1)
    nll[part] = -log_q.gather(1, expected.unsqueeze(1)).squeeze(1).cpu().numpy()
    top1[part] = logits.argmax(dim=-1).cpu().numpy()
    return log_q
