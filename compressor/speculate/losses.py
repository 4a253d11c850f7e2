"""Losses of drafts against what the target says, and their gradients, a few tokens at a time.

Logits of every head over a whole vocabulary are far larger than the states that they come from, so
they are made for a few tokens, turned into the loss and its gradient, and dropped (as Liger's fused
linear cross-entropy does, arXiv 2410.10989). The target's distributions are made again from its
states, once for all drafts that are compared with them.

- ``cross_entropy``: -log q(token that the target said).
- ``kl``: KL(p || q), with p renormalised over the draft's vocabulary where that is reduced.
- ``total_variation``: 1 - a, a = sum min(p, q) being the probability that a token drawn from q is
  accepted by rejection sampling (Leviathan et al., arXiv 2211.17192).
- ``lk``: -log a, the hyperparameter-free loss of Samarin et al.: "LK Losses", arXiv 2602.23881. The
  gradient of the former over a: it does not vanish where p and q hardly overlap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from compressor.numerics.kernels import has_triton
from compressor.speculate.options import Kind

KINDS: tuple[str, ...] = get_args(Kind)

CHUNK = 128  # tokens whose logits are in memory at once, on a CPU
_MOST = 2048  # of them, on a GPU
_LOGITS = 1 << 26  # of a chunk, on a GPU
_LEAST = 1e-8  # acceptance below which its logarithm is cut


@dataclass(frozen=True)
class Target:
    """What the target says at n places.

    Attributes:
        tokens: int64 [n], the token that comes next there.
        hidden: [n, width], what its output layer reads there; not needed for cross-entropy.
        head: logits [m, vocabulary] of such states, as `models.head.Head`.
        token_map: int64 [draft], ascending: tokens of a reduced vocabulary; None for all.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor | None = None
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    token_map: torch.Tensor | None = None

    def labels(self) -> torch.Tensor:
        """The tokens' places in the draft's vocabulary, int64 [n]; -1 where it lacks them."""
        return draft_places(self.tokens, self.token_map)

    @torch.no_grad()
    def probabilities(self, rows: slice) -> torch.Tensor:
        """float32 [m, draft]; they sum to less than 1 where the vocabulary is reduced."""
        if self.hidden is None or self.head is None:
            raise ValueError("this loss needs the target's states and its head")
        made = torch.softmax(self.head(self.hidden[rows]).float(), -1)
        return made if self.token_map is None else made[:, self.token_map]


class Losses(NamedTuple):
    """Of k drafts.

    Attributes:
        total: scalar with a gradient: the sum over drafts and places, each times its count.
        each: float64 [k], the parts of it.
        hits: float64 [k], places that count where the likeliest token is the target's.
        overlap: float64 [k], sum over such places of sum min(p, q); 0 for cross-entropy.
        places: float64 [k], places that count.
    """

    total: torch.Tensor
    each: torch.Tensor
    hits: torch.Tensor
    overlap: torch.Tensor
    places: torch.Tensor


def draft_places(tokens: torch.Tensor, token_map: torch.Tensor | None) -> torch.Tensor:
    """Places of tokens, int64 [n], in an ascending token map; -1 for those that it lacks."""
    if token_map is None:
        return tokens
    places = torch.searchsorted(token_map, tokens).clamp_(max=len(token_map) - 1)
    return torch.where(token_map[places] == tokens, places, -1)


