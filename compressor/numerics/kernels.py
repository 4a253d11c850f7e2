"""Products with low-bit weights: PyTorch's own CPU kernels, and a dense reference. Those of a GPU
are in `kernels_triton`.

- W8A8: ``torch._int_mm`` (int8 x int8 -> int32 through oneDNN, VNNI where the CPU has it).
- W4A16, groups of 32, 64 or 128: ``aten::_weight_int4pack_mm_for_cpu`` in bfloat16, made for few
  rows; for many the weight is dequantized into a dense product.
- W8A16: ``torch._weight_int8pack_mm`` in bfloat16, likewise.
- anything else: dequantized weights.

Activations are rounded as vLLM's dynamic per-token int8 kernels do: scale = absmax / 127, codes in
[-127, 127] (csrc/quantization/w8a8/int8: ``dynamic_scaled_int8_quant``); static ones as its
``static_scaled_int8_quant``, with a given scale and codes in [-128, 127]; those with a zero point
as its ``dynamic_scaled_int8_azp_quant``, from a token's least value (or zero) to its largest in 255
steps. float8_e4m3fn ones are rounded as its ``QuantFP8.forward_native``
(layers/quantization/input_quant_fp8.py) does: scale = absmax / 448 and at least 1 / (448 * 512),
inputs multiplied by its reciprocal and saturated.
"""

from __future__ import annotations

import functools
import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn

from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import FP8_MAX, ActivationScheme, Scheme

INT8_MAX = 127.0
INT8_STEPS = 255.0
LEAST_SCALE = torch.finfo(torch.float32).tiny  # of rows of zeros, which come out as zeros
_FP8_LEAST_SCALE = 1.0 / (FP8_MAX * 512.0)
_INT4_GROUPS = (32, 64, 128, 256)
# int8 codes [n, in], float32 scales [n, 1] or [1], int32 zero points [n, 1] or none
Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
_INT8_COLUMNS = 16  # _weight_int8pack_mm reads 16 columns at a time and past the end of others
# Rows from which a weight-only kernel loses to dequantizing into a dense bfloat16 product, measured
# with AVX-512 and its bfloat16, one and two threads, 576 x 576 to 1536 x 576.
_INT8_DENSE_ROWS = 20
_INT4_DENSE_ROWS = 40


class Kernel(nn.Module):
    """A product [n, in] -> [n, out]; ``name`` says how it is computed."""

    name: str


