"""Vector IR: what a kernel can say about 64-byte vectors, and pointers for Numba code. No loops over tensors.

Everything is generic LLVM IR, on <16 x float> or <8 x double> where nothing else is asked for; LLVM splits it into the
registers that the host has, so the same source is legal on every processor. Only the store of a part of a vector asks
what the processor is fast at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu.target import target

VECTOR_BYTES = 64
GAP = -0.0  # stands for a filter that a channel has none of; filters of −0 are packed as 0, which makes the same sums
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


def word(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


@dataclass(frozen=True, slots=True)
class Tail:
    """The first lanes of a vector, fewer than all: how many, and True in each of them."""

    count: ir.Value
    mask: ir.Value


class Lanes:
    """One vector type and the instructions on it, bound to an IR builder; `bits` of an element are 32 or 64.

    Or 16, of elements that are moved and not computed with.
    """

    def __init__(self, b: ir.IRBuilder, bits: int, vector_bytes: int = VECTOR_BYTES) -> None:
        self.b = b
        self.bits = bits
        self.item_bytes = bits // 8
        self.count = vector_bytes // self.item_bytes
        self.scalar = {16: I16, 32: ir.FloatType(), 64: ir.DoubleType()}[bits]
        self.type = ir.VectorType(self.scalar, self.count)
        self.int = ir.VectorType(ir.IntType(bits), self.count)
        self.mask = ir.VectorType(I1, self.count)
        self.suffix = f"v{self.count}{'i' if bits == 16 else 'f'}{bits}"

    # memory

    def pointer(self, address: ir.Value, element: ir.Value | None = None) -> ir.Value:
        """The address of an element as a pointer to scalars."""
        base = self.b.inttoptr(address, self.scalar.as_pointer())
        return base if element is None else self.b.gep(base, [element])

    def _vector_pointer(self, pointer: ir.Value) -> ir.Value:
        return self.b.bitcast(pointer, self.type.as_pointer())

    def load(self, pointer: ir.Value) -> ir.Value:
        value = self.b.load(self._vector_pointer(pointer))
        value.align = 1  # arrays may start anywhere; an aligned access costs the same either way
        return value

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        self.b.store(value, self._vector_pointer(pointer)).align = 1

    def stream(self, value: ir.Value, pointer: ir.Value) -> None:
        """A store around the caches; `pointer` is aligned to the vector's bytes."""
        store = self.b.store(value, self._vector_pointer(pointer))
        store.align = self.count * self.item_bytes
        store.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(I32, 1)]))

    def prefetch(self, pointer: ir.Value, *, write: bool = False, level: int = 1) -> None:
        """Asks for the cache line at `pointer` in L1 or L2; any address is legal."""
        octet = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [octet, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        locality = {1: 3, 2: 2}[level]
        flags = [ir.Constant(I32, int(write)), ir.Constant(I32, locality), ir.Constant(I32, 1)]
        self.b.call(function, [self.b.bitcast(pointer, octet), *flags])

    def tail(self, count: ir.Value) -> Tail:
        """The first `count` lanes."""
        iota = ir.Constant(ir.VectorType(I64, self.count), list(range(self.count)))
        return Tail(count, self.b.icmp_signed("<", iota, self.splat(count, ir.VectorType(I64, self.count))))

    def masked_load(self, pointer: ir.Value, mask: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.type, [self.type.as_pointer(), I32, self.mask, self.type])
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.masked.load.{self.suffix}.p0")
        return self.b.call(
            function, [self._vector_pointer(pointer), ir.Constant(I32, 1), mask, ir.Constant(self.type, None)]
        )

    def masked_store(self, value: ir.Value, pointer: ir.Value, mask: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [self.type, self.type.as_pointer(), I32, self.mask])
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.masked.store.{self.suffix}.p0")
        self.b.call(function, [value, self._vector_pointer(pointer), ir.Constant(I32, 1), mask])

    def load_part(self, pointer: ir.Value, tail: Tail | None) -> ir.Value:
        """A whole vector, or its first lanes."""
        return self.load(pointer) if tail is None else self.masked_load(pointer, tail.mask)

    def store_part(self, value: ir.Value, pointer: ir.Value, tail: Tail | None) -> None:
        if tail is None:
            self.store(value, pointer)
        elif target().vector_bytes == VECTOR_BYTES:
            self.masked_store(value, pointer, tail.mask)
        else:
            self._store_first(value, pointer, tail.count)

    def _store_first(self, value: ir.Value, pointer: ir.Value, count: ir.Value) -> None:
        """Stores `count` lanes, fewer than all, as runs of powers of two.

        With the masked stores of AVX2 (AMD) a 3×3 convolution of 3 + 3 channels took 1.3 times as long, a 1×1
        convolution of the sum of three maps of 21 channels 1.6 times. A function of its own, since it is long: inlined,
        a first call compiled for 2 s longer.
        """
        kind = ir.FunctionType(ir.VoidType(), [self.type, self.scalar.as_pointer(), I64])
        name = f"store_first_{self.suffix}"
        function = self.b.module.globals.get(name)
        if function is None:
            function = ir.Function(self.b.module, kind, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            self._build_store_first(function)
        self.b.call(function, [value, pointer, count])

    def _build_store_first(self, function: ir.Function) -> None:
        b = ir.IRBuilder(function.append_basic_block("entry"))
        value, pointer, count = function.args
        rest, place = cgutils.alloca_once_value(b, value), cgutils.alloca_once_value(b, pointer)
        size = self.count // 2
        while size:
            with b.if_then(b.icmp_signed("!=", b.and_(count, word(size)), word(0))):
                vector, here = b.load(rest), b.load(place)
                first, others = (
                    ir.Constant(ir.VectorType(I32, len(lanes)), [i % self.count for i in lanes])
                    for lanes in (range(size), range(size, size + self.count))
                )
                part = b.shuffle_vector(vector, vector, first)
                b.store(part, b.bitcast(here, part.type.as_pointer())).align = 1
                b.store(b.shuffle_vector(vector, vector, others), rest)
                b.store(b.gep(here, [word(size)]), place)
            size //= 2
        b.ret_void()

    # values

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [float(value)] * self.count)

    def integers(self, value: int) -> ir.Constant:
        return ir.Constant(self.int, [value] * self.count)

    def splat(self, scalar: ir.Value, kind: ir.VectorType | None = None) -> ir.Value:
        kind = kind or self.type
        undefined = ir.Constant(kind, ir.Undefined)
        lane0 = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(lane0, undefined, ir.Constant(ir.VectorType(I32, self.count), [0] * self.count))

    def _call(self, name: str, args: Sequence[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(self.type, [self.type] * len(args))
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.{name}.{self.suffix}"), args)

    def multiply_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x·y + z, with one rounding where the host has the instruction and two where it would take a library call."""
        return self._call("fmuladd", [x, y, z])

    def round(self, x: ir.Value) -> ir.Value:
        return self._call("rint", [x])

    def absolute(self, x: ir.Value) -> ir.Value:
        return self._call("fabs", [x])

    def copysign(self, magnitude: ir.Value, sign: ir.Value) -> ir.Value:
        return self._call("copysign", [magnitude, sign])

    def is_filled(self, x: ir.Value) -> ir.Value:
        """Whether each lane is something else than GAP."""
        bits = self.b.bitcast(x, self.int)
        return self.b.icmp_unsigned("!=", bits, self.integers(1 << (self.bits - 1)))

    def below(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """x < y lane by lane; False where either is NaN."""
        return self.b.fcmp_ordered("<", x, y)

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """Horner's rule; coefficients from the highest power to the constant."""
        value = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.multiply_add(value, x, self.constant(coefficient))
        return value

    def each_lane(self, function: str, x: ir.Value) -> ir.Value:
        """A function of the C library, lane by lane."""
        kind = ir.FunctionType(self.scalar, [self.scalar])
        callee = cgutils.get_or_insert_function(self.b.module, kind, function)
        for lane in range(self.count):
            at = ir.Constant(I32, lane)
            x = self.b.insert_element(x, self.b.call(callee, [self.b.extract_element(x, at)]), at)
        return x


def vector_loop(b: ir.IRBuilder, lanes: Lanes, count: ir.Value, body: Any) -> None:
    """body(offset, tail) over `count` elements: whole vectors with tail None, then what is left."""
    whole = b.sdiv(count, word(lanes.count))
    with cgutils.for_range(b, whole) as v:
        body(b.mul(v.index, word(lanes.count)), None)
    done = b.mul(whole, word(lanes.count))
    rest = b.sub(count, done)
    with b.if_then(b.icmp_signed(">", rest, word(0))):
        body(done, lanes.tail(rest))


def _prefetch_intrinsic(write: bool) -> Any:
    @intrinsic
    def prefetch(typing, address, count):
        """Asks for `count` bytes from `address` on."""

        def codegen(context, b, signature, args):
            lanes = Lanes(b, 32)
            lines = b.sdiv(b.add(args[1], word(VECTOR_BYTES - 1)), word(VECTOR_BYTES))
            with cgutils.for_range(b, lines) as line:
                here = b.add(args[0], b.mul(line.index, word(VECTOR_BYTES)))
                lanes.prefetch(lanes.pointer(here), write=write)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), codegen

    return prefetch


prefetch_read = _prefetch_intrinsic(False)
prefetch_write = _prefetch_intrinsic(True)


@intrinsic
def clear(typing, address, count):
    """Zeroes `count` bytes."""

    def codegen(context, b, signature, args):
        cgutils.memset(b, b.inttoptr(args[0], I8.as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def call(typing, address, *arguments):
    """Calls machine code that takes integers and returns nothing (`jit.task`)."""
    signature = types.void(types.intp, types.StarArgTuple.from_types(arguments))

    def codegen(context, b, signature, args):
        values = [
            context.cast(b, value, kind, types.int64)
            for value, kind in zip(cgutils.unpack_tuple(b, args[1]), signature.args[1], strict=True)
        ]
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(values))
        b.call(b.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return signature, codegen


def _pointer_intrinsic(numba_type: Any, ir_type: ir.Type) -> Any:
    @intrinsic
    def view(typing, address):
        def codegen(context, b, signature, args):
            return b.inttoptr(args[0], ir_type.as_pointer())

        return types.CPointer(numba_type)(types.intp), codegen

    return view


words = _pointer_intrinsic(types.int64, I64)
doubles = _pointer_intrinsic(types.float64, ir.DoubleType())


@intrinsic(prefer_literal=True)
def elements(typing, bits, address):
    """The address as a pointer to float32 (bits = 32), float64 (64) or two bytes (less than 32); bits is literal."""
    if not isinstance(bits, types.IntegerLiteral):
        return None
    kinds = {32: (types.float32, ir.FloatType()), 64: (types.float64, ir.DoubleType())}
    number, element = kinds.get(bits.literal_value, (types.uint16, I16))

    def codegen(context, b, signature, args):
        return b.inttoptr(args[1], element.as_pointer())

    return types.CPointer(number)(bits, types.intp), codegen
