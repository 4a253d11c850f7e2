"""compressed-tensors artifacts: our own round trip, and loading by transformers' integration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import RunError
from compressor.export import compressed_tensors as ct
from compressor.measure.engines.transformers import model_bytes, model_kernel
from compressor.models.architecture import CausalLM
from compressor.numerics.scheme import KV_CACHE, Scheme
from compressor.numerics.siblings import Siblings
from compressor.quantize import registry
from compressor.quantize.codes import iterate_quantized, kv_scales
from compressor.quantize.driver import quantize_model
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests import tiny


def make(
    tmp_path: Path, arch: str, kv_cache: str | None = None, **options: Any
) -> tuple[Path, Path, Scheme]:
    """(model, artifact, scheme) of a tiny model quantized by round-to-nearest."""
    cache = KV_CACHE[kv_cache] if kv_cache else None
    source = tmp_path / "model"
    tiny.build(arch, source)
    cls = registry.get("rtn")
    algorithm = cls(cls.Options(**options), torch.float32)
    tokens = np.random.default_rng(0).integers(4, 300, (4, 32)).astype(np.int32)
    facts = quantize_model(
        CausalLM.open(source), algorithm, tmp_path / "codes", tokens=tokens, kv_cache=cache
    )
    ignore = [entry["name"] for entry in facts["coverage"]["skipped"]]
    artifact = tmp_path / "artifact"
    ct.export(
        source, iterate_quantized(tmp_path / "codes"), ignore,
        {"tool": "compressor"}, artifact, kv_cache=cache, kv_scales=kv_scales(tmp_path / "codes"),
    )  # fmt: skip
    return source, artifact, algorithm.scheme


SCHEMES: list[dict[str, Any]] = [
    {"scheme": "W8A8"},
    {"scheme": "W8A8", "activations": "static"},
    {"scheme": "W8A8", "activations": "dynamic-asymmetric"},
    {"scheme": "W8A16"},
    {"scheme": "W4A16", "group_size": 16},
    {"scheme": "W4A16", "group_size": 16, "symmetric": False},
    {"scheme": "W4A16", "group_size": -1},
    {"scheme": "FP8"},
    {"scheme": "FP8", "activations": "static"},
]


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_what_is_read_back_is_what_was_quantized(tmp_path: Path, options: dict[str, Any]) -> None:
    _, artifact, scheme = make(tmp_path, "llama", **options)
    source = ct.Checkpoint(artifact)
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        back = ct.read_tensor(source, name, scheme)
        back.validate()
        assert torch.equal(back.codes, tensor.codes)
        assert torch.equal(back.dequantize(), tensor.dequantize())


# transformers 5.23 expects an asymmetric grid's zero points unpacked, which is not the format's (or
# vLLM's) layout, and so loads no such checkpoint of any tool.
@pytest.mark.parametrize(
    ("arch", "options"),
    # GPT-NeoX: transformers has another name for the output layer than the checkpoint.
    [
        *(("llama", s) for s in SCHEMES if s.get("symmetric", True)),
        ("gpt_neox", {"scheme": "W8A16"}),
    ],
    ids=str,
)
def test_transformers_computes_the_same_from_the_artifact(
    tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    _, artifact, _ = make(tmp_path, arch, **options)
    theirs = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    ours = ct.load_model(artifact)
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids).logits
    ref = CausalLM.open(artifact).linears(0)[0]
    torch.testing.assert_close(
        theirs.get_submodule(ref.path).weight, ours.get_submodule(ref.path).kernel.weight
    )
    # Their activations use scale absmax/127.5, engines (and we) absmax/127: the weights above are
    # equal, and in a random model that difference is as large as the rounding itself.
    tolerance = 5e-2 if options["scheme"] == "W8A8" else 1e-4
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "phi3", "gemma2", "gpt_neox", "opt"])
def test_other_layouts_load_back(tmp_path: Path, arch: str) -> None:
    source, artifact, _ = make(tmp_path, arch, scheme="W8A16")
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        whole = CausalLM.open(source).load_full(torch.float32)(ids).logits
        got = ct.load_model(artifact)(ids).logits
    assert float((got - whole).norm() / whole.norm()) < 0.1
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    names = ct.Checkpoint(artifact).names
    if arch in ("mixtral", "qwen3_moe"):
        assert any(name.endswith("gate") for name in config["ignore"])
        assert any("experts.0." in name and name.endswith("weight_scale") for name in names)
        assert not any(".gate.weight_" in name for name in names)


@pytest.mark.parametrize(
    "options", [{"scheme": "W8A8"}, {"scheme": "W4A16", "group_size": 16}, None], ids=str
)
@pytest.mark.parametrize(
    ("arch", "together"),  # products of several linears in the two blocks
    [("llama", 4), ("qwen2", 4), ("phi3", 0), ("opt", 2), ("gpt_neox", 0), ("mixtral", 10)],
)
def test_linears_of_one_input_are_one_product(
    tmp_path: Path, arch: str, together: int, options: dict[str, Any] | None
) -> None:
    if options is None:
        artifact = tiny.build(arch, tmp_path / "source")
    else:
        _, artifact, _ = make(tmp_path, arch, **options)
    plain, fast = ct.load_model(artifact), ct.load_model(artifact, kernel="auto")
    found = [module for module in fast.modules() if isinstance(module, Siblings)]
    products: list[int] = []
    for module in found:
        module.linear.register_forward_hook(lambda *_: products.append(1))
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        got, expected = fast(ids).logits, plain(ids).logits
    # Sums of another order send activations of the next layers to other integers.
    assert float((got - expected).norm() / expected.norm()) < (2e-2 if options else 1e-5)
    assert len(found) == together
    assert model_bytes(fast) <= model_bytes(plain)
    counts = [model_kernel(one).rpartition(" ")[2] for one in (plain, fast)]
    assert counts[0] == counts[1]  # of linears, not of products
    # One each, but for experts that no token came to.
    assert len(products) == together if arch != "mixtral" else 2 < len(products) <= together


def test_export_is_complete_and_deterministic(tmp_path: Path) -> None:
    source, artifact, _ = make(tmp_path, "llama", scheme="W4A16", group_size=16)
    present = {p.name for p in artifact.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "compression.json"} <= present
    assert {"generation_config.json", "SHA256SUMS"} <= present
    again = tmp_path / "again"
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    ct.export(
        source, iterate_quantized(tmp_path / "codes"), config["ignore"],
        {"tool": "compressor"}, again,
    )  # fmt: skip
    assert (again / "SHA256SUMS").read_text() == (artifact / "SHA256SUMS").read_text()


@pytest.mark.parametrize("eight", ["W8A8", "FP8"])
def test_several_schemes_in_one_checkpoint(tmp_path: Path, eight: str) -> None:
    """Packed 4-bit, packed 8-bit and int8 or fp8 layers side by side, by name."""
    source = tmp_path / "model"
    tiny.build("llama", source)
    cls = registry.get("rtn")

    def made(scheme: str) -> Any:
        return cls(cls.Options(scheme=scheme, group_size=None if "8" in scheme else 16))

    model = CausalLM.open(source)
    names = [ref.name for ref in model.linears(0)]
    exceptions = {name: made("W8A16") for name in names if "mlp" in name}
    exceptions |= {name: made(eight) for name in names if name.endswith("o_proj")}
    facts = quantize_model(model, made("W4A16"), tmp_path / "codes", exceptions=exceptions)
    ignore = [entry["name"] for entry in facts["coverage"]["skipped"]]
    ct.export(source, iterate_quantized(tmp_path / "codes"), ignore, {}, tmp_path / "artifact")
    config = json.loads((tmp_path / "artifact" / "config.json").read_text())
    found = config["quantization_config"]
    assert found["format"] == "mixed-precision" and len(found["config_groups"]) == 3
    formats = {group["format"] for group in found["config_groups"].values()}
    assert formats == {"pack-quantized", "float-quantized" if eight == "FP8" else "int-quantized"}
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        whole = CausalLM.open(source).load_full(torch.float32)(ids).logits
        got = ct.load_model(tmp_path / "artifact")(ids).logits
    assert 0 < float((got - whole).norm() / whole.norm()) < 0.3
    assert ct.load_model(tmp_path / "artifact").get_submodule(names[0]).kernel_name


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_formats_own_library_reads_float8(tmp_path: Path, activations: str) -> None:
    """Its decompressor gives our dequantized weights, bit for bit."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    _, artifact, _ = make(tmp_path, "llama", scheme="FP8", activations=activations)
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    library = BaseCompressor.get_value_from_registry(config["format"])
    assert library.can_compress(torch.nn.Linear, scheme)
    source = ct.Checkpoint(artifact)
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        assert source.dtype(f"{name}.weight") == torch.float8_e4m3fn
        assert source.shape(f"{name}.weight_scale") == (tensor.codes.shape[0], 1)
        assert source.has(f"{name}.input_scale") == (activations == "static")
        state = {key: source.tensor(f"{name}.{key}") for key in ("weight", "weight_scale")}
        theirs = library.decompress(state, scheme)["weight"]
        assert torch.equal(theirs, tensor.dequantize())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 45).unsqueeze(0), use_cache=False).logits


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
@pytest.mark.parametrize("arch", ["llama", "mixtral", "gpt_neox", "opt"])
def test_low_bit_caches_are_evaluated_as_exported(tmp_path: Path, arch: str, kv_cache: str) -> None:
    source, artifact, _ = make(tmp_path, arch, kv_cache=kv_cache, scheme="W8A16")
    manifest = {"result": {"kv_cache": kv_cache}}
    evaluated = quantized_model(source, StoredStage("", tmp_path / "codes", manifest), "cpu")
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float" if kv_cache == "fp8" else "int", "strategy": "tensor",
        "symmetric": True, "dynamic": False,
    }  # fmt: skip
    loaded = ct.load_model(artifact)
    torch.testing.assert_close(logits(loaded), logits(evaluated), rtol=0, atol=0)
    config["kv_cache_scheme"] = None
    whole = json.loads((artifact / "config.json").read_text()) | {"quantization_config": config}
    (artifact / "config.json").write_text(json.dumps(whole))
    plain = logits(ct.load_model(artifact))
    change = float((logits(loaded) - plain).norm() / plain.norm())
    assert 0 < change < 0.3


