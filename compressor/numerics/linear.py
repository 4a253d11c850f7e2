"""A linear whose weight is held in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from compressor.numerics import kernels
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import ASYMMETRIC, DYNAMIC, FP8, FP8_STATIC, STATIC, Scheme

_COMPUTED = (None, DYNAMIC, ASYMMETRIC, STATIC, FP8, FP8_STATIC)


@dataclass
class _Last:
    input: torch.Tensor
    version: int | None
    group: str
    readers: set[int]
    rounded: kernels.Rounded


class SharedInputs:
    """Inputs of a model that several of its linears read, rounded to int8 once.

    The last one is held until another comes. It counts as the same where it is the same tensor,
    unaltered since as far as torch tells (inference tensors have no version), goes to the same
    group, and comes to this reader for the first time.
    """

    def __init__(self) -> None:
        self._last: _Last | None = None  # one reference: threads see it whole

    def rounded(self, x: torch.Tensor, group: str, kernel: kernels.Int8) -> kernels.Rounded:
        """What `kernel` makes of an input [..., in], or what another of its group made."""
        last, version = self._last, None if x.is_inference() else x._version
        if (
            last is not None
            and last.input is x
            and last.version == version
            and last.group == group
            and id(kernel) not in last.readers
        ):
            last.readers.add(id(kernel))
            return last.rounded
        made = kernel.rounded(x.reshape(-1, x.shape[-1]))
        self._last = _Last(x, version, group, {id(kernel)}, made)
        return made


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W quantized, and x too where the scheme says so.

    Attributes:
        kernel_name: what really computes the product.
    """

    def __init__(
        self, kernel: kernels.Kernel, bias: torch.Tensor | None, out_features: int
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.kernel_name = kernel.name
        self.out_features = out_features
        self.register_buffer("bias", bias)
        self._shared: tuple[SharedInputs, str, kernels.Int8] | None = None

    def share(self, inputs: SharedInputs, group: str) -> None:
        """Round inputs once with the other linears of a group that reads the same tensors.

        No effect on kernels that do not round them to int8 with dynamic scales.
        """
        if isinstance(self.kernel, kernels.Int8) and self.kernel.input_scale is None:
            symmetric = "symmetric" if self.kernel.sums is None else "asymmetric"
            self._shared = inputs, f"{group} {symmetric}", self.kernel

    @classmethod
    def from_tensor(
        cls,
        tensor: QuantizedTensor,
        scheme: Scheme,
        bias: torch.Tensor | None,
        *,
        kernel: Literal["reference", "auto"] = "reference",
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedLinear:
        """Build from codes.

        Args:
            tensor: the weight.
            scheme: its scheme; decides whether activations are rounded.
            bias: [out] or None.
            kernel: ``reference`` computes with dequantized weights; ``auto`` takes the fastest
                low-bit kernel of this device, or dequantized weights where it has none.
            dtype: of inputs and outputs.

        Raises:
            ValueError: the scheme rounds activations otherwise than to int8 or float8_e4m3fn with a
                scale per token or a static one (int8 with a zero point: per token), or the static
                one is missing.
        """
        if scheme.input_activations not in _COMPUTED:
            raise ValueError(
                f"activations of scheme {scheme.name} are {scheme.input_activations}; "
                "only int8, dynamic per token or static per tensor (which is symmetric), and fp8 "
                "alike, is computed"
            )
        if scheme.static_activations and tensor.input_scale is None:
            raise ValueError("the scheme has static activations, but the layer has no input_scale")
        chosen = None
        if kernel == "auto":
            chosen = kernels.select(tensor, scheme, dtype)
        if chosen is None:
            chosen = kernels.Dequantized(tensor, scheme.input_activations, dtype)
        bias = None if bias is None else bias.to(dtype)
        return cls(chosen, bias, tensor.codes.shape[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if self._shared is None:
            y = self.kernel(x.reshape(-1, x.shape[-1]))
        else:
            inputs, group, kernel = self._shared
            y = kernel.product(inputs.rounded(x, group, kernel), x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)
