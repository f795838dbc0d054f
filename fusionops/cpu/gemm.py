"""1×1 convolutions and dense layers: contractions whose pixels have no neighbours, taken as the rows of one matrix."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import partial

import numpy as np

from fusionops.cpu import conv, gemm_task, launch, outer_task, planes_task
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words, is_flat, is_pointwise
from fusionops.cpu.direct import common_reasons
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.microkernel import SEGMENT_WORDS
from fusionops.cpu.outer_products import MOST_PIXELS
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.cpu.tiling import (
    ENOUGH_TASKS,
    ENOUGH_TILES,
    SCRATCH_LIMIT,
    SMALLEST_TILE_PIXELS,
    TASK_FILTERS,
    TILE_PIXELS,
    WORD_BYTES,
    Tiling,
    balanced,
    choose_register_tile,
    ends_in_half,
    enough_parts,
    even_tile,
    whole_lines,
)
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, Dense, FusionSpec, Layout, Merge

AREAS = (at.AT_PANEL, at.AT_SUMS, at.AT_OUT, at.AT_RESIDUAL, at.AT_COPY, at.AT_SEGMENTS)

# Of a filter block's chunk, most of which stays in L1 while all pixels of a task are multiplied with it. From 32 to 512
# KiB the geometric means over eleven problems were within 5 % of one another.
PANEL_BYTES = 64 * 1024
# With fewer register tiles of pixels than this, copying a block of filters costs more than reading it from L2 again.
# Never copying took 1.32 times as long for 64 pixels, 384 channels and 1024 filters, 0.94 and 1.03 in two others.
COPY_TILES = 3
# Rows of filters longer than this bring those of a block to a few sets of the L1 cache.
LONG_ROW_BYTES = 512
# Filters of a block for few pixels, in vectors: as many as let the sums stay in L1. Memory delivers long runs of a row
# faster: 2 KiB 1.1 to 1.4 times as fast as 1, 8 KiB 1.0 to 1.5 times as fast as 2 (one pixel, 512 to 2048 channels).
# Three widths and no more: filters are kept packed for each.
OUTER_VECTORS = (128, 32, 16)
OUTER_BYTES = 32 * 1024
# They are cut into two tasks at least, into ENOUGH_TASKS from more pixels on, which took 0.99 to 1.02 of the time where
# two were enough (two cores).
FEW_PIXELS = 24
EVEN_BLOCKS = 4  # more blocks than this come in multiples of it, so that threads get equally many
# Pixels of a task for few filters, and bytes of their sums that are kept in L1 at a time: 2 to 8 KiB differed by less
# than the noise.
PLANE_PIXELS = 1 << 14
PLANE_BYTES = 1 << 13
# Filters of a task that stay in L2 beside its pixels: then all of them are multiplied with one register tile of pixels
# after the other, and outputs and residuals are whole rows. Took 0.86 of the time for 256 filters of 64 channels with a
# residual, 0.92 and 0.96 in two small problems, no less in three others; with 1 MiB 1.05 in one of 768 channels.
ROWS_FIRST_BYTES = 1 << 18


class Task(enum.Enum):
    """The code of a task; all sum in the same order."""

    TILES = enum.auto()
    OUTER = enum.auto()
    PLANES = enum.auto()


OTHER_TASKS = {Task.OUTER: outer_task.outer_task, Task.PLANES: planes_task.planes_task}


@dataclass(frozen=True, kw_only=True)
class GemmTiling(Tiling):
    """A product of matrices.

    tile_p, tile_q   output rows and columns of a task: its pixels are the rows of a matrix
    sources          how many there are at most to list
    filters          of a group
    task             for many pixels and filters, for few pixels, or for few filters and pixels side by side
    """

    tile_p: int
    tile_q: int
    sources: int
    filters: int
    task: Task = Task.TILES

    __hash__ = Tiling.__hash__

    def registers(self, per_vector: int) -> int:
        """Outer products take what they have registers for."""
        return super().registers(per_vector) if self.task is Task.TILES else 0

    @property
    def areas(self) -> tuple[int, ...]:
        """Of the merged tile, copied filters, sums, output and residual offsets, residual of a register tile, segments.

        Tile and filters come first: what is asked for ahead of them is not the memory that another thread writes.
        """
        if self.task is Task.PLANES:
            return self._areas_of_planes
        is_outer = self.task is Task.OUTER
        pixels = -(-self.tile_p * self.tile_q // self.mr) * self.mr
        sums = pixels * self.width * self.item_bytes
        kept = self.task_blocks * (2 if is_outer else 1) if self.chunks > 1 else 1
        return whole_lines((
            pixels * self.depth * self.item_bytes,
            0 if is_outer else self.depth * self.width * self.task_blocks * self.item_bytes,
            sums * kept,
            pixels * WORD_BYTES,
            pixels * WORD_BYTES,
            sums if is_outer else self.mr * self.width * self.item_bytes,
            self.sources * SEGMENT_WORDS * WORD_BYTES,
        ))  # fmt: skip

    @property
    def span(self) -> int:
        """Pixels of planes whose sums are computed at a time: whole vectors."""
        return max(1, PLANE_BYTES // (self.filters * VECTOR_BYTES)) * VECTOR_BYTES // self.item_bytes

    @property
    def _areas_of_planes(self) -> tuple[int, ...]:
        """Of a plane with its pixels in place, merged planes, sums, a residual."""
        line = self.span * self.item_bytes
        sums = self.filters * line * (2 if self.chunks > 1 else 1)
        return whole_lines((line, planes_task.CHANNELS * line, sums, 0, 0, line, 0))


def _task(spec: FusionSpec) -> Task:
    """The task for a contraction."""
    if spec.N * spec.P * spec.Q <= MOST_PIXELS:
        return Task.OUTER
    if (
        not isinstance(spec.contraction, Conv2d)
        or spec.conv.K * FORMATS[spec.dtype].computed_bytes > VECTOR_BYTES
        or spec.conv.groups > 1
        or FORMATS[spec.dtype].is_narrow
    ):
        return Task.TILES
    return Task.PLANES if _is_in_planes(spec) else Task.TILES


def _is_in_planes(spec: FusionSpec) -> bool:
    """Whether the pixels of a channel lie side by side in all sources, as far as their layout tells."""
    return spec.layout is Layout.NCHW or all(source.shape[spec.channel_axis] == 1 for source in spec.sources)


def plan(spec: FusionSpec, device: CpuDevice) -> GemmTiling:
    """The tiling of a contraction without neighbours."""
    conv2d, item = spec.conv, FORMATS[spec.dtype].computed_bytes
    filters, channels = conv2d.K // conv2d.groups, spec.C // conv2d.groups
    pixels = spec.N * spec.P * spec.Q
    mr, nv = choose_register_tile(filters, item, device)
    depth = balanced(channels, max(16, PANEL_BYTES // (nv * VECTOR_BYTES)))  # the same for few pixels as for many
    task = _task(spec)
    if task is Task.PLANES:
        mr = 1
    if task is Task.OUTER:
        vectors = -(-filters * item // VECTOR_BYTES)
        fitting = (width for width in OUTER_VECTORS if pixels * width * VECTOR_BYTES <= OUTER_BYTES)
        most = min(next(fitting, OUTER_VECTORS[-1]), max(OUTER_VECTORS[1], -(-vectors // ENOUGH_TASKS)))
        parts = 2 if pixels <= FEW_PIXELS else ENOUGH_TASKS
        count = -(-vectors // min(most, max(1, -(-vectors // parts))))
        count = -(-count // EVEN_BLOCKS) * EVEN_BLOCKS if count > EVEN_BLOCKS else count
        mr, nv = 1, -(-vectors // count)
    width = nv * VECTOR_BYTES // item
    blocks = -(-filters // width)
    task_blocks = balanced(blocks, max(1, TASK_FILTERS // width)) if task is Task.TILES else 1

    flat = is_flat(spec)
    P, Q = (1, spec.N * spec.P * spec.Q) if flat else (spec.P, spec.Q)
    tasks_of_filters = conv2d.groups * -(-blocks // task_blocks)
    most = PLANE_PIXELS if task is Task.PLANES else TILE_PIXELS
    wanted = min(most, max(SMALLEST_TILE_PIXELS, pixels * tasks_of_filters // ENOUGH_TILES))
    tile_q = balanced(Q, -(-wanted // mr) * mr)
    tile_p = balanced(P, max(1, wanted // tile_q))
    tiles = conv2d.groups * -(-P // tile_p) * -(-Q // tile_q) * (1 if flat else spec.N)
    task_blocks = enough_parts(blocks, task_blocks, tiles)
    if task is Task.TILES and flat:
        tile_q = even_tile(Q, tile_q, mr, conv2d.groups * -(-blocks // task_blocks), device)
    while True:
        tiling = GemmTiling(
            bits=8 * item, mr=mr, nv=nv, depth=depth, chunks=-(-channels // depth), blocks=blocks,
            task_blocks=task_blocks, packed_elements=conv2d.groups * blocks * width * channels,
            tile_p=tile_p, tile_q=tile_q, sources=len(spec.sources), filters=filters,
            task=task, half=task is Task.TILES and ends_in_half(filters, item, nv, device),
        )  # fmt: skip
        if tiling.scratch_bytes <= SCRATCH_LIMIT:
            return tiling
        tile_p, tile_q = (-(-tile_p // 2), tile_q) if tile_p > 1 else (tile_p, -(-tile_q // 2))


def cut(spec: FusionSpec, tiling: GemmTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of output tiles and filter blocks; the number of tasks; whether `filters` need no packing."""
    N, P, Q = (int(words[i]) for i in (at.N, at.P, at.Q))
    is_narrow = FORMATS[spec.dtype].is_narrow  # such sources and filters are widened where they are loaded and packed
    tile_p, tile_q = same_area(tiling.tile_p * tiling.tile_q, P, Q)
    tiles_p, tiles_q = -(-P // tile_p), -(-Q // tile_q)
    words[at.TILE_P : at.TILES_Q + 1] = tile_p, tile_q, tiles_p, tiles_q
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    if tiling.task is Task.PLANES:
        lanes = VECTOR_BYTES // tiling.item_bytes
        words[at.PITCH] = min(tiling.span, -(-tile_q // lanes) * lanes)
    words[at.READS_SOURCES] = (
        not is_narrow and has_one_source_a_channel(spec, words) and (tile_p == 1 or _rows_follow(words, tile_q))
    )
    group_filters, channels, width = spec.conv.K // spec.conv.groups, spec.C // spec.conv.groups, tiling.width
    rows = None if filters is None or is_narrow else _channel_step(spec, filters, tiling.item_bytes)
    if rows is not None:
        is_long = abs(rows) * tiling.item_bytes > LONG_ROW_BYTES and tile_p * tile_q > COPY_TILES * tiling.mr
        words[at.COPIES_FILTERS] = tiling.task is Task.TILES and (is_long or group_filters % width != 0)
        steps = rows, width, group_filters
    else:
        steps = width, width * channels, width * channels * tiling.blocks
    words[[at.FILTER_ROW, at.FILTER_BLOCK, at.FILTER_GROUP]] = steps
    task_bytes = tiling.task_blocks * width * spec.C * tiling.item_bytes
    one_pass = tiling.chunks == 1 and words[at.OUT_K] == 1 and not words[at.COPIES_FILTERS]
    words[at.ROWS_FIRST] = one_pass and task_bytes <= ROWS_FIRST_BYTES
    return N * tiles_p * tiles_q * spec.conv.groups * -(-tiling.blocks // tiling.task_blocks), rows is not None


def same_area(pixels: int, P: int, Q: int) -> tuple[int, int]:
    """A tile of at most as many pixels as was planned for: whole rows, or a part of one."""
    tile_q = min(Q, pixels)
    return max(1, min(P, pixels // max(1, tile_q))), max(1, tile_q)


def has_one_source_a_channel(spec: FusionSpec, words: Words) -> bool:
    """Whether each channel of the merged map is a channel of one source as it stands."""
    steps = words[at.SOURCES + at.S_C :: at.SOURCE_WORDS]
    alone = spec.merge is Merge.CONCAT or len(spec.sources) == 1
    return alone and all(steps == 1) and all(s.weight is None and s.upsample == (1, 1) for s in spec.sources)


def _rows_follow(words: Words, tile_q: int) -> bool:
    """Whether tiles are whole rows, and each row of a source begins where the one before it ends."""
    rows, pixels = (words[at.SOURCES + step :: at.SOURCE_WORDS] for step in (at.S_H, at.S_W))
    return bool(tile_q == words[at.Q] and np.all(rows == pixels * words[at.Q]))


def _channel_step(spec: FusionSpec, strides: Strides, item: int) -> int | None:
    """Elements from one channel's filters to the next, where the filters of a channel lie side by side."""
    if isinstance(spec.contraction, Conv2d) and spec.layout is Layout.NCHW:
        strides = strides[2:] + strides[1::-1]
    *_, channel, step = strides
    return channel // item if step == item and channel % item == 0 else None


ROWS = launch.Algorithm(
    "rows",
    cut,
    lambda tiling: (
        gemm_task.gemm_task(tiling.bits, tiling.mr, tiling.nv, tiling.half)
        if tiling.task is Task.TILES
        else OTHER_TASKS[tiling.task](tiling.bits)
    ),
    conv.pack_task,
)


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, contraction):
            reasons.append(f"the contraction is not a {contraction.__name__.lower()}")
        elif isinstance(spec.contraction, Conv2d) and not is_pointwise(spec.contraction):
            reasons.append(
                f"filters are {spec.conv.R}x{spec.conv.S} with padding {spec.conv.padding}, needs 1x1 without"
            )
        elif spec.conv.stride != (1, 1) and any(source.upsample != (1, 1) for source in spec.sources):
            reasons.append(f"stride {spec.conv.stride} skips pixels of an upsampled source")
        return tuple(reasons)

    word = "conv" if contraction is Conv2d else "dense"
    return Kernel(
        f"cpu.{merge}_{word}_fprop_gemm_{FORMATS[dtype].suffix}",
        unsupported,
        plan,
        partial(launch.run, ROWS),
        replay=partial(launch.replay, ROWS),
    )


KERNELS = tuple(
    _kernel(merge, contraction, dtype) for merge in Merge for contraction in (Conv2d, Dense) for dtype in FORMATS
)
