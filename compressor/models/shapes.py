"""Shapes of a checkpoint's linears from its headers alone: no model is built, no weight read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Siblings that engines fuse into one matrix, by what their name ends in: safetensors, then GGUF.
_FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "w1": "gate_up",
    "w3": "gate_up",
    "attn_q": "qkv",
    "attn_k": "qkv",
    "attn_v": "qkv",
    "ffn_gate": "gate_up",
    "ffn_up": "gate_up",
}
_ROUTERS = {"gate", "router", "shared_expert_gate", "ffn_gate_inp"}


@dataclass(frozen=True)
class LinearShape:
    """A linear of the decoder blocks, as an engine multiplies it.

    Attributes:
        name: of the tensor, or of the fused one, such as ``model.layers.0.self_attn.qkv``.
        out_features: summed over what engines fuse.
        in_features: columns.
        expert: it belongs to one expert of a mixture.
    """

    name: str
    out_features: int
    in_features: int
    expert: bool = False


def is_router(name: str) -> bool:
    """Whether a tensor decides which expert sees a token; it is never quantized."""
    return not _ROUTERS.isdisjoint(name.removesuffix(".weight").split("."))


def linear_shapes(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[LinearShape, ...]:
    """The distinct shapes of the blocks' linears, each under the first name that has it.

    Args:
        tensors: (name, shape [out, in]) of every tensor.
    """
    fused: dict[str, list[tuple[int, int]]] = {}
    for name, shape in tensors:
        base = name.removesuffix(".weight")
        if base == name or len(shape) != 2 or not re.search(r"\.\d+\.", base):
            continue
        if is_router(base):
            continue
        parent, _, leaf = base.rpartition(".")
        fused.setdefault(f"{parent}.{_FUSED.get(leaf, leaf)}", []).append((shape[0], shape[1]))
    found: dict[tuple[int, int, bool], LinearShape] = {}
    for name, parts in fused.items():
        expert = re.search(r"experts\.\d+\.", name) is not None
        key = (sum(out for out, _ in parts), parts[0][1], expert)
        found.setdefault(key, LinearShape(name, *key))
    return tuple(found.values())


def fused_experts(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
    """Tensors that hold all experts of a layer in three dimensions, which no quantizer of linears
    can take apart."""
    return tuple(name for name, shape in tensors if len(shape) == 3 and "experts" in name)
