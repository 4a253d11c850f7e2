from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.quantize.rotation import RotationOptions, random_hadamard, rotate_checkpoint
from tests import tiny


@pytest.mark.parametrize("size", [1, 2, 7, 12, 20, 48, 64, 96, 576])
def test_is_orthogonal(size: int) -> None:
    matrix = random_hadamard(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    if size % 4 == 0:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("parts", [{}, {"r2": False}, {"r1": False}])
def test_computes_the_same(tmp_path: Path, arch: str, parts: dict[str, bool]) -> None:
    tiny.build(arch, tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    facts = rotate_checkpoint(model, RotationOptions(**parts), tmp_path / "turned")
    assert facts["worst_block_difference"] < 1e-3
    ids = torch.arange(24).view(2, 12)
    before = CausalLM.open(tmp_path / "model").load_full(torch.float32)
    after = CausalLM.open(tmp_path / "turned").load_full(torch.float32)
    with torch.no_grad():
        a, b = before(ids).logits, after(ids).logits
    assert float((a - b).norm() / a.norm()) < 2e-2
    moved = before.model.layers[0].self_attn.v_proj.weight
    assert not torch.allclose(moved, after.model.layers[0].self_attn.v_proj.weight, atol=1e-3)


def test_refuses_what_it_would_change(tmp_path: Path) -> None:
    tiny.build("gpt_neox", tmp_path / "model")
    with pytest.raises(RunError, match="cannot be rotated"):
        rotate_checkpoint(CausalLM.open(tmp_path / "model"), RotationOptions(), tmp_path / "turned")
