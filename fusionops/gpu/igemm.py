"""Contractions as an implicit matrix product on CUDA cores: any stride, dilation, padding, groups, layout. Total."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusionops.axes import Strides
from fusionops.device import GpuDevice
from fusionops.gpu import stream
from fusionops.gpu.module import launch, runtime
from fusionops.gpu.params import (
    CAPACITIES,
    SUFFIXES,
    TYPES,
    WEIGHT,
    Struct,
    activation_code,
    capacity,
    set_weight,
    slope,
)
from fusionops.kernel import Filters, Kernel, Operands
from fusionops.refusals import contraction_reasons
from fusionops.spec import ITEM_BYTES, Conv2d, Dense, FusionSpec, Layout, Merge, SourceSpec

SOURCE = "igemm.cu"

MAP = np.dtype([("base", "u8"), ("steps", "i8", 4), ("up_h", "i8"), ("up_w", "i8"), ("first", "i8"),
                ("weight", WEIGHT)])  # fmt: skip
EXTENTS = ("N", "H", "W", "C", "K", "R", "S", "P", "Q", "stride_h", "stride_w", "pad_top", "pad_left", "dilation_h",
           "dilation_w", "groups", "sources", "activation", "vectors_a", "vectors_b")  # fmt: skip
TERM_BYTES, PIXEL_BYTES = 24, 20  # of the source's tables
READ = 4  # numbers that one instruction reads from shared memory
RUN_BYTES = 16  # of the runs that tensor core kernels copy


def igemm_struct(most: int) -> np.dtype[Any]:
    return np.dtype([
        *((name, "i8") for name in EXTENTS), ("slope", "f8"), ("filters", "u8"), ("filter_steps", "i8", 4),
        ("bias", "u8"), ("out", "u8"), ("out_steps", "i8", 4), ("residual", MAP), ("source", MAP, most),
    ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tile:
    """bm pixels × bn filters of a block, tm × tn of a thread; the block advances bl terms of the sum at a time."""

    bm: int
    bn: int
    bl: int
    tm: int
    tn: int

    @property
    def threads(self) -> int:
        return (self.bm // self.tm) * (self.bn // self.tn)

    def shared_bytes(self, item: int) -> int:
        """Pixels, two buffers of both factors and three of terms, in the place of which half a tile of sums follows."""
        factors = 2 * self.bl * (self.bm + self.bn + 8) * item
        sums = self.bm // 2 * (self.bn + 1) * item
        return self.bm * PIXEL_BYTES + max(factors + 3 * self.bl * TERM_BYTES, sums)

    @property
    def share_of_products(self) -> float:
        """Of the instructions of the innermost loop: the others read the factors."""
        products = self.tm * self.tn
        return products / (products + (self.tm + self.tn) / READ)


# 128 × 128 takes all 65536 registers of a multiprocessor with two blocks; float64 has half as many.
TILES = {4: (Tile(128, 128, 8, 8, 8), Tile(64, 64, 8, 4, 4)), 8: (Tile(64, 64, 8, 4, 4),)}


def computed_bytes(dtype: str) -> int:
    return max(4, ITEM_BYTES[dtype])


def symbol(dtype: str, merge: Merge, tile: Tile) -> str:
    extents = f"{tile.bm}, {tile.bn}, {tile.bl}, {tile.tm}, {tile.tn}"
    return f"conv_fprop_igemm<{TYPES[dtype]}, {str(merge is Merge.ADD).lower()}, {extents}, {{sources}}>"


def instantiations(symbols: Iterable[str]) -> tuple[str, ...]:
    return tuple(symbol.format(sources=most) for symbol in symbols for most in CAPACITIES)


SYMBOLS = instantiations(
    symbol(dtype, merge, tile) for dtype in TYPES for merge in Merge for tile in TILES[computed_bytes(dtype)]
)
"""Every instantiation that a plan can ask for."""


@dataclass(frozen=True, slots=True)
class IgemmConfig:
    """One launch.

    source, symbol   the kernel, but for the number of sources that it has room for
    blocks, threads  of the launch, and of a block
    block_shared_bytes   shared memory of a block
    """

    source: str
    symbol: str
    blocks: int
    threads: int
    block_shared_bytes: int

    @property
    def scratch_bytes(self) -> int:
        return 0

    @property
    def shared_bytes(self) -> int:
        return 0

    def illegal_on(self, device: GpuDevice) -> tuple[str, ...]:
        return tuple(beyond(device, self.block_shared_bytes, self.threads))


def beyond(device: GpuDevice, shared_bytes: int, threads: int) -> list[str]:
    """What a block needs and a device has not."""
    reasons = []
    if shared_bytes > device.block_shared_bytes:
        reasons.append(
            f"a block needs {shared_bytes} B of shared memory, {device.name} has {device.block_shared_bytes}"
        )
    if threads > device.threads:
        reasons.append(f"a block has {threads} threads, {device.name} runs {device.threads}")
    return reasons


def plan(spec: FusionSpec, device: GpuDevice) -> IgemmConfig:
    """Of the tiles the one whose blocks, dealt out to all multiprocessors, are done first."""
    item = computed_bytes(spec.dtype)

    def duration(tile: Tile) -> float:
        rounds = -(-_blocks(spec, tile) // device.multiprocessors)
        return rounds * tile.bm * tile.bn / tile.share_of_products

    return with_tile(spec, min(TILES[item], key=duration))


def with_tile(spec: FusionSpec, tile: Tile) -> IgemmConfig:
    shared_bytes = tile.shared_bytes(computed_bytes(spec.dtype))
    return IgemmConfig(SOURCE, symbol(spec.dtype, spec.merge, tile), _blocks(spec, tile), tile.threads, shared_bytes)


def _blocks(spec: FusionSpec, tile: Tile) -> int:
    pixels, filters, _ = spec.gemm
    return -(-pixels // tile.bm) * -(-filters // tile.bn) * spec.conv.groups


def map_steps(strides: Strides, spec: FusionSpec) -> tuple[int, ...]:
    """Along N, H, W and channels, in elements; rows of a Dense lie along W."""
    item = ITEM_BYTES[spec.dtype]
    steps = tuple(step // item for step in strides)
    if isinstance(spec.contraction, Dense):
        return 0, 0, *steps
    return steps if spec.layout is Layout.NHWC else (steps[0], steps[2], steps[3], steps[1])


def filter_steps(strides: Strides, spec: FusionSpec) -> tuple[int, ...]:
    """Along r, s, c, k."""
    item = ITEM_BYTES[spec.dtype]
    steps = tuple(step // item for step in strides)
    if isinstance(spec.contraction, Dense):
        return 0, 0, *steps
    return steps if spec.layout is Layout.NHWC else (steps[2], steps[3], steps[1], steps[0])


@functools.lru_cache(maxsize=512)
def prepare(
    spec: FusionSpec,
    sources: tuple[Strides, ...],
    filters: Strides,
    out: Strides,
    residual: Strides | None,
    aligned: tuple[bool, bool],
) -> Struct:
    """The parameters but for addresses and weights; aligned: whether those of sources, of filters are, to runs."""
    struct = np.zeros(1, igemm_struct(capacity(len(sources))))
    head, conv = struct[0], spec.conv
    (top, _), (left, _) = conv.padding
    channels, group_filters = spec.C // conv.groups, conv.K // conv.groups
    source_steps = [map_steps(steps, spec) for steps in sources]
    steps_of_filters = filter_steps(filters, spec)
    firsts = first_channels(spec)
    run = RUN_BYTES // ITEM_BYTES[spec.dtype]
    vectors_a = aligned[0] and in_runs((channels, *firsts), source_steps, run)
    if spec.merge is Merge.CONCAT and any(source.weight for source in spec.sources):
        vectors_a = False
    vectors_b = aligned[1] and in_runs((group_filters,), [steps_of_filters], run)
    values = (spec.N, spec.H, spec.W, channels, group_filters, conv.R, conv.S, spec.P, spec.Q, *conv.stride, top, left,
              *conv.dilation, conv.groups, len(sources), activation_code(spec.activation),
              vectors_a, vectors_b)  # fmt: skip
    for name, value in zip(EXTENTS, values, strict=True):
        head[name] = value
    head["slope"] = slope(spec.activation)
    head["filter_steps"], head["out_steps"] = steps_of_filters, map_steps(out, spec)
    for field, source, steps, first in zip(head["source"], spec.sources, source_steps, firsts, strict=False):
        field["steps"], field["first"] = steps, first
        field["up_h"], field["up_w"] = source.upsample
    if spec.residual is not None and residual is not None:
        head["residual"]["steps"] = map_steps(residual, spec)
        head["residual"]["up_h"], head["residual"]["up_w"] = spec.residual.upsample
    return struct


def first_channels(spec: FusionSpec) -> list[int]:
    """Of every source in the merged map."""
    return [0] * len(spec.sources) if spec.merge is Merge.ADD else [0, *itertools.accumulate(spec.channels[:-1])]


def in_runs(extents: tuple[int, ...], steps: list[tuple[int, ...]], run: int) -> bool:
    """Whether arrays of these steps, the last along what lies side by side, consist of whole runs."""
    return all(extent % run == 0 for extent in extents) and all(
        last == 1 and all(step % run == 0 for step in others) for *others, last in steps
    )


def run(spec: FusionSpec, config: IgemmConfig, operands: Operands, out: Any) -> None:
    """Writes a contraction to `out`."""
    spec, operands = in_one_launch(spec, operands)
    name = config.symbol.format(sources=capacity(len(operands.sources)))
    struct = parameters(spec, operands, out)
    launch(config.source, name, (config.blocks,), config.threads, struct, config.block_shared_bytes)


def in_one_launch(spec: FusionSpec, operands: Operands) -> tuple[FusionSpec, Operands]:
    """What is left to contract. With return_sum, or more sources than a launch takes, writes the merged map first."""
    if spec.return_sum or len(operands.sources) > CAPACITIES[-1]:
        return with_stored_map(spec, operands)
    return spec, operands


def parameters(spec: FusionSpec, operands: Operands, out: Any) -> Struct:
    """All of a launch."""
    address = runtime().address
    filters = filters_of(operands)
    residual = operands.residual
    places, filters_place = [address(source) for source in operands.sources], address(filters)
    struct = prepare(
        spec,
        tuple([tuple(source.strides) for source in operands.sources]),
        tuple(filters.strides),
        tuple(out.strides),
        None if residual is None else tuple(residual.strides),
        (all(place % RUN_BYTES == 0 for place in places), filters_place % RUN_BYTES == 0),
    ).copy()
    head = struct[0]
    head["filters"], head["out"] = filters_place, address(out)
    if operands.bias is not None:
        head["bias"] = address(operands.bias)
    if spec.residual is not None:
        head["residual"]["base"] = address(residual)
        set_weight(head["residual"]["weight"], spec.residual.weight, operands.residual_weight)
    weights = operands.weights or (None,) * len(operands.sources)
    for field, place, source, weight in zip(head["source"], places, spec.sources, weights, strict=False):
        field["base"] = place
        set_weight(field["weight"], source.weight, weight)
    return struct


def filters_of(operands: Operands) -> Any:
    """The array of filters, kept ones included."""
    return operands.filters.array if isinstance(operands.filters, Filters) else operands.filters


def with_stored_map(spec: FusionSpec, operands: Operands) -> tuple[FusionSpec, Operands]:
    """Writes the merged map, and states the rest of the problem with that map as its one source."""
    merged = operands.merged
    if merged is None:
        merged = runtime().arrays.empty(spec.merged_shape, operands.sources[0].dtype)
    alone = replace(spec, contraction=None, axis=spec.channel_axis, bias=False, residual=None, activation=None,
                    return_sum=False)  # fmt: skip
    write = stream.run_add if spec.merge is Merge.ADD else stream.run_concat
    write(alone, stream.plan_of(alone), Operands(operands.sources, operands.weights), merged)
    rest = replace(spec, sources=(SourceSpec(spec.merged_shape, spec.dtype),), return_sum=False)
    return rest, replace(operands, sources=(merged,), weights=(), merged=None)


def common_reasons(spec: FusionSpec, merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> list[str]:
    """Why no implicit matrix product of this kind can run `spec`."""
    reasons = contraction_reasons(spec, merge, dtype)
    if not isinstance(spec.contraction, contraction):
        reasons.append(f"the contraction is not a {contraction.__name__.lower()}")
    return reasons


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        return tuple(common_reasons(spec, merge, contraction, dtype))

    word = "conv" if contraction is Conv2d else "dense"
    return Kernel(f"gpu.{merge}_{word}_fprop_igemm_{SUFFIXES[dtype]}", unsupported, plan, run)


KERNELS = tuple(
    _kernel(merge, contraction, dtype) for merge in Merge for contraction in (Conv2d, Dense) for dtype in TYPES
)
