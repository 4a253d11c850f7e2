"""What a speculator is worth on prompts that it was not trained on, decoded by our own decoder.

Prompts are decoded greedily without it, with a chain of its guesses and, where it can, with a tree;
then the time is taken for each number of guessed tokens and each number of sequences at once, since
speculation can cost more than it gives once the target's passes are full of other sequences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from compressor.speculate.acceptance import Acceptance, compare, histogram, tokens_per_step
from compressor.speculate.cached import CachedModel
from compressor.speculate.decoding import Decoded, speculative_decode
from compressor.speculate.proposer import Proposer

_HOPELESS = 0.7  # of the plain speed: more sequences at once will not make up for that
Raw = list[dict[str, Any]]  # what was decoded, one row for each prompt and configuration


def try_out(
    target: CachedModel,
    proposers: dict[str, Proposer],
    prompts: Sequence[Sequence[int]],
    *,
    depth: int,
    output_length: int,
    batch_size: int,
    ends: Sequence[int] = (),
    advance: Callable[[str], None] = lambda note: None,
) -> tuple[dict[str, Any], Raw]:
    """Acceptance of each way to propose, and whether output stayed the target's own.

    Args:
        target: what is decoded.
        proposers: by name, such as ``chain`` and ``tree``.
        prompts: token ids.
        depth: most tokens guessed ahead.
        output_length: tokens of each answer, at most.
        batch_size: prompts decoded together.
        ends: tokens that end an answer.
        advance: called with a note after each answer.

    Returns:
        by proposer what `figures` says, and the raw rows that it is made of.
    """

    def decode(proposer: Proposer | None) -> list[Decoded]:
        return speculative_decode(
            target,
            proposer,
            prompts,
            output_length=output_length,
            batch_size=batch_size,
            ends=ends,
            depth=depth,
            advance=advance,
        )

    plain = decode(None)
    found, raw = {}, _rows("plain", plain, margins=True)
    for name, proposer in proposers.items():
        made = decode(proposer)
        found[name] = figures(plain, made)
        raw += _rows(name, made)
    return found, raw


def figures(plain: Sequence[Decoded], made: Sequence[Decoded]) -> dict[str, Any]:
    """What decoding with candidates came to, beside decoding without.

    Returns:
        ``tokens_per_step`` and its standard ``error`` (None of one prompt), ``steps``,
        ``accepted_by_position`` (share of the drafts), ``rate`` (share of candidates),
        ``histogram`` (steps by accepted tokens), ``equal`` of ``sequences`` whose tokens are the
        target's own, and ``ties``: where not, how far the target's best logit was above its
        second.
    """
    mean, error, steps = tokens_per_step(made)
    counts, same = Acceptance.of(made), compare(plain, made)
    return {
        "tokens_per_step": mean,
        "error": error if math.isfinite(error) else None,
        "steps": steps,
        "accepted_by_position": counts.rates_by_position,
        "rate": counts.rate if counts.draft_tokens else None,
        "histogram": histogram(made),
        "sequences": same.sequences,
        "equal": same.equal,
        "ties": list(same.ties),
    }


def sweep(
    target: CachedModel,
    proposers: dict[str, Proposer],
    prompts: Sequence[Sequence[int]],
    *,
    depths: Sequence[int],
    batch_sizes: Sequence[int],
    output_length: int,
    advance: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Seconds that answers take, by how many sequences run at once and how far is guessed ahead.

    As many prompts are answered as sequences run at once, to ``output_length`` tokens each. The
    configurations take turns, so that a machine that slows down slows them all. A way to propose
    that stays below 0.7 of the plain speed at every depth is not tried with more sequences: each
    of them leaves less of the target's pass to candidates.

    Args:
        target: what is decoded.
        proposers: by name.
        prompts: at least as many as the largest batch.
        depths: tokens guessed ahead.
        batch_sizes: sequences at once.
        output_length: tokens of each answer.
        advance: called with a note after each configuration.

    Returns:
        rows of ``batch_size``, ``proposer`` (None: decoding without), ``depth``, ``tokens``,
        ``steps`` (of all sequences) and ``seconds``, prefill included.
    """
    rows: list[dict[str, Any]] = []
    hopeful = list(proposers)
    for size in sorted(batch_sizes):
        chosen = prompts[:size]
        ways: list[tuple[str | None, int]] = [(None, 1)]
        ways += [(name, depth) for name in hopeful for depth in depths]
        for name, depth in [ways[0], *ways]:  # the first once more: it warms up
            started = time.perf_counter()
            made = speculative_decode(
                target,
                None if name is None else proposers[name],
                chosen,
                output_length=output_length,
                depth=depth,
            )
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "batch_size": size,
                    "proposer": name,
                    "depth": depth if name else 0,
                    "tokens": sum(len(each.tokens) for each in made),
                    "steps": sum(each.steps for each in made),
                    "seconds": seconds,
                }
            )
            advance(f"{size} at once, {name or 'plain'} {depth if name else ''}".strip())
        del rows[-len(ways) - 1]
        speeds: dict[str | None, float] = {}
        for row in rows[-len(ways) :]:
            speed = row["tokens"] / row["seconds"]
            speeds[row["proposer"]] = max(speed, speeds.get(row["proposer"], 0.0))
        hopeful = [name for name in hopeful if speeds[name] >= _HOPELESS * speeds[None]]
    return rows


def _rows(name: str, decoded: Sequence[Decoded], *, margins: bool = False) -> Raw:
    return [
        {
            "proposer": name,
            "prompt": number,
            "tokens": each.tokens,
            "accepted": each.accepted,
            "drafted": each.drafted,
            "depths": each.depths,
            **({"margins": each.margins} if margins else {}),
        }
        for number, each in enumerate(decoded)
    ]
