"""Small operations compiled for as long as a step is captured: the same logits, fewer kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.export.compressed_tensors import load_model
from compressor.measure.engines.fusion import fused
from compressor.measure.engines.static_decoder import StaticDecoder
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.siblings import Sibling
from tests import tiny
from tests.measure.test_static_decoder import LAST, tokens
from tests.speculate.decoders import load

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
    model = load(tmp_path, arch)
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


@pytest.mark.parametrize(
    ("kind", "graphs"),  # a norm, a rotary embedding, and what a gate's products leave
    [("dense", 3), ("dense siblings", 4), ("W8A8", 4)],
)
def test_blocks_share_what_was_compiled(
    kind: str, graphs: int, compiler: Compiler, tmp_path: Path
) -> None:
    if kind == "dense siblings":
        tiny.build("llama", tmp_path, num_hidden_layers=12)
        model = load_model(tmp_path, kernel="auto")
        assert any(isinstance(module, Sibling) for module in model.modules())
    else:
        model = load(tmp_path, "llama", None if kind == "dense" else kind, num_hidden_layers=12)
    with torch.inference_mode(), fused(model, compiler):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(compiler.graphs) == graphs


@pytest.mark.parametrize("name", ["W8A8", "W4A16"])
def test_quantized_products_stay_whole(name: str, compiler: Compiler, tmp_path: Path) -> None:
    model = load(tmp_path, "llama", name)
    assert any(isinstance(module, Sibling) for module in model.modules())
    assert any(
        isinstance(module, QuantizedLinear) for module in model.model.layers[0].mlp.children()
    )
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
    model = load(tmp_path)
    prompts = [[1, 2, 3], [4]]
    decoder = StaticDecoder(model, 2, 32, LAST)
    expected = tokens(decoder, prompts, 8)
    with fused(model, compiler):
        assert tokens(decoder, prompts, 8) == expected
    assert compiler.runs


def test_what_fails_inside_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = load(tmp_path)

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def fail(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("no compiler")

        return fail

    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(RuntimeError, match="no compiler"), fused(model, broken):
        model(input_ids=ids)
    assert torch.isfinite(model(input_ids=ids).logits).all()
