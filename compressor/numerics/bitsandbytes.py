"""bitsandbytes' number formats, made and read by the library itself.

- ``nf4``, ``fp4``: a weight is flattened and cut into blocks; each block has its largest magnitude
  (``absmax``) and every value one of 16 levels of it. Levels are quantiles of a normal distribution
  (NF4; Dettmers et al., "QLoRA", arXiv 2305.14314) or a 4-bit float's (FP4). With double
  quantization the ``absmax`` are kept in 8 bits.
- ``int8``: LLM.int8() (Dettmers et al., arXiv 2208.07339): one scale per row of the weight and per
  token; input columns with a magnitude of at least ``threshold`` are multiplied unrounded.

A quantized weight is a dict of tensors with the names under which the library's modules save them:

- 4-bit: ``weight`` uint8 [out * in / 2, 1], ``weight.absmax`` float32 [blocks] (uint8 with double
  quantization, then also ``weight.nested_absmax`` and ``weight.nested_quant_map``),
  ``weight.quant_map`` float32 [16], ``weight.quant_state.bitsandbytes__nf4`` uint8 (JSON);
- int8: ``weight`` int8 [out, in], ``SCB`` float32 [out] (largest magnitude of each row),
  ``weight_format`` uint8 [].
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import nn

from compressor.errors import RunError

QuantType = Literal["nf4", "fp4", "int8"]
MINIMUM = (0, 50)  # the first versions whose CPU kernels pass the tests of every format here
INT8_LEVELS = 127
_PACKED_ROWS = 32  # rows that the library's AVX512-BF16 kernel takes at a time
# They report what is known here: a kernel that is only on the Hub, and casts to float16.
_TALKATIVE = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


def check_installed() -> str:
    """The library's version, found without importing it.

    Raises:
        RunError: it is not installed, or too old.
    """
    fix = "pip install 'compressor[bitsandbytes]'"
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        raise RunError("the library bitsandbytes is not installed", fix=fix) from None
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < MINIMUM:
        oldest = ".".join(map(str, MINIMUM))
        raise RunError(f"bitsandbytes {found} is too old, {oldest} is needed", fix=fix)
    return found


def library() -> Any:
    """The module ``bitsandbytes``.

    Raises:
        RunError: it is not installed, too old, or its own libraries cannot be loaded.
    """
    check_installed()
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise RunError(
            f"bitsandbytes cannot be loaded ({str(error).splitlines()[0]})",
            fix="install it again: pip install --force-reinstall --no-deps bitsandbytes",
        ) from error
    return bitsandbytes


def quantize_4bit(
    weight: torch.Tensor, quant_type: Literal["nf4", "fp4"], blocksize: int, double_quant: bool
) -> dict[str, torch.Tensor]:
    """Quantize a weight [out, in] of floating point; its dtype is noted in the result.

    Raises:
        ValueError: the weight is not finite.
    """
    _check_finite(weight)
    packed, state = library().functional.quantize_4bit(
        weight.contiguous(),
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
    )
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    # Clones: some of them share memory, which safetensors does not write.
    return {"weight": packed} | {key: value.clone() for key, value in parts.items()}


def quantize_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize a weight [out, in] to int8 with a scale per row, by way of float16 as the library's
    modules do.

    Raises:
        ValueError: the weight is not finite in float16.
    """
    half = weight.to(torch.float16)
    _check_finite(half)
    codes, scale, _ = library().functional.int8_vectorwise_quant(half.contiguous())
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [out, in] of a quantized weight."""
    if "SCB" in tensors:
        return tensors["weight"].float() * (tensors["SCB"].float() / INT8_LEVELS).unsqueeze(1)
    functional = library().functional
    parts = {k.removeprefix("weight."): v for k, v in tensors.items() if k != "weight"}
    state = functional.QuantState.from_dict(parts, device=tensors["weight"].device)
    state.dtype = torch.float32
    # As one row: the library's AVX512 kernel is wrong where a block spans two rows.
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    return functional.dequantize_4bit(tensors["weight"], state).view(shape)


def linear(
    tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, threshold: float
) -> nn.Module:
    """A float32 linear that computes what the library's does.

    4-bit: the product with the dequantized weight; the library's kernels differ from it by
    rounding in their compute dtype alone. int8: the library's own module, which rounds each
    token's inputs and keeps outlier columns apart.

    Args:
        tensors: a quantized weight.
        bias: [out] or None.
        threshold: of LLM.int8(); 0 keeps no column apart.
    """
    has_bias = bias is not None
    made: Any
    if "SCB" in tensors:
        modules = library().nn
        codes, scale = tensors["weight"], tensors["SCB"]
        made = modules.Linear8bitLt(
            codes.shape[1], codes.shape[0], has_bias, has_fp16_weights=False,
            threshold=threshold, device="meta",
        )  # fmt: skip
        made.weight = modules.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale
        )
    else:
        value = dequantize(tensors)
        made = nn.Linear(value.shape[1], value.shape[0], has_bias, device="meta")
        made.weight = nn.Parameter(value, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made.eval()


def prepare_modules(model: nn.Module) -> None:
    """Make every bitsandbytes module of a loaded model runnable here, and note its kernel.

    On a CPU with AVX512-BF16 the library's 4-bit linears repack themselves in blocks of rows, and
    fail where a weight does not divide into them: those are left to the library's other kernel.
    """
    modules = library().nn
    for module in model.modules():
        one: Any = module
        if isinstance(module, modules.Linear8bitLt):
            one.kernel_name = "bitsandbytes_int8"
        elif isinstance(module, modules.Linear4bit):
            state = one.weight.quant_state
            fast = one.weight.device.type == "cpu" and getattr(
                one, "support_avx512bf16_for_cpu", False
            )
            if fast and module.out_features % _PACKED_ROWS:
                one.support_avx512bf16_for_cpu = fast = False
            name = f"bitsandbytes_{state.quant_type}"
            one.kernel_name = f"{name}_avx512bf16" if fast else name


def _check_finite(weight: torch.Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight holds values that are not finite in {weight.dtype}")
