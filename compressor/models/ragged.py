"""Attention for continuous batching: many requests of different lengths in one row of tokens.

transformers' continuous batching packs the new tokens of all requests into one sequence and keeps
keys and values in pages (`PagedAttentionCache`). Its own `sdpa` path then attends with one dense
mask over all requests: each query also goes over the keys of every other request, and the work
grows with the square of the number of requests. Here each request attends to its own keys alone, in
the products that static batching uses: `attention.py` for whole prompts, torch's for single tokens.

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

from compressor.models.attention import HANDLER, chunked_causal_attention
from compressor.models.attention import NAME as CHUNKED

NAME = "ragged_causal"
_UNSUPPORTED = ("softcap", "position_bias", "s_aux")  # arguments that change the scores


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
        keys, values = key[:, :, low:high], value[:, :, low:high]
        if rows == 1:  # heads that share keys are rows of one product; the cache ends its window
            one = query[:, :, first].view(1, shared, heads // shared, -1)
            mixed = scaled_dot_product_attention(one, keys, values, scale=scale)
            out[0, first] = mixed.view(heads, -1)
            continue
        queries = query[:, :, first:last]
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
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    ends = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()  # update: this layer
    window = kwargs.get("sliding_window")
    return ragged_causal_attention(query, key, value, *ends, scale, window), None


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
