"""Merges without a contraction: add and concat in one pass over the maps, upsampling included.

add:     y = act( w0·up(x0) + w1·up(x1) + … )     a left fold, every product and sum rounded: NumPy's bits
concat:  y = x0 | x1 | …                          along any axis
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusionops.axes import Grid, Strides, add_grid, row_step
from fusionops.device import GpuDevice
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
from fusionops.kernel import Kernel, Operands
from fusionops.refusals import merge_reasons
from fusionops.spec import ITEM_BYTES, FusionSpec, Merge, SourceSpec

SOURCE = "stream.cu"
THREADS = 256
RANK = 8  # as in the source
FEW_RUNS = 2**31  # that 32 bits count, those of the last block included
ACCESS_BYTES = 16  # of the widest load and store

# Formats whose bits are copied and, as two's complement, added: by item size.
UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
WORDS = {**UNSIGNED, 16: "Run<u64, 2>"}

OPERAND = np.dtype([("base", "u8"), ("steps", "i8", RANK), ("factors", "i8", RANK), ("weight", WEIGHT)])
SPAN = np.dtype([("base", "u8"), ("step", "i8"), ("first", "i8"), ("words", "i8")])


def add_struct(most: int) -> np.dtype[Any]:
    head = [(name, "i8") for name in ("runs", "rank", "sources", "channel", "activation")]
    return np.dtype([*head, ("slope", "f8"), ("extents", "i8", RANK), ("out", OPERAND), ("source", OPERAND, most)])


def concat_struct(most: int) -> np.dtype[Any]:
    return np.dtype([("out", "u8"), ("step", "i8"), ("rows", "i8"), ("source", SPAN, most)])


def add_symbol(kind: str, vector: int, index: str, most: int) -> str:
    return f"add_fprop_stream<{kind}, {vector}, {index}, {most}>"


def concat_symbol(word_bytes: int, most: int) -> str:
    return f"concat_fprop_stream<{WORDS[word_bytes]}, {most}>"


def rounds(elements: int) -> int:
    """Runs of so many elements that a thread computes, as in the source."""
    return 2 if elements > 8 else 4


KIND_BYTES = {**{kind: ITEM_BYTES[dtype] for dtype, kind in TYPES.items()}, "boolean": 1,
              **{kind: size for size, kind in UNSIGNED.items()}}  # fmt: skip

SYMBOLS = (
    *(
        add_symbol(kind, vector, index, most)
        for kind, size in KIND_BYTES.items()
        for vector, index in ((1, "u32"), (1, "u64"), (ACCESS_BYTES // size, "u32"))
        for most in CAPACITIES
    ),
    *(concat_symbol(word_bytes, most) for word_bytes in WORDS for most in CAPACITIES),
)
"""Every instantiation that a plan can ask for."""


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """kind   the element format of the kernel, or None where the array library adds what has different formats"""

    kind: str | None

    @property
    def scratch_bytes(self) -> int:
        return 0

    @property
    def shared_bytes(self) -> int:
        return 0

    def illegal_on(self, device: GpuDevice) -> tuple[str, ...]:
        return () if device.threads >= THREADS else (f"a block has {THREADS} threads, {device.name} {device.threads}",)


def plan(spec: FusionSpec, device: GpuDevice) -> StreamConfig:
    """The same on every device."""
    return plan_of(spec)


def plan_of(spec: FusionSpec) -> StreamConfig:
    if any(source.dtype != spec.dtype for source in spec.sources):
        return StreamConfig(None)
    if spec.merge is Merge.ADD and spec.dtype == "bool":
        return StreamConfig("boolean")
    return StreamConfig(TYPES.get(spec.dtype) or UNSIGNED[ITEM_BYTES[spec.dtype]])


# add


@functools.lru_cache(maxsize=512)
def prepare_add(
    spec: FusionSpec, kind: str, strides: tuple[Strides, ...], out: Strides, alignment: int
) -> tuple[Grid, str, Struct, int]:
    """The joined axes, the kernel, its parameters but for addresses, which are multiples of `alignment`, its blocks."""
    grid = add_grid(spec, strides, out)
    item = KIND_BYTES[kind]
    vector = ACCESS_BYTES // item
    if alignment % ACCESS_BYTES or not _moves_in_runs(grid, vector) or math.prod(grid.extents) // vector >= FEW_RUNS:
        vector = 1
    outer, here = _split((*grid.extents[:-1], grid.extents[-1] // vector))
    runs = math.prod(here)
    most = capacity(len(spec.sources))
    struct = np.zeros(1, add_struct(most))
    head = struct[0]
    head["runs"], head["rank"], head["sources"] = runs, len(here), len(spec.sources)
    head["channel"] = grid.channel - len(outer)
    head["activation"], head["slope"] = activation_code(spec.activation), slope(spec.activation)
    head["extents"][: len(here)] = here
    for field, steps, factors in zip(
        (head["out"], *head["source"][: len(spec.sources)]), grid.steps, grid.factors, strict=True
    ):
        field["steps"][: len(here)] = steps[len(outer) :]
        field["factors"][: len(here)] = factors[len(outer) :]
    symbol = add_symbol(kind, vector, "u32" if runs < FEW_RUNS else "u64", most)
    return grid, symbol, struct, -(-runs // (THREADS * rounds(vector)))


def _split(extents: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes that the host walks through, and those of a launch."""
    return extents[:-RANK], extents[-RANK:]


