"""What is left out, and how much is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressor.models.architecture import CausalLM
from compressor.quantize import driver, registry
from compressor.quantize.coverage import is_ignored, undersampled
from tests import tiny


def algorithm(name: str = "gptq", **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**{"scheme": "W4A16", "group_size": 16, **options}), torch.float32)


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


def test_an_entry_is_a_name_or_an_expression_for_all_of_it() -> None:
    assert is_ignored("model.layers.0.mlp.down_proj", [r".*\.down_proj"])
    assert is_ignored("model.layers[0]", ["model.layers[0]"])
    assert not is_ignored("model.layers.0.mlp.down_proj", ["down_proj", r".*\.down"])


def test_a_quarter_of_the_width_is_enough() -> None:
    assert undersampled(15, 64) and not undersampled(16, 64)
    assert not undersampled(None, 64)  # no statistics were asked for
