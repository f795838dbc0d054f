"""The axes of a merge without a contraction, joined: the fewest loops that walk through every operand.

Pure arithmetic on shapes and strides, for backends to plan with; knows no arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusionops.spec import ITEM_BYTES, FusionSpec, Layout, SourceSpec

Strides = tuple[int, ...]  # in bytes, as arrays have them


@dataclass(frozen=True)
class Grid:
    """The iteration space of an add after neighbouring axes are joined: extents, and per operand its steps and factors.

    Operand 0 is the output. `channel` is the axis a vector of weights runs along, or -1.
    """

    extents: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    factors: tuple[tuple[int, ...], ...]
    channel: int


def _joined(shape: tuple[int, ...], steps: list[list[int]], factors: list[list[int]], channel: int) -> Grid:
    """Joins axes that every operand walks through without a jump; axes of extent 1 go first."""
    keep = [d for d, extent in enumerate(shape) if extent != 1 or d == channel] or [len(shape) - 1]
    extents = [shape[d] for d in keep]
    steps = [[s[d] for d in keep] for s in steps]
    factors = [[f[d] for d in keep] for f in factors]
    channel = keep.index(channel) if channel >= 0 else -1
    d = len(extents) - 2
    while d >= 0:
        joined = all(s[d] == s[d + 1] * extents[d + 1] for s in steps) and all(f[d] == f[d + 1] == 1 for f in factors)
        if joined and channel not in (d, d + 1):
            extents[d : d + 2] = [extents[d] * extents[d + 1]]
            for s, f in zip(steps, factors, strict=True):
                del s[d], f[d]
            channel -= channel > d
        d -= 1
    return Grid(tuple(extents), tuple(map(tuple, steps)), tuple(map(tuple, factors)), channel)


def _aligned(steps: tuple[int, ...], rank: int, shape: tuple[int, ...]) -> list[int]:
    """Right-aligned to `rank` axes; broadcast axes (extent 1) get step 0."""
    missing = rank - len(steps)
    return [0] * missing + [0 if extent == 1 else step for extent, step in zip(shape, steps, strict=True)]


def _factors(source: SourceSpec, spec: FusionSpec, rank: int) -> list[int]:
    factors = [1] * rank
    if source.upsample != (1, 1):
        h = 1 if spec.layout is Layout.NHWC else 2
        factors[h : h + 2] = source.upsample
    return factors


def add_grid(spec: FusionSpec, strides: tuple[Strides, ...], out: Strides) -> Grid:
    """The iteration space of an add of sources with these strides."""
    shape = spec.merged_shape or (1,)
    rank, item = len(shape), ITEM_BYTES[spec.dtype]
    steps = [[step // item for step in out] if out else [1]]
    steps += [
        _aligned(tuple(step // item for step in each), rank, source.shape)
        for each, source in zip(strides, spec.sources, strict=True)
    ]
    factors = [[1] * rank] + [_factors(source, spec, rank) for source in spec.sources]
    channel = -1
    if any(source.weight == "vector" for source in spec.sources):
        channel = rank - 1 if spec.layout is Layout.NHWC else 1
    return _joined(shape, steps, factors, channel)


def row_step(shape: tuple[int, ...], strides: Strides, axis: int, item: int) -> int | None:
    """Bytes from one row shape[axis:] to the next, if each row is contiguous and the rows are equally spaced."""
    contiguous = item
    for extent, step in zip(shape[axis:][::-1], strides[axis:][::-1], strict=True):
        if extent != 1 and step != contiguous:
            return None
        contiguous *= extent
    outer = [(extent, step) for extent, step in zip(shape[:axis], strides[:axis], strict=True) if extent != 1]
    if not outer:
        return contiguous
    row = reach = outer[-1][1]
    for extent, step in outer[::-1]:
        if step != reach:
            return None
        reach *= extent
    return row