def _moves_in_runs(grid: Grid, vector: int) -> bool:
    """Whether every operand has its innermost elements in whole runs, side by side or all the same."""
    steps = [step for steps in grid.steps for step in steps[:-1]]
    last = [steps[-1] for steps in grid.steps]
    return (
        grid.extents[-1] % vector == 0
        and all(step % vector == 0 for step in steps)
        and last[0] == 1
        and set(last) <= {0, 1}
        and all(factors[-1] == 1 for factors in grid.factors)
    )


def run_add(spec: FusionSpec, config: StreamConfig, operands: Operands, out: Any) -> None:
    """Writes the sum of the sources to `out`: as many at a time as a launch takes, the sum so far the first of them."""
    if config.kind is None:
        _add_any(operands.sources, out)
        return
    most = CAPACITIES[-1]
    sources, stated = operands.sources, spec.sources
    weights = operands.weights or (None,) * len(sources)
    while len(sources) > most:
        part = replace(spec, sources=stated[:most], activation=None)
        _add(part, config.kind, sources[:most], weights[:most], out)
        sources, weights = (out, *sources[most:]), (None, *weights[most:])
        stated = (SourceSpec(spec.merged_shape, spec.dtype), *stated[most:])
    _add(replace(spec, sources=stated), config.kind, sources, weights, out)


