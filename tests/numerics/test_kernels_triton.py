"""The GPU's low-bit products against float64, and against the CPU's exact ones.

On a machine without a GPU they run in Triton's interpreter (conftest.py), and are compiled for GPUs
that are not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.numerics import kernels
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme

pytest.importorskip("triton")

from compressor.numerics import kernels_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(
    scheme: Scheme, out: int, columns: int, *, ordered: bool = False, short: bool = True
) -> QuantizedTensor:
    """A random weight; scales fit into bfloat16 where they are to be short."""
    random = torch.Generator().manual_seed(out + columns)
    weights = scheme.weights
    groups = weights.groups(columns)
    codes = torch.randint(
        int(weights.minimum), int(weights.maximum) + 1, (out, columns), generator=random
    )
    scale = torch.rand(out, groups, generator=random) * 0.1 + 0.01
    scale = scale.to(torch.bfloat16).float() if short else scale
    zero = None
    if not weights.symmetric:
        zero = torch.randint(-8, 8, (out, groups), generator=random).to(torch.int8)
    g_idx = None
    if ordered:
        g_idx = torch.arange(columns) // (columns // groups)
        g_idx = g_idx[torch.randperm(columns, generator=random)].to(torch.int32)
    tensor = QuantizedTensor(codes.to(torch.int8), scale, zero, g_idx, weights)
    tensor.validate()
    return tensor.to(DEVICE)


def check_product(kernel: kernels.Kernel, tensor: QuantizedTensor, rows: int) -> None:
    """Against float64. The interpreter cuts off what does not fit into bfloat16 and so is given the
    same numbers in float32, in which it computes then."""
    x = inputs(rows, tensor.codes.shape[1])
    exact = x.double() @ tensor.dequantize(torch.float32).double().T
    rtol, atol = (2**-8, 1e-3) if DEVICE == "cuda" else (1e-5, 1e-4)
    got = kernel(x if DEVICE == "cuda" else x.float())
    torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=atol)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    random = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=random).to(dtype).to(DEVICE)


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize(
    ("name", "group", "symmetric", "ordered", "out", "columns"),
    [
        ("W4A16", 128, True, False, 64, 512),
        ("W4A16", 256, False, False, 33, 512),
        ("W4A16", 64, False, False, 70, 192),  # channels that are no whole program
        ("W4A16", 32, True, True, 48, 192),
        ("W4A16", 64, False, True, 33, 128),
        ("W4A16", -1, True, False, 16, 192),  # a scale per channel: steps of 64
        ("W8A16", -1, True, False, 70, 192),
        ("W8A16", 32, True, False, 40, 64),
        ("W8A16", 64, True, True, 40, 256),
    ],
)
def test_a_product_is_that_of_the_dequantized_weight(
    rows: int, name: str, group: int, symmetric: bool, ordered: bool, out: int, columns: int
) -> None:
    scheme = Scheme.parse(name, group, symmetric)
    tensor = problem(scheme, out, columns, ordered=ordered)
    kernel = kernels_triton.select(tensor, scheme, torch.bfloat16)
    assert kernel is not None and kernel.name.endswith("triton")
    check_product(kernel, tensor, rows)
    assert kernel(inputs(rows, columns)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["W4A16", "W8A16"])
@pytest.mark.parametrize("ordered", [False, True])
def test_many_rows_are_a_dense_product(name: str, ordered: bool) -> None:
    scheme = Scheme.parse(name, 32)
    tensor = problem(scheme, 24, 192, ordered=ordered)
    kernel = kernels_triton.select(tensor, scheme, torch.bfloat16)
    assert kernel is not None
    x = inputs(kernels_triton.MOST_ROWS + 1, 192)
    expected = x.double() @ tensor.dequantize(torch.float32).double().T
    assert float((kernel(x).double() - expected).norm() / expected.norm()) < 1e-2


def test_scales_that_bfloat16_does_not_hold_stay_whole() -> None:
    scheme = Scheme.parse("W4A16", 64)
    tensor = problem(scheme, 64, 128, short=False)
    kernel = kernels_triton.Int4(tensor)
    assert kernel.scale.dtype == torch.float32
    check_product(kernel, tensor, 2)
    assert kernels_triton.Int4(problem(scheme, 64, 128)).scale.dtype == torch.bfloat16


@pytest.mark.parametrize("programs", [1, 8])
def test_how_columns_are_shared_out_does_not_matter(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_triton, "_room", lambda _: programs)
    scheme = Scheme.parse("W4A16", 32)
    tensor = problem(scheme, 32, 64 * 7)  # seven steps, not as many for each
    kernel = kernels_triton.Int4(tensor)
    for _ in range(2):  # the count of arrivals is left as it was found
        check_product(kernel, tensor, 5)


@pytest.mark.parametrize("rows", [1, 5, 64, 100])
@pytest.mark.parametrize("activations", ["dynamic", "dynamic-asymmetric", "static"])
def test_int8_sums_are_exact(rows: int, activations: Any) -> None:
    scheme = Scheme.parse("W8A8", -1, activations=activations)
    tensor = problem(scheme, 52, 200)  # neither is a multiple of what the library's kernel takes
    if activations == "static":
        tensor.input_scale = torch.tensor([0.03], device=DEVICE)
    kernel = kernels_triton.select(tensor, scheme, torch.float32)
    assert isinstance(kernel, kernels_triton.Int8Activations) and not kernel.library
    x = inputs(rows, 200, torch.float32)
    reference = kernels.Int8(tensor.to("cpu"), activations == "dynamic-asymmetric")
    assert torch.equal(kernel(x).cpu(), reference(x.cpu()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 100, 1024])
def test_rows_are_rounded_as_on_the_cpu(columns: int, dtype: torch.dtype) -> None:
    x = inputs(6, columns, dtype) * torch.tensor([[1e-30], [1], [50], [0], [1e4], [-3]]).to(DEVICE)
    for asymmetric, reference in (
        (False, lambda x: (*kernels.quantize_rows(x), None)),
        (True, kernels.quantize_rows_asymmetric),
    ):
        for ours, theirs in zip(
            kernels_triton.round_rows(x, asymmetric=asymmetric), reference(x.cpu()), strict=True
        ):
            assert (ours is None and theirs is None) or torch.equal(ours.cpu(), theirs)


def test_what_has_no_kernel_is_left_to_dequantized_weights() -> None:
    for name, group, columns, dtype in (
        ("W4A16", 64, 192, torch.float32),  # it computes in bfloat16
        ("W4A16", 48, 192, torch.bfloat16),  # no whole groups in a step
        ("W4A16", 32, 96, torch.bfloat16),  # no whole steps
        ("W8A16", -1, 160, torch.bfloat16),
        ("W3A16", 64, 192, torch.bfloat16),
    ):
        scheme = Scheme.parse(name, group)
        assert kernels_triton.select(problem(scheme, 16, columns), scheme, dtype) is None


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kernels.has_triton.__wrapped__  # as found now, not kept
    monkeypatch.setattr(kernels.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert not made()
    monkeypatch.setenv("CC", "cc")
    assert made()


def run_ptx(text: str, words: torch.Tensor, outputs: int) -> list[torch.Tensor]:
    """What some assembly makes of a pair of words in each register, by the definitions of its
    instructions (PTX ISA): bfloat16 [words] of each output.

    Args:
        text: with ``$0`` and on for the outputs, then the input.
        words: int32 [2 n], of 16 bits.
        outputs: of it.
    """
    pairs = words.view(-1, 2).long()
    registers = {f"${outputs}": pairs[:, 0] | pairs[:, 1] << 16}

    def halves(value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value & 0xFFFF, value >> 16], -1).to(torch.uint16).view(torch.bfloat16)

    def value(name: str) -> torch.Tensor:
        if name in registers:
            return registers[name]
        return torch.full((len(pairs),), int(name, 0))

    for line in text.strip("{}\n").split(";\n"):
        name, _, rest = line.strip(" ;").partition(" ")
        target, *read = (part.strip() for part in rest.split(","))
        if name == ".reg":
            continue
        if name == "mov.b32":
            registers[target] = value(read[0])
        elif name == "shr.u32":
            registers[target] = value(read[0]) >> value(read[1])
        elif name == "lop3.b32":
            assert read.pop() == "0xea"  # (a and b) or c
            a, b, c = map(value, read)
            registers[target] = a & b | c
        else:
            assert name == "fma.rn.bf16x2"
            a, b, c = (halves(value(one)).double() for one in read)
            made = (a * b + c).to(torch.bfloat16).view(torch.uint16).long()
            registers[target] = made[:, 0] | made[:, 1] << 16
    return [halves(registers[f"${number}"]).flatten() for number in range(outputs)]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_assembly_makes_numbers_of_every_word(bits: int) -> None:
    """What the interpreter cannot run: it computes the same by plain operations."""
    words = torch.arange(1 << 16, dtype=torch.int32)
    parts = 16 // bits
    assembly = {4: kernels_triton._FOUR_CODES, 8: kernels_triton._TWO_CODES}[bits].value
    for part, found in enumerate(run_ptx(assembly, words, parts)):
        code = words >> (bits * part) & ((1 << bits) - 1)
        expected = 128 + code if bits == 4 else code.to(torch.int8)
        assert torch.equal(found.int(), expected.int())


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for kernel in json.loads(done.stdout):
        assert kernel["binary"] > 1000, kernel
        assert kernel["spilled"] == 0, kernel  # registers suffice
        assert kernel["tensor_cores"] == kernel["multiplies"], kernel
