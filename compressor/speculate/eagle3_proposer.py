"""Candidates from an EAGLE-3 head: a chain, or a tree that grows where the head is sure.

The tree is that of Li, Wei, Zhang, Zhang: "EAGLE-2: Faster Inference of Language Models with
Dynamic Draft Trees", arXiv 2406.16858: at each depth the likeliest nodes get children, and of all
that were made those with the largest products of probabilities along their paths are proposed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from compressor.errors import RunError
from compressor.speculate.candidates import ROOT, Candidates
from compressor.speculate.eagle3 import Eagle3
from compressor.speculate.proposer import States
from compressor.speculate.verification import draw

_GROW = 256  # slots that are added at once


class Eagle3Proposer:
    """Proposes for a batch of sequences with a head, its keys and values kept between calls.

    Args:
        head: in evaluation mode, in the dtype that it is to run in.
        branches: 1 for a chain, which is drawn from the head's distribution where the decoder
            samples; more for a tree of tokens that are always chosen: so many nodes of each depth
            get so many children.
        nodes: most nodes of a tree.

    Raises:
        RunError: fewer nodes than branches, or fewer branches than one.
    """

    def __init__(self, head: Eagle3, *, branches: int = 1, nodes: int = 0) -> None:
        most = head.config.draft_vocab_size
        if not 1 <= branches <= most or (branches > 1 and nodes < branches):
            raise RunError(
                f"a tree of {nodes} nodes with {branches} branches",
                where="EAGLE-3 proposer",
                fix=f"give 1 to {most} branches, and at least as many nodes",
            )
        self.head = head
        self.branches = branches
        self.nodes = nodes
        self.aux_layers = head.config.aux_layers
        self._device = head.fc.weight.device
        self._dtype = head.fc.weight.dtype
        self._token_map = head.token_map
        self._forget(0)

    def _forget(self, rows: int) -> None:
        config = self.head.config
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)
        self._keys = torch.zeros(shape, device=self._device, dtype=self._dtype)
        self._values = torch.zeros_like(self._keys)
        self._lengths = [0] * rows  # positions whose features are settled and have been read
        # Of each row: features not read yet, and the tokens after them, but for the newest.
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._temperature = 0.0
        self._generators: list[torch.Generator] = []

    @torch.inference_mode()
    def start(
        self,
        sequences: Sequence[States],
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """See `Proposer.start`."""
        self._forget(len(sequences))
        self._temperature = temperature
        self._generators = list(generators)
        self._reserve(max((len(states.tokens) for states in sequences), default=0))
        for row, states in enumerate(sequences):
            aux, after = self._waiting_of(states)
            count = len(after)
            if count:  # one by one, so that a prompt's keys do not depend on the others
                self._pass(
                    after[None],
                    self.head.fuse(aux[None, :-1]),
                    torch.arange(count)[None],
                    torch.arange(count)[None],
                    torch.ones(1, count, count, dtype=torch.bool).tril_(),
                    rows=slice(row, row + 1),
                )
            self._lengths[row] = count
            self._waiting.append((aux[count:], after[count:]))

    @torch.inference_mode()
    def propose(self, last: Sequence[int], depth: int) -> list[Candidates]:
        """See `Proposer.propose`."""
        state = self._read_waiting(last)
        if self.branches > 1:
            return self._tree(state, depth)
        return self._chain(state, depth)

    def drop(self, rows: Sequence[int]) -> None:
        """See `Proposer.drop`."""
        gone = set(rows)
        left = [row for row in range(len(self._lengths)) if row not in gone]
        index = torch.tensor(left, dtype=torch.int64, device=self._device)
        self._keys, self._values = self._keys[index], self._values[index]
        self._lengths = [self._lengths[row] for row in left]
        self._waiting = [self._waiting[row] for row in left]
        self._generators = [self._generators[row] for row in left if self._generators]

    def accept(self, states: Sequence[States]) -> None:
        """See `Proposer.accept`."""
        self._waiting = [self._waiting_of(one) for one in states]

    def _waiting_of(self, states: States) -> tuple[torch.Tensor, torch.Tensor]:
        if states.aux is None:
            raise ValueError("the target's states must hold `aux` of the head's layers")
        return states.aux.to(self._device, self._dtype), states.tokens[1:]

    def _read_waiting(self, last: Sequence[int]) -> torch.Tensor:
        """Read the features that came since; returns the state at the newest, [rows, 1, hidden]."""
        sizes = torch.tensor([len(aux) for aux, _ in self._waiting])
        lengths = torch.tensor(self._lengths)
        after = [
            torch.cat([tokens, torch.tensor([token])])
            for (_, tokens), token in zip(self._waiting, last, strict=True)
        ]
        widest = int(sizes.max())
        slots = lengths[:, None] + torch.arange(widest)
        seen = torch.arange(int(lengths.max()) + widest) <= slots[..., None]
        states = self._pass(
            pad_sequence(after, batch_first=True),
            self.head.fuse(pad_sequence([aux for aux, _ in self._waiting], batch_first=True)),
            slots,
            slots,
            seen,
        )
        self._lengths = (lengths + sizes).tolist()
        rows = torch.arange(len(sizes), device=self._device)
        return states[rows, (sizes - 1).to(self._device)][:, None]

    def _chain(self, state: torch.Tensor, depth: int) -> list[Candidates]:
        """One token after the other, chosen or drawn, from states [rows, 1, hidden]."""
        rows = len(state)
        lengths = torch.tensor(self._lengths)
        tokens, rows_of_q = [], []
        for k in range(depth):
            logits = self.head.logits(state)[:, 0].float()
            if self._temperature > 0:
                probabilities = torch.softmax(logits / self._temperature, -1)
                drawn = [
                    draw(one, generator)
                    for one, generator in zip(probabilities, self._generators, strict=True)
                ]
                chosen = torch.tensor(drawn, device=self._device)
                spread = probabilities.new_zeros(rows, self.head.config.vocab_size)
                rows_of_q.append(spread.index_copy_(1, self._token_map, probabilities))
            else:
                chosen = logits.argmax(-1)
            tokens.append(self._token_map[chosen])
            if k + 1 < depth:
                slots = lengths[:, None] + k
                seen = torch.arange(int(lengths.max()) + k + 1) <= slots[..., None]
                state = self._pass(tokens[-1][:, None], state, slots, slots, seen)
        made = torch.stack(tokens, 1)
        probabilities_of = torch.stack(rows_of_q, 1) if rows_of_q else [None] * rows
        return [Candidates.chain(made[row], probabilities_of[row]) for row in range(rows)]

    def _tree(self, state: torch.Tensor, depth: int) -> list[Candidates]:
        """The likeliest paths that grow from states [rows, 1, hidden]."""
        rows, k = len(state), self.branches
        lengths = torch.tensor(self._lengths)
        # Of all nodes made so far, by row: token, parent, log-probability of the path.
        tokens = torch.zeros(rows, 0, dtype=torch.int64, device=self._device)
        parents = torch.zeros_like(tokens)
        scores = torch.zeros(rows, 0, device=self._device)
        grown = torch.full((rows, 1), ROOT, device=self._device)  # nodes that get children now
        above = torch.zeros(rows, 1, device=self._device)
        lineage = torch.zeros(rows, 1, 0, dtype=torch.bool)  # [rows, nodes, nodes read so far]
        for level in range(depth):
            chances = torch.log_softmax(self.head.logits(state).float(), -1)
            best, ids = chances.topk(k, -1)
            first = tokens.shape[1]
            tokens = torch.cat([tokens, self._token_map[ids].flatten(1)], 1)
            parents = torch.cat([parents, grown.repeat_interleave(k, 1)], 1)
            fresh = (above[..., None] + best).flatten(1)
            scores = torch.cat([scores, fresh], 1)
            if level + 1 == depth:
                break
            above, places = fresh.topk(k, -1)
            grown = first + places
            elder = (places // k).cpu()[..., None]  # which of the nodes read last is the parent
            lineage = lineage.gather(1, elder.expand(-1, -1, lineage.shape[2]))
            own = torch.eye(k, dtype=torch.bool).expand(rows, -1, -1)
            lineage = torch.cat([lineage, own], -1)
            state = self._pass(
                tokens.gather(1, grown),
                state.gather(1, elder.to(self._device).expand(-1, -1, state.shape[-1])),
                (lengths[:, None] + level).expand(-1, k),
                lengths[:, None] + level * k + torch.arange(k),
                self._seen(lineage),
            )
        return [
            _likeliest(*row, self.nodes)
            for row in zip(tokens.cpu(), parents.cpu(), scores.cpu(), strict=True)
        ]

    def _seen(self, lineage: torch.Tensor) -> torch.Tensor:
        """bool [rows, n, slots]: everything settled, and of the tree's slots those given."""
        slots = torch.arange(max(self._lengths) + lineage.shape[2])
        seen = (slots < torch.tensor(self._lengths)[:, None])[:, None].repeat(
            1, lineage.shape[1], 1
        )
        for row, length in enumerate(self._lengths):
            seen[row, :, length : length + lineage.shape[2]] = lineage[row]
        return seen

    def _pass(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        seen: torch.Tensor,
        rows: slice = slice(None),
    ) -> torch.Tensor:
        """One pass of the head's layer over some rows of the cache.

        Args:
            tokens: int64 [rows, n].
            hidden: [rows, n, hidden].
            positions: int64 [rows, n].
            slots: int64 [rows, n], where their keys and values go.
            seen: bool [rows, n, slots], what each attends to.
            rows: of the cache.

        Returns:
            [rows, n, hidden].
        """
        end = seen.shape[2]
        self._reserve(end)
        places = slots.to(self._device)
        index = torch.arange(len(places), device=self._device)[:, None]
        mask = seen[:, None].to(self._device)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self._keys[rows], self._values[rows]
            keys[index, :, places] = key.transpose(1, 2)
            values[index, :, places] = value.transpose(1, 2)
            return functional.scaled_dot_product_attention(
                query, keys[:, :, :end], values[:, :, :end], attn_mask=mask, enable_gqa=True
            )

        return self.head.step(tokens.to(self._device), hidden, positions.to(self._device), attend)

    def _reserve(self, slots: int) -> None:
        held = self._keys.shape[2]
        if slots > held:
            more = max(-(-slots // _GROW) * _GROW, held + held // 2) - held
            self._keys, self._values = (
                functional.pad(buffer, (0, 0, 0, more)) for buffer in (self._keys, self._values)
            )


def _likeliest(
    tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, count: int
) -> Candidates:
    """So many nodes of a tree, those of the likeliest paths; a parent is never less likely."""
    # Nodes stand level by level: among equals the earlier one is kept, so a parent before a child.
    order = torch.sort(scores, descending=True, stable=True).indices
    kept = order[:count].sort().values
    moved = torch.full((len(tokens) + 1,), ROOT)
    moved[kept] = torch.arange(len(kept))
    return Candidates(tokens[kept], moved[parents[kept]])
