"""The block walk: statistics, transforms, resuming, coverage, fallbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.folding import find_producers
from compressor.quantize import driver, registry
from tests import tiny

TOKENS = np.random.default_rng(0).integers(4, 300, (6, 32)).astype(np.int32)


def algorithm(name: str = "gptq", **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**{"scheme": "W4A16", "group_size": 16, **options}), torch.float32)


def smooth(**options: Any) -> Any:
    cls = registry.get("smoothquant")
    return cls(cls.Options(**options))


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_is_quantized(tmp_path: Path, arch: str) -> None:
    tiny.build(arch, tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    facts = driver.quantize_model(model, algorithm(), tmp_path / "out", tokens=TOKENS, batch_size=4)
    layers = driver.read_layers(tmp_path / "out")
    names = {ref.name for i in range(len(model.blocks)) for ref in model.linears(i)}
    assert {layer["name"] for layer in layers} == names
    assert all(layer["error"] <= layer["rtn_error"] * (1 + 1e-6) for layer in layers)
    found = dict(driver.iterate_quantized(tmp_path / "out", algorithm().scheme))
    assert set(found) == names
    for tensor in found.values():
        tensor.validate()
    assert 0 < facts["coverage"]["share"] < 1
    if arch in ("mixtral", "qwen3_moe"):
        reasons = {entry["reason"] for entry in facts["coverage"]["skipped"]}
        assert "router" in reasons


def test_the_hessian_is_that_of_the_quantized_stream(tmp_path: Path) -> None:
    """Statistics of block 1 come from activations that went through the quantized block 0."""
    tiny.build("llama", tmp_path / "model")
    quantizer = algorithm(scheme="W2A16")
    seen: list[torch.Tensor] = []
    original = quantizer.quantize
    quantizer.quantize = lambda w, h: (seen.append(h), original(w, h))[1]
    model = CausalLM.open(tmp_path / "model")
    driver.quantize_model(model, quantizer, tmp_path / "out", tokens=TOKENS, batch_size=4)
    first = [ref.path for ref in model.linears(0)]
    reference = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    tensors = dict(driver.iterate_quantized(tmp_path / "out", quantizer.scheme))
    with torch.no_grad():
        for path in first:
            reference.get_submodule(path).weight.copy_(tensors[path].dequantize())
    inputs: list[torch.Tensor] = []
    target = reference.get_submodule(model.linears(1)[0].path)
    target.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        reference(torch.from_numpy(TOKENS.astype(np.int64)))
    x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
    torch.testing.assert_close(
        seen[len(first)].double(), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt_neox", "opt", "phi3"])
def test_folding_changes_nothing_but_where_the_scale_is(tmp_path: Path, arch: str) -> None:
    tiny.build(arch, tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    inputs = model.embed(torch.from_numpy(TOKENS[:2].astype(np.int64)))
    model.load_block(0, "cpu", torch.float32)
    producers, before = find_producers(model, 0, inputs.hidden, inputs, model.linears(0))
    assert producers
    for producer in producers:
        width = producer.consumers[0].module.in_features
        scale = torch.linspace(0.5, 3, width)
        weights = [ref.module.weight.clone() for ref in producer.consumers]
        applied = producer.apply(scale)
        torch.testing.assert_close(applied, scale, rtol=2e-2, atol=0)
        with torch.no_grad():
            after = model.run_block(0, inputs.hidden, inputs)
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        producer.undo()
        for ref, weight in zip(producer.consumers, weights, strict=True):
            assert torch.equal(ref.module.weight, weight)


def test_smoothing_lowers_the_error_of_outlier_channels(tmp_path: Path) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    rows[:, 3] *= 60
    scheme = algorithm("rtn", scheme="W8A8", group_size=None).scheme
    from compressor.quantize.smoothquant import _rounding_error

    scale = smooth().scales([weight], rows.abs().amax(0), rows, scheme)
    ones = torch.ones(64)
    assert scale[3] > 4 * scale.median()
    assert _rounding_error([weight], rows, scale, scheme) < 0.5 * _rounding_error(
        [weight], rows, ones, scheme
    )
    sixteen = algorithm("rtn").scheme
    assert torch.equal(smooth().scales([weight], rows.abs().amax(0), rows, sixteen), ones)


def test_transform_writes_the_norms_it_changed(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    quantizer = algorithm(scheme="W8A8", group_size=None)
    driver.quantize_model(
        model, quantizer, tmp_path / "out", transforms=[smooth(strength=0.5)], tokens=TOKENS
    )
    replaced = driver.replaced_tensors(tmp_path / "out")
    assert any(name.endswith("input_layernorm.weight") for name in replaced)
    for name, value in replaced.items():
        assert value.dtype == model.checkpoint.dtype(name)
        assert value.shape == model.checkpoint.shape(name)


def test_a_walk_cut_short_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("llama", tmp_path / "model", layers=4)
    monkeypatch.setattr(driver, "CHECKPOINT_SECONDS", 0.0)

    def run(out: str, advance: Any = lambda note: None) -> dict[str, Any]:
        model = CausalLM.open(tmp_path / "model")
        return driver.quantize_model(
            model, algorithm(), tmp_path / out, tokens=TOKENS, batch_size=4, advance=advance
        )

    class Cut(Exception):
        pass

    def cut(note: str) -> None:
        if note.startswith("block 1"):
            raise Cut

    run("whole")
    with pytest.raises(Cut):
        run("parts", cut)
    with open(tmp_path / "parts" / "layers.jsonl", "a") as file:
        file.write('{"block": 2, "na')  # as a kill in the middle of a write leaves it
    assert run("parts")["resumed_at_block"] == 2
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }


def test_ignored_linears_are_left_and_named(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    facts = driver.quantize_model(
        CausalLM.open(tmp_path / "model"), algorithm("rtn"), tmp_path / "out",
        ignore=[r".*\.down_proj", "model.layers.0.self_attn.q_proj"],
    )  # fmt: skip
    skipped = {e["name"]: e["reason"] for e in facts["coverage"]["skipped"]}
    assert skipped["model.layers.1.mlp.down_proj"] == "ignored by the recipe"
    assert "model.layers.0.self_attn.q_proj" in skipped
    assert "model.layers.1.self_attn.q_proj" not in skipped


def test_nothing_left_to_quantize_is_an_error(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    with pytest.raises(RunError, match="no linear was quantized"):
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm("rtn"), tmp_path / "out", ignore=[".*"]
        )
