"""Sizes and variants of an EAGLE-3 head, and those that suit a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.errors import RunError

# Kinds of rotary positions that depend on nothing but the position.
_PLAIN_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes and variants of a head.

    Attributes:
        hidden_size: of the head and of the target.
        intermediate_size: of the MLP.
        num_attention_heads: query heads.
        num_key_value_heads: a divisor of them.
        head_dim: width of each.
        vocab_size: of the target.
        draft_vocab_size: tokens that the head can propose.
        aux_layers: features are the residual stream after so many decoder blocks of the target
            (0: the embeddings), ascending.
        rms_norm_eps: of every norm.
        max_position_embeddings: the longest sequence.
        rope_parameters: as in transformers, ``{"rope_type": ..., "rope_theta": ..., ...}``.
        norm_before_residual: whether what goes past the attention is the normed hidden state.
        fc_norm: whether each layer's features get an RMS norm of their own before they are fused.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    norm_before_residual: bool
    fc_norm: bool

    def layer_config(self) -> dict[str, Any]:
        """The layer as a transformers Llama config of one block."""
        sizes = asdict(self)
        for name in ("draft_vocab_size", "aux_layers", "norm_before_residual", "fc_norm"):
            del sizes[name]
        return {
            **sizes,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        }


def default_aux_layers(blocks: int) -> tuple[int, ...]:
    """Three depths, as vLLM takes them where a head names none: 2, the middle, three from the end.

    Where those are not three different ones (fewer than seven blocks), spread over the blocks; as
    many as there are blocks, where those are fewer than three.
    """
    layers = (2, blocks // 2, blocks - 3)
    if layers[0] < layers[1] < layers[2]:
        return layers
    spread = sorted({blocks // 4, blocks // 2, blocks - 1})
    return tuple(spread) if len(spread) == 3 else tuple(range(min(blocks, 3)))


def config_for(
    target: Any,
    draft_vocab_size: int,
    *,
    aux_layers: Sequence[int] | None = None,
    norm_before_residual: bool = True,
    fc_norm: bool = True,
) -> Eagle3Config:
    """The head of a target: its hidden size, attention heads and rotary base.

    Args:
        target: transformers config of the target.
        draft_vocab_size: see `Eagle3Config`.
        aux_layers: see `Eagle3Config`; None: `default_aux_layers`.
        norm_before_residual: see `Eagle3Config`.
        fc_norm: see `Eagle3Config`.

    Raises:
        RunError: the layers are not there, or the draft vocabulary is larger than the target's.
    """
    text = target.get_text_config()
    blocks, hidden = text.num_hidden_layers, text.hidden_size
    layers = tuple(sorted(set(aux_layers))) if aux_layers else default_aux_layers(blocks)
    if layers[0] < 0 or layers[-1] >= blocks:
        raise RunError(
            f"features after blocks {', '.join(map(str, layers))} were asked for, "
            f"and the target has {blocks}",
            where="aux_layers",
            fix=f"give counts from 0 (the embeddings) to {blocks - 1}",
        )
    if not 0 < draft_vocab_size <= text.vocab_size:
        raise RunError(
            f"a draft vocabulary of {draft_vocab_size} tokens for a target with {text.vocab_size}",
            where="draft_vocab_size",
            fix=f"give a number from 1 to {text.vocab_size}",
        )
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or hidden // heads
    return Eagle3Config(
        hidden_size=hidden,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=width,
        vocab_size=text.vocab_size,
        draft_vocab_size=draft_vocab_size,
        aux_layers=layers,
        rms_norm_eps=getattr(text, "rms_norm_eps", None) or 1e-5,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2048,
        rope_parameters=_rope(text),
        norm_before_residual=norm_before_residual,
        fc_norm=fc_norm,
    )


def _rope(config: Any) -> dict[str, Any]:
    """Rotary positions after the target's, where a Llama layer can have them."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    for kind in ("full_attention", "sliding_attention"):
        if isinstance(found.get(kind), dict):  # one entry per kind of layer
            found = dict(found[kind])
            break
    theta = float(found.get("rope_theta") or 10_000.0)
    if found.get("rope_type") not in _PLAIN_ROPE:
        found = {"rope_type": "default"}
    found.pop("partial_rotary_factor", None)
    return {**found, "rope_theta": theta}
