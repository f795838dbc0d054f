"""Contractions of float16 and bfloat16 on Hopper's tensor cores, compute capability 9.0; the sums are float32."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops.axes import Strides
from fusionops.device import GpuDevice
from fusionops.gpu import host, igemm, tensor_map
from fusionops.gpu.module import launch, runtime
from fusionops.gpu.params import SUFFIXES, TYPES, capacity
from fusionops.kernel import Filters, Kernel, Operands
from fusionops.spec import ITEM_BYTES, Conv2d, Dense, FusionSpec, Layout, Merge, SourceSpec

SOURCE = "sm90.cu"
DTYPES = ("float16", "bfloat16")
CAPABILITY = (9, 0)
OLDEST_COMPILER = (12, 9)  # of CUDA: older ones refuse sm_90a beside the architecture that CuPy states itself
PIXELS, CHANNELS, THREADS = 128, 64, 384  # of a block; of a step; as in the source
FILTERS = (256, 128, 64)
BUFFER_BYTES = 192 * 1024
FINISHED_BYTES = 8 * 16 * 33 * 4  # sums of 8 warps on their way out: 16 rows of 32 and a gap
RUN = 8  # elements of 16 bytes
# Of what a tile multiplies, a share that has to be asked for: below it the smaller steps and tiles of sm_80 waste less.
LEAST_SHARE = 0.5


def symbol(dtype: str, merge: Merge, filters: int) -> str:
    return f"conv_fprop_igemm_sm90<{TYPES[dtype]}, {str(merge is Merge.ADD).lower()}, {filters}, {{sources}}>"


SYMBOLS = igemm.instantiations(
    symbol(dtype, merge, filters) for dtype in DTYPES for merge in Merge for filters in FILTERS
)
"""Every instantiation that a plan can ask for."""


@functools.cache
def struct(most: int) -> np.dtype[Any]:
    maps = np.dtype(f"V{tensor_map.BYTES}")
    fields = [("filters", maps), ("source", maps, most),
              *((name, "u8") for name in ("boxes", "runs")), *((name, "i8") for name in ("tile_n", "tile_h", "tile_w")),
              ("p", igemm.igemm_struct(most))]  # fmt: skip
    gap = -np.dtype(fields).itemsize % tensor_map.ALIGNMENT
    return np.dtype([*fields, ("end", f"V{gap}")] if gap else fields)


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """One launch.

    tile, filters   a block's pixels as a box of images × rows × columns, and its filters
    blocks          that stay, each for one tile after the other
    packed_bytes    of the filters in the order that the kernel takes them
    """

    symbol: str
    tile: tuple[int, int, int]
    filters: int
    blocks: int
    packed_bytes: int

    @property
    def source(self) -> str:
        return SOURCE

    @property
    def threads(self) -> int:
        return THREADS

    @property
    def block_shared_bytes(self) -> int:
        return block_shared_bytes(self.filters)

    @property
    def scratch_bytes(self) -> int:
        return 0

    @property
    def shared_bytes(self) -> int:
        return self.packed_bytes

    def illegal_on(self, device: GpuDevice) -> tuple[str, ...]:
        reasons = igemm.beyond(device, self.block_shared_bytes, THREADS)
        return (*reasons, *_without_products(device))


def block_shared_bytes(filters: int) -> int:
    """The buffers of all stages, two barriers for each, and sums on their way out."""
    stage = (PIXELS + filters) * CHANNELS * 2
    return BUFFER_BYTES // stage * (stage + 16) + FINISHED_BYTES


def _without_products(device: GpuDevice) -> tuple[str, ...]:
    if device.capability == CAPABILITY:
        return ()
    return (f"{device.name} has compute capability {'.'.join(map(str, device.capability))}, needs 9.0",)


def plan(spec: FusionSpec, device: GpuDevice) -> HopperConfig:
    """Of the tiles the one whose blocks are done first; of equals the wider."""

    def duration(filters: int) -> float:
        return -(-tiles(spec, filters) // device.multiprocessors) * filters

    return with_tile(spec, min(FILTERS, key=duration), device)


def with_tile(spec: FusionSpec, filters: int, device: GpuDevice) -> HopperConfig:
    blocks = min(tiles(spec, filters), device.multiprocessors)
    return HopperConfig(symbol(spec.dtype, spec.merge, filters), pixel_box(spec), filters, blocks, _packed_bytes(spec))


@functools.lru_cache(maxsize=512)
def pixel_box(spec: FusionSpec) -> tuple[int, int, int]:
    """Images × rows × columns that make the fewest tiles; of equals the one that reaches over the smallest border."""
    powers = [2**i for i in range(int(math.log2(PIXELS)) + 1)]
    boxes = [(PIXELS // (rows * columns), rows, columns) for rows in powers for columns in powers
             if rows * columns <= PIXELS]  # fmt: skip
    return min(boxes, key=lambda box: (_count(spec, box), (box[1] + spec.conv.R) * (box[2] + spec.conv.S) * box[0]))


def _count(spec: FusionSpec, box: tuple[int, int, int]) -> int:
    return math.prod(-(-extent // part) for extent, part in zip((spec.N, spec.P, spec.Q), box, strict=True))


def tiles(spec: FusionSpec, filters: int) -> int:
    """Of pixels and so many filters."""
    return _count(spec, pixel_box(spec)) * -(-spec.conv.K // filters)


def _row(channels: int) -> int:
    """Elements of a row of packed filters."""
    return -(-channels // RUN) * RUN


def _packed_bytes(spec: FusionSpec) -> int:
    return spec.conv.R * spec.conv.S * spec.conv.K * _row(spec.C) * ITEM_BYTES[spec.dtype]


def pack(filters: Any) -> Any:
    """Filters (R, S, C, K), or (C, K), as [tap][filter][channel]; a row ends with zeros. Moves bits, of any format."""
    bits = filters.view("uint16")
    bits = bits if bits.ndim == 4 else bits[None, None]
    R, S, C, K = bits.shape
    packed = runtime().arrays.zeros((R * S, K, _row(C)), "uint16")
    packed.reshape(R, S, K, _row(C))[..., :C] = bits.transpose(0, 1, 3, 2)
    return packed


def pack_once(filters: Any) -> Any:
    """For calls on any stream, which do not wait for the one that packs: so the host does."""
    packed = pack(filters)
    runtime().wait()
    return packed


def run(spec: FusionSpec, config: HopperConfig, operands: Operands, out: Any) -> None:
    """Writes a contraction to `out`; with return_sum the merged map first, which then is the only source."""
    spec, operands = igemm.in_one_launch(spec, operands)
    kept, address = operands.filters, runtime().address
    packed = kept.packed(SOURCE, pack_once) if isinstance(kept, Filters) else pack(kept)
    most = capacity(len(operands.sources))
    params = np.zeros(1, struct(most))
    head = params[0]
    head["p"] = igemm.parameters(spec, operands, out)[0]
    taps, K, row = packed.shape
    item = ITEM_BYTES[spec.dtype]
    tensor = spec.dtype, address(packed), (row, K, taps), (row * item, K * row * item)
    head["filters"] = np.void(runtime().tensor_map(*tensor, (CHANNELS, config.filters, 1)))
    head["tile_n"], head["tile_h"], head["tile_w"] = config.tile
    runs = boxes = 0
    firsts = igemm.first_channels(spec)
    for j, (source, array, first) in enumerate(zip(spec.sources, operands.sources, firsts, strict=True)):
        place, strides = address(array), tuple(array.strides)
        is_box, in_runs = _forms(spec, source, strides, place % igemm.RUN_BYTES == 0)
        runs |= (in_runs and first % RUN == 0) << j
        boxes |= is_box << j
        if is_box:
            head["source"][j] = np.void(_map_of(spec, source, config, strides, place))
    head["runs"], head["boxes"] = runs, boxes
    symbol = config.symbol.format(sources=most)
    launch(SOURCE, symbol, (config.blocks,), THREADS, params, config.block_shared_bytes)


def _extents(spec: FusionSpec, source: SourceSpec) -> tuple[int, int, int, int]:
    """Of a source along channels, columns, rows and images; rows of a Dense lie along columns."""
    if isinstance(spec.contraction, Dense):
        return source.shape[1], source.shape[0], 1, 1
    n, h, w, c = source.shape
    return c, w, h, n


@functools.lru_cache(maxsize=512)
def _forms(spec: FusionSpec, source: SourceSpec, strides: Strides, aligned: bool) -> tuple[bool, bool]:
    """Whether a source can be copied in boxes, and whether it consists of whole runs."""
    *steps, along_channels = igemm.map_steps(strides, spec)
    channels, *extents = _extents(spec, source)
    in_runs = aligned and along_channels == 1 and channels % RUN == 0 and all(step % RUN == 0 for step in steps)
    each = zip(steps[::-1], extents, strict=True)
    is_box = (
        aligned and along_channels == 1 and all(step > 0 and step % RUN == 0 for step, extent in each if extent > 1)
    )
    alone = spec.merge is Merge.CONCAT or len(spec.sources) == 1
    return is_box and alone and source.is_plain and spec.conv.stride == (1, 1), in_runs


def _map_of(spec: FusionSpec, source: SourceSpec, config: HopperConfig, strides: Strides, place: int) -> bytes:
    extents, item = _extents(spec, source), ITEM_BYTES[spec.dtype]
    steps = igemm.map_steps(strides, spec)[2::-1]
    every = tuple(step * item if extent > 1 else igemm.RUN_BYTES
                  for step, extent in zip(steps, extents[1:], strict=True))  # fmt: skip
    return runtime().tensor_map(spec.dtype, place, extents, every, (CHANNELS, *config.tile[::-1]))


def _share(spec: FusionSpec) -> float:
    """How much of the channels and filters that a tile multiplies is asked for.

    Depends neither on the sources of a merged map nor on the batch: a fused call and an unfused one, a batch and its
    parts are run by the same kernel, in the same bits.
    """
    steps, whole = (part * -(-extent // part) for extent, part in ((spec.C, CHANNELS), (spec.conv.K, FILTERS[-1])))
    return spec.conv.K / whole * spec.C / steps


def slow(spec: FusionSpec, device: GpuDevice) -> tuple[str, ...]:
    """Why the tiles of sm_80 would be faster."""
    share = _share(spec)
    if share < LEAST_SHARE:
        return (f"of the channels and filters of its tiles {share:.2f} are asked for, {LEAST_SHARE} is worth them",)
    return ()


def lacking(device: GpuDevice) -> tuple[str, ...]:
    """Why a GPU of this machine has none of these kernels' instructions, or none that can be compiled."""
    version, oldest = host.compiler(), OLDEST_COMPILER
    if version < oldest:
        return (f"CUDA's compiler is {version[0]}.{version[1]}, needs {oldest[0]}.{oldest[1]} or newer",)
    return _without_products(device)


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense], dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = igemm.common_reasons(spec, merge, contraction, dtype)
        if spec.strict:
            reasons.append("strict=True fixes the order of a sum, and tensor cores do not state theirs")
        if spec.layout is not Layout.NHWC:
            reasons.append(f"layout is {spec.layout}, needs NHWC")
        if spec.contraction is not None and spec.conv.groups != 1:
            reasons.append(f"there are {spec.conv.groups} groups, needs one")
        return tuple(reasons)

    word = "conv" if contraction is Conv2d else "dense"
    return Kernel(
        f"gpu.{merge}_{word}_fprop_igemm_sm90_{SUFFIXES[dtype]}", unsupported, plan, run, slow, lacking=lacking
    )


KERNELS = tuple(
    _kernel(merge, contraction, dtype) for merge in Merge for contraction in (Conv2d, Dense) for dtype in DTYPES
)
