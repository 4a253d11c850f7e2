"""Checkpoints in the Llama layout with random bfloat16 weights, for benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig

from compressor.models.checkpoint import TensorWriter

_SHARD_BYTES = 1_000_000_000


def write(
    directory: Path, config: LlamaConfig, device: str = "cpu", tokens: int | None = None
) -> int:
    """Write a checkpoint, shard by shard; returns its bytes.

    Args:
        directory: made here.
        config: says the shapes, and whether the output layer is the embeddings.
        device: draws the numbers; every device has a sequence of its own.
        tokens: of a tokenizer that may be laid beside. Rows of an untied output layer beyond them
            are zero, so that no other token ever wins.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    random = torch.Generator(device).manual_seed(0)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    attended = config.num_attention_heads * config.head_dim
    cached = config.num_key_value_heads * config.head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        value = torch.randn(rows, columns, generator=random, device=device) / columns**0.5
        return value.to(torch.bfloat16).cpu()

    writer = TensorWriter(directory, _SHARD_BYTES)
    writer.add("model.embed_tokens.weight", matrix(config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", attended), ("k", cached), ("v", cached)):
            writer.add(f"{prefix}.self_attn.{name}_proj.weight", matrix(rows, hidden))
        writer.add(f"{prefix}.self_attn.o_proj.weight", matrix(hidden, attended))
        for name in ("gate", "up"):
            writer.add(f"{prefix}.mlp.{name}_proj.weight", matrix(intermediate, hidden))
        writer.add(f"{prefix}.mlp.down_proj.weight", matrix(hidden, intermediate))
        for name in ("input", "post_attention"):
            ones = torch.ones(hidden, dtype=torch.bfloat16)
            writer.add(f"{prefix}.{name}_layernorm.weight", ones)
    writer.add("model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16))
    if not config.tie_word_embeddings:
        head = matrix(config.vocab_size, hidden)
        if tokens is not None:
            head[tokens:] = 0
        writer.add("lm_head.weight", head)
    writer.close()
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
