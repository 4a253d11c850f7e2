"""Products with low-bit weights on a GPU, for the few rows of a decode step, as Triton kernels.

Such a product takes as long as reading the weight does. So the weight stays packed until it is in
registers, where it is the left operand of the tensor cores and the activations are the right one:
of them there are few. A program holds `_OUT` output channels, and several share the columns of a
channel where there are fewer channels than the device has room for; the last to arrive adds up
what all found, always in one order.

- `Int4`, `Int8WeightOnly`: words of 16 bits with 4 or 2 codes, `tile` columns together
  ([columns / tile, out, tile * bits / 16] words: what a program reads at once lies together). The
  first codes of all words of a tile are its first columns, and so on: a mask and a shift make
  numbers of two words at a time, which lie in registers as the tensor cores want them.
- `Int8Activations`: codes [out, columns] as they are, times int8 activations, which one more kernel
  rounds; sums are exact.

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
_TILES = {4: (256, 128, 64), 8: (128, 64)}  # columns of a step by bits, the best first
_INT8_TILE = 128  # the same with int8 activations
_WARPS, _STAGES, _INT8_STAGES = 4, 3, 4
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
    split = triton.cdiv(steps, triton.cdiv(steps, split))  # none without a step
    return {"ROWS": max(16, triton.next_power_of_2(rows)), "SPLIT": split, "OUT": _OUT}


def _tile(tensor: QuantizedTensor) -> int | None:
    """Columns of a step, either half of which lies within a group; None where that cannot be."""
    columns = tensor.codes.shape[1]
    group_size = columns // tensor.scale.shape[1]
    tiles = _TILES.get(tensor.scheme.num_bits, ())
    return next((t for t in tiles if columns % t == 0 and group_size % (t // 2) == 0), None)


class _WeightOnly(kernels.Kernel):
    """Weights in words, bfloat16 activations; zero points and ordered columns too.

    Attributes:
        bits: of a code.
    """

    bits: int
    words: torch.Tensor
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
        tile = _tile(tensor)
        assert tile is not None, "see `select`"
        self.tile, self.halves = tile, 2 * self.columns // tile // tensor.scale.shape[1]
        self.register_buffer("words", self._packed(codes))  # [columns / tile, out, words]
        self.register_buffer("scale", _scales(tensor.scale))  # [groups, out]
        zero = tensor.zero_point
        self.register_buffer("zero_point", None if zero is None else zero.t().contiguous())
        self.register_buffer("order", order)

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        count = 16 // self.bits
        parts = codes.view(self.out, -1, count, self.tile // count)
        words = torch.zeros_like(parts[:, :, 0], dtype=torch.int16)
        for part in range(count):
            code = parts[:, :, part].to(torch.int16)
            code = code + 8 if self.bits == 4 else code & 255
            words |= code << (self.bits * part)
        return words.transpose(0, 1).contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > MOST_ROWS:
            if self.order is not None:
                x = x[:, self.order]
            return nn.functional.linear(x, self.dense())
        x = x.contiguous()
        rows = len(x)
        y = torch.empty(rows, self.out, dtype=x.dtype, device=x.device)
        parts, arrived = _workspace(x.device)
        shape = _shape(self.out, len(self.words), rows, x.device)
        grid: Any = (triton.cdiv(self.out, _OUT), shape["SPLIT"])
        _weight_only_kernel[grid](
            x, self.words, self.scale, self.scale if self.zero_point is None else self.zero_point,
            self.words if self.order is None else self.order, y, parts, arrived,
            rows, self.out, self.columns, self.words.stride(0), self.words.stride(1),
            TYPE=tl.bfloat16 if x.is_cuda else tl.float32,  # the interpreter knows no other
            BITS=self.bits, HAS_ZERO=self.zero_point is not None, ORDERED=self.order is not None,
            HALVES=self.halves, TILE=self.tile, **shape, num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
        return y

    def dense(self) -> torch.Tensor:
        """The weight [out, columns] in bfloat16, columns in the order of their groups."""
        weight = torch.empty(self.out, self.columns, dtype=torch.bfloat16, device=self.words.device)
        grid: Any = (triton.cdiv(self.out, _OUT), len(self.words))
        zero = self.scale if self.zero_point is None else self.zero_point
        _unpack_kernel[grid](
            self.words, self.scale, zero, weight, self.out, self.columns, BITS=self.bits,
            HAS_ZERO=self.zero_point is not None, HALVES=self.halves, TILE=self.tile, OUT=_OUT,
        )  # fmt: skip
        return weight


class Int4(_WeightOnly):
    """4-bit weights in groups or per channel."""

    name, bits = "int4-triton", 4


class Int8WeightOnly(_WeightOnly):
    """8-bit weights in groups or per channel; symmetric."""

    name, bits = "int8-weight-only-triton", 8


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
        tile = _INT8_TILE
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
                num_warps=_WARPS, num_stages=_INT8_STAGES,
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
    if dtype != torch.bfloat16 or _tile(tensor) is None:
        return None
    if weights.num_bits == 4:
        return Int4(tensor)
    if weights.num_bits == 8 and weights.symmetric:
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


# What is in a word as numbers in bfloat16, two words at a time, where the compiler would take each
# by itself. Of 128 + n in bfloat16 the last bits count ones: a mask makes 128 + code of four bits.
# Eight are one too many, so it makes 128 + the last seven, less 128, or 256 where the first is set.
_FOUR_CODES = tl.constexpr("""{
.reg .b32 second, third, fourth;
shr.u32 second, $4, 4;
shr.u32 third, $4, 8;
shr.u32 fourth, $4, 12;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, second, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, third, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, fourth, 0x000f000f, 0x43004300, 0xea;
}""")
_TWO_CODES = tl.constexpr("""{
.reg .b32 second, low, high, one;
mov.b32 one, 0x3f803f80;
shr.u32 second, $2, 8;
lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 high, $2, 0x00800080, 0xc300c300, 0xea;
fma.rn.bf16x2 $0, low, one, high;
lop3.b32 low, second, 0x007f007f, 0x43004300, 0xea;
lop3.b32 high, second, 0x00800080, 0xc300c300, 0xea;
fma.rn.bf16x2 $1, low, one, high;
}""")


@triton.jit
def _four_codes(words, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """128 + code of each of a word's four."""
    if TYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            _FOUR_CODES, "=r,=r,=r,=r,r", [words], (tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    return (
        _field(words, 0, 4).to(TYPE) + 128,
        _field(words, 4, 4).to(TYPE) + 128,
        _field(words, 8, 4).to(TYPE) + 128,
        _field(words, 12, 4).to(TYPE) + 128,
    )


@triton.jit
def _two_codes(words, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each of a word's two."""
    if TYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            _TWO_CODES, "=r,=r,r", [words], (tl.bfloat16,) * 2, is_pure=True, pack=2
        )
    return _field(words, 0, 8).to(TYPE), _field(words, 8, 8).to(TYPE)


@triton.jit
def _field(words, first, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some bits of words of 16; of 8 the sign counts."""
    value = words.to(tl.int32) >> first & ((1 << BITS) - 1)
    return value - (value & 128) * 2 if BITS == 8 else value


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    x, order, rows, columns, first, row, column, TYPE: tl.constexpr, ORDERED: tl.constexpr
):
    """Some columns of the activations [columns, rows]."""
    at = first + column
    read = tl.load(order + at) if ORDERED else at
    where = x + row[None, :] * columns + read[:, None]
    return tl.load(where, (row < rows)[None, :], 0.0).to(TYPE)


@triton.jit
def _of_group(table, half, out, channel, steps, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a table [groups, out] says of half a step's columns, of the last ones behind the last; a
    group has `HALVES` of them."""
    group = tl.minimum(half, 2 * steps - 1) // HALVES
    return tl.load(table + group * out + channel, channel < out, 0)


@triton.jit(do_not_specialize=["rows"])  # else it is compiled anew for 1, and for each 16
def _weight_only_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, zero, order, y, parts, arrived,
    rows, out, columns, step_stride, channel_stride,
    TYPE: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ORDERED: tl.constexpr,
    HALVES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE // 2
    WORDS: tl.constexpr = TILE * BITS // 16
    channel = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WORDS)
    inside = channel < out
    place = channel.to(tl.int64) * channel_stride
    steps = columns // TILE
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    # Scales and zero points are read a step ahead: nothing else hides how long that takes.
    size = _of_group(scale, 2 * first, out, channel, steps, HALVES)
    size_2 = _of_group(scale, 2 * first + 1, out, channel, steps, HALVES)
    if HAS_ZERO:
        offset = _of_group(zero, 2 * first, out, channel, steps, HALVES)
        offset_2 = _of_group(zero, 2 * first + 1, out, channel, steps, HALVES)
    found = tl.zeros((OUT, ROWS), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        at, ahead = step * TILE, 2 * (step + 1)
        next_size = _of_group(scale, ahead, out, channel, steps, HALVES)
        next_size_2 = _of_group(scale, ahead + 1, out, channel, steps, HALVES)
        where = words + step * step_stride + place[:, None] + column[None, :]
        read = tl.load(where, inside[:, None], 0)
        inputs = _inputs(x, order, rows, columns, at, row, column, TYPE, ORDERED)
        inputs_2 = _inputs(x, order, rows, columns, at + HALF, row, column, TYPE, ORDERED)
        if BITS == 4:
            low, second, third, fourth = _four_codes(read, TYPE)
            nought, nought_2 = tl.full((OUT, 1), 136.0, TYPE), tl.full((OUT, 1), 136.0, TYPE)
            if HAS_ZERO:
                nought = (offset.to(tl.float32) + 136).to(TYPE)[:, None]
                nought_2 = (offset_2.to(tl.float32) + 136).to(TYPE)[:, None]
                offset = _of_group(zero, ahead, out, channel, steps, HALVES)
                offset_2 = _of_group(zero, ahead + 1, out, channel, steps, HALVES)
            product = tl.dot(low - nought, inputs)
            inputs = _inputs(x, order, rows, columns, at + WORDS, row, column, TYPE, ORDERED)
            product = tl.dot(second - nought, inputs, product)
            product_2 = tl.dot(third - nought_2, inputs_2)
            inputs = _inputs(x, order, rows, columns, at + HALF + WORDS, row, column, TYPE, ORDERED)
            product_2 = tl.dot(fourth - nought_2, inputs, product_2)
        else:
            low, high = _two_codes(read, TYPE)
            product, product_2 = tl.dot(low, inputs), tl.dot(high, inputs_2)
        found += product * size.to(tl.float32)[:, None]
        found += product_2 * size_2.to(tl.float32)[:, None]
        size, size_2 = next_size, next_size_2
    found, last = _summed(found, parts, arrived, rows, out, channel, row, OUT, ROWS, SPLIT)
    if last:
        there = inside[:, None] & (row < rows)[None, :]
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
    words, scale, zero, weight, out, columns,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, HALVES: tl.constexpr, TILE: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = TILE // PARTS
    channel = tl.program_id(0) * OUT + tl.arange(0, OUT)
    step = tl.program_id(1)
    column = tl.arange(0, WORDS)
    inside = channel < out
    where = words + (step * out + channel[:, None]).to(tl.int64) * WORDS + column[None, :]
    read = tl.load(where, inside[:, None], 0)
    first = weight + channel[:, None].to(tl.int64) * columns + step * TILE + column[None, :]
    for part in tl.static_range(PARTS):
        group = (2 * step + 2 * part // PARTS) // HALVES
        code = _field(read, part * BITS, BITS)
        if BITS == 4:
            code -= 8
        if HAS_ZERO:
            code -= tl.load(zero + group * out + channel, inside, 0).to(tl.int32)[:, None]
        size = tl.load(scale + group * out + channel, inside, 0.0).to(tl.float32)[:, None]
        value = (code.to(tl.float32) * size).to(tl.bfloat16)
        tl.store(first + part * WORDS, value, inside[:, None])
