"""The table of kernels, against our own kernel selection, our GGUF blocks and vLLM's own code."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from compressor.doctor import vllm_python
from compressor.models.shapes import LinearShape
from compressor.numerics import kernels
from compressor.numerics.ggml import to_blocks
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import FP8_STATIC, Scheme, WeightScheme
from compressor.support import Support, Target, check

CPU = Target("vllm", "cpu")
A100, H100, B200 = (Target("vllm", "cuda", c) for c in (80, 90, 100))
AMX, ARM = Target("vllm", "cpu", amx=True), Target("vllm", "cpu", arm=True)
OURS = Target("transformers", "cpu")
FP8_PER_TENSOR = Scheme("FP8", WeightScheme(8, strategy="tensor", type="float"), FP8_STATIC)
LLAMA_CPU, LLAMA_GPU = Target("llama.cpp", "cpu"), Target("llama.cpp", "cuda", 80)
ZERO_POINTS = Scheme.parse("W8A8", activations="dynamic-asymmetric")
SQUARE = [LinearShape("model.layers.0.self_attn.o_proj", 4096, 4096)]
EXPERT = [LinearShape("model.layers.0.mlp.experts.0.gate_up", 1536, 2048, expert=True)]


def quantized(scheme: Scheme, out: int, columns: int) -> QuantizedTensor:
    groups = scheme.weights.groups(columns)
    zero = None if scheme.weights.symmetric else torch.zeros(out, groups, dtype=torch.int8)
    static = scheme.input_activations is not None and not scheme.input_activations.dynamic
    return QuantizedTensor(
        torch.zeros(out, columns, dtype=torch.int8),
        torch.ones(out, groups),
        zero,
        None,
        scheme.weights,
        torch.ones(1) if static else None,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["W8A8", "W8A16", "W4A16", "W4A8", "W3A16", "W2A16"])
def test_our_rows_say_what_the_kernels_do(name: str, dtype: torch.dtype) -> None:
    cases = itertools.product((-1, 16, 32, 64), (True, False), (96, 64, 40), (16, 24))
    for group, symmetric, columns, out in cases:
        scheme = Scheme.parse(name, group, symmetric)
        if group > 0 and columns % group:
            continue
        target = Target("transformers", "cpu", bfloat16=dtype == torch.bfloat16)
        found = check(target, scheme, [LinearShape("layer", out, columns)])
        kernel = kernels.select(quantized(scheme, out, columns), scheme, dtype)
        expected = (
            ("dequantized", "dequantized weights") if kernel is None else ("native", kernel.name)
        )
        assert (found.level, found.kernel) == expected, (scheme, columns, out)
        assert bool(found.reason) == (kernel is None)


@pytest.mark.parametrize(
    ("target", "scheme", "shapes", "level", "words"),
    [
        (CPU, Scheme.parse("W8A8"), SQUARE, "native", "oneDNN"),
        (CPU, Scheme.parse("W8A8", activations="static"), SQUARE, "native", "oneDNN"),
        (CPU, ZERO_POINTS, SQUARE, "native", "oneDNN"),
        (A100, ZERO_POINTS, SQUARE, "native", "CUTLASS"),
        (A100, ZERO_POINTS, EXPERT, "fails", "dynamic"),
        (CPU, Scheme.parse("W8A16"), SQUARE, "fails", "W8A16"),
        (CPU, Scheme.parse("W4A16", 128), SQUARE, "native", "CPUWNA16"),
        (CPU, Scheme.parse("W4A16", 16), [LinearShape("x", 96, 48)], "fails", "48 input"),
        (CPU, Scheme.parse("W4A8", 32), SQUARE, "dequantized", "x86"),
        (Target("vllm", "cpu", arm=True), Scheme.parse("W4A8", 32), SQUARE, "native", "Dynamic4"),
        (CPU, Scheme.parse("W3A16"), SQUARE, "fails", "W3A16"),
        (CPU, Scheme.parse("W4A16", 64), EXPERT, "fails", "AMX"),
        (Target("vllm", "cpu", amx=True), Scheme.parse("W4A16", 64), EXPERT, "native", "Int4"),
        (A100, Scheme.parse("W8A8"), SQUARE, "native", "CUTLASS"),
        (B200, Scheme.parse("W8A8"), SQUARE, "fails", "below 10.0"),
        (A100, Scheme.parse("W8A8", 128), SQUARE, "fails", "groups of 128"),
        (A100, Scheme.parse("W8A8", activations="static"), EXPERT, "fails", "dynamic"),
        (Target("vllm", "cuda", 70), Scheme.parse("W4A16"), SQUARE, "fails", "7.5"),
        (H100, Scheme.parse("W4A16", 64), SQUARE, "native", "Machete"),
        (H100, Scheme.parse("W4A16", 32), SQUARE, "native", "Marlin"),
        (A100, Scheme.parse("W4A16", 64), [LinearShape("x", 96, 576)], "native", "pads 96 x 576"),
        (A100, Scheme.parse("W4A16", 256), SQUARE, "native", "Triton"),
        (A100, Scheme.parse("W8A16", symmetric=False), SQUARE, "fails", "asymmetric"),
        (H100, Scheme.parse("W8A16", symmetric=False), SQUARE, "native", "Machete"),
        (H100, Scheme.parse("W4A8"), SQUARE, "fails", "W4A8"),
        (H100, Scheme.parse("W2A16"), SQUARE, "fails", "W2A16"),
        (A100, Scheme("FP8", WeightScheme(8)), SQUARE, "native", "weights only"),
        (Target("vllm", "cuda", 89), Scheme("FP8", WeightScheme(8)), SQUARE, "native", "CUTLASS"),
        (AMX, Scheme.parse("FP8"), SQUARE, "dequantized", "one scale per tensor"),
        (CPU, Scheme.parse("FP8"), SQUARE, "dequantized", "torch._scaled_mm"),
        (CPU, Scheme.parse("FP8", activations="static"), SQUARE, "fails", "static activations"),
        (AMX, FP8_PER_TENSOR, SQUARE, "native", "AMX fp8"),
        (CPU, FP8_PER_TENSOR, SQUARE, "dequantized", "no AMX"),
        (H100, Scheme.parse("FP8"), EXPERT, "native", "fp8 experts"),
        (A100, Scheme.parse("FP8"), EXPERT, "native", "Marlin fp8 experts"),
        (H100, Scheme.parse("FP8", activations="static"), EXPERT, "fails", "dynamic"),
        (H100, FP8_PER_TENSOR, EXPERT, "native", "fp8 experts"),
        (AMX, Scheme.parse("FP8"), EXPERT, "fails", "FP8 in experts"),
        (ARM, Scheme.parse("W8A8"), EXPERT, "native", "ArmCPUExpertsInt8"),
        (CPU, Scheme.parse("W8A8"), EXPERT, "fails", "Arm"),
        (ARM, Scheme.parse("W4A8", 32), EXPERT, "native", "Dynamic4bit experts"),
        (CPU, Scheme.parse("W4A8", 32), EXPERT, "fails", "Arm"),
    ],
    ids=str,
)
def test_vllm_rows(
    target: Target, scheme: Scheme, shapes: list[LinearShape], level: str, words: str
) -> None:
    found = check(target, scheme, shapes)
    assert found.level == level, found
    assert words in f"{found.kernel} {found.reason}"


def test_the_worst_layer_decides_and_is_named() -> None:
    odd = LinearShape("model.layers.0.mlp.down_proj", 48, 4096)
    found = check(CPU, Scheme.parse("W4A16", 64), [*SQUARE, odd])
    why = (
        "no kernel for W4A16 in groups of 64: CPUWNA16: 48 output features are not a multiple of 32"
    )
    assert found == Support("fails", "", why, odd.name)


def test_a_group_index_is_read_by_no_vllm() -> None:
    for target in (CPU, A100, H100):
        assert check(target, Scheme.parse("W4A16"), SQUARE, g_idx=True).level == "fails"
    assert check(OURS, Scheme.parse("W4A16"), SQUARE, g_idx=True).level == "native"


def extremes(scheme: Scheme, out: int, columns: int) -> QuantizedTensor:
    """Every code and every zero point that the scheme allows."""
    found = quantized(scheme, out, columns)
    low, high = int(scheme.weights.minimum), int(scheme.weights.maximum)
    row = torch.arange(columns) % (high - low + 1) + low
    found.codes = row.repeat(out, 1).to(torch.int8)
    if found.zero_point is not None:
        found.zero_point[::2], found.zero_point[1::2] = low, high
    return found


def test_llama_cpp_rows_say_what_is_exported() -> None:
    cases = itertools.product(range(2, 9), (-1, 16, 32, 64), (True, False), (96, 64, 48))
    for bits, group, symmetric, columns in cases:
        scheme = Scheme.parse(f"W{bits}A16", group, symmetric)
        if group > 0 and columns % group:
            continue
        blocks = to_blocks(extremes(scheme, 16, columns))
        for target, kernel in ((LLAMA_CPU, "ggml"), (LLAMA_GPU, "MMQ")):
            found = check(target, scheme, [LinearShape("layer", 16, columns)])
            if isinstance(blocks, str):
                assert found.level == "dequantized" and found.reason, scheme
            else:
                assert found.level == "native", (scheme, columns)
                assert found.kernel == f"{kernel} {blocks.type.name}, 8-bit activations"


@pytest.mark.parametrize(
    ("target", "scheme", "shapes", "level", "words"),
    [
        (LLAMA_CPU, Scheme.parse("W8A8"), SQUARE, "native", "Q8_0, 8-bit activations"),
        (LLAMA_CPU, Scheme.parse("W5A16"), SQUARE, "native", "5 bits are stored in 8"),
        (LLAMA_CPU, Scheme.parse("W4A16", 64), [LinearShape("x", 12, 64)], "native", "repacked"),
        (LLAMA_CPU, Scheme.parse("W4A16", 64, symmetric=False), SQUARE, "native", "prompts"),
        (LLAMA_CPU, Scheme.parse("W4A16", 64), EXPERT, "native", "Q4_0"),
        (LLAMA_CPU, Scheme("FP8", WeightScheme(8, type="float")), SQUARE, "dequantized", "FP8"),
        (LLAMA_CPU, Scheme.parse("W4A16", 16), SQUARE, "dequantized", "16 columns are not whole"),
        (LLAMA_GPU, Scheme.parse("W4A16", 64), SQUARE, "native", "MMQ Q4_0"),
        (Target("llama.cpp", "cuda", 70), Scheme.parse("W8A16"), SQUARE, "native", "cuBLAS"),
        (Target("llama.cpp", "cuda", 60), Scheme.parse("W8A16"), SQUARE, "dequantized", "6.1"),
    ],
    ids=str,
)
def test_llama_cpp_rows(
    target: Target, scheme: Scheme, shapes: list[LinearShape], level: str, words: str
) -> None:
    found = check(target, scheme, shapes)
    assert found.level == level, found
    assert words in f"{found.kernel} {found.reason}"
    assert check(target, Scheme.parse("W4A16", 64), shapes, g_idx=True).level == "fails"


VLLM_SCRIPT = """
import json, sys
from types import SimpleNamespace
from vllm.model_executor.kernels.linear.mixed_precision import (
    MPLinearLayerConfig, cpu, machete, marlin, triton_w4a16)
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.scalar_type import scalar_types
import torch

