"""Decoding in buffers of fixed shapes: the same tokens, nothing that a CUDA graph cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from compressor.measure.engines.static_decoder import StaticDecoder, StaticDecoders
from compressor.measure.engines.transformers import TransformersEngine
from tests import tiny

LAST = {"logits_to_keep": 1}
# Values and shapes that come to Python, and tensors made from its numbers (``torch.tensor``), which
# are copied from memory that a graph cannot read.
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh")


@pytest.fixture(params=["llama", "qwen3", "phi3", "gpt_neox"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    tiny.build(request.param, tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()


def tokens(decoder: StaticDecoder, prompts: list[list[int]], steps: int) -> list[list[int]]:
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts])
    found = [decoder.begin(ids, mask).clone()]
    found += [decoder.step().clone() for _ in range(steps - 1)]
    return torch.cat(found, 1).tolist()


@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 9, 1)])
def test_tokens_are_those_of_a_growing_cache(model: Any, lengths: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(0, 64, (n,), generator=random).tolist() for n in lengths]
    engine = TransformersEngine(lambda _: model)
    engine.start()
    expected = torch.cat([step for step, _ in engine.steps(prompts, 12)], 1).tolist()
    decoder = StaticDecoder(model, 3, 32, LAST)
    assert decoder.launch == "no graphs on cpu"
    assert tokens(decoder, prompts, 12) == expected
    other = [prompt[::-1] for prompt in prompts]
    tokens(decoder, other, 5)
    assert tokens(decoder, prompts, 12) == expected  # nothing is left of the last batch


class NothingWaits(TorchDispatchMode):
    """Fails where a tensor's value comes to Python, or a shape follows from one: a graph that is
    replayed would have the values of when it was captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, name
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_nothing(model: Any) -> None:
    decoder = StaticDecoder(model, 2, 32, LAST)
    tokens(decoder, [[1, 2, 3], [4]], 3)
    with NothingWaits():
        decoder.step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingWaits():
        torch.ones(1).item()


def test_sizes_that_do_not_fit_are_refused(model: Any) -> None:
    decoder = StaticDecoder(model, 2, 8, LAST)
    with pytest.raises(ValueError, match="do not fit"):
        decoder.begin(torch.ones(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit"):
        decoder.begin(torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))


def test_decoders_are_used_again() -> None:
    made: list[Any] = []

    class Decoder:
        launch = "here"

        def __init__(self, batch: int, capacity: int) -> None:
            self.batch, self.capacity = batch, capacity
            made.append((batch, capacity))

    decoders = StaticDecoders([1, 3, 4, 20], 192, Decoder)  # type: ignore[arg-type]
    assert decoders.launch is None
    decoders.prepare()
    assert made == [(1, 256), (4, 256), (32, 256)]  # powers of two, and what is longest anyway
    assert decoders.launch == "here"
    first = decoders.fitting(2, 100)
    assert first is not None and first.batch == 4  # the smallest that fits
    assert decoders.fitting(4, 256) is first
    assert decoders.fitting(33, 10) is None  # that many run kernel by kernel
    assert len(made) == 3
    longer = decoders.fitting(4, 300)
    assert longer is not None and longer.capacity == 384
    assert decoders.fitting(3, 10) is longer and len(made) == 4  # the shorter one is gone
    decoders.clear()
    assert decoders.launch is None