class Dequantized(Kernel):
    """Dense product with the dequantized weight; activations rounded when the scheme says so."""

    weight: torch.Tensor
    input_scale: torch.Tensor | None

    def __init__(
        self, tensor: QuantizedTensor, activations: ActivationScheme | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name = f"dequantized-{str(dtype).removeprefix('torch.')}"
        self.activations = activations
        self.register_buffer("weight", tensor.dequantize(dtype))
        self.register_buffer("input_scale", tensor.input_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activations is not None:
            x = rounded(x, self.activations, self.input_scale)
        return nn.functional.linear(x, self.weight)


class Int8(Kernel):
    """int8 weights per channel times int8 activations, summed exactly in int32."""

    name = "int8-int_mm"
    codes: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    sums: torch.Tensor | None

    def __init__(self, tensor: QuantizedTensor, asymmetric: bool) -> None:
        super().__init__()
        self.register_buffer("input_scale", tensor.input_scale)
        self.register_buffer("codes", tensor.codes.t())  # a view: int_mm takes it transposed
        self.register_buffer("scale", tensor.scale.view(1, -1))
        sums = tensor.codes.sum(1, dtype=torch.int32).view(1, -1) if asymmetric else None
        self.register_buffer("sums", sums)  # what a zero point adds to each output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self.rounded(x), x.dtype)

    def rounded(self, x: torch.Tensor) -> Rounded:
        """Activations [n, in] in int8."""
        if self.sums is None:
            return *quantize_rows(x, self.input_scale), None
        return quantize_rows_asymmetric(x)

    def product(self, rounded: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """The product [n, out] of what `rounded` made."""
        codes, scale, zero = rounded
        product = torch._int_mm(codes, self.codes)
        if self.sums is not None and zero is not None:
            product.addcmul_(zero, self.sums, value=-1)
        return product.float().mul_(scale).mul_(self.scale).to(dtype)


class Int4Packed(Kernel):
    """4-bit weights with a scale per group, bfloat16 activations.

    The kernel computes (code - 8) * scale + zero with unsigned codes; a zero point goes into
    ``zero``. Columns of an activation-ordered weight are sorted by group once, inputs each time.
    """

    name = "int4-int4pack_mm"
    packed: torch.Tensor
    scales_and_zeros: torch.Tensor
    order: torch.Tensor | None
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        codes, order = tensor.codes, None
        if tensor.g_idx is not None:
            order = torch.argsort(tensor.g_idx, stable=True)
            codes = codes[:, order]
        self.group_size = codes.shape[1] // tensor.scale.shape[1]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            (codes.to(torch.int32) + 8).contiguous(), 1
        )
        zero = torch.zeros_like(tensor.scale)
        if tensor.zero_point is not None:
            zero = -tensor.zero_point.float() * tensor.scale
        table = torch.stack([tensor.scale, zero], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", table.to(torch.bfloat16))  # [groups, out, 2]
        self.register_buffer("order", order)
        zero_point = None if tensor.zero_point is None else tensor.zero_point.unsqueeze(-1)
        self.register_buffer(
            "codes", codes.reshape(*tensor.scale.shape, -1)
        )  # [out, groups, group]
        self.register_buffer("scale", tensor.scale.unsqueeze(-1).to(torch.bfloat16))
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x[:, self.order]
        if len(x) >= _INT4_DENSE_ROWS:
            return nn.functional.linear(x, self._dense())
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, self.group_size, self.scales_and_zeros
        )

    def _dense(self) -> torch.Tensor:
        # Integers this small are exact in bfloat16: only the product rounds.
        weight = self.codes.to(torch.bfloat16)
        if self.zero_point is not None:
            weight -= self.zero_point
        return weight.mul_(self.scale).flatten(1)


class Int8WeightOnly(Kernel):
    """int8 weights per channel, bfloat16 activations."""

    name = "int8-int8pack_mm"
    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("codes", tensor.codes)
        self.register_buffer("scale", tensor.scale.view(-1).to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= _INT8_DENSE_ROWS:
            return nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale
        return torch._weight_int8pack_mm(x, self.codes, self.scale)


def select(tensor: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> Kernel | None:
    """The low-bit kernel of this device for a weight, or None when it has none.

    Weight-only kernels compute in bfloat16 and so need activations in it.
    """
    if tensor.codes.dtype != torch.int8:
        return None
    if tensor.codes.device.type == "cuda" and has_triton():
        from compressor.numerics import kernels_triton

        return kernels_triton.select(tensor, scheme, dtype)
    if tensor.codes.device.type != "cpu":
        return None
    weights, activations = scheme.weights, scheme.input_activations
    channel = weights.strategy == "channel" and weights.symmetric
    if weights.num_bits == 8 and channel and activations is not None:
        return Int8(tensor, not activations.symmetric)
    if activations is not None or dtype != torch.bfloat16:
        return None
    out, columns = tensor.codes.shape
    if weights.num_bits == 8 and channel and columns % _INT8_COLUMNS == 0:
        return Int8WeightOnly(tensor)
    group_size = columns // tensor.scale.shape[1]
    if weights.num_bits == 4 and group_size in _INT4_GROUPS and out % 16 == 0:
        return Int4Packed(tensor)
    return None


def c_compiler() -> str | None:
    """The C compiler that Triton would take (triton/runtime/build.py), or None."""
    return os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")


@functools.cache
def has_triton() -> bool:
    """Whether Triton makes kernels here: it is installed, and there is the C compiler that it makes
    their launchers with."""
    return find_spec("triton") is not None and c_compiler() is not None


def quantize_rows(
    x: torch.Tensor, fixed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [n, in] of activations and their scale: float32 [n, 1], one per row, or ``fixed``
    [1] where that is given."""
    values = x.float()
    if fixed is not None:
        return values.div(fixed).round_().clamp_(-128, 127).to(torch.int8), fixed
    scale = values.abs().amax(-1, keepdim=True).div_(INT8_MAX).clamp_min_(LEAST_SCALE)
    return values.div(scale).round_().to(torch.int8), scale


def quantize_rows_asymmetric(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 codes [n, in] of activations, float32 scales [n, 1] and int32 zero points [n, 1]: a
    value is (code - zero) * scale. Every row's range reaches to zero at least."""
    values = x.float()
    # Of each row by itself: on a CPU torch.aminmax reads them number by number.
    low, high = values.amin(-1, keepdim=True).clamp_(max=0), values.amax(-1, keepdim=True)
    high = high.clamp_(min=0)
    scale = (high - low).div_(INT8_STEPS).clamp_min_(LEAST_SCALE)
    zero = torch.round(-128 - low / scale)
    codes = values.div(scale).round_().add_(zero).clamp_(-128, 127).to(torch.int8)
    return codes, scale, zero.to(torch.int32)


def quantize_rows_fp8(
    x: torch.Tensor, fixed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes [n, in] of activations, and their scale as `quantize_rows` gives it."""
    values = x.float()
    if fixed is None:
        fixed = (values.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min_(_FP8_LEAST_SCALE)
    codes = (values * fixed.reciprocal()).clamp_(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), fixed


def rounded(
    x: torch.Tensor, scheme: ActivationScheme, fixed: torch.Tensor | None = None
) -> torch.Tensor:
    """What is left of activations [..., in] that are rounded by a scheme, in their own dtype.

    Args:
        x: activations.
        scheme: 8-bit integers or floats; with a zero point only integers, per token.
        fixed: float32 [1], the scale of static ones.
    """
    if not scheme.symmetric:
        codes, scale, zero = quantize_rows_asymmetric(x)
        return ((codes.float() - zero) * scale).to(x.dtype)
    quantizer = quantize_rows_fp8 if scheme.type == "float" else quantize_rows
    codes, scale = quantizer(x, fixed)
    return (codes.float() * scale).to(x.dtype)
