"""3×3 convolutions of stride 1 by Winograd's F(4×4, 3×3): 36 products for 16 outputs, where the taps need 144.

A task owns TASK_TILES tiles of 4×4 outputs, in the order of `locate`, and TASK_BLOCKS filter blocks. For each chunk
of channels it loads the merged patches, transforms them, and multiplies them with the transformed filters point by
point; then it transforms the sums into outputs and finishes them. Order of the sum: chunks of channels, in each the
channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops.cpu import launch, stream
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words
from fusionops.cpu.direct import common_reasons
from fusionops.cpu.epilogue import finish_tile, scatter_tile
from fusionops.cpu.jit import inline, task
from fusionops.cpu.microkernel import gemm_tile
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import VECTOR_BYTES, elements, words
from fusionops.cpu.streaming import copy_around
from fusionops.cpu.tiling import (
    SCRATCH_LIMIT,
    WORD_BYTES,
    Tiling,
    balanced,
    choose_register_tile,
    whole_lines,
)
from fusionops.cpu.transform import (
    OUTPUTS,
    PATCH,
    POINTS,
    TAPS,
    clear,
    filter_transform,
    input_transform,
    output_transform,
)
from fusionops.cpu.transpose import stack_words
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel, Operands
from fusionops.spec import Conv2d, FusionSpec, Merge

DTYPE, BITS, ITEM = "float32", 32, 4

# Sums of more channels are cut into chunks of this many, which bounds their error: relative L2 on normal data at most
# 0.9e-6 from 64 to 1024 channels; chunks of 128 give up to 1.1e-6.
DEPTH = 64
# Where a strict sum has few terms it hardly rounds, and three times its error is what is promised: with 32 channels
# relative L2 errors are 2.1 times the strict kernel's on normal data and 2.4 times on numbers over 6 decades, with 16
# channels 2.3 and 2.7 times, with 8 channels 3.0 and 3.4 times. Where most taps fall into the padding, 3 to 6 times.
FEWEST_CHANNELS = 32
FEWEST_TAPS = 0.5
TASK_FILTERS = 256
# A task multiplies at most so many register tiles of patches with the filters it reads: few, where all transformed
# filters stay in L2 beside a task's values and sums; more, where they come from beyond it each time.
NEAR_TILES, FAR_TILES = 2, 5
# What reading filters costs a task of one register tile of patches, as a share of its products: tasks of 2 took 1.2
# times as long as tasks of 6 for 512 filters of 1024 channels, 1.0 to 1.1 times for 256 filters of 256 and 512.
FAR_COST, NEAR_COST = 0.3, 0.1
# Loading and transforming a patch costs as much as multiplying it with this many filters: 2.3 ms beside 4.9 for 64
# filters of 128 channels, 2.0 beside 24 for 512 of 1024.
TRANSFORM_FILTERS = 40
# Tasks are cut so that so many cores have the same to do. Fixed numbers: plans do not depend on the number of threads.
CORES = (2, 4)
RUN = 8
LINE = 16  # elements of a cache line; kept between points so that they do not fall into the same sets of the caches
TAP_WORDS = TAPS * TAPS * 64 * ITEM // WORD_BYTES  # of 64 filters: no block is wider
AREAS = (at.AT_VALUES, at.AT_SUMS, at.AT_COPY, at.AT_FINISHED, at.AT_PIXELS, at.AT_OUT, at.AT_RESIDUAL)


@dataclass(frozen=True, kw_only=True)
class WinogradTiling(Tiling):
    """A 3×3 convolution by tiles of 4×4 outputs.

    tiles      of a task
    row_tiles  at most so many, side by side, are loaded at a time: the width of a strip
    around     whether outputs are stored around the caches, for all filters of a task at once
    """

    tiles: int
    row_tiles: int
    around: bool

    __hash__ = Tiling.__hash__

    @property
    def point_values(self) -> int:
        """Elements from one point of the transformed patches to the next."""
        return self.tiles * self.depth + LINE

    @property
    def point_sums(self) -> int:
        """Elements from one point of a filter block's sums to the next."""
        return -(-self.tiles // self.mr) * self.mr * self.width + LINE

    @property
    def areas(self) -> tuple[int, ...]:
        """Of the merged patches, their transforms, sums, a residual, finished outputs, and three tables of pixels."""
        pixels = OUTPUTS * (OUTPUTS * self.row_tiles + 1)
        finished = pixels * self.width * (self.task_blocks if self.around else 1) * ITEM
        return whole_lines((
            PATCH * (OUTPUTS * self.row_tiles + 2) * self.depth * ITEM,
            POINTS * self.point_values * ITEM,
            self.task_blocks * POINTS * self.point_sums * ITEM,
            finished,
            finished,
            -(-self.tiles // self.mr) * self.mr * WORD_BYTES,
            pixels * WORD_BYTES,
            pixels * WORD_BYTES,
        ))  # fmt: skip


def plan(spec: FusionSpec, device: CpuDevice) -> WinogradTiling:
    """The tiling of a 3×3 convolution: of all that fit the scratch memory, the one that takes CORES least."""
    return min(_tilings(spec, device), key=lambda candidate: candidate[0])[1]


def shorter_tiles(mr: int) -> tuple[int, int]:
    """Rows of the register tiles that end a task, where one of mr rows would be filled up by more than half."""
    return (mr + 2) // 2, (mr + 2) // 4


def _tilings(spec: FusionSpec, device: CpuDevice) -> Iterator[tuple[float, WinogradTiling]]:
    """Ways to cut the problem up, each with what it takes: products, those that cores wait for included.

    What decides how filters are packed depends on the filters alone: they are packed once for maps of every size.
    """
    K, C = spec.conv.K, spec.C
    tiles = spec.N * -(-spec.P // OUTPUTS) * -(-spec.Q // OUTPUTS)
    depth = min(C, LINE * balanced(-(-C // LINE), DEPTH // LINE))
    mr, nv = choose_register_tile(K, ITEM, device, flat=True)
    width = nv * VECTOR_BYTES // ITEM
    blocks = -(-K // width)
    packed = POINTS * blocks * width * C
    is_near = packed * ITEM <= device.l2_bytes
    half, quarter = shorter_tiles(mr)
    for per_task in range(NEAR_TILES if is_near else FAR_TILES, 0, -1):
        groups = -(-tiles // (per_task * mr))
        task_tiles = -(-tiles // groups)
        whole, rest = divmod(task_tiles, mr)
        rows = whole * mr + (0 if rest == 0 else quarter if rest <= quarter else half if rest <= half else mr)
        for task_blocks in range(max(1, min(blocks, TASK_FILTERS // width)), 0, -1):
            tiling = WinogradTiling(
                bits=BITS, mr=mr, nv=nv, depth=depth, chunks=-(-C // depth), blocks=blocks, task_blocks=task_blocks,
                packed_elements=packed, tiles=task_tiles, row_tiles=balanced(-(-spec.Q // OUTPUTS), RUN),
                around=math.prod(spec.out_shape) * ITEM >= stream.STREAM_BYTES and K % width == 0,
            )  # fmt: skip
            if tiling.scratch_bytes <= SCRATCH_LIMIT:
                tasks = groups * -(-blocks // task_blocks)
                rounds = sum(-(-tasks // cores) * cores for cores in CORES)
                reading = (NEAR_COST if is_near else FAR_COST) * mr / rows
                yield rounds * rows * (task_blocks * width + TRANSFORM_FILTERS) * (1 + reading), tiling


def cut(spec: FusionSpec, tiling: WinogradTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of tiles and filter blocks; the number of tasks; filters are always packed."""
    tiles_p, tiles_q = -(-spec.P // OUTPUTS), -(-spec.Q // OUTPUTS)
    tiles = spec.N * tiles_p * tiles_q
    words[[at.TILES_P, at.TILES_Q, at.TILES, at.TASK_TILES, at.ROW_TILES]] = (
        tiles_p, tiles_q, tiles, tiling.tiles, tiling.row_tiles)  # fmt: skip
    words[at.PITCH] = OUTPUTS * tiling.row_tiles + 2
    words[at.AROUND] = tiling.around and words[at.OUT_K] == 1
    words[[at.POINT_VALUES, at.POINT_SUMS]] = tiling.point_values, tiling.point_sums
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    return -(-tiles // tiling.tiles) * -(-tiling.blocks // tiling.task_blocks), False


@inline
def locate(params, tile, last):
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
    return n, here // strip * OUTPUTS, (column + here % strip) * OUTPUTS, count


@inline
def load_patches(params, region, n, p0, q0, count, c0, depth):
    """The merged map under `count` tiles side by side, one pixel beyond them on each side; 0 outside the map."""
    p = words(params)
    pitch = p[at.PITCH]
    h0, w0 = p0 - p[at.PAD_TOP], q0 - p[at.PAD_LEFT]
    cols = count * OUTPUTS + 2
    if h0 < 0 or w0 < 0 or h0 + PATCH > p[at.H] or w0 + cols > p[at.W]:
        clear(BITS, region, PATCH * pitch * depth)
    inside = region + (max(0, -h0) * pitch + max(0, -w0)) * depth * ITEM
    load_tile(BITS, params, inside, pitch, n, h0, PATCH, w0, cols, c0, depth)


@inline
def place_outputs(params, outs, residuals, n, p0, q0, count):
    """Fills the tables of the output pixels of `count` tiles side by side, row by row; returns rows and columns."""
    p = words(params)
    rows, cols = min(OUTPUTS, p[at.P] - p0), min(count * OUTPUTS, p[at.Q] - q0)
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
def winograd_task(mr: int, nv: int) -> int:
    """Address of the task compiled for one register tile."""
    width = nv * VECTOR_BYTES // ITEM
    half, quarter = shorter_tiles(mr)

    def winograd(params, index, slot):
        p = words(params)
        region = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        values, sums = region + p[at.AT_VALUES], region + p[at.AT_SUMS]
        copy, finished = region + p[at.AT_COPY], region + p[at.AT_FINISHED]
        pixels, outs, residuals = region + p[at.AT_PIXELS], region + p[at.AT_OUT], region + p[at.AT_RESIDUAL]
        parts = (p[at.BLOCKS] + p[at.TASK_BLOCKS] - 1) // p[at.TASK_BLOCKS]
        part = index % parts
        block0, block1 = part * p[at.TASK_BLOCKS], min(p[at.BLOCKS], (part + 1) * p[at.TASK_BLOCKS])
        first = index // parts * p[at.TASK_TILES]
        last = min(p[at.TILES], first + p[at.TASK_TILES])
        groups = (last - first + mr - 1) // mr
        order = words(pixels)
        for i in range(groups * mr):  # a register tile is always full: the rest repeats the last tile
            order[i] = min(i, last - first - 1)
        pitch, point_values, point_sums = p[at.PITCH], p[at.POINT_VALUES], p[at.POINT_SUMS]

        for c0 in range(0, p[at.C], p[at.DEPTH]):
            depth = min(p[at.DEPTH], p[at.C] - c0)
            tile = first
            while tile < last:
                n, p0, q0, count = locate(params, tile, last)
                load_patches(params, region, n, p0, q0, count, c0, depth)
                for i in range(count):
                    to = values + (tile + i - first) * depth * ITEM
                    input_transform(BITS, to, PATCH * point_values, point_values,
                                    region + i * OUTPUTS * depth * ITEM, pitch * depth, depth, depth)  # fmt: skip
                tile += count
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
                        here, near = pixels + row * 8, a + (row + mr) * depth * ITEM
                        c, ahead = to + row * width * ITEM, following + row // mr * depth * step
                        if last - first - row > half:
                            gemm_tile(BITS, mr, nv, a, here, depth, 1, 0, 0, 1, 0, 0, depth, panel, width, c, c0,
                                      ahead, step, near, mr * ITEM)  # fmt: skip
                        elif last - first - row > quarter:
                            gemm_tile(BITS, half, nv, a, here, depth, 1, 0, 0, 1, 0, 0, depth, panel, width, c, c0,
                                      ahead, step, near, mr * ITEM)  # fmt: skip
                        else:
                            gemm_tile(BITS, quarter, nv, a, here, depth, 1, 0, 0, 1, 0, 0, depth, panel, width, c, c0,
                                      ahead, step, near, mr * ITEM)  # fmt: skip

        tile, pixel = first, (block1 - block0) * width if p[at.AROUND] else width  # from one finished pixel to the next
        while tile < last:
            n, p0, q0, count = locate(params, tile, last)
            rows, cols = place_outputs(params, outs, residuals, n, p0, q0, count)
            for block in range(block0, block1):
                k0 = block * width
                used = min(width, p[at.K] - k0)
                start = sums + ((block - block0) * POINTS * point_sums + (tile - first) * width) * ITEM
                aside = (block - block0) * width * ITEM if p[at.AROUND] else 0
                # Columns beyond the map land in the next row, which the tile that owns them writes afterwards.
                for i in range(count - 1, -1, -1):
                    output_transform(BITS, finished + aside + i * OUTPUTS * pixel * ITEM, cols * pixel, pixel,
                                     start + i * width * ITEM, PATCH * point_sums, point_sums, width)  # fmt: skip
                finish_tile(BITS, params, finished + aside, pixel, outs, residuals, copy + aside, rows * cols, k0, used,
                            p[at.OUT_K] != 1 or p[at.AROUND])  # fmt: skip
                if p[at.OUT_K] != 1:
                    scatter_tile(BITS, params, finished, outs, rows * cols, k0, used)
            if p[at.AROUND]:
                store_around(params, finished, outs, rows, cols, block0 * width, pixel)
            tile += count

    return task(winograd)


@functools.cache
def pack_task() -> int:
    """Address of the task that transforms and packs one filter block: [chunk][point][block][channel][width].

    Words: packed, filters, steps r s c k (elements), R, S, channels and filters, depth, width, blocks.
    """

    def pack(params, index, slot):
        p = words(params)
        step_r, step_s, step_c, step_k = p[2], p[3], p[4], p[5]
        channels, filters, depth, width, blocks = p[8], p[9], p[10], p[11], p[12]
        k0 = index * width
        used = min(width, filters - k0)
        source = elements(BITS, p[1] + k0 * step_k * ITEM)
        buffer = stack_words(TAP_WORDS)
        taps = elements(BITS, buffer)
        for i in range(TAPS * TAPS * width):
            taps[i] = 0
        for c0 in range(0, channels, depth):
            chunk = min(depth, channels - c0)
            point = blocks * chunk * width
            to = p[0] + (POINTS * blocks * c0 + index * chunk) * width * ITEM
            for c in range(chunk):
                for r in range(TAPS):
                    for s in range(TAPS):
                        here = r * step_r + s * step_s + (c0 + c) * step_c
                        for k in range(used):
                            taps[(r * TAPS + s) * width + k] = source[here + k * step_k]
                filter_transform(BITS, to + c * width * ITEM, PATCH * point, point, buffer, TAPS * width, width, width)

    return task(pack)


WINOGRAD = launch.Algorithm(
    "winograd", cut, lambda tiling: winograd_task(tiling.mr, tiling.nv), lambda tiling: pack_task()
)


def run(spec: FusionSpec, tiling: WinogradTiling, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes out; with return_sum the merged map first, which then is the only source."""
    if spec.return_sum:
        spec, operands = stream.store_merged(spec, operands)
    launch.run(WINOGRAD, spec, tiling, operands, out)


def _share_of_taps(spec: FusionSpec) -> float:
    """How many of all taps fall inside the map."""

    def share(outputs: int, extent: int, before: int) -> float:
        starts = np.arange(outputs) - before
        inside = np.minimum(starts + TAPS, extent) - np.maximum(starts, 0)
        return float(np.maximum(inside, 0).sum()) / (TAPS * max(1, outputs))

    (top, _), (left, _) = spec.conv.padding
    return share(spec.P, spec.H, top) * share(spec.Q, spec.W, left)


def _kernel(merge: Merge) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, DTYPE)
        if not isinstance(spec.contraction, Conv2d):
            return (*reasons, "the contraction is not a conv2d")
        conv = spec.conv
        steps = (*conv.stride, *conv.dilation)
        if (conv.R, conv.S, *steps) != (TAPS, TAPS, 1, 1, 1, 1):
            reasons.append(f"filters are {conv.R}x{conv.S} with steps {steps}, needs 3x3 with steps of 1")
        if spec.C < FEWEST_CHANNELS:
            reasons.append(f"there are {spec.C} channels, needs {FEWEST_CHANNELS} to keep the promised error")
        elif _share_of_taps(spec) < FEWEST_TAPS:
            reasons.append("most taps fall into the padding, where a strict sum has few terms to round")
        if conv.groups != 1:
            reasons.append(f"there are {conv.groups} groups, needs one")
        if spec.strict:
            reasons.append("strict=True forbids a sum that forms other products")
        return tuple(reasons)

    return Kernel(f"cpu.{merge}_conv_fprop_winograd_f32", unsupported, plan, run)


KERNELS = tuple(_kernel(merge) for merge in Merge)
