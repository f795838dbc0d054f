"""The three transforms of Winograd's convolutions on vectors of channels or filters: one patch at a time, in registers.

    y = Aᵀ[ (G g Gᵀ) ⊙ (Bᵀ d B) ]A        d: 6×6 inputs, ⊙: 36 products

    F(5×5, 2×2), F(4×4, 3×3), F(3×3, 4×4), F(2×2, 5×5)    y: m×m outputs, g: t×t taps, m + t = 7; d is the same for all

The point 0 is part of the first output alone, ∞ of the last: a tile that keeps one output less along an axis does
without ∞, one that keeps two less without 0 too. Other points, inputs and filters stay as they are.

The rows of Bᵀ and G evaluate polynomials at the points 0, ±¾, ±1½ and ∞. They are exact in binary; over data of any
kind these points give 0.4 to 0.5 of the error of the textbook's 0, ±1, ±2, ∞ for the same operations, and points nearer
to the best ones known (0, ±0.7, ±1.4) no less. Sources: Lavin and Gray, arXiv:1509.09308; Barabasz et al.,
arXiv:1803.10986.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fusionops.cpu.formats import literals
from fusionops.cpu.simd import Lanes, Tail, vector_loop, word
from fusionops.cpu.target import target

POINTS = 36  # products of a patch and of a filter
PATCH = 6  # extent of an input patch
TAPS = (2, 3, 4, 5)  # extents of filters
NEAR, FAR = 0.75, 1.5  # the finite points that are not 0, up to their sign

Vectors = list[ir.Value]


def outputs_of(taps: int) -> int:
    """Extent of the outputs of a patch."""
    return PATCH - taps + 1


def _input_1d(v: Lanes, d: Vectors, size: int) -> Vectors:
    """Bᵀd: products of (x − q) over the other points q, even and odd powers apart."""

    def f(factor: float, x: ir.Value, y: ir.Value) -> ir.Value:
        return v.multiply_add(v.constant(factor), x, y)

    near, far = NEAR**2, FAR**2
    even1, odd1 = f(-far, d[2], d[4]), f(-far, d[1], d[3])
    even2, odd2 = f(-near, d[2], d[4]), f(-near, d[1], d[3])
    return [
        f(near * far, d[0], f(-near - far, d[2], d[4])),
        f(NEAR, odd1, even1),
        f(-NEAR, odd1, even1),
        f(FAR, odd2, even2),
        f(-FAR, odd2, even2),
        f(near * far, d[1], f(-near - far, d[3], d[5])),
    ]


def _filter_1d(v: Lanes, g: Vectors, size: int) -> Vectors:
    """Gg: the filter's polynomial at each point p, divided by the product of p − q over the other points q."""

    def f(factor: float, x: ir.Value, y: ir.Value) -> ir.Value:
        return v.multiply_add(v.constant(factor), x, y)

    values = [v.b.fmul(v.constant(1 / (NEAR * FAR) ** 2), g[0])]
    for point, other in ((NEAR, FAR), (FAR, NEAR)):
        scale = 1 / (2 * point**2 * (point**2 - other**2))
        even, odd = (functools.reduce(lambda sum, x: f(point**2, sum, x), g[first::2][::-1]) for first in (0, 1))
        even = v.b.fmul(v.constant(scale), even)
        values += [f(point * scale, odd, even), f(-point * scale, odd, even)]
    return [*values, g[-1]]


def _output_1d(v: Lanes, m: Vectors, size: int) -> Vectors:
    """Aᵀm: output i sums pⁱ·m over the points p; ∞ is part of the last."""

    def f(factor: float, x: ir.Value, y: ir.Value) -> ir.Value:
        return v.multiply_add(v.constant(factor), x, y)

    b = v.b
    sum1, difference1 = b.fadd(m[1], m[2]), b.fsub(m[1], m[2])
    sum2, difference2 = b.fadd(m[3], m[4]), b.fsub(m[3], m[4])
    results = [b.fadd(b.fadd(m[0], sum1), sum2)]
    for i in range(1, size):
        near, far = (difference1, difference2) if i % 2 else (sum1, sum2)
        start = f(NEAR**i, near, m[5]) if i + 1 == size else b.fmul(v.constant(NEAR**i), near)
        results.append(f(FAR**i, far, start))
    return results


