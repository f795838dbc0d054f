"""Arbitrary problems, drawn by Hypothesis through the public functions, against the reference and NumPy.

Integers, so that equal means equal. What a run finds becomes a named problem of `fusionops.problems`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, note, settings
from hypothesis import strategies as st

import fusionops as fo

DTYPES = ("float32", "float64")


def integers(rng: np.random.Generator, *shape: int, dtype: str) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(dtype)


@dataclass(frozen=True)
class Drawn:
    """One call: everything but the numbers."""

    op: str
    batch: int
    extents: tuple[int, int]
    channels: tuple[int, ...]
    upsample: tuple[tuple[int, int], ...]
    filters: int
    taps: tuple[int, int]
    options: dict[str, Any]
    bias: bool
    residual: bool
    dtype: str
    views: tuple[str, ...]
    seed: int


VIEWS = ("plain", "step", "reversed", "fortran", "crop")


def seen_as(array: np.ndarray, view: str) -> np.ndarray:
    """An equal array with other strides."""
    if view == "step":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if view == "reversed":
        return np.flip(np.flip(array).copy())
    if view == "crop":
        return np.pad(array, 2, constant_values=np.nan)[(slice(2, -2),) * array.ndim]
    return np.asfortranarray(array) if view == "fortran" else array


@st.composite
def problems(draw) -> Drawn:
    small, pads = st.integers(1, 3), st.integers(0, 3)
    op = draw(st.sampled_from(["add_conv", "concat_conv"]))
    count = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    if op == "add_conv":
        channels = (groups * draw(st.integers(1, 12)),) * count
    else:
        parts = draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
        parts[-1] += -sum(parts) % groups
        channels = tuple(parts)
    upsample = tuple(draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)])) for _ in range(count))
    h_unit, w_unit = np.lcm.reduce(upsample, axis=0).tolist()
    extents = h_unit * draw(st.integers(1, 9)), w_unit * draw(st.integers(1, 20 // w_unit))
    taps = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dilation = draw(small), draw(small)
    room = [(size - (tap - 1) * apart - 1) for size, tap, apart in zip(extents, taps, dilation, strict=True)]
    if draw(st.booleans()):
        padding: Any = "same"
    else:  # at least as much as makes the filter fit
        sides = [(draw(pads), draw(pads)) for _ in range(2)]
        padding = tuple(
            (before, after + max(0, -(r + before + after))) for (before, after), r in zip(sides, room, strict=True)
        )
    return Drawn(
        op=op,
        batch=draw(st.integers(1, 3)),
        extents=extents,
        channels=channels,
        upsample=upsample,
        filters=groups * draw(st.integers(1, 30)),
        taps=taps,
        options={
            "stride": (draw(small), draw(small)),
            "dilation": dilation,
            "padding": padding,
            "groups": groups,
            "layout": draw(st.sampled_from(["NHWC", "NCHW"])),
            "activation": draw(st.sampled_from([None, "relu", "relu6", ("leaky_relu", 0.25)])),
            "strict": draw(st.booleans()),
        },
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        views=tuple(draw(st.sampled_from(VIEWS)) for _ in range(count + 1)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=300)
@given(problems())
def test_any_convolution_equals_the_reference(drawn):
    rng = np.random.default_rng(drawn.seed)
    first = drawn.options["layout"] == "NCHW"

    def placed(n, h, w, c):
        return (n, c, h, w) if first else (n, h, w, c)

    sources = []
    for channels, (up_h, up_w), view in zip(drawn.channels, drawn.upsample, drawn.views, strict=False):
        shape = placed(drawn.batch, drawn.extents[0] // up_h, drawn.extents[1] // up_w, channels)
        sources.append(fo.Source(seen_as(integers(rng, *shape, dtype=drawn.dtype), view), upsample=(up_h, up_w)))
    depth = (sum(drawn.channels) if drawn.op == "concat_conv" else drawn.channels[0]) // drawn.options["groups"]
    shape = (drawn.filters, depth, *drawn.taps) if first else (*drawn.taps, depth, drawn.filters)
    filters = seen_as(integers(rng, *shape, dtype=drawn.dtype), drawn.views[-1])
    bias = integers(rng, drawn.filters, dtype=drawn.dtype) if drawn.bias else None
    call = getattr(fo, drawn.op)
    expected = call(sources, filters, bias, backend="reference", **drawn.options)
    residual = integers(rng, *expected.shape, dtype=drawn.dtype) if drawn.residual else None
    expected = call(sources, filters, bias, residual=residual, backend="reference", **drawn.options)
    actual = call(sources, filters, bias, residual=residual, **drawn.options)
    assert actual.dtype == drawn.dtype
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 70),
    channels=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    units=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    views=st.lists(st.sampled_from(VIEWS), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_dense_layer_equals_the_reference(rows, channels, units, dtype, views, seed):
    rng = np.random.default_rng(seed)
    sources = [seen_as(integers(rng, rows, c, dtype=dtype), view) for c, view in zip(channels, views, strict=False)]
    matrix = seen_as(integers(rng, sum(channels), units, dtype=dtype), views[-1])
    bias = integers(rng, units, dtype=dtype)
    expected = fo.concat_dense(sources, matrix, bias, activation="relu", backend="reference")
    np.testing.assert_array_equal(fo.concat_dense(sources, matrix, bias, activation="relu"), expected)
    summands = [source[:, : min(channels)] for source in sources]
    expected = fo.add_dense(summands, matrix[: min(channels)], bias, backend="reference")
    np.testing.assert_array_equal(fo.add_dense(summands, matrix[: min(channels)], bias), expected)


JOINABLE = ["float32", "float64", "float16", "int8", "uint8", "int16", "int64", "bool"]


@settings(max_examples=200)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    ones=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(JOINABLE), min_size=4, max_size=4),
    views=st.lists(st.sampled_from(VIEWS[:-1]), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_add_is_numpys(shape, ones, dtypes, views, seed):
    rng = np.random.default_rng(seed)
    arrays = []
    for flags, dtype, view in zip(ones, dtypes, views, strict=False):
        extents = [1 if flag else extent for flag, extent in zip(flags, shape, strict=False)]
        array = rng.integers(0, 100, extents).astype(dtype)
        arrays.append(seen_as(array, view) if array.ndim else array)
    expected = arrays[0]
    for array in arrays[1:]:
        expected = np.add(expected, array)
    actual = fo.add(arrays)
    note(f"{[(a.shape, a.dtype) for a in arrays]}")
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


@settings(max_examples=200)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    axis=st.integers(-4, 3),
    dtypes=st.lists(st.sampled_from(JOINABLE), min_size=5, max_size=5),
    views=st.lists(st.sampled_from(VIEWS[:-1]), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_concat_is_numpys(shape, lengths, axis, dtypes, views, seed):
    axis = axis % len(shape) - len(shape) * (axis < 0)
    rng = np.random.default_rng(seed)
    arrays = []
    for length, dtype, view in zip(lengths, dtypes, views, strict=False):
        extents = list(shape)
        extents[axis] = length
        arrays.append(seen_as(rng.integers(0, 100, extents).astype(dtype), view))
    expected = np.concatenate(arrays, axis=axis)
    actual = fo.concat(arrays, axis=axis)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()
