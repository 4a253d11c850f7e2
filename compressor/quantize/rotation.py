"""Rotation folded into the weights: activations without outliers, at no cost when served.

Ashkboos et al.: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456; Liu et
al.: "SpinQuant", arXiv 2405.16406, whose names these are. R1 turns the residual stream: embeddings
and whatever writes into the stream are multiplied by an orthogonal matrix, whatever reads it by the
transposed one, after the weights of the norms in between have been folded into the readers. R2
turns each head's values: v_proj's output and o_proj's input. Both are random Hadamard matrices, of
which every entry has the same size, so that an outlier in one channel is spread over all.

What is made is a checkpoint of the same architecture and the same function, in which input and
output embeddings are no longer tied (the norm before lm_head is folded into it).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from compressor.errors import RunError
from compressor.models.architecture import CausalLM, is_router
from compressor.models.checkpoint import TensorWriter, copy_others, untie
from compressor.quantize.registry import AlgorithmOptions, register

_WRITERS = frozenset({"o_proj", "down_proj", "dense", "w2", "out_proj", "c_proj", "fc2"})
_TOLERANCE = 1e-3  # relative difference of a block's output that rounding explains
_PROBE = 32  # tokens
_SHARD_BYTES = 2_000_000_000


class RotationOptions(AlgorithmOptions):
    """Options of the rotation."""

    r1: bool = Field(True, description="Turn the residual stream.")
    r2: bool = Field(True, description="Turn each attention head's values.")
    seed: int = Field(0, ge=0, description="Seed of the random signs.")

    @property
    def needs_calibration(self) -> bool:
        return False


@register("rotation")
class Rotation:
    """Rotates a whole checkpoint, before anything else is done with it."""

    Options: ClassVar[type[RotationOptions]] = RotationOptions
    kind: ClassVar[str] = "rotation"

    def __init__(self, options: RotationOptions) -> None:
        self.options = options


def random_hadamard(size: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal float64 [size, size]: a Hadamard matrix with random signs, where there is one of a
    known construction for that size (Sylvester's and Paley's); else a random orthogonal matrix."""
    base = _hadamard(size)
    if base is None:
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        return q * torch.diagonal(r).sign()
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return base * signs.unsqueeze(1) / size**0.5


@functools.cache
def _hadamard(size: int) -> torch.Tensor | None:
    """Entries of one and minus one, rows orthogonal."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(size - 1):
        return _paley(size - 1)
    for part in range(2, size // 2 + 1):
        if size % part == 0:
            left, right = _hadamard(part), _hadamard(size // part)
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def _paley(prime: int) -> torch.Tensor:
    """Paley's first construction, of size prime + 1, for a prime that is 3 modulo 4."""
    squares = {x * x % prime for x in range(1, prime)}
    residue = torch.tensor([0 if d == 0 else 1 if d in squares else -1 for d in range(prime)])
    index = (torch.arange(prime).unsqueeze(1) - torch.arange(prime)) % prime
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = residue[index].double()
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


