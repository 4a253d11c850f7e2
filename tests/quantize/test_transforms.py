"""Scale that moves between layers: what is written, and when it is taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.models.architecture import CausalLM
from compressor.quantize import driver, registry, transforms
from compressor.quantize.codes import iterate_quantized, replaced_tensors
from tests import tiny

TOKENS = np.random.default_rng(0).integers(4, 300, (6, 32)).astype(np.int32)


def algorithm(name: str = "gptq", **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**{"scheme": "W4A16", "group_size": 16, **options}), torch.float32)


def smooth(**options: Any) -> Any:
    cls = registry.get("smoothquant")
    return cls(cls.Options(**options))


def test_transform_writes_the_norms_it_changed(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    quantizer = algorithm(scheme="W8A8", group_size=None)
    driver.quantize_model(
        model, quantizer, tmp_path / "out", transforms=[smooth(strength=0.5)], tokens=TOKENS
    )
    replaced = replaced_tensors(tmp_path / "out")
    assert any(name.endswith("input_layernorm.weight") for name in replaced)
    for name, value in replaced.items():
        assert value.dtype == model.checkpoint.dtype(name)
        assert value.shape == model.checkpoint.shape(name)


def test_folding_that_changes_the_output_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("llama", tmp_path / "model")
    found = {}
    for out, steps, tolerance in (
        ("folded", [smooth(strength=0.5)], transforms.FOLD_TOLERANCE),
        ("back", [smooth(strength=0.5)], -1.0),
        ("plain", [], -1.0),
    ):
        monkeypatch.setattr(transforms, "FOLD_TOLERANCE", tolerance)
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"),
            algorithm("rtn", scheme="W8A8", group_size=None),
            tmp_path / out, transforms=steps, tokens=TOKENS,
        )  # fmt: skip
        found[out] = {name: tensor.codes for name, tensor, _ in iterate_quantized(tmp_path / out)}
    assert not replaced_tensors(tmp_path / "back")
    for name, codes in found["plain"].items():
        assert torch.equal(found["back"][name], codes)
    assert any(
        not torch.equal(found["folded"][name], found["plain"][name]) for name in found["plain"]
    )
