"""Low-bit key-value caches: what attention is given, rounded, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.kv_cache import (
    CacheObserver,
    RoundedCache,
    check_attention,
    round_cache,
)
from compressor.numerics.scheme import KV_CACHE
from tests import tiny

IDS = torch.arange(4, 84).view(2, 40)
REFUSED = ("bloom", "gemma2")  # own attention; the library runs it eagerly (soft caps)
ATTENDING = [arch for arch in tiny.ARCHITECTURES if arch not in REFUSED]


def scales_of(model: CausalLM, kind: str) -> dict[str, torch.Tensor]:
    """From one walk over the blocks, nothing quantized."""
    inputs = model.embed(IDS)
    hidden, observer = inputs.hidden, CacheObserver()
    for index in range(len(model.blocks)):
        model.load_block(index, "cpu", torch.float32)
        with observer.watch(model, index), torch.no_grad():
            hidden = model.run_block(index, hidden, inputs)
    return observer.scales(KV_CACHE[kind])


class Recorder:
    """A cache of transformers' kind that notes what it is given."""

    def __init__(self) -> None:
        self.largest: dict[int, tuple[float, float]] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import DynamicCache

        original, largest = DynamicCache.update, self.largest

        def update(cache: Any, key: Any, value: Any, layer: int, *args: Any, **kw: Any) -> Any:
            largest[layer] = (float(key.abs().max()), float(value.abs().max()))
            return original(cache, key, value, layer, *args, **kw)

        monkeypatch.setattr(DynamicCache, "update", update)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("arch", ATTENDING)
def test_scales_span_what_the_library_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, kind: str
) -> None:
    """Keys and values are those that transformers' own model hands to its cache."""
    from transformers import AutoModelForCausalLM

    tiny.build(arch, tmp_path)
    found = scales_of(CausalLM.open(tmp_path), kind)
    recorder = Recorder()
    recorder.install(monkeypatch)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs(IDS, use_cache=True)
    assert len(found) == 2 * len(recorder.largest) == 4
    for layer, (key, value) in recorder.largest.items():
        names = [name for name in found if f".{layer}." in name]
        assert [name.rpartition(".")[2] for name in names] == ["k_scale", "v_scale"]
        got = [float(found[name]) * (448 if kind == "fp8" else 127) for name in names]
        assert got == pytest.approx([key, value], rel=1e-4)
        assert all(found[name].shape == (1,) for name in names)


def test_names_are_those_of_the_attention(tmp_path: Path) -> None:
    for arch, path in {"llama": "model.layers.1.self_attn", "mixtral": "model.layers.1.self_attn",
                       "gpt_neox": "gpt_neox.layers.1.attention",
                       "opt": "model.decoder.layers.1.self_attn"}.items():  # fmt: skip
        tiny.build(arch, tmp_path / arch)
        assert f"{path}.k_scale" in scales_of(CausalLM.open(tmp_path / arch), "fp8")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_the_formats_own(kind: str, dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 2, 3, 50, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    scheme = KV_CACHE[kind]
    scales = [x.float().abs().max().view(1) * 0.9 / scheme.maximum for x in (key, value)]
    cache = RoundedCache(*scales, scheme)
    args = QuantizationArgs(
        num_bits=8, type=scheme.type, symmetric=True, strategy="tensor", dynamic=False
    )
    for got, x, scale in zip(cache(key, value), (key, value), scales, strict=True):
        assert got.dtype == dtype and got.shape == x.shape
        expected = fake_quantize(x.float(), scale, torch.zeros(1), args).to(dtype)
        same = torch.isclose(got.float(), expected.float(), rtol=1e-5)
        assert float(same.float().mean()) > 0.995  # a quotient may lie between two points
    again = cache(*cache(key, value))
    for once, twice in zip(cache(key, value), again, strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt_neox", "opt"])
def test_logits_change_a_little(tmp_path: Path, arch: str) -> None:
    tiny.build(arch, tmp_path)
    scales, integers = (scales_of(CausalLM.open(tmp_path), kind) for kind in ("fp8", "int8"))
    with torch.no_grad():
        whole = CausalLM.open(tmp_path).load_full(torch.float32)(IDS, use_cache=False).logits
        errors = []
        for factor in (1.0, 8.0):  # 8: three bits fewer
            model = CausalLM.open(tmp_path)
            round_cache(model, {n: s * factor for n, s in integers.items()}, KV_CACHE["int8"])
            got = model.load_full(torch.float32)(IDS, use_cache=False).logits
            errors.append(float((got - whole).norm() / whole.norm()))
        model = CausalLM.open(tmp_path)
        round_cache(model, scales, KV_CACHE["fp8"])
        rounded = model.load_full(torch.float32)
        got = rounded(IDS, use_cache=False).logits
        fp8 = float((got - whole).norm() / whole.norm())
        first = rounded(IDS[:, :30], use_cache=True)
        rest = rounded(IDS[:, 30:], past_key_values=first.past_key_values, use_cache=True).logits
    assert 0 < fp8 < 0.3
    assert 0 < errors[0] < 0.1 and errors[1] > 2 * errors[0]
    torch.testing.assert_close(rest, got[:, 30:], rtol=1e-3, atol=1e-3 * float(got.abs().max()))


@pytest.mark.parametrize("arch", REFUSED)
def test_attention_that_cannot_be_seen_is_refused(tmp_path: Path, arch: str) -> None:
    tiny.build(arch, tmp_path)
    model = CausalLM.open(tmp_path)
    with pytest.raises(RunError, match="does not compute attention through") as caught:
        check_attention(model)
    assert caught.value.fix and arch in str(caught.value).lower()
    with pytest.raises(RunError, match="does not compute attention through"):
        round_cache(model, {}, KV_CACHE["fp8"])


def test_scales_that_belong_nowhere_are_refused(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    scales = scales_of(CausalLM.open(tmp_path), "fp8")
    extra = scales | {"model.layers.9.self_attn.k_scale": torch.ones(1)}
    with pytest.raises(RunError, match=r"no attention of the model, such as model\.layers\.9"):
        round_cache(CausalLM.open(tmp_path), extra, KV_CACHE["fp8"])
    for bad in (torch.ones(2), torch.zeros(1), torch.full((1,), torch.nan)):
        wrong = scales | {"model.layers.0.self_attn.v_scale": bad}
        with pytest.raises(RunError, match="not one positive number"):
            round_cache(CausalLM.open(tmp_path), wrong, KV_CACHE["fp8"])


def test_handlers_are_taken_away_again(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    model = CausalLM.open(tmp_path)
    before = [dict(module.__dict__) for module in model.model.modules()]
    with pytest.raises(ZeroDivisionError), CacheObserver().watch(model, 0):
        raise ZeroDivisionError
    assert [set(module.__dict__) for module in model.model.modules()] == [set(d) for d in before]
