"""Prompts with several continuations each, run in one row of tokens: no padding, nothing twice.

A *tree* is a prompt (trunk) and the continuations that are tried behind it (branches). The trunk is
computed once, whatever the number of its branches, and the tokens of all trees of a batch stand in
one row, so that linears see no padding at all. In attention a trunk's token sees the trunk before
it, a branch's token the whole trunk and its own branch before it: exactly what each continuation
sees behind a copy of the prompt of its own. Tree attention is that of speculative decoding (Miao et
al.: "SpecInfer", arXiv 2305.09781, section 4.2); here it lies flat, as packed training batches do.

Models whose attention does not go through transformers' interface, or that compute something else
over a tree than over its paths (a recurrent state), are run over padded sequences instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from compressor.models import ragged
from compressor.models.attention import HANDLER, chunked_causal_attention
from compressor.models.head import last_hidden, split
from compressor.numerics.memory import halved, suppress_out_of_memory

NAME = "packed_trees"
HEAD_ROWS = 256  # positions whose logits are in memory at once
_UNSUPPORTED = ("softcap", "position_bias", "s_aux", "cache")  # arguments that change the scores
# Largest relative difference of hidden states that the trial of `can_pack` may show, by the dtype's
# bits: sums in another order, which activations in 8 bits may round to the next number.
_ERROR = {32: 0.01, 16: 0.05}

Scored = tuple[float, bool]


@dataclass(frozen=True)
class Tree:
    """A prompt and what is tried behind it.

    Attributes:
        trunk: token ids of the prompt, at least one.
        branches: token ids that follow it, each at least one; often none, since the last token of a
            continuation is only predicted and never read.
    """

    trunk: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def size(self) -> int:
        """Tokens that are computed."""
        return len(self.trunk) + sum(map(len, self.branches))

    def rows(self, branch: int | None) -> list[int]:
        """Where the tokens of a path lie, counted from the tree's first: trunk, then branch."""
        trunk = list(range(len(self.trunk)))
        if branch is None:
            return trunk
        start = len(self.trunk) + sum(map(len, self.branches[:branch]))
        return trunk + list(range(start, start + len(self.branches[branch])))


