"""The convolution task and its filter packing: one output tile from tile load to store. Chooses no extents.

    y[n,p,q,k] = act( Σ_{r,s,c} merged[n, p·stride_h + r·dilation_h − pad_top, q·stride_w + s·dilation_w − pad_left, c]
                      · w[r,s,c,k] + b[k] + residual[n,p,q,k] )

A task owns TILE_P × TILE_Q pixels and TASK_BLOCKS filter blocks. For each chunk of channels it loads the merged tile
once, then multiplies it with each filter block. Pixels whose valid taps coincide share register tiles, so taps in the
padding are skipped, not multiplied by zero. Order of the sum: chunks of channels, in each the filter rows, columns,
channels.
"""

from __future__ import annotations

import functools

from fusionops.cpu import params as at
from fusionops.cpu.epilogue import NOWHERE, RELU, ask_for_output, finish_tile, finishes_in_registers, scatter_tile
from fusionops.cpu.formats import load_element
from fusionops.cpu.jit import inline, task
from fusionops.cpu.microkernel import gemm_tile
from fusionops.cpu.prologue import load_tile
from fusionops.cpu.simd import GAP, elements, words
from fusionops.cpu.tiling import GROUP_WORDS


@inline
def valid_taps(start, dilation, taps, extent):
    """(first, end) of the taps that land inside [0, extent) when tap 0 lands at `start`; (0, 0) if none does."""
    first = 0 if start >= 0 else (dilation - 1 - start) // dilation
    end = 0 if start >= extent else min(taps, (extent - 1 - start) // dilation + 1)
    return (first, end) if first < end else (0, 0)


@inline
def run_end(position, last, origin, stride, dilation, taps, extent):
    """One past the last output position, from `position` on, with the same valid taps."""
    shared = valid_taps(position * stride - origin, dilation, taps, extent)
    if shared == (0, taps):
        return min(last, (extent - 1 - (taps - 1) * dilation + origin) // stride + 1)
    position += 1
    while position < last and valid_taps(position * stride - origin, dilation, taps, extent) == shared:
        position += 1
    return position


@inline
def group_pixels(params, scratch, mr, n, p0, p1, q0, q1):
    """Fills the tables of register tiles for one output tile and returns their number.

    Line by line, in loops that vectors of the host run: pixel by pixel, this was a third of a convolution of 4 channels
    with 16 3×3 filters, whose products were a sixth.
    """
    p = words(params)
    pixels, groups = words(scratch + p[at.AT_PIXELS]), words(scratch + p[at.AT_GROUPS])
    outs, residuals = words(scratch + p[at.AT_OUT]), words(scratch + p[at.AT_RESIDUAL])
    stride_h, stride_w, dilation_h, dilation_w = p[at.STRIDE_H], p[at.STRIDE_W], p[at.DILATION_H], p[at.DILATION_W]
    pitch, out_q, up_w, residual_q = p[at.PITCH], p[at.OUT_Q], p[at.RESIDUAL_UP_W], p[at.RESIDUAL_Q]
    # A loaded tile begins where the map does at the latest; a pixel's tap 0 may lie before that.
    origin_h = p[at.PAD_TOP] + max(0, p0 * stride_h - p[at.PAD_TOP])
    origin_w = p[at.PAD_LEFT] + max(0, q0 * stride_w - p[at.PAD_LEFT])
    has_residual, is_turned = p[at.RESIDUAL] != 0, p[at.OUT_K] != 1
    count = 0
    row = p0
    while row < p1:
        row_end = run_end(row, p1, p[at.PAD_TOP], stride_h, dilation_h, p[at.R], p[at.H])
        r0, r1 = valid_taps(row * stride_h - p[at.PAD_TOP], dilation_h, p[at.R], p[at.H])
        col = q0
        while col < q1:
            col_end = run_end(col, q1, p[at.PAD_LEFT], stride_w, dilation_w, p[at.S], p[at.W])
            s0, s1 = valid_taps(col * stride_w - p[at.PAD_LEFT], dilation_w, p[at.S], p[at.W])
            width = col_end - col
            place = count * mr
            for line in range(row, row_end):
                pixel0 = (line * stride_h - origin_h) * pitch + col * stride_w - origin_w
                out0 = n * p[at.OUT_N] + line * p[at.OUT_P] + col * out_q
                for i in range(width):
                    pixels[place + i] = pixel0 + i * stride_w
                    outs[place + i] = out0 + i * out_q
                if has_residual:
                    residual0 = n * p[at.RESIDUAL_N] + line // p[at.RESIDUAL_UP_H] * p[at.RESIDUAL_P]
                    for i in range(width):
                        residuals[place + i] = residual0 + (col + i) // up_w * residual_q
                place += width
            total = (row_end - row) * width
            end = count + (total + mr - 1) // mr
            for rest in range(place, end * mr):  # a register tile is always full: the rest repeats its last pixel
                pixels[rest], outs[rest] = pixels[place - 1], NOWHERE if is_turned else outs[place - 1]
                residuals[rest] = residuals[place - 1]  # read only where there is one
            for tile in range(count, end):
                head = tile * GROUP_WORDS
                groups[head], groups[head + 1], groups[head + 2], groups[head + 3] = r0, r1, s0, s1
                groups[head + 4] = min(mr, total - (tile - count) * mr)
            count = end
            col = col_end
        row = row_end
    return count


@inline
def locate_task(params, index):
    """Image, output rows and columns, group and filter blocks of a task, each run as its start and its end."""
    p = words(params)
    parts = (p[at.BLOCKS] + p[at.TASK_BLOCKS] - 1) // p[at.TASK_BLOCKS]
    block0 = index % parts * p[at.TASK_BLOCKS]
    group, tile = index // parts % p[at.GROUPS], index // parts // p[at.GROUPS]
    p0 = tile // p[at.TILES_Q] % p[at.TILES_P] * p[at.TILE_P]
    q0 = tile % p[at.TILES_Q] * p[at.TILE_Q]
    p1, q1 = min(p[at.P], p0 + p[at.TILE_P]), min(p[at.Q], q0 + p[at.TILE_Q])
    n = tile // p[at.TILES_Q] // p[at.TILES_P]
    return n, p0, p1, q0, q1, group, block0, min(p[at.BLOCKS], block0 + p[at.TASK_BLOCKS])


@functools.cache
def conv_task(bits: int, mr: int, nv: int, half: bool, *, gaps: bool = False) -> int:
    """Address of the task compiled for one register tile, and for half of it if asked; gaps if groups have parts."""
    width = nv * (512 // bits)
    halves, has_gaps = int(half), int(gaps)
    item = bits // 8

    def conv(params, index, slot):
        p = words(params)
        scratch = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        n, p0, p1, q0, q1, group, block0, block1 = locate_task(params, index)
        h0, w0 = p0 * p[at.STRIDE_H] - p[at.PAD_TOP], q0 * p[at.STRIDE_W] - p[at.PAD_LEFT]
        count = group_pixels(params, scratch, mr, n, p0, p1, q0, q1)
        pixel = words(scratch + p[at.AT_PIXELS])
        pixels, groups = scratch + p[at.AT_PIXELS], words(scratch + p[at.AT_GROUPS])
        outs, residuals, copy = scratch + p[at.AT_OUT], scratch + p[at.AT_RESIDUAL], scratch + p[at.AT_COPY]
        channels, filters = p[at.C] // p[at.GROUPS], p[at.K] // p[at.GROUPS]
        dense_rows = p[at.DILATION_W] == 1
        block_bytes = p[at.R] * p[at.S] * channels * width * item
        # Sums are kept for as long as they are needed: until the last chunk, or until a whole block is stored at once.
        kept_blocks, kept_tiles = channels > p[at.DEPTH], channels > p[at.DEPTH] or p[at.OUT_K] != 1
        is_plain = finishes_in_registers(item, params)
        tile_bytes, near_step = mr * width * item, max(1, mr * item // (p[at.R] * p[at.S]))
        for c0 in range(0, channels, p[at.DEPTH]):
            depth = min(p[at.DEPTH], channels - c0)
            is_last = c0 + depth == channels
            load_tile(params, scratch, p[at.PITCH], n, h0, p[at.ROWS], w0, p[at.COLS],
                      group * channels + c0, depth)  # fmt: skip
            for turn in range((block1 - block0) * count):  # every filter block with every register tile of pixels
                block, g = block0 + turn // count, turn % count
                panel = (p[at.FILTERS] + (group * p[at.BLOCKS] + block) * block_bytes
                         + p[at.R] * p[at.S] * c0 * width * item)  # fmt: skip
                k0, used = group * filters + block * width, min(width, filters - block * width)
                # While this block is multiplied the next comes to L2: the task's next, or the first of the next chunk.
                following, step = panel, 0
                if block + 1 < block1:
                    following, step = panel + block_bytes, width * item // count + 1
                elif not is_last:
                    following = (p[at.FILTERS] + (group * p[at.BLOCKS] + block0) * block_bytes
                                 + p[at.R] * p[at.S] * (c0 + depth) * width * item)  # fmt: skip
                    step = width * item // count + 1
                share = p[at.R] * p[at.S] * depth * step
                head = g * GROUP_WORDS
                r0, r1, s0, s1 = groups[head], groups[head + 1], groups[head + 2], groups[head + 3]
                a = scratch + (r0 * p[at.DILATION_H] * p[at.PITCH] + s0 * p[at.DILATION_W]) * depth * item
                b = panel + (r0 * p[at.S] + s0) * depth * width * item
                kept = (kept_blocks * (block - block0) * count + kept_tiles * g) * tile_bytes
                sums = scratch + p[at.AT_SUMS] + kept
                a_row, b_row = p[at.DILATION_H] * p[at.PITCH] * depth, p[at.S] * depth
                inner, run = s1 - s0, depth
                if dense_rows:  # neighbouring taps are neighbours in the tile and in the panel: one longer run
                    inner, run = 1, (s1 - s0) * depth
                in_half = halves * (used <= width // 2)
                in_registers = is_last and is_plain and used == (width // 2 if in_half else width)
                if is_last and not in_registers:
                    ask_for_output(params, outs + g * mr * 8, residuals + g * mr * 8,
                                   groups[head + 4], k0, used)  # fmt: skip
                near = a + pixel[(g + 1) % count * mr] * depth * item
                bias = p[at.BIAS] + k0 * item if p[at.BIAS] != 0 else 0
                terms = p[at.RESIDUAL] + k0 * item if p[at.RESIDUAL] != 0 else 0
                relu, out = p[at.ACTIVATION] == RELU, p[at.OUT] + k0 * item
                gemm_tile(bits, mr, nv, has_gaps, halves, in_half, a, pixels + g * mr * 8, depth, r1 - r0, a_row, b_row,
                          inner, p[at.DILATION_W] * depth, depth, run, b, width, sums, c0,
                          following + g * share, step, near, near_step, in_registers, bias,
                          terms, residuals + g * mr * 8, relu, out, outs + g * mr * 8)  # fmt: skip
                if is_last and not in_registers:
                    finish_tile(params, sums, width, outs + g * mr * 8, residuals + g * mr * 8, copy,
                                groups[head + 4], k0, used, p[at.OUT_K] != 1)  # fmt: skip
                    if p[at.OUT_K] != 1 and g + 1 == count:
                        sums = scratch + p[at.AT_SUMS] + kept_blocks * (block - block0) * count * tile_bytes
                        scatter_tile(params, sums, outs, count * mr, k0, used)

    return task(conv)


@functools.cache
def pack_task(bits: int, stored: int) -> int:
    """Address of the task that packs one filter block: [chunk][r][s][channel][width], zero beyond the last filter.

    A group may have parts, which are groups of the filters: between filters of one and channels of another lie gaps.
    Words: packed, filters, steps r s c k (elements), R, S, channels and filters of a group, depth, width, blocks,
    parts.
    """
    item = bits // 8

    def pack(params, index, slot):
        p = words(params)
        step_r, step_s, step_c, step_k = p[2], p[3], p[4], p[5]
        R, S, channels, filters, depth, width, blocks = p[6], p[7], p[8], p[9], p[10], p[11], p[12]
        group, block = index // blocks, index % blocks
        k0 = block * width
        used = min(width, filters - k0)
        source = p[1] + (group * filters + k0) * step_k * (stored // 8)
        to = elements(bits, p[0] + index * R * S * channels * width * item)
        part_channels, part_filters = channels // p[13], filters // p[13]
        zero = 0.0 if p[13] > 1 else GAP  # beside gaps −0 becomes 0; else every filter is kept as it is
        at_row = 0
        for c0 in range(0, channels, depth):
            for r in range(R):
                for s in range(S):
                    for c in range(c0, min(channels, c0 + depth)):
                        first, end = 0, used
                        if p[13] > 1:
                            part = c // part_channels
                            first = min(used, max(0, part * part_filters - k0))
                            end = max(first, min(used, (part + 1) * part_filters - k0))
                            for k in range(used):
                                to[at_row + k] = GAP
                        here = r * step_r + s * step_s + c % part_channels * step_c
                        for k in range(first, end):
                            to[at_row + k] = load_element(stored, source, here + k * step_k) + zero
                        for k in range(used, width):
                            to[at_row + k] = 0
                        at_row += width

    return task(pack)
