"""From operands to a launch of tasks: completes the params block, lends scratch memory, packs filters, launches.

Shared by the kernels whose work is a contraction; an `Algorithm` is what they differ in.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops.cpu import params as at
from fusionops.cpu import stream, threads
from fusionops.cpu.block import Strides, Words, block, filter_words, weight_word, widened
from fusionops.cpu.epilogue import tile_finisher, tile_scatterer
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.memory import WORKSPACE, Area, address, allocate
from fusionops.cpu.prologue import tile_loader
from fusionops.cpu.tiling import Tiling
from fusionops.kernel import Filters, Operands
from fusionops.spec import FusionSpec

PACKING_FLOPS = 32.0  # what computes as long as one element is packed: 4 bytes at 16 GB/s against 120 GFLOP/s


@dataclass(frozen=True, eq=False)
class Algorithm:
    """One way to compute a contraction: how it cuts the work up, and the code of its tasks.

    name   tells apart the orders in which algorithms want filters
    cut(spec, tiling, words, filters)   completes the words; returns the number of tasks, and whether the tasks read
                                        filters of these strides as they are (None: they are packed)
    task(tiling), pack_task(bits, stored)   addresses of the machine code
    joins_groups   whether the filters of all groups are packed as if of one
    parts      groups that the filters have in each group of the spec
    """

    name: str
    cut: Callable[[FusionSpec, Any, Words, Strides | None], tuple[int, bool]]
    task: Callable[[Any], int]
    pack_task: Callable[[int, int], int]
    joins_groups: bool = False
    parts: int = 1


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
    algorithm: Algorithm,
    spec: FusionSpec,
    tiling: Tiling,
    sources: tuple[Strides, ...],
    filters: Strides | None,
    out: Strides,
    residual: Strides | None,
) -> Prepared:
    """The fixed words with the machine code they are for; filters None stands for packed ones."""
    words = block(spec, tiling, sources, out, residual)
    stored = FORMATS[spec.dtype].stored
    words[at.LOAD_TILE] = tile_loader(tiling.bits, tiling.kept, stored)
    words[[at.FINISH_TILE, at.SCATTER_TILE]] = tile_finisher(tiling.bits, stored), tile_scatterer(tiling.bits, stored)
    tasks, in_place = algorithm.cut(spec, tiling, words, filters)
    return Prepared(
        words=array("q", words.tobytes()),
        task=algorithm.task(tiling),
        tasks=tasks,
        flops_per_task=2.0 * math.prod(spec.gemm) * spec.conv.groups / max(1, tasks),
        slot_bytes=int(words[at.SCRATCH_BYTES]),
        in_place=in_place,
    )


@functools.lru_cache(maxsize=512)
def prepare_packing(
    algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, strides: Strides
) -> tuple[array[int], int, int]:
    """Words, task and number of tasks of filter packing."""
    groups = 1 if algorithm.joins_groups else spec.conv.groups
    words = array("q", [*filter_words(spec, tiling, strides, groups), algorithm.parts, *spec.conv.stride])
    return words, algorithm.pack_task(tiling.bits, FORMATS[spec.dtype].stored), groups * tiling.blocks


def pack(algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, filters: Any, packed: int) -> None:
    """Writes the filters in the order of the task to the address `packed`."""
    template, task, tasks = prepare_packing(algorithm, spec, tiling, filters.strides)
    words = template[:]
    words[0], words[1] = packed, address(filters)
    flops = PACKING_FLOPS * tiling.packed_elements / tasks
    threads.parallel_for(task, words.buffer_info()[0], tasks, threads.get_num_threads(), flops)


def run(algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes a contraction to `out`; with return_sum the merged map first, which then is the only source."""
    if spec.return_sum:
        spec, operands = stream.store_merged(spec, operands)
    if FORMATS[spec.dtype].is_narrow:
        operands = widened(operands)
    residual = operands.residual
    filters: Any = operands.filters
    is_kept = isinstance(filters, Filters)
    prepared = prepare(
        algorithm,
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
        packed = _kept(algorithm, spec, tiling, filters).start
    elif prepared.in_place:
        packed = address(filters)
    area = WORKSPACE.borrow(slots_bytes if packed else slots_bytes + tiling.shared_bytes)
    try:
        if not packed:
            packed = area.start + slots_bytes
            pack(algorithm, spec, tiling, filters, packed)
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


def _kept(algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, filters: Filters) -> Area:
    """The packed form that the filters keep for this tiling, made the first time."""

    def make(unpacked: np.ndarray[Any, Any]) -> Area:
        area = allocate(tiling.shared_bytes)
        pack(algorithm, spec, tiling, unpacked, area.start)
        return area

    key = (algorithm.name, tiling.bits, tiling.nv, tiling.depth, spec.conv.groups, type(spec.contraction))
    kept: Area = filters.packed(key, make)
    return kept
