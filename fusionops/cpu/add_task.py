"""The task of an add without a contraction: a span of the output. Chooses no extents."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import activation as activations
from fusionops.cpu import params as at
from fusionops.cpu.concat_task import AROUND, LINE_WORDS, WOVEN, copy_rows, stream_lines
from fusionops.cpu.epilogue import finish_rows
from fusionops.cpu.formats import Stored, literals, store_rows
from fusionops.cpu.jit import inline, spliced, task
from fusionops.cpu.prologue import merge_rows
from fusionops.cpu.simd import I64, VECTOR_BYTES, Lanes, Tail, doubles, elements, word, words
from fusionops.cpu.transpose import stack_words

# Words of an add: these, the extents, then for each operand (output first) base, weight kind, weight, steps, factors.
SOURCES, DEPTH, ROWS, TASK_ROWS, PIECES, PIECE, WAY, STORES, ACTIVATION, SLOPE, CHANNEL, AT_ONCE = range(12)
HEAD = 12
# How it adds: through a buffer, whatever the steps and the activation; contiguous runs of at most MOST_IN_TABLE sources
# in registers, with weights and relus; those without.
GENERAL, RUNS, SUMS = range(3)
# Runs are stored as those of a concat are: THROUGH the caches, AROUND them, or WOVEN.

BLOCK = 1024  # elements of the buffer that a general add goes through: 4 to 8 KiB, a small part of L1
# Bytes of a vector where elements are stored as they are computed with, and bytes in flight. On AVX-512, vectors twice
# as wide took 1.04 to 1.08 times as long for 3 to 25 MB in all, 1.3 times for 200 MB: NumPy's large arrays begin within
# a cache line, and each vector of 64 bytes lies in two. Twice as many in flight gained nothing.
RUN_VECTOR, IN_FLIGHT = 32, 256
# Elements of a run that pays for a masked vector, after which stores lie within lines: maps of 0.2 to 12 MB took 0.96
# to 1.0 of the time. Counting from 200 on, rows of 256 took 0.94 to 1.14 times as long.
LONG = 1024


def operand_words(depth: int) -> int:
    return 3 + 2 * depth


@intrinsic(prefer_literal=True)
def add_run(typing, bits, stored, way, to, table, first, sources, count, nontemporal, weights, activation, slope):
    """to[i] = act( (w0·x0[first + i] + w1·x1[first + i]) + … ) for contiguous runs whose addresses stand in `table`.

    bits, stored, way   literal; SUMS: there are no weights and no activation, and the last three are not read
    weights             for each source a word with the address of its first weight, and one with their step: 0 or 1
    """
    if not literals(bits, stored, way):
        return None
    signature = types.void(bits, stored, way, *[types.intp] * 8, types.float64)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address, table, first, sources, count, nontemporal, weights, activation, slope = args[3:]
        vector_bytes = RUN_VECTOR if stored.literal_value == bits.literal_value else VECTOR_BYTES
        lanes, is_sum = Lanes(b, bits.literal_value, vector_bytes), way.literal_value == SUMS
        unroll = IN_FLIGHT // vector_bytes
        there = Stored(lanes, stored.literal_value)
        to, table, weights = there.pointer(address), *(b.inttoptr(w, I64.as_pointer()) for w in (table, weights))
        sums = [cgutils.alloca_once(b, lanes.type) for _ in range(unroll)]
        slopes = lanes.splat(b.fptrunc(slope, lanes.scalar) if lanes.bits == 32 else slope)
        terms = None if is_sum else activations.relu_terms(lanes, activation, slopes)

        def span(offset: ir.Value, vectors: int, tail: Tail | None, store: Any) -> None:
            offsets = [b.add(b.add(first, offset), word(v * lanes.count)) for v in range(vectors)]

            def load(source: ir.Value, v: int) -> ir.Value:
                place = b.gep(there.pointer(b.load(b.gep(table, [source]))), [offsets[v]])
                value = there.load(place, tail)
                if is_sum:
                    return value
                start, step = (b.load(b.gep(weights, [b.add(b.mul(source, word(2)), word(k))])) for k in range(2))
                weight = lanes.load_part(b.gep(lanes.pointer(start), [b.mul(offsets[v], step)]), tail)
                return there.round(b.fmul(value, weight))

            for v in range(vectors):
                b.store(load(word(0), v), sums[v])
            with cgutils.for_range(b, sources, start=word(1)) as j:
                for v in range(vectors):
                    b.store(there.round(b.fadd(b.load(sums[v]), load(j.index, v))), sums[v])
            for v in range(vectors):
                total = b.load(sums[v])
                value = total if terms is None else activations.any_relu(lanes, total, terms)
                store(value, b.gep(to, [b.add(offset, word(v * lanes.count))]))

        def masked(offset: ir.Value, rest: ir.Value) -> None:
            with b.if_then(b.icmp_signed(">", rest, word(0))):
                tail = lanes.tail(rest)
                span(offset, 1, tail, lambda value, place: there.store(value, place, tail))

        def body(start: ir.Value, store: Any) -> ir.Value:
            """Whole vectors from `start` on; returns where they end."""
            whole = b.sdiv(b.sub(count, start), word(lanes.count))
            blocks = b.sdiv(whole, word(unroll))
            with cgutils.for_range(b, blocks) as i:
                span(b.add(start, b.mul(i.index, word(unroll * lanes.count))), unroll, None, store)
            done = b.mul(blocks, word(unroll))
            with cgutils.for_range(b, b.sub(whole, done)) as i:
                span(b.add(start, b.mul(b.add(done, i.index), word(lanes.count))), 1, None, store)
            return b.add(start, b.mul(whole, word(lanes.count)))

        # An array that starts between two multiples of its item size has no aligned vector.
        off = b.and_(address, word(there.item_bytes - 1))
        goes_around = b.and_(b.icmp_signed("!=", nontemporal, word(0)), b.icmp_signed("==", off, word(0)))
        stored_bytes = lanes.count * there.item_bytes  # of a vector: half as many where elements are narrow
        ahead = b.sdiv(b.and_(b.neg(address), word(stored_bytes - 1)), word(there.item_bytes))
        ahead = b.select(b.icmp_signed("<", ahead, count), ahead, count)
        with b.if_else(goes_around) as (around, through):
            with around:  # stores around the caches need whole, aligned vectors: a masked one goes first
                masked(word(0), ahead)
                end = body(ahead, there.stream)
                masked(end, b.sub(count, end))
            with through:
                head = b.select(b.icmp_signed(">=", count, word(LONG)), ahead, word(0))
                masked(word(0), head)
                end = body(head, there.store)
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
    """One run of an add with any weights, activation and steps, through a buffer in L1."""
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
GATHER_BYTES = 1 << 14  # of the rows that wait in L1, half of it at most
GATHER_WORDS = GATHER_BYTES // 8
WEIGHTS, FACTORS = 2 * MOST_IN_TABLE, MOST_IN_TABLE * VECTOR_BYTES // 8  # words of `place_weights`


@inline
def place_weights(bits, params, factors, weights, row, start):
    """Fills the words of `add_run` for a row from element `start` on; what a row has one of fills a vector there."""
    p, w = words(params), words(weights)
    depth = p[DEPTH]
    for j in range(p[SOURCES]):
        here = params + 8 * (HEAD + depth + (j + 1) * (3 + 2 * depth))
        o, factor = words(here), 1.0
        kind, place = o[1], factors + j * VECTOR_BYTES
        w[2 * j], w[2 * j + 1] = place, 0
        if kind == at.WEIGHT_VECTOR and p[CHANNEL] == depth - 1:
            w[2 * j], w[2 * j + 1] = o[2] + start * (bits // 8), 1
            continue
        if kind == at.WEIGHT_SCALAR:
            factor = doubles(here)[2]
        elif kind == at.WEIGHT_VECTOR:
            factor = float(elements(bits, o[2])[weight_position(params, row)])
        lanes = elements(bits, place)
        for i in range(VECTOR_BYTES // (bits // 8)):
            lanes[i] = factor


@inline
def part_of_run(part, is_first, is_last, to, stage, item, count):
    """Where a part of a woven run goes, its first element, and how many it has.

    Part 0 ends the line that the run before has begun, part 1 are whole lines, part 2 begins a line. Lines that two
    runs share are put together at `stage`, where there is room for one more before and behind; a vector that reaches
    beyond its part fills that room. A task shares none with another: its first and last line are stored in parts.
    """
    line = VECTOR_BYTES // item
    ends = -to % VECTOR_BYTES // item
    begins = (count - ends) % line
    if part == 0:
        if is_first or ends == 0:
            return to, 0, ends
        return stage + VECTOR_BYTES - ends * item, 0, line
    if part == 1:
        return to + ends * item, ends, count - ends - begins
    if is_last or begins == 0:
        return to + (count - begins) * item, count - begins, begins
    return stage + begins * item - VECTOR_BYTES, count - line, line


@inline
def gather(to, source, step, factor, first, rows, count):
    """Copies rows from row `first` on, each repeated `factor` times, so that they follow one another. All in bytes."""
    place, done = first // factor, 0
    alike = rows if factor == 1 else min(rows, factor - first % factor)
    while done < rows:
        copy_rows(to + done * count, count, source + place * step, step if factor == 1 else 0, alike, count)
        place, done = place + 1, done + alike
        alike = min(factor, rows - done)


@spliced
def add_runs(bits, stored, way, params, row0, row1, start, end):
    """Elements start to end of some rows of contiguous runs: AT_ONCE rows after the others along the last axis but one.

    Where the other axes are is worked out once for a line of rows. It took longer than adding a row of 128.
    """
    p = words(params)
    depth, sources, item, inner = p[DEPTH], p[SOURCES], stored // 8, end - start
    size, lines = 3 + 2 * depth, max(0, depth - 2)
    extent = p[HEAD + depth - 2] if depth > 1 else 1
    bases, table = words(stack_words(TABLE)), stack_words(TABLE)
    stage, gathered = stack_words(LINE_WORDS) + VECTOR_BYTES, stack_words(GATHER_WORDS)
    weights, factors = 0, 0
    if way == RUNS:
        weights, factors = stack_words(WEIGHTS), stack_words(FACTORS)
    addresses, is_woven = words(table), p[STORES] == WOVEN and p[HEAD + depth] % item == 0
    row = row0
    while row < row1:
        line, first = row // extent, row % extent
        last = min(row1 - row, extent - first) + first
        for j in range(sources + 1):
            bases[j] = p[HEAD + depth + j * size] + (operand_offset(params, j, lines, line) + start) * item
        for position in range(first, last, p[AT_ONCE]):
            rows = min(p[AT_ONCE], last - position)
            count, buffer = rows * inner, gathered
            for j in range(sources + 1):
                address = bases[j]
                if depth > 1:
                    o = words(params + 8 * (HEAD + depth + j * size + 3 + depth - 2))
                    step, factor = o[0] * item, o[depth]
                    if p[AT_ONCE] > 1 and (factor != 1 or o[0] != inner):  # counted when AT_ONCE was chosen
                        gather(buffer, address, step, factor, position, rows, inner * item)
                        address = buffer
                        buffer += p[AT_ONCE] * inner * item
                    else:
                        address += (position if factor == 1 else position // factor) * step
                addresses[j] = address
            if way == RUNS and (row == row0 or (p[CHANNEL] >= 0 and p[CHANNEL] != depth - 1)):
                place_weights(bits, params, factors, weights, row, start)
            if not is_woven:
                add_run(bits, stored, way, addresses[0], table + 8, 0, sources, count, p[STORES] == AROUND, weights,
                        p[ACTIVATION], doubles(params)[SLOPE])  # fmt: skip
            else:
                is_first, is_last = row == row0, row + rows == row1
                for part in range(3):
                    to, begin, number = part_of_run(part, is_first, is_last, addresses[0], stage, item, count)
                    if number > 0:
                        add_run(bits, stored, way, to, table + 8, begin, sources, number, part == 1, weights,
                                p[ACTIVATION], doubles(params)[SLOPE])  # fmt: skip
                    if part == 0 and number > 0 and not is_first:
                        stream_lines(addresses[0] - addresses[0] % VECTOR_BYTES, stage, 1)
            row += rows


@functools.cache
def add_task(bits: int, stored: int, way: int) -> int:
    """Address of the task of an add in one of the ways, of which SUMS is compiled in a fraction of the others' time."""

    def add(params, index, slot):
        p = words(params)
        inner = p[HEAD + p[DEPTH] - 1]
        piece = index % p[PIECES]
        row0 = index // p[PIECES] * p[TASK_ROWS]
        row1 = min(p[ROWS], row0 + p[TASK_ROWS])
        start, end = piece * p[PIECE], min(inner, (piece + 1) * p[PIECE])
        if way != GENERAL:
            add_runs(bits, stored, way, params, row0, row1, start, end)
        else:
            buffer, spare = stack_words(BLOCK), stack_words(BLOCK)
            for row in range(row0, row1):
                for first in range(start, end, BLOCK):
                    add_general(bits, stored, params, row, first, min(BLOCK, end - first), buffer, spare)

    return task(add)
