"""Linears that read one input, computed as one product.

q_proj, k_proj and v_proj read the same activations, and so do gate_proj and up_proj. As engines do
that hold their weights as one (vLLM's QKVParallelLinear and MergedColumnParallelLinear), this makes
fewer and larger products: a decode step of few tokens waits for launches as much as for memory, and
activations that are to be rounded are rounded once. Each output channel is the same sum, perhaps in
another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme


class Siblings(nn.Module):
    """The product that several linears share.

    It is held until the last of them has taken its part, or another input comes. An input counts as
    the same where it is the same tensor, unaltered since as far as torch tells (inference tensors
    have no version), and comes to this reader for the first time.

    Args:
        linear: [..., in] -> [..., sum of `sizes`].
        sizes: output channels of each.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = tuple(sizes)
        self._places = [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]
        # Input, its version, the product, and a bit for each linear that took its part: one
        # reference, which threads see whole.
        self._last: tuple[torch.Tensor, int | None, torch.Tensor, int] | None = None

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the linear of an index makes of an input [..., in]: a view of the product."""
        version, reader = None if x.is_inference() else x._version, 1 << index
        last = self._last
        if last is not None and last[0] is x and last[1] == version and not last[3] & reader:
            product, readers = last[2], last[3] | reader
        else:
            product, readers = self.linear(x), reader
        done = readers == (1 << len(self.sizes)) - 1
        self._last = None if done else (x, version, product, readers)
        first, size = self._places[index]
        return product.narrow(-1, first, size)


class Sibling(nn.Module):
    """One linear of `Siblings`."""

    def __init__(self, siblings: Siblings, index: int) -> None:
        super().__init__()
        self.siblings, self.index = siblings, index
        self.out_features = siblings.sizes[index]

    @property
    def kernel_name(self) -> str | None:
        """What computes the product; None for a dense one."""
        return getattr(self.siblings.linear, "kernel_name", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.siblings.part(self.index, x)


def quantized(
    weights: Sequence[tuple[QuantizedTensor, Scheme, torch.Tensor | None]],
    *,
    kernel: Literal["reference", "auto"] = "auto",
    dtype: torch.dtype = torch.float32,
) -> list[nn.Module]:
    """Linears of quantized weights that read one input: siblings, or each by itself where they
    differ in scheme, in the order of their columns, in the scale of their inputs, or some alone
    have a bias.

    Args:
        weights: (weight, scheme, bias [out] or None) of each.
        kernel, dtype: see `QuantizedLinear.from_tensor`.
    """
    scheme = weights[0][1]
    tensor = joined([weight for weight, _, _ in weights]) if len(weights) > 1 else None
    biases = [one for _, _, one in weights if one is not None]
    if (
        tensor is None
        or any(one != scheme for _, one, _ in weights)
        or len(biases) not in (0, len(weights))
    ):
        return [
            QuantizedLinear.from_tensor(*weight, kernel=kernel, dtype=dtype) for weight in weights
        ]
    bias = torch.cat(biases) if biases else None
    linear = QuantizedLinear.from_tensor(tensor, scheme, bias, kernel=kernel, dtype=dtype)
    return _split(linear, [len(weight.codes) for weight, _, _ in weights])


def dense(linears: Sequence[nn.Linear]) -> list[nn.Module]:
    """Linears that read one input: siblings, with copies of their weights in place of them, or as
    they are where they differ in width, dtype or device or some alone have a bias."""
    first = linears[0]
    if len(linears) == 1 or any(
        (one.bias is None) != (first.bias is None)
        or one.in_features != first.in_features
        or one.weight.dtype != first.weight.dtype
        or one.weight.device != first.weight.device
        for one in linears
    ):
        return list(linears)
    sizes = [one.out_features for one in linears]
    linear = nn.Linear(first.in_features, sum(sizes), bias=first.bias is not None, device="meta")
    for name in dict(first.named_parameters()):
        whole = torch.cat([getattr(one, name).data for one in linears])
        setattr(linear, name, nn.Parameter(whole, requires_grad=False))
    return _split(linear.eval(), sizes)


def _split(linear: nn.Module, sizes: Sequence[int]) -> list[nn.Module]:
    siblings = Siblings(linear, sizes)
    return [Sibling(siblings, index) for index in range(len(sizes))]


def joined(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """One weight with the output channels of all; None where they differ in width, in grid, in the
    order of their columns or in the scale of their inputs."""
    first = tensors[0]
    if any(
        one.scheme != first.scheme
        or one.codes.shape[1] != first.codes.shape[1]
        or one.scale.shape[1] != first.scale.shape[1]
        or not _equal(one.g_idx, first.g_idx)
        or not _equal(one.input_scale, first.input_scale)
        for one in tensors
    ):
        return None
    zero = None
    if first.zero_point is not None:
        zero = torch.cat([one.zero_point for one in tensors if one.zero_point is not None])
    return replace(
        first,
        codes=torch.cat([one.codes for one in tensors]),
        scale=torch.cat([one.scale for one in tensors]),
        zero_point=zero,
    )


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
