"""The oracle against hand-computed values, and against a second one: the defining sum, one scalar at a time."""

from __future__ import annotations

import math
import warnings

import ml_dtypes
import numpy as np
import pytest

from fusionops import reference
from fusionops.kernel import Filters, Operands
from fusionops.problems import CONVS, QUARTER_LEAKY, RELU, Part, Problem, conv, dense, in_float64, in_nchw, join
from fusionops.spec import ACTIVATIONS, Activation, Conv2d, FusionSpec, Layout, Merge, SourceSpec
from fusionops.testing import exact_operands

ADD, CONCAT = Merge.ADD, Merge.CONCAT
NAN, INF = math.nan, math.inf


def evaluate(problem: Problem, *sources, out_dtype=None, **operands):
    spec = problem.spec
    out = np.full(spec.out_shape, 77, out_dtype or spec.dtype)
    reference.run(spec, Operands(tuple(np.asarray(x, spec.dtype) for x in sources), **operands), out)
    return out


def row(values):
    """A map of one row and one channel."""
    return np.asarray(values, np.float32).reshape(1, 1, -1, 1)


def taps(values):
    """One filter of one row over one channel."""
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("options", "filter_taps", "expected"),
    [
        # x = 1 2 3 4 5, by hand
        ({"padding": ((0, 0), (0, 0))}, [1, 10, 100], [321, 432, 543]),
        ({}, [1, 10, 100], [210, 321, 432, 543, 54]),
        ({"padding": ((0, 0), (2, 0))}, [1, 10, 100], [100, 210, 321, 432, 543]),
        ({"padding": ((0, 0), (0, 2))}, [1, 10, 100], [321, 432, 543, 54, 5]),
        ({}, [1, 10], [21, 32, 43, 54, 5]),  # 'same' puts the odd zero at the end
        ({"stride": (1, 2)}, [1, 10, 100], [210, 432, 54]),
        ({"stride": (1, 3)}, [1, 10, 100], [321, 54]),  # 'same' of 5 by 3: one zero, at the end
        ({"dilation": (1, 2)}, [1, 10, 100], [310, 420, 531, 42, 53]),
        ({"padding": ((0, 0), (4, 4))}, [1, 10, 100], [0, 0, 100, 210, 321, 432, 543, 54, 5, 0, 0]),
    ],
)
def test_one_row_by_hand(options, filter_taps, expected):
    problem = conv("", ADD, (1,), 1, 1, len(filter_taps), H=1, W=5, bias=False, **options)
    out = evaluate(problem, row([1, 2, 3, 4, 5]), filters=taps(filter_taps))
    np.testing.assert_array_equal(out.ravel(), expected)


def test_rows_and_columns_of_a_filter_are_not_swapped():
    problem = conv("", ADD, (1,), 1, 2, 2, H=2, W=2, padding=((0, 0), (0, 0)), bias=False)
    x = np.array([[1, 2], [3, 4]]).reshape(1, 2, 2, 1)
    filters = np.array([[1, 10], [100, 1000]], np.float32).reshape(2, 2, 1, 1)
    assert evaluate(problem, x, filters=filters).item() == 1 + 20 + 300 + 4000


def test_concat_orders_channels_as_the_sources_are_given():
    problem = conv("", CONCAT, (1, 2), 1, 1, 1, H=1, W=1, bias=False)
    filters = np.array([1, 10, 100], np.float32).reshape(1, 1, 3, 1)
    assert evaluate(problem, [[[[7]]]], [[[[8, 9]]]], filters=filters).item() == 7 + 80 + 900


def test_groups_see_their_own_channels():
    problem = conv("", CONCAT, (3, 1), 2, 1, 1, H=1, W=1, groups=2, bias=False)
    filters = np.array([[1, 3], [10, 30]], np.float32).reshape(1, 1, 2, 2)  # (c, k)
    out = evaluate(problem, [[[[1, 2, 3]]]], [[[[4]]]], filters=filters)
    np.testing.assert_array_equal(out.ravel(), [1 + 20, 9 + 120])