class Gpu(SimpleNamespace):
    def get_device_capability(self):
        return SimpleNamespace(to_int=lambda: self.capability)
    def is_device_capability(self, capability):
        return capability == self.capability
    is_cuda = is_cuda_alike = lambda self: True
    is_cpu = is_rocm = is_xpu = lambda self: False

types = {(4, True): scalar_types.uint4b8, (4, False): scalar_types.uint4,
         (8, True): scalar_types.uint8b128, (8, False): scalar_types.uint8,
         (3, True): scalar_types.uint3b4, (2, True): scalar_types.uint2b2}
answers = []
for device, capability, bits, symmetric, group, out, columns in json.load(sys.stdin):
    config = MPLinearLayerConfig(
        full_weight_shape=(columns, out), partition_weight_shape=(columns, out),
        weight_type=types[bits, symmetric], act_type=torch.bfloat16, group_size=group,
        zero_points=not symmetric)
    if device == "cpu":
        order = [cpu.CPUWNA16LinearKernel]
    else:
        for module in (machete, marlin, triton_w4a16, marlin_utils):
            module.current_platform = Gpu(capability=capability)
        order = [machete.MacheteLinearKernel, marlin.MarlinLinearKernel,
                 triton_w4a16.TritonW4A16LinearKernel]
    answers.append(next((k.__name__ for k in order
        if k.get_min_capability() <= capability and k.can_implement(config)[0]), None))