@dataclass
class Layout:
    """Trees one after the other in one row.

    Attributes:
        ids, positions: int64 [1, tokens].
        starts: row of each tree's first token.
        trunks: int64 [trees, longest trunk], rows of the trunks' tokens, padded with -1.
        branches: likewise of all of a tree's branches, [trees, most tokens of branches].
        ends: int64 like ``branches``: the number of each token's branch in its tree, -1 in padding.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    starts: list[int]
    trunks: torch.Tensor
    branches: torch.Tensor
    ends: torch.Tensor
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, trees: Sequence[Tree], device: torch.device) -> Layout:
        """Lay out trees, of which there is at least one."""
        ids: list[int] = []
        positions: list[int] = []
        starts, trunks, branches, ends = [], [], [], []
        for tree in trees:
            start, length = len(ids), len(tree.trunk)
            starts.append(start)
            ids += tree.trunk
            positions += range(length)
            trunks.append(torch.arange(start, len(ids)))
            for branch in tree.branches:
                ids += branch
                positions += range(length, length + len(branch))
            branches.append(torch.arange(start + length, len(ids)))
            numbers = [n for n, branch in enumerate(tree.branches) for _ in branch]
            ends.append(torch.tensor(numbers, dtype=torch.int64))
        row = [torch.tensor([x], dtype=torch.int64, device=device) for x in (ids, positions)]
        parts = (_padded(rows).to(device) for rows in (trunks, branches, ends))
        at, behind, whose = parts
        return cls(row[0], row[1], starts, at, behind, whose)

    def branch_mask(self, shared: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of the branches' tokens: 0 or -inf.

        Args:
            shared: query heads to a head of keys, which are rows of one product.
            window: how many positions a token sees at most, its own included; None for all.
            dtype: of the scores.

        Returns:
            [trees, 1, shared * tokens of branches, keys of the trunk and of the branches].
        """
        key = ("branch", shared, window, dtype)
        if key not in self._masks:
            positions = self.positions[0]
            query_at, trunk_at = positions[self.branches], positions[self.trunks]
            before = query_at[:, :, None] >= query_at[:, None, :]
            own = (self.ends[:, :, None] == self.ends[:, None, :]) & before
            trunk = (self.trunks >= 0)[:, None, :].expand(-1, own.shape[1], -1)
            seen = torch.cat([trunk, own], -1)
            if window is not None:
                key_at = torch.cat([trunk_at, query_at], -1)
                seen = seen & (query_at[:, :, None] - key_at[:, None, :] < window)
            seen = seen | (self.branches < 0)[:, :, None]  # padding sees anything: never a NaN
            self._masks[key] = _additive(seen, dtype)[:, None].repeat(1, 1, shared, 1)
        return self._masks[key]

    def trunk_mask(self, shared: int, window: int, dtype: torch.dtype) -> torch.Tensor:
        """Likewise of trunks with a sliding window, [1, 1, shared * longest, longest]."""
        key = ("trunk", shared, window, dtype)
        if key not in self._masks:
            at = torch.arange(self.trunks.shape[1], device=self.trunks.device)
            distance = at[:, None] - at[None, :]
            seen = (distance >= 0) & (distance < window)
            self._masks[key] = _additive(seen, dtype)[None, None].repeat(1, 1, shared, 1)
        return self._masks[key]


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale Q K^T) V, each token seeing its own path only.

    Args:
        query: [1, heads, tokens, width], in the order of the layout.
        key: [1, heads of keys, tokens, width], their number a divisor of ``heads``.
        value: [1, heads of keys, tokens, width of values].
        layout: of the trees.
        scale: of the scores.
        window: how many positions a token sees at most, its own included; None for all.

    Returns:
        [1, tokens, heads, width of values].
    """
    heads, shared = query.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty(1, query.shape[2], heads, value.shape[-1])
    keys, values = (_gather(x, layout.trunks) for x in (key, value))
    queries = _gather(query, layout.trunks)
    longest = layout.trunks.shape[1]
    if window is not None and longest > window:
        mask = layout.trunk_mask(shared, window, query.dtype)
        mixed = _masked(queries, keys, values, mask, scale)
    elif query.device.type == "cpu":
        mixed = chunked_causal_attention(queries, keys, values, scale)
    else:
        mixed = scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=shared > 1
        ).transpose(1, 2)
    _scatter(out, mixed, layout.trunks)
    if layout.branches.shape[1]:
        mask = layout.branch_mask(shared, window, query.dtype)
        keys = torch.cat([keys, _gather(key, layout.branches)], 2)
        values = torch.cat([values, _gather(value, layout.branches)], 2)
        mixed = _masked(_gather(query, layout.branches), keys, values, mask, scale)
        _scatter(out, mixed, layout.branches)
    return out


def _gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[trees, heads, length, width] of [1, heads, tokens, width]; padding reads some token."""
    return x[0].transpose(0, 1)[rows].transpose(1, 2)


def _scatter(out: torch.Tensor, mixed: torch.Tensor, rows: torch.Tensor) -> None:
    """Put [trees, length, heads, width] where it belongs, without the padding."""
    there = rows >= 0
    out[0, rows[there]] = mixed[there]


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """[trees, length, heads, width]; heads that share keys are rows of one product."""
    trees, heads, length, width = query.shape
    rows = query.reshape(trees, key.shape[1], -1, width)
    mixed = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return mixed.reshape(trees, heads, length, -1).transpose(1, 2)


