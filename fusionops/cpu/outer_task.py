"""The task of a product with few pixels: a sum of outer products, which reads filters once and in whole rows.

    sums[m,k] += merged[m,c] · w[c,k]      for some channels after the others

Few pixels do not pay for filters that come from memory in pieces: all pixels are multiplied with some rows of filters
while they are at hand, and sums stay in L1 meanwhile. A task owns the pixels of a tile and one filter block. The order
of a sum is that of `gemm_task`, so the bits are too. Chooses no extents.
"""

from __future__ import annotations

import functools

from fusionops.cpu import params as at
from fusionops.cpu.conv import locate_task
from fusionops.cpu.epilogue import finish_tile, scatter_tile
from fusionops.cpu.gemm_task import list_sources, place_rows
from fusionops.cpu.jit import task
from fusionops.cpu.microkernel import SEGMENT_WORDS
from fusionops.cpu.outer_products import CHANNELS, add_outer_products
from fusionops.cpu.prologue import load_tile, merge_rows
from fusionops.cpu.simd import clear, words


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
        table = words(segments)
        place_rows(params, outs, residuals, n, p0, p1, q0, q1, rows)
        channels, filters = p[at.C] // p[at.GROUPS], p[at.K] // p[at.GROUPS]
        k0, used = group * filters + block * width, min(width, filters - block * width)
        row_bytes = p[at.FILTER_ROW] * item
        row = p[at.FILTERS] + (group * p[at.FILTER_GROUP] + block * p[at.FILTER_BLOCK]) * item
        left = channels
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
                for c in range(0, run, CHANNELS):
                    together = min(CHANNELS, run - c)
                    left -= together
                    following = min(together, left) * row_bytes  # no row beyond the last
                    add_outer_products(bits, rows, together, a + c * item, step, row, row_bytes, following, used,
                                       sums, width * item)  # fmt: skip
                    row += together * row_bytes
            if c0 > 0:
                merge_rows(bits, bits, bits, bits, total, 0, sums, 0, 1, rows * width, at.WEIGHT_NONE, 1.0, 0, 1)
        finish_tile(params, total, width, outs, residuals, copy, rows, k0, used, is_turned)
        if is_turned:
            scatter_tile(params, total, outs, rows, k0, used)

    return task(outer)