print("answers", json.dumps(answers))
"""
_THEIRS = {
    "CPUWNA16LinearKernel": "CPUWNA16",
    "MacheteLinearKernel": "Machete",
    "MarlinLinearKernel": "Marlin",
    "TritonW4A16LinearKernel": "Triton W4A16",
    None: "",
}


@pytest.mark.slow
def test_vllm_itself_says_the_same_of_packed_weights(tmp_path: Path) -> None:
    python = vllm_python()
    if python is None:
        pytest.skip("vLLM is not installed: bash scripts/setup_vllm_cpu.sh")
    cases = [
        (target.device, target.capability, bits, symmetric, group, out, columns)
        for target in (CPU, Target("vllm", "cuda", 75), A100, H100, B200)
        for bits, symmetric in ((4, True), (4, False), (8, True), (8, False), (3, True), (2, True))
        for group in (-1, 16, 32, 64, 128, 256)
        for out, columns in ((4096, 4096), (96, 768), (48, 1536), (1000, 2048), (36, 512))
        if group == -1 or columns % group == 0
    ]
    done = subprocess.run(
        [str(python.absolute()), "-c", VLLM_SCRIPT],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("answers "))
    for case, name in zip(cases, json.loads(line.removeprefix("answers ")), strict=True):
        device, capability, bits, symmetric, group, out, columns = case
        scheme = Scheme.parse(f"W{bits}A16", group, symmetric)
        found = check(Target("vllm", device, capability), scheme, [LinearShape("x", out, columns)])
        assert found.kernel == _THEIRS[name], (case, name, found)
