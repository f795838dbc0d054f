"""Any convolution: the total kernels of the CPU backend for specs with filters.

Blocked around the register tile wherever the extents lie; nothing is left to a slower loop, so there is no other form.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fusionops.cpu import conv, launch
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words, is_pointwise
from fusionops.cpu.simd import COMPUTED
from fusionops.cpu.tiling import ConvTiling, plan
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, Direction, FusionSpec, Layout, Merge, filter_reach

AREAS = (at.AT_SUMS, at.AT_PIXELS, at.AT_OUT, at.AT_RESIDUAL, at.AT_GROUPS, at.AT_COPY)

# Rows of filters that are read where the caller has them are no longer than this: one of 2 KiB or more would bring all
# rows of a block to a few sets of the L1 cache. Not packing saves a small call a launch.
IN_PLACE_BYTES = 512
# Filters of a task that stay in L2 beside its pixels: then all of them are multiplied with one register tile of pixels
# after the other, and outputs and residuals are whole rows. Took 0.86 of the time for 256 filters of 64 channels with a
# residual, 0.92 and 0.96 in two small problems, no less in three others; with 1 MiB 1.05 in one of 768 channels.
ROWS_FIRST_BYTES = 1 << 18


def common_reasons(spec: FusionSpec, merge: Merge, dtype: str) -> list[str]:
    """What keeps every contraction on the CPU from running a spec."""
    reasons = []
    if spec.direction is not Direction.FPROP:
        reasons.append(f"direction is {spec.direction}, needs fprop")
    if spec.merge is not merge:
        reasons.append(f"merge is {spec.merge}, needs {merge}")
    if spec.dtype != dtype:
        reasons.append(f"dtype is {spec.dtype}, needs {dtype}")
    if spec.precision is not None:
        reasons.append(f"precision is {spec.precision}, which only GPUs offer")
    every = (*spec.sources, spec.residual) if spec.residual else spec.sources
    asked = [name for name in ("scale", "shift", "activation") if any(getattr(source, name) for source in every)]
    return reasons + [f"a source has {name}, which the tile load does not apply yet" for name in asked]


def cut(spec: FusionSpec, tiling: ConvTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of output tiles and filter blocks; the number of tasks; whether `filters` need no packing."""
    conv2d = spec.conv
    N, P, Q, W, stride_h, stride_w = (int(words[i]) for i in (at.N, at.P, at.Q, at.W, at.STRIDE_H, at.STRIDE_W))
    tile_p, tile_q = min(tiling.tile_p, P), min(tiling.tile_q, Q)
    if is_pointwise(conv2d) and (stride_h, stride_w) == (1, 1):
        tile_p, tile_q = _same_area(tiling.tile_p * tiling.tile_q, P, Q)
    tiles_p, tiles_q = -(-P // tile_p), -(-Q // tile_q)
    rows = (tile_p - 1) * stride_h + filter_reach(conv2d.R, conv2d.dilation[0])
    cols = (tile_q - 1) * stride_w + filter_reach(conv2d.S, conv2d.dilation[1])
    words[at.TILE_P : at.TILES_Q + 1] = tile_p, tile_q, tiles_p, tiles_q
    words[[at.ROWS, at.COLS, at.PITCH]] = rows, cols, min(cols, W)
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    task_bytes = tiling.task_blocks * tiling.width * spec.C * tiling.item_bytes
    is_flat = is_pointwise(conv2d) and tiling.chunks == 1 and words[at.OUT_K] == 1
    words[at.ROWS_FIRST] = is_flat and task_bytes <= ROWS_FIRST_BYTES
    in_place = filters is not None and _lies_in_rows(spec, tiling, filters)
    taps = conv2d.R * conv2d.S * spec.C // conv2d.groups
    words[at.FILTER_ROW] = conv2d.K if in_place else tiling.width
    words[at.FILTER_BLOCK] = tiling.width if in_place else taps * tiling.width
    return N * tiles_p * tiles_q * conv2d.groups * -(-tiling.blocks // tiling.task_blocks), in_place


def _same_area(pixels: int, P: int, Q: int) -> tuple[int, int]:
    """A tile of as many pixels as was planned for, in a map that could not be flattened."""
    tile_q = min(Q, pixels)
    return max(1, min(P, pixels // max(1, tile_q))), max(1, tile_q)


def _lies_in_rows(spec: FusionSpec, tiling: ConvTiling, strides: Strides) -> bool:
    """Whether a task may read filters of these strides as they are: whole blocks, one chunk, filters last."""
    whole = tiling.chunks == 1 and spec.conv.groups == 1 and spec.conv.K % tiling.width == 0
    contiguous = tuple(np.cumprod((tiling.item_bytes, *spec.filter_shape[:0:-1]))[::-1].tolist())
    short = spec.conv.K * tiling.item_bytes <= IN_PLACE_BYTES
    return whole and short and spec.layout is Layout.NHWC and strides == contiguous


TAP_BY_TAP = launch.Algorithm(
    "tap by tap",
    cut,
    lambda tiling: conv.conv_task(tiling.bits, tiling.mr, tiling.nv),
    lambda tiling: conv.pack_task(tiling.bits),
)


def _kernel(merge: Merge, dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, Conv2d):
            reasons.append("the contraction is not a conv2d")
        return tuple(reasons)

    return Kernel(
        f"cpu.{merge}_conv_fprop_direct_{COMPUTED[dtype]}", unsupported, plan, partial(launch.run, TAP_BY_TAP)
    )


KERNELS = tuple(_kernel(merge, dtype) for merge in Merge for dtype in COMPUTED)
