"""A causal LM with a key-value cache for sequences of different lengths, whose new tokens may be
trees.

Every sequence has a row of the cache, filled from slot 0 on without gaps. A pass writes its tokens'
keys and values behind what is there, each token sees its own sequence and its own ancestors only,
and of the new ones those that are to stay are moved together afterwards: a rollback costs a few
slots' copy and never the whole cache. Prompts are run one by one, so that what a prompt gives does
not depend on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from compressor.errors import RunError
from compressor.models.growing_cache import enlarged
from compressor.models.head import last_hidden, split
from compressor.speculate.candidates import tree_depths, tree_mask
from compressor.speculate.proposer import States

_PADDING = 0  # any token will do: no other sees it
# Largest relative error of the states that a pass over a tree may make, by the bits of the dtype.
_ERROR = {32: 0.01, 16: 0.05}


class _Layer(DynamicLayer):
    """Keys and values of one decoder block, [rows, heads, slots, width], in buffers that grow.

    Args:
        place: shared by the layers: where the tokens of the present pass go.
    """

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def fill(self, row: int, rows: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a prompt's keys and values, [1, heads, length, width], into a row of so many."""
        if not self.is_initialized:
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True
            self.keys, self.values = (
                x.new_zeros(rows, x.shape[1], 0, x.shape[3]) for x in (keys, values)
            )
        self._reserve(keys.shape[2])
        assert self.keys is not None and self.values is not None
        self.keys[row, :, : keys.shape[2]] = keys[0]
        self.values[row, :, : keys.shape[2]] = values[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' interface: write [rows, heads, new, width], return all up to there."""
        place = self.place
        self._reserve(place.end)
        assert self.keys is not None and self.values is not None
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[place.rows, :, place.slots] = new.transpose(1, 2)
        return self.keys[:, :, : place.end], self.values[:, :, : place.end]

    def move(self, rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slots ``source`` [rows, n] to ``target`` in rows [rows, 1]."""
        assert self.keys is not None and self.values is not None
        for buffer in (self.keys, self.values):
            buffer[rows, :, target] = buffer[rows, :, source]

    def _reserve(self, slots: int) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (enlarged(x, slots) for x in (self.keys, self.values))


class _Place:
    """Where the tokens of a pass go: ``slots`` [rows, new] of ``rows`` [rows, 1], all below
    ``end``."""

    rows: torch.Tensor
    slots: torch.Tensor
    end: int


class CachedModel:
    """A causal LM and its cache.

    Args:
        model: a transformers causal LM in evaluation mode, with whatever linears. Only attention
            that gives and takes keys and values through transformers' cache is served: of all that
            came before, or of a sliding window.

    Attributes:
        head: hidden states [n, hidden] -> float32 logits [n, vocabulary].
        lengths: tokens in the cache, by row.
        limit: most tokens of a sequence, or None where the config names none.
        vocabulary: number of logits.

    Raises:
        RunError: the architecture keeps a state that cannot be rolled back, or does not compute
            over a tree what it computes over its paths.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = split(model)
        self.lengths: list[int] = []
        config = model.config.get_text_config()
        self.limit: int | None = getattr(config, "max_position_embeddings", None)
        self.layers: int = config.num_hidden_layers
        self._windows = _windows(model)
        embeddings = next(model.get_input_embeddings().parameters())
        self.device, self._dtype = embeddings.device, embeddings.dtype
        self._place = _Place()
        self._cache: Cache | None = None
        self._check()

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], aux_layers: Sequence[int] = ()
    ) -> list[States]:
        """Forget everything and run the prompts.

        Args:
            prompts: token ids, none empty.
            aux_layers: see `Proposer.aux_layers`; each below the number of decoder blocks.

        Returns:
            the states at all positions of each prompt.
        """
        self._check_aux(aux_layers)
        layers = [_Layer(self._place) for _ in self._windows]
        found = []
        for row, prompt in enumerate(prompts):
            cache = DynamicCache()  # of whole sequences, also where windows slide
            ids = torch.tensor([list(prompt)], dtype=torch.int64)
            hidden, aux = self._run(ids, cache, aux_layers)
            for layer, made in zip(layers, cache.layers, strict=True):
                assert isinstance(made, DynamicLayer)
                assert made.keys is not None and made.values is not None
                layer.fill(row, len(prompts), made.keys, made.values)
            found.append(States(ids[0], hidden[0], None if aux is None else aux[0]))
        self._cache = Cache(layers=list(layers))
        self.lengths = [len(prompt) for prompt in prompts]
        return found

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[torch.Tensor],
        parents: Sequence[torch.Tensor],
        aux_layers: Sequence[int] = (),
    ) -> list[States]:
        """Run new tokens of every row behind those in the cache.

        The cache holds them only if `keep` is called next.

        Args:
            tokens: int64 [new] each, as many as there are rows; not all empty.
            parents: int64 [new] each, as `Candidates.parents`; -1: the last token in the cache.
            aux_layers: as of `prefill`.

        Returns:
            the states at the new tokens of each row.
        """
        sizes = [len(row) for row in tokens]
        widest, rows = max(sizes), len(sizes)
        lengths = torch.tensor(self.lengths)
        depths = pad_sequence([tree_depths(row) for row in parents], batch_first=True)
        positions = lengths[:, None] + depths
        if self.limit is not None:
            positions.clamp_(max=self.limit - 1)  # padding of a row that is full
        self._place.end = max(self.lengths) + widest
        self._place.rows = torch.arange(rows, device=self.device)[:, None]
        self._place.slots = (lengths[:, None] + torch.arange(widest)).to(self.device)
        visible = self._visible(parents, widest)
        hidden, aux = self._run(
            pad_sequence(list(tokens), batch_first=True, padding_value=_PADDING),
            self._cache,
            aux_layers,
            attention_mask=self._masks(visible, positions),
            position_ids=positions.to(self.device),
        )
        return [
            States(row, hidden[i, : len(row)], None if aux is None else aux[i, : len(row)])
            for i, row in enumerate(tokens)
        ]

    @torch.inference_mode()
    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep some tokens of the latest `forward` and forget the others.

        Args:
            nodes: of every row, those that stay: a path from a child of the last token on.
        """
        most = max(map(len, nodes))
        lengths = torch.tensor(self.lengths)[:, None]
        target = torch.arange(most).repeat(len(nodes), 1)
        source = target.clone()
        for row, path in enumerate(nodes):
            source[row, : len(path)] = torch.tensor(path, dtype=torch.int64)
        moved = (source != target).any(1).nonzero()
        if len(moved):
            at = moved.flatten()
            places = [(lengths[at] + x[at]).to(self.device) for x in (source, target)]
            for layer in self._layers:
                layer.move(moved.to(self.device), *places)
        self.lengths = [n + len(path) for n, path in zip(self.lengths, nodes, strict=True)]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what is behind so many tokens of each row."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError("a cache cannot be rewound forwards")
        self.lengths = list(lengths)

    def drop(self, rows: Sequence[int]) -> None:
        """Forget rows; those after them move up."""
        gone = set(rows)
        left = [row for row in range(len(self.lengths)) if row not in gone]
        self.lengths = [self.lengths[row] for row in left]
        index = torch.tensor(left, dtype=torch.int64, device=self.device)
        for layer in self._layers:
            assert layer.keys is not None and layer.values is not None
            layer.keys = layer.keys[index]
            layer.values = layer.values[index]

    @property
    def _layers(self) -> list[_Layer]:
        assert self._cache is not None
        return [layer for layer in self._cache.layers if isinstance(layer, _Layer)]

    def _run(
        self, ids: torch.Tensor, cache: Cache | None, aux_layers: Sequence[int], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Input of the head [rows, length, hidden], and of the layers that are asked for."""
        if aux_layers:
            kwargs["output_hidden_states"] = True
        out = self.model.base_model(
            input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, **kwargs
        )
        aux = None
        if aux_layers:
            aux = torch.cat([out.hidden_states[layer] for layer in aux_layers], -1)
        return out.last_hidden_state, aux

    def _visible(self, parents: Sequence[torch.Tensor], widest: int) -> torch.Tensor:
        """bool [rows, new, slots]: which slots a new token sees, windows aside."""
        slots = torch.arange(max(self.lengths) + widest)
        before = slots < torch.tensor(self.lengths)[:, None, None]
        visible = before.repeat(1, widest, 1)
        for row, (length, above) in enumerate(zip(self.lengths, parents, strict=True)):
            own = visible[row, :, length : length + widest]
            own.fill_diagonal_(True)  # padding too: a softmax over nothing is no number
            own[: len(above), : len(above)] = tree_mask(above)
        return visible

    def _masks(
        self, visible: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks [rows, 1, new, slots], by kind of attention where there are several."""
        masks: dict[str, torch.Tensor] = {}
        for kind, window in dict(self._windows).items():
            seen = visible
            if window is not None:
                places = torch.arange(visible.shape[2]).repeat(len(visible), 1)
                for row, length in enumerate(self.lengths):
                    places[row, length : length + positions.shape[1]] = positions[row]
                seen = visible & (positions[:, :, None] - places[:, None, :] < window)
            mask = torch.zeros(seen.shape, dtype=self._dtype)
            mask.masked_fill_(~seen, torch.finfo(self._dtype).min)
            masks[kind] = mask[:, None].to(self.device)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _check_aux(self, aux_layers: Sequence[int]) -> None:
        for layer in aux_layers:
            if not 0 <= layer < self.layers:
                raise RunError(
                    f"states after {layer} decoder blocks are asked for, the model has "
                    f"{self.layers}",
                    where=type(self.model).__name__,
                    fix="the speculator was trained for another target: choose its own",
                )

    @torch.inference_mode()
    def _check(self) -> None:
        """Raise unless a tree's states are those of its paths."""
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = (torch.arange(17, 17 * 14, 17) % vocabulary).tolist()
        prompt, new = ids[:7], ids[7:]
        parents = torch.tensor([-1, 0, 0, 1, 1, 2])
        paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]]
        name = type(self.model).__name__
        fix = "choose a target whose attention takes masks and positions of any form"
        try:
            self.prefill([prompt])
            states = self.forward([torch.tensor(new)], [parents])[0].hidden.float()
            self.vocabulary = self.head(states[:1]).shape[-1]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                "this architecture cannot run a tree of candidates "
                f"({(str(error).splitlines() or [type(error).__name__])[0]})",
                where=name,
                fix=fix,
            ) from error
        errors = []
        for state, path in zip(states, paths, strict=True):
            whole = torch.tensor([prompt + [new[node] for node in path]], device=self.device)
            plain = last_hidden(self.model, whole)[0, -1].float()
            errors.append(float((state - plain).norm() / plain.norm()))
        # A router or a rounding on the edge may tip at one node; a wrong mask shows at all.
        if not sorted(errors)[len(errors) // 2] < _ERROR[min(32, self._dtype.itemsize * 8)]:
            raise RunError(
                "this architecture computes something else over a tree of candidates than over its "
                "paths",
                where=name,
                fix=fix,
            )
        self.lengths, self._cache = [], None


def _windows(model: nn.Module) -> list[tuple[str, int | None]]:
    """(kind of attention, its window) of every decoder block, as transformers' cache has them.

    Raises:
        RunError: a block keeps anything but keys and values.
    """
    found: list[tuple[str, int | None]] = []
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            found.append(("full_attention", None))
        elif type(layer) is DynamicSlidingWindowLayer and "chunked_attention" not in kinds:
            found.append(("sliding_attention", int(layer.sliding_window)))
        else:
            raise RunError(
                f"candidates cannot be taken back from a cache of {type(layer).__name__}",
                where=type(model).__name__,
                fix="speculative decoding needs a target with full or sliding-window attention",
            )
    return found
