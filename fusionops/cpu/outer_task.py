"""The task of a product with few pixels: a sum of outer products, which reads filters once and row by row.

    sums[m,k] += merged[m,c] · w[c,k]      for one channel after the other

Few pixels do not pay for filters that come from memory in pieces: all pixels are multiplied with some rows of filters
while they are at hand (those that groups of four leave over in a second pass, from L1 or L2), and sums stay in L1
meanwhile. A task owns the pixels of a tile and one filter block. The order of a sum
is that of `gemm_task`, so the bits are too. Chooses no extents.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import params as at
from fusionops.cpu.conv import locate_task
from fusionops.cpu.epilogue import finish_tile, scatter_tile
from fusionops.cpu.gemm_task import list_sources, place_rows
from fusionops.cpu.jit import inline, task
from fusionops.cpu.microkernel import SEGMENT_WORDS
from fusionops.cpu.prologue import load_tile, merge_rows
from fusionops.cpu.simd import VECTOR_BYTES, Lanes, Tail, clear, elements, vector_loop, word, words
from fusionops.cpu.target import target
from fusionops.cpu.transpose import stack_words

# Of a tile. Register tiles took 1.3 to 4 times as long for 20 pixels and 512, 1300, 2048 channels with 1024, 2600, 4096
# filters, and 0.86 to 1.02 of the time for 32.
MOST_PIXELS = 24
PIXELS_AT_ONCE = 4  # 2 took 1.02 of the time
# What remains has a loop of its own. So many keep their elements in registers and load the filters as they go: 0.73 to
# 0.92 of the time in the loop of those before them. Three keep the filters instead, 0.73 to 0.85 (AVX2).
FEW = 2
# At a time: sums are read and written once for as many rows of filters, which a quarter of the registers hold. With 16
# instead of 8 the lines asked for ahead no longer fit L1: 1.1 times as long over ten dense layers of 1 to 24 rows.
CHANNELS = min(8, target().vector_registers * target().vector_bytes // 128)
AHEAD = 64 // CHANNELS  # vectors of each row; half as far took 1.02 of the time
NEAR_WORDS = MOST_PIXELS * CHANNELS


@intrinsic(prefer_literal=True)
def add_outer_products(typing, bits, channels, rows, a, a_step, row, row_step, count, sums, sums_step):
    """sums[m, k] += Σ_c A[m, c] · B[c, k] for m < rows, k < count, c < channels, in the order of c.

    Addresses and steps in bytes; bits and channels literal. Sums are read and written once, by whole vectors.
    """
    if not (isinstance(bits, types.IntegerLiteral) and isinstance(channels, types.IntegerLiteral)):
        return None
    signature = types.void(bits, channels, *[types.intp] * 8)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, a, a_step, row, row_step, count, sums, sums_step = args[2:]
        lanes = Lanes(b, bits.literal_value)
        size = word(lanes.item_bytes)
        starts = [b.add(row, b.mul(row_step, word(c))) for c in range(channels.literal_value)]

        ahead, length = b.mul(row_step, word(channels.literal_value)), b.mul(count, size)

        def ask(place: ir.Value) -> None:
            """For what is read AHEAD vectors later, at the end of these rows for the beginning of the next ones."""
            later = b.add(place, word(AHEAD * VECTOR_BYTES))
            later = b.select(b.icmp_signed("<", later, length), later, b.add(ahead, b.sub(later, length)))
            for start in starts:
                lanes.prefetch(lanes.pointer(b.add(start, later)), level=1)

        def load(start: ir.Value, place: ir.Value, tail: Tail | None) -> ir.Value:
            return lanes.load_part(lanes.pointer(b.add(start, place)), tail)

        def elements(pixel: ir.Value) -> list[ir.Value]:
            """Of A, each in all lanes."""
            here = lanes.pointer(b.add(a, b.mul(pixel, a_step)))
            return [b.gep(here, [word(c)]) for c in range(channels.literal_value)]

        def add(first: ir.Value, together: int, place: ir.Value, rows_of_b: Any, x: Any) -> None:
            """To the sums of `together` pixels, which do not wait for one another."""
            to = [b.mul(b.add(first, word(i)), sums_step) for i in range(together)]
            to = [lanes.pointer(b.add(b.add(sums, offset), place)) for offset in to]
            values = [lanes.load(pointer) for pointer in to]
            for c in range(channels.literal_value):
                vector = rows_of_b(c)
                for i in range(together):
                    values[i] = lanes.multiply_add(x(i, c), vector, values[i])
            for pointer, value in zip(to, values, strict=True):
                lanes.store(value, pointer)

        def many(first: ir.Value, together: int, groups: ir.Value) -> None:
            """Vectors of B in registers, elements of A as they are used."""

            def body(offset: ir.Value, tail: Tail | None) -> None:
                place = b.mul(offset, size)
                ask(place)
                kept = [load(start, place, tail) for start in starts]
                with cgutils.for_range(b, groups) as group:
                    pixel = b.add(first, b.mul(group.index, word(together)))
                    here = [elements(b.add(pixel, word(i))) for i in range(together)]
                    add(pixel, together, place, lambda c: kept[c], lambda i, c: lanes.splat(b.load(here[i][c])))

            vector_loop(b, lanes, count, body)

        def few(first: ir.Value, together: int) -> None:
            """Elements of A in registers, vectors of B as they are used."""
            x = [[lanes.splat(b.load(e)) for e in elements(b.add(first, word(i)))] for i in range(together)]

            def body(offset: ir.Value, tail: Tail | None) -> None:
                place = b.mul(offset, size)
                ask(place)
                add(first, together, place, lambda c: load(starts[c], place, tail), lambda i, c: x[i][c])

            vector_loop(b, lanes, count, body)

        whole = b.sdiv(rows, word(PIXELS_AT_ONCE))
        with b.if_then(b.icmp_signed(">", whole, word(0))):
            many(word(0), PIXELS_AT_ONCE, whole)
        done = b.mul(whole, word(PIXELS_AT_ONCE))
        for rest in range(1, PIXELS_AT_ONCE):
            with b.if_then(b.icmp_signed("==", b.sub(rows, done), word(rest))):
                if rest > FEW:
                    many(done, rest, word(1))
                else:
                    few(done, rest)
        return context.get_dummy_value()

    return signature, codegen


@inline
def gather(bits, to, source, step, rows):
    """Copies CHANNELS channels of each pixel side by side.

    Rows a power of two apart fall into a few sets of L1: 20 pixels of 1024 channels took 1.6 times as long from there.
    """
    there = elements(bits, to)
    for m in range(rows):
        here = elements(bits, source + m * step)
        for c in range(CHANNELS):
            there[m * CHANNELS + c] = here[c]


@functools.cache
def outer_task(bits: int) -> int:
    """Address of the task, whatever the number of pixels and the width of a block."""
    item = bits // 8

    def outer(params, index, slot):
        p = words(params)
        scratch = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        n, p0, p1, q0, q1, group, block, _ = locate_task(params, index)
        rows, width, is_turned = (p1 - p0) * (q1 - q0), p[at.WIDTH], p[at.OUT_K] != 1
        outs, residuals, copy = scratch + p[at.AT_OUT], scratch + p[at.AT_RESIDUAL], scratch + p[at.AT_COPY]
        segments, total = scratch + p[at.AT_SEGMENTS], scratch + p[at.AT_SUMS]
        table, near = words(segments), stack_words(NEAR_WORDS)
        place_rows(params, outs, residuals, n, p0, p1, q0, q1, rows)
        channels, filters = p[at.C] // p[at.GROUPS], p[at.K] // p[at.GROUPS]
        k0, used = group * filters + block * width, min(width, filters - block * width)
        row_bytes = p[at.FILTER_ROW] * item
        row = p[at.FILTERS] + (group * p[at.FILTER_GROUP] + block * p[at.FILTER_BLOCK]) * item
        for c0 in range(0, channels, p[at.DEPTH]):
            depth = min(p[at.DEPTH], channels - c0)
            if p[at.READS_SOURCES]:
                count = list_sources(item, params, segments, n, p0, q0, group * channels + c0, depth)
            else:
                load_tile(params, scratch, q1 - q0, n, p0, p1 - p0, q0, q1 - q0, group * channels + c0, depth)
                table[0], table[1], table[2] = scratch, depth * item, depth
                count = 1
            sums = total if c0 == 0 else total + rows * width * item
            clear(sums, rows * width * item)
            for s in range(count):
                a, step, run = (table[s * SEGMENT_WORDS], table[s * SEGMENT_WORDS + 1], table[s * SEGMENT_WORDS + 2])
                whole = run // CHANNELS * CHANNELS
                for c in range(0, whole, CHANNELS):
                    gather(bits, near, a + c * item, step, rows)
                    add_outer_products(bits, CHANNELS, rows, near, CHANNELS * item, row, row_bytes, used,
                                       sums, width * item)  # fmt: skip
                    row += CHANNELS * row_bytes
                for c in range(whole, run):
                    add_outer_products(bits, 1, rows, a + c * item, step, row, row_bytes, used, sums, width * item)
                    row += row_bytes
            if c0 > 0:
                merge_rows(bits, bits, bits, bits, total, 0, sums, 0, 1, rows * width, at.WEIGHT_NONE, 1.0, 0, 1)
        finish_tile(params, total, width, outs, residuals, copy, rows, k0, used, is_turned)
        if is_turned:
            scatter_tile(params, total, outs, rows, k0, used)

    return task(outer)