def _both_axes(v: Lanes, one_axis: Callable[[Lanes, Vectors], Vectors], values: list[Vectors]) -> list[Vectors]:
    """The transform of the columns, then of the rows; `values` are the rows of a patch."""
    columns = [one_axis(v, list(column)) for column in zip(*values, strict=True)]
    return [one_axis(v, list(row)) for row in zip(*columns, strict=True)]


def _transform(
    one_axis: Callable[[Lanes, Vectors, int], Vectors],
    extent: int | None = PATCH,
    *,
    always: int | None = None,
    keeps: bool = False,
) -> Any:
    """The code of a transform whose values beyond the first `always` of each axis (None: no value) may be missing.

    extent   values of each axis; None: `size`, a literal argument of the code
    keeps    whether rows and cols are those of the results that are kept: `size`, or without the last, or without the
             last and the first
    """

    @intrinsic(prefer_literal=True)
    def transform(typing, bits, size, to, to_row, to_col, source, row, col, rows, cols, count):
        """to[i·to_row + j·to_col + c] = transform of source[r·row + s·col + c], for each channel c < count.

        Where some may be missing, those with r ≥ rows or s ≥ cols are 0, and not read.
        """
        if not literals(bits, size):
            return None
        signature = types.void(bits, size, *[types.intp] * 9)
        count_read = extent or size.literal_value
        last = (size.literal_value if keeps else PATCH) - 1  # of the results of an axis

        def along(lanes: Lanes, vectors: Vectors) -> Vectors:
            return one_axis(lanes, vectors, size.literal_value)

        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            to, to_row, to_col, source, row, col, rows, cols, count = args[2:]
            # On AVX2 patches of two registers a value took 1.01 to 1.06 times as long in eight convolutions.
            lanes = Lanes(b, bits.literal_value, target().vector_bytes)
            to, source = lanes.pointer(to), lanes.pointer(source)
            every = ir.Constant(lanes.mask, [1] * lanes.count)

            def place(
                base: ir.Value, r: ir.Value, row: ir.Value, s: ir.Value, col: ir.Value, offset: ir.Value
            ) -> ir.Value:
                return b.gep(base, [b.add(b.add(b.mul(row, r), b.mul(col, s)), offset)])

            # A first row or column that is not kept goes where the second goes, a last column where the one before it
            # goes; those are stored later. A last row lies behind the others.
            to_rows = to_cols = [word(i) for i in range(last + 1)]
            if keeps:
                above, left = (b.ashr(b.sub(word(last + 1), kept), word(1)) for kept in (rows, cols))
                to_rows = [word(0), *(b.sub(word(i), above) for i in range(1, last + 1))]
                to_cols = [word(0), *(b.sub(word(i), left) for i in range(1, last)), b.sub(cols, word(1))]

            def value(r: int, s: int, offset: ir.Value, tail: Tail | None) -> ir.Value:
                where = place(source, word(r), row, word(s), col, offset)
                if always is None or (r < always and s < always):
                    return lanes.load_part(where, tail)
                inside = b.and_(b.icmp_signed(">", rows, word(r)), b.icmp_signed(">", cols, word(s)))
                there = every if tail is None else tail.mask
                return lanes.masked_load(where, b.select(inside, there, ir.Constant(there.type, None)))

            def body(offset: ir.Value, tail: Tail | None) -> None:
                values = [[value(r, s, offset, tail) for s in range(count_read)] for r in range(count_read)]
                results = _both_axes(lanes, along, values)
                for i in range(last + 1):
                    for j in (last, *range(last)):
                        where = place(to, to_rows[i], to_row, to_cols[j], to_col, offset)
                        lanes.store_part(results[i][j], where, tail)

            vector_loop(b, lanes, count, body)
            return context.get_dummy_value()

        return signature, codegen

    return transform


whole_input_transform = _transform(_input_1d)  # size: PATCH
part_input_transform = _transform(_input_1d, always=outputs_of(max(TAPS)))
filter_transform = _transform(_filter_1d, None)  # size: taps
output_transform = _transform(_output_1d, keeps=True)  # size: outputs
