"""Which engine multiplies which scheme natively, on which device, and for which shapes.

One row for each kernel, in the engine's own order of preference: the first whose scheme, device
and shape fit is what the engine takes. Each row names the source that says so. vLLM's are of
version 0.32 (https://github.com/vllm-project/vllm/tree/v0.32.0), paths under
``vllm/model_executor``, for activations in bfloat16; "optional" kernels that need a package beside
vLLM's own (humming, conch, zentorch) are not counted. llama.cpp's are of version 0.5, paths under
``ggml/src``; what it is given is what `compressor.numerics.ggml.to_blocks` makes of a scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compressor.models.shapes import LinearShape
from compressor.numerics.scheme import DYNAMIC, Scheme

VLLM_VERSION = "0.32"
LLAMA_CPP_VERSION = "0.5"
Level = Literal["native", "dequantized", "fails"]
_WORST: tuple[Level, ...] = ("native", "dequantized", "fails")


@dataclass(frozen=True)
class Target:
    """An engine on a device.

    Attributes:
        engine: ``transformers`` (this package's own kernels in transformers' model), ``vllm`` or
            ``llama.cpp`` (which serves GGUF artifacts).
        device: ``cpu`` or ``cuda``.
        capability: compute capability of the GPU, 90 for 9.0; 0 on a CPU.
        amx: whether the CPU has AMX tiles.
        arm: whether the CPU is an Arm.
        bfloat16: whether activations are in it; only this package's own kernels ask.
    """

    engine: Literal["transformers", "vllm", "llama.cpp"]
    device: Literal["cpu", "cuda"]
    capability: int = 0
    amx: bool = False
    arm: bool = False
    bfloat16: bool = True

    def __str__(self) -> str:
        known = {"vllm": f" {VLLM_VERSION}", "llama.cpp": f" {LLAMA_CPP_VERSION}"}
        version = known.get(self.engine, "")
        if self.device == "cpu":
            return f"{self.engine}{version}, CPU"
        return f"{self.engine}{version}, CUDA {self.capability / 10:.1f}"


@dataclass(frozen=True)
class Support:
    """What an engine does with a scheme.

    Attributes:
        level: ``native``: a kernel that reads the low-bit weight; ``dequantized``: it runs, but no
            faster than in full precision; ``fails``: it will not load.
        kernel: what computes the product; empty where it fails.
        reason: why not a native kernel, or at what price; empty where there is nothing to say.
        layer: the linear that decides, empty where no shape does.
    """

    level: Level
    kernel: str
    reason: str = ""
    layer: str = ""


def _always(*_: object) -> str:
    return ""


@dataclass(frozen=True)
class _Row:
    """A kernel: ``refusal`` says why it does not take a linear, or nothing."""

    engine: str
    device: str
    kernel: str
    schemes: Callable[[Scheme], bool]
    refusal: Callable[[Scheme, LinearShape, Target], str] = _always
    level: Level = "native"
    least: int = 0  # compute capability
    below: int = 1000
    experts: bool | None = False  # for linears of experts, for others, or (None) for both
    price: Callable[[Scheme, LinearShape, Target], str] = _always


def _group(scheme: Scheme) -> int:
    """Columns per scale, -1 for channels, as engines write it."""
    return scheme.weights.group_size if scheme.weights.strategy == "group" else -1  # type: ignore[return-value]


def _is(name: str, symmetric: bool | None = True) -> Callable[[Scheme], bool]:
    def test(scheme: Scheme) -> bool:
        fits = symmetric is None or scheme.weights.symmetric == symmetric
        return scheme.name == name and fits

    return test


def _w8a8(scheme: Scheme) -> bool:
    # layers/quantization/compressed_tensors/compressed_tensors.py, _is_dynamic_token_w8a8 and
    # _is_static_tensor_w8a8: weights per channel or tensor, symmetric.
    return _is("W8A8")(scheme) and scheme.weights.strategy != "group"


def _w4a8(scheme: Scheme) -> bool:
    # The same file, _is_dynamic_token_w4a8_int.
    return _is("W4A8")(scheme) and scheme.input_activations == DYNAMIC


def _not_dynamic(scheme: Scheme, *_: object) -> str:
    # compressed_tensors_moe/compressed_tensors_moe_w8a8_int8.py does not read input_symmetric.
    return "" if scheme.input_activations == DYNAMIC else "experts need dynamic activations"


def _fp8_experts(scheme: Scheme, *_: object) -> str:
    # compressed_tensors_moe/compressed_tensors_moe_w8a8_fp8.py: "either per tensor or channelwise,
    # dynamic per token quantization".
    inputs, per_tensor = scheme.input_activations, scheme.weights.strategy == "tensor"
    if inputs is None or inputs.dynamic != per_tensor:
        return ""
    return f"experts need {'static' if per_tensor else 'dynamic'} activations"


def _fp8_static(scheme: Scheme, *_: object) -> str:
    if scheme.weights.strategy == "tensor" or not scheme.static_activations:
        return ""
    return "it computes static activations only with weights of one scale per tensor"


def _needs_arm(_: Scheme, __: LinearShape, target: Target) -> str:
    return "" if target.arm else "this CPU is not an Arm"


def _needs_tensor_scales(scheme: Scheme, *_: object) -> str:
    inputs = scheme.input_activations
    if scheme.weights.strategy == "tensor" and inputs is not None and inputs.strategy == "tensor":
        return ""
    return "it needs one scale per tensor"


def _groups(*sizes: int) -> Callable[[Scheme, LinearShape, Target], str]:
    def refusal(scheme: Scheme, *_: object) -> str:
        if _group(scheme) in sizes:
            return ""
        listed = ", ".join("channel" if size == -1 else str(size) for size in sizes)
        return f"group size {_group(scheme)} is not one of {listed}"

    return refusal


def _multiples(columns: int, rows: int) -> Callable[[Scheme, LinearShape, Target], str]:
    def refusal(_: Scheme, shape: LinearShape, __: Target) -> str:
        if shape.in_features % columns:
            return f"{shape.in_features} input features are not a multiple of {columns}"
        if shape.out_features % rows:
            return f"{shape.out_features} output features are not a multiple of {rows}"
        return ""

    return refusal


def _all(
    *tests: Callable[[Scheme, LinearShape, Target], str],
) -> Callable[[Scheme, LinearShape, Target], str]:
    def refusal(scheme: Scheme, shape: LinearShape, target: Target) -> str:
        return next((why for test in tests if (why := test(scheme, shape, target))), "")

    return refusal


def _columns(scheme: Scheme, shape: LinearShape) -> int:
    """Columns of a linear per scale."""
    return shape.in_features if _group(scheme) == -1 else _group(scheme)


def _int4pack(scheme: Scheme, shape: LinearShape, _: Target) -> str:
    group = _columns(scheme, shape)
    if group not in (32, 64, 128, 256):
        return f"groups of {group} columns are none of 32, 64, 128 and 256"
    return ""


def _whole_tiles(scheme: Scheme, shape: LinearShape, _: Target) -> str:
    group = _columns(scheme, shape)
    return f"groups of {group} columns are not whole tiles of 32" if group % 32 else ""


def _even_groups(scheme: Scheme, *_: object) -> str:
    group = _group(scheme)
    return "" if group == -1 or group % 2 == 0 else f"group size {group} is odd"


def _needs_bfloat16(_: Scheme, __: LinearShape, target: Target) -> str:
    return "" if target.bfloat16 else "it computes in bfloat16"


def _needs_amx(_: Scheme, __: LinearShape, target: Target) -> str:
    return "" if target.amx else "this CPU has no AMX"


def _marlin_pads(_: Scheme, shape: LinearShape, __: Target) -> str:
    # layers/quantization/utils/marlin_utils.py, marlin_padded_nk
    n, k = shape.out_features, shape.in_features
    if (n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0):
        return ""
    return f"Marlin pads {n} x {k} to whole tiles at every step"


def _marlin_experts(scheme: Scheme, shape: LinearShape, _: Target) -> str:
    # layers/quantization/utils/marlin_utils.py, check_moe_marlin_supports_config: hidden size (the
    # columns of gate and up) in multiples of 128, intermediate size in whole groups.
    if shape.name.endswith("gate_up") and shape.in_features % 128:
        return f"hidden size {shape.in_features} is not a multiple of 128"
    return ""


def _reference_on_x86(_: Scheme, __: LinearShape, target: Target) -> str:
    return "" if target.arm else "PyTorch has only slow reference code for it on x86"


def _ggml(kind: str) -> Callable[[Scheme], bool]:
    """Whether a scheme's codes are written in a block type: numerics/ggml.py, to_blocks."""

    def test(scheme: Scheme) -> bool:
        weights = scheme.weights
        # Codes of up to 3 bits less any zero point of theirs reach from -7 to 7.
        fits = 4 if weights.symmetric else 3
        few = "Q4_0" if weights.num_bits <= fits else "Q4_1"
        return weights.type == "int" and kind == (few if weights.num_bits <= 4 else "Q8_0")

    return test


