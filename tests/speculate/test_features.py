"""Features: the states that the model's own code computes, whatever they were batched with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.head import split
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.scheme import Scheme
from compressor.quantize import registry
from compressor.speculate import features as features_module
from compressor.speculate.corpus import Corpus
from compressor.speculate.features import (
    Features,
    block_outputs,
    feature_batches,
    feature_bytes,
    write_features,
)
from tests import tiny

SAMPLES = [
    ([int(t) for t in np.random.default_rng(i).integers(3, 300, length)], [5, 6, 7])
    for i, length in enumerate((9, 30, 2, 17, 5))
]
CORPUS = Corpus.from_samples(SAMPLES, 1)


def model_of(arch: str, directory: Path, **changes: Any) -> Any:
    return CausalLM.open(tiny.build(arch, directory, **changes)).load_full(torch.float32)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox", "opt", "qwen3_moe", "bloom"])
def test_states_are_those_of_the_models_own_code(tmp_path: Path, arch: str) -> None:
    model = model_of(arch, tmp_path / "model", layers=3)
    layers = (0, 1, 2)
    features = write_features(model, CORPUS, tmp_path / "out", layers=layers, batch_size=2)
    head = split(model)
    assert features.layers == layers
    for row in range(len(SAMPLES)):
        ids = torch.from_numpy(CORPUS.row(row)).long().unsqueeze(0)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, use_cache=False)
        hidden, aux = features.hidden(row), features.aux(row)
        assert hidden.dtype == aux.dtype == torch.bfloat16
        assert hidden.shape == (len(CORPUS.row(row)), tiny.HIDDEN)
        # Of bfloat16: 8 bits.
        assert_near(head(hidden), out.logits[0], 2e-2)
        assert_near(aux, torch.cat([out.hidden_states[i][0] for i in layers], -1), 5e-3)


def assert_near(got: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Within a share of the largest value."""
    assert float((got.float() - expected).abs().max()) < share * float(expected.abs().max())


def test_the_last_blocks_output_comes_before_the_norm(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    features = write_features(model, CORPUS, tmp_path / "out", layers=(2,))
    normed = model.model.norm(features.aux(1).float())
    assert_near(normed, features.hidden(1).float(), 2e-2)


def test_a_quantized_targets_states_are_its_own(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    opened = CausalLM.open(tmp_path / "model")
    rtn = registry.get("rtn")
    quantizer = rtn(rtn.Options(scheme="W4A8", group_size=16), torch.float32)
    for block in range(2):
        opened.load_block(block, "cpu", torch.float32)
        for ref in opened.linears(block):
            made = quantizer.quantize_all([ref.module.weight.data], None)[0].tensor
            scheme = Scheme.parse("W4A8", 16)
            opened.replace_linear(ref, QuantizedLinear.from_tensor(made, scheme, None))
    model = opened.load_full(torch.float32)
    plain = model_of("llama", tmp_path / "plain")
    features = write_features(model, CORPUS, tmp_path / "out")
    ids = torch.from_numpy(CORPUS.row(1)).long().unsqueeze(0)
    with torch.no_grad():
        assert_near(split(model)(features.hidden(1)), model(ids).logits[0], 2e-2)
        assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=0.1)


@pytest.mark.parametrize("layers", [(), (1, 2)])
def test_what_a_kill_left_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...]
) -> None:
    monkeypatch.setattr(features_module, "_CHECKPOINT_SECONDS", 0.0)
    model = model_of("llama", tmp_path / "model")
    write_features(model, CORPUS, tmp_path / "whole", layers=layers, batch_size=2)
    seen: list[str] = []

    def cut(note: str) -> None:
        seen.append(note)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(model, CORPUS, tmp_path / "cut", layers=layers, batch_size=2, advance=cut)
    with pytest.raises(RunError, match="not all of them"):
        Features.open(tmp_path / "cut")
    again: list[str] = []
    write_features(
        model, CORPUS, tmp_path / "cut", layers=layers, batch_size=2, advance=again.append
    )
    assert again == ["already done"] * 2 + ["33 tokens"]
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "cut")) == names
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    size = sum(p.stat().st_size for p in (tmp_path / "whole").glob("*.bf16"))
    assert size == feature_bytes(int(CORPUS.lengths.sum()), tiny.HIDDEN, len(layers))


def test_features_of_another_corpus_are_made_anew(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    write_features(model, CORPUS, tmp_path / "out")
    other = Corpus.from_samples(SAMPLES[:2], 0)
    features = write_features(model, other, tmp_path / "out")
    fresh = write_features(model, other, tmp_path / "fresh")
    assert torch.equal(features.hidden(1), fresh.hidden(1))
    assert (tmp_path / "out" / "hidden.bf16").stat().st_size == feature_bytes(45, tiny.HIDDEN)


def test_every_sample_is_in_one_batch() -> None:
    batches = feature_batches(CORPUS, 2)
    assert sorted(row for batch in batches for row in batch) == list(range(len(SAMPLES)))


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    with pytest.raises(RunError, match="no output of block 3: the model has 2"):
        write_features(model, CORPUS, tmp_path / "out", layers=(3,))
    features = write_features(model, CORPUS, tmp_path / "plain")
    with pytest.raises(ValueError, match="without layers"):
        features.aux(0)


def test_hooks_are_gone_afterwards(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    with block_outputs(model, (0, 1)) as seen, torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert {layer: tuple(value.shape) for layer, value in seen.items()} == {
        0: (1, 2, tiny.HIDDEN),
        1: (1, 2, tiny.HIDDEN),
    }
    seen.clear()
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert not seen


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = model_of("llama", tmp_path / "model")
    with pytest.raises(RunError, match="no room for"):
        write_features(model, CORPUS, tmp_path / "out")