def output_losses(
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    target: Target,
    kind: Kind,
    counts: Sequence[torch.Tensor],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Losses:
    """Losses of k drafts whose logits are ``scale * states @ weights^T``, at the same n places.

    Gradients flow to states and weights. Under autocast the products are of its dtype; softmax and
    sums are of float32.

    Args:
        states: [n, width] of each draft.
        weights: [draft, width] of each draft's output layer; several may be the same tensor.
        target: what is compared with. Cross-entropy leaves out tokens that the draft's vocabulary
            lacks, the other losses places where the target gives it no probability at all.
        kind: of loss.
        counts: float32 [n] of each draft: how much a place counts, 0 for not at all.
        scale: of the logits.
        softcap: logits are cut smoothly as ``softcap * tanh(logits / softcap)``.
        chunk: tokens whose logits are in memory at once; None for what suits the device.

    Raises:
        ValueError: no such kind of loss.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no loss {kind!r}: choose from {', '.join(KINDS)}")
    unique = list({id(weight): weight for weight in weights}.values())
    owners = [next(i for i, w in enumerate(unique) if w is weight) for weight in weights]
    device = states[0].device.type
    if chunk is None:
        chunk = _chunk_size(device, max(len(weight) for weight in unique))
    job = _Job(
        target,
        kind,
        [count.float() for count in counts],
        owners,
        scale,
        softcap,
        chunk,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        torch.is_grad_enabled(),
    )
    total, figures = _OutputLosses.apply(job, len(states), *states, *unique)
    return Losses(total, *figures)


@dataclass(frozen=True)
class _Job:
    """All of `output_losses`' arguments but the tensors with gradients."""

    target: Target
    kind: Kind
    counts: list[torch.Tensor]
    owners: list[int]
    scale: float
    softcap: float | None
    chunk: int
    dtype: torch.dtype | None
    gradients: bool


class _OutputLosses(torch.autograd.Function):
    """Makes the gradients with the losses, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, job: _Job, count: int, *tensors: torch.Tensor) -> Any:
        states, weights = tensors[:count], tensors[count:]
        needed = ctx.needs_input_grad[2:] if job.gradients else (False,) * len(tensors)
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if wanted else None
            for tensor, wanted in zip(tensors, needed, strict=True)
        ]
        figures = torch.zeros(4, count, dtype=torch.float64, device=states[0].device)
        with torch.autocast(states[0].device.type, enabled=False):
            products = [w.detach().to(job.dtype or w.dtype) for w in weights]
            labels = job.target.labels()
            for start in range(0, len(labels), job.chunk):
                _chunk(
                    job,
                    slice(start, start + job.chunk),
                    labels,
                    states,
                    products,
                    gradients,
                    figures,
                )
        ctx.gradients = gradients
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        total = figures[0].sum().float()
        ctx.mark_non_differentiable(figures)
        return total, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor, _: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of these losses were taken already")
        made = [
            None if gradient is None else gradient.mul_(outer).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *made


def _chunk(
    job: _Job,
    rows: slice,
    labels: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    gradients: list[torch.Tensor | None],
    figures: torch.Tensor,
) -> None:
    """Add a few places' losses and gradients, of all drafts."""
    label = labels[rows]
    wanted, mass, entropy, known = None, None, None, label >= 0
    if job.kind != "cross_entropy":
        wanted = job.target.probabilities(rows)
        mass = wanted.sum(-1)
        known = mass > 0
        mass = torch.where(known, mass, 1.0)
        if job.kind == "kl":  # of wanted / mass
            entropy = torch.special.entr(wanted).sum(-1) / mass + mass.log()
    for k, (all_states, owner) in enumerate(zip(states, job.owners, strict=True)):
        weight = weights[owner]
        state = all_states[rows].detach().to(weight.dtype)
        counted = torch.where(known, job.counts[k][rows], 0.0)
        logits = (state @ weight.T).float().mul_(job.scale)
        slope = None
        if job.softcap:
            shrunk = logits.div_(job.softcap).tanh_()
            slope = 1 - shrunk.square()
            logits = shrunk.mul_(job.softcap)
        counts = job.counts[k][rows] > 0
        figures[1, k] += ((logits.argmax(-1) == label) & counts).sum()
        figures[3, k] += counts.sum()
        loss, gradient, overlap = _loss_of(state.device.type)(
            job.kind, logits, label, wanted, mass, entropy
        )
        figures[0, k] += torch.where(counted > 0, loss * counted, 0.0).sum(dtype=torch.float64)
        if overlap is not None:
            figures[2, k] += torch.where(counts, overlap, 0.0).sum(dtype=torch.float64)
        into_state, into_weight = gradients[k], gradients[len(states) + owner]
        if into_state is None and into_weight is None:
            continue
        gradient.mul_((counted * job.scale).unsqueeze(-1))
        if slope is not None:
            gradient.mul_(slope)
        gradient = gradient.to(weight.dtype)
        if into_state is not None:
            into_state[rows] = (gradient @ weight).float()
        if into_weight is not None and weight.dtype == torch.float32:
            into_weight.addmm_(gradient.T, state)
        elif into_weight is not None:
            into_weight += gradient.T @ state


def _chunk_size(device: str, vocabulary: int) -> int:
    """Tokens of a chunk: on a GPU so many that its products are worth launching."""
    if device == "cpu":
        return CHUNK
    return max(CHUNK, min(_MOST, _LOGITS // vocabulary))


@functools.cache
def _loss_of(device: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """`_loss`; on a GPU compiled, since its operations take as long as going over the logits does,
    and there are up to eight of them."""
    if device == "cuda" and has_triton():
        return torch.compile(_loss, fullgraph=True)
    return _loss


def _loss(
    kind: Kind,
    logits: torch.Tensor,
    label: torch.Tensor,
    wanted: torch.Tensor | None,
    mass: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss [m], its gradient by the logits [m, draft] in their place, overlap [m] or None)."""
    normaliser = logits.logsumexp(-1)
    if wanted is None or mass is None:
        place = label.clamp_min(0).unsqueeze(-1)
        loss = normaliser - logits.gather(-1, place).squeeze(-1)
        made = logits.sub_(normaliser.unsqueeze(-1)).exp_()
        return loss, made.scatter_add_(-1, place, -torch.ones_like(place, dtype=made.dtype)), None
    if entropy is not None:
        loss = normaliser - entropy - torch.linalg.vecdot(wanted, logits) / mass
        made = logits.sub_(normaliser.unsqueeze(-1)).exp_()
        overlap = torch.minimum(made, wanted).sum(-1)
        share = (-1 / mass).unsqueeze(-1)
        return loss, made.addcmul_(wanted, share), overlap
    made = logits.sub_(normaliser.unsqueeze(-1)).exp_()
    overlap = torch.minimum(made, wanted).sum(-1)
    below = made * (made < wanted)  # where more of it would be accepted
    gradient = made.mul_(below.sum(-1, keepdim=True)).sub_(below)
    if kind == "total_variation":
        return 1 - overlap, gradient, overlap
    safe = overlap.clamp_min(_LEAST)
    return -safe.log(), gradient.div_(safe.unsqueeze(-1)), overlap


@torch.no_grad()
def ranks(
    states: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    *,
    token_map: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """How many tokens a draft finds likelier than the right one, int64 [n].

    Args:
        states: [n, width].
        weight: [draft, width] of its output layer.
        tokens: int64 [n], the right ones.
        token_map: of a reduced vocabulary; a token that it lacks ranks behind all that it has.
        chunk: tokens whose logits are in memory at once.
    """
    places = draft_places(tokens, token_map)
    found = []
    for state, place in zip(states.split(chunk), places.split(chunk), strict=True):
        logits = functional.linear(state.to(weight.dtype), weight)
        own = logits.gather(-1, place.clamp_min(0).unsqueeze(-1))
        rank = (logits > own).sum(-1)
        found.append(torch.where(place >= 0, rank, len(weight)))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=tokens.device)


def top_k_accuracy(rank: torch.Tensor, most: int) -> list[float]:
    """Shares of ``rank`` (see `ranks`) below 1, 2, ..., ``most``; zeros where there are none."""
    return [float((rank < k).double().mean()) if len(rank) else 0.0 for k in range(1, most + 1)]
