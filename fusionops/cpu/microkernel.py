"""The register tile: a product of mr pixels and nv vectors of filters over segments of a reduction. Knows no edges.

    C[i, :] (+)= Σ_{u < outer} Σ_{v < inner} Σ_{d < depth}  A[pixels[i]·pitch + u·a_outer + v·a_inner + d]
                                                            · B[u·b_outer + v·b_inner + d, :]

The rows of A are any pixels of a packed tile; B is a micropanel of nv vectors a row, its rows b_pitch elements apart.
The sum of a call starts at zero and runs in the order written; with `accumulate` it is then added to C.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu.simd import I64, Lanes, word

# Rows of B are asked for in L1 so much earlier. 14×2 vectors on operands in L2 (transformed patches and filters of a
# Winograd convolution) went from 0.49 to 0.60 of the FMA peak with the pixels of the next tile asked for, to 0.63 with
# C too, to 0.70 with B too (medians of 15 interleaved rounds in a slow phase of the machine); 32 rows were no better.
ROWS_AHEAD = 12


@intrinsic(prefer_literal=True)
def gemm_tile(typing, bits, mr, nv, a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner, b_inner, depth, panel,
              b_pitch, c, accumulate, ahead, ahead_step, near, near_step):  # fmt: skip
    """Addresses a, pixels (int64 each), panel, c; steps in elements; bits, mr and nv literal.

    ahead, ahead_step   an address asked for in L2 at each step of the reduction, and its advance in bytes
    near, near_step     the same for L1
    """
    if not all(isinstance(value, types.IntegerLiteral) for value in (bits, mr, nv)):
        return None
    rows, vectors = mr.literal_value, nv.literal_value
    signature = types.void(bits, mr, nv, *[types.intp] * 18)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        (a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner, b_inner, depth, panel, b_pitch,
         c, accumulate, ahead, ahead_step, near, near_step) = args[3:]  # fmt: skip
        lanes = Lanes(b, bits.literal_value)
        pixel = b.inttoptr(pixels, I64.as_pointer())
        starts = [lanes.pointer(a, b.mul(b.load(b.gep(pixel, [word(i)])), pitch)) for i in range(rows)]
        B, C = lanes.pointer(panel), lanes.pointer(c)
        sums = [cgutils.alloca_once(b, lanes.type) for _ in range(rows * vectors)]  # mem2reg turns these into registers
        for s in sums:
            b.store(lanes.constant(0.0), s)
        lines = [(cgutils.alloca_once_value(b, first), step, level)
                 for first, step, level in ((ahead, ahead_step, 2), (near, near_step, 1))]  # fmt: skip
        places = [b.gep(C, [word((i * vectors + j) * lanes.count)]) for i in range(rows) for j in range(vectors)]
        for place in places:
            lanes.prefetch(place, write=True)
        with cgutils.for_range(b, outer) as u, cgutils.for_range(b, inner) as v:
            a_step = b.add(b.mul(u.index, a_outer), b.mul(v.index, a_inner))
            b_step = b.add(b.mul(u.index, b_outer), b.mul(v.index, b_inner))
            heads = [b.gep(start, [a_step]) for start in starts]
            segment = b.gep(B, [b.mul(b_step, b_pitch)])
            with cgutils.for_range(b, depth) as d:
                row = b.gep(segment, [b.mul(d.index, b_pitch)])
                for cursor, step, level in lines:
                    line = b.load(cursor)
                    lanes.prefetch(lanes.pointer(line), level=level)
                    b.store(b.add(line, step), cursor)
                later = b.gep(row, [b.mul(b_pitch, word(ROWS_AHEAD))])
                for j in range(vectors):
                    lanes.prefetch(b.gep(later, [word(j * lanes.count)]))
                w = [lanes.load(b.gep(row, [word(j * lanes.count)])) for j in range(vectors)]
                for i in range(rows):
                    x = lanes.splat(b.load(b.gep(heads[i], [d.index])))
                    for j in range(vectors):
                        s = sums[i * vectors + j]
                        b.store(lanes.multiply_add(x, w[j], b.load(s)), s)
        with b.if_else(b.icmp_signed("!=", accumulate, word(0))) as (resume, start):
            with resume:
                for s, place in zip(sums, places, strict=True):
                    lanes.store(b.fadd(lanes.load(place), b.load(s)), place)
            with start:
                for s, place in zip(sums, places, strict=True):
                    lanes.store(b.load(s), place)
        return context.get_dummy_value()

    return signature, codegen
