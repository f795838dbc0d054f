"""1×1 convolutions and dense layers: contractions whose pixels have no neighbours, taken as the rows of one matrix."""

from __future__ import annotations

from functools import partial

from fusionops.cpu import launch
from fusionops.cpu.block import is_pointwise
from fusionops.cpu.direct import TAP_BY_TAP, common_reasons
from fusionops.cpu.simd import COMPUTED
from fusionops.cpu.tiling import plan
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, Dense, FusionSpec, Merge


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, contraction):
            reasons.append(f"the contraction is not a {contraction.__name__.lower()}")
        elif isinstance(spec.contraction, Conv2d) and not is_pointwise(spec.contraction):
            reasons.append(
                f"filters are {spec.conv.R}x{spec.conv.S} with padding {spec.conv.padding}, needs 1x1 without"
            )
        return tuple(reasons)

    word = "conv" if contraction is Conv2d else "dense"
    return Kernel(
        f"cpu.{merge}_{word}_fprop_gemm_{COMPUTED[dtype]}",
        unsupported,
        partial(plan, flat=True),
        partial(launch.run, TAP_BY_TAP),
    )


KERNELS = tuple(
    _kernel(merge, contraction, dtype) for merge in Merge for contraction in (Conv2d, Dense) for dtype in COMPUTED
)
