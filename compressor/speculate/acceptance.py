"""What speculation gave: figures of what the target accepted, counted as vLLM counts them.

vLLM serves counters at ``/metrics`` (``vllm/v1/spec_decode/metrics.py``; read by
`measure.engines.vllm.drafted`): of drafts, of the tokens in them, of those accepted, and of those
accepted by place in the draft. A step without candidates, such as of a text that prompt lookup
finds nothing in, is no draft; tokens accepted behind the end of the output count. `Acceptance`
holds the same counts, from our own decoding or of those.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from compressor.speculate.decoding import Decoded


@dataclass(frozen=True)
class Acceptance:
    """Counts over any number of steps.

    Attributes:
        drafts: steps with candidates.
        draft_tokens: candidates in them; of a tree all nodes.
        accepted_tokens: candidates that were accepted.
        accepted_by_position: drafts of which at least 1, 2, ... tokens were accepted.
    """

    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_by_position: tuple[int, ...]

    @classmethod
    def of(cls, decoded: Sequence[Decoded]) -> Acceptance:
        """From what was decoded."""
        drafts = [
            (accepted, drafted, depth)
            for each in decoded
            for accepted, drafted, depth in zip(
                each.accepted, each.drafted, each.depths, strict=True
            )
            if drafted
        ]
        deepest = max((depth for _, _, depth in drafts), default=0)
        return cls(
            len(drafts),
            sum(drafted for _, drafted, _ in drafts),
            sum(accepted for accepted, _, _ in drafts),
            tuple(sum(accepted > place for accepted, _, _ in drafts) for place in range(deepest)),
        )

    @classmethod
    def total(cls, counts: Iterable[Mapping[str, Any]]) -> Acceptance:
        """The sum of counts, each a mapping with the attributes' names."""
        rows = list(counts)
        places = max((len(row["accepted_by_position"]) for row in rows), default=0)
        by_position = [0] * places
        for row in rows:
            for place, count in enumerate(row["accepted_by_position"]):
                by_position[place] += count
        drafts, draft_tokens, accepted = (
            sum(row[name] for row in rows) for name in ("drafts", "draft_tokens", "accepted_tokens")
        )
        return cls(drafts, draft_tokens, accepted, tuple(by_position))

    @property
    def mean_length(self) -> float:
        """Tokens per draft, the target's own included (vLLM: mean acceptance length); NaN without
        drafts."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else math.nan

    @property
    def rate(self) -> float:
        """Share of the candidates that were accepted (vLLM: draft acceptance rate)."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else math.nan

    @property
    def rates_by_position(self) -> list[float]:
        """Share of the drafts that were accepted up to each place (vLLM: per-position acceptance
        rate)."""
        return [count / self.drafts for count in self.accepted_by_position]


class TokensPerStep(NamedTuple):
    """Mean tokens per pass of the target after the prompt's, its own included.

    Attributes:
        mean: over all steps, with candidates or without.
        error: standard error [tokens]; sequences are what was sampled, since the steps of one are
            alike. NaN for fewer than two.
        steps: how many.
    """

    mean: float
    error: float
    steps: int


def tokens_per_step(decoded: Sequence[Decoded]) -> TokensPerStep:
    """The figure that a speculator is judged by. ValueError where nothing took a step."""
    made = [(sum(each.accepted) + each.steps, each.steps) for each in decoded if each.steps]
    steps = sum(count for _, count in made)
    if not steps:
        raise ValueError("no sequence took a step after its first token")
    mean = sum(tokens for tokens, _ in made) / steps
    error = math.nan
    if len(made) > 1:
        # Of a ratio of sums over sequences (linearised, Cochran: "Sampling Techniques", 6.4).
        spread = math.fsum((tokens - mean * count) ** 2 for tokens, count in made)
        error = math.sqrt(spread * len(made) / (len(made) - 1)) / steps
    return TokensPerStep(mean, error, steps)


def histogram(decoded: Sequence[Decoded]) -> list[int]:
    """Steps by the number of candidates that were accepted, from 0 on."""
    counts = Counter(accepted for each in decoded for accepted in each.accepted)
    return [counts[number] for number in range(max(counts, default=-1) + 1)]


@dataclass(frozen=True)
class Comparison:
    """Greedy output with speculation against the target's own.

    Attributes:
        equal: sequences that are the same token by token.
        ties: of the others, how far the best logit was above the second best in plain decoding
            where they first differ, ascending. One that float noise can bridge is a tie that either
            choice breaks rightly; a larger one is a fault.
    """

    equal: int
    ties: tuple[float, ...]

    @property
    def sequences(self) -> int:
        """How many were compared."""
        return self.equal + len(self.ties)


def compare(plain: Sequence[Decoded], speculative: Sequence[Decoded]) -> Comparison:
    """Compare greedy output, sequence by sequence.

    Args:
        plain: made without a proposer: it has the margins.
        speculative: of the same prompts and settings.

    Raises:
        ValueError: one sequence is the other's beginning: the settings were not the same.
    """
    equal, ties = 0, []
    for one, other in zip(plain, speculative, strict=True):
        if one.tokens == other.tokens:
            equal += 1
            continue
        pairs = zip(one.tokens, other.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            raise ValueError("one output is the other's beginning: they were to end elsewhere")
        ties.append(one.margins[at])
    return Comparison(equal, tuple(sorted(ties)))
