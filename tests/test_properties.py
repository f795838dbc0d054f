"""Laws the public functions obey whatever the numbers are: identities, symmetries, fused against unfused, NaN and Inf.

Integers make them equalities. No expected values but those; arbitrary problems are drawn in test_arbitrary.py.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import fusionops as fo

DTYPES = ("float32", "float64")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def integers(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(dtype)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def maps(rng):
    """Two maps of 5 channels and filters for one of them."""
    return integers(rng, 2, 9, 11, 5), integers(rng, 2, 9, 11, 5), integers(rng, 3, 3, 5, 7)


def conv(x, filters, **options):
    """A plain convolution: an add of one source."""
    return fo.add_conv([x], filters, **options)


OPTIONS = [
    {},
    {"padding": "same"},
    {"padding": "same", "stride": 2},
    {"padding": ((1, 0), (0, 2)), "dilation": 2},
    {"padding": 3, "stride": (3, 1)},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@every_option
def test_identity_of_add(maps, options):
    x, y, filters = maps
    summed = fo.add_conv([x, y], filters, **options)
    assert np.count_nonzero(summed) > summed.size / 2
    np.testing.assert_array_equal(summed, conv(x, filters, **options) + conv(y, filters, **options))


@every_option
def test_identity_of_concat(maps, rng, options):
    x, y, of_x = maps
    of_y = integers(rng, *of_x.shape)
    both = fo.concat_conv([x, y], np.concatenate([of_x, of_y], axis=2), **options)
    assert np.count_nonzero(both) > both.size / 2
    np.testing.assert_array_equal(both, conv(x, of_x, **options) + conv(y, of_y, **options))


def test_add_is_concat_with_tied_filters(maps):
    x, y, filters = maps
    tied = np.concatenate([filters, filters], axis=2)
    np.testing.assert_array_equal(fo.add_conv([x, y], filters), fo.concat_conv([x, y], tied))


@every_option
def test_the_distance_between_concat_and_add_is_a_convolution_of_the_difference(maps, rng, options):
    x, y, of_x = maps
    of_y = of_x + 2 * integers(rng, *of_x.shape)  # so that (K_x ± K_y) / 2 are integers
    concat = fo.concat_conv([x, y], np.concatenate([of_x, of_y], axis=2), **options)
    add = fo.add_conv([x, y], (of_x + of_y) / 2, **options)
    np.testing.assert_array_equal(concat - add, conv(x - y, (of_x - of_y) / 2, **options))


@every_option
def test_linear_in_the_sources_and_in_the_filters(maps, rng, options):
    x, y, filters = maps
    other = integers(rng, *filters.shape)
    np.testing.assert_array_equal(conv(3 * x, filters, **options), 3 * conv(x, filters, **options))
    np.testing.assert_array_equal(
        fo.add_conv([x, y], filters + other, **options),
        fo.add_conv([x, y], filters, **options) + fo.add_conv([x, y], other, **options),
    )


def test_filters_of_zeros_silence_a_source(maps):
    x, y, filters = maps
    silent = np.concatenate([filters, np.zeros_like(filters)], axis=2)
    np.testing.assert_array_equal(fo.concat_conv([x, y], silent), conv(x, filters))


def test_sources_may_change_places(maps, rng):
    x, y, of_x = maps
    of_y = integers(rng, *of_x.shape)
    np.testing.assert_array_equal(
        fo.concat_conv([x, y], np.concatenate([of_x, of_y], axis=2)),
        fo.concat_conv([y, x], np.concatenate([of_y, of_x], axis=2)),
    )
    np.testing.assert_array_equal(fo.add_conv([x, y], of_x), fo.add_conv([y, x], of_x))


def test_channels_and_filters_may_be_permuted(maps, rng):
    x, y, filters = maps
    channels, outputs = rng.permutation(5), rng.permutation(7)
    permuted = fo.add_conv([x[..., channels], y[..., channels]], filters[:, :, channels][..., outputs])
    np.testing.assert_array_equal(permuted, fo.add_conv([x, y], filters)[..., outputs])


def test_a_shifted_map_gives_a_shifted_result(maps):
    x, y, filters = maps
    whole = fo.add_conv([x, y], filters)
    np.testing.assert_array_equal(fo.add_conv([x[:, 2:, 3:], y[:, 2:, 3:]], filters), whole[:, 2:, 3:])


def test_a_flipped_map_under_flipped_filters_gives_a_flipped_result(maps):
    x, y, filters = maps
    whole = fo.add_conv([x, y], filters, padding=1)
    flipped = fo.add_conv([x[:, ::-1, ::-1], y[:, ::-1, ::-1]], filters[::-1, ::-1], padding=1)
    np.testing.assert_array_equal(flipped, whole[:, ::-1, ::-1])


def test_a_transposed_map_under_transposed_filters_gives_a_transposed_result(maps):
    x, y, filters = maps
    transposed = fo.concat_conv([m.swapaxes(1, 2) for m in (x, y)], np.tile(filters, (1, 1, 2, 1)).swapaxes(0, 1))
    np.testing.assert_array_equal(transposed.swapaxes(1, 2), fo.concat_conv([x, y], np.tile(filters, (1, 1, 2, 1))))


def test_channels_first_is_channels_last_transposed(maps):
    x, y, filters = maps
    bias = np.arange(7, dtype=np.float32)
    last = fo.concat_conv([x, y], np.tile(filters, (1, 1, 2, 1)), bias, padding="same", stride=2)
    first = fo.concat_conv(
        [m.transpose(0, 3, 1, 2).copy() for m in (x, y)],
        np.tile(filters, (1, 1, 2, 1)).transpose(3, 2, 0, 1).copy(),
        bias,
        padding="same",
        stride=2,
        layout="NCHW",
    )
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))


@every_dtype
def test_a_pointwise_convolution_is_a_dense_layer(rng, dtype):
    x, y = (rng.standard_normal((2, 5, 6, 9)).astype(dtype) for _ in range(2))
    matrix, bias = rng.standard_normal((9, 70)).astype(dtype), rng.standard_normal(70).astype(dtype)
    np.testing.assert_array_equal(
        fo.add_conv([x, y], matrix[None, None], bias, activation="relu"),
        fo.add_dense([x, y], matrix, bias, activation="relu"),
    )


def test_a_dilated_filter_is_a_filter_with_holes(maps):
    x, _, filters = maps
    holes = np.zeros((5, 5, 5, 7), np.float32)
    holes[::2, ::2] = filters
    np.testing.assert_array_equal(conv(x, filters, dilation=2, padding=2), conv(x, holes, padding=2))


def test_a_stride_skips_placements(maps):
    x, _, filters = maps
    np.testing.assert_array_equal(conv(x, filters, stride=(2, 3)), conv(x, filters)[:, ::2, ::3])


def test_padding_is_a_frame_of_zeros(maps):
    x, y, filters = maps
    framed = [np.pad(m, ((0, 0), (1, 2), (0, 3), (0, 0))) for m in (x, y)]
    padded = fo.add_conv([x, y], filters, padding=((1, 2), (0, 3)))
    np.testing.assert_array_equal(padded, fo.add_conv(framed, filters))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_an_empty_batch_gives_an_empty_result(layout):
    shape, filters = ((0, 6, 7, 4), (3, 3, 4, 8)) if layout == "NHWC" else ((0, 4, 6, 7), (8, 4, 3, 3))
    x, w = np.ones(shape, np.float32), np.ones(filters, np.float32)
    y, m = fo.add_conv([x, x], w, np.ones(8, np.float32), layout=layout, return_sum=True)
    assert y.shape == ((0, 4, 5, 8) if layout == "NHWC" else (0, 8, 4, 5))
    assert (m.shape, y.dtype, m.dtype) == (shape, np.float32, np.float32)
    assert fo.concat_dense([x[..., 0], x[..., 0]], np.ones((2 * shape[2], 5), np.float32)).shape == (0, shape[1], 5)


def test_a_dense_layer_over_maps_is_one_over_their_pixels(rng):
    x, y, matrix = integers(rng, 2, 3, 4, 5), integers(rng, 2, 3, 4, 6), integers(rng, 11, 7)
    flat = fo.concat_dense([x.reshape(24, 5), y.reshape(24, 6)], matrix)
    np.testing.assert_array_equal(fo.concat_dense([x, y], matrix), flat.reshape(2, 3, 4, 7))
    np.testing.assert_array_equal(fo.concat_dense([x[0, 0, 0], y[0, 0, 0]], matrix), flat[0])


def test_groups_are_separate_convolutions(rng):
    x, y = integers(rng, 1, 6, 7, 4), integers(rng, 1, 6, 7, 2)
    filters = integers(rng, 3, 3, 3, 8)
    grouped = fo.concat_conv([x, y], filters, groups=2)
    merged = np.concatenate([x, y], axis=3)
    parts = [conv(merged[..., c : c + 3], filters[..., k : k + 4]) for c, k in ((0, 0), (3, 4))]
    np.testing.assert_array_equal(grouped, np.concatenate(parts, axis=3))


def test_upsampling_in_the_load_is_upsampling_before(maps):
    x, _, filters = maps
    small = x[:, :3, :4]
    large = small.repeat(3, axis=1).repeat(2, axis=2)
    skip = x[:, :9, :8]
    np.testing.assert_array_equal(
        fo.add_conv([skip, fo.Source(small, upsample=(3, 2))], filters, padding="same"),
        fo.add_conv([skip, large], filters, padding="same"),
    )


def test_weights_in_the_load_are_weights_before(maps):
    x, y, filters = maps
    vector = np.float32([1, 2, 3, 0.5, -1])
    np.testing.assert_array_equal(
        fo.add_conv([x, y], filters, weights=[0.5, vector]), fo.add_conv([x * np.float32(0.5), y * vector], filters)
    )


# Fused equals unfused, bit for bit, on numbers that round.


@every_dtype
@every_option
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_fused_equals_unfused(rng, dtype, options, layout):
    shape, filters = ((2, 9, 11, 13), (3, 3, 13, 20)) if layout == "NHWC" else ((2, 13, 9, 11), (20, 13, 3, 3))
    axis = 3 if layout == "NHWC" else 1
    x, y, z = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    w = rng.standard_normal(filters).astype(dtype)
    triple = np.concatenate([w, w[::-1], w[:, ::-1]], axis=2 if layout == "NHWC" else 1)
    options = {**options, "layout": layout, "activation": "silu"}
    one_by_one = fo.add_conv([fo.add([x, y, z])], w, **options)
    fused = fo.add_conv([x, y, z], w, **options)
    with_sum, merged = fo.add_conv([x, y, z], w, return_sum=True, **options)
    assert one_by_one.tobytes() == fused.tobytes() == with_sum.tobytes()
    assert merged.tobytes() == fo.add([x, y, z]).tobytes() == ((x + y) + z).tobytes()
    joined = fo.concat_conv([fo.concat([x, y, z], axis=axis)], triple, **options)
    assert joined.tobytes() == fo.concat_conv([x, y, z], triple, **options).tobytes()


@every_dtype
def test_fused_equals_unfused_with_weights_and_upsampling(rng, dtype):
    x, y = rng.standard_normal((1, 6, 8, 13)).astype(dtype), rng.standard_normal((1, 3, 4, 13)).astype(dtype)
    w, v = rng.standard_normal((3, 3, 13, 20)).astype(dtype), rng.standard_normal(13).astype(dtype)
    up = fo.Source(y, upsample=2, weight=0.3)
    merged = fo.add([x, up], weights=[v, None])
    np.testing.assert_array_equal(merged, x * v + (y * np.dtype(dtype).type(0.3)).repeat(2, 1).repeat(2, 2))
    fused = fo.add_conv([x, up], w, weights=[v, None], padding="same")
    assert fused.tobytes() == fo.add_conv([merged], w, padding="same").tobytes()


@every_dtype
def test_fused_equals_unfused_dense(rng, dtype):
    x, y = (rng.standard_normal((37, 21)).astype(dtype) for _ in range(2))
    matrix = rng.standard_normal((42, 50)).astype(dtype)
    assert fo.add_dense([x, y], matrix[:21]).tobytes() == fo.add_dense([fo.add([x, y])], matrix[:21]).tobytes()
    assert fo.concat_dense([x, y], matrix).tobytes() == fo.concat_dense([fo.concat([x, y])], matrix).tobytes()


@every_dtype
def test_prepacked_filters_give_the_same_bits(rng, dtype):
    x, w = rng.standard_normal((1, 6, 8, 13)).astype(dtype), rng.standard_normal((3, 3, 13, 20)).astype(dtype)
    packed = fo.prepack(w)
    for options in OPTIONS:
        assert conv(x, packed, **options).tobytes() == conv(x, w, **options).tobytes()


# NaN, infinities and signed zeros.


def row(*values):
    return np.array(values, np.float32).reshape(1, 1, -1, 1)


def taps(*values):
    return np.array(values, np.float32).reshape(1, -1, 1, 1)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("x", "w", "expected"),
    [
        ((1, 1, 1), (INF, 1, 1), (2, INF, INF)),  # the first tap of the first placement lies outside
        ((INF, 1, 1), (0, 1, 1), (INF, NAN, 1)),  # 0·∞ inside is NaN, at the border it does not exist
        ((1, NAN, 1, 1, 1), (1, 1, 1), (NAN, NAN, NAN, 3, 2)),
        ((1, INF, -INF, 1, 1), (1, 1, 1), (INF, NAN, NAN, -INF, 2)),
    ],
)
def test_padding_is_skipped_and_ieee_holds_inside(x, w, expected, strict):
    y = fo.concat_conv([row(*x)], taps(*w), padding="same", strict=strict)
    np.testing.assert_array_equal(y.ravel(), expected)


def test_nan_goes_through_relu_and_minus_infinity_does_not():
    y = fo.add_conv([row(NAN, -INF, INF, -1)], taps(1), activation="relu")
    np.testing.assert_array_equal(y.ravel(), [NAN, 0, INF, 0])
    np.testing.assert_array_equal(fo.add([row(NAN, -INF, INF, -1)], activation="relu").ravel(), [NAN, 0, INF, 0])


def test_a_group_keeps_its_nan_to_itself():
    x, y = np.full((1, 5, 6, 3), NAN, np.float32), np.ones((1, 5, 6, 3), np.float32)
    out = fo.concat_conv([x, y], np.ones((3, 3, 3, 8), np.float32), groups=2, padding="same")
    assert np.isnan(out[..., :4]).all()
    assert (out[..., 4:] >= 12).all()


def test_one_bad_pixel_reaches_its_neighbours_only(maps):
    x, y, filters = maps
    clean = fo.add_conv([x, y], filters, padding="same")
    x[0, 4, 5, 2] = NAN
    reached = np.isnan(fo.add_conv([x, y], np.where(filters == 0, 1, filters), padding="same"))
    expected = np.zeros_like(reached)
    expected[0, 3:6, 4:7] = True
    np.testing.assert_array_equal(reached, expected)
    dirty = fo.add_conv([x, y], filters, padding="same")
    np.testing.assert_array_equal(dirty[~expected], clean[~expected])


def test_signed_zeros_and_subnormals_of_add_are_numpys(rng):
    tiny = np.float32(1e-42)
    x = np.array([-0.0, 0.0, -0.0, tiny, -tiny, 1e-38], np.float32)
    y = np.array([-0.0, -0.0, 0.0, tiny, tiny, -1.1e-38], np.float32)
    assert fo.add([x, y]).tobytes() == (x + y).tobytes()
    assert fo.add([x]).tobytes() == x.tobytes()
