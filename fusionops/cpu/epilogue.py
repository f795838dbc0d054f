"""What happens to a finished sum: bias, residual, activation and the store, at any output strides.

Reads sums from scratch and never reads the output.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import activation as activations
from fusionops.cpu import params as at
from fusionops.cpu.jit import inline
from fusionops.cpu.prologue import rounded, vector_loop
from fusionops.cpu.simd import Lanes, doubles, elements, word, words


@intrinsic(prefer_literal=True)
def finish_run(typing, bits, to, sums, count, bias, residual, activation, slope):  # type: ignore[no-untyped-def]  # noqa: E501  # numba calls it with its own objects
    """to[i] = activation(sums[i] + bias[i] + residual[i]) for a run of channels; address 0 for no bias or residual."""
    if not isinstance(bits, types.IntegerLiteral):
        return None
    signature = types.void(bits, *[types.intp] * 6, types.float64)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, to, sums, count, bias, residual, activation, slope = args
        lanes = Lanes(b, bits.literal_value)
        has_bias, has_residual = (b.icmp_signed("!=", address, word(0)) for address in (bias, residual))
        to, sums, bias, residual = (lanes.pointer(address) for address in (to, sums, bias, residual))
        slopes = lanes.splat(b.fptrunc(slope, lanes.scalar) if lanes.bits == 32 else slope)
        value = cgutils.alloca_once(b, lanes.type)

        def run(name: str | None) -> None:
            def body(offset: ir.Value, mask: ir.Value | None) -> None:
                def load(base: ir.Value) -> ir.Value:
                    place = b.gep(base, [offset])
                    return lanes.load(place) if mask is None else lanes.masked_load(place, mask)

                b.store(load(sums), value)
                for present, base in ((has_bias, bias), (has_residual, residual)):
                    with b.if_then(present):
                        b.store(b.fadd(b.load(value), load(base)), value)
                result = activations.apply(name, lanes, b.load(value), slopes)
                place = b.gep(to, [offset])
                if mask is None:
                    lanes.store(result, place)
                else:
                    lanes.masked_store(result, place, mask)

            vector_loop(b, lanes, count, body)

        done = b.append_basic_block("finished")
        choice = b.switch(activation, done)
        for name, code in activations.CODES.items():
            block = b.append_basic_block(f"activation_{name}")
            choice.add_case(word(code), block)
            b.position_at_end(block)
            run(name)
            b.branch(done)
        b.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@inline
def load_residual(bits, params, to, pixel, first, count):  # type: ignore[no-untyped-def]
    """to[i] = weight · residual[pixel + first + i]: only for residuals that are weighted or not contiguous along channels."""
    p = words(params)
    item = bits // 8
    d, s = elements(bits, to), elements(bits, p[at.RESIDUAL])
    kind, step = p[at.RESIDUAL_WEIGHT], p[at.RESIDUAL_K]
    factor = rounded(bits, doubles(params)[at.RESIDUAL_FACTOR] if kind == at.WEIGHT_SCALAR else 1.0)
    factors = elements(bits, p[at.RESIDUAL_FACTOR] + first * item if kind == at.WEIGHT_VECTOR else 0)
    for i in range(count):
        value = s[pixel + (first + i) * step]
        if kind == at.WEIGHT_SCALAR:
            value = value * factor
        elif kind == at.WEIGHT_VECTOR:
            value = value * factors[i]
        d[i] = value


@inline
def finish_tile(bits, width, params, sums, out_at, residual_at, row, count, k0, channels):  # type: ignore[no-untyped-def]
    """Finishes `count` pixels of `channels` filters from k0 on: straight to an output that is contiguous along k, else in place."""
    p = words(params)
    item = bits // 8
    bias = p[at.BIAS] + k0 * item if p[at.BIAS] != 0 else 0
    copies = p[at.RESIDUAL] != 0 and (p[at.RESIDUAL_K] != 1 or p[at.RESIDUAL_WEIGHT] != at.WEIGHT_NONE)
    activation, slope = p[at.ACTIVATION], doubles(params)[at.SLOPE]
    offsets, residual_offsets = words(out_at), words(residual_at)
    for i in range(count):
        here = sums + i * width * item
        to = here
        if p[at.OUT_K] == 1:
            to = p[at.OUT] + (offsets[i] + k0) * item
        residual = 0
        if copies:
            load_residual(bits, params, row, residual_offsets[i], k0, channels)
            residual = row
        elif p[at.RESIDUAL] != 0:
            residual = p[at.RESIDUAL] + (residual_offsets[i] + k0) * item
        finish_run(bits, to, here, channels, bias, residual, activation, slope)


@inline
def scatter_tile(bits, width, params, sums, out_at, count, k0, channels):  # type: ignore[no-untyped-def]
    """Stores finished pixels to an output whose channels are OUT_K apart, one channel's pixels after the other."""
    p = words(params)
    offsets = words(out_at)
    s, out = elements(bits, sums), elements(bits, p[at.OUT])
    step = p[at.OUT_K]
    for k in range(channels):
        to = (k0 + k) * step
        for i in range(count):
            out[offsets[i] + to] = s[i * width + k]
