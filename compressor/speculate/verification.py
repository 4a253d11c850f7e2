"""Which candidates a target accepts, and the token that it makes after them.

Greedy: the candidates that the target would have chosen itself, so that its output is what it would
be without speculation. Sampling: rejection sampling that leaves the target's distribution as it is,
whatever was proposed (Leviathan, Kalman, Matias: "Fast Inference from Transformers via Speculative
Decoding", arXiv 2211.17192; Chen et al., arXiv 2302.01318; for trees Miao et al., "SpecInfer",
arXiv 2305.09781). Typical acceptance takes what is likely enough under the target: it accepts more,
and its output is *not* the target's (Cai et al., "Medusa", arXiv 2401.10774, section 3.3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from compressor.speculate.candidates import ROOT, Candidates


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        kind: ``greedy``, ``rejection`` or ``typical``.
        temperature: that logits are divided by; of no meaning to ``greedy``.
        epsilon: a typical token has more than min(epsilon, delta * exp(-entropy)) probability.
        delta: see ``epsilon``.
    """

    kind: Literal["greedy", "rejection", "typical"] = "greedy"
    temperature: float = 1.0
    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if self.kind != "greedy" and not self.temperature > 0:
            raise ValueError("the temperature of sampling must be above 0; choose greedy instead")

    @property
    def lossless(self) -> bool:
        """Whether the output is the target's own: its greedy choice, or its distribution."""
        return self.kind != "typical"

    @property
    def proposal_temperature(self) -> float:
        """Of what candidates are drawn from; 0 where the best guesses serve."""
        return self.temperature if self.kind == "rejection" else 0.0


class Verdict(NamedTuple):
    """What became of a sequence's candidates.

    Attributes:
        path: accepted nodes, from a child of the root on.
        token: made by the target after them.
        margins: greedy only: how far the best logit was above the second best where each token of
            ``path``, and then ``token``, was chosen.
    """

    path: list[int]
    token: int
    margins: list[float]


def verify(
    candidates: Candidates, logits: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> Verdict:
    """Accept what may be accepted.

    Args:
        candidates: of one sequence, [n].
        logits: the target's, float32 [n + 1, vocabulary]: after the newest settled token, then
            after each node.
        sampling: how.
        generator: of this sequence, on the CPU.
    """
    if sampling.kind == "greedy":
        return _greedy(candidates, logits)
    if sampling.kind == "typical":
        return _typical(candidates, logits, sampling)
    return _rejection(candidates, logits, sampling.temperature, generator)


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """A token from probabilities [vocabulary], which need not sum to 1; takes one number from the
    generator, whatever the device of the probabilities."""
    ends = probabilities.double().cumsum(-1)
    at = torch.rand((), dtype=torch.float64, generator=generator).to(ends.device) * ends[-1]
    token = int(torch.searchsorted(ends, at, right=True))
    return min(token, int(torch.searchsorted(ends, ends[-1])))  # where `at` was rounded to the end


def _greedy(candidates: Candidates, logits: torch.Tensor) -> Verdict:
    best = logits.topk(2, -1)
    # argmax takes the first of equals, as every greedy decoder does; topk need not.
    choices = logits.argmax(-1).tolist()
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    below, tokens = candidates.children(), candidates.tokens.tolist()
    path: list[int] = []
    at = 0  # the row of `logits`: one more than the node
    while True:
        accepted = next((child for child in below[at] if tokens[child] == choices[at]), None)
        if accepted is None:
            passed = [0, *(node + 1 for node in path)]
            return Verdict(path, choices[at], [margins[i] for i in passed])
        path.append(accepted)
        at = accepted + 1


def _rejection(
    candidates: Candidates, logits: torch.Tensor, temperature: float, generator: torch.Generator
) -> Verdict:
    below, tokens = candidates.children(), candidates.tokens.tolist()
    path: list[int] = []
    node = ROOT
    while True:
        target = torch.softmax(logits[node + 1] / temperature, -1)
        siblings = below[node + 1]
        if candidates.probabilities is None or not siblings:
            token = draw(target, generator)
            accepted = next((child for child in siblings if tokens[child] == token), None)
        else:
            proposed = candidates.probabilities
            accepted = None
            for child in siblings:
                drawn_from = proposed[child].to(target.device)
                at = torch.rand((), dtype=torch.float64, generator=generator)
                # at < p / q, with no quotient of what may be zero
                if float(at) * float(drawn_from[tokens[child]]) < float(target[tokens[child]]):
                    accepted = child
                    break
                left = (target - drawn_from).clamp_min_(0)
                total = left.sum()
                if float(total) > 0:  # else equal but for rounding, and so is what is left
                    target = left / total
            token = -1 if accepted is not None else draw(target, generator)
        if accepted is None:
            return Verdict(path, token, [])
        path.append(accepted)
        node = accepted


def _typical(candidates: Candidates, logits: torch.Tensor, sampling: Sampling) -> Verdict:
    """The longest path whose every token is typical, the likeliest of several; then the best
    token."""
    scores = torch.log_softmax(logits / sampling.temperature, -1)
    entropy = -(scores.exp() * scores.nan_to_num(neginf=0.0)).sum(-1)
    least = (sampling.delta * torch.exp(-entropy)).clamp_max(sampling.epsilon).tolist()
    parents = candidates.parents.tolist()
    rows = (candidates.parents + 1).to(scores.device)
    likely = scores[rows, candidates.tokens.to(scores.device)].double().tolist()
    best, best_rank = ROOT, (0, 0.0)
    ranks: dict[int, tuple[int, float]] = {ROOT: (0, 0.0)}
    for node, parent in enumerate(parents):
        if parent in ranks and math.exp(likely[node]) > least[parent + 1]:
            depth, total = ranks[parent]
            ranks[node] = (depth + 1, total + likely[node])
            if ranks[node] > best_rank:
                best, best_rank = node, ranks[node]
    return Verdict(candidates.path(best), int(logits[best + 1].argmax()), [])
