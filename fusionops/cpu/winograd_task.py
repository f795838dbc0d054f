"""The task of a Winograd convolution and its filter packing: output tiles from patches to store. Chooses no extents.

A task owns TASK_TILES tiles of outputs, in the order of `locate`, and TASK_BLOCKS filter blocks. For each chunk
of channels it loads the merged map under them, transforms its patches, and multiplies them with the transformed filters
point by point; then it transforms the sums into outputs and finishes them.

Filters with steps, or with more than TAPS taps along an axis, are cut into sections: those of an axis begin at

    phase + stride·TAPS·i    phase < stride

and take every stride-th tap from there. A tile has a patch for each section, and the sum is over sections and channels:
chunks of channels, in each the sections, in each the channels.
"""

from __future__ import annotations

import functools

from fusionops.cpu import params as at
from fusionops.cpu.concat_task import copy_around
from fusionops.cpu.epilogue import ask_for_channels, finish_tile, scatter_tile
from fusionops.cpu.formats import load_element
from fusionops.cpu.gemm_task import split_rows
from fusionops.cpu.jit import inline, task
from fusionops.cpu.microkernel import gemm_rows
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import VECTOR_BYTES, call, clear, elements, words
from fusionops.cpu.tiling import WORD_BYTES, lowest_tile, shorter_tile
from fusionops.cpu.transform import (
    PATCH,
    POINTS,
    TAPS,
    filter_transform,
    output_transform,
    outputs_of,
    part_input_transform,
    whole_input_transform,
)
from fusionops.cpu.transpose import stack_words

BITS, ITEM = 32, 4
POINT_WORDS = 3  # of a point: its first tile, the one after its last, the next point that has tiles
TABLE_WORDS = POINTS * POINT_WORDS
TAP_WORDS = max(TAPS) ** 2 * 64 * ITEM // WORD_BYTES  # of 64 filters: no block is wider