def _add(spec: FusionSpec, kind: str, sources: tuple[Any, ...], weights: tuple[Any, ...], out: Any) -> None:
    address = runtime().address
    places = [address(array) for array in (out, *sources)]
    alignment = math.gcd(ACCESS_BYTES, *places)
    strides = tuple([tuple(source.strides) for source in sources])
    grid, symbol, template, blocks = prepare_add(spec, kind, strides, tuple(out.strides), alignment)
    struct = template.copy()
    head = struct[0]
    fields = (head["out"], *head["source"][: len(sources)])
    for field, source, weight in zip(fields[1:], spec.sources, weights, strict=True):
        set_weight(field["weight"], source.weight, weight)
    item = KIND_BYTES[kind]
    for index in np.ndindex(_split(grid.extents)[0]):
        for field, place, steps, factors in zip(fields, places, grid.steps, grid.factors, strict=True):
            offset = sum(i // factor * step for i, factor, step in zip(index, factors, steps, strict=False))
            field["base"] = place + offset * item
        launch(SOURCE, symbol, (blocks,), THREADS, struct)


def _add_any(sources: tuple[Any, ...], out: Any) -> None:
    """The left fold of the array library's own additions: NumPy's promotion at every step."""
    library = runtime().arrays
    total = sources[0]
    with np.errstate(all="ignore"):
        for source in sources[1:-1]:
            total = library.add(total, source)
        if len(sources) > 1:
            library.add(total, sources[-1], out=out)
        else:
            library.copyto(out, total)


# concat


@dataclass(frozen=True, slots=True)
class ConcatPlan:
    """How one concat runs, whatever the addresses.

    launches     sources that one launch copies, its parameters, its blocks
    word_bytes   of what a thread moves at a time
    others   sources that are not rows of the result's format, and the part of the output that is theirs
    """

    launches: tuple[tuple[tuple[int, ...], Struct, int], ...]
    word_bytes: int
    others: tuple[tuple[int, tuple[slice, ...]], ...]


@functools.lru_cache(maxsize=512)
def prepare_concat(spec: FusionSpec, strides: tuple[Strides, ...], out: Strides, alignment: int) -> ConcatPlan:
    """Sources with contiguous rows are copied row by row; what is left is an add of one source each. Pure."""
    axis, item = spec.axis, ITEM_BYTES[spec.dtype]
    rows, first = math.prod(spec.out_shape[:axis]), 0
    copied: list[tuple[int, tuple[int, int, int]]] = []
    others, to_steps = [], []
    for j, (source, steps) in enumerate(zip(spec.sources, strides, strict=True)):
        shape = source.upsampled_shape(spec.layout)
        start, first = first, first + shape[axis]
        if 0 in shape:
            continue
        step, to_step = row_step(shape, steps, axis, item), row_step(shape, out, axis, item)
        if source.is_plain and source.dtype == spec.dtype and step is not None and to_step is not None:
            copied.append((j, (step, start * out[axis], math.prod(shape[axis:]) * item)))
            to_steps.append(to_step)
        else:
            others.append((j, (slice(None),) * axis + (slice(start, first),)))
    lengths = [alignment, *to_steps, *(number for _, span in copied for number in span)]
    word_bytes = math.gcd(ACCESS_BYTES, *lengths)
    launches = []
    for part in _parts(copied):
        struct = np.zeros(1, concat_struct(capacity(len(part))))
        head = struct[0]
        head["step"], head["rows"] = to_steps[0] // word_bytes, rows
        for field, (_, (step, start, length)) in zip(head["source"], part, strict=False):
            field["step"], field["first"], field["words"] = (each // word_bytes for each in (step, start, length))
        words = max(span[-1] for _, span in part) // word_bytes * rows
        launches.append((tuple(j for j, _ in part), struct, -(-words // (THREADS * rounds(1)))))
    return ConcatPlan(tuple(launches), word_bytes, tuple(others))


def _parts(copied: list[Any]) -> Iterator[list[Any]]:
    most = CAPACITIES[-1]
    for first in range(0, len(copied), most):
        yield copied[first : first + most]


def run_concat(spec: FusionSpec, config: StreamConfig, operands: Operands, out: Any) -> None:
    """Writes the sources side by side."""
    address = runtime().address
    places = [address(source) for source in operands.sources]
    place = address(out)
    alignment = math.gcd(ACCESS_BYTES, place, *places)
    strides = tuple([tuple(source.strides) for source in operands.sources])
    prepared = prepare_concat(spec, strides, tuple(out.strides), alignment)
    for copied, template, blocks in prepared.launches:
        struct = template.copy()
        struct[0]["out"] = place
        struct[0]["source"]["base"][: len(copied)] = [places[j] for j in copied]
        symbol = concat_symbol(prepared.word_bytes, capacity(len(copied)))
        launch(SOURCE, symbol, (blocks, len(copied)), THREADS, struct)
    for j, where in prepared.others:
        source, stated = operands.sources[j], spec.sources[j]
        if stated.dtype != spec.dtype:
            runtime().arrays.copyto(out[where], source, casting="same_kind")
            continue
        alone = FusionSpec(Merge.ADD, (stated,), dtype=spec.dtype, layout=spec.layout)
        kind = TYPES.get(spec.dtype) or UNSIGNED[ITEM_BYTES[spec.dtype]]
        weight = operands.weights[j] if operands.weights else None
        _add(alone, kind, (source,), (weight,), out[where])


def _kernel(name: str, merge: Merge, dtype: str | None, run: Any) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        return tuple(merge_reasons(spec, merge, dtype, TYPES))

    return Kernel(f"gpu.{name}", unsupported, plan, run)


KERNELS = (
    *(_kernel(f"add_fprop_stream_{SUFFIXES[dtype]}", Merge.ADD, dtype, run_add) for dtype in TYPES),
    _kernel("add_fprop_stream_any", Merge.ADD, None, run_add),
    _kernel("concat_fprop_stream_any", Merge.CONCAT, None, run_concat),
)
