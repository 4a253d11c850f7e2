"""How much the model's loss rises when one linear is quantized, for every linear and scheme.

Near its optimum a model's loss grows with the square of what is changed. With g the gradient of a
token's loss (its label drawn from the model's own distribution) at the output of a linear, and E
the rounding error of the weight, the expected divergence from the original model grows by
1/2 E[(g . E x)^2] per token: the Gauss-Newton (Fisher) form of Martens & Grosse (arXiv 1503.05671)
with tokens taken as independent. That is summed over the calibration tokens exactly, for each
scheme, in one pass forward and one pass back; no linear is ever really quantized for it.

Only one block's weights are in memory at a time: the inputs of the blocks are kept on disk going
forward, and each block is run again, with gradients, going back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.models.architecture import BlockInputs, CausalLM, LinearRef
from compressor.numerics import grid
from compressor.numerics.scheme import Scheme

_ACTIVATIONS = "activations.tmp"


@dataclass(frozen=True)
class Sensitivity:
    """Of one linear.

    Attributes:
        name: key in the checkpoint, without ``.weight``.
        group: shared by linears that engines fuse into one product (they read the same input).
        parameters: weights.
        loss: predicted increase of the mean loss in nats per token, of each scheme.
        bits: stored per weight, scales and zero points included, of each scheme.
    """

    name: str
    group: str
    parameters: int
    loss: dict[str, float]
    bits: dict[str, float]


def measure_sensitivity(
    model: CausalLM,
    schemes: Sequence[Scheme],
    tokens: np.ndarray,
    directory: Path,
    *,
    observer: grid.Observer = "mse",
    batch_size: int = 4,
    seed: int = 0,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda blocks: None,
) -> list[Sensitivity]:
    """Predicted losses of every linear, in model order.

    Args:
        model: the opened model.
        schemes: grids to try; a linear whose width a group size does not divide goes without that
            scheme.
        tokens: int32 [samples, length].
        directory: holds the blocks' inputs meanwhile.
        observer: of the grids.
        batch_size: samples per forward; lowered to a divisor of the number of samples.
        seed: of the labels.
        advance: called with the number of blocks done, twice per block.
    """
    samples = len(tokens)
    batch = max(d for d in range(1, min(batch_size, samples) + 1) if samples % d == 0)
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    parts = [slice(start, start + batch) for start in range(0, samples, batch)]
    path = directory / _ACTIVATIONS
    inputs = model.embed(ids[:batch])
    shape = (len(model.blocks) + 1, samples, *inputs.hidden.shape[1:])
    kept = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
    try:
        for part in parts:
            kept[0, part] = model.embed(ids[part]).hidden.cpu().numpy()
        for index in range(len(model.blocks)):
            model.load_block(index, device, torch.float32)
            with torch.no_grad():
                for part in parts:
                    hidden = torch.from_numpy(kept[index, part]).to(device)
                    kept[index + 1, part] = model.run_block(index, hidden, inputs).cpu().numpy()
            model.unload_block(index)
            advance(1)
        draw = torch.Generator(device=device).manual_seed(seed)
        gradient = kept[-1]  # from here on the last block's output makes room for its gradient
        for row in range(samples):
            hidden = torch.from_numpy(gradient[row : row + 1].copy()).to(device)
            gradient[row : row + 1] = _head_gradient(model, hidden, ids[row : row + 1], draw)
        found: list[Sensitivity] = []
        for index in reversed(range(len(model.blocks))):
            model.load_block(index, device, torch.float32)
            found = _block(model, index, inputs, kept, parts, schemes, observer) + found
            model.unload_block(index)
            advance(1)
        return found
    finally:
        del kept
        path.unlink(missing_ok=True)


def _head_gradient(
    model: CausalLM, hidden: torch.Tensor, ids: torch.Tensor, draw: torch.Generator
) -> np.ndarray:
    """Gradient of the summed loss at the last block's output, labels drawn from the model."""
    with torch.enable_grad():
        hidden.requires_grad_(True)
        logits = model.finish(hidden, ids)[0].float()
        with torch.no_grad():
            labels = torch.multinomial(torch.softmax(logits, -1), 1, generator=draw)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient.cpu().numpy()


def _block(
    model: CausalLM,
    index: int,
    inputs: BlockInputs,
    kept: np.ndarray,
    parts: Sequence[slice],
    schemes: Sequence[Scheme],
    observer: grid.Observer,
) -> list[Sensitivity]:
    """Sensitivities of a loaded block; its input's gradient takes the place of its input."""
    refs = model.linears(index)
    errors = [_errors(ref, schemes, observer) for ref in refs]
    sums = [dict.fromkeys(each, 0.0) for each in errors]
    device = refs[0].module.weight.device
    tokens = 0
    for part in parts:
        read, made, handles = _watch(refs)
        hidden = torch.from_numpy(kept[index, part].copy()).to(device).requires_grad_(True)
        with torch.enable_grad():
            out = model.run_block(index, hidden, inputs)
        for handle in handles:
            handle.remove()
        numbers = sorted(made)
        above = torch.from_numpy(kept[index + 1, part].copy()).to(device)
        gradients = torch.autograd.grad(
            out, [hidden, *(made[n] for n in numbers)], above, allow_unused=True
        )
        kept[index, part] = gradients[0].cpu().numpy()
        tokens += hidden.shape[0] * hidden.shape[1]
        for number, gradient in zip(numbers, gradients[1:], strict=True):
            if gradient is None or not gradient.numel():
                continue
            flat = read[number].reshape(-1, read[number].shape[-1])
            slope = gradient.reshape(len(flat), -1)
            for name, error in errors[number].items():
                change = ((flat @ error.T) * slope).sum(-1)
                sums[number][name] += 0.5 * float(change.double().square().sum())
    return [
        Sensitivity(
            name=ref.name,
            group=ref.input_group,
            parameters=ref.module.weight.numel(),
            loss={name: value / tokens for name, value in total.items()},
            bits={
                s.name: stored_bits(s, ref.module.in_features) for s in schemes if s.name in total
            },
        )
        for ref, total in zip(refs, sums, strict=True)
    ]


def _watch(
    refs: Sequence[LinearRef],
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], list[Any]]:
    """(inputs, outputs) of the linears in the forward pass to come, and the hooks to remove."""
    read: dict[int, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}

    def hook(number: int) -> Callable[..., None]:
        def note(_: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
            read[number], made[number] = args[0].detach(), out

        return note

    handles = [ref.module.register_forward_hook(hook(n)) for n, ref in enumerate(refs)]
    return read, made, handles


def _errors(
    ref: LinearRef, schemes: Sequence[Scheme], observer: grid.Observer
) -> dict[str, torch.Tensor]:
    """Rounding error of the weight under each scheme that fits it."""
    weight = ref.module.weight.detach()
    found = {}
    for scheme in schemes:
        try:
            scale, zero = grid.fit_grid(weight, scheme.weights, observer)
        except ValueError:
            continue
        found[scheme.name] = (
            grid.quantize(weight, scale, zero, scheme.weights).dequantize() - weight
        )
    return found


def stored_bits(scheme: Scheme, in_features: int) -> float:
    """Bits per weight: the codes, and 16 bits per scale (and the code's bits per zero point)."""
    weights = scheme.weights
    per_group = 16 + (0 if weights.symmetric else weights.num_bits)
    return weights.num_bits + per_group * weights.groups(in_features) / in_features