def _ggml_blocks(scheme: Scheme, shape: LinearShape, _: Target) -> str:
    if shape.in_features % 32:
        return f"{shape.in_features} input features are not whole blocks of 32"
    if _group(scheme) % 32 and _group(scheme) != -1:
        return f"groups of {_group(scheme)} columns are not whole blocks of 32"
    if scheme.weights.num_bits == 8 and not scheme.weights.symmetric:
        return "codes less their zero point may need 9 bits"
    return ""


def _ggml_price(scheme: Scheme, shape: LinearShape, target: Target) -> str:
    told = []
    bits = scheme.weights.num_bits
    if bits not in (4, 8):
        told.append(f"{bits} bits are stored in {4 if bits < 4 else 8}")
    if target.device == "cuda" and 70 <= target.capability < 75:
        # ggml-cuda/mmq.cu, ggml_cuda_should_use_mmq, and MMQ_DP4A_MAX_BATCH_SIZE.
        told.append("64 tokens and more at once are multiplied in float16 (cuBLAS)")
    if target.device == "cpu" and _ggml("Q4_0")(scheme) and shape.out_features % 8:
        # ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type
        told.append(f"{shape.out_features} output features are not repacked by 8")
    if target.device == "cpu" and _ggml("Q4_1")(scheme):
        # It is neither in repack.cpp nor in ggml-cpu/llamafile/sgemm.cpp.
        told.append("no matrix kernel: prompts are no faster by the token than single tokens")
    return "; ".join(told)