_layout: ContextVar[Layout] = ContextVar("layout")


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention function; ValueError for what it does not compute."""
    refused = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is not None or dropout or refused or not causal:
        raise ValueError(f"attention {NAME!r} does not compute {refused or 'a mask or dropout'}")
    handler = getattr(module, HANDLER, None)
    if handler is not None:
        key, value = handler(key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = kwargs.get("sliding_window")
    return tree_attention(query, key, value, _layout.get(), scale, window), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)  # no mask function: transformers makes no mask


@torch.no_grad()
def packed_hidden(model: Any, layout: Layout) -> torch.Tensor:
    """Input of the head, [tokens, hidden], of a model that `can_pack`."""
    _register()
    token = _layout.set(layout)
    try:
        with ragged.attention(model, NAME):
            return model.base_model(
                layout.ids, position_ids=layout.positions, use_cache=False
            ).last_hidden_state[0]
    finally:
        _layout.reset(token)


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether the model computes over trees what it computes over their paths, by a trial."""
    if not ragged.can_switch(model):
        return False
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = [int(i) % vocabulary for i in range(5, 5 + 7 * 48, 7)]
    trees = [
        Tree(tuple(ids[:24]), (tuple(ids[24:33]), tuple(ids[33:37]))),
        Tree(tuple(ids[37:41]), (tuple(ids[41:48]),)),
    ]
    layout = Layout.of(trees, device)
    try:
        packed = packed_hidden(model, layout)
    except (ValueError, TypeError, RuntimeError):  # other arguments, or a mask that it insists on
        return False
    for tree, start in zip(trees, layout.starts, strict=True):
        for number, branch in enumerate(tree.branches):
            path = torch.tensor([[*tree.trunk, *branch]], device=device)
            expected = last_hidden(model, path)[0].float()
            rows = torch.tensor(tree.rows(number), device=device) + start
            limit = _ERROR[torch.finfo(packed.dtype).bits] * float(expected.abs().max())
            if not float((packed[rows].float() - expected).abs().max()) <= limit:
                return False
    return True


