"""A device that runs out of memory in a forward pass: smaller batches, the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.quantize import codes, driver, registry, stream
from tests import tiny
from tests.quantize.cuts import Cut, cut_after

TOKENS = np.random.default_rng(0).integers(4, 300, (12, 16)).astype(np.int32)
GPTQ = registry.get("gptq")


def limit(model: CausalLM, path: str, most: int, spared: int = 0) -> None:
    """Have a module of block 1 run out of memory on more than ``most`` samples, after it let some
    such batches through. Checked when its output is there, of a linear before that."""
    seen = 0
    module = model.blocks[1].get_submodule(path)

    def check(x: torch.Tensor) -> None:
        nonlocal seen
        if x.ndim == 3 and len(x) > most:
            seen += 1
            if seen > spared:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")

    if isinstance(module, torch.nn.Linear):
        module.register_forward_pre_hook(lambda _, args: check(args[0]))
    else:
        module.register_forward_hook(
            lambda _, args, out: check(out[0] if isinstance(out, tuple) else out)
        )


def quantize(
    root: Path, out: str, model: CausalLM, batch: int, **settings: Any
) -> tuple[Any, list[torch.Tensor]]:
    """(facts, the Hessian of every group of linears in the order of solving)."""
    # Eight bits, so that a rounding that falls the other way is not seen in the blocks after it.
    options = {"scheme": "W8A16", "group_size": 16, **settings.pop("options", {})}
    quantizer, seen = GPTQ(GPTQ.Options(**options)), []
    original = quantizer.quantize_all
    quantizer.quantize_all = lambda w, h: (seen.append(h.clone()), original(w, h))[1]
    facts = driver.quantize_model(
        model, quantizer, root / out, tokens=TOKENS, batch_size=batch, **settings
    )
    return facts, seen


def assert_alike(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    """The same samples, each once: equal but for rounding."""
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.03


@pytest.mark.parametrize(
    ("path", "spared"),
    [
        ("self_attn.q_proj", 0),  # nothing is quantized yet
        ("self_attn.q_proj", 2),
        ("mlp.down_proj", 0),  # everything before it is
        ("", 0),  # everything is: the block's output
        ("", 2),  # two batches have come to the end, and must not run again
    ],
)
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_the_batch_is_halved_and_the_walk_goes_on(
    tmp_path: Path, arch: str, sequential: bool, path: str, spared: int
) -> None:
    if arch == "mixtral" and path.startswith("mlp"):
        path = "mlp"  # its linears are the experts', which see no batches
    tiny.build(arch, tmp_path / "model", layers=3)
    options: dict[str, Any] = {"options": {"true_sequential": sequential}}
    _, expected = quantize(tmp_path, "small", CausalLM.open(tmp_path / "model"), 2, **options)
    model = CausalLM.open(tmp_path / "model")
    limit(model, path, 2, spared)
    notes: list[str] = []
    facts, seen = quantize(tmp_path, "lowered", model, 4, advance=notes.append, **options)
    assert facts["batch_size"] == 2
    assert "memory" not in notes[0]
    assert all("out of memory: batches of 2" in note for note in notes[1:])
    assert all(note.endswith("one pass per group") is sequential for note in notes[1:])
    assert_alike(seen, expected)
    if arch == "llama":
        layers = codes.read_layers(tmp_path / "lowered")
        assert {layer["tokens"] for layer in layers} == {TOKENS.size}


def test_a_resumed_walk_keeps_to_the_smaller_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order are other bytes; the device may have more memory by now."""
    tiny.build("llama", tmp_path / "model", layers=4)
    monkeypatch.setattr(stream, "CHECKPOINT_SECONDS", 0.0)

    for out in ("whole", "parts"):
        model = CausalLM.open(tmp_path / "model")
        limit(model, "mlp.down_proj", 2)
        if out == "whole":
            quantize(tmp_path, out, model, 4)
        else:
            with pytest.raises(Cut):
                quantize(tmp_path, out, model, 4, advance=cut_after("block 1"))
    notes: list[str] = []
    model = CausalLM.open(tmp_path / "model")
    facts, _ = quantize(tmp_path, "parts", model, 4, advance=notes.append)
    assert (facts["resumed_at_block"], facts["batch_size"]) == (2, 2)
    assert "out of memory: batches of 2" in notes[-1]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_bfloat16_and_refined_blocks_go_on_too(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    refine = registry.get("signround")
    steps = {"refinements": [refine(refine.Options(iterations=1, batch_size=1))]}
    seen = {}
    for out, batch in {"small": 1, "lowered": 6}.items():
        model = CausalLM.open(tmp_path / "model")
        if batch > 1:
            limit(model, "mlp.down_proj", 1, 4)
        _, seen[out] = quantize(tmp_path, out, model, batch, dtype=torch.bfloat16, **steps)
    assert_alike(seen["lowered"], seen["small"])


def test_one_sample_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "model")
    model = CausalLM.open(tmp_path / "model")
    limit(model, "mlp.down_proj", 0)
    with pytest.raises(RunError, match="too little memory to run one calibration sample"):
        quantize(tmp_path, "out", model, 4)


def test_too_little_memory_to_solve_names_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("llama", tmp_path / "model")

    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(GPTQ, "quantize_all", fail)
    with pytest.raises(RunError, match=r"q_proj.*too little memory on cpu"):
        quantize(tmp_path, "out", CausalLM.open(tmp_path / "model"), 4)


def test_batches_that_wait_are_given_up_before_their_size(tmp_path: Path) -> None:
    """Out of memory for what the others hold, not for the batch: the same bytes as without."""
    tiny.build("llama", tmp_path / "model", layers=3)
    quantize(tmp_path, "whole", CausalLM.open(tmp_path / "model"), 4)
    model = CausalLM.open(tmp_path / "model")
    down = model.blocks[1].get_submodule("mlp.down_proj")
    seen = 0

    def once(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")

    down.register_forward_pre_hook(once)
    assert quantize(tmp_path, "given_up", model, 4)[0]["batch_size"] == 4
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "given_up" / path.name).read_bytes(), path.name
