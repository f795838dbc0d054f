"""Contractions with very few filters: the side outputs and the fused map of HED, attention gates, heads of few classes.

Vectors run along channels instead of filters, which would leave most of each vector empty. What such a kernel can run,
when it is worth it, and how the work is cut up; `dots_task` holds the code of a task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fusionops.cpu import conv, launch, winograd
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words, filter_words, is_flat, is_pointwise
from fusionops.cpu.direct import common_reasons
from fusionops.cpu.dots_task import PIXELS, dots_task
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.gemm import has_one_source_a_channel
from fusionops.cpu.microkernel import SEGMENT_WORDS
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.cpu.tiling import ENOUGH_TILES, SCRATCH_LIMIT, WORD_BYTES, Tiling, balanced, whole_lines
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, Dense, FusionSpec, Layout, Merge, filter_reach

MOST_FILTERS = 6
# What a pixel and filter take, in steps of a register tile (one broadcast element, a vector of filters): so much for
# each vector, and for the sum of its lanes. A pixel of a 1×1 product that is finished alone takes STORE_STEPS. Of the
# time of the other kernels 1 to 6 filters took 0.22 to 1.02 in 29 1×1 problems where this counts fewer steps, 8 filters
# 0.95 to 1.45; 1 to 5 filters of 3×3 to 7×7 0.27 to 0.86, and 1.0 to 1.2 in three where it counts more (AVX2).
VECTOR_STEPS, LANES_STEPS, STORE_STEPS = 1.25, 5, 20
# Where Winograd would run: 4 filters took 0.86 to 0.90 of its time, 5 0.91 to 1.11, 6 1.03 to 1.23 (AVX2).
MOST_BESIDE_WINOGRAD = 4
# Of the merged map under an output tile. 32 KiB took 1.12 times as long over 21 problems, 64 1.04, 256 0.98 (AVX2, 512
# KiB of L2, 5 interleaved rounds).
TILE_BYTES, MOST_TILE_BYTES = 1 << 17, SCRATCH_LIMIT // 2
SMALL_TILE, WIDE_TILE = 16, 64  # outputs of a tile that is not cut further, and of its rows
AREAS = (at.AT_SUMS, at.AT_OUT, at.AT_COPY, at.AT_SEGMENTS)


@dataclass(frozen=True, kw_only=True)
class DotsTiling(Tiling):
    """Sums of dot products, all filters of a tile at once.

    tile_p, tile_q   output tile
    rows, cols       of the merged map under it
    segments         at most so many runs make a sum
    """

    tile_p: int
    tile_q: int
    rows: int
    cols: int
    segments: int

    __hash__ = Tiling.__hash__

    def registers(self, per_vector: int) -> int:
        """There is no register tile; vectors that a processor has no registers for are kept in L1."""
        return 0

    @property
    def line(self) -> int:
        """Elements of a row of sums: the last group of pixels may end beyond it."""
        return self.tile_q + PIXELS - 1

    @property
    def areas(self) -> tuple[int, ...]:
        """Of the merged tile, sums, a row with its pixels in place, a residual, segments."""
        line = self.line * self.item_bytes
        return whole_lines((
            self.rows * self.cols * self.depth * self.item_bytes,
            self.blocks * line,
            line,
            line,
            self.segments * SEGMENT_WORDS * WORD_BYTES,
        ))  # fmt: skip


def plan(spec: FusionSpec, device: CpuDevice) -> DotsTiling:
    """Tiles of outputs whose merged map stays in L2."""
    conv2d, item = spec.conv, FORMATS[spec.dtype].computed_bytes
    flat = is_flat(spec)
    P, Q = (1, spec.N * spec.P * spec.Q) if flat else (spec.P, spec.Q)
    most = max(SMALL_TILE, spec.N * spec.P * spec.Q // ENOUGH_TILES)
    tile_q = min(Q, most if flat else WIDE_TILE)
    tile_p = balanced(P, max(1, most // max(1, tile_q)))
    while True:
        tile_q = balanced(Q, tile_q)
        rows, cols = (
            min(extent, (tile - 1) * stride + filter_reach(taps, dilation))  # what lies beyond the map is not loaded
            for extent, tile, stride, taps, dilation in zip(
                (spec.H, Q if flat else spec.W), (tile_p, tile_q), (1, 1) if flat else conv2d.stride,
                (conv2d.R, conv2d.S), conv2d.dilation, strict=True,
            )
        )  # fmt: skip
        if rows * cols * spec.C * item <= (TILE_BYTES if tile_p * tile_q > SMALL_TILE else MOST_TILE_BYTES):
            break
        tile_p, tile_q = (-(-tile_p // 2), tile_q) if 4 * tile_p >= tile_q and tile_p > 1 else (tile_p, -(-tile_q // 2))
    return DotsTiling(
        bits=8 * item, mr=1, nv=0, depth=spec.C, chunks=1, blocks=conv2d.K, task_blocks=conv2d.K,
        packed_elements=conv2d.K * conv2d.R * conv2d.S * spec.C,
        tile_p=tile_p, tile_q=tile_q, rows=rows, cols=cols, segments=max(conv2d.R, len(spec.sources)),
    )  # fmt: skip


def cut(spec: FusionSpec, tiling: DotsTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of output tiles; the number of tasks; whether `filters` need no packing."""
    conv2d = spec.conv
    N, P, Q, W, stride_w = (int(words[i]) for i in (at.N, at.P, at.Q, at.W, at.STRIDE_W))
    tile_p, tile_q = min(tiling.tile_p, P), min(tiling.tile_q, Q)
    if is_pointwise(conv2d):  # planned as one row of pixels, which strides may not allow
        tile_p = max(1, min(P, tiling.tile_p * tiling.tile_q // max(1, tile_q)))
    tiles_p, tiles_q = -(-P // tile_p), -(-Q // tile_q)
    words[at.TILE_P : at.TILES_Q + 1] = tile_p, tile_q, tiles_p, tiles_q
    words[[at.ROWS, at.COLS]] = filter_reach(conv2d.R, conv2d.dilation[0]), conv2d.S
    words[at.PITCH] = min(W, (tile_q - 1) * stride_w + conv2d.S)
    words[at.SUMS_STEP] = tiling.line * tiling.item_bytes
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    words[at.READS_SOURCES] = _reads_sources(spec, tiling, words)
    return N * tiles_p * tiles_q, filters is not None and _are_in_place(spec, tiling, filters)


def _reads_sources(spec: FusionSpec, tiling: DotsTiling, words: Words) -> bool:
    """Whether the runs of a sum can be read where the sources have them."""
    if not has_one_source_a_channel(spec, words):
        return False
    if len(spec.sources) > 1:  # whose channels have the lanes that they have in the merged map
        firsts = words[at.SOURCES + at.S_FIRST :: at.SOURCE_WORDS]
        return is_pointwise(spec.conv) and bool(np.all(firsts * tiling.item_bytes % VECTOR_BYTES == 0))
    return spec.conv.S == 1 or bool(words[at.SOURCES + at.S_W] == spec.C)


def _are_in_place(spec: FusionSpec, tiling: DotsTiling, filters: Strides) -> bool:
    """Whether a single filter lies as it would be packed."""
    conv2d = spec.conv
    steps = filter_words(spec, tiling, filters, 1)[2:5]
    extents, packed = (conv2d.R, conv2d.S, spec.C), (conv2d.S * spec.C, spec.C, 1)
    return conv2d.K == 1 and all(
        step == wanted or extent == 1 for step, wanted, extent in zip(steps, packed, extents, strict=True)
    )


DOTS = launch.Algorithm("dots", cut, lambda tiling: dots_task(tiling.bits), conv.pack_task)


def slow(spec: FusionSpec, device: CpuDevice) -> tuple[str, ...]:
    """Why vectors of filters, or of pixels, would be faster."""
    conv2d, lanes = spec.conv, VECTOR_BYTES // FORMATS[spec.dtype].computed_bytes
    terms = spec.C * conv2d.R * conv2d.S
    if is_pointwise(conv2d):
        if isinstance(spec.contraction, Conv2d) and spec.layout is Layout.NCHW:
            return ("the pixels of a channel lie side by side, and vectors of pixels need no sum of lanes",)
        if terms < lanes:  # maps of one channel each have their pixels side by side too
            return (f"a pixel has {terms} channels, which do not fill a vector",)
    elif conv2d.K > MOST_BESIDE_WINOGRAD:
        relaxed = replace(spec, strict=False)
        if any(kernel.takes(relaxed, device) for kernel in winograd.KERNELS):
            return (f"there are {conv2d.K} filters, up to {MOST_BESIDE_WINOGRAD} take less time than Winograd",)
    ours = conv2d.K * (VECTOR_STEPS * conv2d.R * -(-conv2d.S * spec.C // lanes) + LANES_STEPS)
    others = terms + is_pointwise(conv2d) * STORE_STEPS
    return (f"is estimated to take {ours / others:.2f} of the time of vectors of filters",) if ours > others else ()


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, contraction):
            return (*reasons, f"the contraction is not a {contraction.__name__.lower()}")
        conv2d = spec.conv
        if conv2d.K > MOST_FILTERS:
            reasons.append(f"there are {conv2d.K} filters, needs at most {MOST_FILTERS}")
        if conv2d.groups != 1:
            reasons.append(f"there are {conv2d.groups} groups, needs one")
        if conv2d.dilation[1] != 1:
            reasons.append(f"columns of the filters have a dilation of {conv2d.dilation[1]}, needs 1")
        row = filter_reach(conv2d.R, conv2d.dilation[0]) * (SMALL_TILE * conv2d.stride[1] + conv2d.S)
        if row * spec.C * FORMATS[spec.dtype].computed_bytes > MOST_TILE_BYTES:
            reasons.append(f"{SMALL_TILE} outputs read {row} pixels of {spec.C} channels, more than a thread may keep")
        return tuple(reasons)

    word = "conv" if contraction is Conv2d else "dense"
    return Kernel(
        f"cpu.{merge}_{word}_fprop_dots_{FORMATS[dtype].suffix}",
        unsupported,
        plan,
        partial(launch.run, DOTS),
        slow,
        replay=partial(launch.replay, DOTS),
    )


KERNELS = tuple(
    _kernel(merge, contraction, dtype)
    for merge in Merge
    for contraction in (Conv2d, Dense)
    for dtype, form in FORMATS.items()
    if not form.is_narrow
)
