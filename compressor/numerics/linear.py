"""A linear whose weight is held in few bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from compressor.numerics import kernels
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import ASYMMETRIC, DYNAMIC, FP8, FP8_STATIC, STATIC, Scheme

_COMPUTED = (None, DYNAMIC, ASYMMETRIC, STATIC, FP8, FP8_STATIC)


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
        y = self.kernel(x.reshape(-1, x.shape[-1]))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)
