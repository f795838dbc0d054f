"""The task of a Winograd convolution and its filter packing: output tiles from patches to store. Chooses no extents.

A task owns TASK_TILES tiles of outputs, in the order of `locate`, and TASK_BLOCKS filter blocks. For each chunk
of channels it loads the merged patches, transforms them, and multiplies them with the transformed filters point by
point; then it transforms the sums into outputs and finishes them. Order of the sum: chunks of channels, in each the
channels.
"""

from __future__ import annotations

import functools

from fusionops.cpu import params as at
from fusionops.cpu.concat_task import copy_around
from fusionops.cpu.epilogue import ask_for_channels, finish_tile, scatter_tile
from fusionops.cpu.formats import load_element
from fusionops.cpu.jit import inline, task
from fusionops.cpu.microkernel import gemm_rows
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import VECTOR_BYTES, clear, elements, words
from fusionops.cpu.tiling import WORD_BYTES
from fusionops.cpu.transform import (
    PATCH,
    POINTS,
    TAPS,
    filter_transforms,
    input_transform,
    output_transforms,
    outputs_of,
)
from fusionops.cpu.transpose import stack_words

BITS, ITEM = 32, 4
TAP_WORDS = max(TAPS) ** 2 * 64 * ITEM // WORD_BYTES  # of 64 filters: no block is wider


def shorter_tiles(mr: int) -> tuple[int, int]:
    """Rows of the register tiles that end a task, where one of mr rows would be filled up by more than half."""
    return (mr + 2) // 2, (mr + 2) // 4


@inline
def locate(params, outputs, tile, last):
    """Image, first output row and column of a tile, and how many tiles from it on, before `last`, lie side by side.

    Tiles are numbered along the rows of strips ROW_TILES wide, strip after strip, image after image: tiles that follow
    one another share the rows between them while these are in the caches.
    """
    p = words(params)
    tiles_p, tiles_q, strip = p[at.TILES_P], p[at.TILES_Q], p[at.ROW_TILES]
    n, here = tile // (tiles_p * tiles_q), tile % (tiles_p * tiles_q)
    column = here // (tiles_p * strip) * strip
    strip = min(strip, tiles_q - column)
    here -= column * tiles_p
    count = min(strip - here % strip, last - tile)
    return n, here // strip * outputs, (column + here % strip) * outputs, count


@inline
def load_patches(params, region, n, p0, q0, cols, c0, depth):
    """The merged map under tiles side by side, so many columns with what lies around them; 0 outside the map."""
    p = words(params)
    pitch = p[at.PITCH]
    h0, w0 = p0 - p[at.PAD_TOP], q0 - p[at.PAD_LEFT]
    if h0 < 0 or w0 < 0 or h0 + PATCH > p[at.H] or w0 + cols > p[at.W]:
        clear(region, PATCH * pitch * depth * ITEM)
    inside = region + (max(0, -h0) * pitch + max(0, -w0)) * depth * ITEM
    load_tile(params, inside, pitch, n, h0, PATCH, w0, cols, c0, depth)


@inline
def place_outputs(params, outputs, outs, residuals, n, p0, q0, count):
    """Fills the tables of the output pixels of `count` tiles side by side, row by row; returns rows and columns."""
    p = words(params)
    rows, cols = min(outputs, p[at.P] - p0), min(count * outputs, p[at.Q] - q0)
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
def store_around(params, finished, outs, rows, cols, k0, count):
    """Stores `count` filters of finished pixels around the caches, a line of pixels at once where that is all."""
    p = words(params)
    to = words(outs)
    at_once = cols if p[at.OUT_Q] == count else 1
    for i in range(0, rows * cols, at_once):
        copy_around(p[at.OUT] + (to[i] + k0) * ITEM, finished + i * count * ITEM, at_once * count * ITEM)