def test_depthwise_multiplier_lists_the_filters_of_a_channel_together():
    problem = conv("", ADD, (2,), 4, 1, 1, H=1, W=1, groups=2, bias=False)
    filters = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(evaluate(problem, [[[[10, 100]]]], filters=filters).ravel(), [10, 20, 300, 400])


def test_prologue_is_upsample_scale_shift_activation_weight():
    part = Part(1, upsample=(1, 2), weight="scalar", scale=True, shift=True, activation=RELU)
    problem = conv("", ADD, (part,), 1, 1, 1, H=1, W=4, bias=False)
    out = evaluate(
        problem,
        row([1, -2]),
        scales=(np.float32([3]),),
        shifts=(np.float32([-1]),),
        weights=(-2.0,),
        filters=taps([1]),
    )
    np.testing.assert_array_equal(out.ravel(), [-4, -4, 0, 0])  # relu(3·1 − 1)·−2, relu(3·−2 − 1)·−2


def test_padding_is_of_the_merged_map_not_of_the_source():
    problem = conv("", ADD, (Part(1, shift=True),), 1, 1, 3, H=1, W=2, bias=False)
    out = evaluate(problem, row([0, 0]), shifts=(np.float32([5]),), filters=taps([1, 1, 1]))
    np.testing.assert_array_equal(out.ravel(), [10, 10])  # a shifted padding would give 15


def test_epilogue_is_bias_residual_activation():
    problem = conv("", ADD, (1,), 1, 1, 1, H=1, W=4, residual=Part(1, (1, 2), "scalar"), activation=RELU)
    out = evaluate(
        problem, row([1, 2, 3, 4]), filters=taps([1]), bias=np.float32([-3]), residual=row([1, -2]), residual_weight=2.0
    )
    np.testing.assert_array_equal(out.ravel(), [0, 1, 0, 0])  # 1−3+2, 2−3+2, 3−3−4, 4−3−4


def test_packed_filters_are_read_through():
    problem = conv("", ADD, (1,), 1, 1, 2, H=1, W=3, bias=False)
    out = evaluate(problem, row([1, 2, 3]), filters=Filters(taps([1, 10]), Layout.NHWC))
    np.testing.assert_array_equal(out.ravel(), [21, 32, 3])


def test_dense_by_hand():
    problem = dense("", CONCAT, (2, 1), 2, rows=1)
    matrix = np.float32([[1, 2], [10, 20], [100, 200]])
    out = evaluate(problem, [[1, 2]], [[3]], filters=matrix, bias=np.float32([5, 6]))
    np.testing.assert_array_equal(out, [[326, 648]])


