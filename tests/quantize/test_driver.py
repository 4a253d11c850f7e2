"""The block walk: statistics, resuming, caches, refinements, fallbacks."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.folding import find_producers
from compressor.numerics.scheme import KV_CACHE
from compressor.quantize import codes as codes_of_blocks
from compressor.quantize import driver, registry, stream
from compressor.quantize.codes import (
    iterate_quantized,
    kv_scales,
    read_layers,
    replaced_tensors,
)
from compressor.quantize.statistics import InputStatistics
from tests import tiny
from tests.quantize.cuts import Cut, cut_after

TOKENS = np.random.default_rng(0).integers(4, 300, (6, 32)).astype(np.int32)


def algorithm(name: str = "gptq", **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**{"scheme": "W4A16", "group_size": 16, **options}), torch.float32)


def codes(directory: Path) -> dict[str, Any]:
    return {name: tensor for name, tensor, _ in iterate_quantized(directory)}


def smooth(**options: Any) -> Any:
    cls = registry.get("smoothquant")
    return cls(cls.Options(**options))


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_is_quantized(tmp_path: Path, arch: str) -> None:
    tiny.build(arch, tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    facts = driver.quantize_model(model, algorithm(), tmp_path / "out", tokens=TOKENS, batch_size=4)
    layers = read_layers(tmp_path / "out")
    names = {ref.name for i in range(len(model.blocks)) for ref in model.linears(i)}
    assert {layer["name"] for layer in layers} == names
    assert all(layer["error"] <= layer["rtn_error"] * (1 + 1e-6) for layer in layers)
    found = codes(tmp_path / "out")
    assert set(found) == names
    for tensor in found.values():
        tensor.validate()
    assert 0 < facts["coverage"]["share"] < 1
    if arch in ("mixtral", "qwen3_moe"):
        reasons = {entry["reason"] for entry in facts["coverage"]["skipped"]}
        assert "router" in reasons


def inputs_of(model: Any, path: str) -> torch.Tensor:
    """What a linear of a whole model reads on the calibration tokens, float64 [tokens, in]."""
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with torch.no_grad():
        model(torch.from_numpy(TOKENS.astype(np.int64)))
    handle.remove()
    return inputs[0].reshape(-1, inputs[0].shape[-1]).double()


def test_statistics_are_those_of_the_quantized_stream(tmp_path: Path) -> None:
    """In block 1 they come from activations that went through the quantized block 0."""
    tiny.build("llama", tmp_path / "model")
    quantizer = algorithm(scheme="W2A16")
    seen: list[torch.Tensor] = []
    original = quantizer.quantize_all
    quantizer.quantize_all = lambda w, h: (seen.extend([h] * len(w)), original(w, h))[1]
    model = CausalLM.open(tmp_path / "model")
    driver.quantize_model(model, quantizer, tmp_path / "out", tokens=TOKENS, batch_size=4)
    first = [ref.path for ref in model.linears(0)]
    reference = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    tensors = codes(tmp_path / "out")
    with torch.no_grad():
        for path in first:
            reference.get_submodule(path).weight.copy_(tensors[path].dequantize())
    x = inputs_of(reference, model.linears(1)[0].path)
    torch.testing.assert_close(
        seen[len(first)].double(), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4
    )


def test_true_sequential_takes_statistics_behind_quantized_linears(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    quantizer = algorithm(scheme="W2A16", true_sequential=True)
    seen: dict[int, torch.Tensor] = {}
    original = quantizer.quantize_all
    quantizer.quantize_all = lambda w, h: (
        [seen.setdefault(len(seen), h) for _ in w],
        original(w, h),
    )[1]
    model = CausalLM.open(tmp_path / "model")
    driver.quantize_model(model, quantizer, tmp_path / "out", tokens=TOKENS, batch_size=4)
    paths = [ref.path for ref in model.linears(0)]
    position = next(i for i, path in enumerate(paths) if path.endswith("down_proj"))
    reference = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    tensors = codes(tmp_path / "out")
    with torch.no_grad():
        for path in paths:
            reference.get_submodule(path).weight.copy_(tensors[path].dequantize())
    x = inputs_of(reference, paths[position])
    torch.testing.assert_close(seen[position].double(), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)


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

    statistics = InputStatistics(64)
    for part in rows.split(16):
        statistics.update(part)
    scale = smooth().scales([weight], statistics, scheme)
    ones, absmax = torch.ones(64), statistics.absmax
    assert scale[3] > 4 * scale.median()
    assert _rounding_error([weight], rows, absmax, scale, scheme) < 0.5 * _rounding_error(
        [weight], rows, absmax, ones, scheme
    )
    sixteen = algorithm("rtn").scheme
    assert torch.equal(smooth().scales([weight], statistics, sixteen), ones)


def made(name: str, **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**options))


@torch.no_grad()
def output_error(model_dir: Path, out: Path) -> float:
    """Relative error of the final hidden states on the calibration tokens."""
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    plain = CausalLM.open(model_dir).load_full(torch.float32)
    exact = plain.model(ids).last_hidden_state
    changed = CausalLM.open(model_dir).load_full(torch.float32, replaced=replaced_tensors(out))
    for name, tensor, _ in iterate_quantized(out):
        changed.get_submodule(name).weight.copy_(tensor.dequantize())
    return float((changed.model(ids).last_hidden_state - exact).norm() / exact.norm())


def test_static_scales_span_the_calibrated_inputs(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    quantizer = algorithm("rtn", scheme="W8A8", group_size=None, activations="static")
    model = CausalLM.open(tmp_path / "model")
    driver.quantize_model(model, quantizer, tmp_path / "out", tokens=TOKENS, batch_size=3)
    found = codes(tmp_path / "out")
    path = model.linears(0)[0].path
    whole = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    expected = float(inputs_of(whole, path).abs().max()) / 127
    assert float(found[path].input_scale) == pytest.approx(expected, rel=1e-5)
    for tensor in found.values():
        tensor.validate()


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_float8_in_and_out(tmp_path: Path, name: str) -> None:
    tiny.build("llama", tmp_path / "model")
    quantizer = algorithm(name, scheme="FP8", group_size=None, activations="static")
    model = CausalLM.open(tmp_path / "model")
    driver.quantize_model(
        model, quantizer, tmp_path / "out", tokens=TOKENS, transforms=[smooth(), made("awq")]
    )
    found = codes(tmp_path / "out")
    for tensor in found.values():
        tensor.validate()
        assert tensor.codes.dtype == torch.float8_e4m3fn and tensor.input_scale is not None
        assert float(tensor.codes.float().abs().max()) > 400  # the grid's range is used
    assert output_error(tmp_path / "model", tmp_path / "out") < 0.1


def cached(model_dir: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Largest keys and values, layer by layer, that the quantized model hands to its cache."""
    from transformers import DynamicCache

    model = CausalLM.open(model_dir).load_full(torch.float32)
    largest: list[float] = []
    original = DynamicCache.update

    def update(self: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        largest.extend([float(key.abs().max()), float(value.abs().max())])
        return original(self, key, value, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", update)
    with torch.no_grad():
        for name, tensor, _ in iterate_quantized(out):
            model.get_submodule(name).weight.copy_(tensor.dequantize())
        model(torch.from_numpy(TOKENS.astype(np.int64)), use_cache=True)
    return largest


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("name", "options", "refinements"),
    [
        ("rtn", {}, []),
        ("gptq", {}, []),
        ("gptq", {"true_sequential": False}, []),
        ("gptq", {}, [("signround", {"iterations": 3})]),
    ],
    ids=["rtn", "gptq", "two passes", "signround"],
)
def test_cache_scales_are_those_of_the_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str,
    options: dict[str, Any], refinements: list[tuple[str, dict[str, Any]]],
) -> None:  # fmt: skip
    tiny.build("llama", tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    facts = driver.quantize_model(
        model, algorithm(name, scheme="W3A16", **options), tmp_path / "out", tokens=TOKENS,
        refinements=[made(step, **o) for step, o in refinements],
        kv_cache=KV_CACHE[kind], batch_size=3,
    )  # fmt: skip
    scales = kv_scales(tmp_path / "out")
    assert facts["tokens"] == TOKENS.size and len(scales) == 4
    got = [
        float(scales[f"model.layers.{layer}.self_attn.{which}_scale"])
        for layer in range(2)
        for which in "kv"
    ]
    expected = cached(tmp_path / "model", tmp_path / "out", monkeypatch)
    largest = 448 if kind == "fp8" else 127
    assert [scale * largest for scale in got] == pytest.approx(expected, rel=1e-4)


def test_cache_scales_cost_no_pass_beside_a_sequential_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("llama", tmp_path / "model")
    runs: dict[bool, list[int]] = {False: [], True: []}
    original = CausalLM.run_block
    for wanted, seen in runs.items():
        model = CausalLM.open(tmp_path / "model")

        def count(self: Any, index: int, *args: Any, seen: list[int] = seen) -> Any:
            seen.append(index)
            return original(self, index, *args)

        monkeypatch.setattr(CausalLM, "run_block", count)
        driver.quantize_model(
            model, algorithm(), tmp_path / str(wanted), tokens=TOKENS, batch_size=3,
            kv_cache=KV_CACHE["fp8"] if wanted else None,
        )  # fmt: skip
    assert runs[True] == runs[False] == [0, 0, 1, 1]
    plain, scaled = (codes(tmp_path / str(wanted)) for wanted in (False, True))
    assert all(torch.equal(plain[name].codes, scaled[name].codes) for name in plain)


def test_a_cache_that_cannot_be_seen_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny.build("bloom", tmp_path / "model")
    with pytest.raises(RunError, match="key-value cache cannot be quantized"):
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm("rtn"), tmp_path / "out", tokens=TOKENS,
            kv_cache=KV_CACHE["fp8"],
        )  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def test_two_transforms_follow_each_other(tmp_path: Path) -> None:
    """Both fold their scales, the second on statistics of what the first has left."""
    tiny.build("llama", tmp_path / "model")
    quantizer = algorithm("rtn", scheme="W8A8", group_size=None)
    facts = driver.quantize_model(
        CausalLM.open(tmp_path / "model"), quantizer, tmp_path / "out",
        transforms=[smooth(strength=0.6), made("awq")], tokens=TOKENS, batch_size=3,
    )  # fmt: skip
    assert facts["tokens"] == TOKENS.size
    assert output_error(tmp_path / "model", tmp_path / "out") < 0.05