@functools.cache
def winograd_task(mr: int, nv: int, taps: int) -> int:
    """Address of the task compiled for one register tile and extent of filters."""
    outputs, output_transform = outputs_of(taps), output_transforms[taps]
    width = nv * VECTOR_BYTES // ITEM
    half, quarter = shorter_tiles(mr)

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
        groups, rest = (last - first + mr - 1) // mr, (last - first) % mr
        rows = last - first - rest + (0 if rest == 0 else quarter if rest <= quarter else half if rest <= half else mr)
        pitch, point_values, point_sums = p[at.PITCH], p[at.POINT_VALUES], p[at.POINT_SUMS]

        for c0 in range(0, p[at.C], p[at.DEPTH]):
            depth = min(p[at.DEPTH], p[at.C] - c0)
            tile = first
            while tile < last:
                n, p0, q0, count = locate(params, outputs, tile, last)
                load_patches(params, region, n, p0, q0, count * outputs + taps - 1, c0, depth)
                for i in range(count):
                    to = values + (tile + i - first) * depth * ITEM
                    input_transform(BITS, to, PATCH * point_values, point_values,
                                    region + i * outputs * depth * ITEM, pitch * depth, depth, depth)  # fmt: skip
                tile += count
            # A register tile is always full. The rest is zero: leftovers may be denormal, on which processors are slow.
            if rows != last - first:
                for point in range(POINTS):
                    clear(values + (point * point_values + (last - first) * depth) * ITEM,
                          (rows - last + first) * depth * ITEM)  # fmt: skip
            panels = p[at.FILTERS] + POINTS * p[at.BLOCKS] * c0 * width * ITEM
            panel_bytes = depth * width * ITEM
            step = width * ITEM // groups + 1
            for point in range(POINTS):
                for block in range(block0, block1):
                    panel = panels + (point * p[at.BLOCKS] + block) * panel_bytes
                    following = panel + panel_bytes
                    if block + 1 == block1:
                        following = panels + ((point + 1) * p[at.BLOCKS] + block0) * panel_bytes
                    to = sums + ((block - block0) * POINTS + point) * point_sums * ITEM
                    a = values + point * point_values * ITEM
                    for row in range(0, last - first, mr):
                        here = a + row * depth * ITEM
                        near, c = here + mr * depth * ITEM, to + row * width * ITEM
                        ahead = following + row // mr * depth * step
                        if last - first - row > half:
                            gemm_rows(BITS, mr, nv, here, depth, depth, panel, width, c, c0, ahead, step, near)
                        elif last - first - row > quarter:
                            gemm_rows(BITS, half, nv, here, depth, depth, panel, width, c, c0, ahead, step, near)
                        else:
                            gemm_rows(BITS, quarter, nv, here, depth, depth, panel, width, c, c0, ahead, step, near)

        tile, pixel = first, (block1 - block0) * width if p[at.AROUND] else width  # from one finished pixel to the next
        while tile < last:
            n, p0, q0, count = locate(params, outputs, tile, last)
            rows, cols = place_outputs(params, outputs, outs, residuals, n, p0, q0, count)
            for block in range(block0, block1):
                k0 = block * width
                used = min(width, p[at.K] - k0)
                start = sums + ((block - block0) * POINTS * point_sums + (tile - first) * width) * ITEM
                if p[at.OUT_K] != 1:
                    for i in range(rows):
                        ask_for_channels(params, outs + i * cols * 8, cols, k0, used)
                aside = (block - block0) * width * ITEM if p[at.AROUND] else 0
                # Columns beyond the map land in the next row, which the tile that owns them writes afterwards.
                for i in range(count - 1, -1, -1):
                    output_transform(BITS, finished + aside + i * outputs * pixel * ITEM, cols * pixel, pixel,
                                     start + i * width * ITEM, PATCH * point_sums, point_sums, width)  # fmt: skip
                finish_tile(params, finished + aside, pixel, outs, residuals, copy + aside, rows * cols, k0, used,
                            p[at.OUT_K] != 1 or p[at.AROUND])  # fmt: skip
                if p[at.OUT_K] != 1:
                    scatter_tile(params, finished, outs, rows * cols, k0, used)
            if p[at.AROUND]:
                store_around(params, finished, outs, rows, cols, block0 * width, pixel)
            tile += count

    return task(winograd)


@functools.cache
def pack_task(stored: int, taps: int) -> int:
    """Address of the task that transforms and packs one filter block: [chunk][point][block][channel][width].

    Words: packed, filters, steps r s c k (elements), R, S, channels and filters, depth, width, blocks.
    """
    filter_transform = filter_transforms[taps]

    def pack(params, index, slot):
        p = words(params)
        step_r, step_s, step_c, step_k = p[2], p[3], p[4], p[5]
        channels, filters, depth, width, blocks = p[8], p[9], p[10], p[11], p[12]
        k0 = index * width
        used = min(width, filters - k0)
        source = p[1] + k0 * step_k * (stored // 8)
        buffer = stack_words(TAP_WORDS)
        values = elements(BITS, buffer)
        for i in range(taps * taps * width):
            values[i] = 0
        for c0 in range(0, channels, depth):
            chunk = min(depth, channels - c0)
            point = blocks * chunk * width
            to = p[0] + (POINTS * blocks * c0 + index * chunk) * width * ITEM
            for c in range(chunk):
                place = to + c * width * ITEM
                if stored == BITS and step_k == 1 and used == width:
                    here = p[1] + (k0 + (c0 + c) * step_c) * ITEM
                    filter_transform(BITS, place, PATCH * point, point, here, step_r, step_s, width)
                    continue
                for r in range(taps):
                    for s in range(taps):
                        here = r * step_r + s * step_s + (c0 + c) * step_c
                        for k in range(used):
                            values[(r * taps + s) * width + k] = load_element(stored, source, here + k * step_k)
                filter_transform(BITS, place, PATCH * point, point, buffer, taps * width, width, width)

    return task(pack)
