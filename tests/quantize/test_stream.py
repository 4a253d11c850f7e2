"""Passes of the calibration set over a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.models.architecture import CausalLM
from compressor.quantize import driver, registry
from compressor.quantize.codes import read_layers
from tests import tiny

TOKENS = np.random.default_rng(0).integers(4, 300, (6, 32)).astype(np.int32)


def algorithm(name: str = "gptq", **options: Any) -> Any:
    cls = registry.get(name)
    return cls(cls.Options(**{"scheme": "W4A16", "group_size": 16, **options}), torch.float32)


def test_every_expert_is_calibrated_when_asked(tmp_path: Path) -> None:
    tiny.build("mixtral", tmp_path / "model")
    tokens: dict[bool, list[int]] = {}
    for every in (False, True):
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), algorithm(), tmp_path / str(every), tokens=TOKENS,
            all_experts=every,
        )  # fmt: skip
        tokens[every] = [
            layer["tokens"]
            for layer in read_layers(tmp_path / str(every))
            if "experts" in layer["name"]
        ]
    assert set(tokens[True]) == {TOKENS.size}
    # The router chooses two of four: three linears an expert, two blocks.
    assert sum(tokens[False]) == 2 * TOKENS.size * 3 * 2
