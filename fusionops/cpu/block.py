"""The params block of a contraction: its fixed words, from spec, tiling and strides. Pure; touches no array.

Shared by the algorithms; each adds the words of how it cuts the work up.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from fusionops.address import address
from fusionops.cpu import activation
from fusionops.cpu import params as at
from fusionops.cpu.memory import ALIGNMENT
from fusionops.cpu.tiling import Tiling
from fusionops.kernel import Operands
from fusionops.spec import ITEM_BYTES, Conv2d, Dense, FusionSpec, Layout, Merge, SourceSpec

WEIGHT_KINDS = {None: at.WEIGHT_NONE, "scalar": at.WEIGHT_SCALAR, "vector": at.WEIGHT_VECTOR}

Strides = tuple[int, ...]  # in bytes, as arrays have them
Steps = tuple[int, int, int, int]  # along N, H, W, C in elements
Words = np.ndarray[Any, Any]


def map_strides(strides: Strides, item: int, spec: FusionSpec) -> Steps:
    """Steps along N, H, W, C in elements; a Dense has its rows along W."""
    steps = [step // item for step in strides]
    if isinstance(spec.contraction, Dense):
        return 0, 0, steps[0], steps[1]
    n, h, w, c = steps if spec.layout is Layout.NHWC else (steps[0], steps[2], steps[3], steps[1])
    return n, h, w, c


def _source_words(spec: FusionSpec, source: SourceSpec, steps: Steps, first: int) -> list[int]:
    """The words of one source, whose channels start at `first` in a concatenation."""
    channels = source.shape[spec.channel_axis]
    return [0, *steps, *source.upsample, channels, first, WEIGHT_KINDS[source.weight], 0, 0]


def block(
    spec: FusionSpec, tiling: Tiling, strides: tuple[Strides, ...], out: Strides, residual: Strides | None
) -> Words:
    """The words that say what is computed and where the operands' elements lie."""
    conv2d, item = spec.conv, ITEM_BYTES[spec.dtype]
    N, H, W, P, Q = spec.N, spec.H, spec.W, spec.P, spec.Q
    sources = [map_strides(steps, item, spec) for steps in strides]
    to = map_strides(out, item, spec)
    residual_steps = map_strides(residual, item, spec) if residual is not None else (0, 0, 0, 0)
    residual_up = spec.residual.upsample if spec.residual else (1, 1)
    stride, padding = conv2d.stride, conv2d.padding
    if is_pointwise(conv2d):
        sources, stride, (H, W) = _without_stride(sources, spec, stride, (H, W))
        if is_flat(spec):
            (N, P, Q), sources, to, residual_steps = _flattened((N, P, Q), sources, to, residual_steps)
            H, W = P, Q
    words = np.zeros(at.SOURCES + at.SOURCE_WORDS * len(sources), np.int64)
    words[: at.SOURCE_COUNT + 1] = [
        N, H, W, spec.C, conv2d.K, conv2d.R, conv2d.S, P, Q, *stride, padding[0][0], padding[1][0], *conv2d.dilation,
        conv2d.groups, spec.merge is Merge.ADD, len(sources),
    ]  # fmt: skip
    words[at.DEPTH], words[at.WIDTH], words[at.STORED_BYTES] = tiling.depth, tiling.width, item
    words[at.BLOCKS], words[at.TASK_BLOCKS] = tiling.blocks, tiling.task_blocks
    words[at.SCRATCH_BYTES] = -(-tiling.scratch_bytes // ALIGNMENT) * ALIGNMENT
    words[at.OUT_N : at.OUT_K + 1] = to
    words[at.RESIDUAL_N : at.RESIDUAL_K + 1] = residual_steps
    words[at.RESIDUAL_UP_H : at.RESIDUAL_UP_W + 1] = residual_up
    words[at.RESIDUAL_WEIGHT] = WEIGHT_KINDS[spec.residual.weight] if spec.residual else at.WEIGHT_NONE
    words[at.ACTIVATION] = activation.code(spec.activation)
    if spec.activation and spec.activation.parameters:
        words.view(np.float64)[at.SLOPE] = spec.activation.parameters[0]
    first = 0
    for j, (source, steps) in enumerate(zip(spec.sources, sources, strict=True)):
        start = at.SOURCES + at.SOURCE_WORDS * j
        words[start : start + at.SOURCE_WORDS] = _source_words(spec, source, steps, first)
        first += source.shape[spec.channel_axis]
    return words


def is_pointwise(conv2d: Conv2d) -> bool:
    """A 1×1 filter without padding: pixels have no neighbours."""
    return (conv2d.R, conv2d.S) == (1, 1) and conv2d.padding == ((0, 0), (0, 0))


def is_flat(spec: FusionSpec) -> bool:
    """Whether the pixels of all images are one row, as far as strides allow: without neighbours, nothing upsampled."""
    every = (*spec.sources, *filter(None, [spec.residual]))
    return is_pointwise(spec.conv) and all(source.upsample == (1, 1) for source in every)


def is_plain(words: Words) -> bool:
    """Whether all sources have their channels side by side, and no weights."""
    steps, weights = (words[at.SOURCES + place :: at.SOURCE_WORDS] for place in (at.S_C, at.S_WEIGHT))
    return bool(np.all(steps == 1) and np.all(weights == at.WEIGHT_NONE))


def _without_stride(
    sources: list[Steps], spec: FusionSpec, stride: tuple[int, int], extent: tuple[int, int]
) -> tuple[list[Steps], tuple[int, int], tuple[int, int]]:
    """A strided 1×1 filter reads a coarser map: every stride-th pixel, which is a matter of steps alone."""
    if stride == (1, 1) or any(source.upsample != (1, 1) for source in spec.sources):
        return sources, stride, extent
    return [(n, h * stride[0], w * stride[1], c) for n, h, w, c in sources], (1, 1), (spec.P, spec.Q)


def _flattened(
    extents: tuple[int, int, int], sources: list[Steps], out: Steps, residual: Steps
) -> tuple[tuple[int, int, int], list[Steps], Steps, Steps]:
    """Pixels without neighbours as one row, as far as every operand's steps allow."""
    N, P, Q = extents
    operands = [*sources, out, residual]
    if all(h == w * Q or P == 1 for _, h, w, _ in operands):
        if all(n == w * Q * P or N == 1 for n, _, w, _ in operands):
            return (1, 1, N * P * Q), sources, out, residual
        return (N, 1, P * Q), sources, out, residual
    return extents, sources, out, residual


def filter_words(spec: FusionSpec, tiling: Tiling, strides: Strides, groups: int) -> list[int]:
    """The words of the packing task but for its two addresses; filters of so many groups are packed apart."""
    conv2d, item = spec.conv, ITEM_BYTES[spec.dtype]
    steps = [step // item for step in strides]
    if isinstance(spec.contraction, Dense):
        steps = [0, 0, *steps]
    elif spec.layout is Layout.NCHW:
        steps = [steps[2], steps[3], steps[1], steps[0]]
    return [0, 0, *steps, conv2d.R, conv2d.S, spec.C // conv2d.groups, conv2d.K // groups, tiling.depth,
            tiling.width, tiling.blocks]  # fmt: skip


def weight_word(weight: Any) -> int:
    """A weight as a word: the address of a vector, or the bits of a float64."""
    if weight is None:
        return 0
    if isinstance(weight, np.ndarray):
        return address(weight)
    return int.from_bytes(struct.pack("=d", weight), sys.byteorder, signed=True)


def widened(operands: Operands) -> Operands:
    """Operands of a narrow dtype whose parameters, bias and weights, are vectors of what is computed with."""

    def wide(value: Any) -> Any:
        return value.astype(np.float32) if isinstance(value, np.ndarray) else value

    return replace(operands, bias=wide(operands.bias), weights=tuple(map(wide, operands.weights)),
                   residual_weight=wide(operands.residual_weight))  # fmt: skip
