"""What llama.cpp must know of a model: its shape, the names of its tensors, the order of rows.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; rules per family are those of
llama.cpp's convert_hf_to_gguf.py (conversion/base.py, llama.py, qwen.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGUFWriter

from compressor.errors import RunError


@dataclass(frozen=True)
class _Family:
    """A model type of transformers.

    Attributes:
        arch: llama.cpp's name for it.
        pairs: llama.cpp rotates neighbouring rows of queries and keys, where transformers rotates
            row i with row i + half of the head: rows are put in that order.
    """

    arch: MODEL_ARCH
    pairs: bool = False


_FAMILIES = {
    "llama": _Family(MODEL_ARCH.LLAMA, pairs=True),
    "mistral": _Family(MODEL_ARCH.LLAMA, pairs=True),
    "qwen2": _Family(MODEL_ARCH.QWEN2),
    "qwen3": _Family(MODEL_ARCH.QWEN3),
}
MODEL_TYPES = tuple(_FAMILIES)
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
# Settings of YaRN that llama.cpp has too.
_YARN_KEYS = {
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "truncate",
}  # fmt: skip
ROPE_FREQS = "rope_freqs.weight"


class Layout:
    """How a model lies in a GGUF file.

    Args:
        config: transformers' config.

    Raises:
        RunError: llama.cpp would compute something else, or the family is not known here.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        family = _FAMILIES.get(config.model_type)
        if family is None:
            raise _refusal(
                f"models of type {config.model_type} cannot be exported as GGUF yet (only "
                f"{', '.join(MODEL_TYPES)})",
                config,
            )
        self.family = family
        self.arch = gguf.MODEL_ARCH_NAMES[family.arch]
        self.names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        given = getattr(config, "head_dim", None)
        self.head_dim: int = given or config.hidden_size // self.heads
        self.rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
        self._check()

    def _check(self) -> None:
        config, rope = self.config, self.rope
        kind = rope.get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise _refusal(f"llama.cpp has no position embeddings of type {kind!r}", config)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refusal("it rotates only a part of each head", config)
        if kind == "yarn" and (odd := set(rope) - _YARN_KEYS):
            raise _refusal(f"YaRN with {', '.join(sorted(odd))} is not carried over", config)
        if kind == "yarn" and not _usual_yarn(rope):
            raise _refusal("llama.cpp has no YaRN with this attention_factor or truncate", config)
        if config.hidden_act != "silu":
            raise _refusal(f"its activation is {config.hidden_act}, llama.cpp's is silu", config)

    def name(self, key: str) -> str | None:
        """The name in GGUF of a tensor of the checkpoint; None where it has none there."""
        return self.names.get_name(key, try_suffixes=(".weight", ".bias"))

    def row_order(self, key: str) -> torch.Tensor | None:
        """In which order (int64 [out]) llama.cpp wants the rows of a tensor; None: as they are."""
        linear = key.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(linear)
        if not self.family.pairs or heads is None:
            return None
        rows = torch.arange(heads * self.head_dim)
        return rows.view(heads, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    @property
    def context_length(self) -> int:
        """Tokens that llama.cpp may hold at once. It attends to all of them in these families, so
        where the model attends to a window only, that is the limit: within it both are the same."""
        config = self.config
        longest = int(config.max_position_embeddings)
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        slides = "sliding_attention" in kinds if kinds else config.model_type == "mistral"
        return min(longest, window) if window and slides else longest

    def extra(self) -> dict[str, torch.Tensor]:
        """Tensors that the checkpoint does not have: factors of Llama 3's frequencies, by name."""
        if self.rope.get("rope_type") != "llama3":
            return {}
        return {ROPE_FREQS: _llama3_factors(self.rope, self.head_dim)}

    def add_metadata(self, writer: GGUFWriter) -> None:
        """Add the keys that describe the model's shape."""
        config = self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float(self.rope.get("rope_theta", 10000.0)))
        kind = self.rope.get("rope_type", "default")
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
        elif kind == "yarn":
            original = self.rope.get("original_max_position_embeddings")
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
            writer.add_rope_scaling_orig_ctx_len(int(original or config.max_position_embeddings))
            if (value := self.rope.get("beta_fast")) is not None:
                writer.add_rope_scaling_yarn_beta_fast(float(value))
            if (value := self.rope.get("beta_slow")) is not None:
                writer.add_rope_scaling_yarn_beta_slow(float(value))


def _usual_yarn(rope: dict[str, Any]) -> bool:
    """Whether YaRN scales attention and bounds its ramp as llama.cpp always does
    (src/llama-context.cpp and ggml's rope_yarn)."""
    usual = 0.1 * math.log(float(rope["factor"])) + 1.0
    given = rope.get("attention_factor")
    same = given is None or math.isclose(float(given), usual, rel_tol=1e-6)
    return same and rope.get("truncate", True) is not False


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """What llama.cpp divides each frequency by: float32 [head_dim / 2].

    transformers/modeling_rope_utils.py, _compute_llama3_parameters.
    """
    base = float(rope["rope_theta"])
    factor, original = float(rope["factor"]), rope["original_max_position_embeddings"]
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    length = 2 * math.pi / frequencies
    smooth = (original / length - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(length > original / low, torch.full_like(length, factor), between)
    return torch.where(length < original / high, torch.ones_like(length), found)


def _refusal(what: str, config: Any) -> RunError:
    names = getattr(config, "architectures", None)
    return RunError(
        what, where=names[0] if names else config.model_type, fix="remove gguf from `export:`"
    )
