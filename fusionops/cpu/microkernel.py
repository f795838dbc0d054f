"""The register tile: a product of mr pixels and nv vectors of filters over segments of a reduction. Knows no edges.

    C[i, :] (+)= Σ_{u < outer} Σ_{v < inner} Σ_{d < depth}  A[pixels[i]·pitch + u·a_outer + v·a_inner + d]
                                                            · B[u·b_outer + v·b_inner + d, :]

The rows of A are any pixels of a packed tile, or the rows of a matrix; B is a micropanel of nv vectors a row, its rows
b_pitch elements apart. The sum of a call starts at zero and runs in the order written; with `accumulate` it is then
added to C. In half only the first half of each row of B, and of C, takes part: the other half is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu.assembly import Segment, can_multiply
from fusionops.cpu.formats import literals
from fusionops.cpu.simd import I64, VECTOR_BYTES, Lanes, word
from fusionops.cpu.sums import Sums
from fusionops.cpu.target import target

# Rows of B are asked for in L1 so much earlier. 14×2 vectors on operands in L2 (transformed patches and filters of a
# Winograd convolution) went from 0.49 to 0.60 of the FMA peak with the pixels of the next tile asked for, to 0.63 with
# C too, to 0.70 with B too (medians of 15 interleaved rounds in a slow phase of the machine); 32 rows were no better.
ROWS_AHEAD = 12
SEGMENT_WORDS = 3  # of a segment in the table of `gemm_segments`


class _Tile(Sums):
    """The sums of one register tile, and the two ways to add a run of channels to them."""

    def __init__(
        self, b: ir.IRBuilder, bits: int, rows: int, nv: int, half: bool, *, even: bool, gaps: bool = False
    ) -> None:
        here = target()
        in_assembly = can_multiply(here, rows, even=even) and not gaps
        row_bytes = nv * VECTOR_BYTES
        used_bytes = row_bytes // 2 if half else row_bytes
        size = min(used_bytes, here.vector_bytes if in_assembly else VECTOR_BYTES)
        lanes = Lanes(b, bits, size)
        super().__init__(b, lanes, rows, used_bytes // size, row_bytes // size)
        self.gaps = gaps
        self.segment = Segment(lanes, rows, self.vectors, even=even) if in_assembly else None
        self.even = even

    def add_segment(
        self, a: ir.Value, offsets: Any, panel: ir.Value, b_step: ir.Value, depth: ir.Value,
        ahead: ir.Value, ahead_step: ir.Value, near: ir.Value, near_step: ir.Value,
    ) -> None:  # fmt: skip
        """sums += A·B over `depth` channels; addresses and steps in bytes; ahead and near are cursors in memory."""
        b, lanes = self.b, self.lanes
        if self.segment is not None:
            results, far, close = self.segment([b.load(s) for s in self.sums], a, offsets, panel, b_step, depth,
                                               b.load(ahead), ahead_step, b.load(near))  # fmt: skip
            for value, place in zip([*results, far, close], [*self.sums, ahead, near], strict=True):
                b.store(value, place)
            return
        if self.even:
            offsets = [b.mul(offsets, word(i)) for i in range(self.rows)]
        heads = [lanes.pointer(b.add(a, offset)) for offset in offsets]
        B, size = lanes.pointer(panel), word(lanes.item_bytes)
        pitch = b.sdiv(b_step, size)
        with cgutils.for_range(b, depth) as d:
            row = b.gep(B, [b.mul(d.index, pitch)])
            for cursor, step, level in ((ahead, ahead_step, 2), (near, near_step, 1)):
                line = b.load(cursor)
                lanes.prefetch(lanes.pointer(line), level=level)
                b.store(b.add(line, step), cursor)
            later = b.gep(row, [b.mul(pitch, word(ROWS_AHEAD))])
            for j in range(self.vectors):
                lanes.prefetch(b.gep(later, [word(j * lanes.count)]))
            w = [lanes.load(b.gep(row, [word(j * lanes.count)])) for j in range(self.vectors)]
            filled = [lanes.is_filled(vector) for vector in w] if self.gaps else []
            for i in range(self.rows):
                x = lanes.splat(b.load(b.gep(heads[i], [d.index])))
                for j in range(self.vectors):
                    s = self.sums[i * self.vectors + j]
                    value = lanes.multiply_add(x, w[j], b.load(s))
                    b.store(b.select(filled[j], value, b.load(s)) if self.gaps else value, s)


def _whole_or_half(b: ir.IRBuilder, halves: int, in_half: ir.Value, product: Callable[[bool], None]) -> None:
    """Emits a product, twice where the word `in_half` tells at run time which one it is."""
    if not halves:
        product(False)
        return
    with b.if_else(b.icmp_signed("!=", in_half, word(0))) as (half, whole):
        with half:
            product(True)
        with whole:
            product(False)


@intrinsic(prefer_literal=True)
def gemm_tile(typing, bits, mr, nv, gaps, halves, in_half, a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner,
              b_inner, depth, panel, b_pitch, c, accumulate, ahead, ahead_step, near, near_step,
              is_finished, bias, residual, residuals, relu, out, outs):  # fmt: skip
    """Addresses a, pixels (int64 each), panel, c; steps in elements; bits, mr, nv, gaps and halves literal.

    halves, in_half   1 and a word that is not 0: the product is in half
    gaps    1: products with filters that are `GAP` do not enter the sum
    ahead, ahead_step   an address asked for in L2 at each step of the reduction, and its advance in bytes
    near, near_step     the same for L1
    is_finished    0: the sums go to C; else they are finished, as `Sums.finish` says, and go to the output, of which
                   there must be a whole block of filters, or half of one; addresses, and offsets of pixels in
                   elements
    """
    if not literals(bits, mr, nv, gaps, halves):
        return None
    rows = mr.literal_value
    signature = types.void(bits, mr, nv, gaps, halves, *[types.intp] * 26)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        (in_half, a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner, b_inner, depth, panel, b_pitch,
         c, accumulate, ahead, ahead_step, near, near_step, *epilogue) = args[5:]  # fmt: skip
        size = word(bits.literal_value // 8)
        pixel, pixel_step = b.inttoptr(pixels, I64.as_pointer()), b.mul(pitch, size)
        offsets = [b.mul(b.load(b.gep(pixel, [word(i)])), pixel_step) for i in range(rows)]
        cursors = [cgutils.alloca_once_value(b, first) for first in (ahead, near)]
        b_step = b.mul(b_pitch, size)

        def product(half: bool) -> None:
            tile = _Tile(b, bits.literal_value, rows, nv.literal_value, half, even=False,
                         gaps=bool(gaps.literal_value))  # fmt: skip
            tile.ask_for_results(c, epilogue)
            with cgutils.for_range(b, outer) as u, cgutils.for_range(b, inner) as v:
                a_run = b.add(b.mul(u.index, a_outer), b.mul(v.index, a_inner))
                b_run = b.add(b.mul(u.index, b_outer), b.mul(v.index, b_inner))
                tile.add_segment(b.add(a, b.mul(a_run, size)), offsets, b.add(panel, b.mul(b_run, b_step)), b_step,
                                 depth, cursors[0], ahead_step, cursors[1], near_step)  # fmt: skip
            tile.leave(c, accumulate, epilogue)

        _whole_or_half(b, halves.literal_value, in_half, product)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def gemm_rows(typing, bits, mr, nv, a, pitch, depth, panel, b_pitch, c, accumulate, ahead, ahead_step, near):
    """gemm_tile for rows of A that are `pitch` elements apart, and one segment.

    near   asked for in L1 along the way: as many bytes as the rows of A have
    mr     0: nothing is done
    """
    if not literals(bits, mr, nv):
        return None
    signature = types.void(bits, mr, nv, *[types.intp] * 10)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if mr.literal_value == 0:
            return context.get_dummy_value()
        a, pitch, depth, panel, b_pitch, c, accumulate, ahead, ahead_step, near = args[3:]
        tile = _Tile(b, bits.literal_value, mr.literal_value, nv.literal_value, half=False, even=True)
        size = word(tile.lanes.item_bytes)
        cursors = [cgutils.alloca_once_value(b, first) for first in (ahead, near)]
        tile.ask_for(c)
        tile.add_segment(a, b.mul(pitch, size), panel, b.mul(b_pitch, size), depth, cursors[0], ahead_step,
                         cursors[1], word(mr.literal_value * tile.lanes.item_bytes))  # fmt: skip
        tile.add(c, accumulate)
        tile.store(c)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def gemm_segments(typing, bits, mr, nv, halves, in_half, segments, count, row, panel, b_pitch, c, accumulate, ahead,
                  ahead_step, is_finished, bias, residual, residuals, relu, out, outs):  # fmt: skip
    """gemm_rows over `count` segments, which stand in a table of words: first row, bytes from row to row, channels.

    halves, in_half   as in `gemm_tile`
    row            of each segment, the first of the tile
    is_finished    0: the sums go to C; else they are finished, as `Sums.finish` says, and go to the output, of which
                   there must be a whole tile, or half of its filters; addresses, and offsets of rows in elements
    """
    if not literals(bits, mr, nv, halves):
        return None
    signature = types.void(bits, mr, nv, halves, *[types.intp] * 17)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        in_half, segments, count, row, panel, b_pitch, c, accumulate, ahead, ahead_step, *epilogue = args[4:]
        rows, item = mr.literal_value, bits.literal_value // 8
        b_step = b.mul(b_pitch, word(item))
        far, near, B = (cgutils.alloca_once_value(b, first) for first in (ahead, ahead, panel))
        table = b.inttoptr(segments, I64.as_pointer())

        def product(half: bool) -> None:
            tile = _Tile(b, bits.literal_value, rows, nv.literal_value, half, even=True)
            tile.ask_for_results(c, epilogue)
            with cgutils.for_range(b, count) as n:
                first, step, depth = (
                    b.load(b.gep(table, [b.add(b.mul(n.index, word(SEGMENT_WORDS)), word(k))])) for k in range(3)
                )
                start = b.add(first, b.mul(row, step))
                b.store(b.add(start, b.mul(step, word(rows))), near)
                here = b.load(B)
                tile.add_segment(start, step, here, b_step, depth, far, ahead_step, near, word(rows * item))
                b.store(b.add(here, b.mul(depth, b_step)), B)
            tile.leave(c, accumulate, epilogue)

        _whole_or_half(b, halves.literal_value, in_half, product)
        return context.get_dummy_value()

    return signature, codegen
