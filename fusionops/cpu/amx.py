"""bfloat16 convolutions and dense layers on the tiles of Intel's AMX: 16 multiply-adds where vectors have one.

What such a kernel can run, when it is worth it, and how the work is cut up; `amx_task` holds the code of a task.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from fusionops.cpu import launch
from fusionops.cpu import params as at
from fusionops.cpu.amx_task import CHANNELS, FILTERS, ITEM, PIXELS, SUM, amx_task, pack_task
from fusionops.cpu.block import Strides, Words, is_flat, is_pointwise
from fusionops.cpu.direct import common_reasons
from fusionops.cpu.formats import BF16
from fusionops.cpu.gemm import same_area
from fusionops.cpu.target import target
from fusionops.cpu.tiling import SCRATCH_LIMIT, WORD_BYTES, Tiling, balanced, whole_lines
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, Dense, FusionSpec, Merge, filter_reach

AREAS = (at.AT_SUMS, at.AT_OUT, at.AT_RESIDUAL, at.AT_COPY)

# Pixels of an output tile, and its widths to choose from beside that of the whole map: multiples of the 32 pixels that
# are multiplied at a time.
TILE_PIXELS = 256
WIDTHS = (32, 64)
# Channels summed at a time: all of most layers. Then pixels are 1 KiB apart, which four ways of a cache still hold.
DEPTH = 512
TASK_FILTERS = 256
# Geometric means over nine problems, 11 interleaved rounds: 128, 512 and 1024 pixels took 0.97, 0.94 and 0.95 of the
# time, depths of 256 and 1024 0.97 and 0.95, 128 and 512 filters both 0.98. Single problems repeat within 0.2.


@dataclass(frozen=True, kw_only=True)
class AmxTiling(Tiling):
    """A contraction by tiles of 16 pixels × 16 filters × 32 channels.

    tile_p, tile_q   output tile
    is_flat    whether the pixels of all images are one row
    region     pixels of the merged tile, with as many behind it as a last tile of pixels may read
    line_sums  pixels that an output tile has sums for
    """

    tile_p: int
    tile_q: int
    is_flat: bool
    region: int
    line_sums: int

    __hash__ = Tiling.__hash__

    @property
    def kept(self) -> int:
        return BF16

    def registers(self, per_vector: int) -> int:
        """Sums and factors are in tiles."""
        return 0

    @property
    def areas(self) -> tuple[int, ...]:
        """Of the merged tile, sums, output and residual offsets, residual of a row."""
        pixels = self.tile_p * self.tile_q
        kept = self.task_blocks if self.chunks > 1 else 1
        return whole_lines((
            self.region * self.depth * ITEM,
            self.line_sums * FILTERS * SUM * kept,
            pixels * WORD_BYTES,
            pixels * WORD_BYTES,
            pixels * FILTERS * SUM,
        ))  # fmt: skip


def _lines(rows: int, cols: int, pitch: int, stride: tuple[int, int]) -> tuple[bool, int]:
    """Whether all rows make one line, and how many sums that takes, or rows that are lines of their own."""
    apart = rows * _whole(cols)
    joined = _whole((rows - 1) * pitch + cols)
    return (True, joined) if stride == (1, 1) and joined <= apart else (False, apart)


def _whole(pixels: int) -> int:
    return -(-pixels // PIXELS) * PIXELS


def _padded(channels: int) -> int:
    return -(-channels // CHANNELS) * CHANNELS


def plan(spec: FusionSpec, device: CpuDevice) -> AmxTiling:
    return _best(spec)[1]


def _best(spec: FusionSpec) -> tuple[int, AmxTiling]:
    """The tiling that forms the fewest sums for nothing, and how many sums it forms."""
    return min(_tilings(spec), key=lambda candidate: candidate[0])


def _tilings(spec: FusionSpec) -> Iterator[tuple[int, AmxTiling]]:
    """Ways to cut the output up, each with the sums it takes."""
    P, Q = (1, spec.N * spec.P * spec.Q) if is_flat(spec) else (spec.P, spec.Q)
    for width in {max(1, min(Q, width)) for width in (Q if max(WIDTHS) >= Q else TILE_PIXELS, *WIDTHS)}:
        pixels, tile_q = TILE_PIXELS, width
        while True:
            tile_p = balanced(P, max(1, pixels // tile_q))
            tiling = _tiling(spec, tile_p, tile_q)
            if tiling.scratch_bytes <= SCRATCH_LIMIT or (tile_p, tile_q) == (1, 1):
                break
            pixels, tile_q = pixels // 2, tile_q if tile_p > 1 else -(-tile_q // 2)
        yield tiling.line_sums * -(-P // tile_p) * -(-Q // tile_q), tiling


def _tiling(spec: FusionSpec, tile_p: int, tile_q: int) -> AmxTiling:
    conv = spec.conv
    stride = (1, 1) if is_flat(spec) else conv.stride
    rows, pitch = (
        (tile - 1) * step + filter_reach(taps, dilation)
        for tile, step, taps, dilation in zip((tile_p, tile_q), stride, (conv.R, conv.S), conv.dilation, strict=True)
    )
    blocks = -(-conv.K // FILTERS)
    depth = CHANNELS * balanced(-(-spec.C // CHANNELS), DEPTH // CHANNELS)
    return AmxTiling(
        bits=32, mr=PIXELS, nv=FILTERS * SUM // 64, depth=depth, chunks=-(-spec.C // depth), blocks=blocks,
        task_blocks=balanced(blocks, TASK_FILTERS // FILTERS),
        packed_elements=blocks * FILTERS * _padded(spec.C) * conv.R * conv.S * ITEM // SUM,
        tile_p=tile_p, tile_q=tile_q, is_flat=is_flat(spec),
        region=rows * pitch + PIXELS * stride[1], line_sums=_lines(tile_p, tile_q, pitch, stride)[1],
    )  # fmt: skip


def cut(spec: FusionSpec, tiling: AmxTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of output tiles and filter blocks; the number of tasks; filters are always packed."""
    N, P, Q = (int(words[i]) for i in (at.N, at.P, at.Q))
    stride = int(words[at.STRIDE_H]), int(words[at.STRIDE_W])
    tile_p, tile_q = min(tiling.tile_p, P), min(tiling.tile_q, Q)
    if is_pointwise(spec.conv) and stride == (1, 1):
        tile_p, tile_q = same_area(tiling.tile_p * tiling.tile_q, P, Q)
    tiles_p, tiles_q = -(-P // tile_p), -(-Q // tile_q)
    pitch = (tile_q - 1) * stride[1] + filter_reach(spec.conv.S, spec.conv.dilation[1])
    words[at.TILE_P : at.TILES_Q + 1] = tile_p, tile_q, tiles_p, tiles_q
    words[[at.IS_FLAT, at.BLOCK_SUMS]] = _lines(tile_p, tile_q, pitch, stride)
    words[[at.PITCH, at.ROW_SUMS]] = pitch, _whole(tile_q)
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    return N * tiles_p * tiles_q * -(-tiling.blocks // tiling.task_blocks), False


TILES = launch.Algorithm("amx", cut, lambda tiling: amx_task(), lambda bits, stored: pack_task())


@functools.cache
def without_tiles() -> str | None:
    """Why this process cannot use tiles; asks the operating system for them."""
    if not target().tiles:
        return "this processor has no tiles of bfloat16 (AMX)"
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # of Linux on x86-64
    if sys.platform != "linux" or ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) != 0:
        return "the operating system does not grant tiles of bfloat16 (AMX)"
    return None


def products(spec: FusionSpec) -> int:
    """Multiply-adds of whole tiles, those between rows and beyond the last channel and filter included."""
    sums, tiling = _best(spec)
    images = 1 if tiling.is_flat else spec.N
    return images * sums * tiling.blocks * FILTERS * _padded(spec.C) * spec.conv.R * spec.conv.S


def _smallest_bytes(spec: FusionSpec) -> int:
    """Bytes of scratch memory with an output tile of one pixel."""
    return _tiling(spec, 1, 1).scratch_bytes


def slow(spec: FusionSpec, device: CpuDevice) -> tuple[str, ...]:
    """Why vectors would be faster."""
    tiling = _best(spec)[1]
    pixels = tiling.tile_p * tiling.tile_q
    if pixels < min(PIXELS, spec.N * spec.P * spec.Q):
        return (f"its taps reach so far that an output tile has {pixels} pixels, {PIXELS} are multiplied at a time",)
    return ()


def _kernel(merge: Merge, contraction: type[Conv2d] | type[Dense]) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = common_reasons(spec, merge, "bfloat16")
        if without := without_tiles():
            reasons.append(without)
        if not isinstance(spec.contraction, contraction):
            reasons.append(f"the contraction is not a {contraction.__name__.lower()}")
        elif spec.conv.groups != 1:
            reasons.append(f"there are {spec.conv.groups} groups, needs one")
        elif _smallest_bytes(spec) > SCRATCH_LIMIT:
            reasons.append(f"the taps of one pixel reach over more of the map than {SCRATCH_LIMIT} B hold")
        if spec.strict:
            reasons.append("strict=True forbids a sum that takes subnormal numbers for 0")
        return tuple(reasons)

    word = "conv" if contraction is Conv2d else "dense"
    algorithm = "direct" if contraction is Conv2d else "gemm"
    name = f"cpu.{merge}_{word}_fprop_{algorithm}_amx_bf16"
    return Kernel(name, unsupported, plan, partial(launch.run, TILES), slow, products, partial(launch.replay, TILES))


KERNELS = tuple(_kernel(merge, contraction) for merge in Merge for contraction in (Conv2d, Dense))
