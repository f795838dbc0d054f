"""How a contraction is cut up for a CPU: register tile, output tile, depth of a chunk, filter blocks of a task.

Pure arithmetic. Nothing depends on the number of threads that run; tasks depend on the number of cores there are. The
order of every sum depends on the extents of one image and its filters alone: C and the taps fix the chunks, whatever
the batch, the tile or the split of sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypedDict

from fusionops.cpu.formats import FORMATS
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.device import CpuDevice
from fusionops.spec import FusionSpec, filter_reach

WORD_BYTES = 8
SCRATCH_LIMIT = 4 * 1024 * 1024  # bytes a thread may use beside operands: what the documentation promises
GROUP_WORDS = 5  # of a group of mr pixels that share their taps: r from, to; s from, to; pixels in use

# Pixels of an output tile. Fewer, and the filters stream from the last-level cache too often; more, and the tile of a
# 512-channel map no longer stays in L2 beside a filter block.
TILE_PIXELS = 256
# Below this many tiles the tiles get smaller, so that every core of a small machine has some to take.
ENOUGH_TILES = 8
SMALLEST_TILE_PIXELS = 64
WIDEST_TILE = 32
# Filters of one task, in output channels: bounds the sums a task keeps when the reduction is cut into chunks.
TASK_FILTERS = 256
# A small map has few output tiles; then filters are cut into more parts, which load the tile once each. With one task
# 4×4, 7×7 and 14×14 maps of 128 and 256 channels took 1.5 to 1.9 times as long (2 cores); 2, 4 and 8 differed by less
# than the noise.
ENOUGH_TASKS = 4
# From so many tasks of a core on little is waited for. With fewer, tiles that make up for it (8 tasks for 7, 16 for 13)
# took 0.90 to 1.01 of the time in fourteen 1×1 problems and 1.18 in one, where it was 0.82 in the run before; geometric
# mean 0.97 (11 interleaved rounds, AVX2, 2 cores).
MANY_ROUNDS = 16
# Share of L2 for the filter chunk that all pixels of a tile are multiplied with; the tile itself takes about as much.
FILTER_SHARE = 4
# Tiles one vector wide load nearly as often as they multiply. Alone, in L1, one of 24×1 vectors reaches the FMA peak of
# one AVX-512 core and 0.75 of another's; in six convolutions of U-Net and FPN it took 1.25 to 1.40 times as long as 6×4
# (AVX-512, interleaved rounds).
ONE_VECTOR_EFFICIENCY = 0.78
# The tiles are about as fast as one another: 6×4 vectors took 0.85 to 1.05 of the time of 14×2 in fourteen 1×1 and
# dense problems. In Winograd's products, whose chunks are short, 1.32 for 512 filters at 32×32, 0.92 to 1.06 in six
# others (interleaved rounds).
NARROW_VECTORS = 2
# A tile of fewer pixels reads its filters too often. On 16 registers of 32 bytes (AVX2 on the same machine) 2×2 vectors
# reach 0.87 of the FMA peak alone and 0.60 to 0.66 in three convolutions, 6×1 all of it and 0.70 to 0.87.
FEWEST_PIXELS = 4
# Of a tile one vector wide. Pointers to 24 evenly spaced rows take all general registers but one, and LLVM ends the
# process when it finds none for what surrounds them. 18, 21 and 24 rows alone reach 0.75 of the FMA peak (AVX-512).
MOST_PIXELS = 18


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """What every way to cut a contraction up states. Extents in elements, pixels or vectors.

    bits, mr, nv   element width and register tile: mr pixels × nv vectors
    depth, chunks  channels of one group that are summed at a time, and how many times that is
    blocks         filter blocks of nv vectors in a group; task_blocks of them to a task
    packed_elements    of the packed filters
    half           whether no more than half of the last block's filters are there, and only that half is multiplied
    """

    bits: int
    mr: int
    nv: int
    depth: int
    chunks: int
    blocks: int
    task_blocks: int
    packed_elements: int
    half: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def areas(self) -> tuple[int, ...]:
        """Bytes of each scratch area of a thread."""
        raise NotImplementedError

    @property
    def item_bytes(self) -> int:
        return self.bits // 8

    @property
    def kept(self) -> int:
        """The format of a loaded tile."""
        return self.bits

    @property
    def width(self) -> int:
        """Elements of a micropanel row; filters that no vectors hold are packed one by one."""
        return max(1, self.nv * VECTOR_BYTES // self.item_bytes)

    @property
    def scratch_bytes(self) -> int:
        return sum(self.areas)

    @property
    def shared_bytes(self) -> int:
        return self.packed_elements * self.item_bytes

    def registers(self, per_vector: int) -> int:
        """Of a processor that needs `per_vector` of them for VECTOR_BYTES."""
        vectors = self.nv * per_vector
        return self.mr * vectors + vectors + 1

    def illegal_on(self, device: CpuDevice) -> tuple[str, ...]:
        reasons = []
        registers = self.registers(VECTOR_BYTES // device.vector_bytes)
        if registers > device.vector_registers:
            reasons.append(
                f"the register tile needs {registers} vector registers, {device.name} has {device.vector_registers}"
            )
        if self.scratch_bytes > SCRATCH_LIMIT:
            reasons.append(f"needs {self.scratch_bytes} B of scratch a thread, the limit is {SCRATCH_LIMIT} B")
        return tuple(reasons)


def whole_lines(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes in bytes, each rounded up to vectors."""
    return tuple(-(-size // VECTOR_BYTES) * VECTOR_BYTES for size in sizes)


@dataclass(frozen=True, kw_only=True)
class ConvTiling(Tiling):
    """A contraction tap by tap; see `params` for the words these become.

    tile_p, tile_q   output tile
    rows, cols     of the merged map that an output tile loads
    groups_of_pixels   at most so many register tiles in an output tile
    """

    tile_p: int
    tile_q: int
    rows: int
    cols: int
    groups_of_pixels: int

    __hash__ = Tiling.__hash__

    @property
    def areas(self) -> tuple[int, ...]:
        """Of the tile, sums, pixels, output and residual offsets, groups, residual of a group."""
        pixels = self.groups_of_pixels * self.mr
        return whole_lines((
            self.rows * self.cols * self.depth * self.item_bytes,
            pixels * self.width * self.task_blocks * self.item_bytes,
            pixels * WORD_BYTES,
            pixels * WORD_BYTES,
            pixels * WORD_BYTES,
            self.groups_of_pixels * GROUP_WORDS * WORD_BYTES,
            self.mr * self.width * self.item_bytes,
        ))  # fmt: skip


def register_tiles(device: CpuDevice) -> tuple[tuple[int, int], ...]:
    """(mr, nv) that fill the registers without spilling: nv vectors of filters, one broadcast pixel, mr · nv sums."""
    per_vector = VECTOR_BYTES // device.vector_bytes
    tiles = []
    for nv in (4, 3, 2, 1):
        mr = (device.vector_registers - 1 - nv * per_vector) // (nv * per_vector)
        if mr >= FEWEST_PIXELS or nv == 1:
            tiles.append((max(1, min(mr, MOST_PIXELS)), nv))
    return tuple(tiles)


def choose_register_tile(filters: int, item_bytes: int, device: CpuDevice, *, narrow: bool = False) -> tuple[int, int]:
    """The tile that wastes the fewest columns on `filters` output channels.

    Of equals the widest, which reads the pixels of a long reduction from L2 least often, or the one of two vectors.
    """

    def cost(tile: tuple[int, int]) -> tuple[float, int]:
        _, nv = tile
        width = nv * VECTOR_BYTES // item_bytes
        columns = -(-filters // width) * nv / (ONE_VECTOR_EFFICIENCY if nv == 1 else 1.0)
        return columns, abs(nv - NARROW_VECTORS) if narrow else -nv

    return min(register_tiles(device), key=cost)


def ends_in_half(filters: int, item_bytes: int, nv: int, device: CpuDevice) -> bool:
    """Whether the last filter block fills half of its one vector at most, which registers of the processor hold.

    On AVX2 8 filters took 0.61 to 0.71 of the time that way, 24 took 0.75 to 0.93, 40 and 72 0.87 to 0.98 (convolutions
    of 1×1 to 7×7 taps, dense layers; 7 interleaved rounds). With one register a row, multiply-adds wait for each other.
    """
    lanes = VECTOR_BYTES // item_bytes
    return nv == 1 and 0 < filters % lanes <= lanes // 2 and device.vector_bytes < VECTOR_BYTES


def balanced(extent: int, limit: int) -> int:
    """The extent of equal parts no larger than `limit`."""
    return -(-extent // -(-extent // limit)) if extent else 1


def enough_parts(blocks: int, task_blocks: int, tiles: int) -> int:
    """Filter blocks of a task: task_blocks, or fewer where `tiles` output tiles alone would leave cores idle."""
    parts = max(-(-blocks // task_blocks), min(blocks, -(-ENOUGH_TASKS // max(1, tiles))))
    return -(-blocks // parts)


def rounds(tasks: int, device: CpuDevice) -> int:
    """How many tasks one core does until all are done.

    Of the cores there are, not of the threads that run: plans are the same for any number of them.
    """
    return -(-tasks // device.cores)


def shorter_tile(mr: int) -> int:
    """Rows of the other register tile: 4 beside 6, 8 beside 14.

    On AVX2 as fast a row, 0.96 of the FMA peak both in L1; on AVX-512 not measured. 49 pixels of a product took 0.93 to
    0.96 of the time with both, 32 rows 0.94 to 0.97 (AVX2, 9 interleaved rounds).
    """
    return (mr + 2) // 2


def lowest_tile(mr: int) -> int:
    """Rows of a third register tile, for products of few rows: 4 beside 14, 5 beside 18, none (0) beside lower ones.

    4 tiles of a Winograd convolution, one 7×7 image, took 0.58 to 0.67 of the time with it, 9 tiles 0.86 (9
    interleaved rounds, AVX-512).
    """
    short = shorter_tile(mr)
    return short // 2 if short >= 2 * FEWEST_PIXELS else 0


def tiles_of(rows: int, mr: int, short: int, low: int) -> tuple[int, int, int]:
    """How many register tiles of mr rows, shorter ones, and at most one lowest hold `rows` with the fewest to spare.

    Of equals the fewest tiles.
    """
    tall_tiles, short_tiles, low_tiles = (rows + mr - 1) // mr, 0, 0
    least = (tall_tiles * mr - rows) * (rows + 1) + tall_tiles
    for lows in range(2 if low > 0 else 1):
        for shorts in range(mr):
            talls = max(0, (rows - shorts * short - lows * low + mr - 1) // mr)
            spare = talls * mr + shorts * short + lows * low - rows
            cost = spare * (rows + 1) + talls + shorts + lows
            if spare >= 0 and cost < least:
                tall_tiles, short_tiles, low_tiles, least = talls, shorts, lows, cost
    return tall_tiles, short_tiles, low_tiles


def rows_of(rows: int, mr: int, low: int = 0) -> int:
    """Of the register tiles that hold `rows`."""
    short = shorter_tile(mr)
    tall_tiles, short_tiles, low_tiles = tiles_of(rows, mr, short, low)
    return tall_tiles * mr + short_tiles * short + low_tiles * low


def even_tile(pixels: int, most: int, mr: int, parts: int, device: CpuDevice) -> int:
    """Pixels of a tile with which cores are done first, of equals the most.

    pixels   one at least
    most     of a tile: `balanced`
    parts    tasks of a tile
    """
    fewest = -(-pixels // most)
    if fewest * parts >= MANY_ROUNDS * device.cores:
        return most

    def cost(tile: int) -> int:  # in rows of register tiles
        return rounds(-(-pixels // tile) * parts, device) * rows_of(tile, mr)

    return min((-(-pixels // count) for count in range(fewest, 2 * fewest)), key=cost)


def plan(spec: FusionSpec, device: CpuDevice, *, most_pixels: int | None = None) -> ConvTiling:
    """The tiling of a contraction tap by tap; most_pixels bounds those of a register tile."""
    conv = spec.conv
    item = FORMATS[spec.dtype].computed_bytes
    group_filters, group_channels = conv.K // conv.groups, spec.C // conv.groups
    mr, nv = choose_register_tile(group_filters, item, device)
    mr = min(mr, most_pixels or mr)
    width = nv * VECTOR_BYTES // item
    blocks = -(-group_filters // width)
    task_blocks = balanced(blocks, max(1, TASK_FILTERS // width))

    tasks_of_filters = conv.groups * -(-blocks // task_blocks)
    pixels = spec.N * spec.P * spec.Q
    wanted = min(TILE_PIXELS, max(SMALLEST_TILE_PIXELS, pixels * tasks_of_filters // ENOUGH_TILES))
    tile_q = balanced(spec.Q, min(WIDEST_TILE, max(spec.Q // 8, 16)))
    tile_p = balanced(spec.P, max(1, wanted // tile_q))

    depth = balanced(group_channels, max(16, device.l2_bytes // FILTER_SHARE // (conv.R * conv.S * width * item)))
    while True:
        tiling = _with_tile(spec, mr, nv, tile_p, tile_q, depth, blocks, task_blocks)
        if tiling.scratch_bytes <= SCRATCH_LIMIT * 3 // 4 or (tile_p, tile_q) == (1, 1):
            break
        # A tile this large comes from a far-reaching filter: fewer pixels first, so that the order of sums stays.
        tile_p, tile_q = (-(-tile_p // 2), tile_q) if tile_p >= tile_q else (tile_p, -(-tile_q // 2))
    while tiling.scratch_bytes > SCRATCH_LIMIT and depth > 1:
        depth = -(-depth // 2)
        tiling = _with_tile(spec, mr, nv, tile_p, tile_q, depth, blocks, task_blocks)
    # Last, since it depends on the batch, and the depth must not; fewer blocks take less scratch memory.
    tiles = spec.N * conv.groups * -(-spec.P // tile_p) * -(-spec.Q // tile_q)
    half = ends_in_half(group_filters, item, nv, device)
    return replace(tiling, task_blocks=enough_parts(blocks, task_blocks, tiles), half=half)


def _with_tile(
    spec: FusionSpec,
    mr: int,
    nv: int,
    tile_p: int,
    tile_q: int,
    depth: int,
    blocks: int,
    task_blocks: int,
) -> ConvTiling:
    conv, item = spec.conv, FORMATS[spec.dtype].computed_bytes
    group_channels, width = spec.C // conv.groups, nv * VECTOR_BYTES // item
    return ConvTiling(
        bits=8 * item, mr=mr, nv=nv, depth=depth, chunks=-(-group_channels // depth), blocks=blocks,
        task_blocks=task_blocks, packed_elements=conv.groups * blocks * width * group_channels * conv.R * conv.S,
        **tile_extents(spec, mr, tile_p, tile_q),
    )  # fmt: skip


class TileExtents(TypedDict):
    tile_p: int
    tile_q: int
    rows: int
    cols: int
    groups_of_pixels: int


def tile_extents(spec: FusionSpec, mr: int, tile_p: int, tile_q: int) -> TileExtents:
    """What a ConvTiling says of an output tile: its extents, those of the map under it, how many register tiles."""
    conv = spec.conv
    rows, cols = (
        min(extent, (tile - 1) * stride + filter_reach(taps, dilation))  # what lies beyond the map is not loaded
        for extent, tile, stride, taps, dilation in zip(
            (spec.H, spec.W), (tile_p, tile_q), conv.stride, (conv.R, conv.S), conv.dilation, strict=True
        )
    )
    # Pixels that share their valid taps form runs of rows and of columns: one with all taps, one for each number of
    # taps missing at either end, up to all. Each pair of runs ends in one register tile that may not be full.
    runs = min(tile_p, 2 * conv.R + 1) * min(tile_q, 2 * conv.S + 1)
    groups = tile_p * tile_q // mr + runs
    return {"tile_p": tile_p, "tile_q": tile_q, "rows": rows, "cols": cols, "groups_of_pixels": groups}
