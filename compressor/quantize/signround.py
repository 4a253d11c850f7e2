"""SignRound: learn which way each weight is rounded from the output of the whole block.

Cheng, Zhang, Shen, Cai, He, Lv, Liu: "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs" (AutoRound), arXiv 2309.05516. Every weight gets an offset v in [-0.5, 0.5]
that is added before rounding, and every group a factor on its scale; both follow the sign of the
gradient of the block's output error, at a step that falls linearly to zero. It starts from what the
step before it rounded (GPTQ's weights with the errors of other columns spread into them), so it can
only refine: a block whose error over the whole calibration set did not fall keeps what it had.
Rounding of activations, where the scheme has any, is not part of what is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from compressor.numerics.quantized import QuantizedTensor
from compressor.quantize.registry import AlgorithmOptions, WeightResult, register

_SCALE_RANGE = (0.5, 1.5)


class SignRoundOptions(AlgorithmOptions):
    """Options of SignRound."""

    iterations: int = Field(200, ge=1, description="Steps per block.")
    batch_size: int = Field(8, ge=1, description="Calibration samples per step.")
    learning_rate: float | None = Field(
        None, gt=0, description="First step of the offsets; 1 / iterations when not given."
    )
    tune_scales: bool = Field(True, description="Learn a factor on each group's scale as well.")

    def work(self, parameters: int, width: int, length: int) -> float:
        return 6.0 * self.iterations * self.batch_size * length * parameters


@register("signround")
class SignRound:
    """Learns the rounding of a block's weights by signed gradient descent.

    Args:
        options: see `SignRoundOptions`.
        scale_dtype: dtype that scales are stored in.
    """

    Options: ClassVar[type[SignRoundOptions]] = SignRoundOptions
    kind: ClassVar[str] = "refinement"
    level: ClassVar[str] = "block"

    def __init__(self, options: SignRoundOptions, scale_dtype: torch.dtype = torch.float32) -> None:
        self.options = options
        self.scale_dtype = scale_dtype

    def refine(
        self,
        layers: Sequence[tuple[nn.Linear, WeightResult]],
        forward: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        size: int,
        seed: int,
    ) -> tuple[list[QuantizedTensor], float, float]:
        """Learn the rounding of one block.

        Args:
            layers: the block's linears (which hold their dequantized weights) and their results.
            forward: runs the block on [batch, length, hidden].
            inputs: [samples, length, hidden], what the quantized blocks before this one make.
            outputs: [samples, length, hidden], what the original block makes of its own input.
            size: samples per step, the divisor of their number nearest below ``batch_size``.
            seed: of the order of the samples.

        Returns:
            the tensor of each layer (the one it came with where nothing was gained), and the mean
            squared error of the block's output before and after.
        """
        device = layers[0][0].weight.device
        before = _loss(forward, inputs, outputs, size, device)
        held = [_Learned(linear, result, self.options.tune_scales) for linear, result in layers]
        first = self.options.learning_rate or 1.0 / self.options.iterations
        order = torch.Generator().manual_seed(seed)
        try:
            for step in range(self.options.iterations):
                rows = torch.randperm(len(inputs), generator=order)[:size]
                with torch.enable_grad():
                    for one in held:
                        one.place()
                    made = forward(inputs[rows].to(device))
                    loss = (made.float() - outputs[rows].to(device).float()).square().mean()
                    loss.backward()
                rate = first * (1 - step / self.options.iterations)
                for one in held:
                    one.move(rate)
        finally:
            for one in held:
                one.restore()
        tensors = [one.tensor(self.scale_dtype) for one in held]
        for (linear, _), tensor in zip(layers, tensors, strict=True):
            linear.weight.data.copy_(tensor.dequantize())
        after = _loss(forward, inputs, outputs, size, device)
        if after < before:
            return tensors, before, after
        for linear, result in layers:
            linear.weight.data.copy_(result.tensor.dequantize())
        return [result.tensor for _, result in layers], before, before


class _Learned:
    """What is learned of one linear, and the linear with it in place."""

    def __init__(self, linear: nn.Linear, result: WeightResult, tune_scales: bool) -> None:
        self.linear = linear
        self.parameter = linear._parameters["weight"]
        self.dtype = linear.weight.dtype
        self.old = result.tensor
        device = linear.weight.device
        self.scale = result.tensor.scale.to(device)
        self.index = result.tensor.column_groups().to(device)
        zero = result.tensor.zero_point
        self.zero = 0.0 if zero is None else zero.to(device).float()[:, self.index]
        base = result.rounded if result.rounded is not None else result.tensor.dequantize()
        self.base = base.to(device)
        # Starts where the codes are: a weight outside its own code's cell is taken to the edge.
        wanted = result.tensor.codes.to(device).float() - self.zero
        start = self.base / self.scale[:, self.index]
        self.base = torch.clamp(start, wanted - 0.499, wanted + 0.499)  # in steps of the grid
        self.offset = torch.zeros_like(self.base, requires_grad=True)
        self.factor = torch.ones_like(self.scale, requires_grad=tune_scales)

    def place(self) -> None:
        """Put the weight that the present offsets and factors stand for into the linear."""
        scheme = self.old.scheme
        factor = self.factor[:, self.index]
        exact = self.base / factor + self.offset + self.zero
        codes = exact + (exact.round() - exact).detach()
        codes = codes.clamp(scheme.minimum, scheme.maximum)
        self.linear._parameters.pop("weight", None)
        module: Any = self.linear  # a plain tensor where torch expects a parameter
        weight = (codes - self.zero) * (self.scale[:, self.index] * factor)
        module.weight = weight.to(self.dtype)

    def move(self, rate: float) -> None:
        """One signed step."""
        for leaf, low, high in ((self.offset, -0.5, 0.5), (self.factor, *_SCALE_RANGE)):
            if leaf.grad is not None:
                with torch.no_grad():
                    leaf.sub_(leaf.grad.sign(), alpha=rate).clamp_(low, high)
                leaf.grad = None

    def restore(self) -> None:
        """Give the linear its parameter back."""
        self.linear.__dict__.pop("weight", None)
        self.linear._parameters["weight"] = self.parameter

    @torch.no_grad()
    def tensor(self, scale_dtype: torch.dtype) -> QuantizedTensor:
        """The codes and scales of the present offsets and factors."""
        scheme = self.old.scheme
        scale = (self.scale * self.factor).to(scale_dtype).float()
        exact = self.base / self.factor[:, self.index] + self.offset + self.zero
        codes = exact.round().clamp(scheme.minimum, scheme.maximum).to(torch.int8)
        return dataclasses.replace(self.old, codes=codes.cpu(), scale=scale.cpu())


@torch.no_grad()
def _loss(
    forward: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    size: int,
    device: torch.device,
) -> float:
    total = 0.0
    for start in range(0, len(inputs), size):
        part = slice(start, start + size)
        made = forward(inputs[part].to(device)).float()
        difference = made - outputs[part].to(device).float()
        total += float(difference.square().sum())
    return total / outputs.numel()
