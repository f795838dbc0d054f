"""Sums of outer products: few pixels with many filters, or few filters with many pixels. Chooses no extents.

    sums[m, k] += Σ_c A[m, c] · B[c, k]      m < rows, c < channels, k < count

B is large and read once; its rows lie apart. Every sum runs in the order of c, so both ways to compute them have the
same bits. With 32 registers of 64 bytes a tile of sums stays in registers for all channels (`_add_tiles`). Where there
are fewer, or shorter ones, some rows of B are read side by side instead, vector by vector, and sums stay in L1
(`_add_vectors`): with register tiles, 1 to 24 rows of 1024 channels and filters took 1.0 to 1.3 times as long on AVX2.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu.assembly import Segment, can_multiply
from fusionops.cpu.jit import inline
from fusionops.cpu.simd import I64, VECTOR_BYTES, Lanes, Tail, elements, vector_loop, word
from fusionops.cpu.target import target
from fusionops.cpu.transpose import stack_words

IN_TILES = target().vector_bytes == VECTOR_BYTES and target().vector_registers >= 32

# Of a tile of a product with few pixels: more are faster as `gemm_task` computes them. In tiles 28 to 48 rows took 0.92
# to 0.97 of its time (AVX-512, 256 to 1024 channels and filters), 64 and 128 rows 0.99 to 1.3; vector by vector 20 rows
# 0.25 to 0.8, 32 rows 1.0 to 1.16 (AVX2, 512 to 2048 channels).
MOST_PIXELS = 48 if IN_TILES else 24

# Channels at a time: sums are read and written once for as many rows of B, and the next ones are on their way to L2
# meanwhile. With 16 eight dense layers took 1.02 times as long (geometric mean), asking for half as many rows 1.05.
CHANNELS = 32
# Vectors of B that so many rows of A are multiplied with in registers, then what blocks leave over: powers of two, of
# which blocks consist; three for 8 rows took 1.02 times as long in thirteen dense layers. Rows of A are cut into equal
# groups: nine as 8 + 1 took 1.2 times as long as 5 + 4.
TILES = {1: (16, 4, 1), 2: (8, 2, 1), 3: (8, 1), 4: (4, 1), 5: (4, 1), 6: (4, 1), 7: (2, 1), 8: (2, 1)}
MOST_ROWS = max(TILES)
# So few rows wait for B, and more where each of its vectors lies in two cache lines, as NumPy's large arrays do: one to
# four took 1.1 to 1.5 times as long. They begin at a line, in lanes of which some belong to none of their filters.
FEW_ROWS = 4

# Vector by vector: rows of B side by side, which a quarter of the registers hold. With twice as many the lines asked
# for ahead no longer fit L1: 1.1 times as long over ten dense layers of 1 to 24 rows.
TOGETHER = min(8, target().vector_registers * target().vector_bytes // 128)
AHEAD = 64 // TOGETHER  # vectors of each row; half as far took 1.02 of the time
ROWS_AT_ONCE = 4  # of A; 2 took 1.02 of the time
# What remains has a loop of its own. So many keep their elements in registers and load the filters as they go: 0.73 to
# 0.92 of the time in the loop of those before them. Three keep the filters instead, 0.73 to 0.85 (AVX2).
FEWEST_ROWS = 2
NEAR_WORDS = MOST_PIXELS * TOGETHER
NEAR_BYTES = 2 * VECTOR_BYTES  # rows of A that lie no farther apart are read where they are


@intrinsic(prefer_literal=True)
def _add_tiles(typing, bits, rows, channels, a, a_step, row, row_step, ahead, count, sums, sums_step):
    """Addresses and steps in bytes; bits literal. See `add_outer_products`."""
    if not isinstance(bits, types.IntegerLiteral):
        return None
    signature = types.void(bits, *[types.intp] * 10)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, channels, a, a_step, row, row_step, ahead, count, sums, sums_step = args[1:]
        lanes = Lanes(b, bits.literal_value)
        size, line_end = word(lanes.item_bytes), word(VECTOR_BYTES - 1)
        iota = ir.Constant(ir.VectorType(I64, lanes.count), list(range(lanes.count)))
        # Elements that the first vector of every row begins before its row, so as to begin at a cache line.
        is_even = b.icmp_signed("==", b.and_(row_step, line_end), word(0))
        before = b.select(is_even, b.sdiv(b.and_(row, line_end), size), word(0))

        def lanes_of(offset: ir.Value) -> ir.Value:
            """Which lanes of a vector that begins at an offset are elements of a row."""
            k = b.add(iota, lanes.splat(offset, iota.type))
            begun = b.icmp_signed(">=", k, ir.Constant(k.type, None))
            return b.and_(begun, b.icmp_signed("<", k, lanes.splat(count, k.type)))

        def add(first: ir.Value, height: int, offset: ir.Value, vectors: int, later: ir.Value, *, whole: bool) -> None:
            """To the sums of one tile; the first vector may be a part of one where they are not `whole`."""
            panel = b.add(row, b.mul(offset, size))
            starts = [b.add(a, b.mul(b.add(first, word(i)), a_step)) for i in range(height)]
            places = []
            for i in range(height):
                start = lanes.pointer(b.add(sums, b.mul(b.add(first, word(i)), sums_step)), offset)
                places += [b.gep(start, [word(j * lanes.count)]) for j in range(vectors)]
            if whole and can_multiply(target(), height, even=True):
                tile = Segment(lanes, height, vectors, even=True, apart=True)
                values, _, _ = tile([lanes.load(place) for place in places], starts[0], a_step, panel, row_step,
                                    channels, b.add(panel, later), row_step, starts[0])  # fmt: skip
                for value, place in zip(values, places, strict=True):
                    lanes.store(value, place)
                return
            part = None if whole else lanes_of(offset)
            masks = [part if k % vectors == 0 else None for k in range(len(places))]
            kept = [cgutils.alloca_once(b, lanes.type) for _ in places]  # become registers
            for register, place, mask in zip(kept, places, masks, strict=True):
                b.store(lanes.load(place) if mask is None else lanes.masked_load(place, mask), register)
            heads = [lanes.pointer(start) for start in starts]
            here = cgutils.alloca_once_value(b, panel)
            with cgutils.for_range(b, channels) as c:
                line = b.load(here)
                b.store(b.add(line, row_step), here)
                x = [lanes.splat(b.load(b.gep(head, [c.index]))) for head in heads]
                for j in range(vectors):
                    place = lanes.pointer(b.add(line, word(j * VECTOR_BYTES)))
                    lanes.prefetch(b.gep(place, [b.sdiv(later, size)]), level=2)
                    vector = lanes.load(place) if masks[j] is None else lanes.masked_load(place, masks[j])
                    for i in range(height):
                        register = kept[i * vectors + j]
                        b.store(lanes.multiply_add(x[i], vector, b.load(register)), register)
            for register, place, mask in zip(kept, places, masks, strict=True):
                if mask is None:
                    lanes.store(b.load(register), place)
                else:
                    lanes.masked_store(b.load(register), place, mask)

        def add_group(first: ir.Value, height: int) -> None:
            """To the sums of `height` rows; rows of B are asked for along with the first of them."""
            later = b.select(b.icmp_signed("==", first, word(0)), ahead, word(0))
            is_few = height <= FEW_ROWS
            offset = b.neg(before) if is_few else word(0)
            for vectors in TILES[height]:
                width = word(vectors * lanes.count)
                tiles = b.sdiv(b.sub(count, offset), width)
                with cgutils.for_range(b, tiles) as tile:
                    add(first, height, b.add(offset, b.mul(tile.index, width)), vectors, later, whole=not is_few)
                offset = b.add(offset, b.mul(tiles, width))
            with b.if_then(b.icmp_signed("<", offset, count)):
                add(first, height, offset, 1, later, whole=False)

        groups = b.sdiv(b.add(rows, word(MOST_ROWS - 1)), word(MOST_ROWS))
        with cgutils.for_range(b, groups) as group:
            first, last = (b.sdiv(b.mul(rows, b.add(group.index, word(i))), groups) for i in range(2))
            for height in TILES:
                with b.if_then(b.icmp_signed("==", b.sub(last, first), word(height))):
                    add_group(first, height)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _add_vectors(typing, bits, channels, rows, a, a_step, row, row_step, count, sums, sums_step):
    """Addresses and steps in bytes; bits and channels literal. Sums are read and written once, by whole vectors."""
    if not (isinstance(bits, types.IntegerLiteral) and isinstance(channels, types.IntegerLiteral)):
        return None
    signature = types.void(bits, channels, *[types.intp] * 8)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, a, a_step, row, row_step, count, sums, sums_step = args[2:]
        lanes = Lanes(b, bits.literal_value)
        size = word(lanes.item_bytes)
        starts = [b.add(row, b.mul(row_step, word(c))) for c in range(channels.literal_value)]

        ahead, length = b.mul(row_step, word(channels.literal_value)), b.mul(count, size)

        def ask(place: ir.Value) -> None:
            """For what is read AHEAD vectors later, at the end of these rows for the beginning of the next ones."""
            later = b.add(place, word(AHEAD * VECTOR_BYTES))
            later = b.select(b.icmp_signed("<", later, length), later, b.add(ahead, b.sub(later, length)))
            for start in starts:
                lanes.prefetch(lanes.pointer(b.add(start, later)), level=1)

        def load(start: ir.Value, place: ir.Value, tail: Tail | None) -> ir.Value:
            return lanes.load_part(lanes.pointer(b.add(start, place)), tail)

        def elements(pixel: ir.Value) -> list[ir.Value]:
            """Of A, each in all lanes."""
            here = lanes.pointer(b.add(a, b.mul(pixel, a_step)))
            return [b.gep(here, [word(c)]) for c in range(channels.literal_value)]

        def add(first: ir.Value, together: int, place: ir.Value, rows_of_b: Any, x: Any) -> None:
            """To the sums of `together` pixels, which do not wait for one another."""
            to = [b.mul(b.add(first, word(i)), sums_step) for i in range(together)]
            to = [lanes.pointer(b.add(b.add(sums, offset), place)) for offset in to]
            values = [lanes.load(pointer) for pointer in to]
            for c in range(channels.literal_value):
                vector = rows_of_b(c)
                for i in range(together):
                    values[i] = lanes.multiply_add(x(i, c), vector, values[i])
            for pointer, value in zip(to, values, strict=True):
                lanes.store(value, pointer)

        def many(first: ir.Value, together: int, groups: ir.Value) -> None:
            """Vectors of B in registers, elements of A as they are used."""

            def body(offset: ir.Value, tail: Tail | None) -> None:
                place = b.mul(offset, size)
                ask(place)
                kept = [load(start, place, tail) for start in starts]
                with cgutils.for_range(b, groups) as group:
                    pixel = b.add(first, b.mul(group.index, word(together)))
                    here = [elements(b.add(pixel, word(i))) for i in range(together)]
                    add(pixel, together, place, lambda c: kept[c], lambda i, c: lanes.splat(b.load(here[i][c])))

            vector_loop(b, lanes, count, body)

        def few(first: ir.Value, together: int) -> None:
            """Elements of A in registers, vectors of B as they are used."""
            x = [[lanes.splat(b.load(e)) for e in elements(b.add(first, word(i)))] for i in range(together)]

            def body(offset: ir.Value, tail: Tail | None) -> None:
                place = b.mul(offset, size)
                ask(place)
                add(first, together, place, lambda c: load(starts[c], place, tail), lambda i, c: x[i][c])

            vector_loop(b, lanes, count, body)

        whole = b.sdiv(rows, word(ROWS_AT_ONCE))
        with b.if_then(b.icmp_signed(">", whole, word(0))):
            many(word(0), ROWS_AT_ONCE, whole)
        done = b.mul(whole, word(ROWS_AT_ONCE))
        for rest in range(1, ROWS_AT_ONCE):
            with b.if_then(b.icmp_signed("==", b.sub(rows, done), word(rest))):
                if rest > FEWEST_ROWS:
                    many(done, rest, word(1))
                else:
                    few(done, rest)
        return context.get_dummy_value()

    return signature, codegen


@inline
def _add_in_vectors(bits, rows, channels, a, a_step, row, row_step, ahead, count, sums, sums_step):
    """Rows of A a power of two apart fall into a few sets of L1, so their elements are copied side by side.

    20 pixels of 1024 channels took 1.6 times as long from where they were.
    """
    item, near = bits // 8, stack_words(NEAR_WORDS)
    whole = channels // TOGETHER * TOGETHER
    for c in range(0, whole, TOGETHER):
        start, step = a + c * item, a_step
        if a_step > NEAR_BYTES:
            there = elements(bits, near)
            for m in range(rows):
                here = elements(bits, start + m * a_step)
                for i in range(TOGETHER):
                    there[m * TOGETHER + i] = here[i]
            start, step = near, TOGETHER * item
        _add_vectors(bits, TOGETHER, rows, start, step, row + c * row_step, row_step, count, sums, sums_step)
    for c in range(whole, channels):
        _add_vectors(bits, 1, rows, a + c * item, a_step, row + c * row_step, row_step, count, sums, sums_step)


@inline
def _add_in_tiles(bits, rows, channels, a, a_step, row, row_step, ahead, count, sums, sums_step):
    _add_tiles(bits, rows, channels, a, a_step, row, row_step, ahead, count, sums, sums_step)


# Addresses and steps in bytes; bits literal; sums are whole vectors, all of which may be written.
# ahead: of a row of B, the line that is asked for with each of its lines.
add_outer_products = _add_in_tiles if IN_TILES else _add_in_vectors