@torch.no_grad()
def rotate_checkpoint(
    model: CausalLM,
    options: RotationOptions,
    directory: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Write the rotated checkpoint, block by block.

    Each block is run on random activations before and after, so that an architecture whose blocks
    do something else with the stream than add to it and normalise it is found out.

    Args:
        model: the opened model; its own directory gives tokenizer and other files.
        options: which rotations.
        directory: receives config.json, safetensors and the other files; must not exist.
        advance: called with 1 after each block.

    Returns:
        seed, and the largest relative difference of a block's output.

    Raises:
        RunError: this architecture cannot be rotated.
    """
    source = model.checkpoint
    generator = torch.Generator().manual_seed(options.seed)
    hidden = model.model.get_input_embeddings().weight.shape[1]
    turn = torch.eye(hidden, dtype=torch.float64)
    if options.r1:
        turn = random_hadamard(hidden, generator)
    embedding = _name_of(model, model.model.get_input_embeddings())
    head = model.model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise _refusal(model, "its output layer is not a plain matrix")
    embedding_key = model.disk_name(f"{embedding}.weight")
    head_key = model.disk_name(f"{_name_of(model, head)}.weight")
    if head_key == embedding_key or not source.has(head_key):  # tied
        head_key, head_stored = f"{_name_of(model, head)}.weight", embedding_key
    else:
        head_stored = head_key
    norm_key = model.disk_name(f"{_final_norm(model)}.weight")
    directory.mkdir(parents=True)
    writer = TensorWriter(directory, _SHARD_BYTES)
    written: set[str] = set()

    def write(key: str, value: torch.Tensor, dtype: torch.dtype) -> None:
        writer.add(key, value.to(dtype).contiguous())
        written.add(key)

    dtype = source.dtype(embedding_key)
    write(embedding_key, source.tensor(embedding_key, torch.float64) @ turn, dtype)
    gamma = source.tensor(norm_key, torch.float64)
    value = source.tensor(head_stored, torch.float64)
    write(head_key, (value * gamma if options.r1 else value) @ turn, dtype)
    if options.r1:
        write(norm_key, torch.ones_like(gamma), source.dtype(norm_key))
    worst = 0.0
    probe = model.embed(torch.arange(_PROBE).unsqueeze(0) % 7 + 1)
    for index in range(len(model.blocks)):
        model.load_block(index, "cpu", torch.float32)
        x = torch.randn(probe.hidden.shape, generator=generator)
        before = model.run_block(index, x, probe)
        _rotate_block(model, index, turn, options, generator)
        after = model.run_block(index, (x.double() @ turn).float(), probe)
        expected = (before.double() @ turn).float()
        difference = float((after - expected).norm() / expected.norm())
        worst = max(worst, difference)
        if not difference < _TOLERANCE:
            raise _refusal(model, f"block {index} computes something else when it is rotated")
        for name, parameter in model.blocks[index].named_parameters():
            key = model.disk_name(f"{model.block_names[index]}.{name}")
            write(key, parameter.detach(), source.dtype(key))
        model.unload_block(index)
        advance(1)
    for key in source.names:
        if key not in written:
            write(key, source.tensor(key, source.dtype(key)), source.dtype(key))
    writer.close()
    copy_others(source.directory, directory)
    config = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    untie(config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"seed": options.seed, "worst_block_difference": worst}


def _rotate_block(
    model: CausalLM,
    index: int,
    turn: torch.Tensor,
    options: RotationOptions,
    generator: torch.Generator,
) -> None:
    block = model.blocks[index]
    linears = {path: m for path, m in block.named_modules() if isinstance(m, nn.Linear)}
    covered = {id(p) for m in linears.values() for p in m.parameters()}
    norms = [
        module
        for _, module in block.named_children()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1
    ]
    routers = []
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2 and is_router(name.rpartition(".")[0]):
            routers.append(parameter)
        elif parameter.ndim >= 2 and id(parameter) not in covered:
            raise _refusal(model, f"{model.block_names[index]}.{name} is not a plain linear")
    if options.r1:
        if len(norms) != 2 or any(getattr(norm, "bias", None) is not None for norm in norms):
            raise _refusal(model, "its blocks do not have just two norms without bias")
        for router in routers:
            gamma: Any = norms[1].weight
            router.data = ((router * gamma).double() @ turn).float()
        for path, linear in linears.items():
            if is_router(path):
                continue
            if path.rpartition(".")[2] in _WRITERS:
                linear.weight.data = (turn.T @ linear.weight.double()).float()
                if linear.bias is not None:
                    linear.bias.data = (linear.bias.double() @ turn).float()
            else:
                norm: Any = norms[0] if "attn" in path or "attention" in path else norms[1]
                linear.weight.data = ((linear.weight * norm.weight).double() @ turn).float()
        for norm in norms:
            norm.weight.data.fill_(1.0)
    if options.r2:
        for value, output, width in _values(block, linears):
            small = random_hadamard(width, generator)
            heads = value.weight.shape[0] // width
            turned = small.T @ value.weight.double().view(heads, width, -1)
            value.weight.data = turned.view_as(value.weight).float()
            if value.bias is not None:
                value.bias.data = (value.bias.double().view(heads, width) @ small).flatten().float()
            columns = output.weight.double().view(len(output.weight), -1, width)
            output.weight.data = (columns @ small).view_as(output.weight).float()


def _values(
    block: nn.Module, linears: dict[str, nn.Linear]
) -> Iterator[tuple[nn.Linear, nn.Linear, int]]:
    """(v_proj, o_proj, head width) of a block's attention."""
    for path, value in linears.items():
        parent, _, leaf = path.rpartition(".")
        output = linears.get(f"{parent}.o_proj")
        width = getattr(block.get_submodule(parent), "head_dim", None)
        if leaf == "v_proj" and output is not None and width is not None:
            yield value, output, width


def _final_norm(model: CausalLM) -> str:
    """Name of the norm between the last block and the head."""
    found = [
        (name, module)
        for name, module in model.model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.ndim == 1
        and not any(name.startswith(f"{block}.") for block in model.block_names)
    ]
    if len(found) != 1 or getattr(found[0][1], "bias", None) is not None:
        raise _refusal(model, "it does not have just one norm without bias after its blocks")
    return found[0][0]


def _name_of(model: CausalLM, wanted: Any) -> str:
    return next(name for name, module in model.model.named_modules() if module is wanted)


def _refusal(model: CausalLM, why: str) -> RunError:
    return RunError(
        f"this architecture cannot be rotated: {why}",
        where=type(model.model).__name__,
        fix="remove the step `rotation`",
    )