@pytest.mark.parametrize(
    "refinements",
    [
        [("coordinate_descent", {})],
        [("signround", {"iterations": 40, "batch_size": 4})],
        [("coordinate_descent", {"passes": 2}), ("signround", {"iterations": 20})],
    ],
    ids=["coordinate_descent", "signround", "both"],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_refinements_bring_the_model_nearer(
    tmp_path: Path, refinements: list[tuple[str, dict[str, Any]]], symmetric: bool
) -> None:
    tiny.build("llama", tmp_path / "model")
    quantizer = algorithm("gptq", scheme="W3A16", symmetric=symmetric)
    errors = {}
    for out, steps in {"plain": [], "refined": refinements}.items():
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), quantizer, tmp_path / out, tokens=TOKENS,
            refinements=[made(name, **options) for name, options in steps], batch_size=3,
        )  # fmt: skip
        for _, tensor, _ in iterate_quantized(tmp_path / out):
            tensor.validate()
        errors[out] = output_error(tmp_path / "model", tmp_path / out)
    assert errors["refined"] < errors["plain"]
    for layer in read_layers(tmp_path / "refined"):
        if "block_error" in layer:
            assert layer["block_error"] <= layer["block_error_before"]


@pytest.mark.parametrize(
    ("name", "follow", "kv_cache"),
    [("gptq", False, None), ("gptq", True, "int8"), ("gptq", False, "fp8"), ("rtn", False, "fp8")],
)
def test_a_walk_cut_short_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, follow: bool, kv_cache: str | None
) -> None:
    tiny.build("llama", tmp_path / "model", layers=4)
    monkeypatch.setattr(stream, "CHECKPOINT_SECONDS", 0.0)
    quantizer = algorithm(name)

    def run(out: str, advance: Any = lambda note: None) -> dict[str, Any]:
        model = CausalLM.open(tmp_path / "model")
        return driver.quantize_model(
            model, quantizer, tmp_path / out, tokens=TOKENS, batch_size=4, advance=advance,
            refinements=[made("signround", iterations=3)] if follow else [],
            kv_cache=KV_CACHE[kv_cache] if kv_cache else None,
        )  # fmt: skip

    run("whole")
    with pytest.raises(Cut):
        run("parts", cut_after("block 1"))
    with open(tmp_path / "parts" / "layers.jsonl", "a") as file:
        file.write('{"block": 2, "na')  # as a kill in the middle of a write leaves it
    assert run("parts")["resumed_at_block"] == 2
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }


