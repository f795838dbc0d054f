"""Contractions on tensor cores, from compute capability 8.0 on; the sums are float32.

float16 and bfloat16; float32 only where precision="tf32" allows its factors to be rounded to 11 significant bits.
"""

from __future__ import annotations

from fusionops.device import GpuDevice
from fusionops.gpu import igemm
from fusionops.gpu.igemm import IgemmConfig
from fusionops.gpu.params import SUFFIXES, TYPES
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, Dense, FusionSpec, Merge

SOURCE = "mma.cu"
DTYPES = ("float16", "bfloat16", "float32")
PIXELS, STEP_BYTES, STAGES, THREADS = 128, 64, 4, 256  # of a block; of a pixel's channels in a step; as in the source
FILTERS = (128, 64)
WARP_FILTERS = 32
# Of a group: with fewer, most of a tile is not used, and CUDA cores are as fast.
FEWEST_FILTERS = 8


def symbol(dtype: str, merge: Merge, filters: int) -> str:
    return f"conv_fprop_igemm_sm80<{TYPES[dtype]}, {str(merge is Merge.ADD).lower()}, {filters}, {{sources}}>"


SYMBOLS = igemm.instantiations(
    symbol(dtype, merge, filters) for dtype in DTYPES for merge in Merge for filters in FILTERS
)
"""Every instantiation that a plan can ask for."""


def block_shared_bytes(dtype: str, filters: int) -> int:
    """Pixels, and the buffers of all stages, in the place of which half a tile of sums follows."""
    gaps = 8 * STEP_BYTES if dtype == "float32" else 0
    buffers = STAGES * ((PIXELS + filters) * STEP_BYTES + gaps)
    return PIXELS * igemm.PIXEL_BYTES + max(buffers, PIXELS // 2 * (filters + 1) * 4)


def share_of_products(filters: int) -> float:
    """Of the matrix instructions: the others load 16 × 16 numbers, of which 32 filters are two."""
    tiles = PIXELS * filters // WARP_FILTERS // 8 // 16  # of 16 pixels, of one of 8 warps
    return tiles * 4 / (tiles * 4 + tiles + 2)


def plan(spec: FusionSpec, device: GpuDevice) -> IgemmConfig:
    """Of the tiles the one whose blocks, dealt out to all multiprocessors, are done first; of equals the wider."""

    def duration(filters: int) -> float:
        return -(-_blocks(spec, filters) // device.multiprocessors) * filters / share_of_products(filters)

    return with_tile(spec, min(FILTERS, key=duration))


def with_tile(spec: FusionSpec, filters: int) -> IgemmConfig:
    name = symbol(spec.dtype, spec.merge, filters)
    return IgemmConfig(SOURCE, name, _blocks(spec, filters), THREADS, block_shared_bytes(spec.dtype, filters))


def _blocks(spec: FusionSpec, tile: int) -> int:
    pixels, filters, _ = spec.gemm
    return -(-pixels // PIXELS) * -(-filters // tile) * spec.conv.groups


def may_round(spec: FusionSpec) -> bool:
    """Whether sums may have any order, and factors the precision of tensor cores."""
    return not spec.strict and (spec.dtype in ("float16", "bfloat16") or spec.precision == "tf32")


def slow(spec: FusionSpec, device: GpuDevice) -> tuple[str, ...]:
    """Why CUDA cores would be faster."""
    filters = spec.conv.K // spec.conv.groups
    if filters < FEWEST_FILTERS:
        return (f"a group has {filters} filters, {FEWEST_FILTERS} are worth a tile of {FILTERS[-1]}",)
    return ()


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = igemm.common_reasons(spec, merge, contraction, dtype)
        if spec.strict:
            reasons.append("strict=True fixes the order of a sum, and tensor cores do not state theirs")
        elif not may_round(spec):
            reasons.append("precision is that of float32, and tensor cores would round its factors: needs tf32")
        return tuple(reasons)

    word = "conv" if contraction is Conv2d else "dense"
    name = f"gpu.{merge}_{word}_fprop_igemm_sm80_{SUFFIXES[dtype]}"
    return Kernel(name, unsupported, plan, igemm.run, slow)


KERNELS = tuple(
    _kernel(merge, contraction, dtype) for merge in Merge for contraction in (Conv2d, Dense) for dtype in DTYPES
)
