"""Any convolution: the total kernels of the CPU backend for specs with filters.

Blocked around the register tile wherever the extents lie; nothing is left to a slower loop, so there is no other form.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionops.cpu import launch, stream
from fusionops.cpu.simd import COMPUTED
from fusionops.cpu.tiling import ConvTiling, plan
from fusionops.kernel import Kernel, Operands
from fusionops.spec import Conv2d, Direction, FusionSpec, Merge


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


def run(spec: FusionSpec, tiling: ConvTiling, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes out; with return_sum the merged map first, which then is the only source."""
    if spec.return_sum:
        spec, operands = stream.store_merged(spec, operands)
    launch.run(spec, tiling, operands, out)


def _kernel(merge: Merge, dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, Conv2d):
            reasons.append("the contraction is not a conv2d")
        return tuple(reasons)

    return Kernel(f"cpu.{merge}_conv_fprop_direct_{COMPUTED[dtype]}", unsupported, plan, run)


KERNELS = tuple(_kernel(merge, dtype) for merge in Merge for dtype in COMPUTED)
