"""What proposes candidates: the interface between a speculator and the verified decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from compressor.speculate.candidates import Candidates


class States(NamedTuple):
    """What the target computed at consecutive positions of one sequence.

    Attributes:
        tokens: int64 [n], on the CPU: the tokens at these positions, all settled.
        hidden: [n, hidden] in the target's dtype and on its device: what the output layer reads.
        aux: [n, layers * hidden] or None: the residual stream after `Proposer.aux_layers` decoder
            blocks each, one behind the other.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    aux: torch.Tensor | None = None


class Proposer(Protocol):
    """Guesses the tokens of a batch of sequences.

    The decoder calls `start` once, then in turns `propose`, `drop` (where sequences ended) and
    `accept`. Rows are indices among the sequences that are left: those after a dropped one move up.
    Candidates for a sequence must not depend on the others of its batch, but for float noise.

    Attributes:
        aux_layers: after how many decoder blocks each the target's residual stream is wanted;
            empty for a proposer that reads none.
    """

    aux_layers: tuple[int, ...]

    def start(
        self,
        sequences: Sequence[States],
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """Begin with new sequences, and forget any that were there.

        Args:
            sequences: states at every position of each prompt.
            temperature: of the sampling; 0: the decoder is greedy (or otherwise has no use for
                drawn candidates), and the best guesses are wanted, not drawn ones.
            generators: on the CPU, one for each sequence; whatever is drawn for a sequence is drawn
                by its own.
        """

    def propose(self, last: Sequence[int], depth: int) -> list[Candidates]:
        """Guess what comes after the newest settled token of each sequence.

        Args:
            last: that token; the target has not computed its state yet.
            depth: no candidate may be more than so many tokens after it, at least 1.
        """

    def drop(self, rows: Sequence[int]) -> None:
        """Forget the sequences of these rows."""

    def accept(self, states: Sequence[States]) -> None:
        """Take what was settled since `propose`, for each sequence that is left.

        Args:
            states: at the position of the former ``last``, then at those of the accepted
                candidates in order: one to ``depth`` + 1 positions. The token that the target made
                after them is the next ``last``.
        """
