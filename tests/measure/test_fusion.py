"""Small operations compiled for as long as a step is captured: the same logits, fewer kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressor.measure.engines.fusion import fused
from compressor.measure.engines.static_decoder import StaticDecoder
from compressor.numerics import grid
from compressor.numerics.linear import QuantizedLinear, SharedInputs
from compressor.numerics.scheme import Scheme
from tests import tiny
from tests.measure.test_static_decoder import LAST, tokens

BLOCKS = 2


class Compiler:
    """torch.compile up to its graphs, which are counted each time that they run."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.runs = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=self.backend)

    def backend(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def compiler() -> Compiler:
    torch.compiler.reset()
    return Compiler()


def build(arch: str, directory: Path) -> Any:
    tiny.build(arch, directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("arch", "norms", "rotary", "gates"),
    [
        ("llama", 2 * BLOCKS + 1, BLOCKS, BLOCKS),
        ("qwen3", 4 * BLOCKS + 1, BLOCKS, BLOCKS),
        ("phi3", 2 * BLOCKS + 1, BLOCKS, BLOCKS),
        ("gpt_neox", 0, BLOCKS, BLOCKS),
        ("opt", 0, 0, 0),
    ],
)
def test_a_step_is_the_same_in_fewer_pieces(
    arch: str, norms: int, rotary: int, gates: int, compiler: Compiler, tmp_path: Path
) -> None:
    model = build(arch, tmp_path)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        with fused(model, compiler) as count:
            assert count == norms + gates + bool(rotary)
            for _ in range(2):
                compiler.runs = 0
                got = model(input_ids=ids).logits
            assert compiler.runs == norms + rotary + gates  # every one is a single graph
        torch.testing.assert_close(got, expected)
        # As it was afterwards: nothing compiled is left.
        compiler.runs = 0
        assert torch.equal(model(input_ids=ids).logits, expected) and not compiler.runs
    assert all("forward" not in vars(module) for module in model.modules())


def test_blocks_share_what_was_compiled(compiler: Compiler, tmp_path: Path) -> None:
    model = build("llama", tmp_path)
    with torch.inference_mode(), fused(model, compiler):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(compiler.graphs) == 3  # a norm, a rotary embedding, a gate


@pytest.mark.parametrize("name", ["W8A8", "W4A16"])
def test_quantized_products_stay_whole(name: str, compiler: Compiler, tmp_path: Path) -> None:
    model, shared = build("llama", tmp_path), SharedInputs()
    scheme = Scheme.parse(name, -1 if name == "W8A8" else 16)
    for index, block in enumerate(model.model.layers):
        for path, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                weight = linear.weight.data
                scale, zero = grid.fit_grid(weight, scheme.weights, scale_dtype=torch.float32)
                tensor = grid.quantize(weight, scale, zero, scheme.weights, None)
                made = QuantizedLinear.from_tensor(tensor, scheme, None, kernel="auto")
                made.share(shared, f"{index} {path.split('.')[0]}")
                block.set_submodule(path, made)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        with fused(model, compiler):
            got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected)
    seen = {str(node.target) for graph in compiler.graphs for node in graph.graph.nodes}
    assert not any("mm" in target or "linear" in target for target in seen), seen
    assert all("forward" not in vars(module) for module in model.modules())


def test_decoding_is_the_same(compiler: Compiler, tmp_path: Path) -> None:
    model = build("llama", tmp_path)
    prompts = [[1, 2, 3], [4]]
    decoder = StaticDecoder(model, 2, 32, LAST)
    expected = tokens(decoder, prompts, 8)
    with fused(model, compiler):
        assert tokens(decoder, prompts, 8) == expected
    assert compiler.runs


def test_what_fails_inside_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build("llama", tmp_path)

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def fail(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("no compiler")

        return fail

    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(RuntimeError, match="no compiler"), fused(model, broken):
        model(input_ids=ids)
    assert torch.isfinite(model(input_ids=ids).logits).all()
