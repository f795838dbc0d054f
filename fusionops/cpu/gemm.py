"""1×1 convolutions and dense layers: contractions whose pixels have no neighbours, taken as the rows of one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from fusionops.cpu import conv, gemm_task, launch
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words, is_pointwise
from fusionops.cpu.direct import common_reasons
from fusionops.cpu.microkernel import SEGMENT_WORDS
from fusionops.cpu.simd import COMPUTED, VECTOR_BYTES
from fusionops.cpu.tiling import (
    ENOUGH_TILES,
    SCRATCH_LIMIT,
    SMALLEST_TILE_PIXELS,
    TASK_FILTERS,
    TILE_PIXELS,
    WORD_BYTES,
    Tiling,
    balanced,
    choose_register_tile,
    whole_lines,
)
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel
from fusionops.spec import ITEM_BYTES, Conv2d, Dense, FusionSpec, Layout, Merge

AREAS = (at.AT_SUMS, at.AT_OUT, at.AT_RESIDUAL, at.AT_COPY, at.AT_SEGMENTS)

# Of a filter block's chunk, which stays in L1 while all pixels of a task are multiplied with it.
PANEL_BYTES = 32 * 1024
# Rows of filters that are read where the caller has them are no longer than this: one of 2 KiB or more would bring all
# rows of a block to a few sets of the L1 cache. Not packing saves a small call a launch.
IN_PLACE_BYTES = 512
# Filters of a task that stay in L2 beside its pixels: then all of them are multiplied with one register tile of pixels
# after the other, and outputs and residuals are whole rows. Took 0.86 of the time for 256 filters of 64 channels with a
# residual, 0.92 and 0.96 in two small problems, no less in three others; with 1 MiB 1.05 in one of 768 channels.
ROWS_FIRST_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class GemmTiling(Tiling):
    """A product of matrices.

    tile_p, tile_q   output rows and columns of a task: its pixels are the rows of a matrix
    sources          how many there are at most to list
    """

    tile_p: int
    tile_q: int
    sources: int

    __hash__ = Tiling.__hash__

    @property
    def areas(self) -> tuple[int, ...]:
        """Of the merged tile, sums, output and residual offsets, residual of a register tile, segments."""
        pixels = -(-self.tile_p * self.tile_q // self.mr) * self.mr
        return whole_lines((
            pixels * self.depth * self.item_bytes,
            pixels * self.width * (self.task_blocks if self.chunks > 1 else 1) * self.item_bytes,
            pixels * WORD_BYTES,
            pixels * WORD_BYTES,
            self.mr * self.width * self.item_bytes,
            self.sources * SEGMENT_WORDS * WORD_BYTES,
        ))  # fmt: skip


def plan(spec: FusionSpec, device: CpuDevice) -> GemmTiling:
    """The tiling of a contraction without neighbours."""
    conv2d, item = spec.conv, ITEM_BYTES[spec.dtype]
    filters, channels = conv2d.K // conv2d.groups, spec.C // conv2d.groups
    mr, nv = choose_register_tile(filters, item, device, flat=True)
    width = nv * VECTOR_BYTES // item
    blocks = -(-filters // width)
    task_blocks = balanced(blocks, max(1, TASK_FILTERS // width))
    depth = balanced(channels, max(16, PANEL_BYTES // (width * item)))

    is_flat = not any(source.upsample != (1, 1) for source in (*spec.sources, *filter(None, [spec.residual])))
    P, Q = (1, spec.N * spec.P * spec.Q) if is_flat else (spec.P, spec.Q)
    tasks_of_filters = conv2d.groups * -(-blocks // task_blocks)
    pixels = spec.N * spec.P * spec.Q
    wanted = min(TILE_PIXELS, max(SMALLEST_TILE_PIXELS, pixels * tasks_of_filters // ENOUGH_TILES))
    tile_q = balanced(Q, -(-wanted // mr) * mr)
    tile_p = balanced(P, max(1, wanted // tile_q))
    while True:
        tiling = GemmTiling(
            bits=8 * item, mr=mr, nv=nv, depth=depth, chunks=-(-channels // depth), blocks=blocks,
            task_blocks=task_blocks, packed_elements=conv2d.groups * blocks * width * channels,
            tile_p=tile_p, tile_q=tile_q, sources=len(spec.sources),
        )  # fmt: skip
        if tiling.scratch_bytes <= SCRATCH_LIMIT:
            return tiling
        tile_p, tile_q = (-(-tile_p // 2), tile_q) if tile_p > 1 else (tile_p, -(-tile_q // 2))


def cut(spec: FusionSpec, tiling: GemmTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of output tiles and filter blocks; the number of tasks; whether `filters` need no packing."""
    N, P, Q = (int(words[i]) for i in (at.N, at.P, at.Q))
    tile_p, tile_q = _same_area(tiling.tile_p * tiling.tile_q, P, Q)
    tiles_p, tiles_q = -(-P // tile_p), -(-Q // tile_q)
    words[at.TILE_P : at.TILES_Q + 1] = tile_p, tile_q, tiles_p, tiles_q
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    task_bytes = tiling.task_blocks * tiling.width * spec.C * tiling.item_bytes
    words[at.ROWS_FIRST] = tiling.chunks == 1 and words[at.OUT_K] == 1 and task_bytes <= ROWS_FIRST_BYTES
    words[at.READS_SOURCES] = tile_p == 1 and _has_one_source_a_channel(spec, words)
    in_place = filters is not None and _lies_in_rows(spec, tiling, filters)
    words[at.FILTER_ROW] = spec.conv.K if in_place else tiling.width
    words[at.FILTER_BLOCK] = tiling.width * (1 if in_place else spec.C // spec.conv.groups)
    return N * tiles_p * tiles_q * spec.conv.groups * -(-tiling.blocks // tiling.task_blocks), in_place


def _same_area(pixels: int, P: int, Q: int) -> tuple[int, int]:
    """A tile of at most as many pixels as was planned for: whole rows, or a part of one."""
    tile_q = min(Q, pixels)
    return max(1, min(P, pixels // max(1, tile_q))), max(1, tile_q)


def _has_one_source_a_channel(spec: FusionSpec, words: Words) -> bool:
    """Whether each channel of the merged map is a channel of one source as it stands."""
    steps = words[at.SOURCES + at.S_C :: at.SOURCE_WORDS]
    alone = spec.merge is Merge.CONCAT or len(spec.sources) == 1
    return alone and all(steps == 1) and all(s.weight is None and s.upsample == (1, 1) for s in spec.sources)


def _lies_in_rows(spec: FusionSpec, tiling: GemmTiling, strides: Strides) -> bool:
    """Whether a task may read filters of these strides as they are: whole blocks, one chunk, filters last."""
    whole = tiling.chunks == 1 and spec.conv.groups == 1 and spec.conv.K % tiling.width == 0
    contiguous = tuple(np.cumprod((tiling.item_bytes, *spec.filter_shape[:0:-1]))[::-1].tolist())
    short = spec.conv.K * tiling.item_bytes <= IN_PLACE_BYTES
    return whole and short and spec.layout is Layout.NHWC and strides == contiguous


ROWS = launch.Algorithm(
    "rows",
    cut,
    lambda tiling: gemm_task.gemm_task(tiling.bits, tiling.mr, tiling.nv),
    lambda tiling: conv.pack_task(tiling.bits),
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
    return Kernel(f"cpu.{merge}_{word}_fprop_gemm_{COMPUTED[dtype]}", unsupported, plan, partial(launch.run, ROWS))


KERNELS = tuple(
    _kernel(merge, contraction, dtype) for merge in Merge for contraction in (Conv2d, Dense) for dtype in COMPUTED
)