class Scorer:
    """Log-likelihoods of continuations.

    Args:
        model: a transformers causal LM in evaluation mode, with whatever linears.
        batch_tokens: tokens of a forward pass, at most (but for a longer single sequence); halved
            where memory does not suffice.
        lowered: called with each smaller number of tokens.

    Attributes:
        packs: whether trees are run, and not padded sequences.
        tokens: read by the requests so far, each by itself.
        computed: tokens that were run for them.

    Raises RunError for a model whose logits `models.head` cannot make.
    """

    def __init__(
        self, model: Any, batch_tokens: int, lowered: Callable[[int], None] = lambda tokens: None
    ) -> None:
        self.model, self.batch_tokens, self._lowered = model, batch_tokens, lowered
        self.head = split(model)
        self.packs = can_pack(model)
        self.tokens = self.computed = 0
        self._device = next(model.parameters()).device

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[Scored]:
        """(log-likelihood in nats, whether each token is the likeliest) of every continuation.

        Args:
            requests: token ids (context, continuation), neither empty, in any order.
            advance: called with the number of requests done.
        """
        self.tokens += sum(len(c) + len(t) - 1 for c, t in requests)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(requests):
            whole = tuple(context) if self.packs else (*context, *continuation[:-1])
            groups.setdefault(whole, []).append(index)
        planned = [_plan(context, requests, rows) for context, rows in groups.items()]
        if not self.packs:  # each sequence is a tree of its own
            planned = [
                (Tree(context), [(i, list(range(len(context)))) for i in rows])
                for context, rows in groups.items()
            ]
        # The longest first: what runs out of memory does so at once.
        planned.sort(key=lambda plan: (-len(plan[0].trunk), -plan[0].size))
        results: list[Scored] = [(0.0, False)] * len(requests)
        first = 0
        while first < len(planned):
            batch = self._batch(planned, first)
            made: list[tuple[int, Scored]] = []
            with suppress_out_of_memory():
                made = self._score(batch, requests)
            if not made:
                self.lower(len(batch))
                continue
            for index, scored in made:
                results[index] = scored
            first += len(batch)
            advance(sum(len(paths) for _, paths in batch))
        return results

    def lower(self, count: int) -> None:
        """After memory did not suffice for so many together: half as many tokens from here on;
        RunError where it was but one."""
        halved(count)
        self.batch_tokens = max(1, self.batch_tokens // 2)
        self._lowered(self.batch_tokens)

    def _batch(self, planned: list[_Plan], first: int) -> list[_Plan]:
        """Those from one on that go together."""
        size, last = 0, first
        while last < len(planned):
            # Of padded sequences the first is the longest.
            size += planned[last if self.packs else first][0].size
            if last > first and size > self.batch_tokens:
                break
            last += 1
        return planned[first:last]

    def _score(
        self, batch: list[_Plan], requests: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[int, Scored]]:
        """(request, its result) of a batch."""
        hidden, starts = self._hidden([tree for tree, _ in batch])
        rows: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for start, (_, paths) in zip(starts, batch, strict=True):
            for index, path in paths:
                continuation = requests[index][1]
                owners += [index] * len(continuation)
                rows += [start + row for row in path[-len(continuation) :]]
                targets += continuation
        return list(self._likelihoods(hidden, rows, targets, owners))

    def _hidden(self, trees: list[Tree]) -> tuple[torch.Tensor, list[int]]:
        """Hidden states [rows, hidden], and the row of each tree's first token."""
        if self.packs:
            self.computed += sum(tree.size for tree in trees)
            layout = Layout.of(trees, self._device)
            return packed_hidden(self.model, layout), layout.starts
        longest = max(len(tree.trunk) for tree in trees)
        self.computed += longest * len(trees)
        ids = pad_sequence([torch.tensor(t.trunk) for t in trees], batch_first=True)
        with torch.no_grad():  # padded behind the end, where no token of a causal model looks
            hidden = last_hidden(self.model, ids.to(self._device))
        return hidden.flatten(0, 1), [longest * i for i in range(len(trees))]

    @torch.no_grad()
    def _likelihoods(
        self, hidden: torch.Tensor, rows: list[int], targets: list[int], owners: list[int]
    ) -> Iterator[tuple[int, Scored]]:
        """(request, its result): the head sees every needed position once, a few at a time."""
        device = hidden.device
        needed, places = torch.unique(torch.tensor(rows, device=device), return_inverse=True)
        order = torch.argsort(places, stable=True)
        target = torch.tensor(targets, device=device)[order]
        places = places[order]
        likelihood = torch.empty(len(rows), device=device)
        likeliest = torch.empty(len(rows), dtype=torch.bool, device=device)
        for start in range(0, len(needed), HEAD_ROWS):
            logits = self.head(hidden[needed[start : start + HEAD_ROWS]])
            bounds = torch.tensor([start, start + HEAD_ROWS], device=device)
            low, high = torch.searchsorted(places, bounds).tolist()
            at, wanted = places[low:high] - start, target[low:high]
            likelihood[low:high] = logits[at, wanted] - torch.logsumexp(logits, -1)[at]
            likeliest[low:high] = logits.argmax(-1)[at] == wanted
        totals: dict[int, float] = {}
        greedy: dict[int, bool] = {}
        numbers = zip(order.tolist(), likelihood.tolist(), likeliest.tolist(), strict=True)
        for place, value, same in numbers:
            owner = owners[place]
            totals[owner] = totals.get(owner, 0.0) + value
            greedy[owner] = greedy.get(owner, True) and same
        for owner, total in totals.items():
            yield owner, (total, greedy[owner])


# A tree, and the rows of each request's path in it.
_Plan = tuple[Tree, list[tuple[int, list[int]]]]


def _plan(
    context: tuple[int, ...],
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    members: list[int],
) -> _Plan:
    """The tree of the requests with one context; a single path is all trunk."""
    tails = list(dict.fromkeys(tuple(requests[i][1][:-1]) for i in members))
    if len(tails) == 1:
        tree = Tree((*context, *tails[0]))
        return tree, [(i, tree.rows(None)) for i in members]
    branches = [tail for tail in tails if tail]
    tree = Tree(context, tuple(branches))
    numbers = {tail: number for number, tail in enumerate(branches)}
    return tree, [(i, tree.rows(numbers.get(tuple(requests[i][1][:-1])))) for i in members]
