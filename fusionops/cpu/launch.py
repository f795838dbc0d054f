"""From operands to a launch of convolution tasks: fills the params block, lends scratch memory, starts the tasks.

Shared by the kernels whose work is a contraction; they differ in how they see the pixels and choose a tiling.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops.cpu import activation, conv, threads
from fusionops.cpu import params as at
from fusionops.cpu.memory import ALIGNMENT, WORKSPACE, Area, address, allocate
from fusionops.cpu.tiling import ConvTiling
from fusionops.kernel import Filters, Operands
from fusionops.spec import Conv2d, Dense, FusionSpec, Layout, Merge, SourceSpec, filter_reach

AREAS = (at.AT_SUMS, at.AT_PIXELS, at.AT_OUT, at.AT_RESIDUAL, at.AT_GROUPS, at.AT_COPY)
WEIGHT_KINDS = {None: at.WEIGHT_NONE, "scalar": at.WEIGHT_SCALAR, "vector": at.WEIGHT_VECTOR}

Strides = tuple[int, ...]  # in bytes, as arrays have them
Steps = tuple[int, int, int, int]  # along N, H, W, C in elements

# Rows of filters that are read where the caller has them are no longer than this: one of 2 KiB or more would bring all
# rows of a block to a few sets of the L1 cache. Not packing saves a small call a launch.
IN_PLACE_BYTES = 512
PACKING_FLOPS = 32.0  # what computes as long as one element is packed: 4 bytes at 16 GB/s against 120 GFLOP/s


def map_strides(strides: Strides, item: int, spec: FusionSpec) -> Steps:
    """Steps along N, H, W, C in elements; a Dense has its rows along W."""
    steps = [step // item for step in strides]
    if isinstance(spec.contraction, Dense):
        return 0, 0, steps[0], steps[1]
    n, h, w, c = steps if spec.layout is Layout.NHWC else (steps[0], steps[2], steps[3], steps[1])
    return n, h, w, c


@dataclass(frozen=True)
class Block:
    """The words of a call that do not change from one call to the next, for one spec, tiling and set of strides."""

    words: np.ndarray[Any, Any]
    tasks: int
    flops_per_task: float


def _source_words(spec: FusionSpec, source: SourceSpec, steps: Steps, first: int) -> list[int]:
    """The words of one source, whose channels start at `first` in a concatenation."""
    channels = source.shape[spec.channel_axis]
    return [0, *steps, *source.upsample, channels, first, WEIGHT_KINDS[source.weight], 0, 0]


def block(
    spec: FusionSpec,
    tiling: ConvTiling,
    strides: tuple[Strides, ...],
    out: Strides,
    residual: Strides | None,
    *,
    in_place: bool,
) -> Block:
    """The fixed words; `in_place`: filters are read where the caller has them. Pure."""
    conv2d, item = spec.conv, tiling.item_bytes
    N, H, W, P, Q = spec.N, spec.H, spec.W, spec.P, spec.Q
    sources = [map_strides(steps, item, spec) for steps in strides]
    to = map_strides(out, item, spec)
    residual_steps = map_strides(residual, item, spec) if residual is not None else (0, 0, 0, 0)
    residual_up = spec.residual.upsample if spec.residual else (1, 1)
    tile_p, tile_q = tiling.tile_p, tiling.tile_q
    stride, padding = conv2d.stride, conv2d.padding
    if is_pointwise(conv2d):
        sources, stride, (H, W) = _without_stride(sources, spec, stride, (H, W))
        if stride == (1, 1) and residual_up == (1, 1) and all(s.upsample == (1, 1) for s in spec.sources):
            (N, P, Q), sources, to, residual_steps = _flattened((N, P, Q), sources, to, residual_steps)
            H, W = P, Q
        tile_p, tile_q = _same_area(tile_p * tile_q, P, Q) if stride == (1, 1) else (min(tile_p, P), min(tile_q, Q))
    words = np.zeros(at.SOURCES + at.SOURCE_WORDS * len(sources), np.int64)
    tiles_p, tiles_q = -(-P // tile_p), -(-Q // tile_q)
    rows = (tile_p - 1) * stride[0] + filter_reach(conv2d.R, conv2d.dilation[0])
    cols = (tile_q - 1) * stride[1] + filter_reach(conv2d.S, conv2d.dilation[1])
    words[: at.SOURCE_COUNT + 1] = [
        N, H, W, spec.C, conv2d.K, conv2d.R, conv2d.S, P, Q, *stride, padding[0][0], padding[1][0], *conv2d.dilation,
        conv2d.groups, spec.merge is Merge.ADD, len(sources),
    ]  # fmt: skip
    words[at.TILE_P : at.COLS + 1] = [
        tile_p, tile_q, tiles_p, tiles_q, tiling.depth, tiling.blocks, tiling.task_blocks, rows, cols,
    ]  # fmt: skip
    words[at.SCRATCH_BYTES] = -(-tiling.scratch_bytes // ALIGNMENT) * ALIGNMENT
    words[list(AREAS)] = np.cumsum(tiling.areas)[:-1]
    words[at.OUT_N : at.OUT_K + 1] = to
    words[at.RESIDUAL_N : at.RESIDUAL_K + 1] = residual_steps
    words[at.RESIDUAL_UP_H : at.RESIDUAL_UP_W + 1] = residual_up
    words[at.RESIDUAL_WEIGHT] = WEIGHT_KINDS[spec.residual.weight] if spec.residual else at.WEIGHT_NONE
    words[at.WIDTH], words[at.PITCH] = tiling.width, min(cols, W)
    rows_of_filters = conv2d.R * conv2d.S * spec.C // conv2d.groups
    words[at.FILTER_ROW] = conv2d.K if in_place else tiling.width
    words[at.FILTER_BLOCK] = tiling.width if in_place else rows_of_filters * tiling.width
    words[at.ACTIVATION] = activation.code(spec.activation)
    if spec.activation and spec.activation.parameters:
        words.view(np.float64)[at.SLOPE] = spec.activation.parameters[0]
    first = 0
    for j, (source, steps) in enumerate(zip(spec.sources, sources, strict=True)):
        start = at.SOURCES + at.SOURCE_WORDS * j
        words[start : start + at.SOURCE_WORDS] = _source_words(spec, source, steps, first)
        first += source.shape[spec.channel_axis]
    tasks = N * tiles_p * tiles_q * conv2d.groups * -(-tiling.blocks // tiling.task_blocks)
    return Block(words, tasks, 2.0 * math.prod(spec.gemm) * conv2d.groups / max(1, tasks))


def is_pointwise(conv2d: Conv2d) -> bool:
    """A 1×1 filter without padding: pixels have no neighbours."""
    return (conv2d.R, conv2d.S) == (1, 1) and conv2d.padding == ((0, 0), (0, 0))


def _without_stride(
    sources: list[Steps], spec: FusionSpec, stride: tuple[int, int], extent: tuple[int, int]
) -> tuple[list[Steps], tuple[int, int], tuple[int, int]]:
    """A strided 1×1 filter reads a coarser map: every stride-th pixel, which is a matter of steps alone."""
    if stride == (1, 1) or any(source.upsample != (1, 1) for source in spec.sources):
        return sources, stride, extent
    return [(n, h * stride[0], w * stride[1], c) for n, h, w, c in sources], (1, 1), (spec.P, spec.Q)


def _flattened(
    extents: tuple[int, int, int], sources: list[Steps], out: Steps, residual: Steps
) -> tuple[tuple[int, int, int], list[Steps], Steps, Steps]:
    """Pixels without neighbours as one row, as far as every operand's steps allow."""
    N, P, Q = extents
    operands = [*sources, out, residual]
    if all(h == w * Q or P == 1 for _, h, w, _ in operands):
        if all(n == w * Q * P or N == 1 for n, _, w, _ in operands):
            return (1, 1, N * P * Q), sources, out, residual
        return (N, 1, P * Q), sources, out, residual
    return extents, sources, out, residual


