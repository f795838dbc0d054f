"""The task of a 1×1 convolution or a dense layer: pixels as rows of a matrix, times filters. Chooses no extents.

    y[m,k] = act( Σ_c merged[m,c] · w[c,k] + b[k] + residual[m,k] )

A task owns TILE_P × TILE_Q pixels and TASK_BLOCKS filter blocks. For each chunk of channels its rows are the merged
tile that it loads, or the sources themselves: those of a concatenation follow one another in the reduction, so nothing
is copied. Order of the sum: chunks of channels, in each the channels.
"""

from __future__ import annotations

import functools

from fusionops.cpu import params as at
from fusionops.cpu.conv import locate_task
from fusionops.cpu.epilogue import NOWHERE, RELU, ask_for_channels, finish_tile, finishes_in_registers, scatter_tile
from fusionops.cpu.formats import store_rows
from fusionops.cpu.jit import inline, task
from fusionops.cpu.microkernel import SEGMENT_WORDS, gemm_segments
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import clear, prefetch_read, words
from fusionops.cpu.tiling import shorter_tile, tiles_of

COPY_AHEAD = 4  # rows of filters asked for ahead of their copy: 1 to 12 differed by less than the noise


@inline
def place_rows(params, outs, residuals, n, p0, p1, q0, q1, count):
    """Fills the tables with the places of the pixels of a tile, row by row; the rest of `count` rows is nowhere."""
    p = words(params)
    to, residual = words(outs), words(residuals)
    i = 0
    for row in range(p0, p1):
        line = n * p[at.OUT_N] + row * p[at.OUT_P]
        for col in range(q0, q1):
            to[i + col - q0] = line + col * p[at.OUT_Q]
        if p[at.RESIDUAL] != 0:
            line = n * p[at.RESIDUAL_N] + row // p[at.RESIDUAL_UP_H] * p[at.RESIDUAL_P]
            if p[at.RESIDUAL_UP_W] == 1:
                for col in range(q0, q1):
                    residual[i + col - q0] = line + col * p[at.RESIDUAL_Q]
            else:
                for col in range(q0, q1):
                    residual[i + col - q0] = line + col // p[at.RESIDUAL_UP_W] * p[at.RESIDUAL_Q]
        i += q1 - q0
    for rest in range(i, count):
        to[rest] = NOWHERE


@inline
def list_sources(item, params, segments, n, row, col, c0, depth):
    """Fills the table of segments with the sources that hold channels c0 to c0 + depth; returns how many these are."""
    p, table = words(params), words(segments)
    count = 0
    for j in range(p[at.SOURCE_COUNT]):
        s = words(params + 8 * (at.SOURCES + j * at.SOURCE_WORDS))
        first = s[at.S_FIRST]
        c_from, c_to = max(c0, first), min(c0 + depth, first + s[at.S_CHANNELS])
        if c_from < c_to:
            start = n * s[at.S_N] + row * s[at.S_H] + col * s[at.S_W] + c_from - first
            table[count], table[count + 1] = s[at.S_BASE] + start * item, s[at.S_W] * item
            table[count + 2] = c_to - c_from
            count += SEGMENT_WORDS
    return count // SEGMENT_WORDS