def test_transformers_rounds_the_cache_alike(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, artifact, _ = make(tmp_path, "llama", kv_cache="fp8", scheme="W8A16")
    theirs = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    scales = kv_scales(tmp_path / "codes")
    attention = theirs.model.layers[1].self_attn
    assert torch.equal(attention.k_scale.data, scales["model.layers.1.self_attn.k_scale"])
    got, expected = logits(ct.load_model(artifact)), logits(theirs)
    attention.quantization_enabled = theirs.model.layers[0].self_attn.quantization_enabled = False
    plain = logits(theirs)
    assert float((got - expected).norm()) < 0.02 * float((plain - expected).norm())


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("kv_cache_scheme", {"strategy": "attn_head"}),
        ("kv_cache_scheme", {"num_bits": 4}),
        ("weights", {"strategy": "block"}),
        ("weights", {"num_bits": 4}),
    ],
    ids=str,
)
def test_forms_that_are_not_read_are_refused(
    tmp_path: Path, place: str, change: dict[str, Any]
) -> None:
    _, artifact, _ = make(tmp_path, "llama", kv_cache="fp8", scheme="FP8")
    config = json.loads((artifact / "config.json").read_text())
    found = config["quantization_config"]
    (found if place in found else found["config_groups"]["group_0"])[place] |= change
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="not read") as caught:
        ct.load_model(artifact)
    assert caught.value.fix


def test_one_scale_per_tensor_is_read(tmp_path: Path) -> None:
    """As other tools write FP8: the scale of a whole weight is one number."""
    _, artifact, _ = make(tmp_path, "llama", scheme="FP8")
    config = json.loads((artifact / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"]["strategy"] = "tensor"
    scheme = ct._read_scheme(group, "")
    tensors = {
        "x.weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
        "x.weight_scale": torch.ones(1),
    }
    directory = tmp_path / "one"
    directory.mkdir()
    from safetensors.torch import save_file

    save_file(tensors, directory / "model.safetensors")
    tensor = ct.read_tensor(ct.Checkpoint(directory), "x", scheme)
    tensor.validate()
    assert scheme.name == "FP8" and torch.equal(tensor.dequantize(), torch.ones(4, 8))
