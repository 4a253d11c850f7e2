"""A tiny target, what it says, and what it makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compressor.models.architecture import CausalLM
from compressor.models.head import Head, split
from compressor.speculate.corpus import Corpus, generate_corpus
from compressor.speculate.eagle3_config import Eagle3Config
from compressor.speculate.features import Features, write_features
from tests import tiny

CONFIG = Eagle3Config(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=50,
    draft_vocab_size=20,
    aux_layers=(1, 2, 4),
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    norm_before_residual=True,
    fc_norm=True,
)


class Sample(NamedTuple):
    """All of it, in float32."""

    directory: Path
    target: Any
    output: Head
    corpus: Corpus
    features: Features


@cache
def load(directory: Path) -> Any:
    return CausalLM.open(directory).load_full(torch.float32)


def make(
    root: Path,
    arch: str = "llama",
    *,
    layers: int = 4,
    aux_layers: Sequence[int] = (1, 2, 3),
    prompts: int = 24,
    held_out: int = 6,
    output_length: int = 20,
    **changes: Any,
) -> Sample:
    """Prompts of different lengths, answered greedily."""
    directory = tiny.build(arch, root / "target", layers=layers, **changes)
    target = load(directory)
    generator = torch.Generator().manual_seed(1)
    texts = [
        torch.randint(3, tiny.VOCABULARY, (2 + i % 5,), generator=generator).tolist()
        for i in range(prompts)
    ]
    corpus = generate_corpus(
        target,
        texts,
        output_length=output_length,
        batch_size=8,
        temperature=0.0,
        seed=0,
        end_tokens=(),
        held_out=held_out,
        directory=root / "corpus",
    )
    features = write_features(target, corpus, root / "features", layers=tuple(aux_layers))
    return Sample(directory, target, split(target), corpus, features)
