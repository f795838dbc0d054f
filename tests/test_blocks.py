"""The merging steps of networks against the plain NumPy of their equations: exact on integers wherever nothing rounds.

Only that each block is wired as its network is; the ops themselves are test_ops' business.
"""

from __future__ import annotations

import numpy as np
import pytest

import fusionops as fo
from fusionops import blocks


def integers(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).integers(-3, 4, shape).astype(dtype)


def convolved(x, filters, pad=0):
    """x (N, H, W, C) with filters (R, S, C, K), window by window."""
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, filters.shape[:2], axis=(1, 2))
    return np.einsum("npqcrs,rsck->npqk", windows, filters)


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("upsample", [2, 4])
def test_fpn_merge(upsample):
    top, lateral = integers(1, 2, 3, 5), integers(1, 2 * upsample, 3 * upsample, 7)
    lateral_filters, lateral_bias = integers(1, 1, 7, 5), integers(5)
    smooth_filters, smooth_bias = integers(3, 3, 5, 5), integers(5, seed=1)
    merged, smoothed = blocks.fpn_merge(
        top, lateral, lateral_filters, lateral_bias, smooth_filters, smooth_bias, upsample=upsample
    )
    expected = convolved(lateral, lateral_filters) + lateral_bias + top.repeat(upsample, 1).repeat(upsample, 2)
    np.testing.assert_array_equal(merged, expected)
    np.testing.assert_array_equal(smoothed, convolved(expected, smooth_filters, pad=1) + smooth_bias)


@pytest.mark.parametrize("skip_size", [(6, 7), (10, 7), (9, 12)], ids=str)
def test_unet_up(skip_size):
    skip, up = integers(2, *skip_size, 3), integers(2, 6, 7, 4)
    filters, bias = integers(3, 3, 7, 5), integers(5)
    top, left = (skip_size[0] - 6) // 2, (skip_size[1] - 7) // 2
    joined = np.concatenate([skip[:, top : top + 6, left : left + 7], up], -1)
    np.testing.assert_array_equal(blocks.unet_up(skip, up, filters, bias), relu(convolved(joined, filters) + bias))


def test_unet_up_refuses_a_skip_that_is_too_small():
    with pytest.raises(fo.SpecError, match=r"sources\[1\] has H=6, sources\[0\] has H=5"):
        blocks.unet_up(integers(1, 5, 6, 3), integers(1, 6, 6, 4), integers(3, 3, 7, 5), None)


@pytest.mark.parametrize("taps", [1, 3])
def test_residual(taps):
    x, identity = integers(2, 5, 6, 4), integers(2, 5, 6, 8)
    filters, bias = integers(taps, taps, 4, 8), integers(8)
    expected = relu(convolved(x, filters, pad=taps // 2) + bias + identity)
    np.testing.assert_array_equal(blocks.residual(x, identity, filters, bias), expected)


def test_dense_layer():
    features = [integers(1, 4, 5, channels, seed=channels) for channels in (8, 3, 3, 3, 3)]
    filters, bias = integers(1, 1, 20, 6), integers(6)
    expected = relu(convolved(np.concatenate(features, -1), filters) + bias)
    np.testing.assert_array_equal(blocks.dense_layer(features, filters, bias), expected)


def test_lstm_cell_saturated_is_exact():
    """With gates at ±40 the sigmoids are 1 and, to the last bit of what they are added to, 0."""
    x, h = np.ones((2, 1)), np.zeros((2, 3))
    c = np.float64([[1, 2, 3], [4, 5, 6]])
    gates = {"i": 40.0, "f": 40.0, "g": 0.0, "o": 40.0}
    matrix = np.zeros((4, 12))
    bias = np.concatenate([np.full(3, gates[gate]) for gate in "ifgo"])
    new_h, new_c = blocks.lstm_cell(x, h, c, matrix, bias)
    np.testing.assert_array_equal(new_c, c)
    np.testing.assert_array_equal(new_h, np.tanh(c))
    bias[3:6] = -1000.0  # forget: only what is let in remains
    bias[6:9] = 1000.0
    new_h, new_c = blocks.lstm_cell(x, h, c, matrix, bias)
    np.testing.assert_array_equal(new_c, np.ones_like(c))


def test_lstm_cell_takes_weights_in_the_order_of_keras():
    rng = np.random.default_rng(0)
    x, h, c = rng.standard_normal((2, 5)), rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    kernel, recurrent, bias = rng.standard_normal((5, 12)), rng.standard_normal((3, 12)), rng.standard_normal(12)
    z = x @ kernel + h @ recurrent + bias
    i, f, g, o = z[:, :3], z[:, 3:6], z[:, 6:9], z[:, 9:]
    expected_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    expected_h = sigmoid(o) * np.tanh(expected_c)
    new_h, new_c = blocks.lstm_cell(x, h, c, np.concatenate([kernel, recurrent]), bias)
    # Terms in the gates, each bounded by its magnitude, with room for the handful of roundings after them.
    magnitude = abs(x) @ abs(kernel) + abs(h) @ abs(recurrent) + abs(bias)
    bound = (9 + 20) * 2.0**-53 * (magnitude.max() + 1) * (1 + abs(c).max())
    assert abs(new_c - expected_c).max() <= bound
    assert abs(new_h - expected_h).max() <= bound


def test_lstm_cell_keeps_the_dtype():
    parts = blocks.lstm_cell(*(np.ones(shape, np.float32) for shape in [(2, 1), (2, 3), (2, 3), (4, 12), (12,)]))
    assert [part.dtype for part in parts] == [np.float32, np.float32]


def test_side_fusion():
    sides = [integers(1, 8 // factor, 8 // factor, 1, seed=factor) for factor in (1, 2, 4)]
    total = sum(
        weight * side.repeat(factor, 1).repeat(factor, 2)
        for side, factor, weight in zip(sides, (1, 2, 4), (1, 2, 4), strict=True)
    )
    sources = [fo.Source(side, upsample=factor) for side, factor in zip(sides, (1, 2, 4), strict=True)]
    fused = blocks.side_fusion(sources, [1, 2, 4])
    # The sums are exact, so equal sums give equal results, larger sums no smaller ones, and 0 gives a half.
    order = np.argsort(total, axis=None)
    assert (np.diff(fused.ravel()[order]) >= 0).all()
    np.testing.assert_array_equal(fused[total == 0], 0.5)
    assert abs(fused - sigmoid(total.astype(np.float64))).max() <= 4 * 2.0**-24  # two units in the last place of 1
