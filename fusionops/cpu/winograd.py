"""Convolutions by Winograd: a patch of the map under a tile of outputs and a section of the filters make 36 products.

3×3 taps of stride 1 form 36 products for 16 outputs instead of 144, 5×5 of stride 2 144 instead of 400. What such a
kernel can run, when it is worth it, and how the work is cut up; `winograd_task` holds the code of a task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fusionops import kernel
from fusionops.cpu import launch
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words
from fusionops.cpu.direct import common_reasons
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.cpu.tiling import (
    SCRATCH_LIMIT,
    WORD_BYTES,
    Tiling,
    balanced,
    choose_register_tile,
    lowest_tile,
    rounds,
    rows_of,
    whole_lines,
)
from fusionops.cpu.transform import POINTS, TAPS, outputs_of
from fusionops.cpu.winograd_task import (
    BITS,
    ITEM,
    pack_task,
    store_around_task,
    transform_inputs_task,
    transform_outputs_task,
    winograd_task,
)
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel, Operands, Replay
from fusionops.spec import Conv2d, FusionSpec, Merge

# Sums of more channels, those of all sections counted, are cut into chunks of this many, which bounds their error:
# relative L2 on normal data at most 0.9e-6 from 64 to 1024 channels; chunks of 128 give up to 1.2e-6, of 5×5 taps
# 1.3e-6. A chunk has 16 channels at least: filters of 16 sections have errors up to 1.6e-6.
DEPTH = 64
# Filters that are not in sections, on vectors half as wide: register tiles are lower, so a point's values stay in L1.
# Convolutions of U-Net, FPN and ResNet took 0.98 of the time (geometric mean of 25, 0.91 to 1.11, 7 interleaved rounds,
# AVX2). 128 channels have 1.9 and 2.3 times the strict kernel's error on normal data and on numbers over 6 decades,
# with DEPTH 1.4 and 1.7; 2×2 taps, which keep it, would have 2.9 and 3.4.
DEPTH_OF_NARROW = 128
# Where a strict sum has few terms it hardly rounds, and three times its error is what is promised. Relative L2 errors
# on normal data and on numbers over 6 decades, of 3×3 taps: with 288 terms 2.1 and 2.5 times the strict kernel's, with
# 144 2.5 and 3.0, with 72 2.9 and 3.6. Filters in sections and of 2×2 taps: with 256 and 288 terms 2.8 to 3.0 and 3.6
# to 4.0 times, with 512 and 576 2.2 to 2.3 and 2.5 to 2.9. With 16 channels, strides that differ and most sections of
# one tap or two, up to 4.4 times. More taps than MOST_TAPS leave sums of so many sections that scratch memory does not
# hold a tile of them, and errors up to 2.5e-6.
FEWEST_TERMS, FEWEST_TERMS_OF_PARTS, FEWEST_CHANNELS_OF_PARTS = 288, 512, 32
MOST_TAPS = 11
# Nor does it round much where taps fall into the padding, least where a tile ends at both borders. Of 3×3 taps with a
# border of 1, maps of 4×4 (0.83 of the taps along an axis are inside) have 2.8 and 3.4 times the error with 288 terms,
# 2.6 and 3.1 with 1152; maps of 5×5 (0.87) 1.7 and 2.1, of 8×8 2.3 and 2.9. Of 4×4 and 5×5 taps maps of 3×3 (0.67 and
# 0.6) have 2.8 and 3.5 times, of 4×4 (0.75 and 0.7) 2.2 and 2.7; sections up to 2.9 and 3.4 with 0.43, 2.1 and 2.5
# with 0.57, and of maps that a few taps reach up to 6.
FEWEST_TAPS, FEWEST_OF_3_TAPS = 0.71, 0.85
# Where channels times filters exceed SMALL_FILTERS, images of fewer tiles of outputs are convolved tap by tap. Of the
# time so, with prepacked filters, Winograd took 0.38 to 0.69 with one tile of 64 to 512 channels and filters, 1.05 to
# 1.5 with one of 4×4 outputs and 0.45 to 0.8 with one of 3×3 of 512 or 1024 of each, 0.4 to 0.99 there with 4 tiles
# (two AVX-512 cores with 1 MiB of L2 each, 5 rounds). On AVX2 0.5 to 0.8 with one or two tiles of up to 256, 1.3 there
# with 512, and 0.4 to 0.6 with 4 tiles of 128 to 512. Filters to transform at each call cost more: 1.3 to 3.3 of
# the time tap by tap with 4 tiles of 64 to 256 channels and filters, 2.0 with 9 and 1.2 with 16 of 512, 0.98 with 25.
ENOUGH_TILES = 4
SMALL_FILTERS = 1 << 17
# Filters that are cut into sections, and those of 2×2 taps, save less, and what they take is estimated for an image, in
# products: transforming a patch as those of so many filters; reading the transformed filters as those of so many tiles,
# fewer where they stay in L2; LEAST_GAIN is asked for. Of 95 problems (2×2 to 7×7 taps, strides 1 and 2, 14×14 to
# 112×112 outputs of 32 to 512 channels and filters, prepacked, 3 interleaved rounds) the estimate was right by a factor
# of 1.4 (standard deviation). 7×7 took 0.3 to 0.9 of the time tap by tap, 4×4 0.4 to 0.9, 3×3 of stride 2 1.0 to 3.
# Reading cost up to 20 tiles on two AVX-512 cores that share L3 with dozens, 7 fits on two with 32 MiB of their own,
# where 3×3 of stride 2 took 0.77 of the time with 40×40 outputs of 128 and 256 channels, 0.90 with 28×28 of 512, 0.95
# to 1.04 with 20×20 and 28×28 of 256; 5×5 and 4×4 of stride 2 with 14×14 0.52 to 0.83, 2×2 there 0.58 to 0.77
# (prepacked, 5 interleaved rounds). With vectors half as wide products take twice as long: of 160 problems that 10
# tiles kept on the taps there, 24 took 0.21 to 0.89 of the time so (AVX2, 32 MiB of L3).
PATCH_FILTERS = 30
NEAR_FILTERS_TILES, FAR_FILTERS_TILES, NEAR_BYTES = 5, 7, 1 << 21
LEAST_GAIN = 1.15
# Filters of a task: with 128 the same problems took 0.98 to 1.07 times as long: each part loads the patches again.
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
# Outputs from so many bytes on are stored around the caches (decision 0003). Where L3 is near, 0.95 to 1.01 of the time
# through them, in eight problems of 4 to 17 MiB of output.
AROUND_BYTES = 1 << 22
# Widest strip: the patches of 8 tiles of 64 channels take 52 KiB. Strips of 4 and 16 took 0.97 to 1.05 times as long.
RUN = 8
LINE = 16  # elements of a cache line; kept between points so that they do not fall into the same sets of the caches
AREAS = (at.AT_VALUES, at.AT_SUMS, at.AT_COPY, at.AT_FINISHED, at.AT_OUT, at.AT_RESIDUAL)


def _sections(extent: int, stride: int, taps: int) -> int:
    """Of filters along an axis, each of at most so many taps."""
    return sum(len(range(phase, extent, stride * taps)) for phase in range(stride))


def _patches(conv: Conv2d, taps: int) -> int:
    """Of a tile of outputs: one for each section of the filters."""
    return _sections(conv.R, conv.stride[0], taps) * _sections(conv.S, conv.stride[1], taps)


@functools.lru_cache(maxsize=512)
def taps_of(conv: Conv2d) -> int:
    """The extent of sections that forms the fewest products; of equals, the fewest patches."""
    return min(TAPS, key=lambda taps: (_products(conv, taps), _patches(conv, taps)))


def _products(conv: Conv2d, taps: int) -> float:
    """For each output, channel and filter."""
    return _patches(conv, taps) * POINTS / outputs_of(taps) ** 2


class Axis(NamedTuple):
    """How tiles lie along an axis of the outputs: the first `whole` of them keep `outputs`, the others one fewer."""

    tiles: int
    outputs: int
    whole: int

    def points(self, taps: int) -> int:
        """Along the axis, of all tiles: a tile that keeps fewer outputs has as many points fewer."""
        return self.tiles * (self.outputs + taps - 2) + self.whole


def _axis(extent: int, outputs: int) -> Axis:
    """The tiles that form the fewest products; they reach beyond extents of 1, and of 2 where filters have 2 taps."""
    tiles = -(-extent // outputs)
    spare = tiles * outputs - extent
    if spare > tiles and outputs > 2:
        spare, outputs = spare - tiles, outputs - 1
    return Axis(tiles, outputs, max(0, tiles - spare))


@dataclass(frozen=True, kw_only=True)
class WinogradTiling(Tiling):
    """A convolution by tiles of outputs × outputs pixels.

    tiles      of a task
    row_tiles  at most so many, side by side, are loaded at a time: the width of a strip
    rows, pitch   of the merged map under a strip
    patches    of a tile
    around     whether outputs are stored around the caches, for all filters of a task at once
    """

    tiles: int
    row_tiles: int
    outputs: int
    rows: int
    pitch: int
    patches: int
    around: bool

    __hash__ = Tiling.__hash__

    @property
    def point_values(self) -> int:
        """Elements from one point of the transformed patches to the next."""
        return -(-self.tiles // self.mr) * self.mr * self.depth * self.patches + LINE

    @property
    def point_sums(self) -> int:
        """Elements from one point of a filter block's sums to the next."""
        return -(-self.tiles // self.mr) * self.mr * self.width + LINE

    @property
    def areas(self) -> tuple[int, ...]:
        """Of the merged patches, their transforms, sums, a residual, finished outputs, and two tables of pixels."""
        pixels = self.outputs * (self.outputs * self.row_tiles + 1)
        finished = pixels * self.width * (self.task_blocks if self.around else 1) * ITEM
        return whole_lines((
            self.rows * self.pitch * self.depth * ITEM,
            POINTS * self.point_values * ITEM,
            self.task_blocks * POINTS * self.point_sums * ITEM,
            finished,
            finished,
            pixels * WORD_BYTES,
            pixels * WORD_BYTES,
        ))  # fmt: skip


def plan(spec: FusionSpec, device: CpuDevice) -> WinogradTiling:
    """The tiling of a convolution: of all that fit the scratch memory, the one with which cores are done first."""
    return min(_tilings(spec, device), key=lambda candidate: candidate[0])[1]


def _tilings(spec: FusionSpec, device: CpuDevice) -> Iterator[tuple[float, WinogradTiling]]:
    """Ways to cut the problem up, each with what it takes: products of a core, those that are waited for included.

    What decides how filters are packed depends on the filters alone: they are packed once for maps of every size.
    """
    conv, C = spec.conv, spec.C
    K, taps = conv.K, taps_of(conv)
    outputs, patches = outputs_of(taps), _patches(conv, taps)
    rows, cols = (_axis(extent, outputs) for extent in (spec.P, spec.Q))
    tiles = spec.N * rows.tiles * cols.tiles
    most = DEPTH_OF_NARROW if _is_whole(conv) and device.vector_bytes < VECTOR_BYTES else DEPTH
    depth = min(C, LINE * balanced(-(-C // LINE), max(1, most // (LINE * patches))))
    mr, nv = choose_register_tile(K, ITEM, device, narrow=True)
    width = nv * VECTOR_BYTES // ITEM
    blocks = -(-K // width)
    packed = POINTS * blocks * width * C * patches
    is_near = packed * ITEM <= device.l2_bytes
    is_large = not FORMATS[spec.dtype].is_narrow and math.prod(spec.out_shape) * ITEM >= AROUND_BYTES
    row_tiles = balanced(max(cols.whole, cols.tiles - cols.whole), RUN)
    strip_rows = (outputs - 1) * conv.stride[0] + conv.R
    pitch = (outputs * row_tiles - 1) * conv.stride[1] + conv.S
    for per_task in range(NEAR_TILES if is_near else FAR_TILES, 0, -1):
        groups = -(-tiles // (per_task * mr))
        task_tiles = -(-tiles // groups)
        task_rows = rows_of(task_tiles, mr, lowest_tile(mr))
        for task_blocks in range(max(1, min(blocks, TASK_FILTERS // width)), 0, -1):
            tiling = WinogradTiling(
                bits=BITS, mr=mr, nv=nv, depth=depth, chunks=-(-C // depth), blocks=blocks, task_blocks=task_blocks,
                packed_elements=packed, tiles=task_tiles, row_tiles=row_tiles, outputs=outputs, rows=strip_rows,
                pitch=pitch, patches=patches, around=is_large and K % width == 0,
            )  # fmt: skip
            if tiling.scratch_bytes <= SCRATCH_LIMIT:
                tasks = groups * -(-blocks // task_blocks)
                reading = (NEAR_COST if is_near else FAR_COST) * mr / task_rows
                filters = (task_blocks * width + TRANSFORM_FILTERS) * (1 + reading)
                yield rounds(tasks, device) * task_rows * filters, tiling


def cut(spec: FusionSpec, tiling: WinogradTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of tiles and filter blocks; the number of tasks; filters are always packed."""
    rows, cols = (_axis(extent, tiling.outputs) for extent in (spec.P, spec.Q))
    tiles = spec.N * rows.tiles * cols.tiles
    words[[at.TILES, at.TASK_TILES, at.ROW_TILES]] = tiles, tiling.tiles, tiling.row_tiles
    words[[at.TILES_P, at.OUTPUTS_P, at.WHOLE_P]] = rows
    words[[at.TILES_Q, at.OUTPUTS_Q, at.WHOLE_Q]] = cols
    words[at.PITCH] = tiling.pitch
    words[at.AROUND] = tiling.around and words[at.OUT_K] == 1
    if words[at.AROUND]:
        words[at.STORE_AROUND] = store_around_task()
    words[[at.TAPS, at.OUTPUTS, at.PATCHES]] = taps_of(spec.conv), tiling.outputs, tiling.patches
    words[[at.TRANSFORM_INPUTS, at.TRANSFORM_OUTPUTS]] = (
        transform_inputs_task(), transform_outputs_task(taps_of(spec.conv)))  # fmt: skip
    words[[at.POINT_VALUES, at.POINT_SUMS]] = tiling.point_values, tiling.point_sums
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    return -(-tiles // tiling.tiles) * -(-tiling.blocks // tiling.task_blocks), False


@functools.cache
def _algorithm(taps: int, stride: tuple[int, int]) -> launch.Algorithm:
    return launch.Algorithm(
        f"winograd {taps} {stride}",
        cut,
        lambda tiling: winograd_task(tiling.mr, tiling.nv),
        lambda bits, stored: pack_task(stored, taps),
    )


def run(spec: FusionSpec, tiling: WinogradTiling, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes a convolution to `out`."""
    launch.run(_algorithm(taps_of(spec.conv), spec.conv.stride), spec, tiling, operands, out)


def replay(spec: FusionSpec, tiling: WinogradTiling, strides: kernel.Strides, weights: kernel.Numbers) -> Replay | None:
    return launch.replay(_algorithm(taps_of(spec.conv), spec.conv.stride), spec, tiling, strides, weights)


def _is_whole(conv: Conv2d) -> bool:
    """Whether filters are one section, of more taps than the two whose errors are largest."""
    taps = taps_of(conv)
    return taps > 2 and _patches(conv, taps) == 1


def _fewest(conv: Conv2d) -> tuple[int, int]:
    """Terms of a sum, and channels."""
    if _is_whole(conv):
        return FEWEST_TERMS, 1
    return FEWEST_TERMS_OF_PARTS, FEWEST_CHANNELS_OF_PARTS


def _share_of_taps(spec: FusionSpec) -> float:
    """How many of all taps fall inside the map, along the axis where fewer do."""

    def share(outputs: int, extent: int, before: int, taps: int, stride: int) -> float:
        starts = np.arange(outputs) * stride - before
        inside = np.minimum(starts + taps, extent) - np.maximum(starts, 0)
        return float(np.maximum(inside, 0).sum()) / (taps * max(1, outputs))

    (top, _), (left, _) = spec.conv.padding
    stride_h, stride_w = spec.conv.stride
    return min(share(spec.P, spec.H, top, spec.conv.R, stride_h), share(spec.Q, spec.W, left, spec.conv.S, stride_w))


def slow(spec: FusionSpec, device: CpuDevice) -> tuple[str, ...]:
    """Why the taps one by one would be faster. Of one image: the choice does not depend on the batch."""
    conv, taps = spec.conv, taps_of(spec.conv)
    outputs, patches = outputs_of(taps), _patches(conv, taps)
    axes = [_axis(extent, outputs) for extent in (spec.P, spec.Q)]
    tiles, points = math.prod(axis.tiles for axis in axes), math.prod(axis.points(taps) for axis in axes)
    if tiles < ENOUGH_TILES and spec.C * conv.K * patches > SMALL_FILTERS:
        few = f"an image has {tiles} tiles of {outputs}x{outputs} outputs"
        return (f"{few}, {ENOUGH_TILES} are worth transforming the filters",)
    ours: float = patches * points
    if patches > 1 or taps == 2:
        is_near = POINTS * patches * spec.C * conv.K * ITEM <= NEAR_BYTES
        reading = (NEAR_FILTERS_TILES if is_near else FAR_FILTERS_TILES) * device.vector_bytes / VECTOR_BYTES
        transforms = PATCH_FILTERS * -(-spec.C // LINE) * LINE / spec.C  # of whole vectors of channels
        ours += patches * POINTS * (tiles * transforms / conv.K + reading)
    by_taps = conv.R * conv.S * spec.P * spec.Q
    if by_taps < LEAST_GAIN * ours:
        return (f"{patches} patches a tile are estimated to take {ours / by_taps:.2f} of the time of the taps",)
    return ()


def products(spec: FusionSpec) -> int:
    """Multiply-adds of the transformed patches."""
    taps = taps_of(spec.conv)
    points = math.prod(_axis(extent, outputs_of(taps)).points(taps) for extent in (spec.P, spec.Q))
    return spec.N * points * _patches(spec.conv, taps) * spec.C * spec.conv.K


def _kernel(merge: Merge, dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, Conv2d):
            return (*reasons, "the contraction is not a conv2d")
        conv = spec.conv
        if conv.dilation != (1, 1):
            reasons.append(f"filters have a dilation of {conv.dilation}, needs (1, 1)")
        if _products(conv, taps_of(conv)) >= conv.R * conv.S:
            reasons.append(f"{conv.R}x{conv.S} taps with a stride of {conv.stride} form no fewer products in patches")
        if max(conv.R, conv.S) > MOST_TAPS:
            reasons.append(f"filters are {conv.R}x{conv.S}, needs at most {MOST_TAPS}x{MOST_TAPS}")
        terms, (fewest, channels) = spec.C * conv.R * conv.S, _fewest(conv)
        if terms < fewest or channels > spec.C:
            reasons.append(
                f"a sum has {terms} terms of {spec.C} channels, needs {fewest} of {channels} to keep the promised error"
            )
        share = _share_of_taps(spec)
        needed = FEWEST_OF_3_TAPS if _is_whole(conv) and taps_of(conv) == 3 else FEWEST_TAPS
        if share < needed:
            reasons.append(
                f"{share:.2f} of the taps along an axis are inside the map, needs {needed} to keep the promised error"
            )
        if conv.groups != 1:
            reasons.append(f"there are {conv.groups} groups, needs one")
        if spec.strict:
            reasons.append("strict=True forbids a sum that forms other products")
        return tuple(reasons)

    name = f"cpu.{merge}_conv_fprop_winograd_{FORMATS[dtype].suffix}"
    return Kernel(name, unsupported, plan, run, slow, products, replay)


KERNELS = tuple(_kernel(merge, dtype) for merge in Merge for dtype, form in FORMATS.items() if form.bits == BITS)
