"""Blocks turned from rows of pixels to rows of channels and back, in registers. Knows neither sources nor outputs."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu.formats import Stored, literals
from fusionops.cpu.simd import I32, I64, VECTOR_BYTES, Lanes, word

# int64 words of the largest block. A block has as many vectors as a vector has lanes, which is most for float32.
BLOCK_WORDS = VECTOR_BYTES * (VECTOR_BYTES // 4) // 8


def _transposed(lanes: Lanes, rows: list[ir.Value]) -> list[ir.Value]:
    """Eklundh's method: the bits of the row number and of the lane number change places one by one."""
    b, count = lanes.b, lanes.count
    shift = 1
    while shift < count:
        first = [lane if not lane & shift else count + lane - shift for lane in range(count)]
        second = [lane + shift if not lane & shift else count + lane for lane in range(count)]
        masks = [ir.Constant(ir.VectorType(I32, count), picks) for picks in (first, second)]
        for i in range(count):
            if not i & shift:
                pair = rows[i], rows[i + shift]
                rows[i], rows[i + shift] = (b.shuffle_vector(*pair, mask) for mask in masks)
        shift *= 2
    return rows


@intrinsic(prefer_literal=True)
def transpose_block(typing, bits, stored, to, to_step, source, step, rows, count):
    """to[c·to_step + r] = source[r·step + c] for 1 ≤ rows and c < count, neither more than the lanes of a vector.

    `to` has room for a whole block; what lies beyond rows and count is arbitrary. The source is in the format `stored`.
    """
    if not literals(bits, stored):
        return None
    signature = types.void(bits, stored, *[types.intp] * 6)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, to_step, source, step, rows, count = args[2:]
        lanes = Lanes(b, bits.literal_value)
        there = Stored(lanes, stored.literal_value)
        to, source = lanes.pointer(to), there.pointer(source)
        last = b.sub(rows, word(1))
        places = []
        for r in range(lanes.count):  # rows that are not there repeat the last one
            row = b.select(b.icmp_signed("<", word(r), last), word(r), last)
            places.append(b.gep(source, [b.mul(step, row)]))

        def finish(loaded: list[ir.Value]) -> None:
            for c, row in enumerate(_transposed(lanes, loaded)):
                lanes.store(row, b.gep(to, [b.mul(to_step, word(c))]))

        with b.if_else(b.icmp_signed("==", count, word(lanes.count))) as (whole, part):
            with whole:
                finish([there.load(place) for place in places])
            with part:
                tail = lanes.tail(count)
                finish([there.load(place, tail) for place in places])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def stack_words(typing, count):
    """The address of `count` int64 on the stack of the task, aligned to a vector."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        area = cgutils.alloca_once(b, I64, size=word(count.literal_value))
        area.align = VECTOR_BYTES
        return b.ptrtoint(area, I64)

    return types.intp(count), codegen