def _same_area(pixels: int, P: int, Q: int) -> tuple[int, int]:
    """A tile of as many pixels as was planned for, in a map that could not be flattened."""
    tile_q = min(Q, pixels)
    return max(1, min(P, pixels // max(1, tile_q))), max(1, tile_q)


def filter_words(spec: FusionSpec, tiling: ConvTiling, strides: Strides) -> list[int]:
    """The words of the packing task but for its two addresses."""
    conv2d, item = spec.conv, tiling.item_bytes
    steps = [step // item for step in strides]
    if isinstance(spec.contraction, Dense):
        steps = [0, 0, *steps]
    elif spec.layout is Layout.NCHW:
        steps = [steps[2], steps[3], steps[1], steps[0]]
    return [0, 0, *steps, conv2d.R, conv2d.S, spec.C // conv2d.groups, conv2d.K // conv2d.groups, tiling.depth,
            tiling.width, tiling.blocks]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """All of a call that its arrays' addresses do not decide.

    in_place   whether filters of these strides need no packing
    """

    words: array[int]
    task: int
    tasks: int
    flops_per_task: float
    slot_bytes: int
    in_place: bool


@functools.lru_cache(maxsize=512)
def prepare(
    spec: FusionSpec,
    tiling: ConvTiling,
    sources: tuple[Strides, ...],
    filters: Strides | None,
    out: Strides,
    residual: Strides | None,
) -> Prepared:
    """The fixed words with the machine code they are for; filters None stands for packed ones."""
    in_place = filters is not None and lies_in_rows(spec, tiling, filters)
    fixed = block(spec, tiling, sources, out, residual, in_place=in_place)
    return Prepared(
        words=array("q", fixed.words.tobytes()),
        task=conv.conv_task(tiling.bits, tiling.mr, tiling.nv),
        tasks=fixed.tasks,
        flops_per_task=fixed.flops_per_task,
        slot_bytes=int(fixed.words[at.SCRATCH_BYTES]),
        in_place=in_place,
    )


@functools.lru_cache(maxsize=512)
def prepare_packing(spec: FusionSpec, tiling: ConvTiling, strides: Strides) -> tuple[array[int], int, int]:
    """Words, task and number of tasks of filter packing."""
    return (
        array("q", filter_words(spec, tiling, strides)),
        conv.pack_task(tiling.bits),
        spec.conv.groups * tiling.blocks,
    )


def lies_in_rows(spec: FusionSpec, tiling: ConvTiling, strides: Strides) -> bool:
    """Whether a task may read filters of these strides as they are: whole blocks, one chunk, filters last."""
    whole = tiling.chunks == 1 and spec.conv.groups == 1 and spec.conv.K % tiling.width == 0
    contiguous = tuple(np.cumprod((tiling.item_bytes, *spec.filter_shape[:0:-1]))[::-1].tolist())
    short = spec.conv.K * tiling.item_bytes <= IN_PLACE_BYTES
    return whole and short and spec.layout is Layout.NHWC and strides == contiguous


def pack(spec: FusionSpec, tiling: ConvTiling, filters: Any, packed: int) -> None:
    """Writes the filters in the order of the task to the address `packed`."""
    template, task, tasks = prepare_packing(spec, tiling, filters.strides)
    words = template[:]
    words[0], words[1] = packed, address(filters)
    flops = PACKING_FLOPS * tiling.packed_elements / tasks
    threads.parallel_for(task, words.buffer_info()[0], tasks, threads.get_num_threads(), flops)


def run(spec: FusionSpec, tiling: ConvTiling, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes the result of a contraction to `out`."""
    residual = operands.residual
    filters: Any = operands.filters
    is_kept = isinstance(filters, Filters)
    prepared = prepare(
        spec,
        tiling,
        tuple([source.strides for source in operands.sources]),
        None if is_kept else filters.strides,
        out.strides,
        None if residual is None else residual.strides,
    )
    words, count = prepared.words[:], threads.get_num_threads()
    slots_bytes = prepared.slot_bytes * count
    packed = 0
    if is_kept:
        packed = _kept(spec, tiling, filters).start
    elif prepared.in_place:
        packed = address(filters)
    area = WORKSPACE.borrow(slots_bytes if packed else slots_bytes + tiling.shared_bytes)
    try:
        if not packed:
            packed = area.start + slots_bytes
            pack(spec, tiling, filters, packed)
        words[at.SCRATCH], words[at.FILTERS] = area.start, packed
        words[at.OUT] = address(out)
        if operands.bias is not None:
            words[at.BIAS] = address(operands.bias)
        if residual is not None:
            words[at.RESIDUAL] = address(residual)
            words[at.RESIDUAL_FACTOR] = weight_word(operands.residual_weight)
        place = at.SOURCES
        for source in operands.sources:
            words[place] = address(source)
            place += at.SOURCE_WORDS
        for j, weight in enumerate(operands.weights):
            if weight is not None:
                words[at.SOURCES + at.SOURCE_WORDS * j + at.S_FACTOR] = weight_word(weight)
        threads.parallel_for(prepared.task, words.buffer_info()[0], prepared.tasks, count, prepared.flops_per_task)
    finally:
        WORKSPACE.give_back(area)


def _kept(spec: FusionSpec, tiling: ConvTiling, filters: Filters) -> Area:
    """The packed form that the filters keep for this tiling, made the first time."""

    def make(unpacked: np.ndarray[Any, Any]) -> Area:
        area = allocate(tiling.shared_bytes)
        pack(spec, tiling, unpacked, area.start)
        return area

    kept: Area = filters.packed((tiling.bits, tiling.nv, tiling.depth, spec.conv.groups, type(spec.contraction)), make)
    return kept


def weight_word(weight: Any) -> int:
    """A weight as a word: the address of a vector, or the bits of a float64."""
    if weight is None:
        return 0
    if isinstance(weight, np.ndarray):
        return address(weight)
    return int.from_bytes(struct.pack("=d", weight), sys.byteorder, signed=True)
