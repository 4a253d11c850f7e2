"""Causal attention over whole sequences on a CPU, faster than torch's own kernel there.

torch's CPU kernel works on tiles too small for the matrix units' full rate and spends as much on a
causal mask as on none. Here queries go in chunks, each against the keys up to its end only, in
plain matrix products; heads that share keys are rows of one product. The same for a few new tokens
under a mask (a tree of candidates), and for one new token of each sequence, where the heads are the
rows of torch's own kernel: it takes a head at a time else, and reads its keys for each. All else
(gradients, other devices, other masks) goes to the library's `sdpa`.

A module that has a handler (`HANDLER`) is given its keys and values by it: see `kv_cache.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

NAME = "chunked_causal"
HANDLER = "key_value_handler"  # attribute: (key, value) -> (key, value)
_CHUNK = 128


def chunked_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale Q K^T, each query seeing the keys up to its own place) V.

    Args:
        query: [batch, heads, length, width].
        key: [batch, heads of keys, length, width], their number a divisor of ``heads``.
        value: [batch, heads of keys, length, width of values].
        scale: of the scores.

    Returns:
        [batch, length, heads, width of values].
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    queries = (query * scale).view(batch, shared, heads // shared, length, width)
    keys = key.transpose(-1, -2)
    out = query.new_empty(batch, length, shared, heads // shared, value.shape[-1])
    ahead = torch.full((_CHUNK, _CHUNK), float("-inf"), dtype=query.dtype).triu_(1)
    for start in range(0, length, _CHUNK):
        stop = min(start + _CHUNK, length)
        rows = stop - start
        scores = queries[:, :, :, start:stop].reshape(batch, shared, -1, width) @ keys[..., :stop]
        scores.view(batch, shared, -1, rows, stop)[..., start:] += ahead[:rows, :rows]
        mixed = torch.softmax(scores, -1) @ value[:, :, :stop]
        shaped = mixed.view(batch, shared, -1, rows, value.shape[-1])
        out[:, start:stop] = shaped.permute(0, 3, 1, 2, 4)
    return out.view(batch, length, heads, -1)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale Q K^T + mask) V; heads that share keys are rows of one product, so that no key
    is copied for them.

    Args:
        query: [batch, heads, new, width].
        key: [batch, heads of keys, length, width], their number a divisor of ``heads``.
        value: [batch, heads of keys, length, width of values].
        mask: float [batch or 1, 1, new, length], added to the scores.
        scale: of the scores.

    Returns:
        [batch, new, heads, width of values].
    """
    batch, heads, new, width = query.shape
    shared, length = key.shape[1], key.shape[2]
    rows = (query * scale).reshape(batch, shared, -1, width)
    scores = (rows @ key.transpose(-1, -2)).view(batch, shared, -1, new, length)
    scores += mask[:, :, None]
    mixed = torch.softmax(scores, -1).view(batch, shared, -1, length) @ value
    return mixed.view(batch, heads, new, -1).transpose(1, 2).contiguous()


def single_token_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale Q K^T) V for one new token of each sequence; heads that share keys are rows of
    one product.

    Args:
        query: [batch, heads, 1, width].
        key: [batch, heads of keys, length, width], their number a divisor of ``heads``.
        value: [batch, heads of keys, length, width of values].
        scale: of the scores.
        mask: bool [batch, 1, 1, length], where there are keys; None for everywhere.

    Returns:
        [batch, 1, heads, width of values].
    """
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], -1, width)
    mixed = nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask, scale=scale
    )
    return mixed.reshape(batch, 1, heads, -1)


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention function."""
    handler = getattr(module, HANDLER, None)
    if handler is not None:
        key, value = handler(key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    usual = (
        query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not dropout
        and all(kwargs.get(name) is None for name in ("softcap", "position_bias", "cache", "s_aux"))
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if usual and attention_mask is None and causal and 1 < query.shape[2] == key.shape[2]:
        return chunked_causal_attention(query, key, value, scale), None
    if usual and attention_mask is None and query.shape[2] == 1 and key.shape[1] < query.shape[1]:
        return single_token_attention(query, key, value, scale), None
    if usual and _shares_keys_under(attention_mask, query, key):
        assert attention_mask is not None
        return masked_attention(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _shares_keys_under(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether heads share keys under an additive mask that is the same for all of them, in a pass
    of few enough tokens to hold all scores."""
    return (
        mask is not None
        and mask.is_floating_point()
        and mask.ndim == 4
        and mask.shape[1] == 1
        and mask.shape[2:] == (query.shape[2], key.shape[2])
        and key.shape[1] < query.shape[1]
        and query.shape[2] <= _CHUNK
    )


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_chunked_causal(model: Any) -> None:
    """Have a model that runs on `sdpa` attention use this where it can."""
    _register()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME
