"""Depthwise convolutions: every channel has one filter of its own, and vectors run over channels instead of filters.

    y[n,p,q,c] = act( Σ_{r,s} merged[n, p·stride_h + r·dilation_h − pad_top, q·stride_w + s·dilation_w − pad_left, c]
                      · w[r,s,c] + b[c] + residual[n,p,q,c] )

A task owns TILE_P × TILE_Q pixels and TASK_BLOCKS blocks of channels, whose merged tile it loads once. Pixels that miss
the same taps share register tiles, as in every convolution here. Order of the sum: filter rows, filter columns.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.cpu import conv, direct, launch
from fusionops.cpu import params as at
from fusionops.cpu.block import Strides, Words
from fusionops.cpu.epilogue import RELU, finish_tile, finishes_in_registers, scatter_tile
from fusionops.cpu.formats import FORMATS
from fusionops.cpu.jit import task
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import I64, VECTOR_BYTES, Lanes, word, words
from fusionops.cpu.sums import Sums
from fusionops.cpu.tiling import (
    GROUP_WORDS,
    SCRATCH_LIMIT,
    TILE_PIXELS,
    WIDEST_TILE,
    ConvTiling,
    balanced,
    tile_extents,
)
from fusionops.device import CpuDevice
from fusionops.kernel import Kernel
from fusionops.spec import Conv2d, FusionSpec, Merge

MOST_PIXELS = 12  # of a register tile
# Channels of a task: a tile of them stays in L2, and what is read of each pixel is whole cache lines.
TASK_CHANNELS = 128


@intrinsic(prefer_literal=True)
def depthwise_tile(typing, bits, mr, nv, a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner, panel, c,
                   is_finished, bias, residual, residuals, relu, out, outs):  # fmt: skip
    """C[i, :] = Σ_{u < outer} Σ_{v < inner} A[pixels[i]·pitch + u·a_outer + v·a_inner + :] · B[u·b_outer + v, :]

    Addresses a, pixels (int64 each), panel, c; steps in elements, b_outer in rows of nv vectors; bits, mr, nv literal.
    What follows c is the epilogue, as in `gemm_tile`.
    """
    if not all(isinstance(value, types.IntegerLiteral) for value in (bits, mr, nv)):
        return None
    rows, vectors = mr.literal_value, nv.literal_value
    signature = types.void(bits, mr, nv, *[types.intp] * 17)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, pixels, pitch, outer, a_outer, b_outer, inner, a_inner, panel, c, *epilogue = args[3:]
        lanes = Lanes(b, bits.literal_value)
        pixel = b.inttoptr(pixels, I64.as_pointer())
        starts = [lanes.pointer(a, b.mul(b.load(b.gep(pixel, [word(i)])), pitch)) for i in range(rows)]
        B = lanes.pointer(panel)
        tile = Sums(b, lanes, rows, vectors)
        tile.ask_for_results(c, epilogue)
        with cgutils.for_range(b, outer) as u, cgutils.for_range(b, inner) as v:
            step = b.add(b.mul(u.index, a_outer), b.mul(v.index, a_inner))
            row = b.mul(b.add(b.mul(u.index, b_outer), v.index), word(vectors * lanes.count))
            for j in range(vectors):
                w = lanes.load(b.gep(B, [b.add(row, word(j * lanes.count))]))
                for i in range(rows):
                    x = lanes.load(b.gep(starts[i], [b.add(step, word(j * lanes.count))]))
                    s = tile.sums[i * vectors + j]
                    b.store(lanes.multiply_add(x, w, b.load(s)), s)
        tile.leave(c, word(0), epilogue)
        return context.get_dummy_value()

    return signature, codegen


def register_tile(channel_bytes: int, device: CpuDevice) -> tuple[int, int]:
    """(mr, nv): mr · nv sums, a vector of filters and one of pixels fill the registers."""
    per_vector = VECTOR_BYTES // device.vector_bytes
    nv = 2 if per_vector == 1 and channel_bytes > VECTOR_BYTES else 1
    return max(1, min(MOST_PIXELS, (device.vector_registers // per_vector - 2) // nv)), nv


def plan(spec: FusionSpec, device: CpuDevice) -> ConvTiling:
    """The tiling of a depthwise convolution: blocks are of channels, `depth` of them belong to a task."""
    conv2d, item = spec.conv, FORMATS[spec.dtype].computed_bytes
    mr, nv = register_tile(conv2d.K * item, device)
    width = nv * VECTOR_BYTES // item
    blocks = -(-conv2d.K // width)
    task_blocks = balanced(blocks, max(1, TASK_CHANNELS // width))
    tile_q = balanced(spec.Q, WIDEST_TILE)
    tile_p = balanced(spec.P, max(1, TILE_PIXELS // tile_q))
    while True:
        tiling = ConvTiling(
            bits=8 * item, mr=mr, nv=nv, depth=task_blocks * width, chunks=1, blocks=blocks, task_blocks=task_blocks,
            packed_elements=conv2d.R * conv2d.S * blocks * width, **tile_extents(spec, mr, tile_p, tile_q),
        )  # fmt: skip
        if tiling.scratch_bytes <= SCRATCH_LIMIT or (tile_p, tile_q, task_blocks) == (1, 1, 1):
            return tiling
        if task_blocks > 1:
            task_blocks = -(-task_blocks // 2)
        elif tile_p >= tile_q:
            tile_p = -(-tile_p // 2)
        else:
            tile_q = -(-tile_q // 2)


def cut(spec: FusionSpec, tiling: ConvTiling, words: Words, filters: Strides | None) -> tuple[int, bool]:
    """The words of output tiles and blocks of channels; the number of tasks; filters are always packed."""
    tasks, _ = direct.cut(spec, tiling, words, None)
    return tasks // spec.conv.groups, False


@functools.cache
def depthwise_task(bits: int, mr: int, nv: int) -> int:
    """Address of the task compiled for one register tile."""
    item = bits // 8
    width = nv * VECTOR_BYTES // item

    def depthwise(params, index, slot):
        p = words(params)
        scratch = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        parts = (p[at.BLOCKS] + p[at.TASK_BLOCKS] - 1) // p[at.TASK_BLOCKS]
        part, tile = index % parts, index // parts
        q0 = tile % p[at.TILES_Q] * p[at.TILE_Q]
        p0 = tile // p[at.TILES_Q] % p[at.TILES_P] * p[at.TILE_P]
        n = tile // p[at.TILES_Q] // p[at.TILES_P]
        p1, q1 = min(p[at.P], p0 + p[at.TILE_P]), min(p[at.Q], q0 + p[at.TILE_Q])
        h0, w0 = p0 * p[at.STRIDE_H] - p[at.PAD_TOP], q0 * p[at.STRIDE_W] - p[at.PAD_LEFT]
        count = conv.group_pixels(params, scratch, mr, n, p0, p1, q0, q1)
        pixels, groups = scratch + p[at.AT_PIXELS], words(scratch + p[at.AT_GROUPS])
        outs, residuals, copy = scratch + p[at.AT_OUT], scratch + p[at.AT_RESIDUAL], scratch + p[at.AT_COPY]
        block0, block1 = part * p[at.TASK_BLOCKS], min(p[at.BLOCKS], (part + 1) * p[at.TASK_BLOCKS])
        c0 = block0 * width
        depth = min(p[at.K], block1 * width) - c0
        load_tile(params, scratch, p[at.PITCH], n, h0, p[at.ROWS], w0, p[at.COLS], c0, depth)
        a_row, a_col = p[at.DILATION_H] * p[at.PITCH] * depth, p[at.DILATION_W] * depth
        is_plain = finishes_in_registers(item, params)
        for block in range(block0, block1):
            k0, used = block * width, min(width, p[at.K] - block * width)
            in_registers = is_plain and used == width
            panel = p[at.FILTERS] + block * p[at.R] * p[at.S] * width * item
            for g in range(count):
                head = g * GROUP_WORDS
                r0, r1, s0, s1 = groups[head], groups[head + 1], groups[head + 2], groups[head + 3]
                a = scratch + (r0 * a_row + s0 * a_col + k0 - c0) * item
                # A whole block of pixels is stored at once where channels do not lie side by side.
                sums = scratch + p[at.AT_SUMS] + (g * mr * width * item if p[at.OUT_K] != 1 else 0)
                depthwise_tile(bits, mr, nv, a, pixels + g * mr * 8, depth, r1 - r0, a_row, p[at.S], s1 - s0, a_col,
                               panel + (r0 * p[at.S] + s0) * width * item, sums, in_registers,
                               p[at.BIAS] + k0 * item if p[at.BIAS] != 0 else 0,
                               p[at.RESIDUAL] + k0 * item if p[at.RESIDUAL] != 0 else 0, residuals + g * mr * 8,
                               p[at.ACTIVATION] == RELU, p[at.OUT] + k0 * item, outs + g * mr * 8)  # fmt: skip
                if not in_registers:
                    finish_tile(params, sums, width, outs + g * mr * 8, residuals + g * mr * 8, copy,
                                groups[head + 4], k0, used, p[at.OUT_K] != 1)  # fmt: skip
            if p[at.OUT_K] != 1:
                scatter_tile(params, scratch + p[at.AT_SUMS], outs, count * mr, k0, used)

    return task(depthwise)


DEPTHWISE = launch.Algorithm(
    "depthwise",
    cut,
    lambda tiling: depthwise_task(tiling.bits, tiling.mr, tiling.nv),
    conv.pack_task,
    joins_groups=True,
)


def _smallest_tile(spec: FusionSpec) -> int:
    """Bytes of the map under one output pixel, for one block of channels."""
    extents = tile_extents(spec, 1, 1, 1)
    return extents["rows"] * extents["cols"] * 2 * VECTOR_BYTES


def _kernel(merge: Merge, dtype: str) -> Kernel:
    def unsupported(spec: FusionSpec) -> tuple[str, ...]:
        reasons = direct.common_reasons(spec, merge, dtype)
        if not isinstance(spec.contraction, Conv2d):
            reasons.append("the contraction is not a conv2d")
        elif not spec.conv.groups == spec.conv.K == spec.C > 1:
            reasons.append(
                f"{spec.C} channels, {spec.conv.K} filters, {spec.conv.groups} groups; needs one of each for all"
            )
        elif _smallest_tile(spec) > SCRATCH_LIMIT // 2:
            reasons.append(f"the taps of one pixel reach over more of the map than {SCRATCH_LIMIT // 2} B hold")
        return tuple(reasons)

    return Kernel(
        f"cpu.{merge}_conv_fprop_depthwise_{FORMATS[dtype].suffix}",
        unsupported,
        plan,
        partial(launch.run, DEPTHWISE),
        replay=partial(launch.replay, DEPTHWISE),
    )


KERNELS = tuple(_kernel(merge, dtype) for merge in Merge for dtype in FORMATS)
