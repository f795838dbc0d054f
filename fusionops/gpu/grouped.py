"""Convolutions in groups of few filters, depthwise ones first of all, on CUDA cores; any stride, dilation, layout.

A tile of an implicit matrix product has 64 filters of one group, and is all but empty where a group has fewer.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from fusionops.axes import Strides
from fusionops.device import GpuDevice
from fusionops.gpu import igemm, mma
from fusionops.gpu.igemm import IgemmConfig
from fusionops.gpu.module import launch, runtime
from fusionops.gpu.params import SUFFIXES, TYPES, capacity
from fusionops.kernel import Kernel, Operands
from fusionops.spec import ITEM_BYTES, Conv2d, FusionSpec, Layout, Merge

SOURCE = "grouped.cu"
THREADS = 256  # of a block, as in the source
MOST_BLOCKS = 2**22  # of a launch: threads are counted in 32 bits, and each takes what strips are left
# Channels that a thread moves at once. 16 bytes would hold 8 of float16, but then registers hold half the columns, and
# pixels that are loaded once for more columns save more than wider loads.
RUNS = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 2}


def columns(adds: bool) -> int:
    """Of a thread, as in the source."""
    return 4 if adds else 8


def symbol(dtype: str, adds: bool, run: int | str, sources: int | str) -> str:
    return f"conv_fprop_grouped<{TYPES[dtype]}, {str(adds).lower()}, {run}, {sources}>"


SYMBOLS = igemm.instantiations(
    symbol(dtype, adds, run, "{sources}") for dtype in TYPES for adds in (True, False) for run in (RUNS[dtype], 1)
)
"""Every instantiation that a plan can ask for."""


def is_sum(spec: FusionSpec) -> bool:
    """Whether sources are added; where there is only one, it is read like one of a concatenation."""
    return spec.merge is Merge.ADD and len(spec.sources) > 1


def group_extents(spec: FusionSpec) -> tuple[int, int]:
    """Channels and filters of a group."""
    return spec.C // spec.conv.groups, spec.conv.K // spec.conv.groups


def run_of_extents(spec: FusionSpec) -> int:
    """Channels that a thread moves at once where arrays allow it: whole runs, whose filters have a channel each, or
    share theirs.
    """
    run = run_of_merged(spec)
    return run if all(first % run == 0 for first in igemm.first_channels(spec)) else 1


def run_of_merged(spec: FusionSpec) -> int:
    """The same of a merged map that is stored."""
    run = RUNS[spec.dtype]
    channels, filters = group_extents(spec)
    are_whole = spec.C % run == 0 and spec.conv.K % run == 0
    are_alike = channels == filters == 1 or (channels % run == 0 and filters % run == 0)
    return run if are_whole and are_alike else 1


@functools.lru_cache(maxsize=512)
def run_of_arrays(
    spec: FusionSpec, sources: tuple[Strides, ...], filters: Strides, out: Strides, alignment: int
) -> int:
    """The same of arrays with these strides, whose addresses are multiples of `alignment` bytes."""
    run = run_of_extents(spec)
    steps = [igemm.filter_steps(filters, spec), *(igemm.map_steps(strides, spec) for strides in (*sources, out))]
    return run if alignment % (run * ITEM_BYTES[spec.dtype]) == 0 and igemm.in_runs((), steps, run) else 1


def plan(spec: FusionSpec, device: GpuDevice) -> IgemmConfig:
    """A thread for each strip, whatever the device; where arrays have no runs each takes more than one."""
    run = run_of_extents(spec) if spec.layout is Layout.NHWC else 1
    strips = spec.N * spec.P * -(-spec.Q // columns(is_sum(spec))) * (spec.conv.K // run)
    return with_blocks(spec, min(MOST_BLOCKS, -(-strips // THREADS)))


def with_blocks(spec: FusionSpec, blocks: int) -> IgemmConfig:
    return IgemmConfig(SOURCE, symbol(spec.dtype, is_sum(spec), "{run}", "{sources}"), blocks, THREADS, 0)


def run(spec: FusionSpec, config: IgemmConfig, operands: Operands, out: Any) -> None:
    """Writes a convolution to `out`."""
    spec, operands = igemm.in_one_launch(spec, operands)
    filters, sources = igemm.filters_of(operands), operands.sources
    alignment = math.gcd(*map(runtime().address, (*sources, filters, out)))
    strides = tuple([tuple(source.strides) for source in sources])
    length = run_of_arrays(spec, strides, tuple(filters.strides), tuple(out.strides), alignment)
    name = config.symbol.format(run=length, sources=capacity(len(sources)))
    launch(config.source, name, (config.blocks,), config.threads, igemm.parameters(spec, operands, out))


# What a multiprocessor of an H200 does in a cycle (CUDA C Programming Guide, throughput of arithmetic instructions, and
# the data sheet). The comparison made of it is arithmetic, not a measurement.
LANES = 32  # of a warp, whose load is one instruction
PRODUCTS = {"float16": 128, "bfloat16": 128, "float32": 128, "float64": 64}  # of float32 and float64, on CUDA cores
TENSOR_PRODUCTS = 2048  # of float16 and bfloat16, at most; half as many of TF32
CACHE_BYTES = 128  # that the first cache delivers


def own_cycles(spec: FusionSpec) -> float:
    """For LANES products: of the multiply-adds, with what widens narrow numbers, or of the loads, whichever is longer.

    A thread loads for a tap a run of channels of every column, and a run of filters for every channel that is shared.
    Of a stored map, whatever the sources: a fused call and an unfused one are run by the same kernel, in the same bits.
    """
    item, width = ITEM_BYTES[spec.dtype], columns(adds=False)
    run = run_of_merged(spec) if spec.layout is Layout.NHWC else 1
    shared = 1 if group_extents(spec)[0] == 1 else run
    loads = (width + shared) / (width * run * shared)
    widened = loads * run if item < igemm.computed_bytes(spec.dtype) else 0.0
    return max((1 + widened) * LANES / PRODUCTS[spec.dtype], loads * max(1, LANES * run * item / CACHE_BYTES))


def tile_cycles(spec: FusionSpec, device: GpuDevice) -> float:
    """For LANES products of the best implicit matrix product: of what its tile multiplies, filled or not."""

    def share(extent: int, tile: int) -> float:
        return extent / (-(-extent // tile) * tile)

    channels, filters = group_extents(spec)
    tile = igemm.TILES[igemm.computed_bytes(spec.dtype)][-1]
    cycles = LANES / (PRODUCTS[spec.dtype] * tile.share_of_products * share(filters, tile.bn))
    if mma.may_round(spec) and not mma.slow(spec, device):
        used = share(filters, mma.FILTERS[-1]) * share(channels, mma.STEP_BYTES // ITEM_BYTES[spec.dtype])
        cycles = min(cycles, LANES / (TENSOR_PRODUCTS * used))
    return cycles


def slow(spec: FusionSpec, device: GpuDevice) -> tuple[str, ...]:
    """Why an implicit matrix product would be faster."""
    channels, filters = group_extents(spec)
    if tile_cycles(spec, device) < own_cycles(spec):
        return (
            f"a group has {filters} filters of {channels} channels, which fill the tile of a matrix product enough",
        )
    return ()


def _kernel(merge: Merge, dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = igemm.common_reasons(spec, merge, Conv2d, dtype)
        if isinstance(spec.contraction, Conv2d) and spec.conv.groups == 1:
            reasons.append("the convolution has one group, needs more")
        return tuple(reasons)

    return Kernel(f"gpu.{merge}_conv_fprop_grouped_{SUFFIXES[dtype]}", unsupported, plan, run, slow)


KERNELS = tuple(_kernel(merge, dtype) for merge in Merge for dtype in TYPES)
