"""The task of a 1×1 convolution with few filters. Chooses no extents.

    sums[k, pixels] += w[c,k] · merged[c, pixels]      for one channel after the other

Vectors of filters would be nearly empty. Vectors of pixels are full where those of a channel lie side by side: in maps
in NCHW, and in maps of one channel in either layout. A task owns the pixels of an output tile and all filters. The
order of a sum is that of `gemm_task`, so the bits are too.
"""

from __future__ import annotations

import functools

from fusionops.cpu import params as at
from fusionops.cpu.add_task import spread
from fusionops.cpu.conv import locate_task
from fusionops.cpu.epilogue import finish_rows
from fusionops.cpu.jit import inline, spliced, task
from fusionops.cpu.outer_products import add_outer_products
from fusionops.cpu.prologue import merge_rows
from fusionops.cpu.simd import VECTOR_BYTES, clear, doubles, elements, words
from fusionops.cpu.transpose import stack_words

# Of float32; all lie in one block, whose width is a vector. In NCHW 12 and 16 filters took 0.35 to 0.8 of the time of
# register tiles, one to 8 0.08 to 0.5 (16 to 256 channels, 56×56 to 256×256 pixels, AVX2).
MOST_FILTERS = VECTOR_BYTES // 4
# At a time. In tiles of sums 8 took 1.05 times as long, 32 up to 1.3 times where planes are a power of two apart, as
# did planes of which nothing was asked for ahead (12 problems, AVX-512; vector by vector neither matters).
CHANNELS = 16
AHEAD_BYTES = 1024
NEAR_WORDS = MOST_FILTERS * CHANNELS


