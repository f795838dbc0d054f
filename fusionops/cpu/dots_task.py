"""The task of a contraction with very few filters: sums of dot products, along the channels of a pixel and its taps.

    sums[k,m] = Σ_{r,s,c} merged[…, c] · w[k,r,s,c]

Vectors of filters would be nearly empty. Channels of neighbouring taps lie side by side, in a loaded tile at least: a
run of them for each row of taps. Lane l sums the products of the elements l, l + L, l + 2L, … of all runs; then the
upper half of the lanes is added to the lower one until one is left. A task owns TILE_P × TILE_Q pixels and all filters,
and finishes one filter after the other. Taps in the padding are skipped. Chooses no extents.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import params as at
from fusionops.cpu.conv import locate_task, run_end, valid_taps
from fusionops.cpu.gemm_task import list_sources
from fusionops.cpu.jit import task
from fusionops.cpu.microkernel import SEGMENT_WORDS
from fusionops.cpu.planes_task import finish_plane
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import I32, I64, Lanes, Tail, vector_loop, word, words

PIXELS = 4  # at a time: their sums do not wait for one another, and their lanes are added together


def _sums_of_lanes(b: ir.IRBuilder, vectors: list[ir.Value], lanes: int) -> ir.Value:
    """One vector with the sum of the lanes of each of PIXELS vectors."""

    def part(x: ir.Value, y: ir.Value, picked: list[int]) -> ir.Value:
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(picked)), picked))

    while lanes > PIXELS:
        low, high = list(range(lanes // 2)), list(range(lanes // 2, lanes))
        vectors = [b.fadd(part(x, x, low), part(x, x, high)) for x in vectors]
        lanes //= 2
    for low, high in ([0, 1, 4, 5], [2, 3, 6, 7]), ([0, 2, 4, 6], [1, 3, 5, 7]):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(part(x, y, low), part(x, y, high)) for x, y in pairs]
    return vectors[0]


@intrinsic(prefer_literal=True)
def sum_dots(typing, bits, segments, count, rows, filters, panel, panel_step, gap, sums, sums_step):
    """sums[k, m] = Σ A[m, :] · B[k, :] over `count` segments, for m < rows, k < filters.

    segments    of A, as those of `gemm_segments`, each with lanes of its own; those of B are `gap` apart
    Addresses and steps in bytes. Sums are written by PIXELS at a time, those of no pixel too.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    signature = types.void(bits, *[types.intp] * 9)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        segments, count, rows, filters, panel, panel_step, gap, sums, sums_step = args[1:]
        lanes = Lanes(b, bits.literal_value)
        size, last = word(lanes.item_bytes), b.sub(rows, word(1))
        table = b.inttoptr(segments, I64.as_pointer())
        totals = [cgutils.alloca_once(b, lanes.type) for _ in range(PIXELS)]
        run_of_b = cgutils.alloca_once(b, I64)

        def add_segment(number: ir.Value, pixels: list[ir.Value]) -> None:
            entry = [b.gep(table, [b.add(b.mul(number, word(SEGMENT_WORDS)), word(i))]) for i in range(3)]
            start, step, run = map(b.load, entry)
            heads = [lanes.pointer(b.add(start, b.mul(pixel, step))) for pixel in pixels]
            here = b.load(run_of_b)

            def body(offset: ir.Value, tail: Tail | None) -> None:
                w = lanes.load_part(b.gep(lanes.pointer(here), [offset]), tail)
                for head, total in zip(heads, totals, strict=True):
                    x = lanes.load_part(b.gep(head, [offset]), tail)
                    b.store(lanes.multiply_add(x, w, b.load(total)), total)

            vector_loop(b, lanes, run, body)
            b.store(b.add(b.add(here, gap), b.mul(run, size)), run_of_b)

        groups = b.sdiv(b.add(last, word(PIXELS)), word(PIXELS))
        with cgutils.for_range(b, groups) as group, cgutils.for_range(b, filters) as k:
            first = b.mul(group.index, word(PIXELS))
            pixels = [b.add(first, word(i)) for i in range(PIXELS)]  # beyond the last one, that one again
            pixels = [b.select(b.icmp_signed("<", pixel, last), pixel, last) for pixel in pixels]
            for total in totals:
                b.store(lanes.constant(0.0), total)
            b.store(b.add(panel, b.mul(k.index, panel_step)), run_of_b)
            with cgutils.for_range(b, count) as n:
                add_segment(n.index, pixels)
            result = _sums_of_lanes(b, [b.load(total) for total in totals], lanes.count)
            place = b.add(b.add(sums, b.mul(k.index, sums_step)), b.mul(first, size))
            b.store(result, b.inttoptr(place, result.type.as_pointer())).align = 1
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def dots_task(bits: int) -> int:
    """Address of the task, whatever the number of channels, taps and filters."""
    item = bits // 8

    def dots(params, index, slot):
        p = words(params)
        scratch = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        n, p0, p1, q0, q1, _, _, _ = locate_task(params, index)
        channels, filters, taps = p[at.C], p[at.K], p[at.S]
        stride_h, stride_w, dilation_h = p[at.STRIDE_H], p[at.STRIDE_W], p[at.DILATION_H]
        h0, w0 = p0 * stride_h - p[at.PAD_TOP], q0 * stride_w - p[at.PAD_LEFT]
        sums, line = scratch + p[at.AT_SUMS], p[at.SUMS_STEP]
        segments = scratch + p[at.AT_SEGMENTS]
        table, s = words(segments), words(params + 8 * at.SOURCES)
        pixel = channels * item
        if p[at.READS_SOURCES]:
            base, top, left = s[at.S_BASE] + n * s[at.S_N] * item, 0, 0
            row_step, pixel_step = s[at.S_H] * item, s[at.S_W] * item
        else:
            rows, cols = (p1 - 1 - p0) * stride_h + p[at.ROWS], (q1 - 1 - q0) * stride_w + taps
            load_tile(params, scratch, p[at.PITCH], n, h0, rows, w0, cols, 0, channels)
            base, top, left = scratch, max(0, h0), max(0, w0)
            row_step, pixel_step = p[at.PITCH] * pixel, pixel
        for row in range(p0, p1):
            r0, r1 = valid_taps(row * stride_h - p[at.PAD_TOP], dilation_h, p[at.R], p[at.H])
            q = q0
            while q < q1:
                end = run_end(q, q1, p[at.PAD_LEFT], stride_w, 1, taps, p[at.W])
                s0, s1 = valid_taps(q * stride_w - p[at.PAD_LEFT], 1, taps, p[at.W])
                if p[at.READS_SOURCES] and p[at.SOURCE_COUNT] > 1:
                    count = list_sources(item, params, segments, n, row, q, 0, channels)
                else:
                    count = r1 - r0
                    first = base + (q * stride_w - p[at.PAD_LEFT] + s0 - left) * pixel_step
                    for r in range(r0, r1):
                        h, entry = row * stride_h - p[at.PAD_TOP] + r * dilation_h - top, (r - r0) * SEGMENT_WORDS
                        table[entry], table[entry + 1] = first + h * row_step, stride_w * pixel_step
                        table[entry + 2] = (s1 - s0) * channels
                sum_dots(bits, segments, count, end - q, filters, p[at.FILTERS] + (r0 * taps + s0) * pixel,
                         p[at.R] * taps * pixel, (taps - s1 + s0) * pixel, sums + (q - q0) * item, line)  # fmt: skip
                q = end
            for k in range(filters):
                finish_plane(bits, params, sums + k * line, scratch + p[at.AT_OUT], scratch + p[at.AT_COPY],
                             n, row, q0, q1 - q0, k)  # fmt: skip

    return task(dots)
