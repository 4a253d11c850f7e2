from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.models.architecture import CausalLM
from compressor.quantize import driver, registry
from compressor.quantize.suspended import run_suspended
from tests import tiny

TOKENS = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_gives_what_a_pass_per_group_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, dtype: torch.dtype
) -> None:
    tiny.build(arch, tmp_path / "model")
    cls = registry.get("gptq")
    for name, share in (("one", 0.4), ("many", 0.0)):
        monkeypatch.setattr(driver, "WAITING_SHARE", share)
        options = cls.Options(scheme="W4A16", group_size=16, true_sequential=True)
        driver.quantize_model(
            CausalLM.open(tmp_path / "model"), cls(options), tmp_path / name, tokens=TOKENS,
            batch_size=4, dtype=dtype,
        )  # fmt: skip
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name


def test_an_error_ends_every_batch() -> None:
    linear = nn.Linear(2, 2)
    ended = []

    def batch() -> None:
        try:
            linear(torch.ones(1, 2))
        finally:
            ended.append(True)

    def solve(name: str) -> None:
        raise ValueError(name)

    with pytest.raises(ValueError, match="only"):
        run_suspended([batch, batch], {"only": [linear]}, lambda name, x: None, solve)
    assert len(ended) == 2
    assert not linear._forward_pre_hooks
