"""Products with low-bit weights on a GPU, for the few rows of a decode step, as Triton kernels.

Such a product takes as long as reading the weight does. So the weight stays packed until it is in
registers, where it is the left operand of the tensor cores and the activations are the right one:
of them there are few. A program holds `_OUT` output channels, and several share the columns of a
channel where there are fewer channels than the device has room for; the last to arrive adds up
what all found, always in one order.

- `Int4`: 2 codes a byte, `tile` columns together ([columns / tile, out, tile / 2] bytes: what a
  program reads at once lies together). The first half of a tile is in the low halves of the bytes.
- `Int8WeightOnly`: codes [out, columns] as they are.
- `Int8Activations`: the same, times int8 activations, which one more kernel rounds; sums are exact.

More than `MOST_ROWS` rows are a dense product (``torch._int_mm`` where activations are int8).
Import only where Triton is installed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from compressor.numerics import kernels
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme

MOST_ROWS = 64
_OUT = 64  # output channels of a program: the least that Hopper's tensor cores take
_TILES = (128, 64, 32)  # columns of a step, the best first
_WARPS, _STAGES = 4, 4
_PER_PROCESSOR = 4  # programs
_PROGRAMS = 1024  # most that share columns: what the workspace is made for
_LEAST_MAJOR = 8  # compute capability from which tensor cores take bfloat16
_INT_MM = 8  # what ``torch._int_mm`` wants columns and channels to be a multiple of


@functools.cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs that share columns put what they found, and count who has arrived (0 between
    products). One a device and never another: CUDA graphs hold its address. So products on two
    streams of a device must wait for each other."""
    parts = torch.empty(_PROGRAMS * _OUT * MOST_ROWS, dtype=torch.float32, device=device)
    return parts, torch.zeros(_PROGRAMS, dtype=torch.int32, device=device)


@functools.cache
def _room(device: torch.device) -> int:
    """Programs that a device should have."""
    processors = 8
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(_PROGRAMS, _PER_PROCESSOR * processors)


