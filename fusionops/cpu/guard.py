"""Guards: whether arrays look as in a call made before, asked in machine code; if so, that call's block for them.

A guard is a record of words: what each array has to look like, between which bytes of it the call reads or writes, and
the block of params that wants its address. Knows no op and judges none: what must hold is stated to it, and compared.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from numba import types

from fusionops.address import DATA, DTYPE, EXTENTS, FLAGS, LIST_ITEMS, LOW_HALF, NDIM, STRIDES, WRITEABLE
from fusionops.cpu import jit
from fusionops.cpu.simd import words
from fusionops.kernel import JUDGED, NEW, Reaches, Replay

# Words of a record; behind its head, for each array, what follows there, its extents and its strides. With HAS_OUT the
# first array is the output. MISALIGNED: bits that no address may have. BLOCK_WORDS: 0 where there is no block.
COUNT, HAS_OUT, MISALIGNED, BLOCK, BLOCK_WORDS, HEAD = 0, 1, 2, 3, 4, 5
A_DTYPE, A_NDIM, A_LOW, A_HIGH, A_ALIKE, A_PLACE, ARRAY = 0, 1, 2, 3, 4, 5, 6


@jit.inline
def looks_same(record, objects):
    """Whether the arrays have the dtypes, extents and strides that the record states."""
    r, here = words(record), HEAD
    for i in range(r[COUNT]):
        header, ndim = words(words(objects)[i]), r[here + A_NDIM]
        if header[DTYPE] != r[here + A_DTYPE] or header[NDIM] & LOW_HALF != ndim:
            return False
        extents, strides = words(header[EXTENTS]), words(header[STRIDES])
        here += ARRAY
        for k in range(ndim):
            if extents[k] != r[here + k] or strides[k] != r[here + ndim + k]:
                return False
        here += 2 * ndim
    return True


@jit.inline
def fill(record, objects, block):
    """Writes the block with the arrays' addresses; returns False where they lie such that the call may not run."""
    r, to, header = words(record), words(block), words(words(objects)[0])
    has_out, out, low, high, bits = r[HAS_OUT], header[DATA], r[HEAD + A_LOW], r[HEAD + A_HIGH], 0
    if has_out != 0 and header[FLAGS] & WRITEABLE == 0:
        return False
    for k in range(r[BLOCK_WORDS]):
        to[k] = words(r[BLOCK])[k]
    here = HEAD
    for i in range(r[COUNT]):
        start = words(words(objects)[i])[DATA]
        bits |= start
        to[r[here + A_PLACE]] = start
        overlaps = out + low < start + r[here + A_HIGH] and start + r[here + A_LOW] < out + high
        if has_out != 0 and i > 0 and overlaps and not (r[here + A_ALIKE] != 0 and start == out):
            return False
        here += ARRAY + 2 * r[here + A_NDIM]
    return bits & r[MISALIGNED] == 0


def _find(table, arrays, block):
    """Which of the table's records the arrays of a list are of, and its block for them; or NEW, or JUDGED."""
    t, objects = words(table), words(arrays)[LIST_ITEMS]
    for i in range(t[0]):
        record = t[1 + i]
        if looks_same(record, objects):
            return i if words(record)[BLOCK_WORDS] > 0 and fill(record, objects, block) else JUDGED
    return NEW


@functools.cache
def _find_entry() -> Callable[[int, int, int], int]:
    return jit.entry(types.int64(*[types.int64] * 3), _find, releases=False)


def prepare() -> None:
    """Compiles what finds calls."""
    _find_entry()


def _record(arrays: Sequence[Any], has_out: bool, reaches: Reaches | None, replay: Replay | None) -> array[int]:
    each: list[tuple[int, ...]] = [(0, 0, 0, 0)] * len(arrays)
    if reaches is None or replay is None:
        head = [len(arrays), int(has_out), 0, 0, 0]
    else:
        block = replay.words
        head = [len(arrays), int(has_out), reaches.alignment - 1, *block.buffer_info()]
        each = [(*reach, place) for reach, place in zip(reaches.inputs, replay.places[:-1], strict=True)]
        if has_out:
            each.insert(0, (*reaches.out, replay.places[-1]))
    for one, facts in zip(arrays, each, strict=True):
        head += [id(one.dtype), one.ndim, *map(int, facts), *one.shape, *one.strides]
    return array("q", head)


class Guards:
    """Calls of one kind, an op with its options and roles, told apart by what their arrays look like.

    Needs no lock: a new state takes the place of the old one at once. Of two calls that are added at the same time one
    may be lost, and is added again; one may be there twice, of which the first is found.
    """

    def __init__(self) -> None:
        self._renew((), 1)

    def _renew(self, added: tuple[tuple[Any, ...], ...], block_words: int) -> None:
        """added   of each call its record, what is kept of it, and what has to live as long as the record"""
        table = array("q", [len(added), *(record.buffer_info()[0] for record, *_ in added)])
        self._state = added, table.buffer_info()[0], array("q", bytes(8 * block_words)), table

    def __len__(self) -> int:
        return len(self._state[0])

    def add(
        self, arrays: Sequence[Any], has_out: bool, reaches: Reaches | None, replay: Replay | None, kept: Any
    ) -> None:
        """A call of these arrays, the output first where it is one of them; None: such calls are judged each time."""
        added, _, blank, _ = self._state
        record = _record(arrays, has_out, reaches, replay)
        call = record, kept, replay, [one.dtype for one in arrays]
        self._renew((*added, call), max(len(blank), len(replay.words) if replay else 0))

    def find(self, arrays: list[Any]) -> tuple[Any, array[int]]:
        """What is kept of the call whose arrays looked like these, with its block for them; or NEW or JUDGED."""
        added, table, blank, _ = self._state
        block = blank[:]
        # Compiled for a second call, not for the first.
        found = _find_entry()(table, id(arrays), block.buffer_info()[0])
        return (added[found][1] if found >= 0 else found), block
