"""Static scales of cached keys and values: found in calibration, and applied as engines apply them.

Engines with an 8-bit cache store what attention is given (keys after their rotary embedding and
norm) divided by one scale per layer for keys and one for values, and read it back before every
product, also for the tokens of the present pass (vLLM: ``reshape_and_cache``). Both happen here in
the attention function (`attention.py`), which sees the same tensors.

Names in a checkpoint, read by vLLM: ``{attention}.k_scale`` and ``{attention}.v_scale``, float32
[1].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.attention import HANDLER, NAME
from compressor.numerics.kernels import rounded
from compressor.numerics.scheme import ActivationScheme

KEY, VALUE = ".k_scale", ".v_scale"
_LEAST = 1e-8  # of what a scale spans, for a cache that held nothing but zeros


class RoundedCache(nn.Module):
    """Keys and values as they are read from a low-bit cache.

    Args:
        key_scale: float32 [1].
        value_scale: float32 [1].
        scheme: static, per tensor.
    """

    key_scale: torch.Tensor
    value_scale: torch.Tensor

    def __init__(
        self, key_scale: torch.Tensor, value_scale: torch.Tensor, scheme: ActivationScheme
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("key_scale", key_scale)
        self.register_buffer("value_scale", value_scale)

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round [batch, heads, length, width] each; what is rounded already stays as it is."""
        return (
            rounded(key, self.scheme, self.key_scale),
            rounded(value, self.scheme, self.value_scale),
        )


class CacheObserver:
    """Largest magnitudes of the keys and values that a block's attention is given."""

    def __init__(self) -> None:
        self._largest: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def watch(self, model: CausalLM, index: int) -> Iterator[None]:
        """Look on while the block runs."""
        paths = {
            f"{model.block_names[index]}.{path}": module
            for path, module in model.blocks[index].named_modules()
            if path
        }
        for path, module in paths.items():
            setattr(module, HANDLER, self._handler(model.disk_path(path)))
        try:
            yield
        finally:
            for module in paths.values():
                delattr(module, HANDLER)

    def _handler(self, name: str) -> Any:
        def note(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sizes = [x.detach().abs().amax().float().cpu() for x in (key, value)]
            before = self._largest.get(name, (torch.zeros(()), torch.zeros(())))
            self._largest[name] = (
                torch.maximum(before[0], sizes[0]),
                torch.maximum(before[1], sizes[1]),
            )
            return key, value

        return note

    def scales(self, scheme: ActivationScheme) -> dict[str, torch.Tensor]:
        """Tensors by their name in the checkpoint, float32 [1]; empty when no attention ran."""
        found = {}
        for name, largest in self._largest.items():
            for suffix, size in zip((KEY, VALUE), largest, strict=True):
                found[name + suffix] = size.clamp_min(_LEAST).view(1) / scheme.maximum
        return found


def check_attention(model: CausalLM) -> None:
    """Raise `RunError` where keys and values cannot be seen as the engine caches them."""
    inner: Any = model.model
    if getattr(model.config, "kv_lora_rank", None):
        reason = "caches a compressed latent in place of keys and values"
    elif (
        getattr(inner, "_supports_attention_backend", False)
        and getattr(inner.config, "_attn_implementation", None) == NAME
    ):
        return
    else:
        reason = "does not compute attention through transformers' `sdpa` interface"
    raise no_cache(model, reason)


def no_cache(model: CausalLM, reason: str) -> RunError:
    """The error for an architecture whose cache has no scales."""
    return RunError(
        f"the key-value cache cannot be quantized: this architecture {reason}",
        where=type(model.model).__name__,
        fix="remove `kv_cache` from the variant",
    )


def round_cache(
    model: CausalLM, scales: Mapping[str, torch.Tensor], scheme: ActivationScheme
) -> None:
    """Have every attention that has scales round its keys and values.

    Args:
        model: before its linears are replaced or after.
        scales: tensors of one number by their name in the checkpoint.
        scheme: static, per tensor.

    Raises:
        RunError: the architecture cannot do it, or a scale is no attention's or not a positive
            number.
    """
    check_attention(model)
    left = dict(scales)
    for index, block in enumerate(model.blocks):
        for path, module in list(block.named_modules()):
            name = model.disk_path(f"{model.block_names[index]}.{path}") if path else ""
            if name + KEY in left and name + VALUE in left:
                key, value = (_one(left.pop(name + s), name + s, model) for s in (KEY, VALUE))
                setattr(module, HANDLER, RoundedCache(key, value, scheme))
    if left:
        raise RunError(
            f"{len(left)} scales of the key-value cache belong to no attention of the model, such "
            f"as {min(left)}",
            where=str(model.checkpoint.directory),
            fix="the checkpoint's config and weights do not belong together: export it again",
        )


def _one(scale: torch.Tensor, name: str, model: CausalLM) -> torch.Tensor:
    value = scale.float().flatten()
    if value.numel() != 1 or not bool(torch.isfinite(value).all() and (value > 0).all()):
        raise RunError(
            f"{name} is not one positive number",
            where=str(model.checkpoint.directory),
            fix="only caches with one scale per layer are read: export the model again",
        )
    return value
