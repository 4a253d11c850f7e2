"""Verified decoding: a proposer guesses, the target checks all guesses in one pass.

Each step runs, for every sequence, its newest token and the candidates after it through the target;
`verification.py` says which of them stand, and the cache keeps those. A step makes at least one
token, the target's own. Without a proposer this is plain decoding by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from compressor.errors import RunError
from compressor.speculate.cached import CachedModel
from compressor.speculate.candidates import ROOT, Candidates
from compressor.speculate.proposer import Proposer, States
from compressor.speculate.verification import Sampling, Verdict, verify

_HEAD_ROWS = 512  # tokens whose logits are in memory at once, but for a single larger tree


@dataclass
class Decoded:
    """What was made of one prompt.

    Attributes:
        tokens: the new ones, the end token included.
        accepted: by step: candidates that the target accepted, also those behind an end token or
            the output length (as vLLM counts them).
        drafted: by step: candidates that it was given.
        depths: by step: how many tokens deep they went; for a chain the same as ``drafted``.
        margins: greedy decoding: by token: how far its logit was above the second best.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Passes of the target after the prompt's."""
        return len(self.accepted)


@torch.inference_mode()
def speculative_decode(
    target: CachedModel,
    proposer: Proposer | None,
    prompts: Sequence[Sequence[int]],
    *,
    output_length: int,
    sampling: Sampling | None = None,
    ends: Collection[int] = (),
    depth: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
    advance: Callable[[str], None] = lambda note: None,
) -> list[Decoded]:
    """Decode prompts with candidates that the target verifies.

    Greedy output is the target's own greedy output, token by token, but where two logits are closer
    than float noise: a pass over many tokens sums in another order than a pass over one
    (`Decoded.margins` shows how close it was; see `acceptance.compare`). With rejection sampling
    the output is distributed as the target's own. What a prompt gives depends neither on its batch
    nor on what the others draw, but for the same noise.

    Args:
        target: what is decoded; its cache is taken over.
        proposer: what guesses; None: nothing does.
        prompts: token ids, none empty.
        output_length: most new tokens of a prompt.
        sampling: greedy if not given.
        ends: tokens that end a sequence.
        depth: most tokens that are guessed ahead: the speculative tokens of a chain.
        batch_size: prompts decoded together; all if not given. The next ones begin when all of a
            batch have ended.
        seed: of the sampling; every prompt has a stream of its own.
        advance: called with a note when a prompt has ended.

    Raises:
        ValueError: a length is below 1, or a proposer broke its contract.
        RunError: a prompt is empty, or longer with its output than the target's positions.
    """
    if output_length < 1 or depth < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError("output_length, depth and batch_size must be at least 1")
    _check(target, prompts, output_length)
    sampling = sampling or Sampling()
    found: list[Decoded] = []
    size = batch_size or max(1, len(prompts))
    for start in range(0, len(prompts), size):
        batch = _Batch(target, proposer, sampling, output_length, frozenset(ends), depth)
        chosen = prompts[start : start + size]
        found += batch.run(
            chosen, [_generator(seed, start + i) for i in range(len(chosen))], advance
        )
    return found


class _Batch:
    """The sequences that are decoded together. ``live`` holds indices into ``decoded``."""

    def __init__(
        self,
        target: CachedModel,
        proposer: Proposer | None,
        sampling: Sampling,
        output_length: int,
        ends: frozenset[int],
        depth: int,
    ) -> None:
        self.target, self.proposer, self.sampling = target, proposer, sampling
        self.output_length, self.ends, self.depth = output_length, ends, depth
        self.aux_layers = () if proposer is None else proposer.aux_layers

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        generators: Sequence[torch.Generator],
        advance: Callable[[str], None],
    ) -> list[Decoded]:
        """Decode to the end."""
        decoded = [Decoded() for _ in prompts]
        ended, settled = self._prefill(prompts, decoded, generators), None
        live = list(range(len(prompts)))
        while True:
            for row in ended:
                advance(f"{len(decoded[live[row]].tokens)} tokens")
            left = [row for row in range(len(live)) if row not in ended]
            if not left:
                return decoded
            if ended:
                self.target.drop(sorted(ended))
                if self.proposer is not None:
                    self.proposer.drop(sorted(ended))
            if self.proposer is not None and settled is not None:
                self.proposer.accept([settled[row] for row in left])
            live = [live[row] for row in left]
            ended, settled = self._step([decoded[i] for i in live], [generators[i] for i in live])

    def _prefill(
        self,
        prompts: Sequence[Sequence[int]],
        decoded: Sequence[Decoded],
        generators: Sequence[torch.Generator],
    ) -> set[int]:
        """Run the prompts and choose the first token of each; returns the rows that ended."""
        states = self.target.prefill(prompts, self.aux_layers)
        if self.proposer is not None:
            temperature = self.sampling.proposal_temperature
            self.proposer.start(states, temperature=temperature, generators=generators)
        ended = set()
        ends = [States(state.tokens[-1:], state.hidden[-1:]) for state in states]
        for row, logits in self._logits(ends):
            verdict = verify(Candidates.none(), logits, self.sampling, generators[row])
            if self._settle(decoded[row], [], verdict):
                ended.add(row)
        return ended

    def _step(
        self, decoded: Sequence[Decoded], generators: Sequence[torch.Generator]
    ) -> tuple[set[int], list[States]]:
        """One pass of the target; returns the rows that ended, and what was settled in each."""
        last = [each.tokens[-1] for each in decoded]
        proposals = self._propose(last)
        # The newest token is node 0 of what the target runs, and the candidates follow it.
        tokens = [
            torch.cat([torch.tensor([token]), each.tokens])
            for token, each in zip(last, proposals, strict=True)
        ]
        parents = [torch.cat([torch.tensor([ROOT]), each.parents + 1]) for each in proposals]
        states = self.target.forward(tokens, parents, self.aux_layers)
        ended, kept = set(), []
        for row, logits in self._logits(states):
            candidates, each = proposals[row], decoded[row]
            verdict = verify(candidates, logits, self.sampling, generators[row])
            each.accepted.append(len(verdict.path))
            each.drafted.append(len(candidates))
            each.depths.append(int(candidates.depths().max()) if len(candidates) else 0)
            kept.append([0, *(node + 1 for node in verdict.path)])
            if self._settle(each, candidates.tokens[verdict.path].tolist(), verdict):
                ended.add(row)
        self.target.keep(kept)
        settled = [
            States(
                state.tokens[nodes],
                state.hidden[nodes],
                None if state.aux is None else state.aux[nodes],
            )
            for state, nodes in zip(states, kept, strict=True)
        ]
        return ended, settled

    def _propose(self, last: list[int]) -> list[Candidates]:
        if self.proposer is None:
            return [Candidates.none()] * len(last)
        proposals = self.proposer.propose(last, self.depth)
        if len(proposals) != len(last):
            raise ValueError(f"{len(proposals)} proposals for {len(last)} sequences")
        limit = self.target.limit
        cut = []
        for row, candidates in enumerate(proposals):
            room = self.depth
            if limit is not None:
                room = min(room, limit - self.target.lengths[row] - 1)
            candidates.validate(self.target.vocabulary)
            cut.append(candidates.cut(room))
        return cut

    def _logits(self, states: Sequence[States]) -> Iterator[tuple[int, torch.Tensor]]:
        """(row, logits at its states), several rows in one product."""
        first = 0
        while first < len(states):
            last, count = first, 0
            while last < len(states) and (
                last == first or count + len(states[last].tokens) <= _HEAD_ROWS
            ):
                count += len(states[last].tokens)
                last += 1
            group = states[first:last]
            logits = self.target.head(torch.cat([state.hidden for state in group]))
            parts = logits.split([len(state.tokens) for state in group])
            yield from zip(range(first, last), parts, strict=True)
            first = last

    def _settle(self, decoded: Decoded, accepted: list[int], verdict: Verdict) -> bool:
        """Note the new tokens up to where the sequence ends; whether it does."""
        margins: Sequence[float | None] = verdict.margins or [None] * (len(accepted) + 1)
        for token, margin in zip([*accepted, verdict.token], margins, strict=True):
            decoded.tokens.append(token)
            if margin is not None:
                decoded.margins.append(margin)
            if token in self.ends or len(decoded.tokens) == self.output_length:
                return True
        return False


def _check(target: CachedModel, prompts: Sequence[Sequence[int]], output_length: int) -> None:
    for index, prompt in enumerate(prompts):
        where = f"prompt {index}"
        if not len(prompt):
            raise RunError("the prompt is empty", where=where, fix="give it at least one token")
        if target.limit is not None and len(prompt) + output_length > target.limit:
            raise RunError(
                f"{len(prompt)} tokens and {output_length} new ones are more than the "
                f"{target.limit} positions of the model",
                where=where,
                fix="shorten the prompt or the output",
            )


def _generator(seed: int, index: int) -> torch.Generator:
    """Random numbers of one prompt, the same whatever else is decoded."""
    words = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))