_ROWS: tuple[_Row, ...] = (
    # numerics/kernels.py, select.
    _Row("transformers", "cpu", "int8-int_mm", _w8a8, experts=None),
    _Row("transformers", "cpu", "int8-int8pack_mm", lambda s: _is("W8A16")(s) and _group(s) == -1,
         _all(_needs_bfloat16, _multiples(16, 1)), experts=None),
    _Row("transformers", "cpu", "int4-int4pack_mm", _is("W4A16", None),
         _all(_needs_bfloat16, _int4pack, _multiples(1, 16)), experts=None),
    _Row("transformers", "cpu", "dequantized weights", lambda s: True, level="dequantized",
         experts=None),
    # numerics/kernels_triton.py, select; tensor cores take bfloat16 from 8.0.
    _Row("transformers", "cuda", "int8-triton", _w8a8, least=80, experts=None),
    _Row("transformers", "cuda", "int4-triton", _is("W4A16", None),
         _all(_needs_bfloat16, _whole_tiles), least=80, experts=None),
    _Row("transformers", "cuda", "int8-weight-only-triton", _is("W8A16"),
         _all(_needs_bfloat16, _whole_tiles), least=80, experts=None),
    _Row("transformers", "cuda", "dequantized weights", lambda s: True, level="dequantized",
         experts=None),
    # kernels/linear/scaled_mm/cpu.py, CPUInt8ScaledMMLinearKernel (oneDNN): no condition.
    _Row("vllm", "cpu", "oneDNN int8", _w8a8),
    # kernels/linear/mixed_precision/cpu.py, CPUWNA16LinearKernel: uint4 and uint4b8 only.
    _Row("vllm", "cpu", "CPUWNA16", _is("W4A16", None), _all(_even_groups, _multiples(32, 32))),
    # kernels/linear/mixed_precision/dynamic_4bit.py: KleidiAI on Arm. On x86 the operator exists
    # too, as reference code (20 times slower than float32, PyTorch 2.13, 2048 x 2048).
    _Row("vllm", "cpu", "Dynamic4bit", _w4a8, _reference_on_x86),
    _Row("vllm", "cpu", "Dynamic4bit", _w4a8, level="dequantized"),
    # kernels/linear/scaled_mm/cpu.py, CPUFp8PerTensorScaledMMLinearKernel: AMX, and one scale per
    # tensor. Per channel, CPUs with AMX-FP8 aside (CPUFP8W8A8ScaledMMLinearKernel, not counted),
    # torch._scaled_mm is left (scaled_mm/pytorch.py, ChannelWiseTorchFP8ScaledMMLinearKernel).
    _Row("vllm", "cpu", "AMX fp8, weights only", _is("FP8"),
         _all(_needs_tensor_scales, _needs_amx, _multiples(1, 32))),
    # That takes 49 times bfloat16's time (4 x 1024 x 1024, one core of an AMD EPYC); with static
    # activations stops at "narrow() cannot be applied to a 0-dim tensor".
    _Row("vllm", "cpu", "torch._scaled_mm", _is("FP8"), _fp8_static, level="dequantized"),
    # layers/fused_moe/experts/cpu_moe.py, CPUExpertsInt8 and CPUExpertsInt4: x86 with AMX; W4A16 in
    # groups (compressed_tensors_moe_wna16.py: "channelwise is not supported by this kernel").
    _Row("vllm", "cpu", "CPUExpertsInt8", _w8a8, _all(_not_dynamic, _needs_amx, _multiples(32, 32)),
         experts=True),
    _Row("vllm", "cpu", "CPUExpertsInt4", lambda s: _is("W4A16")(s) and _group(s) != -1,
         _needs_amx, experts=True),
    # The same file, ArmCPUExpertsInt8; cpu_int4_moe.py, CPUExpertsInt4 (KleidiAI): Arm.
    _Row("vllm", "cpu", "ArmCPUExpertsInt8", _w8a8,
         _all(_not_dynamic, _needs_arm, _multiples(32, 32)), experts=True),
    _Row("vllm", "cpu", "Dynamic4bit experts", _w4a8, _all(_needs_arm, _groups(-1, 32, 64, 128)),
         experts=True),
    # layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py: 7.5 and up;
    # csrc/stable/quantization/w8a8/cutlass/scaled_mm_c3x_sm100.cu: "int8 not supported on SM100".
    _Row("vllm", "cuda", "CUTLASS int8", _w8a8, least=75, below=100),
    # kernels/linear/mixed_precision/machete.py: 9.0 exactly; groups and shapes from
    # layers/quantization/utils/machete_utils.py.
    _Row("vllm", "cuda", "Machete", lambda s: s.name in ("W4A16", "W8A16"),
         _all(_groups(-1, 64, 128), _multiples(64, 128)), least=90, below=91),
    # kernels/linear/mixed_precision/marlin.py: 7.5 and up; with zero points 4 bits only
    # (marlin_utils.py, query_marlin_supported_quant_types).
    _Row("vllm", "cuda", "Marlin", lambda s: _is("W4A16", None)(s) or _is("W8A16")(s),
         _groups(-1, 32, 64, 128), least=75, price=_marlin_pads),
    # kernels/linear/mixed_precision/triton_w4a16.py; the scheme itself asks for 7.5
    # (schemes/compressed_tensors_wNa16.py, get_min_capability).
    _Row("vllm", "cuda", "Triton W4A16", _is("W4A16", None),
         _all(_groups(-1, 32, 64, 128, 256), _multiples(1, 8)), least=75),
    # schemes/compressed_tensors_w8a8_fp8.py: 8.9 and up; below, compressed_tensors.py takes
    # CompressedTensorsW8A16Fp8 (7.5 and up): Marlin, activations left as they are.
    _Row("vllm", "cuda", "CUTLASS fp8", _is("FP8"), least=89),
    _Row("vllm", "cuda", "Marlin fp8, weights only", _is("FP8"), least=75, below=89),
    # layers/fused_moe/oracle/int8.py (Triton, 7.5) and compressed_tensors_moe_w8a8_int8.py.
    _Row("vllm", "cuda", "Triton int8 experts", _w8a8, _not_dynamic, least=75, experts=True),
    # layers/fused_moe/oracle/int_wna16.py, experts/marlin_moe.py.
    _Row("vllm", "cuda", "Marlin experts", lambda s: _is("W4A16", None)(s) or _is("W8A16")(s),
         _all(_groups(-1, 32, 64, 128), _marlin_experts), least=75, experts=True),
    _Row("vllm", "cuda", "Triton WNA16 experts",
         lambda s: (_is("W4A16", None)(s) or _is("W8A16")(s)) and _group(s) != -1,
         least=75, experts=True),
    # layers/fused_moe/oracle/fp8.py: Triton or faster from 8.9; below, Marlin (7.5 and up,
    # experts/marlin_moe.py), activations left as they are.
    _Row("vllm", "cuda", "fp8 experts", _is("FP8"), _fp8_experts, least=89, experts=True),
    _Row("vllm", "cuda", "Marlin fp8 experts, weights only", _is("FP8"), _fp8_experts, least=75,
         below=89, experts=True),
    # ggml-cpu/ggml-cpu.c, type_traits_cpu: a dot product of every block type, for any shape, with
    # activations rounded to Q8_0 or Q8_1. What no block holds is exported in 16 bits.
    *(_Row("llama.cpp", "cpu", f"ggml {kind}, 8-bit activations", _ggml(kind), _ggml_blocks,
           experts=None, price=_ggml_price) for kind in ("Q4_0", "Q4_1", "Q8_0")),
    _Row("llama.cpp", "cpu", "16-bit weights", lambda s: True, level="dequantized", experts=None),
    # ggml-cuda/mmq.cu, ggml_cuda_should_use_mmq: the integer dot product of 6.1 and up
    # (ggml-cuda/common.cuh, GGML_CUDA_CC_DP4A); below, weights are dequantized for cuBLAS.
    *(_Row("llama.cpp", "cuda", f"MMQ {kind}, 8-bit activations", _ggml(kind), _ggml_blocks,
           least=61, experts=None, price=_ggml_price) for kind in ("Q4_0", "Q4_1", "Q8_0")),
    _Row("llama.cpp", "cuda", "16-bit weights", lambda s: True, level="dequantized", experts=None),
)  # fmt: skip


