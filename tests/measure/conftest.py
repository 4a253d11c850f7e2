"""A tiny random Llama and a word tokenizer, both real, for the measurement's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wise owls watch"


def llama(layers: int) -> Callable[[torch.dtype], nn.Module]:
    """A loader of the same random weights at every call."""

    def load(dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        return LlamaForCausalLM(config).eval().to(dtype)

    return load


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0} | {word: index + 1 for index, word in enumerate(SENTENCE.split())}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.fixture(scope="session")
def loaders() -> dict[str, Callable[[torch.dtype], nn.Module]]:
    return {"baseline": llama(4), "small": llama(1)}


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return ["the quick brown fox", "seven wise owls watch a lazy dog", "dog jumps over the fox"]
