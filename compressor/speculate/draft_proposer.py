"""A draft model: a smaller causal LM with the target's tokens guesses a chain, token by token.

Leviathan, Kalman, Matias: "Fast Inference from Transformers via Speculative Decoding", arXiv
2211.17192. The draft keeps a cache of its own, and takes back what was not accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from compressor.speculate.cached import CachedModel
from compressor.speculate.candidates import Candidates
from compressor.speculate.proposer import States
from compressor.speculate.verification import draw


class DraftProposer:
    """Proposes a chain by a draft model: its greedy choices, or drawn at the sampling's
    temperature.

    Args:
        draft: the draft model; its tokens must be the target's (see `draft.check_tokenizer`).
        vocabulary: logits of the target; the draft's if not given. Where one of the two models has
            padding behind its tokens, a draft may have fewer or more; those that the target does
            not have are not proposed.
    """

    aux_layers: tuple[int, ...] = ()

    def __init__(self, draft: CachedModel, vocabulary: int | None = None) -> None:
        self.draft = draft
        self.vocabulary = vocabulary or draft.vocabulary
        self._temperature = 0.0
        self._generators: list[torch.Generator] = []
        self._texts: list[list[int]] = []  # settled tokens

    def start(
        self,
        sequences: Sequence[States],
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """As `Proposer`."""
        self._temperature = temperature
        self._generators = list(generators)
        self._texts = [sequence.tokens.tolist() for sequence in sequences]
        self.draft.prefill(self._texts)

    def propose(self, last: Sequence[int], depth: int) -> list[Candidates]:
        """As `Proposer`; shorter, or nothing, where the draft's positions end."""
        if self.draft.limit is not None:
            depth = min(depth, self.draft.limit - max(map(len, self._texts)))
        # What is settled but not in the draft's cache: the last of a chain that stood whole.
        new = [
            torch.tensor([*text[length:], token])
            for text, length, token in zip(self._texts, self.draft.lengths, last, strict=True)
        ]
        chosen: list[torch.Tensor] = []
        drawn_from: list[torch.Tensor] = []
        for _ in range(depth):
            logits = self._extend(new)
            if self._temperature > 0:
                q = torch.softmax(logits / self._temperature, -1)
                tokens = torch.tensor(
                    [draw(row, own) for row, own in zip(q, self._generators, strict=True)]
                )
                drawn_from.append(pad(q, (0, self.vocabulary - q.shape[1])))
            else:
                tokens = logits.argmax(-1).cpu()
            chosen.append(tokens)
            new = list(tokens.split(1))
        return [
            Candidates.chain(
                [int(tokens[row]) for tokens in chosen],
                torch.stack([q[row] for q in drawn_from]) if drawn_from else None,
            )
            for row in range(len(last))
        ]

    def drop(self, rows: Sequence[int]) -> None:
        """As `Proposer`."""
        gone = set(rows)
        self.draft.drop(rows)
        self._texts = [text for row, text in enumerate(self._texts) if row not in gone]
        self._generators = [g for row, g in enumerate(self._generators) if row not in gone]

    def accept(self, states: Sequence[States]) -> None:
        """As `Proposer`."""
        for text, settled in zip(self._texts, states, strict=True):
            text += settled.tokens.tolist()
        # What was accepted is a beginning of what the draft has run.
        self.draft.rewind(
            [min(n, len(text)) for n, text in zip(self.draft.lengths, self._texts, strict=True)]
        )

    def _extend(self, new: list[torch.Tensor]) -> torch.Tensor:
        """Run tokens of each row; logits after the last, [rows, vocabulary of the two]."""
        chains = [torch.arange(-1, len(tokens) - 1) for tokens in new]
        states = self.draft.forward(new, chains)
        self.draft.keep([range(len(tokens)) for tokens in new])
        logits = self.draft.head(torch.cat([state.hidden[-1:] for state in states]))
        return logits[:, : self.vocabulary]
