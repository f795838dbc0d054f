"""How elements are stored and what they are computed in: float16 and bfloat16 are widened to float32 by every load.

Each store rounds once, to nearest with ties to even. Holds conversions; knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu.simd import I16, I32, Lanes, Tail, vector_loop
from fusionops.cpu.target import target

F16, BF16 = 16, 17  # literals that numba's cache tells apart; an eighth of each is its bytes, as of 32 and 64


@dataclass(frozen=True, slots=True)
class Format:
    """suffix of kernel names; how elements are stored, one of 32, 64, F16, BF16; bits of what they are computed in."""

    suffix: str
    stored: int
    bits: int

    @property
    def is_narrow(self) -> bool:
        return self.stored < self.bits

    @property
    def computed_bytes(self) -> int:
        return self.bits // 8


FORMATS = {
    "float32": Format("f32", 32, 32),
    "float64": Format("f64", 64, 64),
    "float16": Format("f16", F16, 32),
    "bfloat16": Format("bf16", BF16, 32),
}


class _Words:
    """Integer arithmetic on float32 values, as a number or as a vector of them."""

    def __init__(self, b: ir.IRBuilder, count: int | None) -> None:
        self.b, self.count = b, count
        self.float, self.int, self.short = (self._kind(kind) for kind in (ir.FloatType(), I32, I16))
        self.half = self._kind(ir.HalfType())

    def _kind(self, scalar: ir.Type) -> ir.Type:
        return scalar if self.count is None else ir.VectorType(scalar, self.count)

    def integer(self, value: int) -> ir.Constant:
        return ir.Constant(self.int, value if self.count is None else [value] * self.count)

    def number(self, value: float) -> ir.Constant:
        return ir.Constant(self.float, value if self.count is None else [value] * self.count)

    def above(self, x: ir.Value, limit: int) -> ir.Value:
        return self.b.icmp_unsigned(">", x, self.integer(limit))


def _widen_bf16(w: _Words, short: ir.Value) -> ir.Value:
    """The upper half of a float32 as a float32."""
    return w.b.bitcast(w.b.shl(w.b.zext(short, w.int), w.integer(16)), w.float)


def _narrow_bf16(w: _Words, value: ir.Value) -> ir.Value:
    b = w.b
    x = b.bitcast(value, w.int)
    upper = b.lshr(x, w.integer(16))
    odd = b.and_(upper, w.integer(1))
    nearest = b.lshr(b.add(x, b.add(odd, w.integer(0x7FFF))), w.integer(16))
    is_nan = w.above(b.and_(x, w.integer(0x7FFFFFFF)), 0x7F800000)
    return b.trunc(b.select(is_nan, b.or_(upper, w.integer(0x40)), nearest), w.short)


def _widen_f16(w: _Words, short: ir.Value) -> ir.Value:
    b = w.b
    if target().converts_half:
        return b.fpext(b.bitcast(short, w.half), w.float)
    x = b.zext(short, w.int)
    magnitude = b.and_(x, w.integer(0x7FFF))
    # With the exponent's bias still that of float16, subnormals included, the product sets it right without rounding.
    scaled = b.fmul(b.bitcast(b.shl(magnitude, w.integer(13)), w.float), w.number(2.0**112))
    bits = b.bitcast(scaled, w.int)
    is_finite = b.icmp_unsigned("<", magnitude, w.integer(0x7C00))
    bits = b.select(is_finite, bits, b.or_(bits, w.integer(0x7F800000)))
    return b.bitcast(b.or_(bits, b.shl(b.and_(x, w.integer(0x8000)), w.integer(16))), w.float)


def _narrow_f16(w: _Words, value: ir.Value) -> ir.Value:
    b = w.b
    if target().converts_half:
        return b.bitcast(b.fptrunc(value, w.half), w.short)
    x = b.bitcast(value, w.int)
    magnitude = b.and_(x, w.integer(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, w.integer(13)), w.integer(1))
    normal = b.lshr(b.add(magnitude, b.sub(odd, w.integer((112 << 23) - 0xFFF))), w.integer(13))
    # A subnormal is a multiple of 2^-24, which is what a float32 near 1/2 rounds to.
    half = b.bitcast(b.fadd(b.bitcast(magnitude, w.float), w.number(0.5)), w.int)
    subnormal = b.sub(half, w.integer(0x3F000000))
    result = b.select(b.icmp_unsigned("<", magnitude, w.integer(113 << 23)), subnormal, normal)
    result = b.select(w.above(magnitude, 0x477FEFFF), w.integer(0x7C00), result)  # from 65520 on
    result = b.select(w.above(magnitude, 0x7F800000), w.integer(0x7E00), result)
    return b.trunc(b.or_(result, b.lshr(b.and_(x, w.integer(0x80000000)), w.integer(16))), w.short)


_WIDEN = {F16: _widen_f16, BF16: _widen_bf16}
_NARROW = {F16: _narrow_f16, BF16: _narrow_bf16}


class Stored:
    """Elements of a format in memory, as the vectors of `lanes` that they are computed in."""

    def __init__(self, lanes: Lanes, stored: int) -> None:
        self.lanes, self.stored = lanes, stored
        self.is_narrow = stored in _WIDEN
        self.item_bytes = stored // 8
        if self.is_narrow:
            self._words = _Words(lanes.b, lanes.count)
            self._shorts = Lanes(lanes.b, 16, 2 * lanes.count)

    def pointer(self, address: ir.Value, element: ir.Value | None = None) -> ir.Value:
        return (self._shorts if self.is_narrow else self.lanes).pointer(address, element)

    def load(self, pointer: ir.Value, tail: Tail | None = None) -> ir.Value:
        if not self.is_narrow:
            return self.lanes.load_part(pointer, tail)
        return _WIDEN[self.stored](self._words, self._shorts.load_part(pointer, tail))

    def store(self, value: ir.Value, pointer: ir.Value, tail: Tail | None = None) -> None:
        if self.is_narrow:
            self._shorts.store_part(_NARROW[self.stored](self._words, value), pointer, tail)
        else:
            self.lanes.store_part(value, pointer, tail)

    def stream(self, value: ir.Value, pointer: ir.Value) -> None:
        """A store around the caches; `pointer` is aligned to the bytes of a vector as it is stored."""
        if self.is_narrow:
            self._shorts.stream(_NARROW[self.stored](self._words, value), pointer)
        else:
            self.lanes.stream(value, pointer)

    def round(self, value: ir.Value) -> ir.Value:
        """The nearest element of the format."""
        if not self.is_narrow:
            return value
        return _WIDEN[self.stored](self._words, _NARROW[self.stored](self._words, value))


def literals(*values: Any) -> bool:
    return all(isinstance(value, types.IntegerLiteral) for value in values)


@intrinsic(prefer_literal=True)
def load_element(typing, stored, address, index):
    """Element `index` of those at `address`, as what it is computed in; stored is literal."""
    if not literals(stored):
        return None
    kind = stored.literal_value
    number = types.float64 if kind == 64 else types.float32

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, address, index = args
        if kind not in _WIDEN:
            return b.load(Lanes(b, kind).pointer(address, index))
        short = b.load(b.gep(b.inttoptr(address, I16.as_pointer()), [index]))
        return _WIDEN[kind](_Words(b, None), short)

    return number(stored, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def store_element(typing, stored, address, index, value):
    """Rounds what is computed to element `index` of those at `address`; stored is literal."""
    if not literals(stored):
        return None
    kind = stored.literal_value
    number = types.float64 if kind == 64 else types.float32

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, address, index, value = args
        if kind not in _WIDEN:
            b.store(value, Lanes(b, kind).pointer(address, index))
        else:
            short = _NARROW[kind](_Words(b, None), value)
            b.store(short, b.gep(b.inttoptr(address, I16.as_pointer()), [index]))
        return context.get_dummy_value()

    return types.void(stored, types.intp, types.intp, number), codegen


@intrinsic(prefer_literal=True)
def round_element(typing, stored, value):
    """The nearest element of the format to a float32 or float64; stored is literal."""
    if not literals(stored):
        return None
    kind = stored.literal_value
    number = types.float64 if kind == 64 else types.float32

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        value = args[1]
        if kind != 64 and signature.args[1] == types.float64:
            value = b.fptrunc(value, ir.FloatType())
        if kind not in _WIDEN:
            return value
        return _WIDEN[kind](_Words(b, None), _NARROW[kind](_Words(b, None), value))

    return number(stored, value), codegen


@intrinsic(prefer_literal=True)
def store_rows(typing, bits, stored, to, to_step, source, step, rows, count):
    """to[r·to_step + i] = source[r·step + i] for i < count, r < rows: what is computed, rounded to what is stored."""
    if not literals(bits, stored):
        return None
    signature = types.void(bits, stored, *[types.intp] * 6)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, to_step, source, step, rows, count = args[2:]
        lanes = Lanes(b, bits.literal_value)
        there = Stored(lanes, stored.literal_value)
        first_to, first_source = there.pointer(to), lanes.pointer(source)
        with cgutils.for_range(b, rows) as r:
            to, source = b.gep(first_to, [b.mul(r.index, to_step)]), b.gep(first_source, [b.mul(r.index, step)])

            def body(offset: ir.Value, tail: Tail | None) -> None:
                there.store(lanes.load_part(b.gep(source, [offset]), tail), b.gep(to, [offset]), tail)

            vector_loop(b, lanes, count, body)
        return context.get_dummy_value()

    return signature, codegen