@inline
def copy_filters(bits, params, to, source, width, depth, block0, block1, filters):
    """Copies `depth` channels of the filters of a task, which lie row by row, to one panel after the other."""
    item = bits // 8
    step, first = words(params)[at.FILTER_ROW] * item, source + block0 * width * item
    whole = min(block1, filters // width) - block0
    rest = filters - (block0 + whole) * width if block0 + whole < block1 else 0
    end = to + whole * depth * width * item
    if rest:
        clear(end, depth * width * item)
    for c in range(depth):
        row, panel = first + c * step, c * width * item
        prefetch_read(row + COPY_AHEAD * step, (whole * width + rest) * item)
        store_rows(bits, bits, to + panel, depth * width, row, width, whole, width)
        if rest:
            store_rows(bits, bits, end + panel, 0, row + whole * width * item, 0, 1, rest)


split_rows = inline(tiles_of)


@functools.cache
def gemm_task(bits: int, mr: int, nv: int, half: bool) -> int:
    """Address of the task compiled for one register tile and the shorter one, and for half of each if asked."""
    width = nv * (512 // bits)
    item = bits // 8
    row_bytes, short, halves = width * item, shorter_tile(mr), int(half)

    def gemm(params, index, slot):
        p = words(params)
        scratch = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        n, p0, p1, q0, q1, group, block0, block1 = locate_task(params, index)
        rows = (p1 - p0) * (q1 - q0)
        tall, short_tiles, _ = split_rows(rows, mr, short, 0)
        count, end = tall + short_tiles, tall * mr + short_tiles * short
        outs, residuals, copy = scratch + p[at.AT_OUT], scratch + p[at.AT_RESIDUAL], scratch + p[at.AT_COPY]
        segments = scratch + p[at.AT_SEGMENTS]
        place_rows(params, outs, residuals, n, p0, p1, q0, q1, rows)
        channels, filters = p[at.C] // p[at.GROUPS], p[at.K] // p[at.GROUPS]
        blocks, rows_first = block1 - block0, p[at.ROWS_FIRST]
        group_filters = p[at.FILTERS] + group * p[at.FILTER_GROUP] * item
        block_bytes, channel_bytes = p[at.FILTER_BLOCK] * item, p[at.FILTER_ROW] * item
        is_turned = p[at.OUT_K] != 1  # outputs are stored when a whole block of filters is finished
        is_plain = finishes_in_registers(item, params)
        # A register tile is always full. The last one begins earlier, so that no row beyond the tile is read. What no
        # pixel or filter fills is zero: leftovers may be denormal, on which processors are slow.
        overlaps = rows >= (short if short_tiles > 0 else mr)
        reads_sources = p[at.READS_SOURCES] != 0 and overlaps
        # Sums are kept for as long as they are needed: until the last chunk, or until a whole block is stored at once.
        kept_blocks, kept_tiles = channels > p[at.DEPTH], channels > p[at.DEPTH] or is_turned
        for c0 in range(0, channels, p[at.DEPTH]):
            depth = min(p[at.DEPTH], channels - c0)
            is_last = c0 + depth == channels
            if reads_sources:
                segment_count = list_sources(item, params, segments, n, p0, q0, group * channels + c0, depth)
            else:
                load_tile(params, scratch, q1 - q0, n, p0, p1 - p0, q0, q1 - q0, group * channels + c0, depth)
                if not overlaps:
                    clear(scratch + rows * depth * item, (end - rows) * depth * item)
                table = words(segments)
                table[0], table[1], table[2] = scratch, depth * item, depth
                segment_count = 1
            if p[at.COPIES_FILTERS]:
                copy_filters(bits, params, scratch + p[at.AT_PANEL], group_filters + c0 * channel_bytes, width, depth,
                             block0, block1, filters)  # fmt: skip
            for turn in range(blocks * count):  # every filter block with every register tile of pixels
                block, g = (
                    (block0 + turn % blocks, turn // blocks) if rows_first else (block0 + turn // count, turn % count)
                )
                panel, pitch = group_filters + block * block_bytes + c0 * channel_bytes, p[at.FILTER_ROW]
                k0, used = group * filters + block * width, min(width, filters - block * width)
                # While this block is multiplied the next comes to L2: the task's next, or the first of the next chunk.
                following, step = panel, 0
                if not rows_first and block + 1 < block1:
                    following, step = panel + block_bytes, width * item // count + 1
                elif not rows_first and not is_last:
                    following = group_filters + block0 * block_bytes + (c0 + depth) * channel_bytes
                    step = width * item // count + 1
                following += g * depth * step
                if p[at.COPIES_FILTERS]:
                    panel, pitch = scratch + p[at.AT_PANEL] + (block - block0) * depth * width * item, width
                    following, step = panel, 0
                first, height = min(g, tall) * mr + max(0, g - tall) * short, mr if g < tall else short
                row = min(first, rows - height) if overlaps else 0
                here = min(height, rows)
                to, residual = outs + row * 8, residuals + row * 8
                kept = (kept_blocks * (block - block0) * end + kept_tiles * first) * row_bytes
                sums = scratch + p[at.AT_SUMS] + kept
                in_half = halves * (used <= width // 2)
                in_registers = is_last and is_plain and overlaps and used == (width // 2 if in_half else width)
                if is_last and is_turned:
                    ask_for_channels(params, to, here, k0, used)
                bias = p[at.BIAS] + k0 * item if p[at.BIAS] != 0 else 0
                terms = p[at.RESIDUAL] + k0 * item if p[at.RESIDUAL] != 0 else 0
                relu, out = p[at.ACTIVATION] == RELU, p[at.OUT] + k0 * item
                if height == mr:
                    gemm_segments(bits, mr, nv, halves, in_half, segments, segment_count, row, panel, pitch, sums, c0,
                                  following, step, in_registers, bias, terms, residual, relu, out, to)  # fmt: skip
                else:
                    gemm_segments(bits, short, nv, halves, in_half, segments, segment_count, row, panel, pitch, sums,
                                  c0, following, step, in_registers, bias, terms, residual, relu, out, to)  # fmt: skip
                if is_last and not in_registers:
                    finish_tile(params, sums, width, to, residual, copy, here, k0, used, is_turned)
                    if is_turned and g + 1 == count:  # the last register tile overlaps the one before it
                        scatter_tile(params, sums - first * row_bytes, outs, first, k0, used)
                        scatter_tile(params, sums, to, here, k0, used)

    return task(gemm)
