"""Attention for continuous batching: many requests of different lengths in one row of tokens.

transformers' continuous batching packs the new tokens of all requests into one sequence and keeps
keys and values in pages (`PagedAttentionCache`). Its own `sdpa` path then attends with one dense
mask over all requests: each query also goes over the keys of every other request, and the work
grows with the square of the number of requests. Here each request attends to its own keys alone, in
the products that static batching uses: `attention.py` for whole prompts, torch's for single tokens,
of all requests together where a step has nothing else and their lengths are alike.

Keys and values of a module with a handler (`attention.HANDLER`) go through it before they are
cached, as an engine with a low-bit cache stores them; the library's `sdpa` path knows no handler.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from compressor.models.attention import (
    HANDLER,
    chunked_causal_attention,
    single_token_attention,
)
from compressor.models.attention import NAME as CHUNKED

NAME = "ragged_causal"
_UNSUPPORTED = ("softcap", "position_bias", "s_aux")  # arguments that change the scores
# Keys read for one product of all requests, padded to the longest, per key that is needed: from
# about 1.7 on, a product for each request is faster (16 requests of 160 tokens, one core, AVX-512).
_MOST_PADDING = 1.5


def ragged_causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: list[int],
    key_ends: list[int],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale Q K^T) V for every request by itself; its last query sees its last key.

    Args:
        query: [1, heads, tokens, width], the requests one after the other.
        key: [1, heads of keys, cached and new tokens, width], in the same order.
        value: [1, heads of keys, cached and new tokens, width of values].
        query_ends: where each request's queries end, after a leading 0.
        key_ends: likewise for its keys.
        scale: of the scores.
        window: how many keys a query sees at most, its own included; None for all.

    Returns:
        [1, tokens, heads, width of values].
    """
    heads, shared = query.shape[1], key.shape[1]
    out = query.new_zeros(1, query.shape[2], heads, value.shape[-1])
    spans = zip(pairwise(query_ends), pairwise(key_ends), strict=True)
    for (first, last), (low, high) in spans:
        rows, columns = last - first, high - low
        if rows == 0:
            continue
        queries = query[:, :, first:last]
        keys, values = key[:, :, low:high], value[:, :, low:high]
        if rows == 1:  # the cache ends its window
            out[:, first:last] = single_token_attention(queries, keys, values, scale)
            continue
        whole = rows == columns and (window is None or columns <= window)
        if whole and query.device.type == "cpu":
            out[:, first:last] = chunked_causal_attention(queries, keys, values, scale)
            continue
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        mask = mask.tril_(columns - rows)
        if window is not None:
            mask = mask.triu_(columns - rows - window + 1)
        mixed = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=heads != shared
        )
        out[:, first:last] = mixed.transpose(1, 2)
    return out


def single_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """One query of every request over its keys, in one product.

    Args:
        query: [1, heads, requests, width].
        key: [1, heads of keys, requests * longest, width]: padded at the end of each request.
        value: likewise.
        lengths: keys of each request [tokens].
        scale: of the scores.

    Returns:
        [1, requests, heads, width of values].
    """
    count, longest = query.shape[2], max(lengths)
    queries = query.transpose(0, 2)  # a batch of requests
    keys, values = (x[0].unflatten(1, (count, longest)).transpose(0, 1) for x in (key, value))
    mask = _filled(tuple(lengths), query.device) if min(lengths) < longest else None
    return single_token_attention(queries, keys, values, scale, mask).transpose(0, 1)


@functools.lru_cache(maxsize=4)  # the layers of a step ask for the same
def _filled(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[requests, 1, 1, longest]: where there are keys."""
    ends = torch.tensor(lengths, device=device)
    return (torch.arange(max(lengths), device=device) < ends[:, None])[:, None, None]


def _pad_reads(reads: list[torch.Tensor], group: int, lengths: list[int]) -> None:
    """Have the cache hand out as many keys for each request as the longest has.

    ``reads`` is the step's own list, one index a kind of layers; the first layer changes it for the
    others. Index 0 is read as zeros.
    """
    if reads[group].numel() < len(lengths) * max(lengths):
        reads[group] = pad_sequence(reads[group].split(lengths), batch_first=True).flatten()


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
    """transformers' interface of an attention function; ValueError outside continuous batching."""
    cache = kwargs.pop("cache", None)
    if cache is None or attention_mask is not None:
        raise ValueError(f"attention {NAME!r} is for continuous batching only, without a mask")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention {NAME!r} does not compute {name}")
    handler = getattr(module, HANDLER, None)
    if handler is not None:
        key, value = handler(key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    group = cache.layer_to_allocator[layer]
    query_ends = kwargs["cu_seq_lens_q"].tolist()
    key_ends = kwargs["cu_seq_lens_k"][group.layer_type].tolist()
    if query.shape[2] == len(query_ends) - 1 and kwargs["read_index"][group.index].numel():
        lengths = [high - low for low, high in pairwise(key_ends)]
        if len(lengths) * max(lengths) <= _MOST_PADDING * key_ends[-1]:
            _pad_reads(kwargs["read_index"], group.index, lengths)
            key, value = cache.update(key, value, layer, kwargs)
            return single_queries(query, key, value, lengths, scale), None
    key, value = cache.update(key, value, layer, kwargs)
    window = kwargs.get("sliding_window")
    return ragged_causal_attention(query, key, value, query_ends, key_ends, scale, window), None


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)  # no mask function: transformers makes no mask


def has_handlers(model: torch.nn.Module) -> bool:
    """Whether any attention rounds its keys and values (see `kv_cache.py`)."""
    return any(hasattr(module, HANDLER) for module in model.modules())


def can_switch(model: Any) -> bool:
    """Whether the model computes attention through transformers' `sdpa` interface."""
    current = getattr(model.config, "_attn_implementation", None)
    return bool(getattr(model, "_supports_attention_backend", False)) and current in (
        "sdpa",
        CHUNKED,
    )


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Have the model attend by the function of that name (`NAME`, or transformers' own)."""
    _register()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [
        (config, getattr(config, "_attn_implementation", None)) for config in configs.values()
    ]
    changed = [(config, old) for config, old in before if old in ("sdpa", CHUNKED)]
    for config, _ in changed:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, old in changed:
            config._attn_implementation = old
