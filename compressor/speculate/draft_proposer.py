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
        self.draft.prefill([text[: self.draft.limit] for text in self._texts])

    def propose(self, last: Sequence[int], depth: int) -> list[Candidates]:
        """As `Proposer`; shorter, or nothing, where the draft's positions end."""
        limit = self.draft.limit
        depths = [depth if limit is None else min(depth, limit - len(text)) for text in self._texts]
        # What is settled but not in the draft's cache: the last of a chain that stood whole.
        new = [
            torch.tensor([*text[length:], token])
            for text, length, token in zip(self._texts, self.draft.lengths, last, strict=True)
        ]
        tokens: list[list[int]] = [[] for _ in last]
        drawn_from: list[list[torch.Tensor]] = [[] for _ in last]
        for step in range(max(depths, default=0)):
            rows = [row for row, deepest in enumerate(depths) if step < deepest]
            logits = self._extend([x if row in rows else x[:0] for row, x in enumerate(new)])
            if self._temperature > 0:
                q = torch.softmax(logits / self._temperature, -1)
                made = [
                    draw(each, self._generators[row]) for row, each in zip(rows, q, strict=True)
                ]
                for row, each in zip(rows, pad(q, (0, self.vocabulary - q.shape[1])), strict=True):
                    drawn_from[row].append(each)
            else:
                made = logits.argmax(-1).tolist()
            for row, token in zip(rows, made, strict=True):
                tokens[row].append(token)
                new[row] = torch.tensor([token])
        return [
            Candidates.chain(chosen, torch.stack(q) if q else None)
            for chosen, q in zip(tokens, drawn_from, strict=True)
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
        """Run tokens of the rows, some without; logits after the last of each that has any,
        [rows, the smaller vocabulary]."""
        chains = [torch.arange(-1, len(tokens) - 1) for tokens in new]
        states = self.draft.forward(new, chains)
        self.draft.keep([range(len(tokens)) for tokens in new])
        logits = self.draft.head(torch.cat([state.hidden[-1:] for state in states]))
        return logits[:, : self.vocabulary]
