"""Prompt lookup: what followed the last time that the newest tokens stood in the text.

Saxena, "Prompt Lookup Decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding). It costs
nothing and needs no training, so it is what a trained speculator must beat. Which match is taken
is as in vLLM (``method: ngram``): the longest of ``shortest`` to ``longest`` tokens that the text
ends with, and of several the earliest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from compressor.speculate.candidates import Candidates
from compressor.speculate.proposer import States


def continuation(tokens: np.ndarray, shortest: int, longest: int, count: int) -> np.ndarray:
    """Up to ``count`` of the tokens that followed an earlier place of the text's end.

    Args:
        tokens: [n] the text.
        shortest: tokens at the end that must match, at least (vLLM: ``prompt_lookup_min``).
        longest: at most (``prompt_lookup_max``).
        count: most tokens that are wanted.

    Returns:
        a view of ``tokens``; empty where nothing matches.
    """
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        found = np.flatnonzero(windows[:, -1] == tokens[-1])  # few, mostly
        matches = (windows[found] == tokens[-size:]).all(axis=1)
        if matches.any():
            start = found[matches.argmax()] + size
            return tokens[start : start + count]
    return tokens[:0]


class NgramProposer:
    """Proposes a chain by prompt lookup.

    Args:
        shortest: see `continuation`.
        longest: likewise.
    """

    aux_layers: tuple[int, ...] = ()

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError("n-grams need 1 <= shortest <= longest")
        self.shortest, self.longest = shortest, longest
        self._texts: list[_Text] = []

    def start(
        self,
        sequences: Sequence[States],
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """As `Proposer`; nothing is drawn."""
        self._texts = [_Text() for _ in sequences]
        self.accept(sequences)

    def propose(self, last: Sequence[int], depth: int) -> list[Candidates]:
        """As `Proposer`."""
        return [
            Candidates.chain(
                torch.from_numpy(
                    continuation(text.ending_with(token), self.shortest, self.longest, depth).copy()
                )
            )
            for text, token in zip(self._texts, last, strict=True)
        ]

    def drop(self, rows: Sequence[int]) -> None:
        """As `Proposer`."""
        self._texts = [text for row, text in enumerate(self._texts) if row not in set(rows)]

    def accept(self, states: Sequence[States]) -> None:
        """As `Proposer`."""
        for text, settled in zip(self._texts, states, strict=True):
            text.append(settled.tokens.numpy())


class _Text:
    """Tokens of a sequence, in a buffer that grows."""

    def __init__(self) -> None:
        self._buffer = np.empty(256, np.int64)
        self._length = 0

    def append(self, tokens: np.ndarray) -> None:
        self._reserve(len(tokens))
        self._buffer[self._length : self._length + len(tokens)] = tokens
        self._length += len(tokens)

    def ending_with(self, token: int) -> np.ndarray:
        """The text and one more token, which does not stay."""
        self._reserve(1)
        self._buffer[self._length] = token
        return self._buffer[: self._length + 1]

    def _reserve(self, count: int) -> None:
        needed = self._length + count
        if needed > len(self._buffer):
            self._buffer = np.resize(self._buffer, max(needed, 2 * len(self._buffer)))
