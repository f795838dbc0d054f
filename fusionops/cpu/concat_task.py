"""The task of a concat without a contraction: runs of bytes, copied side by side. Chooses no extents."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu.jit import inline, task
from fusionops.cpu.simd import I8, I64, VECTOR_BYTES, Lanes, prefetch_read, word, words
from fusionops.cpu.transpose import stack_words

# Words of a concat: sources, rows, rows of a task, pieces of a row, how it is stored, bytes of a staged row,
# rows at a time, output; then for each source its address and step, where it starts in an output row, that row's step,
# bytes of a row.
CONCAT_HEAD, CONCAT_WORDS = 8, 5
# How it is stored: through the caches, some rows of each source at a time; around them; around them, lines woven of
# runs; through them, a row of each source in turn.
THROUGH, AROUND, WOVEN, IN_TURN = range(4)


@intrinsic
def copy_rows(typing, to, to_step, source, step, rows, count):
    """Copies `rows` rows of `count` bytes; no two overlap."""
    signature = types.void(*[types.intp] * 6)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        first_to, to_step, first_source, step, rows, count = args
        lanes = Lanes(b, 32)

        def move(to: ir.Value, source: ir.Value, offset: ir.Value) -> None:
            lanes.store(lanes.load(lanes.pointer(b.add(source, offset))), lanes.pointer(b.add(to, offset)))

        def row_of(index: ir.Value) -> tuple[ir.Value, ir.Value]:
            return b.add(first_to, b.mul(index, to_step)), b.add(first_source, b.mul(index, step))

        def copy_ends(size: int) -> None:
            """The first and the last `size` bytes of each row: all of it, if a row has no more than twice as many."""
            kind = ir.VectorType(I8, size).as_pointer()
            with cgutils.for_range(b, rows) as r:
                to, source = row_of(r.index)
                pieces = []
                for offset in (word(0), b.sub(count, word(size))):
                    piece = b.load(b.inttoptr(b.add(source, offset), kind))
                    piece.align = 1
                    pieces.append((offset, piece))
                for offset, piece in pieces:
                    b.store(piece, b.inttoptr(b.add(to, offset), kind)).align = 1

        with b.if_else(b.icmp_signed("<", count, word(VECTOR_BYTES))) as (short, long):
            with short:
                # Byte by byte, runs of 8 and 24 float32 channels took 1.3 times as long, of 12 and 4 3.0 times.
                for size in (1, 2, 4, 8, 16, 32):
                    fits = b.and_(b.icmp_signed(">=", count, word(size)), b.icmp_signed("<", count, word(2 * size)))
                    with b.if_then(fits):
                        copy_ends(size)
            with long:  # a row's last vector may overlap the one before it: no loop over single bytes
                last = b.sub(count, word(VECTOR_BYTES))
                whole = b.sdiv(b.add(last, word(VECTOR_BYTES - 1)), word(VECTOR_BYTES))
                with cgutils.for_range(b, rows) as r:
                    to, source = row_of(r.index)
                    with cgutils.for_range(b, whole) as v:
                        move(to, source, b.mul(v.index, word(VECTOR_BYTES)))
                    move(to, source, last)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def copy_in_turn(typing, to, spans, sources, row0, row1):
    """Copies a row of each source in turn, of VECTOR_BYTES and more, so that the output is written from front to back.

    spans   CONCAT_WORDS of each source

    Of the time by pages of the output, 0.77 to 0.85 for 2 to 16 MiB in L3, 0.7 for five sources, 0.95 for 64 KiB.
    """
    signature = types.void(*[types.intp] * 5)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, spans, sources, row0, row1 = args
        lanes = Lanes(b, 32)
        table = b.inttoptr(spans, I64.as_pointer())

        def move(to: ir.Value, source: ir.Value, offset: ir.Value) -> None:
            lanes.store(lanes.load(lanes.pointer(b.add(source, offset))), lanes.pointer(b.add(to, offset)))

        with cgutils.for_range(b, row1, start=row0) as r, cgutils.for_range(b, sources) as j:
            span = b.gep(table, [b.mul(j.index, word(CONCAT_WORDS))])
            start, step, first, to_step, count = (b.load(b.gep(span, [word(k)])) for k in range(CONCAT_WORDS))
            row, source = b.add(b.add(to, b.mul(r.index, to_step)), first), b.add(start, b.mul(r.index, step))
            last = b.sub(count, word(VECTOR_BYTES))  # the last vector may overlap the one before it
            with cgutils.for_range_slice(b, word(0), last, word(VECTOR_BYTES)) as (offset, _):
                move(row, source, offset)
            move(row, source, last)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def stream_lines(typing, to, source, lines):
    """Stores `lines` vectors around the caches; `to` is a multiple of VECTOR_BYTES."""
    signature = types.void(*[types.intp] * 3)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, source, lines = args
        lanes = Lanes(b, 32)
        with cgutils.for_range(b, lines) as line:
            offset = b.mul(line.index, word(VECTOR_BYTES))
            lanes.stream(lanes.load(lanes.pointer(b.add(source, offset))), lanes.pointer(b.add(to, offset)))
        return context.get_dummy_value()

    return signature, codegen


# Bytes of the output gathered in L1 at a time. 16 KiB took 1.25× as long: the memory rests while the stores leave.
STAGE_BYTES = 1 << 11
ROWS_AHEAD = 8  # of a source, asked for so much earlier: 4 and 16 took as long, none 1.07 times as long out of cache
LINE_WORDS = 3 * VECTOR_BYTES // 8  # room for a line, and for the vectors that fill it from either side
LONG_BYTES = 1 << 13  # a run this long goes around the caches by itself: its first and last line hardly count
STAGE_WORDS = (LONG_BYTES + STAGE_BYTES) // 8 + 32  # a row less than LONG_BYTES, room to align, and what is held back
BLOCK_BYTES = 1 << 12  # of the output, written by all sources in turn: a page, which the prefetchers follow


@inline
def copy_around(to, source, count):
    """Copies one long run: whole lines around the caches, what is left of the first and the last one through them."""
    head = -to % VECTOR_BYTES
    lines = (count - head) // VECTOR_BYTES
    done = head + lines * VECTOR_BYTES
    copy_rows(to, 0, source, 0, 1, head)
    stream_lines(to + head, source + head, lines)
    copy_rows(to + done, 0, source + done, 0, 1, count - done)


@inline
def concat_block(params, to, row, count, piece, pieces):
    """Copies `count` rows of every source, or of each the `piece`-th of equal parts, to the output from `to` on."""
    p = words(params)
    for j in range(p[0]):
        s = words(params + 8 * (CONCAT_HEAD + j * CONCAT_WORDS))
        start, end = s[4] * piece // pieces, s[4] * (piece + 1) // pieces
        here, source, size = to + s[2] + start, s[0] + row * s[1] + start, end - start
        if p[4] == AROUND and size >= LONG_BYTES:
            for r in range(count):
                copy_around(here + r * s[3], source + r * s[1], size)
        else:
            copy_rows(here, s[3], source, s[1], count, size)


@inline
def weave_around(params, row0, row1):
    """concat_around for runs of a line and more: lines that one source fills go straight from there to the output.

    Only a line that is begun by one run and ended by the next is put together in L1. Against gathering all lines there:
    0.95 of the time at 8 MiB of output, 0.85 at 128 (9 interleaved rounds, two sources of 64 float32 channels).
    """
    p = words(params)
    stage = stack_words(LINE_WORDS) + VECTOR_BYTES
    to = p[7] + row0 * p[5]
    held, skip = 0, -to % VECTOR_BYTES  # bytes of a line that is begun; bytes of a run that are stored already
    s = words(params + 8 * CONCAT_HEAD)
    copy_rows(to, 0, s[0] + row0 * s[1], 0, 1, skip)
    to += skip
    for row in range(row0, row1):
        for j in range(p[0]):
            s = words(params + 8 * (CONCAT_HEAD + j * CONCAT_WORDS))
            run, size = s[0] + row * s[1], s[4]
            prefetch_read(run + ROWS_AHEAD * s[1], size)
            if held > 0:
                copy_rows(stage + held, 0, run, 0, 1, VECTOR_BYTES)
                stream_lines(to, stage, 1)
                to += VECTOR_BYTES
                skip = VECTOR_BYTES - held
            lines = (size - skip) // VECTOR_BYTES
            stream_lines(to, run + skip, lines)
            to += lines * VECTOR_BYTES
            held = size - skip - lines * VECTOR_BYTES
            if held > 0:  # the run's last line, of which the stage keeps the end
                copy_rows(stage + held - VECTOR_BYTES, 0, run + size - VECTOR_BYTES, 0, 1, VECTOR_BYTES)
            skip = 0
    copy_rows(to, 0, stage, 0, 1, held)


@inline
def concat_around(params, row0, row1):
    """Rows that lie side by side in the output, stored around the caches.

    They are gathered in L1 first: a line stored in parts costs ten times one stored whole. What does not fill a line
    waits for the next rows.
    """
    p = words(params)
    row_bytes, block = p[5], p[6]
    to = p[7] + row0 * row_bytes
    stage = stack_words(STAGE_WORDS)
    lead = to % VECTOR_BYTES  # the stage begins as far into a line as the output does
    to -= lead
    held = lead
    for row in range(row0, row1, block):
        count = min(block, row1 - row)
        concat_block(params, stage + held, row, count, 0, 1)
        for j in range(p[0]):  # comes while the stores below leave
            s = words(params + 8 * (CONCAT_HEAD + j * CONCAT_WORDS))
            prefetch_read(s[0] + (row + count) * s[1], count * s[4])
        held += count * row_bytes
        lines = held // VECTOR_BYTES
        if lines > 0:
            first = 0
            if lead > 0:
                copy_rows(to + lead, 0, stage + lead, 0, 1, VECTOR_BYTES - lead)
                first, lead = 1, 0
            skip = first * VECTOR_BYTES
            stream_lines(to + skip, stage + skip, lines - first)
            rest = held - lines * VECTOR_BYTES
            copy_rows(
                stage, 0, stage + lines * VECTOR_BYTES, 0, 1, VECTOR_BYTES
            )  # all of it: no loop over `rest` bytes
            to, held = to + lines * VECTOR_BYTES, rest
    copy_rows(to + lead, 0, stage + lead, 0, 1, held - lead)


@functools.cache
def concat_task() -> int:
    """Address of the task of a concat: a range of rows, and of each source's row one of equal pieces."""

    def concat(params, index, slot):
        p = words(params)
        rows, task_rows, pieces, staged_bytes, block = p[1], p[2], p[3], p[5], p[6]
        piece, row0 = index % pieces, index // pieces * task_rows
        row1 = min(rows, row0 + task_rows)
        if p[4] == WOVEN:
            weave_around(params, row0, row1)
        elif staged_bytes:
            concat_around(params, row0, row1)
        elif p[4] == IN_TURN:
            copy_in_turn(p[7], params + 8 * CONCAT_HEAD, p[0], row0, row1)
        else:
            to_step = words(params + 8 * CONCAT_HEAD)[3]
            for row in range(row0, row1, block):  # few rows at a time, so that the output is written from front to back
                concat_block(params, p[7] + row * to_step, row, min(block, row1 - row), piece, pieces)

    return task(concat)