def _shape(out: int, steps: int, rows: int, device: torch.device) -> dict[str, int]:
    """How a product is split up: rows of a tile (a power of two, 16 at least) and programs that
    share a channel's columns."""
    tiles = triton.cdiv(out, _OUT)
    split = max(1, min(steps, _room(device) // tiles))
    return {"ROWS": max(16, triton.next_power_of_2(rows)), "SPLIT": split, "OUT": _OUT}


def _tile(group_size: int) -> int | None:
    return next((tile for tile in _TILES if group_size % tile == 0), None)


def _groups(tensor: QuantizedTensor) -> tuple[int, int]:
    """Columns of a group, and of a step within one."""
    group_size = tensor.codes.shape[1] // tensor.scale.shape[1]
    tile = _tile(group_size)
    assert tile is not None, "see `select`"
    return group_size, tile


class Int4(kernels.Kernel):
    """4-bit weights in groups, bfloat16 activations; zero points and ordered columns too."""

    name = "int4-triton"
    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        codes, order = tensor.codes, None
        if tensor.g_idx is not None:
            order = torch.argsort(tensor.g_idx, stable=True).to(torch.int32)
            codes = codes[:, order]
        self.out, self.columns = codes.shape
        self.group_size, self.tile = _groups(tensor)
        halves = (codes.to(torch.int16) + 8).to(torch.uint8).view(self.out, -1, 2, self.tile // 2)
        packed = (halves[:, :, 0] | (halves[:, :, 1] << 4)).transpose(0, 1).contiguous()
        self.register_buffer("packed", packed)  # [columns / tile, out, tile / 2]
        self.register_buffer("scale", _scales(tensor.scale))  # [groups, out]
        zero = tensor.zero_point
        self.register_buffer("zero_point", None if zero is None else zero.t().contiguous())
        self.register_buffer("order", order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > MOST_ROWS:
            if self.order is not None:
                x = x[:, self.order]
            return nn.functional.linear(x, self.dense())
        return _weight_only(
            x, self.packed, self.scale, self.zero_point, self.order,
            out=self.out, group_size=self.group_size, tile=self.tile, bits=4,
        )  # fmt: skip

    def dense(self) -> torch.Tensor:
        """The weight [out, columns] in bfloat16, columns in the order of their groups."""
        weight = torch.empty(
            self.out, self.columns, dtype=torch.bfloat16, device=self.packed.device
        )
        grid: Any = (triton.cdiv(self.out, _OUT), len(self.packed))
        zero = self.scale if self.zero_point is None else self.zero_point
        _unpack_kernel[grid](
            self.packed, self.scale, zero, weight, self.out, self.columns, self.group_size,
            HAS_ZERO=self.zero_point is not None, TILE=self.tile, OUT=_OUT,
        )  # fmt: skip
        return weight


class Int8WeightOnly(kernels.Kernel):
    """8-bit weights per channel or in groups, bfloat16 activations; symmetric."""

    name = "int8-weight-only-triton"
    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.group_size, self.tile = _groups(tensor)
        self.register_buffer("codes", tensor.codes.contiguous())
        self.register_buffer("scale", _scales(tensor.scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = len(self.codes)
        if len(x) > MOST_ROWS:
            return nn.functional.linear(x, self.dense())
        return _weight_only(
            x, self.codes, self.scale, None, None,
            out=out, group_size=self.group_size, tile=self.tile, bits=8,
        )  # fmt: skip

    def dense(self) -> torch.Tensor:
        """The weight [out, columns] in bfloat16."""
        codes = self.codes.to(torch.bfloat16).view(len(self.codes), len(self.scale), -1)
        return (codes * self.scale.t().to(torch.bfloat16).unsqueeze(-1)).flatten(1)


class Int8Activations(kernels.Int8):
    """int8 weights per channel times int8 activations, summed exactly in int32."""

    name = "int8-triton"

    def __init__(self, tensor: QuantizedTensor, asymmetric: bool) -> None:
        super().__init__(tensor, asymmetric)
        out, columns = tensor.codes.shape
        self.library = out % _INT_MM == 0 and columns % _INT_MM == 0

    def rounded(self, x: torch.Tensor) -> kernels.Rounded:
        if self.input_scale is not None:
            return super().rounded(x)
        return round_rows(x, asymmetric=self.sums is not None)

    def product(self, rounded: kernels.Rounded, dtype: torch.dtype) -> torch.Tensor:
        codes, scale, zero = rounded
        rows, (columns, out) = len(codes), self.codes.shape
        if rows > MOST_ROWS and self.library:
            return super().product(rounded, dtype)
        y = torch.empty(rows, out, dtype=dtype, device=codes.device)
        parts, arrived = _workspace(codes.device)
        tile = _TILES[0]
        for first in range(0, rows, MOST_ROWS):
            some = slice(first, first + MOST_ROWS)
            count = len(codes[some])
            shape = _shape(out, triton.cdiv(columns, tile), count, codes.device)
            grid: Any = (triton.cdiv(out, _OUT), shape["SPLIT"])
            _int8_kernel[grid](
                codes[some], scale if len(scale) == 1 < rows else scale[some],
                codes if zero is None else zero[some],
                self.codes, self.scale, self.codes if self.sums is None else self.sums, y[some],
                parts, arrived, count, out, columns,
                codes.stride(0), self.codes.stride(1), int(scale.numel() > 1),
                HAS_ZERO=zero is not None, TILE=tile, **shape,
                num_warps=_WARPS, num_stages=_STAGES,
            )  # fmt: skip
        return y


def select(tensor: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> kernels.Kernel | None:
    """See `kernels.select`: int8 with int8 activations, and 4 or 8 bits with bfloat16 ones."""
    device = tensor.codes.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < _LEAST_MAJOR:
        return None
    weights, activations = scheme.weights, scheme.input_activations
    if activations is not None:
        if weights.num_bits == 8 and weights.strategy == "channel" and weights.symmetric:
            return Int8Activations(tensor, not activations.symmetric)
        return None
    if dtype != torch.bfloat16 or _tile(tensor.codes.shape[1] // tensor.scale.shape[1]) is None:
        return None
    if weights.num_bits == 4:
        return Int4(tensor)
    if weights.num_bits == 8 and weights.symmetric and tensor.g_idx is None:
        return Int8WeightOnly(tensor)
    return None


def round_rows(x: torch.Tensor, *, asymmetric: bool) -> kernels.Rounded:
    """`kernels.quantize_rows`, or `kernels.quantize_rows_asymmetric`, in one kernel."""
    rows, columns = x.shape
    x = x.contiguous()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    zero = torch.empty(rows, 1, dtype=torch.int32, device=x.device) if asymmetric else None
    block = triton.next_power_of_2(columns)
    grid: Any = (rows,)
    _round_kernel[grid](
        x, codes, scale, scale if zero is None else zero, columns,
        kernels.INT8_MAX, kernels.INT8_STEPS, kernels.LEAST_SCALE,
        ASYMMETRIC=asymmetric, BLOCK=block, num_warps=min(16, max(1, block // 1024)),
    )  # fmt: skip
    return codes, scale, zero


def _scales(scale: torch.Tensor) -> torch.Tensor:
    """[groups, out]: in bfloat16 where that holds them exactly, as it does for artifacts in it."""
    short = scale.to(torch.bfloat16)
    same = torch.equal(short.float(), scale.float())
    return (short if same else scale.float()).t().contiguous()


def _weight_only(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    order: torch.Tensor | None,
    *,
    out: int,
    group_size: int,
    tile: int,
    bits: int,
) -> torch.Tensor:
    """The product [rows, out] of bfloat16 activations with a packed weight."""
    x = x.contiguous()
    rows, columns = x.shape
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    parts, arrived = _workspace(x.device)
    step, channel = (weight.stride(0), weight.stride(1)) if bits == 4 else (tile, weight.stride(0))
    shape = _shape(out, columns // tile, rows, x.device)
    grid: Any = (triton.cdiv(out, _OUT), shape["SPLIT"])
    _weight_only_kernel[grid](
        x, weight, scale, scale if zero is None else zero, weight if order is None else order, y,
        parts, arrived, rows, out, columns, group_size, step, channel,
        TYPE=tl.bfloat16 if x.is_cuda else tl.float32,  # the interpreter knows no other
        BITS=bits, HAS_ZERO=zero is not None, ORDERED=order is not None, TILE=tile, **shape,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return y


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    found, parts, arrived, rows, out, channel, row,
    OUT: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(what all programs of these channels found, whether this is the last of them)."""
    last = True
    if SPLIT > 1:
        there = (channel[:, None] < out) & (row[None, :] < rows)
        where = parts + row[None, :] * out + channel[:, None]
        tl.store(where + tl.program_id(1) * rows * out, found.to(tl.float32, bitcast=True), there)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
        last = before == SPLIT - 1
        if last:
            found = tl.zeros_like(found)
            for part in range(SPLIT):
                other = tl.load(where + part * rows * out, there, 0.0, cache_modifier=".cg")
                found += other.to(found.dtype, bitcast=True)
            tl.store(arrived + tl.program_id(0), 0)
    return found, last


@triton.jit(do_not_specialize=["rows"])  # else it is compiled anew for 1, and for each 16
def _weight_only_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, zero, order, y, parts, arrived,
    rows, out, columns, group_size, step_stride, channel_stride,
    TYPE: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ORDERED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = TILE * BITS // 8  # bytes
    channel = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside, real = channel < out, row < rows
    place = channel.to(tl.int64) * channel_stride
    steps = columns // TILE
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    found = tl.zeros((OUT, ROWS), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        group = step * TILE // group_size
        codes = tl.load(
            weight + step * step_stride + place[:, None] + column[None, :],
            inside[:, None], 0,
        )  # fmt: skip
        at = step * TILE + column
        read = tl.load(order + at) if ORDERED else at
        inputs = tl.load(x + row[None, :] * columns + read[:, None], real[None, :], 0.0).to(TYPE)
        if BITS == 4:
            # 0x4300 is 128 in bfloat16, whose last four bits count ones: no conversion is needed.
            low = ((codes & 15).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True).to(TYPE)
            high = ((codes >> 4).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True).to(TYPE)
            offset = tl.full((OUT,), 136.0, tl.float32)
            if HAS_ZERO:
                offset += tl.load(zero + group * out + channel, inside, 0).to(tl.float32)
            offset = offset.to(TYPE)[:, None]
            read = tl.load(order + at + WIDTH) if ORDERED else at + WIDTH
            second = tl.load(x + row[None, :] * columns + read[:, None], real[None, :], 0.0)
            product = tl.dot(low - offset, inputs)
            product = tl.dot(high - offset, second.to(TYPE), product)
        else:
            product = tl.dot(codes.to(tl.float32).to(TYPE), inputs)
        size = tl.load(scale + group * out + channel, inside, 0.0).to(tl.float32)
        found += product * size[:, None]
    found, last = _summed(found, parts, arrived, rows, out, channel, row, OUT, ROWS, SPLIT)
    if last:
        there = inside[:, None] & real[None, :]
        tl.store(y + row[None, :] * out + channel[:, None], found.to(y.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def _int8_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, x_zero, weight, scale, sums, y, parts, arrived,
    rows, out, columns, x_stride, channel_stride, scale_stride,
    HAS_ZERO: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.arange(0, ROWS)
    inside, real = channel < out, row < rows
    place = channel.to(tl.int64) * channel_stride
    steps = tl.cdiv(columns, TILE)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    found = tl.zeros((OUT, ROWS), tl.int32)
    for step in range(first, tl.minimum(first + share, steps)):
        column = step * TILE + tl.arange(0, TILE)
        within = column < columns
        codes = tl.load(
            weight + place[:, None] + column[None, :],
            inside[:, None] & within[None, :], 0,
        )  # fmt: skip
        inputs = tl.load(
            x + row[None, :] * x_stride + column[:, None], real[None, :] & within[:, None], 0
        )
        found = tl.dot(codes, inputs, found, out_dtype=tl.int32)
    found, last = _summed(found, parts, arrived, rows, out, channel, row, OUT, ROWS, SPLIT)
    if last:
        if HAS_ZERO:
            total = tl.load(sums + channel, inside, 0)
            found -= total[:, None] * tl.load(x_zero + row, real, 0)[None, :]
        value = found.to(tl.float32) * tl.load(x_scale + row * scale_stride, real, 0.0)[None, :]
        value *= tl.load(scale + channel, inside, 0.0)[:, None]
        there = inside[:, None] & real[None, :]
        tl.store(y + row[None, :] * out + channel[:, None], value.to(y.dtype.element_ty), there)


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, columns, largest, steps, least,
    ASYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * columns + column, inside, 0.0).to(tl.float32)
    if ASYMMETRIC:
        low = tl.minimum(tl.min(value, 0), 0.0)
        high = tl.maximum(tl.max(value, 0), 0.0)
        size = tl.maximum(tl.div_rn(high - low, steps), least)
        offset = _nearest(-128.0 - tl.div_rn(low, size))
        code = _nearest(tl.div_rn(value, tl.zeros_like(value) + size)) + offset
        code = tl.minimum(tl.maximum(code, -128.0), 127.0)
        tl.store(zero + row, offset.to(tl.int32))
    else:
        size = tl.maximum(tl.div_rn(tl.max(tl.abs(value), 0), largest), least)
        code = _nearest(tl.div_rn(value, tl.zeros_like(value) + size))
    tl.store(scale + row, size)
    tl.store(codes + row * columns + column, code.to(tl.int8), inside)


@triton.jit
def _nearest(value):  # type: ignore[no-untyped-def]
    """The nearest integer, of two the even one: 1.5 * 2^23 leaves no room for fractions."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _unpack_kernel(  # type: ignore[no-untyped-def]
    packed, scale, zero, weight, out, columns, group_size,
    HAS_ZERO: tl.constexpr, TILE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = TILE // 2
    channel = tl.program_id(0) * OUT + tl.arange(0, OUT)
    step = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = channel < out
    group = step * TILE // group_size
    where = packed + (step * out + channel[:, None]) * WIDTH + column[None, :]
    codes = tl.load(where, inside[:, None], 0).to(tl.int32)
    size = tl.load(scale + group * out + channel, inside, 0.0).to(tl.float32)[:, None]
    offset = tl.full((OUT,), 8, tl.int32)
    if HAS_ZERO:
        offset += tl.load(zero + group * out + channel, inside, 0).to(tl.int32)
    low = ((codes & 15) - offset[:, None]).to(tl.float32) * size
    high = ((codes >> 4) - offset[:, None]).to(tl.float32) * size
    first = weight + channel[:, None].to(tl.int64) * columns + step * TILE + column[None, :]
    tl.store(first, low.to(tl.bfloat16), inside[:, None])
    tl.store(first + WIDTH, high.to(tl.bfloat16), inside[:, None])
