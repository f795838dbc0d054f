"""The public functions on the CPU, as a user calls them, against a few lines of NumPy: exact, or bit for bit.

Every kernel on every problem is test_kernels' business, bad input test_binding's.
"""

from __future__ import annotations

import warnings
from itertools import starmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusionops as fo

MIXED = ("bool", "int8", "uint8", "int64", "uint64", "float16", "float32", "float64")


def integers(*shape, seed=0, dtype=np.float32):
    """Small integers, so that every sum below is exact in any order."""
    return np.random.default_rng([seed, *shape]).integers(-4, 5, shape).astype(dtype)


def reals(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def convolved(x, filters, *, stride=(1, 1), pad=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """Every window of a padded map, times the filters: (N, H, W, C) with (R, S, C/groups, K)."""
    R, S, depth, K = filters.shape
    padded = np.pad(x, ((0, 0), *pad, (0, 0)))
    reach = (R - 1) * dilation[0] + 1, (S - 1) * dilation[1] + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(1, 2))
    windows = windows[:, :: stride[0], :: stride[1], :, :: dilation[0], :: dilation[1]]
    parts = [
        np.einsum("npqcrs,rsck->npqk", windows[:, :, :, g * depth : (g + 1) * depth], filters[..., k : k + K // groups])
        for g, k in enumerate(range(0, K, K // groups))
    ]
    return np.concatenate(parts, axis=-1)


# add and concat: NumPy's bits


def folded(terms):
    """x0 + x1 + … as NumPy evaluates it."""
    with np.errstate(all="ignore"):
        total = terms[0]
        for term in terms[1:]:
            total = np.add(total, term)
        return np.array(total)


SUMS = {
    "one": [reals(3, 4)],
    "two": [reals(3, 4), reals(3, 4, seed=1)],
    "five": [reals(3, 5, seed=seed) for seed in range(5)],
    "five_doubles": [reals(3, 5, seed=seed, dtype=np.float64) for seed in range(5)],
    "broadcast": [reals(3, 1, 4), reals(5, 1), reals(4)],
    "broadcast_one": [reals(1, 1), reals(1)],
    "no_axes": [np.float32(0.1), np.float32(0.2), np.float32(0.3)],
    "python_numbers": [reals(4), 1, 0.1],
    "python_number_first": [0.1, reals(4)],
    "empty": [reals(0, 3), reals(1)],
    "wrapping": [np.array([200], np.uint8), np.array([100], np.uint8)],
    "wrapping_before_promotion": [np.array([200], np.uint8), np.array([100], np.uint8), reals(1)],
    "bools": [np.array([True, False]), np.array([True, False])],
    "negative_zero": [np.float32([-0.0]), np.float32([-0.0])],
    "infinite": [np.float32([np.inf, np.nan, 3e38]), np.float32([-np.inf, 1, 3e38])],
    "views": [reals(6, 8)[::2, ::-2], reals(4, 3).T, np.broadcast_to(reals(4), (3, 4))],
    "swapped": [reals(3, 4).astype(">f4"), reals(3, 4, seed=1)],
    "lists": [[1, 2], [[3.5], [4.5]]],
}


@pytest.mark.parametrize("terms", SUMS.values(), ids=SUMS)
def test_add_is_numpys(terms):
    expected = folded(terms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fo.add(terms)
    assert (type(result), result.dtype, result.shape) == (np.ndarray, expected.dtype, expected.shape)
    np.testing.assert_array_equal(result.view(f"V{result.itemsize}"), expected.view(f"V{result.itemsize}"))


@given(st.lists(st.sampled_from(MIXED), min_size=1, max_size=4), st.lists(st.integers(0, 4), max_size=4), st.data())
def test_add_and_concat_are_numpys_whatever_they_are_given(dtypes, shape, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))

    def draw(dtype):
        array = np.asarray(rng.integers(0, 100, shape) * (1.5 if "float" in dtype else 1)).astype(dtype)
        axes = data.draw(st.permutations(range(len(shape))))
        array = array.transpose(axes).copy().transpose(np.argsort(axes).astype(int))
        return array[..., ::-1] if shape and data.draw(st.booleans()) else array

    arrays = [draw(dtype) for dtype in dtypes]
    expected = folded(arrays)
    result = fo.add(arrays)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)
    if shape:
        axis = data.draw(st.integers(-len(shape), len(shape) - 1))
        joined = fo.concat(arrays, axis=axis)
        assert joined.dtype == np.concatenate(arrays, axis).dtype
        np.testing.assert_array_equal(joined, np.concatenate(arrays, axis))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_concat_is_numpys_along_every_axis(axis):
    shapes = [[2, 3, 4] for _ in range(3)]
    for extent, shape in zip((1, 0, 5), shapes, strict=True):
        shape[axis] = extent
    arrays = [reals(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    np.testing.assert_array_equal(fo.concat(arrays, axis=axis), np.concatenate(arrays, axis))


def test_weighted_add_rounds_every_product_and_sum():
    x, y, z = (reals(5, 7, seed=seed) for seed in range(3))
    vector = reals(7, seed=9)
    expected = np.float32(0.1) * x + vector * y + z
    np.testing.assert_array_equal(fo.add([x, y, z], weights=[0.1, vector, None]), expected)
    np.testing.assert_array_equal(fo.add([fo.Source(x, weight=0.1), fo.Source(y, weight=vector), z]), expected)


def test_normalised_weights():
    x, y = reals(5, 7), reals(5, 7, seed=1)
    shares = [np.float32(w / (1.25 + 1e-4)) for w in (0.75, 0.5)]
    expected = shares[0] * x + shares[1] * y
    np.testing.assert_array_equal(fo.add([x, y], weights=[0.75, 0.5], normalize="relu"), expected)
    half = np.float32(0.5)
    np.testing.assert_array_equal(fo.add([x, y], weights=[3, 3], normalize="softmax"), half * x + half * y)


def test_upsampled_add():
    small, large = reals(2, 3, 2, 5), reals(2, 6, 6, 5)
    expected = small.repeat(2, axis=1).repeat(3, axis=2) + large
    np.testing.assert_array_equal(fo.add([fo.Source(small, upsample=(2, 3)), large]), expected)


def test_fused_concat():
    small, large = reals(2, 3, 2, 5), reals(2, 6, 4, 3)
    joined = fo.concat([fo.Source(small, upsample=2), fo.Source(large, weight=0.3), large])
    expected = [small.repeat(2, axis=1).repeat(2, axis=2), np.float32(0.3) * large, large]
    np.testing.assert_array_equal(joined, np.concatenate(expected, -1))


def test_activated_add():
    x, y = integers(5, 7), integers(5, 7, seed=1)
    np.testing.assert_array_equal(fo.add([x, y], activation="relu"), np.maximum(x + y, 0))
    np.testing.assert_array_equal(
        fo.add([x, y], activation=("leaky_relu", 0.5)), np.where(x + y < 0, (x + y) / 2, x + y)
    )


# Contractions: exact on integers

X, Y = integers(2, 7, 9, 4), integers(2, 7, 9, 2, seed=1)
WINDOWS = {
    "valid": ({}, {}),
    "same": ({"padding": "same"}, {"pad": ((1, 1), (1, 1))}),
    "same_strided": ({"padding": "same", "stride": 2}, {"pad": ((1, 1), (1, 1)), "stride": (2, 2)}),
    "strides": ({"stride": (2, 3)}, {"stride": (2, 3)}),
    "dilated": ({"dilation": (3, 2)}, {"dilation": (3, 2)}),
    "strided_and_dilated": ({"stride": 2, "dilation": 2}, {"stride": (2, 2), "dilation": (2, 2)}),
    "padded": ({"padding": ((0, 2), (3, 1))}, {"pad": ((0, 2), (3, 1))}),
    "padded_beyond_the_filter": ({"padding": 5}, {"pad": ((5, 5), (5, 5))}),
    "grouped": ({"groups": 2}, {"groups": 2}),
    "depthwise": ({"groups": 6, "padding": 1}, {"groups": 6, "pad": ((1, 1), (1, 1))}),
}


@pytest.mark.parametrize(("options", "window"), WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_convolutions(layout, options, window):
    groups = window.get("groups", 1)
    filters, tied = integers(3, 3, 6 // groups, 6), integers(3, 3, 6 // groups, 6, seed=2)
    z = integers(2, 7, 9, 6, seed=3)
    to_maps, to_filters = (lambda m: m, lambda f: f) if layout == "NHWC" else (nchw, oihw)
    concat = convolved(np.concatenate([X, Y], -1), filters, **window)
    result = fo.concat_conv([to_maps(X), to_maps(Y)], to_filters(filters), layout=layout, **options)
    np.testing.assert_array_equal(result, to_maps(concat))
    add = convolved(z + 2 * z[::-1], tied, **window)
    result = fo.add_conv([to_maps(z), to_maps(z[::-1])], to_filters(tied), weights=[1, 2], layout=layout, **options)
    np.testing.assert_array_equal(result, to_maps(add))


def nchw(maps):
    return np.ascontiguousarray(maps.transpose(0, 3, 1, 2))


def oihw(filters):
    return np.ascontiguousarray(filters.transpose(3, 2, 0, 1))


@pytest.mark.parametrize("strict", [False, True])
def test_epilogue_of_a_convolution(strict):
    filters, bias, residual = integers(3, 3, 6, 5), integers(5), integers(2, 7, 9, 5, seed=4)
    total = convolved(np.concatenate([X, Y], -1), filters, pad=((1, 1), (1, 1))) + bias + residual
    result = fo.concat_conv([X, Y], filters, bias, padding="same", residual=residual, activation="relu", strict=strict)
    np.testing.assert_array_equal(result, np.maximum(total, 0))


def test_residual_can_be_upsampled_and_weighted():
    small = integers(1, 2, 3, 5)
    x, filters = integers(1, 4, 6, 4), integers(1, 1, 4, 5)
    result = fo.add_conv([x], filters, residual=fo.Source(small, upsample=2, weight=0.5))
    np.testing.assert_array_equal(result, convolved(x, filters) + 0.5 * small.repeat(2, 1).repeat(2, 2))


def test_upsampled_source_of_a_convolution():
    small, large = integers(1, 4, 3, 5), integers(1, 8, 6, 2)
    filters = integers(3, 3, 7, 4)
    up = np.concatenate([small.repeat(2, 1).repeat(2, 2), large], -1)
    result = fo.concat_conv([fo.Source(small, upsample=2), large], filters, padding=1)
    np.testing.assert_array_equal(result, convolved(up, filters, pad=((1, 1), (1, 1))))


def test_sum_is_returned_with_the_result():
    x, y, filters = reals(1, 5, 6, 3), reals(1, 5, 6, 3, seed=1), reals(3, 3, 3, 4)
    out = np.empty((1, 3, 4, 4), np.float32)
    result, merged = fo.add_conv([x, y], filters, return_sum=True, out=out)
    assert result is out
    np.testing.assert_array_equal(merged, x + y)
    np.testing.assert_array_equal(result, fo.add_conv([x, y], filters))


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_dense_layers(lead):
    x, y, matrix, bias, z = (
        integers(*lead, 4),
        integers(*lead, 3),
        integers(7, 5),
        integers(5),
        integers(*lead, 5, seed=7),
    )
    expected = np.maximum(np.concatenate([x, y], -1) @ matrix + bias + z, 0)
    np.testing.assert_array_equal(fo.concat_dense([x, y], matrix, bias, residual=z, activation="relu"), expected)
    expected = (x + 3 * x[::-1] if lead else 4 * x) @ matrix[:4]
    other = x[::-1] if lead else x
    np.testing.assert_array_equal(fo.add_dense([x, other], matrix[:4], weights=[None, 3]), expected)


# Promises


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("strict", [False, True])
def test_fused_equals_unfused_bit_for_bit(dtype, strict):
    x, y, z = (reals(2, 8, 9, 5, seed=seed, dtype=dtype) for seed in range(3))
    filters, wide = reals(3, 3, 5, 7, dtype=dtype), reals(3, 3, 15, 7, dtype=dtype)
    options = {"padding": "same", "activation": "silu", "strict": strict}
    fused = fo.add_conv([x, y, z], filters, weights=[0.3, None, 0.7], **options)
    np.testing.assert_array_equal(fused, fo.add_conv([fo.add([x, y, z], weights=[0.3, None, 0.7])], filters, **options))
    fused = fo.concat_conv([x, y, z], wide, **options)
    np.testing.assert_array_equal(fused, fo.concat_conv([fo.concat([x, y, z])], wide, **options))


def test_concat_is_add_with_filters_of_its_own():
    filters = integers(3, 3, 6, 5)
    split = starmap(fo.add_conv, [([X], filters[:, :, :4]), ([Y], filters[:, :, 4:])])
    np.testing.assert_array_equal(fo.concat_conv([X, Y], filters), sum(split))


def views(x):
    """The same values in other memory."""
    padded = np.full([extent + 3 for extent in x.shape], np.nan, x.dtype)
    inner = tuple(slice(2, -1) for _ in x.shape)
    padded[inner] = x
    yield padded[inner]
    yield np.asfortranarray(x)
    yield x[:, ::-1].copy()[:, ::-1]
    yield x.astype(x.dtype.newbyteorder())
    yield x.repeat(2, axis=-1)[..., ::2]
    yield x.tolist() if x.dtype == np.float64 else x.view(np.memmap)
    misaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    misaligned[...] = x
    misaligned.flags.writeable = False
    yield misaligned


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_do_not_depend_on_where_the_values_are(dtype):
    x, filters, bias = reals(2, 6, 7, 5, dtype=dtype), reals(3, 3, 10, 4, dtype=dtype), reals(4, dtype=dtype)
    expected = fo.concat_conv([x, x], filters, bias, residual=x[:, 2:, 2:, :4])
    for other in views(x):
        np.testing.assert_array_equal(fo.concat_conv([other, x], filters, bias, residual=x[:, 2:, 2:, :4]), expected)
        np.testing.assert_array_equal(fo.add([other, x]), x + x)
        np.testing.assert_array_equal(fo.concat([other, x]), np.concatenate([x, x], -1))
    for other in views(filters):
        np.testing.assert_array_equal(fo.concat_conv([x, x], other, bias, residual=x[:, 2:, 2:, :4]), expected)
    np.testing.assert_array_equal(
        fo.concat_conv([x, x], filters, bias.repeat(2)[::2], residual=x[:, 2:, 2:, :4]), expected
    )


def test_prepacked_filters_give_the_same_bits():
    x, filters, matrix = reals(2, 6, 7, 5), reals(3, 3, 5, 4), reals(5, 9)
    packed = fo.prepack(filters)
    for options in ({}, {"strict": True}, {"padding": "same"}, {}):
        np.testing.assert_array_equal(fo.add_conv([x], packed, **options), fo.add_conv([x], filters, **options))
    turned = fo.prepack(oihw(filters), layout="NCHW")
    np.testing.assert_array_equal(fo.add_conv([nchw(x)], turned, layout="NCHW"), nchw(fo.add_conv([x], filters)))
    np.testing.assert_array_equal(fo.add_dense([x], fo.prepack(matrix)), fo.add_dense([x], matrix))


@pytest.mark.parametrize("to", ["new", "reversed", "transposed", "sliced"])
def test_out_is_written_whatever_its_strides(to):
    x, filters, matrix = integers(1, 6, 7, 4), integers(3, 3, 8, 5), integers(8, 5)
    memory = np.full((2, 8, 10, 6), np.nan, np.float32)
    out = {
        "new": lambda: np.full((1, 4, 5, 5), np.nan, np.float32),
        "reversed": lambda: memory[:1, :4, :5, :5][:, ::-1, ::-1, ::-1],
        "transposed": lambda: np.full((5, 5, 4, 1), np.nan, np.float32).T,
        "sliced": lambda: memory[1:, ::2, ::2, :5],
    }[to]()
    assert fo.concat_conv([x, x], filters, out=out) is out
    np.testing.assert_array_equal(out, fo.concat_conv([x, x], filters))
    rows = x[:, :4, :5]
    assert fo.concat_dense([rows, rows], matrix, out=out) is out
    np.testing.assert_array_equal(out, np.concatenate([rows, rows], -1) @ matrix)
    assert fo.add([out, out.copy()], out=out) is out
    np.testing.assert_array_equal(out, 2 * (np.concatenate([rows, rows], -1) @ matrix))


def test_result_is_as_if_out_were_elsewhere():
    memory = np.arange(40, dtype=np.float32)
    expected = memory[:30] + memory[10:]
    fo.add([memory[:30], memory[10:]], out=memory[5:35])
    np.testing.assert_array_equal(memory[5:35], expected)
    maps = integers(1, 8, 8, 4)
    filters = integers(3, 3, 4, 4)
    expected = convolved(maps, filters, pad=((1, 1), (1, 1))) + maps
    assert fo.add_conv([maps], filters, padding="same", residual=maps, out=maps) is maps
    np.testing.assert_array_equal(maps, expected)


@pytest.mark.parametrize("op", ["conv", "dense", "add", "concat"])
def test_nothing_in_gives_nothing_out(op):
    x = integers(0, 5, 5, 3)
    result = {
        "conv": lambda: fo.add_conv([x, x], integers(3, 3, 3, 4)),
        "dense": lambda: fo.concat_dense([x, x], integers(6, 4)),
        "add": lambda: fo.add([x, x]),
        "concat": lambda: fo.concat([x, x]),
    }[op]()
    assert result.shape == {"conv": (0, 3, 3, 4), "dense": (0, 5, 5, 4), "add": x.shape, "concat": (0, 5, 5, 6)}[op]


@pytest.mark.parametrize("op", [fo.add_conv, fo.concat_conv], ids=lambda op: op.__name__)
def test_a_result_of_padding_alone_is_the_bias(op):
    result = op([integers(1, 0, 3, 4)], integers(3, 3, 4, 5), integers(5), padding=2)
    np.testing.assert_array_equal(result, np.broadcast_to(integers(5), (1, 2, 5, 5)))


def test_nan_and_infinity_stay_where_they_belong():
    x = np.ones((1, 4, 4, 1), np.float32)
    x[0, 0, 0] = np.inf
    result = fo.add_conv([x], np.ones((3, 3, 1, 1), np.float32), padding="same", activation="relu", strict=True)
    assert not np.isnan(result).any()
    np.testing.assert_array_equal(np.isinf(result[0, :, :, 0]), np.pad(np.ones((2, 2), bool), ((0, 2), (0, 2))))
    y = np.full_like(x, np.nan)
    grouped = fo.concat_conv([np.ones_like(x), y], np.ones((1, 1, 1, 2), np.float32), groups=2, activation="relu")
    assert not np.isnan(grouped[..., 0]).any()
    assert np.isnan(grouped[..., 1]).all()
