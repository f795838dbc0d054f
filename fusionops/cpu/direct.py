"""Any convolution: the total kernels of the CPU backend for specs with filters.

Blocked around the register tile wherever the extents lie; nothing is left to a slower loop, so there is no other form.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fusionops.cpu import conv, launch
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.tiling import ConvTiling, plan
from fusionops.kernel import Kernel
from fusionops.refusals import contraction_reasons
from fusionops.spec import Conv2d, FusionSpec, Merge, filter_reach

AREAS = (at.AT_SUMS, at.AT_PIXELS, at.AT_OUT, at.AT_RESIDUAL, at.AT_GROUPS, at.AT_COPY)


def common_reasons(spec: FusionSpec, merge: Merge, dtype: str) -> list[str]:
    """What keeps every contraction on the CPU from running a spec."""
    reasons = contraction_reasons(spec, merge, dtype)
    if spec.precision is not None:
        reasons.append(f"precision is {spec.precision}, which only GPUs offer")
    return reasons


def cut(spec: FusionSpec, tiling: ConvTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of output tiles and filter blocks; the number of tasks; filters are always packed."""
    conv2d = spec.conv
    N, P, Q, W, stride_h, stride_w = (int(words[i]) for i in (at.N, at.P, at.Q, at.W, at.STRIDE_H, at.STRIDE_W))
    tile_p, tile_q = min(tiling.tile_p, P), min(tiling.tile_q, Q)
    tiles_p, tiles_q = -(-P // tile_p), -(-Q // tile_q)
    rows = (tile_p - 1) * stride_h + filter_reach(conv2d.R, conv2d.dilation[0])
    cols = (tile_q - 1) * stride_w + filter_reach(conv2d.S, conv2d.dilation[1])
    words[at.TILE_P : at.TILES_Q + 1] = tile_p, tile_q, tiles_p, tiles_q
    words[[at.ROWS, at.COLS, at.PITCH]] = rows, cols, min(cols, W)
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    return N * tiles_p * tiles_q * conv2d.groups * -(-tiling.blocks // tiling.task_blocks), False


TAP_BY_TAP = launch.Algorithm(
    "tap by tap",
    cut,
    lambda tiling: conv.conv_task(tiling.bits, tiling.mr, tiling.nv, tiling.half),
    conv.pack_task,
)


def _kernel(merge: Merge, dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, Conv2d):
            reasons.append("the contraction is not a conv2d")
        return tuple(reasons)

    return Kernel(
        f"cpu.{merge}_conv_fprop_direct_{FORMATS[dtype].suffix}",
        unsupported,
        plan,
        partial(launch.run, TAP_BY_TAP),
        replay=partial(launch.replay, TAP_BY_TAP),
    )


KERNELS = tuple(_kernel(merge, dtype) for merge in Merge for dtype in FORMATS)
