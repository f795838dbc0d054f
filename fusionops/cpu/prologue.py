"""Tile loads for the CPU backend: upsampling, weights and the merge in one pass over a tile, from any strides.

Writes packed tiles [row][column][channel]; positions outside the map are left unwritten, because no tap that falls
there is ever multiplied. Contains no arithmetic on filters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import params as at
from fusionops.cpu.jit import procedure, spliced
from fusionops.cpu.simd import VECTOR_BYTES, Lanes, doubles, elements, prefetch_read, word, words
from fusionops.cpu.transpose import BLOCK_WORDS, stack_words, transpose_block


def vector_loop(b: ir.IRBuilder, lanes: Lanes, count: ir.Value, body: Any) -> None:
    """body(offset, mask) over `count` elements: whole vectors with mask None, then one masked one."""
    whole = b.sdiv(count, word(lanes.count))
    with cgutils.for_range(b, whole) as v:
        body(b.mul(v.index, word(lanes.count)), None)
    done = b.mul(whole, word(lanes.count))
    rest = b.sub(count, done)
    with b.if_then(b.icmp_signed(">", rest, word(0))):
        body(done, lanes.tail_mask(rest))


@intrinsic(prefer_literal=True)
def merge_rows(typing, bits, to, to_step, source, step, rows, count, weight, factor, weights, accumulate):
    """to[r·to_step + i] (+)= source[r·step + i] · (1 | factor | weights[i]), i < count, r < rows.

    Products and sums are rounded one by one. `weight` is one of WEIGHT_…; `accumulate` says whether to add.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    signature = types.void(bits, *[types.intp] * 7, types.float64, types.intp, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, to, to_step, source, step, rows, count, weight, factor, weights, accumulate = args
        lanes = Lanes(b, bits.literal_value)
        first_to, first_source, weights = lanes.pointer(to), lanes.pointer(source), lanes.pointer(weights)
        scalar = b.fptrunc(factor, lanes.scalar) if lanes.bits == 32 else factor
        splat = lanes.splat(scalar)

        def run(kind: int, resume: bool) -> None:
            with cgutils.for_range(b, rows) as r:
                to, source = b.gep(first_to, [b.mul(r.index, to_step)]), b.gep(first_source, [b.mul(r.index, step)])

                def body(offset: ir.Value, mask: ir.Value | None) -> None:
                    def load(base: ir.Value) -> ir.Value:
                        return lanes.load_part(b.gep(base, [offset]), mask)

                    value = load(source)
                    if kind != at.WEIGHT_NONE:
                        value = b.fmul(value, splat if kind == at.WEIGHT_SCALAR else load(weights))
                    if resume:
                        value = b.fadd(load(to), value)
                    lanes.store_part(value, b.gep(to, [offset]), mask)

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


@spliced
def merge_strided(bits, to, source, step, count, weight, factor, weights, accumulate):
    """merge_rows for one run of channels that are `step` apart, element by element."""
    d, s, f = elements(bits, to), elements(bits, source), elements(bits, weights)
    for c in range(count):
        value = s[c * step]
        if weight == at.WEIGHT_SCALAR:
            value = value * factor
        elif weight == at.WEIGHT_VECTOR:
            value = value * f[c]
        if accumulate:
            value = d[c] + value
        d[c] = value


@spliced
def merge_transposed(
    bits, line, depth, row, step_c, stored_w, w_from, w_to, up_w, count, weight, factor, weights, accumulate
):
    """merge_rows for columns that lie side by side in memory: blocks of channels × columns, turned in registers.

    A block at the end of a row of the map begins earlier than it needs to, so that its loads need no mask.
    """
    item = bits // 8
    lanes = VECTOR_BYTES // item
    block = stack_words(BLOCK_WORDS)
    span = ((w_to - 1) // up_w + 1 - w_from // up_w) * item
    for c in range(0, count, lanes):
        channels = min(lanes, count - c)
        for channel in range(c + channels, min(count, c + 2 * lanes)):  # short runs that no hardware prefetcher follows
            prefetch_read(row + (w_from // up_w + channel * step_c) * item, span)
        w = w_from
        while w < w_to:
            stored = w // up_w
            start = max(0, min(stored, stored_w - lanes))
            last = min((w_to - 1) // up_w + 1, start + lanes)
            transpose_block(bits, block, row + (start + c * step_c) * item, step_c, channels,
                            min(lanes, stored_w - start))  # fmt: skip
            column = stored
            while column < last:  # all columns at once, or one that is repeated
                following, end, step = last, last, lanes
                if up_w > 1:
                    following, end, step = column + 1, min(w_to, (column + 1) * up_w), 0
                merge_rows(bits, line + ((w - w_from) * depth + c) * item, depth,
                           block + (column - start) * lanes * item, step, end - w, channels,
                           weight, factor, weights + c * item, accumulate)  # fmt: skip
                column, w = following, end


@spliced
def merge_line(
    bits, line, depth, row, step_w, step_c, stored_w, w_from, w_to, up_w, count, weight, factor, weights, accumulate
):
    """One row of a tile from one source, which starts at `row`, in whatever order it is stored."""
    item = bits // 8
    if step_c != 1 and step_w == 1:
        merge_transposed(bits, line, depth, row, step_c, stored_w, w_from, w_to, up_w, count,
                         weight, factor, weights, accumulate)  # fmt: skip
    elif step_c != 1:
        number = rounded(bits, factor)
        for w in range(w_from, w_to):
            merge_strided(bits, line + (w - w_from) * depth * item, row + w // up_w * step_w * item, step_c, count,
                          weight, number, weights, accumulate)  # fmt: skip
    else:
        is_one_run = up_w == 1 and count == depth and step_w == depth and weight != at.WEIGHT_VECTOR
        w = w_from
        while w < w_to:  # all pixels at once, or one that is repeated, up_w times but at the tile's edges
            stored, end, step = w // up_w, w_to, step_w
            if up_w > 1:
                end, step = min(w_to, (stored + 1) * up_w), 0
            rows, run = (1, (end - w) * depth) if is_one_run else (end - w, count)
            merge_rows(bits, line + (w - w_from) * depth * item, depth, row + stored * step_w * item, step, rows, run,
                       weight, factor, weights, accumulate)  # fmt: skip
            w = end


@functools.cache
def tile_loader(bits: int) -> Callable[..., None]:
    """The procedure that loads a merged tile."""
    item = bits // 8

    def load_tile(params, to, pitch, n, h0, rows, w0, cols, c0, depth):
        """to[h - max(h0, 0)][w - max(w0, 0)][c - c0] = merged[n, h, w, c] for h0 ≤ h < h0 + rows, w0 ≤ w < w0 + cols.

        Only where h and w lie inside the map. A row of `to` has `pitch` pixels of `depth` channels.
        """
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
            weight, factor, weights = s[at.S_WEIGHT], 1.0, 0
            if weight == at.WEIGHT_SCALAR:
                factor = doubles(here)[at.S_FACTOR]
            elif weight == at.WEIGHT_VECTOR:
                weights = s[at.S_FACTOR] + (c_from - first) * item
            base = s[at.S_BASE] + (n * s[at.S_N] + (c_from - first) * s[at.S_C]) * item
            up_h, up_w, step_w = s[at.S_UP_H], s[at.S_UP_W], s[at.S_W]
            for h in range(h_from, h_to):
                if step_w == count and h + up_h < h_to:  # the next row, whose start no hardware prefetcher guesses
                    ahead = base + ((h + up_h) // up_h * s[at.S_H] + w_from // up_w * step_w) * item
                    prefetch_read(ahead, (w_to - w_from) // up_w * count * item)
                line = to + ((h - h_from) * pitch * depth + c_from - c0) * item
                merge_line(bits, line, depth, base + (h // up_h) * s[at.S_H] * item, step_w, s[at.S_C], p[at.W] // up_w,
                           w_from, w_to, up_w, count, weight, factor, weights, is_add and j > 0)  # fmt: skip

    return procedure(load_tile, bits)


@intrinsic(prefer_literal=True)
def rounded(typing, bits, value):
    """A float64 as the element type."""
    if not isinstance(bits, types.IntegerLiteral):
        return None
    kind = types.float32 if bits.literal_value == 32 else types.float64

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.fptrunc(args[1], ir.FloatType()) if bits.literal_value == 32 else args[1]

    return kind(bits, types.float64), codegen
