"""Artifacts with a quantized output layer: what is written computes what was evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.errors import RunError
from compressor.evaluate.divergence import score_baseline, score_variant
from compressor.export import compressed_tensors as ct
from compressor.models.architecture import CausalLM
from compressor.models.head import split
from compressor.quantize import registry
from compressor.quantize.codes import iterate_quantized
from compressor.quantize.driver import quantize_model
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests import tiny

IDS = torch.arange(5, 25).unsqueeze(0)
BLOCKS = {"scheme": "W4A16", "group_size": 16}
HEADS: list[dict[str, Any]] = [
    {"scheme": "W8A16"},
    {"scheme": "W4A16", "group_size": 16},
    {"scheme": "W4A16", "group_size": 32},
    {"scheme": "W8A8"},
]


def rtn(**options: Any) -> Any:
    cls = registry.get("rtn")
    return cls(cls.Options(**options), torch.float32)


def quantized(source: Path, codes: Path, head: dict[str, Any], **more: Any) -> StoredStage:
    facts = quantize_model(
        CausalLM.open(source), rtn(**BLOCKS), codes, head=rtn(**head), **more
    )  # fmt: skip
    return StoredStage("key", codes, {"result": facts})


def export(source: Path, stage: StoredStage, artifact: Path) -> dict[str, Any]:
    ignore = [entry["name"] for entry in stage.result["coverage"]["skipped"]]
    ct.export(
        source, iterate_quantized(stage.path), ignore, {"tool": "compressor"}, artifact,
        head=stage.result["head"],
    )  # fmt: skip
    return json.loads((artifact / "config.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_artifact_computes_what_was_evaluated(
    tmp_path: Path, tied: bool, head: dict[str, Any]
) -> None:
    source = tiny.build("llama", tmp_path / "model", tie_word_embeddings=tied)
    stage = quantized(source, tmp_path / "codes", head)
    config = export(source, stage, tmp_path / "artifact")
    assert config["tie_word_embeddings"] is False
    found = config["quantization_config"]
    assert found["ignore"] == []
    targets = sorted(group["targets"] for group in found["config_groups"].values())
    assert targets == ([["Linear", "lm_head"]] if head == BLOCKS else [["Linear"], ["lm_head"]])
    tensors = load_file(tmp_path / "artifact" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    key = "model.embed_tokens.weight"
    assert torch.equal(tensors[key], before[key])
    own = {name for name in tensors if name.startswith("lm_head.")}
    packed = {"lm_head.weight_packed", "lm_head.weight_scale", "lm_head.weight_shape"}
    assert own == ({"lm_head.weight", "lm_head.weight_scale"} if "A8" in head["scheme"] else packed)

    evaluated = quantized_model(source, stage, "cpu")
    ours = ct.load_model(tmp_path / "artifact")
    torch.testing.assert_close(logits(ours), logits(evaluated))
    (expected,) = [t for name, t, _ in iterate_quantized(stage.path) if name == "lm_head"]
    for model in (evaluated, ours):
        assert torch.equal(model.lm_head.kernel.weight, expected.dequantize())
        assert torch.equal(model.get_input_embeddings().weight, before[key])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype=torch.float32)
    got = logits(theirs.eval())
    torch.testing.assert_close(theirs.lm_head.weight.detach(), expected.dequantize())
    # Their activations use scale absmax/127.5, engines (and we) absmax/127.
    tolerance = 2e-2 if "A8" in head["scheme"] else 1e-4
    assert float((got - logits(ours)).norm() / got.norm()) < tolerance


@pytest.mark.parametrize(
    ("head", "kernel"),
    [
        ({"scheme": "W8A16"}, "int8-int8pack_mm"),
        ({"scheme": "W4A16", "group_size": 32}, "int4-int4pack_mm"),
        ({"scheme": "W8A8"}, "int8-int_mm"),
    ],
)
def test_the_served_head_runs_on_the_low_bit_kernel(
    tmp_path: Path, head: dict[str, Any], kernel: str
) -> None:
    source = tiny.build("llama", tmp_path / "model")
    stage = quantized(source, tmp_path / "codes", head)
    export(source, stage, tmp_path / "artifact")
    served = ct.load_model(tmp_path / "artifact", kernel="auto", dtype=torch.bfloat16)
    assert served.get_output_embeddings().kernel_name == kernel  # type: ignore[operator]
    assert served.get_input_embeddings().weight.dtype == torch.bfloat16  # type: ignore[operator]
    expected = logits(ct.load_model(tmp_path / "artifact"))
    assert float((logits(served).float() - expected).norm() / expected.norm()) < 5e-2


def test_evaluation_scores_the_quantized_head(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "model")
    stage = quantized(source, tmp_path / "codes", {"scheme": "W4A16", "group_size": 16},
                      ignore=[r"model\.layers.*"])  # fmt: skip
    assert [name for name, _, _ in iterate_quantized(stage.path)] == ["lm_head"]
    baseline = CausalLM.open(source).load_full(torch.float32)
    variant = quantized_model(source, stage, "cpu")
    windows = np.random.default_rng(1).integers(4, 300, (5, 17)).astype(np.int32)
    _, hidden = score_baseline(baseline, windows, 2)
    scores = score_variant(variant, windows, 2, hidden, split(baseline))
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        (tensor,) = [t for _, t, _ in iterate_quantized(stage.path)]
        log_p = baseline(ids).logits[:, :-1].double().log_softmax(-1)
        last = baseline.model(ids).last_hidden_state[:, :-1].double()
        log_q = (last @ tensor.dequantize().double().T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert scores.kl is not None and scores.kl.mean() > 1e-3
    np.testing.assert_allclose(scores.kl, kl.numpy(), atol=2e-4)
    config = export(source, stage, tmp_path / "artifact")["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["lm_head"]]
    assert len(config["ignore"]) == 14
    torch.testing.assert_close(logits(ct.load_model(tmp_path / "artifact")), logits(variant))


def test_a_shared_weight_stored_under_the_heads_name_is_kept_for_the_embeddings(
    tmp_path: Path,
) -> None:
    source = tiny.build("llama", tmp_path / "model")
    path = source / "model.safetensors"
    tensors = load_file(path)
    shared = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": shared}, path, metadata={"format": "pt"})
    stage = quantized(source, tmp_path / "codes", {"scheme": "W8A16"})
    export(source, stage, tmp_path / "artifact")
    written = load_file(tmp_path / "artifact" / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], shared)
    assert "lm_head.weight" not in written
    torch.testing.assert_close(
        logits(ct.load_model(tmp_path / "artifact")),
        logits(quantized_model(source, stage, "cpu")),
    )


@pytest.mark.parametrize("arch", ["mistral", "qwen3", "phi3", "gemma3", "mixtral", "qwen3_moe"])
def test_families_whose_quantized_head_engines_load(tmp_path: Path, arch: str) -> None:
    source = tiny.build(arch, tmp_path / "model")
    ct.check_head(CausalLM.open(source))
    stage = quantized(source, tmp_path / "codes", {"scheme": "W8A16"})
    export(source, stage, tmp_path / "artifact")
    expected = logits(quantized_model(source, stage, "cpu"))
    torch.testing.assert_close(logits(ct.load_model(tmp_path / "artifact")), expected)
    whole = logits(CausalLM.open(source).load_full(torch.float32))
    assert 0 < float((expected - whole).norm() / whole.norm()) < 0.5


@pytest.mark.parametrize("arch", ["gemma2", "opt", "bloom", "gpt_neox"])
def test_families_whose_quantized_head_engines_do_not_load_are_refused(
    tmp_path: Path, arch: str
) -> None:
    source = tiny.build(arch, tmp_path / "model")
    with pytest.raises(RunError, match="no quantized lm_head") as caught:
        ct.check_head(CausalLM.open(source))
    assert caught.value.fix
