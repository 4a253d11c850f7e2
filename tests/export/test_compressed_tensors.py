"""compressed-tensors artifacts: our own round trip, and loading by transformers' integration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.export import compressed_tensors as ct
from compressor.models.architecture import CausalLM
from compressor.numerics.scheme import Scheme
from compressor.quantize import registry
from compressor.quantize.driver import iterate_quantized, quantize_model
from tests import tiny


def make(tmp_path: Path, arch: str, **options: Any) -> tuple[Path, Path, Scheme]:
    """(model, artifact, scheme) of a tiny model quantized by round-to-nearest."""
    source = tmp_path / "model"
    tiny.build(arch, source)
    cls = registry.get("rtn")
    algorithm = cls(cls.Options(**options), torch.float32)
    tokens = np.random.default_rng(0).integers(4, 300, (4, 32)).astype(np.int32)
    facts = quantize_model(CausalLM.open(source), algorithm, tmp_path / "codes", tokens=tokens)
    ignore = [entry["name"] for entry in facts["coverage"]["skipped"]]
    artifact = tmp_path / "artifact"
    ct.export(
        source, iterate_quantized(tmp_path / "codes"), ignore,
        {"tool": "compressor"}, artifact,
    )  # fmt: skip
    return source, artifact, algorithm.scheme


SCHEMES: list[dict[str, Any]] = [
    {"scheme": "W8A8"},
    {"scheme": "W8A8", "activations": "static"},
    {"scheme": "W8A16"},
    {"scheme": "W4A16", "group_size": 16},
    {"scheme": "W4A16", "group_size": 16, "symmetric": False},
    {"scheme": "W4A16", "group_size": -1},
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
@pytest.mark.parametrize("options", [s for s in SCHEMES if s.get("symmetric", True)], ids=str)
def test_transformers_computes_the_same_from_the_artifact(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    _, artifact, _ = make(tmp_path, "llama", **options)
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


def test_several_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    """Packed 4-bit, packed 8-bit and int8 layers side by side, by name."""
    source = tmp_path / "model"
    tiny.build("llama", source)
    cls = registry.get("rtn")

    def made(scheme: str) -> Any:
        return cls(cls.Options(scheme=scheme, group_size=None if "8" in scheme else 16))

    model = CausalLM.open(source)
    names = [ref.name for ref in model.linears(0)]
    exceptions = {name: made("W8A16") for name in names if "mlp" in name}
    exceptions |= {name: made("W8A8") for name in names if name.endswith("o_proj")}
    facts = quantize_model(model, made("W4A16"), tmp_path / "codes", exceptions=exceptions)
    ignore = [entry["name"] for entry in facts["coverage"]["skipped"]]
    ct.export(source, iterate_quantized(tmp_path / "codes"), ignore, {}, tmp_path / "artifact")
    config = json.loads((tmp_path / "artifact" / "config.json").read_text())
    found = config["quantization_config"]
    assert found["format"] == "mixed-precision" and len(found["config_groups"]) == 3
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        whole = CausalLM.open(source).load_full(torch.float32)(ids).logits
        got = ct.load_model(tmp_path / "artifact")(ids).logits
    assert 0 < float((got - whole).norm() / whole.norm()) < 0.3
    assert ct.load_model(tmp_path / "artifact").get_submodule(names[0]).kernel_name