def check(
    target: Target, scheme: Scheme, shapes: Sequence[LinearShape], *, g_idx: bool = False
) -> Support:
    """What an engine does with linears of one scheme: the worst over their shapes.

    Args:
        target: engine and device.
        scheme: of the linears.
        shapes: theirs; without any, shapes are taken to fit.
        g_idx: whether a group index per column is stored (activation order without static groups).
    """
    if g_idx and target.engine == "vllm" and scheme.weights.strategy == "group":
        # compressed_tensors.py, from_config: "group/dynamic activation ordering is no longer
        # supported"; schemes/compressed_tensors_wNa16.py makes no weight_g_idx.
        return Support("fails", "", "activation order without static_groups is not read")
    if g_idx and target.engine == "llama.cpp" and scheme.weights.strategy == "group":
        return Support("fails", "", "GGUF has no columns grouped by activation order")
    if g_idx and (target.engine, target.device, scheme.name) == ("transformers", "cuda", "W8A16"):
        return Support("dequantized", "dequantized weights", "columns grouped by activation order")
    found = [_one(target, scheme, shape) for shape in shapes or (LinearShape("", 4096, 4096),)]
    worst = max(found, key=lambda one: _WORST.index(one.level))
    kernels = sorted({one.kernel for one in found if one.level == worst.level and one.kernel})
    told = next((one for one in found if one.level == worst.level and one.reason), worst)
    return Support(worst.level, " and ".join(kernels), told.reason, told.layer)


