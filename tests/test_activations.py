"""Every activation of the CPU kernels over the whole range of its argument, in both places where kernels apply one.

Judged in units in the last place of the result, down to the subnormals; the operands before it are exact.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fusionops import cpu, reference
from fusionops.kernel import Operands
from fusionops.problems import QUARTER_LEAKY, conv, in_float64, join
from fusionops.spec import ACTIVATIONS, Activation, Merge
from fusionops.testing import activation_bound

KERNELS = {kernel.name: kernel for kernel in cpu.KERNELS}
SHORT = {"float32": "f32", "float64": "f64"}
CHANNELS = 64


def arguments(dtype: str) -> np.ndarray:
    """Every binary exponent in both signs, a dense grid where the functions bend, and the special values."""
    info = np.finfo(dtype)
    rng = np.random.default_rng(1)
    exponents = np.arange(info.minexp - info.nmant, info.maxexp)
    sizes = np.ldexp(rng.uniform(1, 2, (8, exponents.size)), exponents).ravel()
    grid = np.concatenate([np.linspace(-120, 120, 24_001), np.linspace(-6.5, 6.5, 26_001)])
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, info.max, info.min, info.tiny, -info.tiny, info.smallest_subnormal]
    values = np.concatenate([sizes, -sizes, grid, special, np.arange(-7.0, 8.0)]).astype(dtype)
    return np.resize(values, (-(-values.size // CHANNELS), CHANNELS))


def alone(name: str, x: np.ndarray):
    """The activation after a merge, by the stream kernel."""
    spec = replace(join("", Merge.ADD, x.shape, dtypes=x.dtype.name).spec, activation=activation_called(name))
    return spec, Operands((x,)), KERNELS[f"cpu.add_fprop_stream_{SHORT[x.dtype.name]}"]


def after_a_sum(name: str, x: np.ndarray):
    """The activation in the epilogue of a convolution whose sums are the argument: one filter of 1 to each channel."""
    problem = conv("", Merge.ADD, (CHANNELS,), CHANNELS, 1, 1, H=1, W=len(x), groups=CHANNELS, bias=False)
    spec = replace(
        problem.spec if x.dtype == np.float32 else in_float64(problem).spec, activation=activation_called(name)
    )
    operands = Operands((x.reshape(spec.merged_shape),), filters=np.ones(spec.filter_shape, x.dtype))
    return spec, operands, KERNELS[f"cpu.add_conv_fprop_direct_{SHORT[x.dtype.name]}"]


def activation_called(name: str) -> Activation:
    return QUARTER_LEAKY if name == "leaky_relu" else Activation(name)


def evaluate(name, x, place):
    """(what the kernel gives, what the reference gives, the admissible difference), shaped like x."""
    spec, operands, kernel = place(name, x)
    actual, expected = np.full(spec.out_shape, 77, x.dtype), np.empty(spec.out_shape, x.dtype)
    kernel.run(spec, kernel.plan(spec, cpu.device()), operands, actual)
    reference.run(spec, operands, expected)
    return actual.reshape(x.shape), expected.reshape(x.shape), activation_bound(spec, operands).reshape(x.shape)


@pytest.mark.parametrize("place", [alone, after_a_sum])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_within_units_in_the_last_place(name, dtype, place):
    x = arguments(dtype)
    actual, expected, bound = evaluate(name, x, place)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(actual[np.isinf(expected)], expected[np.isinf(expected)])
    finite = np.isfinite(expected)
    x, actual, expected, bound = (values[finite] for values in (x, actual.astype(float), expected, bound))
    error = np.abs(actual - expected.astype(float))
    worst = np.argmax(error - bound)
    assert (error <= bound).all(), (
        f"{np.count_nonzero(~(error <= bound))} of {error.size} values leave the bound; the worst is {name}({x[worst]})"
        f" = {expected[worst]}: got {actual[worst]}, error {error[worst]:.3g}, bound {bound[worst]:.3g}"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("relu6", 0, 6), ("sigmoid", 0, 1), ("hardsigmoid", 0, 1), ("tanh", -1, 1), ("relu", 0, np.inf)],
)
def test_ranges_are_kept(name, low, high, dtype):
    x = arguments(dtype)
    actual, _, _ = evaluate(name, x, alone)
    inside = actual[~np.isnan(x)]
    assert inside.min() == low
    assert inside.max() == high


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_is_odd_bit_for_bit(dtype):
    x = arguments(dtype)
    x = x[~np.isnan(x).any(axis=1)]
    positive, _, _ = evaluate("tanh", x, alone)
    negative, _, _ = evaluate("tanh", -x, alone)
    np.testing.assert_array_equal(negative, -positive)
    np.testing.assert_array_equal(np.signbit(positive), np.signbit(x))


@pytest.mark.parametrize("place", [alone, after_a_sum])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_passes_through(name, place):
    x = np.full((3, CHANNELS), np.nan, np.float32)
    x[1] = 1
    actual, _, _ = evaluate(name, x, place)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(x))
