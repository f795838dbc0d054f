"""The task of a bfloat16 convolution or dense layer on Intel's AMX, and its filter packing. Chooses no extents.

    tdpbf16ps:  C[i, k] += Σ_j A[i, 2j]·B[j, 2k] + A[i, 2j+1]·B[j, 2k+1]        16 × 16 sums, 32 channels

A task owns TILE_P × TILE_Q pixels and TASK_BLOCKS blocks of 32 filters. For each chunk of channels it loads the merged
tile, as bfloat16 and with zeros around the map and behind the last channel; then every 32 pixels of a line are
multiplied with every block in one go over taps and channels, four tiles of sums at a time. A line is a row of outputs,
or, with stride 1, all rows of the loaded tile one after the other: then sums between the rows are formed for nothing.
Order of the sum: chunks of channels, in each the filter rows, columns, channels by 32. Subnormal factors and sums count
as 0.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import params as at
from fusionops.cpu.conv import locate_task
from fusionops.cpu.epilogue import finish_tile, scatter_tile
from fusionops.cpu.formats import literals
from fusionops.cpu.gemm_task import place_rows
from fusionops.cpu.jit import task
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import I16, I32, I64, clear, elements, word, words
from fusionops.cpu.transpose import stack_words

PIXELS, CHANNELS = 16, 32  # of a tile
FILTERS = 32  # of a block: two tiles
ITEM, SUM = 2, 4  # bytes of a factor and of a sum
TILE_BYTES = PIXELS * CHANNELS * ITEM
STEP_BYTES = 2 * TILE_BYTES  # of packed filters: 32 channels of a block

# What `ldtilecfg` reads: palette 1; 64 bytes a row for each of eight tiles; 16 rows for each.
CONFIG = (1, 0, 0x0040004000400040, 0x0040004000400040, 0, 0, 0x1010101010101010, 0)


def _assembly(b: ir.IRBuilder, text: str, *operands: ir.Value) -> None:
    llvmlite.binding.initialize_native_asmparser()  # which turns text into instructions; cheap when done already
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(operands))
    constraints = ",".join([*["r"] * len(operands), "~{memory}", "~{dirflag}", "~{fpsr}", "~{flags}"])
    b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), operands)


@intrinsic
def configure_tiles(typing, config):
    """Makes the tiles of this thread usable; `config` is the address of the words CONFIG."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _assembly(b, "ldtilecfg ($0)", args[0])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def release_tiles(typing):
    """Hands the tiles back, so that a change of threads need not save them."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _assembly(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def multiply_tiles(typing, rows, a, a_step, outer, a_outer, inner, a_inner, depth, panel, c, c_step, accumulate):
    """C[m, :] (+)= Σ_{u < outer} Σ_{v < inner} Σ_{d < depth} A[m·a_step + u·a_outer + v·a_inner + d] · B[u, v, d, :]

    For m < 16·rows and 32 filters; rows is literal, 1 or 2. Addresses and steps in bytes, depth in steps of CHANNELS.
    """
    if not literals(rows):
        return None
    count = rows.literal_value
    signature = types.void(rows, *[types.intp] * 11)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, a_step, outer, a_outer, inner, a_inner, depth, panel, c, c_step, accumulate = args[1:]
        sums = [(i, j) for i in range(count) for j in range(2)]
        below = [word(0), b.mul(a_step, word(PIXELS))]  # from the first tile of pixels to each
        places = [b.add(c, b.add(b.mul(c_step, word(i * PIXELS)), word(j * PIXELS * SUM))) for i, j in sums]
        with b.if_else(b.icmp_signed("!=", accumulate, word(0))) as (again, first):
            with again:
                for t, place in enumerate(places):
                    _assembly(b, f"tileloadd ($0,$1), %tmm{t}", place, c_step)
            with first:
                for t in range(len(sums)):
                    _assembly(b, f"tilezero %tmm{t}")
        cursor = cgutils.alloca_once_value(b, panel)
        text = [f"tileloadd (${i},$2), %tmm{4 + i}" for i in range(count)]
        for j in range(2):
            text += [f"tileloadd {j * TILE_BYTES}($3,$4), %tmm{6 + j}"]
            text += [f"tdpbf16ps %tmm{6 + j}, %tmm{4 + i}, %tmm{2 * i + j}" for i in range(count)]
        with cgutils.for_range(b, outer) as u, cgutils.for_range(b, inner) as v:
            start = b.add(a, b.add(b.mul(u.index, a_outer), b.mul(v.index, a_inner)))
            with cgutils.for_range(b, depth) as d:
                here = b.add(start, b.mul(d.index, word(CHANNELS * ITEM)))
                filters = b.load(cursor)
                _assembly(b, "\n\t".join(text), here, b.add(here, below[1]), a_step, filters, word(2 * CHANNELS))
                b.store(b.add(filters, word(STEP_BYTES)), cursor)
        for t, place in enumerate(places):
            _assembly(b, f"tilestored %tmm{t}, ($0,$1)", place, c_step)
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def amx_task() -> int:
    """Address of the task."""

    def amx(params, index, slot):
        p = words(params)
        scratch = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        outs, residuals, copy = scratch + p[at.AT_OUT], scratch + p[at.AT_RESIDUAL], scratch + p[at.AT_COPY]
        n, p0, p1, q0, q1, _, block0, block1 = locate_task(params, index)
        rows, cols, pitch = p1 - p0, q1 - q0, p[at.PITCH]
        place_rows(params, outs, residuals, n, p0, p1, q0, q1, rows * cols)
        h0, w0 = p0 * p[at.STRIDE_H] - p[at.PAD_TOP], q0 * p[at.STRIDE_W] - p[at.PAD_LEFT]
        under_h = (rows - 1) * p[at.STRIDE_H] + (p[at.R] - 1) * p[at.DILATION_H] + 1
        under_w = (cols - 1) * p[at.STRIDE_W] + (p[at.S] - 1) * p[at.DILATION_W] + 1
        is_inside = h0 >= 0 and w0 >= 0 and h0 + under_h <= p[at.H] and w0 + under_w <= p[at.W]
        lines, length, line_step, row_sums = rows, cols, p[at.STRIDE_H] * pitch, p[at.ROW_SUMS]
        if p[at.IS_FLAT]:
            lines, length, line_step, row_sums = 1, (rows - 1) * pitch + cols, 0, pitch
        config = stack_words(8)
        for i in range(8):
            words(config)[i] = CONFIG[i]
        configure_tiles(config)
        padded_channels = (p[at.C] + CHANNELS - 1) // CHANNELS * CHANNELS
        taps = p[at.R] * p[at.S]
        for c0 in range(0, p[at.C], p[at.DEPTH]):
            count = min(p[at.DEPTH], p[at.C] - c0)
            steps = (count + CHANNELS - 1) // CHANNELS
            depth = steps * CHANNELS
            pixel = depth * ITEM
            if not is_inside or count != depth:
                clear(scratch, under_h * pitch * pixel)
            inside = scratch + (max(0, -h0) * pitch + max(0, -w0)) * pixel
            load_tile(params, inside, pitch, n, h0, under_h, w0, under_w, c0, depth)
            for block in range(block0, block1):
                panel = p[at.FILTERS] + taps * (block * padded_channels + c0) * FILTERS * ITEM
                k0, used = block * FILTERS, min(FILTERS, p[at.K] - block * FILTERS)
                sums = scratch + p[at.AT_SUMS]
                if p[at.C] > p[at.DEPTH]:
                    sums += (block - block0) * p[at.BLOCK_SUMS] * FILTERS * SUM
                for line in range(lines):
                    a = scratch + line * line_step * pixel
                    c = sums + line * row_sums * FILTERS * SUM
                    for m in range(0, length, 2 * PIXELS):
                        here, to = a + m * p[at.STRIDE_W] * pixel, c + m * FILTERS * SUM
                        a_step, a_row = p[at.STRIDE_W] * pixel, p[at.DILATION_H] * pitch * pixel
                        if length - m > PIXELS:
                            multiply_tiles(2, here, a_step, p[at.R], a_row, p[at.S], p[at.DILATION_W] * pixel, steps,
                                           panel, to, FILTERS * SUM, c0)  # fmt: skip
                        else:
                            multiply_tiles(1, here, a_step, p[at.R], a_row, p[at.S], p[at.DILATION_W] * pixel, steps,
                                           panel, to, FILTERS * SUM, c0)  # fmt: skip
                if c0 + count == p[at.C]:
                    for row in range(rows):
                        of_row, place = sums + row * row_sums * FILTERS * SUM, row * cols * 8
                        finish_tile(params, of_row, FILTERS, outs + place, residuals + place, copy, cols, k0, used,
                                    p[at.OUT_K] != 1)  # fmt: skip
                        if p[at.OUT_K] != 1:
                            scatter_tile(params, of_row, outs + place, cols, k0, used)
        release_tiles()

    return task(amx)


@intrinsic
def weave_rows(typing, to, even, odd):
    """to[2k] = even[k], to[2k + 1] = odd[k] for 16 elements of two bytes."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        row, pair = ir.VectorType(I16, PIXELS), ir.VectorType(I16, 2 * PIXELS)
        loaded = []
        for address in args[1:]:
            value = b.load(b.inttoptr(address, row.as_pointer()))
            value.align = ITEM
            loaded.append(value)
        order = [lane // 2 + lane % 2 * PIXELS for lane in range(2 * PIXELS)]
        woven = b.shuffle_vector(*loaded, ir.Constant(ir.VectorType(I32, 2 * PIXELS), order))
        b.store(woven, b.inttoptr(args[0], pair.as_pointer())).align = ITEM
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@functools.cache
def pack_task() -> int:
    """Address of the task that packs one block: [chunk][r][s][32 channels][half][pair of channels][filter][of a pair].

    Zero beyond the last filter and the last channel. Words: packed, filters, steps r s c k (elements), R, S, channels
    and filters, depth, width, blocks.
    """

    def pack(params, index, slot):
        p = words(params)
        step_r, step_s, step_c, step_k = p[2], p[3], p[4], p[5]
        R, S, channels, filters, depth = p[6], p[7], p[8], p[9], p[10]
        padded = (channels + CHANNELS - 1) // CHANNELS * CHANNELS
        to = p[0] + index * R * S * padded * FILTERS * ITEM
        for c0 in range(0, channels, depth):
            end = min(channels, c0 + depth)
            for r in range(R):
                for s in range(S):
                    source = p[1] + (r * step_r + s * step_s) * ITEM
                    for c in range(c0, (end - c0 + CHANNELS - 1) // CHANNELS * CHANNELS + c0, 2):
                        for half in range(2):
                            k0 = index * FILTERS + half * PIXELS
                            place = to + half * TILE_BYTES + (c - c0) % CHANNELS * PIXELS * ITEM
                            if step_k == 1 and k0 + PIXELS <= filters and c + 2 <= end:
                                even = source + (c * step_c + k0) * ITEM
                                weave_rows(place, even, even + step_c * ITEM)
                                continue
                            d, x = elements(16, place), elements(16, source)
                            for k in range(PIXELS):
                                for i in range(2):
                                    d[2 * k + i] = 0
                                    if k0 + k < filters and c + i < end:
                                        d[2 * k + i] = x[(c + i) * step_c + (k0 + k) * step_k]
                        if (c - c0) % CHANNELS == CHANNELS - 2:
                            to += STEP_BYTES

    return task(pack)
