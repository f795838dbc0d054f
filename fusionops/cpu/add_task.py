"""The task of an add without a contraction: a span of the output. Chooses no extents."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import params as at
from fusionops.cpu.epilogue import finish_rows
from fusionops.cpu.formats import Stored, literals, store_rows
from fusionops.cpu.jit import inline, task
from fusionops.cpu.prologue import merge_rows
from fusionops.cpu.simd import I64, Lanes, Tail, doubles, elements, word, words
from fusionops.cpu.transpose import stack_words

# Words of an add: these, the extents, then for each operand (output first) base, weight kind, weight, steps, factors.
# PLAIN: 1 where contiguous runs of at most MOST_IN_TABLE sources are added and nothing else.
SOURCES, DEPTH, ROWS, TASK_ROWS, PIECES, PIECE, PLAIN, NONTEMPORAL, ACTIVATION, SLOPE, CHANNEL = range(11)
HEAD = 11

BLOCK = 1024  # elements of the buffer that a general add goes through: 4 to 8 KiB, a small part of L1
UNROLL = 4  # vectors in flight; 8 gained nothing


def operand_words(depth: int) -> int:
    return 3 + 2 * depth


@intrinsic(prefer_literal=True)
def add_run(typing, bits, stored, to, table, sources, count, nontemporal):
    """to[i] = ((x0[i] + x1[i]) + x2[i]) + … for contiguous runs whose addresses stand in `table`."""
    if not literals(bits, stored):
        return None
    signature = types.void(bits, stored, *[types.intp] * 5)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address, table, sources, count, nontemporal = args[2:]
        lanes = Lanes(b, bits.literal_value)
        there = Stored(lanes, stored.literal_value)
        to, table = there.pointer(address), b.inttoptr(table, I64.as_pointer())
        sums = [cgutils.alloca_once(b, lanes.type) for _ in range(UNROLL)]

        def span(offset: ir.Value, vectors: int, tail: Tail | None, store: Any) -> None:
            def load(source: ir.Value, v: int) -> ir.Value:
                place = b.gep(there.pointer(b.load(b.gep(table, [source]))), [b.add(offset, word(v * lanes.count))])
                return there.load(place, tail)

            for v in range(vectors):
                b.store(load(word(0), v), sums[v])
            with cgutils.for_range(b, sources, start=word(1)) as j:
                for v in range(vectors):
                    b.store(there.round(b.fadd(b.load(sums[v]), load(j.index, v))), sums[v])
            for v in range(vectors):
                store(b.load(sums[v]), b.gep(to, [b.add(offset, word(v * lanes.count))]))

        def masked(offset: ir.Value, rest: ir.Value) -> None:
            with b.if_then(b.icmp_signed(">", rest, word(0))):
                tail = lanes.tail(rest)
                span(offset, 1, tail, lambda value, place: there.store(value, place, tail))

        def body(start: ir.Value, store: Any) -> ir.Value:
            """Whole vectors from `start` on; returns where they end."""
            whole = b.sdiv(b.sub(count, start), word(lanes.count))
            blocks = b.sdiv(whole, word(UNROLL))
            with cgutils.for_range(b, blocks) as i:
                span(b.add(start, b.mul(i.index, word(UNROLL * lanes.count))), UNROLL, None, store)
            done = b.mul(blocks, word(UNROLL))
            with cgutils.for_range(b, b.sub(whole, done)) as i:
                span(b.add(start, b.mul(b.add(done, i.index), word(lanes.count))), 1, None, store)
            return b.add(start, b.mul(whole, word(lanes.count)))

        # An array that starts between two multiples of its item size has no aligned vector.
        off = b.and_(address, word(there.item_bytes - 1))
        goes_around = b.and_(b.icmp_signed("!=", nontemporal, word(0)), b.icmp_signed("==", off, word(0)))
        with b.if_else(goes_around) as (around, through):
            with around:  # stores around the caches need whole, aligned vectors: a masked one goes first
                stored_bytes = lanes.count * there.item_bytes  # of a vector: half as many where elements are narrow
                ahead = b.sdiv(b.and_(b.neg(address), word(stored_bytes - 1)), word(there.item_bytes))
                head = b.select(b.icmp_signed("<", ahead, count), ahead, count)
                masked(word(0), head)
                end = body(head, there.stream)
                masked(end, b.sub(count, end))
            with through:
                end = body(word(0), there.store)
                masked(end, b.sub(count, end))
        return context.get_dummy_value()

    return signature, codegen


@inline
def operand_offset(params, operand, axes, row):
    """Elements from an operand's base to the start of row `row` of the first axes, each repeated by its factor."""
    p = words(params)
    depth = p[DEPTH]
    here = words(params + 8 * (HEAD + depth + operand * (3 + 2 * depth) + 3))
    offset = 0
    for d in range(axes - 1, -1, -1):
        extent = p[HEAD + d]
        position = row % extent
        row //= extent
        offset += position // here[depth + d] * here[d]
    return offset


@inline
def weight_position(params, row):
    """Index of the row along the channel axis, where that is not the last one."""
    p = words(params)
    depth, channel = p[DEPTH], p[CHANNEL]
    for d in range(depth - 2, channel, -1):
        row //= p[HEAD + d]
    return row % p[HEAD + channel]


