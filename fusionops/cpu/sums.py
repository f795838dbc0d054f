"""The sums of a register tile: how they begin, and how they leave the registers, finished or to be added to.

`mr` pixels × some vectors of filters, pixel by pixel. Knows no products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llvmlite import ir
from numba.core import cgutils

from fusionops.cpu import activation
from fusionops.cpu.simd import I64, VECTOR_BYTES, Lanes, word


class Sums:
    """Sums that begin at zero and are kept in registers."""

    def __init__(self, b: ir.IRBuilder, lanes: Lanes, rows: int, vectors: int, pitch: int | None = None) -> None:
        """pitch: vectors from one row of C to the next, where these are not all its rows have."""
        self.b, self.lanes, self.rows, self.vectors, self.pitch = b, lanes, rows, vectors, pitch or vectors
        self.sums = [cgutils.alloca_once(b, lanes.type) for _ in range(rows * vectors)]  # become registers
        for s in self.sums:
            b.store(lanes.constant(0.0), s)

    def places(self, c: ir.Value) -> list[ir.Value]:
        C = self.lanes.pointer(c)
        vectors = (i * self.pitch + j for i in range(self.rows) for j in range(self.vectors))
        return [self.b.gep(C, [word(vector * self.lanes.count)]) for vector in vectors]

    def begins_line(self, k: int) -> bool:
        """Whether sum k is the first of a cache line of its row."""
        return k % self.vectors * self.lanes.count * self.lanes.item_bytes % VECTOR_BYTES == 0

    def ask_for(self, c: ir.Value) -> None:
        """Starts the misses of `store` before the product."""
        for k, place in enumerate(self.places(c)):
            if self.begins_line(k):
                self.lanes.prefetch(place, write=True)

    def store(self, c: ir.Value) -> None:
        for s, place in zip(self.sums, self.places(c), strict=True):
            self.lanes.store(self.b.load(s), place)

    def add(self, c: ir.Value, condition: ir.Value) -> None:
        """sums += C where the condition, a word, is not 0."""
        b = self.b
        with b.if_then(b.icmp_signed("!=", condition, word(0))):
            for s, place in zip(self.sums, self.places(c), strict=True):
                b.store(b.fadd(self.lanes.load(place), b.load(s)), s)

    def _row_places(self, base: ir.Value, offsets: ir.Value) -> Iterator[tuple[int, ir.Value]]:
        """Place of each vector of row i, base + offsets[i] elements, beside its number."""
        b, table = self.b, self.b.inttoptr(offsets, I64.as_pointer())
        for i in range(self.rows):
            row = b.gep(self.lanes.pointer(base), [b.load(b.gep(table, [word(i)]))])
            for j in range(self.vectors):
                yield i * self.vectors + j, b.gep(row, [word(j * self.lanes.count)])

    def ask_for_rows(self, base: ir.Value, offsets: ir.Value, *, write: bool) -> None:
        """Starts the misses of rows that are added or written after the product; not where the base is 0."""
        with self.b.if_then(self.b.icmp_signed("!=", base, word(0))):
            for k, place in self._row_places(base, offsets):
                if self.begins_line(k):
                    self.lanes.prefetch(place, write=write)

    def ask_for_results(self, c: ir.Value, epilogue: Sequence[ir.Value]) -> None:
        """Starts the misses of `leave` before the product."""
        is_finished, _, residual, residuals, _, out, outs = epilogue
        with self.b.if_else(self.b.icmp_signed("!=", is_finished, word(0))) as (whole, part):
            with whole:
                self.ask_for_rows(out, outs, write=True)
                self.ask_for_rows(residual, residuals, write=False)
            with part:
                self.ask_for(c)

    def leave(self, c: ir.Value, accumulate: ir.Value, epilogue: Sequence[ir.Value]) -> None:
        """Where the epilogue says so, finishes the sums and those in C and stores them to the output, else to C."""
        self.add(c, accumulate)
        with self.b.if_else(self.b.icmp_signed("!=", epilogue[0], word(0))) as (whole, part):
            with whole:
                self.finish(*epilogue[1:])
            with part:
                self.store(c)

    def finish(
        self, bias: ir.Value, residual: ir.Value, residuals: ir.Value, relu: ir.Value, out: ir.Value, outs: ir.Value
    ) -> None:
        """out[outs[i] + j] = act(sums[i, j] + bias[j] + residual[residuals[i] + j]); 0 stands for what is not there."""
        b, lanes = self.b, self.lanes
        with b.if_then(b.icmp_signed("!=", bias, word(0))):
            start = lanes.pointer(bias)
            terms = [lanes.load(b.gep(start, [word(j * lanes.count)])) for j in range(self.vectors)]
            for k, s in enumerate(self.sums):
                b.store(b.fadd(b.load(s), terms[k % self.vectors]), s)
        with b.if_then(b.icmp_signed("!=", residual, word(0))):
            for k, place in self._row_places(residual, residuals):
                b.store(b.fadd(b.load(self.sums[k]), lanes.load(place)), self.sums[k])
        with b.if_then(b.icmp_signed("!=", relu, word(0))):
            for s in self.sums:
                b.store(activation.relu(lanes, b.load(s)), s)
        for k, place in self._row_places(out, outs):
            lanes.store(b.load(self.sums[k]), place)
