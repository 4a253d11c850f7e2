"""The EAGLE-3 head: one decoder layer that drafts from the target's low, middle and high features.

Li, Wei, Zhang, Zhang: "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test", arXiv 2503.01840. The layer, its names and its order of operations are those of
vLLM's ``Eagle3LlamaForCausalLM`` (model_executor/models/llama_eagle3.py), so that what is trained
here is what is served: the head at position p reads the target's features at p and the embedding of
the token at p + 1, and predicts the token at p + 2. From then on it reads its own output in the
place of features the target has not computed yet.

`Eagle3.unroll` is the training-time test: it makes those further steps for every position of a text
at once. Step k that began at position i stands at position i + k and attends to the keys that were
made from the target's features up to i, and to the keys of its own steps 1..k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compressor.errors import RunError
from compressor.models.head import Head
from compressor.speculate.eagle3_config import Eagle3Config
from compressor.speculate.medusa import output_weight

_CHUNK = 256  # queries whose scores are in memory at once while training
_INITIAL_STD = 0.02

# (queries [b, heads, n, width], keys and values [b, heads of keys, n, width]) -> as the queries
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Eagle3Attention(nn.Module):
    """The projections of the attention over [norm(embedding); norm(hidden)]."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width = config.head_dim
        wide = 2 * config.hidden_size
        self.width = width
        self.q_proj = nn.Linear(wide, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(wide, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(wide, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """[b, n, 2 * hidden] -> [b, n, hidden]."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        query, key, value = (
            part(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        return self.o_proj(attend(query, key, value).transpose(1, 2).flatten(-2))


class Eagle3Layer(nn.Module):
    """The decoder layer: embedding and hidden state in, the next hidden state out."""

    def __init__(self, config: Eagle3Config, llama: Any) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        super().__init__()
        norm = _norm(config.hidden_size, config)
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = norm()
        self.hidden_norm = norm()
        self.post_attention_layernorm = norm()
        self.self_attn = Eagle3Attention(config)
        self.mlp = LlamaMLP(llama)

    def forward(
        self,
        embedded: torch.Tensor,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """[b, n, hidden] twice -> [b, n, hidden], the residual stream."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        both = torch.cat([self.input_layernorm(embedded), normed], -1)
        residual = residual + self.self_attn(both, rotary, attend)
        return residual + self.mlp(self.post_attention_layernorm(residual))


class RMSNorm(nn.RMSNorm):
    """In the dtype of its input, also where its weight is of a wider one (autocast)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _norm(size: int, config: Eagle3Config) -> Callable[[], nn.Module]:
    return lambda: RMSNorm(size, eps=config.rms_norm_eps)


class Eagle3(nn.Module):
    """An EAGLE-3 head. Its state has the names and shapes that engines load.

    Args:
        config: sizes.
        token_map: int64 [draft vocabulary], the target's token that each draft token stands for,
            ascending; None where the draft vocabulary is the target's.

    Raises:
        RunError: the map does not fit the sizes.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: Eagle3Config, token_map: torch.Tensor | None = None) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        super().__init__()
        if token_map is None:
            token_map = torch.arange(config.draft_vocab_size)
        distinct = len(set(token_map.tolist())) == len(token_map) == config.draft_vocab_size
        if not distinct or not 0 <= int(token_map.min()) <= int(token_map.max()) < (
            config.vocab_size
        ):
            raise RunError(
                f"the draft vocabulary's map must hold {config.draft_vocab_size} different tokens "
                f"below {config.vocab_size}",
                where="token_map",
                fix="make it anew from the corpus",
            )
        self.config = config
        llama = LlamaConfig(**config.layer_config())
        hidden, count = config.hidden_size, len(config.aux_layers)
        norm = _norm(hidden, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.embed_tokens.weight.requires_grad_(False)
        self.fc_norm = nn.ModuleList(norm() for _ in range(count)) if config.fc_norm else None
        self.fc = nn.Linear(count * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config, llama)])
        self.norm = norm()
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", token_map - torch.arange(len(token_map)))
        known = torch.zeros(config.vocab_size, dtype=torch.bool)
        known[token_map] = True
        self.register_buffer("t2d", known)
        self.rotary = LlamaRotaryEmbedding(llama)  # its buffers are not part of the state

    @property
    def token_map(self) -> torch.Tensor:
        """int64 [draft vocabulary]: the target's token of each draft token."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: everything but the target's embeddings."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def fuse(self, aux: torch.Tensor) -> torch.Tensor:
        """Features [..., layers * hidden] of the target -> [..., hidden]."""
        if self.fc_norm is not None:
            parts = aux.chunk(len(self.fc_norm), -1)
            aux = torch.cat(
                [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1
            )
        return self.fc(aux)

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """One pass of the layer.

        Args:
            tokens: int64 [b, n], each the one after the position.
            hidden: [b, n, hidden], fused features or outputs of the step before.
            positions: int64 [b, n].
            attend: mixes the values.

        Returns:
            [b, n, hidden], what the next step reads, and `logits`.
        """
        rotary = self.rotary(hidden, positions)
        embedded = self.embed_tokens(tokens).to(hidden.dtype)
        return self.layers[0](embedded, hidden, rotary, attend)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """[..., hidden] of `step` -> [..., draft vocabulary]."""
        return self.lm_head(self.norm(state))

    def unroll(
        self, tokens: torch.Tensor, aux: torch.Tensor, steps: int, first: int = 0
    ) -> Iterator[torch.Tensor]:
        """The training-time test.

        Args:
            tokens: int64 [b, length], padded on the right if need be.
            aux: [b, length, layers * hidden].
            steps: how many.
            first: begins before this position are of no interest after the first step.

        Yields:
            of step k = 0, 1, ...: [b, length - 1 - k - begin, hidden], the states of the steps that
            began at positions begin, begin + 1, ... (begin is 0 for k = 0, else ``first``). The one
            that began at i predicts the token at i + k + 2.
        """
        memory = _Unrolled()
        length = tokens.shape[1]
        hidden = self.fuse(aux[:, :-1])
        begin = 0
        for k in range(steps):
            if k == 1:
                begin = memory.begin = min(first, length - 1)
                hidden = hidden[:, begin:]
            count = length - 1 - k - begin
            if count <= 0:
                return
            places = torch.arange(begin + k, begin + k + count, device=tokens.device)
            hidden = self.step(
                tokens[:, begin + k + 1 :],
                hidden[:, :count],
                places.expand(len(tokens), -1),
                memory.attend,
            )
            yield hidden


class _Unrolled:
    """Keys and values of all steps of the training-time test so far.

    Attributes:
        begin: position that the first query of the next steps began at.
    """

    def __init__(self) -> None:
        self.begin = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Step 0 is plain causal attention; a later step sees step 0 up to where it began, and its
        own steps since."""
        self.keys.append(key)
        self.values.append(value)
        if len(self.keys) == 1:
            return functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
        count = query.shape[2]
        chunks = []
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            seen = self.begin + stop
            parts = (
                query[:, :, start:stop],
                self.keys[0][:, :, :seen],
                self.values[0][:, :, :seen],
                torch.stack([k[:, :, start:stop] for k in self.keys[1:]], 3),
                torch.stack([v[:, :, start:stop] for v in self.values[1:]], 3),
            )
            if count > _CHUNK and torch.is_grad_enabled():
                chunks.append(checkpoint(_attend_steps, *parts, use_reentrant=False))
            else:
                chunks.append(_attend_steps(*parts))
        return torch.cat(chunks, 2)


def _attend_steps(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
) -> torch.Tensor:
    """Attention of queries to earlier positions and to their own steps.

    Args:
        query: [b, heads, n, width]; the last began where ``keys`` end.
        keys, values: [b, heads of keys, seen, width], of step 0.
        own_keys, own_values: [b, heads of keys, n, steps, width].

    Returns:
        [b, heads, n, width].
    """
    _, heads, count, width = query.shape
    shared, seen = keys.shape[1], keys.shape[2]
    query = query.unflatten(1, (shared, heads // shared)) / math.sqrt(width)
    scores = (query.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (-1, count))
    ahead = torch.ones(count, seen, dtype=torch.bool, device=query.device)
    scores = scores.masked_fill(ahead.triu_(seen - count + 1), float("-inf"))
    own = torch.einsum("bsgnd,bsnkd->bsgnk", query, own_keys)
    weights = torch.softmax(torch.cat([scores, own], -1), -1, dtype=torch.float32)
    weights = weights.to(values.dtype)
    past, recent = weights.split([seen, own.shape[-1]], -1)
    mixed = (past.flatten(2, 3) @ values).unflatten(2, (-1, count))
    mixed = mixed + torch.einsum("bsgnk,bsnkd->bsgnd", recent, own_values)
    return mixed.flatten(1, 2)


def start_from_target(head: Eagle3, embeddings: torch.Tensor, output: Head, seed: int) -> None:
    """First weights: embeddings and output layer are the target's, the rest is drawn.

    The fused features begin as the highest layer's, so that the first gradients have something to
    hold on to; what attention and MLP add begins small.

    Args:
        head: is filled in place.
        embeddings: [vocabulary, hidden], the target's.
        output: the target's (its linear may be quantized); a scale of its logits goes into the
            weight.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = head.config.hidden_size
    weight = output_weight(output.lm_head, hidden)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim == 2 and name.startswith(("layers.", "fc.")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _INITIAL_STD)
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
        head.fc.weight[:, -hidden:] += torch.eye(hidden, device=head.fc.weight.device)
        head.embed_tokens.weight.copy_(embeddings)
        head.lm_head.weight.copy_(weight[head.token_map.to(weight.device)] * output.scale)