def defining_sum(spec, operands):
    """The equations of the module, one scalar multiply-add at a time. Plain sources only."""
    channels_last = spec.layout is Layout.NHWC
    maps = [x if channels_last else x.transpose(0, 2, 3, 1) for x in operands.sources]
    filters = operands.filters if channels_last else operands.filters.transpose(2, 3, 1, 0)
    merged = np.concatenate(maps, axis=3) if spec.merge is CONCAT else sum(maps[1:], maps[0])
    N, H, W, C = merged.shape
    conv, P, Q = spec.conv, spec.P, spec.Q
    depth, per_group = C // conv.groups, conv.K // conv.groups
    y = np.zeros((N, P, Q, conv.K))
    for n, p, q, k in np.ndindex(*y.shape):
        total = 0.0 if operands.bias is None else float(operands.bias[k])
        for r, s, c in np.ndindex(conv.R, conv.S, depth):
            h = p * conv.stride[0] + r * conv.dilation[0] - conv.padding[0][0]
            w = q * conv.stride[1] + s * conv.dilation[1] - conv.padding[1][0]
            if 0 <= h < H and 0 <= w < W:
                total += float(merged[n, h, w, k // per_group * depth + c]) * float(filters[r, s, c, k])
        y[n, p, q, k] = total
    return y if channels_last else y.transpose(0, 3, 1, 2)


def is_small_and_plain(problem):
    spec = problem.spec
    gemm_m, gemm_n, gemm_k = spec.gemm
    plain = all(source.is_plain for source in spec.sources) and spec.residual is None and spec.activation is None
    return plain and gemm_m * gemm_n * gemm_k * spec.conv.groups < 60_000


@pytest.mark.parametrize("problem", [*filter(is_small_and_plain, [*CONVS, *map(in_nchw, CONVS)])], ids=str)
def test_equals_the_defining_sum(problem):
    spec = problem.spec
    operands = exact_operands(spec, np.random.default_rng(1))
    out = np.empty(spec.out_shape, spec.dtype)
    reference.run(spec, operands, out)
    np.testing.assert_array_equal(out, defining_sum(spec, operands))


def test_add_is_numpys_left_fold():
    problem = join("", ADD, (1,), (1,), (1,))
    # (1 + 2^25) + -2^25 loses the 1; any other order keeps it
    assert evaluate(problem, [1.0], [2.0**25], [-(2.0**25)]).item() == 0.0


def test_weights_round_each_product_and_sum():
    rng = np.random.default_rng(2)
    x, y, w = rng.standard_normal((3, 50)).astype(np.float32)
    problem = join("", ADD, (50,), (50,), part=Part(50, weight="vector"))
    out = evaluate(problem, x, y, weights=(None, w))
    np.testing.assert_array_equal(out, x + y * w)


def test_integers_wrap_as_in_numpy():
    out = evaluate(join("", ADD, (2,), (2,), dtypes="uint8"), [200, 1], [100, 1])
    np.testing.assert_array_equal(out, [44, 2])


def test_the_returned_sum_is_the_fold_in_the_data_dtype():
    problem = conv("", ADD, (1, 1, 1), 1, 1, 1, H=1, W=1, bias=False, return_sum=True)
    merged = np.empty((1, 1, 1, 1), np.float32)
    out = evaluate(problem, row([1.0]), row([2.0**25]), row([-(2.0**25)]), filters=taps([1]), merged=merged)
    assert merged.item() == 0.0
    assert out.item() == 1.0  # the contraction itself sees the float64 sum


def test_a_tap_in_the_padding_is_skipped_not_multiplied_by_zero():
    problem = conv("", ADD, (1,), 1, 1, 3, H=1, W=3, bias=False)
    out = evaluate(problem, row([1, 1, 1]), filters=taps([INF, 1, 1]))
    np.testing.assert_array_equal(out.ravel(), [2, INF, INF])


def test_nan_and_inf_go_where_the_sum_takes_them():
    problem = conv("", ADD, (1,), 1, 1, 3, H=1, W=5, bias=False, activation=RELU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nan = evaluate(problem, row([1, NAN, 1, 1, 1]), filters=taps([1, 1, 1]))
        negative = evaluate(problem, row([1, -INF, 1, 1, 1]), filters=taps([1, 1, 1]))
        zero_times_inf = evaluate(problem, row([1, INF, 1, 1, 1]), filters=taps([0, 1, 1]))
    np.testing.assert_array_equal(nan.ravel(), [NAN, NAN, NAN, 3, 2])
    np.testing.assert_array_equal(negative.ravel(), [0, 0, 0, 3, 2])
    np.testing.assert_array_equal(zero_times_inf.ravel(), [INF, INF, NAN, 2, 1])


def test_a_group_keeps_its_nan_to_itself():
    problem = conv("", CONCAT, (1, 1), 2, 1, 1, H=1, W=1, groups=2, bias=False)
    out = evaluate(problem, row([NAN]), row([3.0]), filters=np.ones((1, 1, 1, 2), np.float32))
    np.testing.assert_array_equal(out.ravel(), [NAN, 3])


PHI_1 = 0.8413447460685429  # standard normal distribution at 1
ACTIVATION_VALUES = {
    "relu": [(-2, 0), (0, 0), (3, 3), (-INF, 0), (INF, INF)],
    "relu6": [(-2, 0), (3, 3), (6, 6), (7, 6), (-INF, 0), (INF, 6)],
    "leaky_relu": [(-4, -1), (0, 0), (3, 3), (-INF, -INF), (INF, INF)],
    "sigmoid": [(0, 0.5), (1, 1 / (1 + math.exp(-1))), (-1, 1 / (1 + math.e)), (-INF, 0), (INF, 1), (-1000, 0)],
    "tanh": [(0, 0), (1, math.tanh(1)), (-1, -math.tanh(1)), (-INF, -1), (INF, 1)],
    "silu": [(0, 0), (1, 1 / (1 + math.exp(-1))), (-1, -1 / (1 + math.e)), (INF, INF), (-1000, 0)],
    "hardswish": [(-4, 0), (-3, 0), (0, 0), (1, 4 / 6), (3, 3), (5, 5), (INF, INF)],
    "hardsigmoid": [(-4, 0), (-3, 0), (0, 0.5), (1, 4 / 6), (3, 1), (5, 1), (-INF, 0), (INF, 1)],
    "gelu": [(0, 0), (1, PHI_1), (-1, PHI_1 - 1), (INF, INF)],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_values(name, dtype):
    activation = QUARTER_LEAKY if name == "leaky_relu" else Activation(name)
    x, expected = np.array([*ACTIVATION_VALUES[name], (NAN, NAN)], dtype).T
    problem = join("", ADD, x.shape, dtypes=dtype, activation=activation)
    out = evaluate(problem, x)
    np.testing.assert_array_max_ulp(out, expected, maxulp=2)


def test_the_tail_of_gelu_does_not_cancel():
    out = evaluate(join("", ADD, (1,), activation=Activation("gelu")), [-10])
    np.testing.assert_array_max_ulp(out, np.float32([-10 * 7.619853024160526e-24]), maxulp=1)  # −10·Φ(−10)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_narrow_results_are_rounded_once(dtype):
    # 1 + ε/2 + 2⁻⁴⁰ rounds up, unless it is first rounded to float32, where it becomes a tie, and that goes down.
    unit = float(ml_dtypes.finfo(dtype).eps)
    tail = unit / 2 + np.array([-1, 0, 1]) * 2.0**-40
    problem = in_float64(conv("", CONCAT, (1, 1), 1, 1, 1, H=1, W=3, bias=False))
    filters = np.ones((1, 1, 2, 1))
    out = evaluate(problem, np.ones((1, 1, 3, 1)), tail.reshape(1, 1, 3, 1), filters=filters, out_dtype=dtype)
    np.testing.assert_array_equal(out.ravel().astype(float), [1, 1, 1 + unit])
    negative = evaluate(problem, -np.ones((1, 1, 3, 1)), -tail.reshape(1, 1, 3, 1), filters=filters, out_dtype=dtype)
    np.testing.assert_array_equal(negative, -out)
    huge = evaluate(problem, *[np.full((1, 1, 3, 1), 1e300)] * 2, filters=filters, out_dtype=dtype)
    np.testing.assert_array_equal(huge.astype(float), INF)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_narrow_operands(dtype):
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((1, 1, 4, 3)).astype(dtype) for _ in range(2))
    filters, bias = rng.standard_normal((1, 1, 3, 2)).astype(dtype), rng.standard_normal(2).astype(dtype)
    narrow = SourceSpec(x.shape, np.dtype(dtype).name)
    spec = FusionSpec(ADD, (narrow, narrow), Conv2d(2, 1, 1), dtype=narrow.dtype, bias=True, activation=RELU)
    out = np.empty(spec.out_shape, dtype)
    reference.run(spec, Operands((x, y), filters=filters, bias=bias), out)
    wide = [array.astype(float) for array in (x, y, filters, bias)]
    expected = np.maximum(np.einsum("nhwc,ck->nhwk", wide[0] + wide[1], wide[2][0, 0]) + wide[3], 0)
    # Half a unit in the last place: |error| ≤ ε/2 · 2^⌊log2|y|⌋ ≤ ε/2 · |y|, and the float64 sums are far below it.
    assert (np.abs(out.astype(float) - expected) <= float(ml_dtypes.finfo(dtype).eps) * 0.5001 * expected).all()
    assert np.count_nonzero(out) > 1