def die_while_writing(root: Path, out: str, name: str, time: int) -> None:
    """Quantize, and have the kernel kill this process halfway through the given file, written for
    the given time."""
    stream.CHECKPOINT_SECONDS = 0.0
    original, seen = codes_of_blocks.save_synced, 0

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal seen
        seen += path.name == name
        if path.name == name and seen == time:
            size = sum(tensor.nbytes for tensor in tensors.values())
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        original(tensors, path, metadata)

    driver.save_synced = stream.save_synced = save  # type: ignore[attr-defined]
    driver.quantize_model(
        CausalLM.open(root / "model"), algorithm(), root / out, tokens=TOKENS, batch_size=4
    )


@pytest.mark.parametrize(
    ("name", "time", "resumed_at"),
    [("block-00001.safetensors", 1, 1), (stream.RESUME, 2, 1), (stream.RESUME, 3, 3)],
    ids=["block", "activations", "after the last block"],
)
def test_a_kill_in_the_middle_of_a_file_leaves_nothing_behind(
    tmp_path: Path, name: str, time: int, resumed_at: int
) -> None:
    """Nothing that would be published with the result: safetensors writes to files of random
    names."""
    tiny.build("llama", tmp_path / "model", layers=3)
    child = multiprocessing.get_context("spawn").Process(
        target=die_while_writing, args=(tmp_path, "parts", name, time)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGXFSZ
    facts: dict[str, Any] = {}
    for out in ("parts", "whole"):
        facts[out] = driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm(), tmp_path / out, tokens=TOKENS,
            batch_size=4,
        )  # fmt: skip
    assert facts["parts"]["resumed_at_block"] == resumed_at
    names = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*"))
    assert sorted(p.relative_to(tmp_path / "parts") for p in (tmp_path / "parts").rglob("*")) == (
        names
    )
    for one in names:
        assert (tmp_path / "parts" / one).read_bytes() == (tmp_path / "whole" / one).read_bytes()


def test_nothing_left_to_quantize_is_an_error(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    with pytest.raises(RunError, match="no linear was quantized"):
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm("rtn"), tmp_path / "out", ignore=[".*"]
        )


def test_the_note_of_a_block_has_its_worst_error_against_rtn() -> None:
    records = [
        {"error": 1e-3, "rtn_error": 1e-3, "fallback": True},
        {"error": 2.1e-2, "rtn_error": 3.4e-2, "fallback": False},
    ]
    assert driver._note(3, records) == "block 3: worst error 2.1e-02 (0.62 x RTN), 1 fell back"
    assert driver._note(0, [{"error": 0.0, "rtn_error": 0.0, "fallback": False}]).endswith(
        "0.0e+00"
    )
    assert driver._note(1, []) == "block 1: nothing to quantize"


def test_inputs_that_are_not_finite_are_one_clear_error(tmp_path: Path) -> None:
    directory = tiny.build("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.down_proj.*not finite"):
        driver.quantize_model(
            CausalLM.open(directory), algorithm(), tmp_path / "out", tokens=TOKENS, batch_size=2
        )