def _one(target: Target, scheme: Scheme, shape: LinearShape) -> Support:
    """The first kernel that takes a linear, or why none does."""
    group = _group(scheme)
    if group > 0 and shape.in_features % group:
        why = f"group size {group} does not divide the {shape.in_features} input features"
        return Support("fails", "", why, shape.name)
    refusals: list[str] = []
    decides = ""  # the linear, where its shape does
    for row in _ROWS:
        if (row.engine, row.device) != (target.engine, target.device) or not row.schemes(scheme):
            continue
        if row.experts not in (None, shape.expert):
            continue
        if target.device == "cuda" and not row.least <= target.capability < row.below:
            refusals.append(_capabilities(row))
        elif why := row.refusal(scheme, shape, target):
            refusals.append(f"{row.kernel}: {why}")
            decides = shape.name
        else:
            price = row.price(scheme, shape, target)
            if row.level == "dequantized":
                return Support(row.level, row.kernel, _no_kernel(scheme, shape, refusals), decides)
            return Support(row.level, row.kernel, price, shape.name if price else "")
    return Support("fails", "", _no_kernel(scheme, shape, refusals), decides)


def _no_kernel(scheme: Scheme, shape: LinearShape, refusals: Sequence[str]) -> str:
    """What there is no kernel for, and what kept those away that come close."""
    weights = scheme.weights
    grid = "" if weights.symmetric else "asymmetric "
    groups = f" in groups of {weights.group_size}" if weights.strategy == "group" else ""
    found = f"no kernel for {grid}{scheme.name}{groups}{' in experts' if shape.expert else ''}"
    return f"{found}: {'; '.join(dict.fromkeys(refusals))}" if refusals else found


def _capabilities(row: _Row) -> str:
    least, below = row.least / 10, row.below / 10
    if row.below == row.least + 1:
        return f"{row.kernel} is for compute capability {least:.1f} alone"
    if row.below < 1000:
        return f"{row.kernel} is for compute capability {least:.1f} to below {below:.1f}"
    return f"{row.kernel} needs compute capability {least:.1f}"