@inline
def spread(stored, to, source, step, factor, first, count):
    """to[i] = source[(first + i) // factor · step]: a run with any step, each element repeated `factor` times."""
    d, s = elements(stored, to), elements(stored, source)
    place = first // factor
    i = 0
    end = (place + 1) * factor - first  # where the repetitions of element `place` end
    if factor == 2 and step == 1:  # the usual case, in a form that compilers turn into vectors
        if end == 1 and count > 0:
            d[0] = s[place]
            place, i = place + 1, 1
        pairs = (count - i) // 2
        for k in range(pairs):
            value = s[place + k]
            d[i + 2 * k] = value
            d[i + 2 * k + 1] = value
        i += 2 * pairs
        if i < count:
            d[i] = s[place + pairs]
    else:
        while i < count:
            value = s[place * step]
            stop = min(count, end)
            while i < stop:
                d[i] = value
                i += 1
            place += 1
            end += factor


@inline
def add_general(bits, stored, params, row, first, count, buffer, spare):
    """One run of an add with weights, an activation or any steps, through a buffer in L1."""
    p = words(params)
    item = stored // 8
    depth = p[DEPTH]
    size = 3 + 2 * depth
    for j in range(1, p[SOURCES] + 1):
        here = params + 8 * (HEAD + depth + j * size)
        o = words(here)
        kind, weight, weights = o[1], 1.0, 0
        step, factor = o[3 + depth - 1], o[3 + 2 * depth - 1]
        if kind == at.WEIGHT_SCALAR:
            weight = doubles(here)[2]
        elif kind == at.WEIGHT_VECTOR:
            if p[CHANNEL] == depth - 1:
                weights = o[2] + first * (bits // 8)
            else:
                kind = at.WEIGHT_SCALAR
                weight = float(elements(bits, o[2])[weight_position(params, row)])
        source = o[0] + operand_offset(params, j, depth - 1, row) * item
        run = source + first * item
        if step != 1 or factor != 1:
            spread(stored, spare, source, step, factor, first, count)
            run = spare
        merge_rows(bits, bits, stored, stored, buffer, 0, run, 0, 1, count, kind, weight, weights, j > 1)
    out = words(params + 8 * (HEAD + depth))
    step = out[3 + depth - 1]
    to = out[0] + (operand_offset(params, 0, depth - 1, row) + first * step) * item
    if step == 1 and stored == bits:
        finish_rows(bits, 0, 1, to, 0, buffer, 0, count, 0, 0, 0, p[ACTIVATION], doubles(params)[SLOPE])
    else:
        finish_rows(bits, 0, 1, buffer, 0, buffer, 0, count, 0, 0, 0, p[ACTIVATION], doubles(params)[SLOPE])
        if step == 1:
            store_rows(bits, stored, to, 0, buffer, 0, 1, count)
        else:
            store_rows(bits, stored, spare, 0, buffer, 0, 1, count)
            d, s = elements(stored, to), elements(stored, spare)
            for i in range(count):
                d[i * step] = s[i]


MOST_IN_TABLE = 64  # sources whose addresses fit the task's table; more go through the buffer
TABLE = MOST_IN_TABLE + 1  # with the output, which comes first


@inline
def add_plain(bits, stored, params, row0, row1, start, end):
    """Elements start to end of some rows of an add that only adds: row by row along the last axis but one.

    Where the other axes are is worked out once for a line of rows. It took longer than adding a row of 128.
    """
    p = words(params)
    depth, sources, item = p[DEPTH], p[SOURCES], stored // 8
    size, lines = 3 + 2 * depth, max(0, depth - 2)
    extent = p[HEAD + depth - 2] if depth > 1 else 1
    bases, table = words(stack_words(TABLE)), stack_words(TABLE)
    addresses = words(table)
    row = row0
    while row < row1:
        line, first = row // extent, row % extent
        count = min(row1 - row, extent - first)
        for j in range(sources + 1):
            bases[j] = p[HEAD + depth + j * size] + (operand_offset(params, j, lines, line) + start) * item
        for position in range(first, first + count):
            for j in range(sources + 1):
                address = bases[j]
                if depth > 1:
                    o = words(params + 8 * (HEAD + depth + j * size + 3 + depth - 2))
                    step, factor = o[0] * item, o[depth]
                    address += (position if factor == 1 else position // factor) * step
                addresses[j] = address
            add_run(bits, stored, addresses[0], table + 8, sources, end - start, p[NONTEMPORAL])
        row += count


@functools.cache
def add_task(bits: int, stored: int, is_plain: bool) -> int:
    """Address of the task of an add; is_plain: of one whose PLAIN word is set, compiled in a fraction of the time."""

    def add(params, index, slot):
        p = words(params)
        inner = p[HEAD + p[DEPTH] - 1]
        piece = index % p[PIECES]
        row0 = index // p[PIECES] * p[TASK_ROWS]
        row1 = min(p[ROWS], row0 + p[TASK_ROWS])
        start, end = piece * p[PIECE], min(inner, (piece + 1) * p[PIECE])
        if is_plain:
            add_plain(bits, stored, params, row0, row1, start, end)
        else:
            buffer, spare = stack_words(BLOCK), stack_words(BLOCK)
            for row in range(row0, row1):
                for first in range(start, end, BLOCK):
                    add_general(bits, stored, params, row, first, min(BLOCK, end - first), buffer, spare)

    return task(add)
