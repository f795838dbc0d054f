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

from fusionops import kernel
from fusionops.address import address
from fusionops.cpu import activation, stream, threads
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words, block, filter_words, is_plain, weight_word, widened
from fusionops.cpu.epilogue import tile_finisher, tile_scatterer
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.memory import WORKSPACE, Area, allocate
from fusionops.cpu.prologue import tile_loader
from fusionops.cpu.tiling import Tiling
from fusionops.kernel import Filters, Operands
from fusionops.spec import ITEM_BYTES, FusionSpec

PACKING_FLOPS = 32.0  # what computes as long as one element is packed: 4 bytes at 16 GB/s against 120 GFLOP/s
# What computes as long as a byte of a map or of filters is moved, as for an add. Few filters leave little else to do:
# without it five sources of 256×256 pixels and one filter ran on one thread and took 1.5 times as long, and so does a
# row of 512 channels with 512 filters where the bytes of filters do not count.
MOVING_FLOPS = 4.0


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

    filters    strides of those that have to be packed for the call; None: they are kept packed, or need not be
    places     words that hold addresses: of sources, filters, bias, residual and output, as far as there are
    """

    algorithm: Algorithm
    spec: FusionSpec
    tiling: Tiling
    filters: Strides | None
    words: array[int]
    places: tuple[int, ...]
    task: int
    tasks: int
    flops_per_task: float
    slot_bytes: int

    def launch(self, words: array[int], filters: Filters | None) -> None:
        """Runs the call that the words describe."""
        count, tiling = threads.get_num_threads(), self.tiling
        slots_bytes = self.slot_bytes * count
        if filters is not None:
            words[at.FILTERS] = _kept(self.algorithm, self.spec, tiling, filters).start
        area = WORKSPACE.borrow(slots_bytes if self.filters is None else slots_bytes + tiling.shared_bytes)
        try:
            if self.filters is not None:
                packed = area.start + slots_bytes
                pack(self.algorithm, self.spec, tiling, self.filters, words[at.FILTERS], packed)
                words[at.FILTERS] = packed
            words[at.SCRATCH] = area.start
            threads.parallel_for(self.task, words.buffer_info()[0], self.tasks, count, self.flops_per_task)
        finally:
            WORKSPACE.give_back(area)


@functools.lru_cache(maxsize=512)
def prepare(
    algorithm: Algorithm,
    spec: FusionSpec,
    tiling: Tiling,
    sources: tuple[Strides, ...],
    filters: Strides | None,
    residual: Strides | None,
    out: Strides,
) -> Prepared:
    """The fixed words with the machine code they are for; filters None stands for packed ones."""
    words = block(spec, tiling, sources, out, residual)
    stored = FORMATS[spec.dtype].stored
    words[at.LOAD_TILE] = tile_loader(tiling.bits, tiling.kept, stored, is_plain(words))
    words[at.FINISH_TILE] = tile_finisher(tiling.bits, stored, activation.is_plain(spec.activation))
    if words[at.OUT_K] != 1:
        words[at.SCATTER_TILE] = tile_scatterer(tiling.bits, stored)
    tasks, in_place = algorithm.cut(spec, tiling, words, filters)
    places = [at.SOURCES + at.SOURCE_WORDS * j for j in range(len(sources))]
    places += [at.FILTERS] * (filters is not None) + [at.BIAS] * spec.bias + [at.RESIDUAL] * (residual is not None)
    return Prepared(
        algorithm,
        spec,
        tiling,
        filters=None if in_place else filters,
        words=array("q", words.tobytes()),
        places=(*places, at.OUT),
        task=algorithm.task(tiling),
        tasks=tasks,
        flops_per_task=_flops(spec) / max(1, tasks),
        slot_bytes=int(words[at.SCRATCH_BYTES]),
    )


def _flops(spec: FusionSpec) -> float:
    """What computes as long as the contraction: its products, or moving maps and filters if that takes longer."""
    shapes = (*(source.shape for source in spec.sources), spec.out_shape)
    _, filters, terms = spec.gemm
    moved = (sum(map(math.prod, shapes)) + filters * terms * spec.conv.groups) * ITEM_BYTES[spec.dtype]
    return max(2.0 * math.prod(spec.gemm) * spec.conv.groups, MOVING_FLOPS * moved)


@functools.lru_cache(maxsize=512)
def prepare_packing(
    algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, strides: Strides
) -> tuple[array[int], int, int]:
    """Words, task and number of tasks of filter packing."""
    groups = 1 if algorithm.joins_groups else spec.conv.groups
    words = array("q", [*filter_words(spec, tiling, strides, groups), algorithm.parts, *spec.conv.stride])
    return words, algorithm.pack_task(tiling.bits, FORMATS[spec.dtype].stored), groups * tiling.blocks


def pack(algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, strides: Strides, filters: int, packed: int) -> None:
    """Writes the filters at one address in the order of the task to another."""
    template, task, tasks = prepare_packing(algorithm, spec, tiling, strides)
    words = template[:]
    words[0], words[1] = packed, filters
    flops = PACKING_FLOPS * tiling.packed_elements / tasks
    threads.parallel_for(task, words.buffer_info()[0], tasks, threads.get_num_threads(), flops)


def run(algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes a contraction to `out`; with return_sum the merged map first, which then is the only source."""
    if spec.return_sum:
        spec, operands = stream.store_merged(spec, operands)
    if FORMATS[spec.dtype].is_narrow:
        operands = widened(operands)
    prepared = prepare(algorithm, spec, tiling, *operands.strides(out))
    words, kept = prepared.words[:], operands.kept_filters
    for place, operand in zip(prepared.places, operands.arrays(out), strict=True):
        words[place] = address(operand)
    words[at.RESIDUAL_FACTOR] = weight_word(operands.residual_weight)
    _place_weights(words, operands.weights)
    prepared.launch(words, kept)


def replay(
    algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, strides: kernel.Strides, weights: kernel.Numbers
) -> kernel.Replay | None:
    """`run` made again; None where something has to be written or converted first."""
    if spec.return_sum or (FORMATS[spec.dtype].is_narrow and spec.bias):
        return None
    prepared = prepare(algorithm, spec, tiling, *strides)
    words = prepared.words[:]
    _place_weights(words, weights)
    return kernel.Replay(words, prepared.places, prepared.launch)


def _place_weights(words: array[int], weights: tuple[Any, ...]) -> None:
    for j, weight in enumerate(weights):
        if weight is not None:
            words[at.SOURCES + at.SOURCE_WORDS * j + at.S_FACTOR] = weight_word(weight)


def _kept(algorithm: Algorithm, spec: FusionSpec, tiling: Tiling, filters: Filters) -> Area:
    """The packed form that the filters keep for this tiling, made the first time."""

    def make(unpacked: np.ndarray[Any, Any]) -> Area:
        area = allocate(tiling.shared_bytes)
        pack(algorithm, spec, tiling, unpacked.strides, address(unpacked), area.start)
        return area

    key = (algorithm.name, tiling.bits, tiling.nv, tiling.depth, spec.conv.groups, type(spec.contraction))
    kept: Area = filters.packed(key, make)
    return kept
