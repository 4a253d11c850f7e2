"""Tiny random models of each architecture, saved as transformers saves them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other of "
    "their daughters. My dear Mr. Bennet, said his lady to him one day, have you heard that "
    "Netherfield Park is let at last? Mr. Bennet replied that he had not. But it is, returned she; "
    "for Mrs. Long has just been here, and she told me all about it."
)
VOCABULARY = 384
HIDDEN = 64
INTERMEDIATE = 128
EXPERTS = 4

_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
# model_type and the settings that differ from the common ones below.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": (
        "opt",
        {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 512},
    ),
    "mixtral": ("mixtral", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 16,
        },
    ),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2, "hidden_size": HIDDEN}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def build(arch: str, directory: Path, *, layers: int = 2, seed: int = 0, **changes: Any) -> Path:
    """Save a random model with its tokenizer.

    Args:
        arch: one of `ARCHITECTURES`.
        directory: made if need be.
        layers: number of decoder blocks.
        seed: of the weights.
        changes: further settings of the config.

    Returns:
        The directory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = _ARCHITECTURES[arch]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(model_type, **{**settings, **own, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # Larger than the initial 0.02, so that every part of a block shows in the output.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                torch.nn.init.normal_(
                    parameter, mean=1.0 if parameter.mean() > 0.5 else 0.0, std=0.1
                )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, trained on `TEXT`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    return made
