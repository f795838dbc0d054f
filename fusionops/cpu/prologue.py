"""Tile loads for the CPU backend: upsampling, weights and the merge in one pass over a tile, from any strides.

Writes packed tiles [row][column][channel]; positions outside the map are left as they are: those who multiply
them clear them first. Contains no arithmetic on filters.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import params as at
from fusionops.cpu.formats import Stored, literals, load_element, round_element, store_element
from fusionops.cpu.jit import inline, spliced, task
from fusionops.cpu.simd import (
    VECTOR_BYTES,
    Lanes,
    Tail,
    call,
    doubles,
    elements,
    prefetch_read,
    vector_loop,
    word,
    words,
)
from fusionops.cpu.transpose import BLOCK_WORDS, stack_words, transpose_block


@intrinsic(prefer_literal=True)
def merge_rows(
    typing, bits, kept, rounding, stored, to, to_step, source, step, rows, count, weight, factor, weights, accumulate
):
    """to[r·to_step + i] (+)= source[r·step + i] · (1 | factor | weights[i]), i < count, r < rows.

    Products and sums are rounded one by one, to the format `rounding`. The source is in the format `stored`, the result
    in `kept`. `weight` is one of WEIGHT_…; `accumulate` says whether to add.
    """
    if not literals(bits, kept, rounding, stored):
        return None
    signature = types.void(bits, kept, rounding, stored, *[types.intp] * 7, types.float64, types.intp, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, to_step, source, step, rows, count, weight, factor, weights, accumulate = args[4:]
        lanes = Lanes(b, bits.literal_value)
        here, rounded, there = (Stored(lanes, kind.literal_value) for kind in (kept, rounding, stored))
        first_to, first_source, weights = here.pointer(to), there.pointer(source), lanes.pointer(weights)
        scalar = b.fptrunc(factor, lanes.scalar) if lanes.bits == 32 else factor
        splat = lanes.splat(scalar)

        def run(kind: int, resume: bool) -> None:
            with cgutils.for_range(b, rows) as r:
                to, source = b.gep(first_to, [b.mul(r.index, to_step)]), b.gep(first_source, [b.mul(r.index, step)])

                def body(offset: ir.Value, tail: Tail | None) -> None:
                    value = there.load(b.gep(source, [offset]), tail)
                    if kind != at.WEIGHT_NONE:
                        each = splat if kind == at.WEIGHT_SCALAR else lanes.load_part(b.gep(weights, [offset]), tail)
                        value = rounded.round(b.fmul(value, each))
                    if resume:
                        value = rounded.round(b.fadd(here.load(b.gep(to, [offset]), tail), value))
                    here.store(value, b.gep(to, [offset]), tail)

                vector_loop(b, lanes, count, body)

        for kind in (at.WEIGHT_NONE, at.WEIGHT_SCALAR, at.WEIGHT_VECTOR):
            with b.if_then(b.icmp_signed("==", weight, word(kind))):
                resumes = b.icmp_signed("!=", accumulate, word(0))
                with b.if_else(resumes) as (again, first):
                    with again:
                        run(kind, True)
                    with first:
                        run(kind, False)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def add_rows(typing, bits, kept, stored, to, to_step, source, step, rows, count, accumulate):
    """merge_rows without weights, of one element at least: to[r·to_step + i] (+)= source[r·step + i], sums rounded.

    Where elements are stored as they are computed with, a row is taken by the largest power of two of elements in it,
    up to a vector, and the last part of it ends where the row does and may overlap the one before: no vector is masked.
    """
    if not literals(bits, kept, stored):
        return None
    signature = types.void(bits, kept, stored, *[types.intp] * 7)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, to_step, source, step, rows, count, accumulate = args[3:]
        whole = Lanes(b, bits.literal_value)

        def run(lanes: Lanes, resume: bool) -> None:
            here, there = Stored(lanes, kept.literal_value), Stored(lanes, stored.literal_value)
            with cgutils.for_range(b, rows) as r:
                line = b.gep(here.pointer(to), [b.mul(r.index, to_step)])
                row = b.gep(there.pointer(source), [b.mul(r.index, step)])

                def value(offset: ir.Value, tail: Tail | None = None) -> ir.Value:
                    loaded = there.load(b.gep(row, [offset]), tail)
                    return there.round(b.fadd(here.load(b.gep(line, [offset]), tail), loaded)) if resume else loaded

                def move(offset: ir.Value, tail: Tail | None) -> None:
                    here.store(value(offset, tail), b.gep(line, [offset]), tail)

                if there.is_narrow:
                    vector_loop(b, lanes, count, move)
                else:
                    end = b.sub(count, word(lanes.count))
                    last = value(end) if resume else None  # before the part that it overlaps is stored
                    with cgutils.for_range(b, b.sdiv(b.sub(count, word(1)), word(lanes.count))) as part:
                        move(b.mul(part.index, word(lanes.count)), None)
                    here.store(last or value(end), b.gep(line, [end]))

        def by_parts(elements: int, resume: bool) -> None:
            with b.if_else(b.icmp_signed(">=", count, word(elements))) as (these, fewer):
                with these:
                    run(Lanes(b, whole.bits, elements * whole.item_bytes), resume)
                with fewer:
                    if elements > 1:
                        by_parts(elements // 2, resume)

        with b.if_else(b.icmp_signed("!=", accumulate, word(0))) as branches:
            for branch, resume in zip(branches, (True, False), strict=True):
                with branch:
                    if Stored(whole, stored.literal_value).is_narrow:
                        run(whole, resume)
                    else:
                        by_parts(whole.count, resume)
        return context.get_dummy_value()

    return signature, codegen


@spliced
def merge_strided(bits, kept, stored, to, source, step, count, weight, factor, weights, accumulate):
    """merge_rows for one run of channels that are `step` apart, element by element."""
    f = elements(bits, weights)
    for c in range(count):
        value = load_element(stored, source, c * step)
        if weight == at.WEIGHT_SCALAR:
            value = round_element(stored, value * factor)
        elif weight == at.WEIGHT_VECTOR:
            value = round_element(stored, value * f[c])
        if accumulate:
            value = round_element(stored, load_element(kept, to, c) + value)
        store_element(kept, to, c, value)


@spliced
def merge_transposed(
    bits, kept, stored, line, depth, row, step_c, stored_w, w_from, w_to, up_w, count, weight, factor, weights,
    accumulate,
):  # fmt: skip
    """merge_rows for columns that lie side by side in memory: blocks of channels × columns, turned in registers.

    A block at the end of a row of the map begins earlier than it needs to, so that its loads need no mask.
    """
    item, size = bits // 8, stored // 8
    lanes = VECTOR_BYTES // item
    block = stack_words(BLOCK_WORDS)
    is_plain = kept == bits and up_w == 1 and weight == at.WEIGHT_NONE and not accumulate
    span = ((w_to - 1) // up_w + 1 - w_from // up_w) * size
    for c in range(0, count, lanes):
        channels = min(lanes, count - c)
        for channel in range(c + channels, min(count, c + 2 * lanes)):  # short runs that no hardware prefetcher follows
            prefetch_read(row + (w_from // up_w + channel * step_c) * size, span)
        w = w_from
        while w < w_to:
            column = w // up_w
            start = max(0, min(column, stored_w - lanes))
            last = min((w_to - 1) // up_w + 1, start + lanes)
            is_finished = is_plain and channels == lanes and start == w and w + lanes <= w_to
            to, to_step = block, lanes
            if is_finished:
                to, to_step = line + ((w - w_from) * depth + c) * item, depth
            transpose_block(bits, stored, to, to_step, row + (start + c * step_c) * size, step_c, channels,
                            min(lanes, stored_w - start))  # fmt: skip
            if is_finished:
                w += lanes
                continue
            while column < last:  # all columns at once, or one that is repeated
                following, end, step = last, last, lanes
                if up_w > 1:
                    following, end, step = column + 1, min(w_to, (column + 1) * up_w), 0
                merge_rows(bits, kept, stored, bits, line + ((w - w_from) * depth + c) * (kept // 8), depth,
                           block + (column - start) * lanes * item, step, end - w, channels,
                           weight, factor, weights + c * item, accumulate)  # fmt: skip
                column, w = following, end


@spliced
def merge_runs(
    bits, kept, stored, is_plain, line, depth, row, step_w, w_from, w_to, up_w, count, weight, factor, weights,
    accumulate,
):  # fmt: skip
    """merge_line for channels side by side; is_plain: without weights."""
    item, size = kept // 8, stored // 8
    is_one_run = up_w == 1 and count == depth and step_w == depth and weight != at.WEIGHT_VECTOR
    w = w_from
    while w < w_to:  # all pixels at once, or one that is repeated, up_w times but at the tile's edges
        column, end, step = w // up_w, w_to, step_w
        if up_w > 1:
            end, step = min(w_to, (column + 1) * up_w), 0
        rows, run = (1, (end - w) * depth) if is_one_run else (end - w, count)
        to, source = line + (w - w_from) * depth * item, row + column * step_w * size
        if is_plain:
            add_rows(bits, kept, stored, to, depth, source, step, rows, run, accumulate)
        else:
            merge_rows(bits, kept, stored, stored, to, depth, source, step, rows, run, weight, factor, weights,
                       accumulate)  # fmt: skip
        w = end


@spliced
def merge_line(
    bits, kept, stored, line, depth, row, step_w, step_c, stored_w, w_from, w_to, up_w, count, weight, factor, weights,
    accumulate,
):  # fmt: skip
    """One row of a tile from one source, which starts at `row`, in whatever order it is stored."""
    item, size = kept // 8, stored // 8
    if step_c != 1 and step_w == 1:
        merge_transposed(bits, kept, stored, line, depth, row, step_c, stored_w, w_from, w_to, up_w, count,
                         weight, factor, weights, accumulate)  # fmt: skip
    elif step_c != 1:
        number = round_element(bits, factor)
        for w in range(w_from, w_to):
            merge_strided(bits, kept, stored, line + (w - w_from) * depth * item, row + w // up_w * step_w * size,
                          step_c, count, weight, number, weights, accumulate)  # fmt: skip
    else:
        merge_runs(bits, kept, stored, False, line, depth, row, step_w, w_from, w_to, up_w, count, weight, factor,
                   weights, accumulate)  # fmt: skip


@inline
def load_tile(params, to, pitch, n, h0, rows, w0, cols, c0, depth):
    """to[h - max(h0, 0)][w - max(w0, 0)][c - c0] = merged[n, h, w, c] for h0 ≤ h < h0 + rows, w0 ≤ w < w0 + cols.

    Only where h and w lie inside the map. A row of `to` has `pitch` pixels of `depth` channels.
    """
    call(words(params)[at.LOAD_TILE], params, to, pitch, n, h0, rows, w0, cols, c0, depth)


@functools.cache
def tile_loader(bits: int, kept: int, stored: int, is_plain: bool) -> int:
    """Address of the code of `load_tile`: what is stored in one format is kept in another.

    is_plain   whether channels lie side by side and have no weights; compiles in less than half the time
    """
    item, size = kept // 8, stored // 8

    def load(params, to, pitch, n, h0, rows, w0, cols, c0, depth):
        p = words(params)
        is_add = p[at.IS_ADD]
        h_from, h_to = max(h0, 0), min(h0 + rows, p[at.H])
        w_from, w_to = max(w0, 0), min(w0 + cols, p[at.W])
        if w_from >= w_to:
            return
        for j in range(p[at.SOURCE_COUNT]):
            here = params + 8 * (at.SOURCES + j * at.SOURCE_WORDS)
            s = words(here)
            first = 0 if is_add else s[at.S_FIRST]
            c_from, c_to = max(c0, first), min(c0 + depth, first + s[at.S_CHANNELS])
            count = c_to - c_from
            if count <= 0:
                continue
            base = s[at.S_BASE] + (n * s[at.S_N] + (c_from - first) * s[at.S_C]) * size
            up_h, up_w, step_w = s[at.S_UP_H], s[at.S_UP_W], s[at.S_W]
            for h in range(h_from, h_to):
                if step_w == count and h + up_h < h_to:  # the next row, whose start no hardware prefetcher guesses
                    ahead = base + ((h + up_h) // up_h * s[at.S_H] + w_from // up_w * step_w) * size
                    prefetch_read(ahead, (w_to - w_from) // up_w * count * size)
                elif not is_plain and step_w == 1 and s[at.S_C] != 1 and h + up_h < h_to:
                    ahead = base + ((h + up_h) // up_h * s[at.S_H] + w_from // up_w) * size
                    for channel in range(min(VECTOR_BYTES // (bits // 8), count)):
                        prefetch_read(ahead + channel * s[at.S_C] * size, ((w_to - w_from) // up_w + 1) * size)
                line = to + ((h - h_from) * pitch * depth + c_from - c0) * item
                row = base + (h // up_h) * s[at.S_H] * size
                if is_plain:
                    merge_runs(bits, kept, stored, True, line, depth, row, step_w, w_from, w_to, up_w, count,
                               at.WEIGHT_NONE, 1.0, 0, is_add and j > 0)  # fmt: skip
                else:
                    weight, factor, weights = s[at.S_WEIGHT], 1.0, 0
                    if weight == at.WEIGHT_SCALAR:
                        factor = doubles(here)[at.S_FACTOR]
                    elif weight == at.WEIGHT_VECTOR:
                        weights = s[at.S_FACTOR] + (c_from - first) * (bits // 8)
                    merge_line(bits, kept, stored, line, depth, row, step_w, s[at.S_C], p[at.W] // up_w, w_from, w_to,
                               up_w, count, weight, factor, weights, is_add and j > 0)  # fmt: skip

    return task(load)
