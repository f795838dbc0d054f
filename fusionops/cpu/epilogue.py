"""What happens to a finished sum: bias, residual, activation and the store, at any output strides.

Reads sums from scratch and never reads the output.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import activation as activations
from fusionops.cpu import params as at
from fusionops.cpu.formats import literals, load_element, round_element, store_rows
from fusionops.cpu.jit import inline, task
from fusionops.cpu.simd import (
    I64,
    VECTOR_BYTES,
    Lanes,
    Tail,
    call,
    doubles,
    elements,
    prefetch_read,
    prefetch_write,
    vector_loop,
    word,
    words,
)
from fusionops.cpu.transpose import BLOCK_WORDS, stack_words, transpose_block

# With these, sums are finished in the registers that hold them; others need registers of their own.
PLAIN, RELU = activations.CODES[None], activations.CODES["relu"]
NOWHERE = -(1 << 62)  # stands for the place of a pixel that only fills up a register tile


@intrinsic(prefer_literal=True)
def finish_rows(
    typing, bits, plain, rows, to, places, sums, step, count, bias, residual, residual_places, activation, slope
):
    """to[places[r] + i] = activation(sums[r·step + i] + bias[i] + residual[residual_places[r] + i]) for i < count.

    One run of channels for each r < rows. Address 0 stands for no bias, no residual, and for places of r·step. Literal:
    bits, and whether the activation is none or one of the relus: no code is made for the others.
    """
    if not literals(bits, plain):
        return None
    signature = types.void(bits, plain, *[types.intp] * 10, types.float64)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, to, places, sums, step, count, bias, residual, residual_places, activation, slope = args[2:]
        lanes = Lanes(b, bits.literal_value)
        has_bias, has_residual = (b.icmp_signed("!=", address, word(0)) for address in (bias, residual))
        first_to, first_sum, bias, first_residual = (lanes.pointer(address) for address in (to, sums, bias, residual))
        slopes = lanes.splat(b.fptrunc(slope, lanes.scalar) if lanes.bits == 32 else slope)
        value, term = (cgutils.alloca_once(b, lanes.type) for _ in range(2))
        even = cgutils.alloca_once(b, I64)

        def row_start(table: ir.Value, r: ir.Value, base: ir.Value) -> ir.Value:
            """base + table[r], or base + r·step; the address of a word that is there stands in for a missing table."""
            regular = b.mul(r, step)
            b.store(regular, even)
            missing = b.icmp_signed("==", table, word(0))
            entry = b.gep(b.inttoptr(table, I64.as_pointer()), [r])
            return b.gep(base, [b.load(b.select(missing, even, entry))])

        def run(name: str | None) -> None:
            def body(offset: ir.Value, tail: Tail | None) -> None:
                """One vector of channels of every row: what depends on the channel alone is loaded once."""
                b.store(lanes.constant(-0.0), term)  # x + −0 is x, for every x
                with b.if_then(has_bias):
                    b.store(lanes.load_part(b.gep(bias, [offset]), tail), term)
                with cgutils.for_range(b, rows) as r:
                    sums = b.gep(first_sum, [b.add(b.mul(r.index, step), offset)])
                    b.store(b.fadd(lanes.load_part(sums, tail), b.load(term)), value)
                    with b.if_then(has_residual):
                        residual = b.gep(row_start(residual_places, r.index, first_residual), [offset])
                        b.store(b.fadd(b.load(value), lanes.load_part(residual, tail)), value)
                    result = activations.apply(name, lanes, b.load(value), slopes)
                    lanes.store_part(result, b.gep(row_start(places, r.index, first_to), [offset]), tail)

            vector_loop(b, lanes, count, body)

        done = b.append_basic_block("finished")
        choice = b.switch(activation, done)
        for name in activations.RELUS if plain.literal_value else activations.CODES:
            block = b.append_basic_block(f"activation_{name}")
            choice.add_case(word(activations.CODES[name]), block)
            b.position_at_end(block)
            run(name)
            b.branch(done)
        b.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@inline
def finishes_in_registers(item, params):
    """Whether sums can go from registers to the output: whole blocks of filters, which lie side by side there."""
    p = words(params)
    return (
        p[at.OUT_K] == 1
        and p[at.STORED_BYTES] == item
        and (p[at.ACTIVATION] == PLAIN or p[at.ACTIVATION] == RELU)
        and (p[at.RESIDUAL] == 0 or (p[at.RESIDUAL_K] == 1 and p[at.RESIDUAL_WEIGHT] == at.WEIGHT_NONE))
    )


@inline
def ask_for_channels(params, out_at, count, k0, channels):
    """Starts the misses of `scatter_tile` before the outputs are computed: a run of `count` pixels of each channel,
    if they lie side by side.

    Winograd's outputs with channels apart took 1.56 times as long as with channels side by side, 1.34 with this (64
    channels of 128×128 and 120×128, means of three runs).
    """
    p = words(params)
    if p[at.OUT_Q] != 1:
        return
    item = p[at.STORED_BYTES]
    first = p[at.OUT] + (words(out_at)[0] + k0 * p[at.OUT_K]) * item
    for k in range(channels):
        prefetch_write(first + k * p[at.OUT_K] * item, count * item)


@inline
def ask_for_output(params, out_at, residual_at, count, k0, channels):
    """Starts the cache misses of finish_tile before the sums are computed, so that they end meanwhile."""
    p = words(params)
    item = p[at.STORED_BYTES]
    offsets, residual_offsets = words(out_at), words(residual_at)
    if p[at.OUT_K] != 1:
        ask_for_channels(params, out_at, count, k0, channels)
    for i in range(count):
        if p[at.OUT_K] == 1:
            prefetch_write(p[at.OUT] + (offsets[i] + k0) * item, channels * item)
        if p[at.RESIDUAL] != 0 and p[at.RESIDUAL_K] == 1:
            prefetch_read(p[at.RESIDUAL] + (residual_offsets[i] + k0) * item, channels * item)


@inline
def load_residual(bits, stored, params, to, pixel, first, count):
    """to[i] = weight · residual[pixel + (first + i)·step], where a residual is more than what is computed with."""
    p = words(params)
    kind, step = p[at.RESIDUAL_WEIGHT], p[at.RESIDUAL_K]
    factor = round_element(bits, doubles(params)[at.RESIDUAL_FACTOR] if kind == at.WEIGHT_SCALAR else 1.0)
    factors = elements(bits, p[at.RESIDUAL_FACTOR] + first * (bits // 8) if kind == at.WEIGHT_VECTOR else 0)
    d = elements(bits, to)
    for i in range(count):
        value = load_element(stored, p[at.RESIDUAL], pixel + (first + i) * step)
        if kind == at.WEIGHT_SCALAR:
            value = round_element(stored, value * factor)
        elif kind == at.WEIGHT_VECTOR:
            value = round_element(stored, value * factors[i])
        d[i] = value


@inline
def finish_tile(params, sums, step, out_at, residual_at, copy, count, k0, channels, in_place):
    """Finishes `count` pixels, `step` apart, for `channels` filters from k0 on: in place, or to the output."""
    call(words(params)[at.FINISH_TILE], params, sums, step, out_at, residual_at, copy, count, k0, channels, in_place)


@functools.cache
def tile_finisher(bits: int, stored: int, is_plain: bool) -> int:
    """Address of the code of `finish_tile`; is_plain: for no activation but the relus."""
    item, size, plain = bits // 8, stored // 8, int(is_plain)
    is_narrow = stored < bits

    def finish(params, sums, step, out_at, residual_at, copy, count, k0, channels, in_place):
        p = words(params)
        bias = p[at.BIAS] + k0 * item if p[at.BIAS] != 0 else 0
        to, places = sums, 0
        if not (in_place or is_narrow):
            to, places = p[at.OUT] + k0 * item, out_at
        residual = 0
        if p[at.RESIDUAL] != 0:
            if is_narrow or p[at.RESIDUAL_K] != 1 or p[at.RESIDUAL_WEIGHT] != at.WEIGHT_NONE:
                for i in range(count):
                    load_residual(bits, stored, params, copy + i * step * item, words(residual_at)[i], k0, channels)
                residual, residual_at = copy, 0
            else:
                residual = p[at.RESIDUAL] + k0 * item
        finish_rows(bits, plain, count, to, places, sums, step, channels, bias, residual, residual_at,
                    p[at.ACTIVATION], doubles(params)[at.SLOPE])  # fmt: skip
        if is_narrow and not in_place:
            places = words(out_at)
            for i in range(count):
                store_rows(bits, stored, p[at.OUT] + (places[i] + k0) * size, 0, sums + i * step * item, 0, 1, channels)

    return task(finish)


@inline
def scatter_tile(params, sums, out_at, rows, k0, channels):
    """Stores finished pixels to an output whose channels are OUT_K apart; rows that are NOWHERE are not pixels."""
    call(words(params)[at.SCATTER_TILE], params, sums, out_at, rows, k0, channels)


@functools.cache
def tile_scatterer(bits: int, stored: int) -> int:
    """Address of the code of `scatter_tile`."""
    item, size = bits // 8, stored // 8
    lanes = VECTOR_BYTES // item

    def scatter(params, sums, out_at, rows, k0, channels):
        p = words(params)
        width = p[at.WIDTH]
        offsets, step, side_by_side = words(out_at), p[at.OUT_K], p[at.OUT_Q] == 1
        block = stack_words(BLOCK_WORDS)
        for k in range(0, channels, lanes):  # all pixels of a few channels: lines that two runs share stay in the cache
            used = min(lanes, channels - k)
            i = 0
            while i < rows:
                if offsets[i] == NOWHERE:
                    i += 1
                    continue
                end = i + 1
                while side_by_side and end < rows and end - i < lanes and offsets[end] == offsets[end - 1] + 1:
                    end += 1
                whole = sums + (i * width + k) * item  # vectors, which is more than what may be used of them
                transpose_block(bits, bits, block, lanes, whole, width, end - i, lanes)
                to = p[at.OUT] + (offsets[i] + (k0 + k) * step) * size
                store_rows(bits, stored, to, step, block, lanes, used, end - i)
                i = end

    return task(scatter)