@inline
def taps_inside(first, extent, stride, taps):
    """Of a section that begins at `first`."""
    return min(taps, (extent - first + stride - 1) // stride)


@inline
def locate(params, tile, last):
    """Image, row and column of tiles, and how many tiles from this one on, before `last`, are alike and side by side.

    Those that keep fewer outputs are the last of a row and of a column of tiles. Tiles are numbered in four classes,
    each of all images: those that keep fewer columns, whole ones, those that keep fewer rows, those that keep fewer of
    both; so those that need a point follow one another. In a class along the rows of strips ROW_TILES wide, strip after
    strip, image after image: tiles that follow one another share the rows between them while these are in the caches.
    """
    p = words(params)
    whole_p, whole_q, trimmed_q = p[at.WHOLE_P], p[at.WHOLE_Q], p[at.TILES_Q] - p[at.WHOLE_Q]
    upper = p[at.N] * whole_p * p[at.TILES_Q]
    is_lower = tile >= upper
    row, rows, here = (whole_p, p[at.TILES_P] - whole_p, tile - upper) if is_lower else (0, whole_p, tile)
    ahead = p[at.N] * rows * (whole_q if is_lower else trimmed_q)
    is_trimmed = (here >= ahead) == is_lower  # in the upper classes trimmed columns come first, in the lower ones last
    here -= ahead if here >= ahead else 0
    col, cols = (whole_q, trimmed_q) if is_trimmed else (0, whole_q)
    n, here = here // (rows * cols), here % (rows * cols)
    left = here // (rows * p[at.ROW_TILES]) * p[at.ROW_TILES]
    strip = min(p[at.ROW_TILES], cols - left)
    here -= left * rows
    return n, row + here // strip, col + left + here % strip, min(strip - here % strip, last - tile)


@inline
def outputs_at(tile, outputs, whole):
    """First output that a tile keeps along an axis, and how many."""
    return tile * outputs - max(0, tile - whole), outputs - (1 if tile >= whole else 0)


@inline
def load_patches(params, region, n, p0, rows, q0, cols, count, c0, depth):
    """The merged map under tiles side by side that keep rows × cols outputs each; 0 outside the map."""
    p = words(params)
    pitch, outputs = p[at.PITCH], p[at.OUTPUTS]
    p0, q0 = p0 - (outputs - rows) // 2, q0 - (outputs - cols) // 2
    rows, cols = (outputs - 1) * p[at.STRIDE_H] + p[at.R], ((count - 1) * cols + outputs - 1) * p[at.STRIDE_W] + p[at.S]
    h0, w0 = p0 * p[at.STRIDE_H] - p[at.PAD_TOP], q0 * p[at.STRIDE_W] - p[at.PAD_LEFT]
    if h0 < 0 or w0 < 0 or h0 + rows > p[at.H] or w0 + cols > p[at.W]:
        clear(region, rows * pitch * depth * ITEM)
    inside = region + (max(0, -h0) * pitch + max(0, -w0)) * depth * ITEM
    load_tile(params, inside, pitch, n, h0, rows, w0, cols, c0, depth)


@inline
def transform_patches(params, values, region, step, count, depth):
    """The patches of `count` tiles side by side, `step` outputs apart, all sections of them."""
    p = words(params)
    stride_h, stride_w, taps, outputs = p[at.STRIDE_H], p[at.STRIDE_W], p[at.TAPS], p[at.OUTPUTS]
    point, line = p[at.POINT_VALUES], p[at.PITCH] * depth
    to, from_tile_to_tile = values, p[at.PATCHES] * depth
    for phase_h in range(stride_h):
        for r in range(phase_h, p[at.R], stride_h * taps):
            rows = outputs - 1 + taps_inside(r, p[at.R], stride_h, taps)
            for phase_w in range(stride_w):
                for s in range(phase_w, p[at.S], stride_w * taps):
                    cols = outputs - 1 + taps_inside(s, p[at.S], stride_w, taps)
                    call(p[at.TRANSFORM_INPUTS], to, from_tile_to_tile, PATCH * point, point,
                         region + (r * line + s * depth) * ITEM, step * stride_w * depth, stride_h * line,
                         stride_w * depth, rows, cols, count, depth)  # fmt: skip
                    to += depth * ITEM


@inline
def place_outputs(params, outs, residuals, n, p0, rows, q0, cols):
    """Fills the tables of rows × cols output pixels, row by row; returns how many of each are in the map."""
    p = words(params)
    rows, cols = min(rows, p[at.P] - p0), min(cols, p[at.Q] - q0)
    to, residual = words(outs), words(residuals)
    for i in range(rows):
        line = n * p[at.OUT_N] + (p0 + i) * p[at.OUT_P] + q0 * p[at.OUT_Q]
        for j in range(cols):
            to[i * cols + j] = line + j * p[at.OUT_Q]
        if p[at.RESIDUAL] != 0:
            line = n * p[at.RESIDUAL_N] + (p0 + i) // p[at.RESIDUAL_UP_H] * p[at.RESIDUAL_P]
            for j in range(cols):
                residual[i * cols + j] = line + (q0 + j) // p[at.RESIDUAL_UP_W] * p[at.RESIDUAL_Q]
    return rows, cols


@inline
def list_points(params, points, first, last):
    """Fills the table of points: the first tile of a task that needs one, the tile behind the last, the next point.

    Tiles are counted from `first`; the next point is one that any needs. A tile that keeps one output less than OUTPUTS
    along an axis does without the last point there, one that keeps two less without the first as well.
    """
    p, table = words(params), words(points)
    whole_p, whole_q = p[at.WHOLE_P], p[at.WHOLE_Q]
    upper = p[at.N] * whole_p * p[at.TILES_Q]
    right = p[at.N] * whole_p * (p[at.TILES_Q] - whole_q)  # the end of tiles that keep fewer columns alone
    corner = upper + p[at.N] * (p[at.TILES_P] - whole_p) * whole_q
    following = POINTS
    for point in range(POINTS - 1, -1, -1):
        i, j = point // PATCH, point % PATCH
        least_p = p[at.OUTPUTS] if i == PATCH - 1 else p[at.OUTPUTS] - 1 if i == 0 else 0  # of those that need it
        least_q = p[at.OUTPUTS] if j == PATCH - 1 else p[at.OUTPUTS] - 1 if j == 0 else 0
        begin, end = first, last
        if p[at.OUTPUTS_P] <= least_p:
            end = min(end, upper)
        if p[at.OUTPUTS_Q] <= least_q:
            begin, end = min(max(begin, right), last), min(end, corner)
        if p[at.OUTPUTS_P] < least_p or p[at.OUTPUTS_Q] < least_q or end < begin:
            end = begin
        item = POINT_WORDS * point
        table[item], table[item + 1], table[item + 2] = begin - first, end - first, following
        following = point if begin < end else following


@functools.cache
def store_around_task() -> int:
    """Address of the procedure that stores `count` filters of finished pixels around the caches.

    A line of pixels at once where these are all filters.
    """

    def store_around(params, finished, outs, rows, cols, k0, count):
        p = words(params)
        to = words(outs)
        at_once = cols if p[at.OUT_Q] == count else 1
        for i in range(0, rows * cols, at_once):
            copy_around(p[at.OUT] + (to[i] + k0) * ITEM, finished + i * count * ITEM, at_once * count * ITEM)

    return task(store_around)


@functools.cache
def transform_inputs_task() -> int:
    """Address of the procedure that transforms a patch of each of `count` tiles side by side.

    Steps in elements; of the patches, rows and cols are read: the taps that meet the others are none.
    """

    def transform_inputs(to, to_step, to_row, to_col, source, step, row, col, rows, cols, count, depth):
        for i in range(count):
            there, here = to + i * to_step * ITEM, source + i * step * ITEM
            if rows == PATCH and cols == PATCH:
                whole_input_transform(BITS, PATCH, there, to_row, to_col, here, row, col, rows, cols, depth)
            else:
                part_input_transform(BITS, PATCH, there, to_row, to_col, here, row, col, rows, cols, depth)

    return task(transform_inputs)


@functools.cache
def transform_outputs_task(taps: int) -> int:
    """Address of the procedure that transforms the sums of `count` tiles side by side. Steps in elements.

    Of each, rows × cols outputs are kept. Columns beyond the map, which only a tile alone in its row has, land in the
    next row, which it stores later.
    """
    outputs = outputs_of(taps)

    def transform_outputs(to, to_step, to_row, to_col, source, step, row, col, rows, cols, count, width):
        for i in range(count):
            output_transform(BITS, outputs, to + i * to_step * ITEM, to_row, to_col, source + i * step * ITEM, row, col,
                      rows, cols, width)  # fmt: skip

    return task(transform_outputs)


@functools.cache
def winograd_task(mr: int, nv: int) -> int:
    """Address of the task compiled for one register tile and the shorter ones."""
    width = nv * VECTOR_BYTES // ITEM
    short, low = shorter_tile(mr), lowest_tile(mr)

    def winograd(params, index, slot):
        p = words(params)
        region = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        values, sums = region + p[at.AT_VALUES], region + p[at.AT_SUMS]
        copy, finished = region + p[at.AT_COPY], region + p[at.AT_FINISHED]
        outs, residuals = region + p[at.AT_OUT], region + p[at.AT_RESIDUAL]
        parts = (p[at.BLOCKS] + p[at.TASK_BLOCKS] - 1) // p[at.TASK_BLOCKS]
        part = index % parts
        block0, block1 = part * p[at.TASK_BLOCKS], min(p[at.BLOCKS], (part + 1) * p[at.TASK_BLOCKS])
        first = index // parts * p[at.TASK_TILES]
        last = min(p[at.TILES], first + p[at.TASK_TILES])
        all_tall, all_short, all_low = split_rows(last - first, mr, short, low)
        end = all_tall * mr + all_short * short + all_low * low
        trimmed, few_tall, few_short, few_low = 0, 0, 0, 0  # tiles that need a point, where not all do
        point_values, point_sums = p[at.POINT_VALUES], p[at.POINT_SUMS]
        points = stack_words(TABLE_WORDS)
        list_points(params, points, first, last)
        table = words(points)

        for c0 in range(0, p[at.C], p[at.DEPTH]):
            channels = min(p[at.DEPTH], p[at.C] - c0)
            depth = p[at.PATCHES] * channels
            tile = first
            while tile < last:
                n, row, col, count = locate(params, tile, last)
                p0, rows = outputs_at(row, p[at.OUTPUTS_P], p[at.WHOLE_P])
                q0, cols = outputs_at(col, p[at.OUTPUTS_Q], p[at.WHOLE_Q])
                load_patches(params, region, n, p0, rows, q0, cols, count, c0, channels)
                transform_patches(params, values + (tile - first) * depth * ITEM, region, cols, count, channels)
                tile += count
            # A register tile is always full. The rest is zero: leftovers may be denormal, on which processors are slow.
            if end != last - first:
                for point in range(POINTS):
                    clear(values + (point * point_values + (last - first) * depth) * ITEM,
                          (end - last + first) * depth * ITEM)  # fmt: skip
            panels = p[at.FILTERS] + POINTS * p[at.BLOCKS] * p[at.PATCHES] * c0 * width * ITEM
            panel_bytes = depth * width * ITEM
            for point in range(POINTS):
                item = POINT_WORDS * point
                begin, stop, following_point = table[item], table[item + 1], table[item + 2]
                tall, short_tiles, low_tiles = all_tall, all_short, all_low
                if stop - begin < last - first:
                    if stop - begin != trimmed:
                        trimmed = stop - begin
                        few_tall, few_short, few_low = split_rows(trimmed, mr, short, low)
                    tall, short_tiles, low_tiles = few_tall, few_short, few_low
                    if c0 == 0:  # sums of outputs that are not kept, whose leftovers may be denormal too
                        for block in range(block1 - block0):
                            to = sums + (block * POINTS + point) * point_sums * ITEM
                            clear(to, begin * width * ITEM)
                            clear(to + stop * width * ITEM, (last - first - stop) * width * ITEM)
                    # What a register tile has to spare are tiles before these, not rows behind the last one.
                    begin = max(0, stop - tall * mr - short_tiles * short - low_tiles * low)
                groups = tall + short_tiles + low_tiles
                step = width * ITEM // max(1, groups) + 1
                for block in range(block0, block1 if groups else block0):
                    panel = panels + (point * p[at.BLOCKS] + block) * panel_bytes
                    following = panel + panel_bytes
                    if block + 1 == block1:
                        following = panels + (following_point * p[at.BLOCKS] + block0) * panel_bytes
                    to = sums + (((block - block0) * POINTS + point) * point_sums + begin * width) * ITEM
                    a = values + (point * point_values + begin * depth) * ITEM
                    for g in range(groups):
                        row = min(g, tall) * mr + max(0, g - tall) * short
                        height = mr if g < tall else short if g < tall + short_tiles else low
                        here, c, ahead = a + row * depth * ITEM, to + row * width * ITEM, following + g * depth * step
                        near = here + height * depth * ITEM
                        if height == mr:
                            gemm_rows(BITS, mr, nv, here, depth, depth, panel, width, c, c0, ahead, step, near)
                        elif height == short:
                            gemm_rows(BITS, short, nv, here, depth, depth, panel, width, c, c0, ahead, step, near)
                        else:
                            gemm_rows(BITS, low, nv, here, depth, depth, panel, width, c, c0, ahead, step, near)

        tile, pixel = first, (block1 - block0) * width if p[at.AROUND] else width  # from one finished pixel to the next
        while tile < last:
            n, row, col, count = locate(params, tile, last)
            p0, kept_rows = outputs_at(row, p[at.OUTPUTS_P], p[at.WHOLE_P])
            q0, kept_cols = outputs_at(col, p[at.OUTPUTS_Q], p[at.WHOLE_Q])
            rows, cols = place_outputs(params, outs, residuals, n, p0, kept_rows, q0, count * kept_cols)
            for block in range(block0, block1):
                k0 = block * width
                used = min(width, p[at.K] - k0)
                start = sums + ((block - block0) * POINTS * point_sums + (tile - first) * width) * ITEM
                if p[at.OUT_K] != 1:
                    for i in range(rows):
                        ask_for_channels(params, outs + i * cols * 8, cols, k0, used)
                aside = (block - block0) * width * ITEM if p[at.AROUND] else 0
                call(p[at.TRANSFORM_OUTPUTS], finished + aside, kept_cols * pixel, cols * pixel, pixel,
                     start, width, PATCH * point_sums, point_sums, kept_rows, kept_cols, count, width)  # fmt: skip
                finish_tile(params, finished + aside, pixel, outs, residuals, copy + aside, rows * cols, k0, used,
                            p[at.OUT_K] != 1 or p[at.AROUND])  # fmt: skip
                if p[at.OUT_K] != 1:
                    scatter_tile(params, finished, outs, rows * cols, k0, used)
            if p[at.AROUND]:
                call(p[at.STORE_AROUND], params, finished, outs, rows, cols, block0 * width, pixel)
            tile += count

    return task(winograd)


@functools.cache
def pack_task(stored: int, taps: int) -> int:
    """Address of the task that transforms and packs one block of filters.

    In the order [chunk][point][block][section][channel][width]. Words: packed, filters, steps r s c k (elements), R, S,
    channels and filters, depth, width, blocks, unused, strides.
    """

    def pack(params, index, slot):
        p = words(params)
        step_r, step_s, step_c, step_k = p[2], p[3], p[4], p[5]
        R, S, channels, filters, depth, width, blocks = p[6], p[7], p[8], p[9], p[10], p[11], p[12]
        stride_h, stride_w = p[14], p[15]
        patches = 0
        for phase_h in range(stride_h):
            for phase_w in range(stride_w):
                patches += len(range(phase_h, R, stride_h * taps)) * len(range(phase_w, S, stride_w * taps))
        k0 = index * width
        used = min(width, filters - k0)
        buffer = stack_words(TAP_WORDS)
        values = elements(BITS, buffer)
        for c0 in range(0, channels, depth):
            chunk = min(depth, channels - c0)
            point = blocks * patches * chunk * width
            to = p[0] + (POINTS * blocks * c0 + index * chunk) * patches * width * ITEM
            for phase_h in range(stride_h):
                for r0 in range(phase_h, R, stride_h * taps):
                    rows = taps_inside(r0, R, stride_h, taps)
                    for phase_w in range(stride_w):
                        for s0 in range(phase_w, S, stride_w * taps):
                            cols = taps_inside(s0, S, stride_w, taps)
                            for i in range(taps * taps * width):
                                values[i] = 0
                            for c in range(chunk):
                                first = r0 * step_r + s0 * step_s + (c0 + c) * step_c + k0 * step_k
                                here, row, col = buffer, taps * width, width
                                if stored == BITS and step_k == 1 and used == width and rows == cols == taps:
                                    here = p[1] + first * ITEM
                                    row, col = stride_h * step_r, stride_w * step_s
                                else:
                                    for r in range(rows):
                                        for s in range(cols):
                                            tap = first + r * stride_h * step_r + s * stride_w * step_s
                                            for k in range(used):
                                                value = load_element(stored, p[1], tap + k * step_k)
                                                values[(r * taps + s) * width + k] = value
                                filter_transform(
                                    BITS, taps, to, PATCH * point, point, here, row, col, taps, taps, width
                                )
                                to += width * ITEM

    return task(pack)
