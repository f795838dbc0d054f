"""The innermost loop of a product as x86 instructions. Chooses nothing and knows no arrays.

    for d < depth:   sums[i, j] += A[i][d] · B[d·b_pitch + j]      i < rows, j < vectors

LLVM has too few general registers for one pointer to each of 14 pixels: it reloads half of them at every step, so that
loads, not multiply-adds, set the pace; given fewer pointers it moves all loads to the front and spills sums. Here rows
that are evenly spaced are reached from every third one, and pointers move once in UNROLL steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.binding
from llvmlite import ir

from fusionops.cpu.simd import I64, VECTOR_BYTES, Lanes, word
from fusionops.cpu.target import Target

UNROLL = 4
ANCHOR_ROWS = 3  # x86 adds 0, 1 or 2 times a register to an address; 4 times would reach rows that others reach too
MOST_POINTERS = 7  # rows that are not evenly spaced: with more, none of 15 registers is left for the rest
PREFETCH_ROWS = 8  # rows of B ahead: what an address can multiply the step by


def can_multiply(target: Target, rows: int, *, even: bool) -> bool:
    """Whether `Segment` exists for this processor and so many rows."""
    return target.is_x86 and target.fma and target.vector_bytes >= 32 and (even or rows <= MOST_POINTERS)


class Segment:
    """The loop over one run of channels, bound to an IR builder.

    rows, vectors   pixels, and vectors of the processor's own width in a row of B
    even            whether the rows of A lie evenly spaced
    apart           whether the rows of B do not follow one another, nor those asked for
    """

    def __init__(self, lanes: Lanes, rows: int, vectors: int, *, even: bool, apart: bool = False) -> None:
        llvmlite.binding.initialize_native_asmparser()  # which turns text into instructions; cheap when done already
        self.lanes, self.rows, self.vectors, self.even, self.apart = lanes, rows, vectors, even, apart

    def __call__(
        self, sums: Sequence[ir.Value], a: ir.Value, offsets: Sequence[ir.Value] | ir.Value, panel: ir.Value,
        b_step: ir.Value, depth: ir.Value, ahead: ir.Value, ahead_step: ir.Value, near: ir.Value,
    ) -> tuple[list[ir.Value], ir.Value, ir.Value]:  # fmt: skip
        """The sums, and `ahead` and `near` advanced. Addresses and steps in bytes.

        offsets   of each row from a; of the second row where they are even
        ahead     asked for in L2: every second step the lines of two rows of B; it moves by twice ahead_step. Where
                  rows are apart, every step those of one
        near      asked for in L1: as many bytes as the rows of A have
        """
        b, rows = self.lanes.b, self.rows
        ahead_step = ahead_step if self.apart else b.add(ahead_step, ahead_step)
        if self.even:
            anchors = range(0, rows, ANCHOR_ROWS)
            starts = [b.add(a, b.mul(offsets, word(i))) if i else a for i in anchors]
            fixed = [offsets, b_step, ahead_step]
        else:
            starts = [b.add(a, offset) for offset in offsets]
            fixed = [b_step, ahead_step]
        moving = [*starts, panel, depth, ahead, near]
        temporaries = self.vectors + self._elements
        vector, text = self.lanes.type, self._text(len(starts))
        outputs = [vector] * len(sums) + [I64] * len(moving) + [vector] * temporaries
        kind = "v" if self.lanes.count * self.lanes.item_bytes == 64 else "x"
        constraints = [f"=&{kind}"] * len(sums) + ["=&r"] * len(moving) + [f"=&{kind}"] * temporaries
        constraints += [str(k) for k in range(len(sums) + len(moving))] + ["r"] * len(fixed)
        constraints += ["~{memory}", "~{dirflag}", "~{fpsr}", "~{flags}"]
        arguments = [*sums, *moving, *fixed]
        signature = ir.FunctionType(ir.LiteralStructType(outputs), [value.type for value in arguments])
        result = b.call(ir.InlineAsm(signature, text, ",".join(constraints), side_effect=True), arguments)
        last = len(sums) + len(moving)
        return [b.extract_value(result, i) for i in range(len(sums))], *(
            b.extract_value(result, i) for i in (last - 2, last - 1)
        )

    @property
    def _elements(self) -> int:
        """Registers for elements of A: as many as sums and a row of B leave free, up to two."""
        registers = 32 if self.lanes.count * self.lanes.item_bytes == 64 else 16
        return min(2, registers - self.rows * self.vectors - self.vectors)

    def _text(self, starts: int) -> str:
        """Operands are numbered: sums, starts, panel, depth, ahead, near, temporaries, those again as inputs, fixed."""
        count, row_bytes = self.rows * self.vectors, self.vectors * self.lanes.count * self.lanes.item_bytes
        at_start, size = count, self.lanes.item_bytes
        panel, depth, ahead, near = (f"${at_start + starts + k}" for k in range(4))
        first = at_start + starts + 4
        row = [f"${first + j}" for j in range(self.vectors)]
        elements = [f"${first + self.vectors + k}" for k in range(self._elements)]
        fixed = first + self.vectors + self._elements + count + starts + 4
        names = [f"${fixed + k}" for k in range(3 if self.even else 2)]
        *spacing, b_step, ahead_step = names
        suffix = "ps" if size == 4 else "pd"
        bytes_of_vector = self.lanes.count * size
        embeds = bytes_of_vector == 64 and self.vectors == 2

        def element(i: int, u: int) -> str:
            anchor, times = divmod(i, ANCHOR_ROWS) if self.even else (i, 0)
            return f"{u * size}(${at_start + anchor}" + (f",{spacing[0]},{times})" if times else ")")

        def step(u: int) -> list[str]:
            lines = [f"vmovu{suffix} {j * bytes_of_vector}({panel}), {row[j]}" for j in range(self.vectors)]
            for i in range(self.rows):
                targets = [f"{row[j]}, ${i * self.vectors + j}" for j in range(self.vectors)]
                # Two uses of an element as operands in memory take two instructions; a load and two uses, three.
                # Not where the address has two registers, which the processor splits again.
                if embeds and i % ANCHOR_ROWS == 0:
                    x = f"{element(i, u)}{{1to{self.lanes.count}}}"
                else:
                    x = elements[i % len(elements)]
                    lines.append(f"vbroadcasts{suffix[1]} {element(i, u)}, {x}")
                lines += [f"vfmadd231{suffix} {x}, {target}" for target in targets]
            return lines

        def steps(n: int) -> list[str]:
            lines = [f"prefetcht0 {line}({near})" for line in range(0, n * self.rows * size, VECTOR_BYTES)]
            lines.append(f"addq $${-(-n * self.rows * size // VECTOR_BYTES) * VECTOR_BYTES}, {near}")
            for u in range(n):
                if not self.apart:  # rows apart may fall into a few sets of L1, which do not keep so many for long
                    lines += [f"prefetcht0 {line}({panel},{b_step},{PREFETCH_ROWS})"
                              for line in range(0, row_bytes, VECTOR_BYTES)]  # fmt: skip
                if self.apart or u % 2:
                    asked = row_bytes if self.apart else 2 * row_bytes
                    lines += [f"prefetcht1 {line}({ahead})" for line in range(0, asked, VECTOR_BYTES)]
                    lines.append(f"addq {ahead_step}, {ahead}")
                lines += step(u)
                lines.append(f"addq {b_step}, {panel}")
            return [*lines, *(f"addq $${n * size}, ${at_start + k}" for k in range(starts))]

        return "\n\t".join([
            f"subq $${UNROLL}, {depth}", "jb 2f",
            "1:", *steps(UNROLL), f"subq $${UNROLL}, {depth}", "jae 1b",
            f"2: addq $${UNROLL}, {depth}", "je 4f",
            "3:", *steps(1), f"decq {depth}", "jne 3b",
            "4:",
        ])  # fmt: skip
