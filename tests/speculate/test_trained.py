"""A trained model is written as its source is stored, or refused before it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.speculate.trained import trained_tensors, write_trained
from tests import tiny


@pytest.mark.parametrize("arch", ["llama", "gemma2", "bloom", "phi3", "mixtral"])
def test_what_was_trained_is_computed_from_the_checkpoint_written(
    tmp_path: Path, arch: str
) -> None:
    opened = CausalLM.open(tiny.build(arch, tmp_path / "source"))
    model = opened.load_full(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.05
        parameter.data = (parameter.data + noise).to(torch.bfloat16).float()
    (tmp_path / "written" / "old").mkdir(parents=True)  # a killed attempt's
    write_trained(opened, trained_tensors(opened, model), tmp_path / "written")
    written = CausalLM.open(tmp_path / "written")
    assert not written.check_weights()
    ids = torch.arange(7, 7 * 24, 7)[None] % tiny.VOCABULARY
    with torch.inference_mode():
        got = written.load_full(torch.float32)(ids).logits
        before = CausalLM.open(tmp_path / "source").load_full(torch.float32)(ids).logits
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(got, before, atol=1e-2)
    names = {path.name for path in (tmp_path / "source").iterdir()}
    assert {path.name for path in (tmp_path / "written").iterdir()} == names


def test_weights_that_are_not_stored_as_they_are_trained_are_refused(tmp_path: Path) -> None:
    opened = CausalLM.open(tiny.build("llama", tmp_path / "source"))
    model = opened.load_full(torch.float32)
    model.model.joined = torch.nn.Parameter(torch.zeros(2, 3, 3))
    with pytest.raises(RunError, match="stored otherwise than they are trained"):
        trained_tensors(opened, model)
