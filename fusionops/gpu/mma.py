"""Contractions of float16 and bfloat16 on tensor cores, from compute capability 8.0 on; the sums are float32."""

from __future__ import annotations

from fusionops.device import GpuDevice
from fusionops.gpu import igemm
from fusionops.gpu.igemm import IgemmConfig
from fusionops.gpu.params import SUFFIXES, TYPES
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, Dense, FusionSpec, Merge

SOURCE = "mma.cu"
DTYPES = ("float16", "bfloat16")
PIXELS, FILTERS, THREADS = 128, 128, 256  # of a block, as in the source
STAGE_BYTES = (PIXELS + FILTERS) * 32 * 2
STAGES = 4
BLOCK_SHARED_BYTES = PIXELS * igemm.PIXEL_BYTES + STAGES * STAGE_BYTES
# Of a group: with fewer, most of a tile is not used, and CUDA cores are as fast.
FEWEST_FILTERS = 8


def symbol(dtype: str, merge: Merge) -> str:
    return f"conv_fprop_igemm_sm80<{TYPES[dtype]}, {str(merge is Merge.ADD).lower()}, {{sources}}>"


SYMBOLS = igemm.instantiations(symbol(dtype, merge) for dtype in DTYPES for merge in Merge)
"""Every instantiation that a plan can ask for."""


def plan(spec: FusionSpec, device: GpuDevice) -> IgemmConfig:
    pixels, filters, _ = spec.gemm
    blocks = -(-pixels // PIXELS) * -(-filters // FILTERS) * spec.conv.groups
    return IgemmConfig(SOURCE, symbol(spec.dtype, spec.merge), blocks, THREADS, BLOCK_SHARED_BYTES)


def slow(spec: FusionSpec) -> tuple[str, ...]:
    """Why CUDA cores would be faster."""
    filters = spec.conv.K // spec.conv.groups
    if filters < FEWEST_FILTERS:
        return (f"a group has {filters} filters, {FEWEST_FILTERS} are worth a tile of {FILTERS}",)
    return ()


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = igemm.common_reasons(spec, merge, contraction, dtype)
        if spec.strict:
            reasons.append("strict=True fixes the order of a sum, and tensor cores do not state theirs")
        return tuple(reasons)

    word = "conv" if contraction is Conv2d else "dense"
    name = f"gpu.{merge}_{word}_fprop_igemm_sm80_{SUFFIXES[dtype]}"
    return Kernel(name, unsupported, plan, igemm.run, slow)


KERNELS = tuple(
    _kernel(merge, contraction, dtype) for merge in Merge for contraction in (Conv2d, Dense) for dtype in DTYPES
)
