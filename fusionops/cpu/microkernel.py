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


@intrinsic(prefer_literal=True)
def gemm_tile(typing, bits, mr, nv, a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner, b_inner, depth, panel,
              b_pitch, c, accumulate, ahead, ahead_step):  # fmt: skip
    """Addresses a, pixels (int64 each), panel, c; steps in elements; bits, mr and nv literal.

    ahead, ahead_step   an address asked for in L2 at each step of the reduction, and its advance in bytes
    """
    if not all(isinstance(value, types.IntegerLiteral) for value in (bits, mr, nv)):
        return None
    rows, vectors = mr.literal_value, nv.literal_value
    signature = types.void(bits, mr, nv, *[types.intp] * 16)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        (a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner, b_inner, depth, panel, b_pitch,
         c, accumulate, ahead, ahead_step) = args[3:]  # fmt: skip
        lanes = Lanes(b, bits.literal_value)
        pixel = b.inttoptr(pixels, I64.as_pointer())
        starts = [lanes.pointer(a, b.mul(b.load(b.gep(pixel, [word(i)])), pitch)) for i in range(rows)]
        B, C = lanes.pointer(panel), lanes.pointer(c)
        sums = [cgutils.alloca_once(b, lanes.type) for _ in range(rows * vectors)]  # mem2reg turns these into registers
        for s in sums:
            b.store(lanes.constant(0.0), s)
        next_line = cgutils.alloca_once_value(b, ahead)
        with cgutils.for_range(b, outer) as u, cgutils.for_range(b, inner) as v:
            a_step = b.add(b.mul(u.index, a_outer), b.mul(v.index, a_inner))
            b_step = b.add(b.mul(u.index, b_outer), b.mul(v.index, b_inner))
            heads = [b.gep(start, [a_step]) for start in starts]
            segment = b.gep(B, [b.mul(b_step, b_pitch)])
            with cgutils.for_range(b, depth) as d:
                row = b.gep(segment, [b.mul(d.index, b_pitch)])
                line = b.load(next_line)
                lanes.prefetch(lanes.pointer(line), level=2)
                b.store(b.add(line, ahead_step), next_line)
                w = [lanes.load(b.gep(row, [word(j * lanes.count)])) for j in range(vectors)]
                for i in range(rows):
                    x = lanes.splat(b.load(b.gep(heads[i], [d.index])))
                    for j in range(vectors):
                        s = sums[i * vectors + j]
                        b.store(lanes.multiply_add(x, w[j], b.load(s)), s)
        places = [b.gep(C, [word((i * vectors + j) * lanes.count)]) for i in range(rows) for j in range(vectors)]
        with b.if_else(b.icmp_signed("!=", accumulate, word(0))) as (resume, start):
            with resume:
                for s, place in zip(sums, places, strict=True):
                    lanes.store(b.fadd(lanes.load(place), b.load(s)), place)
            with start:
                for s, place in zip(sums, places, strict=True):
                    lanes.store(b.load(s), place)
        return context.get_dummy_value()

    return signature, codegen
