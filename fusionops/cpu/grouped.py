"""Convolutions in groups narrower than a vector of filters: several groups are computed as one.

A group by itself leaves most of each vector empty. Here a vector holds filters of several groups; for each channel
those of the other groups are gaps, which do not enter the sum: every sum has the terms and the order of the definition.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from fusionops import kernel
from fusionops.cpu import launch
from fusionops.cpu.conv import conv_task
from fusionops.cpu.direct import TAP_BY_TAP, common_reasons
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.cpu.tiling import ConvTiling
from fusionops.cpu.tiling import plan as plan_taps
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel, Operands, Replay
from fusionops.spec import Conv2d, FusionSpec, Merge

# Of a register tile: against 24, which registers would hold, 0.69 to 0.81 of the time in six problems; 12 to 16 0.72 to
# 0.88. With 8, six problems took 0.28 to 0.84 of the time of groups one by one (medians of 11 interleaved rounds).
MOST_PIXELS = 8


def parts(spec: FusionSpec) -> int:
    """How many groups make one: as many as fill a vector with filters, and divide all of them evenly."""
    groups, lanes = spec.conv.groups, VECTOR_BYTES // FORMATS[spec.dtype].computed_bytes
    fitting = min(groups, max(1, lanes * groups // spec.conv.K))
    return next(count for count in range(fitting, 0, -1) if groups % count == 0)


@functools.lru_cache(maxsize=512)
def _joined(spec: FusionSpec) -> tuple[FusionSpec, launch.Algorithm]:
    """The problem with fewer groups, and how it is computed."""
    count = parts(spec)
    fewer = replace(spec.conv, groups=spec.conv.groups // count)
    return replace(spec, contraction=fewer), _algorithm(count)


def _algorithm(count: int) -> launch.Algorithm:
    return replace(
        TAP_BY_TAP,
        name=f"{count} groups as one",
        task=lambda tiling: conv_task(tiling.bits, tiling.mr, tiling.nv, tiling.half, gaps=True),
        parts=count,
    )


def plan(spec: FusionSpec, device: CpuDevice) -> ConvTiling:
    return plan_taps(_joined(spec)[0], device, most_pixels=MOST_PIXELS)


def run(spec: FusionSpec, tiling: ConvTiling, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    joined, algorithm = _joined(spec)
    launch.run(algorithm, joined, tiling, operands, out)


def replay(spec: FusionSpec, tiling: ConvTiling, strides: kernel.Strides, weights: kernel.Numbers) -> Replay | None:
    joined, algorithm = _joined(spec)
    return launch.replay(algorithm, joined, tiling, strides, weights)


def _kernel(merge: Merge, dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, Conv2d):
            reasons.append("the contraction is not a conv2d")
        elif spec.conv.groups == 1 or parts(spec) == 1:
            reasons.append(
                f"{spec.conv.groups} groups of {spec.conv.K // spec.conv.groups} filters do not fit a vector together"
            )
        return tuple(reasons)

    name = f"cpu.{merge}_conv_fprop_grouped_{FORMATS[dtype].suffix}"
    return Kernel(name, unsupported, plan, run, replay=replay)


KERNELS = tuple(_kernel(merge, dtype) for merge in Merge for dtype in FORMATS)
