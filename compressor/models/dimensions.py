"""Dimensions of a model from its config (or GGUF header) alone: no weight is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.errors import RunError, first_line
from compressor.models.shapes import is_router

_STATELESS = ("linear_attention", "mamba", "conv", "recurrent")


@dataclass(frozen=True)
class Linear:
    """Equal linears of the decoder blocks.

    Attributes:
        out_features, in_features: shape.
        count: how many there are, experts each counted.
        expert: they belong to the experts of a mixture.
    """

    out_features: int
    in_features: int
    count: int
    expert: bool = False

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return self.out_features * self.in_features * self.count


@dataclass(frozen=True)
class Dimensions:
    """What inference time and memory follow from.

    Attributes:
        linears: of the decoder blocks, which is what gets quantized.
        vocabulary, hidden: shape of the embedding.
        tied: the output layer is the embedding.
        rest: parameters of norms, biases, routers, positions.
        windows: of every layer that keeps keys and values: the most tokens kept, None for all.
        kv_values: numbers kept per token and layer.
        attention_width: heads x (width of keys + width of values): products per token of context.
        experts, experts_per_token: of a mixture; 0 in a dense model.
        dtype: that the weights are stored in.
    """

    name: str
    linears: tuple[Linear, ...]
    vocabulary: int
    hidden: int
    tied: bool
    rest: int
    windows: tuple[int | None, ...]
    kv_values: int
    attention_width: int
    experts: int = 0
    experts_per_token: int = 0
    dtype: str = "bfloat16"

    @property
    def embedding(self) -> int:
        """Parameters of the embedding table; the output layer has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        blocks = sum(linear.parameters for linear in self.linears)
        return blocks + self.embedding * (1 if self.tied else 2) + self.rest

    @property
    def active_parameters(self) -> int:
        """That one token goes through, output layer included, the embedding's table not."""
        share = self.experts_per_token / self.experts if self.experts else 1.0
        dense, experts = (
            sum(linear.parameters for linear in self.linears if linear.expert is expert)
            for expert in (False, True)
        )
        return round(dense + share * experts) + self.embedding + self.rest

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        linears = [asdict(linear) for linear in self.linears]
        return {**asdict(self), "linears": linears, "windows": list(self.windows)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Dimensions:
        """The inverse of `to_dict`."""
        linears = tuple(Linear(**one) for one in value["linears"])
        return cls(**{**value, "linears": linears, "windows": tuple(value["windows"])})


def read_dimensions(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base_dir: Path | None = None,
) -> Dimensions:
    """Dimensions of a Hub id, a directory with ``config.json``, a GGUF file or ``package:...``.

    Raises:
        RunError: it is not there, cannot be reached, or is not a causal language model.
    """
    from compressor.models.source import PACKAGE_PREFIX, resolve_source

    if source.endswith(".gguf") or source.startswith(PACKAGE_PREFIX):
        return gguf_dimensions(resolve_source(source, base_dir=base_dir or Path.cwd()).path)
    path = (base_dir or Path.cwd()) / Path(source).expanduser()
    place = str(path) if path.is_dir() else source
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
        return config_dimensions(config, source, trust_remote_code=trust_remote_code)
    except RunError:
        raise
    except Exception as error:  # transformers and the Hub's client raise what they like
        raise RunError(
            f"its config cannot be read: {first_line(error)}",
            where=source,
            fix="give a Hub id, a directory with config.json, or a GGUF file, of a causal model",
        ) from error


def config_dimensions(config: Any, name: str, *, trust_remote_code: bool = False) -> Dimensions:
    """From a transformers config: the model is built without memory (device ``meta``)."""
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    apart = {id(embedding)} | ({id(head.weight)} if head is not None else set())
    tensors = [
        (key, tuple(parameter.shape))
        for key, parameter in model.named_parameters()
        if id(parameter) not in apart
    ]
    hidden = int(embedding.shape[1])
    linears, rest = _linears(tensors, hidden)
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    kv_values, attention = 2 * kv_heads * width, 2 * heads * width
    if latent := getattr(text, "kv_lora_rank", None):  # multi-head latent attention, DeepSeek-V2
        kv_values = int(latent + text.qk_rope_head_dim)
        attention = heads * int(text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    experts = next(
        (
            int(found)
            for key in ("num_experts", "num_local_experts", "n_routed_experts")
            if (found := getattr(text, key, None))
        ),
        0,
    )
    tied = head is None or head.weight is embedding or bool(text.tie_word_embeddings)
    return Dimensions(
        name=name,
        linears=linears,
        vocabulary=int(embedding.shape[0]),
        hidden=hidden,
        tied=tied,
        rest=rest,
        windows=_windows(text),
        kv_values=kv_values,
        attention_width=attention,
        experts=experts if any(linear.expert for linear in linears) else 0,
        experts_per_token=int(getattr(text, "num_experts_per_tok", 0) or 0),
        dtype=str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch."),
    )


def gguf_dimensions(path: Path) -> Dimensions:
    """From a GGUF file's header (keys as in the format's specification)."""
    from compressor.models.gguf_file import count_field, open_gguf, text_field

    reader = open_gguf(path)
    arch = text_field(reader, "general.architecture")
    # GGUF writes the fastest dimension first.
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    embedding = shapes.get("token_embd.weight", (1, 1))
    apart = {"token_embd.weight", "output.weight"}
    linears, rest = _linears(
        [(name, shape) for name, shape in shapes.items() if name not in apart], embedding[1]
    )
    heads = max(count_field(reader, f"{arch}.attention.head_count", 1), 1)
    width = count_field(reader, f"{arch}.attention.key_length", embedding[1] // heads)
    kv_heads = count_field(reader, f"{arch}.attention.head_count_kv", heads)
    return Dimensions(
        name=path.name,
        linears=linears,
        vocabulary=embedding[0],
        hidden=embedding[1],
        tied="output.weight" not in shapes,
        rest=rest,
        windows=(None,) * min(count_field(reader, f"{arch}.block_count", 1), len(shapes)),
        kv_values=2 * kv_heads * width,
        attention_width=2 * heads * width,
        experts=count_field(reader, f"{arch}.expert_count", 0),
        experts_per_token=count_field(reader, f"{arch}.expert_used_count", 0),
    )


def _linears(
    tensors: Iterable[tuple[str, tuple[int, ...]]], hidden: int
) -> tuple[tuple[Linear, ...], int]:
    """(linears of the blocks, parameters that are in none)."""
    found: Counter[tuple[int, int, bool]] = Counter()
    rest = 0
    for name, shape in tensors:
        numbered = re.search(r"\.\d+\.", name)
        expert = re.search(r"experts|_exps\b|_exps\.", name) is not None and "shared" not in name
        if len(shape) == 3 and expert:
            # [experts, rows, columns], or transposed: the down projection makes `hidden` of it.
            rows, columns = shape[1:]
            down = "down" in name
            if (down and rows != hidden) or (not down and columns != hidden):
                rows, columns = columns, rows
            found[rows, columns, True] += shape[0]
        elif len(shape) == 2 and numbered and not is_router(name):
            found[shape[0], shape[1], expert] += 1
        else:
            rest += math.prod(shape)
    linears = tuple(Linear(out, inner, count, e) for (out, inner, e), count in found.items())
    return linears, rest


def _windows(text: Any) -> tuple[int | None, ...]:
    """The most tokens that each layer with a cache keeps."""
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return (window,) * int(text.num_hidden_layers)
    return tuple(
        window if "sliding" in kind else None
        for kind in kinds
        if not any(word in kind for word in _STATELESS)
    )
