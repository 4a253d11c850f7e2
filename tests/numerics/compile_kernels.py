"""Compiles the GPU kernels for a GPU that need not be there, and prints JSON of what came out.

    python compile_kernels.py CAPABILITY

A process of its own: with TRITON_INTERPRET set Triton compiles nothing.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor.numerics import kernels_triton as own

INTEGERS = dict.fromkeys(
    ("rows", "out", "columns", "x_stride", "step_stride", "channel_stride"), "i32"
) | {"scale_stride": "i32"}
FLOATS = dict.fromkeys(("largest", "steps", "least"), "fp32")
SHAPE = {"TILE": 256, "ROWS": 16, "SPLIT": 4, "OUT": 64}
BFLOAT16 = {"x": "*bf16", "y": "*bf16", "scale": "*bf16", "zero": "*i8", "words": "*i16"}
COMMON = {"parts": "*fp32", "arrived": "*i32", "order": "*i32"}
INT8 = {"x": "*i8", "weight": "*i8", "x_zero": "*i32", "x_scale": "*fp32", "scale": "*fp32"}


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], bool]]:
    """(name, kernel, types of pointers, constants, whether it multiplies matrices)."""
    found: list[tuple[str, Any, dict[str, str], dict[str, Any], bool]] = []
    for rows in (16, 64):
        shape = SHAPE | {"ROWS": rows}
        plain = {"TYPE": tl.bfloat16, "BITS": 4, "HALVES": 1, "HAS_ZERO": False, "ORDERED": False}
        for label, changes in (
            ("int4", {}),
            ("int4 with zero points", {"HAS_ZERO": True}),
            ("int4 ordered", {"ORDERED": True}),
            ("int4 in groups of 32", {"TILE": 64}),
            ("int4 unsplit", {"SPLIT": 1}),
            ("int8 weights per channel", {"BITS": 8, "TILE": 128, "HALVES": 64}),
        ):
            found.append(
                (f"{label}, {rows} rows", own._weight_only_kernel, BFLOAT16 | COMMON,
                 shape | plain | changes, True)
            )  # fmt: skip
        for zero in (False, True):
            found.append(
                (f"int8, {rows} rows", own._int8_kernel,
                 COMMON | INT8 | {"sums": "*i32", "y": "*bf16"},
                 shape | {"TILE": 128, "HAS_ZERO": zero}, True)
            )  # fmt: skip
    for asymmetric in (False, True):
        pointers = {"x": "*bf16", "codes": "*i8", "scale": "*fp32", "zero": "*i32"}
        constants = {"ASYMMETRIC": asymmetric, "BLOCK": 4096}
        found.append(("rounding", own._round_kernel, pointers, constants, False))
    pointers = {"words": "*i16", "scale": "*bf16", "zero": "*i8", "weight": "*bf16"}
    for bits in (4, 8):
        tile = own._TILES[bits][0]
        constants = {"BITS": bits, "HAS_ZERO": bits == 4, "HALVES": 2, "TILE": tile, "OUT": 64}
        found.append((f"unpacking {bits} bits", own._unpack_kernel, pointers, constants, False))
    return found


def compiled(
    capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]
) -> dict[str, Any]:
    known = INTEGERS | FLOATS | pointers
    signature = {
        name: "constexpr" if name in constants else known[name] for name in kernel.arg_names
    }
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("columns", "out") or "_stride" in name
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 3}
    )
    ptx = made.asm["ptx"]
    return {
        "binary": len(made.asm["cubin"]),
        "spilled": ptx.count("local.u") + ptx.count("local.b"),
        "tensor_cores": bool(re.search(r"\b(wgmma\.)?mma(\.sync|_async)|\btcgen05\.mma", ptx)),
    }


def main() -> None:
    capability = int(sys.argv[1])
    rows = [
        {"kernel": name, "multiplies": multiplies, **compiled(capability, kernel, types, constants)}
        for name, kernel, types, constants, multiplies in cases()
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
