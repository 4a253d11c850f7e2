"""Distillation of scales: what is trained, what is stored, and going on after an interruption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from compressor.errors import RunError
from compressor.export import compressed_tensors
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import UNFINISHED
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.quantize import driver, registry, whole
from compressor.quantize.codes import REFINED, iterate_quantized, replaced_tensors
from compressor.quantize.distillation import DistillationOptions, ScaledLinear, ScaledNorm
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests import tiny

TOKENS = np.random.default_rng(0).integers(4, 300, (33, 32)).astype(np.int32)
HELD_OUT = slice(31, 33)


def quantize(
    model_dir: Path, out: Path, scheme: str = "W2A16", *, advance: Any = None, **options: Any
) -> dict[str, Any]:
    group_size = 16 if scheme[1] in "234" else None
    rtn = registry.get("rtn")
    distillation = registry.get("distillation")
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 5e-3, **options}
    return driver.quantize_model(
        CausalLM.open(model_dir),
        rtn(rtn.Options(scheme=scheme, group_size=group_size), torch.bfloat16),
        out,
        refinements=[distillation(DistillationOptions(**settings), torch.bfloat16)],
        tokens=TOKENS,
        **({"advance": advance} if advance else {}),
    )


def divergence(model_dir: Path, out: Path) -> float:
    """Mean KL of the model that stands in ``out``, put together as evaluation does it."""
    ids = torch.from_numpy(TOKENS[HELD_OUT].astype(np.int64))
    original = CausalLM.open(model_dir).load_full(torch.float32)
    model = CausalLM.open(model_dir)
    refs = {ref.name: ref for i in range(len(model.blocks)) for ref in model.linears(i)}
    for name, tensor, scheme in iterate_quantized(out):
        tensor.validate()
        bias = (
            model.checkpoint.tensor(f"{name}.bias") if refs[name].module.bias is not None else None
        )
        model.replace_linear(refs[name], QuantizedLinear.from_tensor(tensor, scheme, bias))
    quantized = model.load_full(torch.float32, replaced=replaced_tensors(out))
    with torch.no_grad():
        p, q = (functional.log_softmax(m(ids).logits, -1) for m in (original, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [
        ("llama", "W2A16"),
        ("qwen2", "W4A8"),
        ("gemma2", "W3A16"),
        ("opt", "W2A16"),
        ("mixtral", "W2A16"),
        ("llama", "FP8"),
    ],
)
def test_the_stored_model_has_the_divergence_that_is_reported(
    tmp_path: Path, arch: str, scheme: str
) -> None:
    tiny.build(arch, tmp_path / "model")
    facts = quantize(tmp_path / "model", tmp_path / "out", scheme)["refined"]
    assert facts["kept"]
    assert facts["kl_after"] < facts["kl_before"]
    assert facts["held_out_samples"] == 2
    assert divergence(tmp_path / "model", tmp_path / "out") == pytest.approx(
        facts["kl_after"], rel=1e-3
    )


def test_codes_stay_and_scales_and_norms_move(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out")
    after = {name: tensor for name, tensor, _ in iterate_quantized(tmp_path / "out")}
    norms = replaced_tensors(tmp_path / "out")
    (tmp_path / "out" / REFINED).unlink()
    for name, tensor, _ in iterate_quantized(tmp_path / "out"):
        assert torch.equal(tensor.codes, after[name].codes)
        assert not torch.equal(tensor.scale, after[name].scale)
        assert torch.equal(after[name].scale.bfloat16().float(), after[name].scale)
    stored = CausalLM.open(tmp_path / "model").checkpoint
    assert set(norms) == {name for name in stored.names if "norm" in name}
    assert all(value.dtype == stored.dtype(name) for name, value in norms.items())


def test_without_norms_they_stay(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", norms=False)
    assert not replaced_tensors(tmp_path / "out")


def test_steps_that_lead_away_are_taken_back(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    facts = quantize(tmp_path / "model", tmp_path / "out", "W8A16", learning_rate=1.0)["refined"]
    assert not facts["kept"]
    assert facts["kl_after"] == facts["kl_before"]
    assert divergence(tmp_path / "model", tmp_path / "out") == pytest.approx(
        facts["kl_before"], rel=1e-3
    )


def test_training_cut_short_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "CHECKPOINT_SECONDS", 0.0)
    tiny.build("llama", tmp_path / "model")
    undisturbed = quantize(tmp_path / "model", tmp_path / "undisturbed")["refined"]
    seen: list[str] = []

    def cut(note: str) -> None:
        seen.append(note)
        if len(seen) == 9:  # blocks count too
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "model", tmp_path / "cut", advance=cut)
    assert (tmp_path / "cut" / whole.STATE).exists()
    again: list[str] = []
    resumed = quantize(tmp_path / "model", tmp_path / "cut", advance=again.append)["refined"]
    assert again.count("already done") == 9
    assert resumed["losses"] == undisturbed["losses"]
    assert sorted(os.listdir(tmp_path / "cut")) == sorted(os.listdir(tmp_path / "undisturbed"))
    for path in (tmp_path / "cut").glob("*.safetensors"):
        other = tmp_path / "undisturbed" / path.name
        if path.name == REFINED:  # its facts hold seconds
            a, b = (whole.load_file(p) for p in (path, other))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
        else:
            assert path.read_bytes() == other.read_bytes()
    finished = quantize(tmp_path / "model", tmp_path / "cut")["refined"]
    assert finished == resumed


def test_a_model_that_memory_does_not_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "free_bytes", lambda device: 500_000_000)
    tiny.build("llama", tmp_path / "model")
    with pytest.raises(
        RunError, match=r"the whole model in memory, about 0\.7 GB; 0\.5 GB are free"
    ):
        quantize(tmp_path / "model", tmp_path / "out")


def evaluated(model_dir: Path, out: Path, facts: dict[str, Any]) -> torch.Tensor:
    """Logits of the samples held out, by the model that evaluation makes of ``out``."""
    manifest = {"name": "quantize:v", "kind": "quantize", "variant": "v", "result": facts}
    model = quantized_model(model_dir, StoredStage("key", out, manifest), "cpu")
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS[HELD_OUT].astype(np.int64))).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head_in_bfloat16_is_trained_and_exported(tmp_path: Path, tied: bool) -> None:
    tiny.build("llama", tmp_path / "model", tie_word_embeddings=tied)
    rtn, distillation = registry.get("rtn"), registry.get("distillation")
    quantizer = rtn(rtn.Options(scheme="W4A16", group_size=64), torch.bfloat16)
    facts = driver.quantize_model(
        CausalLM.open(tmp_path / "model"),
        quantizer,
        tmp_path / "out",
        refinements=[
            distillation(
                DistillationOptions(steps=16, batch_size=8, learning_rate=2e-3), torch.bfloat16
            )
        ],
        head=quantizer,
        tokens=TOKENS,
        dtype=torch.bfloat16,
    )
    assert facts["refined"]["kept"]
    compressed_tensors.export(
        tmp_path / "model",
        iterate_quantized(tmp_path / "out"),
        [],
        {},
        tmp_path / "artifact",
        replaced_tensors(tmp_path / "out"),
        head=facts["head"],
    )
    served = compressed_tensors.load_model(tmp_path / "artifact", dtype=torch.float32)
    with torch.no_grad():
        logits = served(torch.from_numpy(TOKENS[HELD_OUT].astype(np.int64))).logits
    expected = evaluated(tmp_path / "model", tmp_path / "out", facts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_no_token_reached_stay_and_training_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "CHECKPOINT_SECONDS", 0.0)
    tiny.build("qwen3_moe", tmp_path / "model", num_experts=32, num_experts_per_tok=1)
    monkeypatch.setitem(globals(), "TOKENS", TOKENS[:, :8])  # too few for every expert to be chosen
    options = {"steps": 4, "batch_size": 1}
    undisturbed = quantize(tmp_path / "model", tmp_path / "whole", **options)["refined"]

    def cut(note: str) -> None:
        if note.startswith("KL"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "model", tmp_path / "cut", advance=cut, **options)
    resumed = quantize(tmp_path / "model", tmp_path / "cut", **options)["refined"]
    assert resumed["losses"] == undisturbed["losses"]
    a, b = (whole.load_file(tmp_path / name / REFINED) for name in ("cut", "whole"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_biases_that_a_transform_changed_are_those_that_are_trained_with(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model", mlp_bias=True)
    file = tmp_path / "model" / "model.safetensors"
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(value.shape, generator=random).to(value.dtype)
        if name.endswith("proj.bias")
        else value.clone()
        for name, value in whole.load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    awq, rtn, distillation = (registry.get(n) for n in ("awq", "rtn", "distillation"))
    facts = driver.quantize_model(
        CausalLM.open(tmp_path / "model"),
        rtn(rtn.Options(scheme="W3A16", group_size=16), torch.bfloat16),
        tmp_path / "out",
        transforms=[awq(awq.Options())],
        refinements=[distillation(DistillationOptions(steps=8), torch.bfloat16)],
        tokens=TOKENS,
    )
    assert any(name.endswith(".bias") for name in replaced_tensors(tmp_path / "out"))
    ids = torch.from_numpy(TOKENS[HELD_OUT].astype(np.int64))
    original = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    with torch.no_grad():
        p = functional.log_softmax(original(ids).logits, -1)
    q = functional.log_softmax(evaluated(tmp_path / "model", tmp_path / "out", facts), -1)
    found = float((p.exp() * (p - q)).sum(-1).mean())
    assert found == pytest.approx(facts["refined"]["kl_after"], rel=1e-3)


def test_gemma_norms_move_from_a_weight_of_zero() -> None:
    norm = GemmaRMSNorm(8)
    assert bool((norm.weight == 0).all())
    scaled = ScaledNorm(norm, torch.float32)
    with torch.no_grad():
        scaled.factor.fill_(1.5)
    x = torch.randn(3, 8)
    torch.testing.assert_close(scaled(x), 1.5 * norm(x))
    torch.testing.assert_close(scaled.stored_weight(), torch.full((8,), 0.5))


def test_what_a_kill_left_beside_the_finished_file_goes(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", steps=2)
    names = sorted(os.listdir(tmp_path / "out"))
    (tmp_path / "out" / UNFINISHED).mkdir()
    for name in (whole.STATE, f"{UNFINISHED}/.tmpAbCdEf"):
        (tmp_path / "out" / name).write_bytes(b"half")
    quantize(tmp_path / "model", tmp_path / "out", steps=2)
    assert sorted(os.listdir(tmp_path / "out")) == names


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_scaled_linear_is_the_dequantized_one(symmetric: bool, ordered: bool) -> None:
    random = torch.Generator().manual_seed(0)
    scheme = Scheme.parse("W4A16", 16, symmetric)
    index = torch.randperm(64, generator=random) // 16
    tensor = QuantizedTensor(
        codes=torch.randint(-8, 8, (24, 64), generator=random, dtype=torch.int8),
        scale=torch.rand(24, 4, generator=random) + 0.5,
        zero_point=None
        if symmetric
        else torch.randint(-8, 8, (24, 4), generator=random, dtype=torch.int8),
        g_idx=index.int() if ordered else None,
        scheme=scheme.weights,
    )
    x, bias = torch.randn(5, 64, generator=random), torch.randn(24, generator=random)
    linear = ScaledLinear(tensor, None, bias, torch.float32, torch.float32)
    torch.testing.assert_close(linear(x), x @ tensor.dequantize().T + bias)
    linear(x).square().sum().backward()
    factor = linear.factor.grad
    assert factor is not None
    assert bool((factor != 0).all())
    with torch.no_grad():
        linear.factor.mul_(1.5)
    tensor.scale = linear.stored_scale().detach()
    torch.testing.assert_close(linear(x), x @ tensor.dequantize().T + bias)
