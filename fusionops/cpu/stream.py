"""Merges without a contraction: add and concat in one pass over the maps, upsampling included.

    add:     y = act( w0·up(x0) + w1·up(x1) + … )     a left fold, every product and sum rounded: NumPy's bits
    concat:  y = x0 | x1 | …                          along any axis

A task owns a span of the output. Small outputs stay in the caches; large ones are stored around them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops import kernel
from fusionops.address import address
from fusionops.axes import Grid, Strides, add_grid, row_step
from fusionops.cpu import activation, threads
from fusionops.cpu.add_task import GATHER_BYTES, GENERAL, HEAD, MOST_IN_TABLE, RUNS, SUMS, WAY, add_task, operand_words
from fusionops.cpu.block import WEIGHT_KINDS, weight_word, widened
from fusionops.cpu.concat_task import (
    AROUND,
    BLOCK_BYTES,
    CONCAT_HEAD,
    CONCAT_WORDS,
    IN_TURN,
    LONG_BYTES,
    STAGE_BYTES,
    THROUGH,
    WOVEN,
    concat_task,
)
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.cpu.tiling import MANY_ROUNDS
from fusionops.device import CpuDevice
from fusionops.kernel import Filters, Kernel, Operands, Replay
from fusionops.refusals import merge_reasons
from fusionops.spec import ITEM_BYTES, FusionSpec, Merge, SourceSpec

# Outputs from this many bytes on are stored around the caches: they do not fit the L2 of the core that wrote them, and
# a store through the caches first reads the line. Measured on two AVX-512 cores, median of 7 interleaved rounds: an add
# is 1.15× as fast at 4 MiB and 1.2× at 64 MiB of output, a concat 1.05× and 1.35×.
STREAM_BYTES = 1 << 22
# That was with 105 MiB of L3 behind a mesh that dozens of cores share. A smaller one belongs to a few cores, is nearly
# as fast as L2, and holds what is stored through it: with 32 MiB (AVX2, 2 cores), around the caches an add took 1.5
# times as long at 4 MiB of output, 1.2 at 8, 0.8 at 12 and 0.65 at 32; a concat 2.4, 1.4, 1.3, and 0.75 from 16 on.
NEAR_L3_BYTES = 1 << 26
# Of the output that a task owns: some 20 µs. Half as much costs a concat 3 % more: each task ends in a partial line.
SPAN_BYTES = 1 << 18
SPAN_FLOPS = 3.0e6  # which take as long
# Rows shorter than this are added some at once, as a run of at most RUN_BYTES. An upsampled map of 64 float32 channels
# beside another took 0.86 of the time in L2 on one thread and 0.84 around the caches; rows of 512 and 1024 bytes would
# take 1.12 and 1.4 times as long as one by one (AVX2, medians of 7).
SHORT_BYTES, RUN_BYTES = 1 << 9, 1 << 12
SHARES = 2  # at least, of an output smaller than that: a second core that has to be woken still saves a third of 33 µs


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """span   elements of the output a task owns; nontemporal   whether stores go around the caches

    flops   that take as long as a task
    """

    span: int
    nontemporal: bool
    flops: float

    @property
    def scratch_bytes(self) -> int:
        return 0  # a task's buffer lives on its stack

    @property
    def shared_bytes(self) -> int:
        return 0

    def illegal_on(self, device: CpuDevice) -> tuple[str, ...]:
        return ()


def plan(spec: FusionSpec, device: CpuDevice) -> StreamConfig:
    item = ITEM_BYTES[spec.dtype]
    return _config(math.prod(spec.out_shape), item, goes_around(spec, device), device.cores)


def goes_around(spec: FusionSpec, device: CpuDevice) -> bool:
    """Whether the output is stored around the caches: it is large, and no near cache holds it beside the sources."""
    stored = math.prod(spec.out_shape) * ITEM_BYTES[spec.dtype]
    read = sum(math.prod(source.shape) * ITEM_BYTES[source.dtype] for source in spec.sources)
    return stored >= STREAM_BYTES and (device.l3_bytes > NEAR_L3_BYTES or stored + read >= device.l3_bytes)


def _config(elements: int, item: int, nontemporal: bool, cores: int) -> StreamConfig:
    """Few tasks are as many for each core: adds of 7 and 13 tasks took 1.06 to 1.1 times as long as of 8 and 14."""
    tasks = max(SHARES, -(-elements * item // SPAN_BYTES))
    if tasks < MANY_ROUNDS * cores:
        tasks = -(-tasks // cores) * cores
    span = max(1, -(-elements // tasks))
    return StreamConfig(span, nontemporal, SPAN_FLOPS * span * item / SPAN_BYTES)


# add


@functools.lru_cache(maxsize=512)
def add_block(
    spec: FusionSpec, config: StreamConfig, strides: tuple[Strides, ...], out: Strides
) -> tuple[array[int], int]:
    """The fixed words of an add, and its number of tasks. Pure."""
    space = add_grid(spec, strides, out)
    inner, rows = space.extents[-1], math.prod(space.extents[:-1])
    pieces = max(1, -(-inner // config.span))
    piece = -(-inner // pieces)
    task_rows = -(-config.span // max(1, inner)) if pieces == 1 else 1
    depth = len(space.extents)
    size = operand_words(depth)
    # Beside another, an upsampled map of 256 channels took 0.76 of the time with WOVEN, for 17 and for 69 MB of output
    # that begins within a line (AVX2, medians of four alternating runs).
    stores = AROUND if config.nontemporal else THROUGH
    row_bytes, following = inner * ITEM_BYTES[spec.dtype], [math.prod(space.extents[d + 1 :]) for d in range(depth)]
    if config.nontemporal and pieces == 1 and list(space.steps[0]) == following and row_bytes >= VECTOR_BYTES:
        stores = WOVEN
    at_once = _rows_at_once(space, row_bytes) if pieces == 1 else 1
    words = np.zeros(HEAD + depth + size * len(space.steps), np.int64)
    slope = spec.activation.parameters[0] if spec.activation and spec.activation.parameters else 0.0
    words[:HEAD] = [len(spec.sources), depth, rows, task_rows, pieces, piece, _way(spec, space), stores,
                    activation.code(spec.activation), weight_word(slope), space.channel, at_once]  # fmt: skip
    words[HEAD : HEAD + depth] = space.extents
    for j, (step, factor) in enumerate(zip(space.steps, space.factors, strict=True)):
        start = HEAD + depth + size * j
        kind = WEIGHT_KINDS[spec.sources[j - 1].weight if j else None]
        words[start : start + size] = [0, kind, 0, *step, *factor]
    return array("q", words.tobytes()), -(-rows // task_rows) * pieces


def _way(spec: FusionSpec, space: Grid) -> int:
    """Of adding: what compiles fastest of what can do it."""
    are_runs = all(step[-1] == 1 and factor[-1] == 1 for step, factor in zip(space.steps, space.factors, strict=True))
    if not are_runs or len(spec.sources) > MOST_IN_TABLE or not activation.is_plain(spec.activation):
        return GENERAL
    return SUMS if spec.activation is None and all(source.weight is None for source in spec.sources) else RUNS


def _rows_at_once(space: Grid, row_bytes: int) -> int:
    """Rows that are added as one run: those of the output follow one another, others' are gathered in L1 first."""
    if row_bytes >= SHORT_BYTES or len(space.extents) == 1 or space.channel >= 0:
        return 1
    follows = (space.extents[-1], 1), (1, 1)
    out, *others = ((step[-2:], factor[-2:]) for step, factor in zip(space.steps, space.factors, strict=True))
    gathered = sum(operand != follows for operand in others)
    return max(1, min(RUN_BYTES, GATHER_BYTES // max(1, gathered)) // row_bytes) if out == follows else 1


def run_add(spec: FusionSpec, config: StreamConfig, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes the sum of sources of one dtype to `out`."""
    fixed, tasks = add_block(spec, config, tuple([source.strides for source in operands.sources]), out.strides)
    words, form = fixed[:], FORMATS[spec.dtype]
    depth = words[1]
    size, start = operand_words(depth), HEAD + depth
    if form.is_narrow:
        operands = widened(operands)
    words[start] = address(out)
    for j, source in enumerate(operands.sources, 1):
        words[start + j * size] = address(source)
    _place_weights(words, operands.weights)
    task = add_task(form.bits, form.stored, words[WAY])
    threads.parallel_for(task, words.buffer_info()[0], tasks, threads.get_num_threads(), config.flops)


def _place_weights(words: array[int], weights: tuple[Any, ...]) -> None:
    size = operand_words(words[1])
    for j, weight in enumerate(weights, 1):
        words[HEAD + words[1] + j * size + 2] = weight_word(weight)


def replay_add(
    spec: FusionSpec, config: StreamConfig, strides: kernel.Strides, weights: kernel.Numbers
) -> Replay | None:
    """`run_add` made again."""
    fixed, tasks = add_block(spec, config, strides.sources, strides.out)
    words, form = fixed[:], FORMATS[spec.dtype]
    first, size = HEAD + words[1], operand_words(words[1])
    _place_weights(words, weights)
    places = [first + j * size for j in (*range(1, len(spec.sources) + 1), 0)]
    return _replay(add_task(form.bits, form.stored, words[WAY]), words, tasks, places, config.flops)


def _replay(task: int, words: array[int], tasks: int, places: list[int], flops: float) -> Replay:
    def launch(words: array[int], filters: Filters | None) -> None:
        threads.parallel_for(task, words.buffer_info()[0], tasks, threads.get_num_threads(), flops)

    return Replay(words, tuple(places), launch)


def run_add_any(spec: FusionSpec, config: StreamConfig, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes the left fold of NumPy's own additions: any dtypes, any mixture."""
    total = operands.sources[0]
    with np.errstate(all="ignore"):
        for source in operands.sources[1:-1]:
            total = np.add(total, source)
        if len(operands.sources) > 1:
            np.add(total, operands.sources[-1], out=out)
        else:
            np.copyto(out, total)


def store_merged(spec: FusionSpec, operands: Operands) -> tuple[FusionSpec, Operands]:
    """Writes the merged map to operands.merged, and states the rest of the problem with that map as its one source."""
    merged = operands.merged
    assert merged is not None
    alone = dataclasses.replace(spec, contraction=None, bias=False, residual=None, activation=None, return_sum=False)
    item = ITEM_BYTES[spec.dtype]
    # Not around the caches: the contraction reads it right away.
    config = _config(math.prod(spec.merged_shape), item, nontemporal=False, cores=SHARES)
    run_add(alone, config, Operands(operands.sources, operands.weights), merged)
    rest = dataclasses.replace(spec, sources=(SourceSpec(spec.merged_shape, spec.dtype),), return_sum=False)
    return rest, dataclasses.replace(operands, sources=(merged,), weights=(), merged=None)


# concat


@dataclass(frozen=True, slots=True)
class ConcatPlan:
    """How one concat runs, whatever the addresses.

    words, tasks   of the launch that copies the sources `copied`
    others         sources that are not copied row by row, and the part of the output that is theirs
    """

    words: array[int]
    tasks: int
    copied: tuple[int, ...]
    others: tuple[tuple[int, tuple[slice, ...]], ...]


@functools.lru_cache(maxsize=512)
def concat_plan(spec: FusionSpec, config: StreamConfig, strides: tuple[Strides, ...], out: Strides) -> ConcatPlan:
    """Sources with contiguous rows of the result's dtype are copied by tasks; the rest one by one. Pure."""
    axis, item = spec.axis, ITEM_BYTES[spec.dtype]
    rows, first = math.prod(spec.out_shape[:axis]), 0
    spans, copied, others = [], [], []
    for j, (source, steps) in enumerate(zip(spec.sources, strides, strict=True)):
        shape = source.upsampled_shape(spec.layout)
        start, first = first, first + shape[axis]
        step, to_step = row_step(shape, steps, axis, item), row_step(shape, out, axis, item)
        if 0 in shape:
            continue
        if source.is_plain and source.dtype == spec.dtype and step is not None and to_step is not None:
            spans.append((0, step, start * out[axis], to_step, math.prod(shape[axis:]) * item))
            copied.append(j)
        else:
            others.append((j, (slice(None),) * axis + (slice(start, first),)))
    total = sum(span[-1] for span in spans)
    span_bytes = config.span * item
    pieces = max(1, min(max((span[-1] for span in spans), default=1), -(-total // span_bytes)))
    task_rows = max(1, -(-span_bytes // max(1, total)))
    covers = not others and row_step(spec.out_shape, out, axis, item) == total
    staged = total if config.nontemporal and covers and total < LONG_BYTES else 0
    block = max(1, (STAGE_BYTES if staged else BLOCK_BYTES) // max(1, total))
    shortest = min((span[-1] for span in spans), default=0)
    if config.nontemporal:
        stores = WOVEN if staged and shortest >= VECTOR_BYTES else AROUND
    else:
        stores = IN_TURN if pieces == 1 and shortest >= VECTOR_BYTES else THROUGH
    words = [len(spans), rows, task_rows, pieces, stores, staged, block]
    words.append(0)  # the output's address
    words += [word for span in spans for word in span]
    tasks = -(-rows // task_rows) * pieces if spans else 0
    return ConcatPlan(array("q", words), tasks, tuple(copied), tuple(others))


def run_concat(spec: FusionSpec, config: StreamConfig, operands: Operands, out: np.ndarray[Any, Any]) -> None:
    """Writes the sources side by side: contiguous rows through tasks of copies, other steps through NumPy's copy.

    A source with a prologue is an add of one source into its part of the output.
    """
    plan = concat_plan(spec, config, tuple([source.strides for source in operands.sources]), out.strides)
    words = plan.words[:]
    words[CONCAT_HEAD - 1] = address(out)
    for place, j in enumerate(plan.copied):
        words[CONCAT_HEAD + place * CONCAT_WORDS] = address(operands.sources[j])
    if plan.tasks:
        threads.parallel_for(concat_task(), words.buffer_info()[0], plan.tasks, threads.get_num_threads(), config.flops)
    for j, where in plan.others:
        source, stated = operands.sources[j], spec.sources[j]
        if stated.is_plain:
            np.copyto(out[where], source, casting="same_kind")
        else:
            alone = FusionSpec(Merge.ADD, (stated,), dtype=spec.dtype, layout=spec.layout)
            weight = operands.weights[j] if operands.weights else None
            run_add(alone, config, Operands((source,), (weight,)), out[where])


def replay_concat(
    spec: FusionSpec, config: StreamConfig, strides: kernel.Strides, weights: kernel.Numbers
) -> Replay | None:
    """`run_concat` made again, where all sources are copied by tasks: none has a weight."""
    plan = concat_plan(spec, config, strides.sources, strides.out)
    if plan.copied != tuple(range(len(spec.sources))):
        return None
    places = [CONCAT_HEAD + j * CONCAT_WORDS for j in plan.copied]
    return _replay(concat_task(), plan.words, plan.tasks, [*places, CONCAT_HEAD - 1], config.flops)


def _kernel(name: str, merge: Merge, dtype: str | None, run: Any, **replay: Any) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        return tuple(merge_reasons(spec, merge, dtype, FORMATS))

    return Kernel(f"cpu.{name}", unsupported, plan, run, **replay)


KERNELS = (
    *(
        _kernel(f"add_fprop_stream_{form.suffix}", Merge.ADD, dtype, run_add, replay=replay_add)
        for dtype, form in FORMATS.items()
    ),
    _kernel("concat_fprop_stream_any", Merge.CONCAT, None, run_concat, replay=replay_concat),
    _kernel("add_fprop_stream_any", Merge.ADD, None, run_add_any),
)