@inline
def load_plane(bits, to, spare, base, row_step, up_h, up_w, step, h, w, count, kind, factor, factors, c, accumulate):
    """to[i] (+)= weight · plane[h // up_h, (w + i) // up_w] for i < count; `base` is where the plane begins.

    row_step, step   from row to row and from pixel to pixel, in elements
    factors, c       the address of a vector of weights, and the one that counts
    """
    row = base + h // up_h * row_step * (bits // 8)
    source = row + w * (bits // 8)
    if step != 1 or up_w != 1:
        spread(bits, spare, row, step, up_w, w, count)
        source = spare
    if kind == at.WEIGHT_VECTOR:
        kind, factor = at.WEIGHT_SCALAR, float(elements(bits, factors)[c])
    merge_rows(bits, bits, bits, bits, to, 0, source, 0, 1, count, kind, factor, 0, accumulate)


@spliced
def load_channel(bits, params, to, spare, j, n, h, w, count, c, accumulate):
    """load_plane for a channel of a source."""
    here = params + 8 * (at.SOURCES + j * at.SOURCE_WORDS)
    s = words(here)
    base = s[at.S_BASE] + (n * s[at.S_N] + c * s[at.S_C]) * (bits // 8)
    load_plane(bits, to, spare, base, s[at.S_H], s[at.S_UP_H], s[at.S_UP_W], s[at.S_W], h, w, count,
               s[at.S_WEIGHT], doubles(here)[at.S_FACTOR], s[at.S_FACTOR], c, accumulate)  # fmt: skip


@spliced
def gather_filters(bits, to, source, row, filters, channels):
    """Copies `channels` rows of filters: those of each filter side by side."""
    there, here = elements(bits, to), elements(bits, source)
    for k in range(filters):
        for c in range(channels):
            there[k * CHANNELS + c] = here[c * row + k]


@spliced
def finish_plane(bits, params, sums, spare, copy, n, h, w, count, k):
    """Stores the finished sums of one filter."""
    p, item = words(params), bits // 8
    d = elements(bits, sums)
    if p[at.BIAS] != 0:
        bias = elements(bits, p[at.BIAS])[k]
        for i in range(count):
            d[i] += bias
    residual = 0
    if p[at.RESIDUAL] != 0:
        base = p[at.RESIDUAL] + (n * p[at.RESIDUAL_N] + k * p[at.RESIDUAL_K]) * item
        load_plane(bits, copy, spare, base, p[at.RESIDUAL_P], p[at.RESIDUAL_UP_H], p[at.RESIDUAL_UP_W],
                   p[at.RESIDUAL_Q], h, w, count, p[at.RESIDUAL_WEIGHT], doubles(params)[at.RESIDUAL_FACTOR],
                   p[at.RESIDUAL_FACTOR], k, 0)  # fmt: skip
        residual = copy
    step = p[at.OUT_Q]
    out = p[at.OUT] + (n * p[at.OUT_N] + h * p[at.OUT_P] + w * step + k * p[at.OUT_K]) * item
    to = out if step == 1 else sums
    finish_rows(bits, 0, 1, to, 0, sums, 0, count, 0, residual, 0, p[at.ACTIVATION], doubles(params)[at.SLOPE])
    if step != 1:
        there = elements(bits, out)
        for i in range(count):
            there[i * step] = d[i]


@spliced
def add_planes(bits, near, source, step, row, row_step, filters, channels, count, sums, line):
    """Adds the products of so many planes, `step` bytes apart, with their rows of filters."""
    item = bits // 8
    c = 0
    while c < channels:
        together = min(CHANNELS, channels - c)
        gather_filters(bits, near, row + c * row_step * item, row_step, filters, together)
        add_outer_products(bits, filters, together, near, CHANNELS * item, source + c * step, step, AHEAD_BYTES, count,
                           sums, line)  # fmt: skip
        c += together


@functools.cache
def planes_task(bits: int) -> int:
    """Address of the task, whatever the number of channels and filters."""
    item = bits // 8

    def planes(params, index, slot):
        p = words(params)
        scratch = p[at.SCRATCH] + slot * p[at.SCRATCH_BYTES]
        n, p0, p1, q0, q1, _, _, _ = locate_task(params, index)
        spare, loaded, total = scratch, scratch + p[at.AT_PANEL], scratch + p[at.AT_SUMS]
        near, span, filters, row_step = stack_words(NEAR_WORDS), p[at.PITCH], p[at.K], p[at.FILTER_ROW]
        line = span * item
        sums_together = p[at.IS_ADD] != 0 and p[at.SOURCE_COUNT] > 1
        for h in range(p0, p1):
            for w in range(q0, q1, span):
                count = min(span, q1 - w)
                for c0 in range(0, p[at.C], p[at.DEPTH]):
                    end = min(p[at.C], c0 + p[at.DEPTH])
                    sums = total if c0 == 0 else total + filters * line
                    clear(sums, filters * line)
                    for j in range(1 if sums_together else p[at.SOURCE_COUNT]):
                        s = words(params + 8 * (at.SOURCES + j * at.SOURCE_WORDS))
                        first = 0 if p[at.IS_ADD] else s[at.S_FIRST]
                        c, last = max(c0, first), min(end, first + s[at.S_CHANNELS])
                        is_plain = (s[at.S_W] == 1 and s[at.S_UP_W] == 1 and s[at.S_WEIGHT] == at.WEIGHT_NONE
                                    and not sums_together)  # fmt: skip
                        while c < last:
                            channels, source, step = min(CHANNELS, last - c), loaded, line
                            if is_plain:
                                source = s[at.S_BASE] + (n * s[at.S_N] + h // s[at.S_UP_H] * s[at.S_H] + w) * item
                                channels, step = last - c, s[at.S_C] * item
                                source += (c - first) * step
                            else:
                                for i in range(channels):
                                    for term in range(j, p[at.SOURCE_COUNT] if sums_together else j + 1):
                                        load_channel(bits, params, loaded + i * line, spare, term, n, h, w, count,
                                                     c - first + i, term > j)  # fmt: skip
                            add_planes(bits, near, source, step, p[at.FILTERS] + c * row_step * item, row_step,
                                       filters, channels, count, sums, line)  # fmt: skip
                            c += channels
                    if c0 > 0:
                        merge_rows(bits, bits, bits, bits, total, 0, sums, 0, 1, filters * span,
                                   at.WEIGHT_NONE, 1.0, 0, 1)  # fmt: skip
                for k in range(filters):
                    finish_plane(bits, params, total + k * line, spare, scratch + p[at.AT_COPY], n, h, w, count, k)

    return task(planes)
