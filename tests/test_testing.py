"""The instruments themselves: each must be seen to catch what it is for, or every test that uses it proves nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fusionops import reference, testing
from fusionops.kernel import Filters, Operands
from fusionops.problems import CONVS, DENSES, JOINS, PROBLEMS, RELU, conv, dense, join
from fusionops.spec import Activation, Layout, Merge
from fusionops.testing import (
    LAYOUTS,
    error_bound,
    exact_operands,
    guarded_copy,
    guarded_empty,
    magnitude,
    map_operands,
    random_operands,
    view_variants,
)

ADD, CONCAT = Merge.ADD, Merge.CONCAT
DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int64", "bool"]


def shapes(operands: Operands):
    return [x.shape for x in operands.sources], operands.filters if operands.filters is None else operands.filters.shape


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_operands_have_the_shapes_and_dtypes_of_the_spec(problem):
    spec = problem.spec
    rng = np.random.default_rng(1)
    kinds = ("normal", "positive", "badly_scaled")
    for operands in (exact_operands(spec, rng), *(random_operands(spec, rng, kind) for kind in kinds)):
        assert [(x.shape, x.dtype.name) for x in operands.sources] == [(s.shape, s.dtype) for s in spec.sources]
        assert all(isinstance(x, np.ndarray) for x in operands.sources)
        for source, weight, scale, shift in zip(
            spec.sources, operands.weights, operands.scales, operands.shifts, strict=True
        ):
            assert isinstance(weight, {None: type(None), "scalar": float, "vector": np.ndarray}[source.weight])
            assert (scale is not None, shift is not None) == (source.scale, source.shift)
        if spec.contraction is not None:
            assert operands.filters.shape == spec.filter_shape
        assert (operands.bias is not None) == spec.bias
        assert (operands.residual is not None) == (spec.residual is not None)
        assert (operands.merged is not None) == spec.return_sum


@pytest.mark.parametrize("problem", [*CONVS, *DENSES], ids=str)
def test_exact_operands_are_exact_in_float32(problem):
    """Summed in float32, in another order than the reference sums: the same numbers, and few of them zero."""
    spec = replace(problem.spec, activation=None)
    operands = exact_operands(spec, np.random.default_rng(2))
    assert magnitude(spec, operands).max() < 2**24
    out = np.empty(spec.out_shape, np.float32)
    reference.run(spec, operands, out)
    wide = np.empty(spec.out_shape, np.float64)
    reference.run(replace(spec, dtype="float64"), operands, wide)
    np.testing.assert_array_equal(out, wide)


def test_operands_that_could_round_are_refused():
    spec = dense("", ADD, (2**22,), 1, rows=1).spec
    with pytest.raises(AssertionError, match="can round even integers"):
        exact_operands(spec, np.random.default_rng(3))


def test_magnitude_is_the_sum_of_absolute_terms():
    spec = conv("", ADD, (1, 1), 1, 1, 1, H=1, W=1, activation=RELU).spec
    x, y = (np.full((1, 1, 1, 1), value, np.float32) for value in (3, -5))
    filters, bias = np.full((1, 1, 1, 1), -2, np.float32), np.float32([-7])
    assert magnitude(spec, Operands((x, y), filters=filters, bias=bias)).item() == (3 + 5) * 2 + 7


def test_error_bound_by_hand():
    spec = dense("", CONCAT, (3, 1), 1, rows=1).spec
    ones = [np.ones((1, 3), np.float32), np.ones((1, 1), np.float32)]
    operands = Operands(tuple(ones), filters=np.ones((4, 1), np.float32), bias=np.float32([2]))
    assert error_bound(spec, operands).item() == (8 + 2 * 2) * 2.0**-24 * (4 + 2)
    sigmoid = error_bound(replace(spec, activation=Activation("sigmoid")), operands).item()
    result = np.float32(1 / (1 + math.exp(-6)))
    assert sigmoid == (8 + 2 * 2) * 2.0**-24 * 6 / 4 + 4 * float(np.spacing(result))


def test_without_contraction_the_bound_is_zero():
    spec = join("", ADD, (5,), (5,), activation=RELU).spec
    assert not error_bound(spec, random_operands(spec, np.random.default_rng(4))).any()


@pytest.mark.parametrize("kind", ["normal", "positive", "badly_scaled"])
@pytest.mark.parametrize("merge", [ADD, CONCAT])
def test_the_bound_separates_rounding_from_a_lost_term(merge, kind):
    spec = dense("", merge, (100, 100), 16, rows=16).spec
    operands = random_operands(spec, np.random.default_rng(5), kind)
    merged = np.concatenate(operands.sources, axis=1) if merge is CONCAT else operands.sources[0] + operands.sources[1]
    expected = np.empty(spec.out_shape, np.float32)
    reference.run(spec, operands, expected)
    sequential = np.zeros(spec.out_shape, np.float32)
    for c in range(spec.C):
        sequential += merged[:, c, None] * operands.filters[c]
    bound = error_bound(spec, operands)
    assert (np.abs(sequential + operands.bias - expected) <= bound).all()
    c = np.argmax(np.abs(merged).sum(axis=0) * np.abs(operands.filters).sum(axis=1))
    lost = sequential - merged[:, c, None] * operands.filters[c] + operands.bias
    assert (np.abs(lost - expected) > bound).any()
    if kind != "badly_scaled":  # beyond the range of float16
        narrow = (merged.astype(np.float16) @ operands.filters.astype(np.float16)).astype(np.float32) + operands.bias
        assert (np.abs(narrow - expected) > bound).any()


@pytest.mark.parametrize(("name", "slope"), testing.LIPSCHITZ.items())
def test_largest_slopes(name, slope):
    x = np.linspace(-8, 8, 1 << 20)
    y = np.empty_like(x)
    reference.run(join("", ADD, x.shape, dtypes="float64", activation=Activation(name)).spec, Operands((x,)), y)
    steepest = (np.diff(y) / np.diff(x)).max()
    assert steepest <= slope + 1e-9  # differences of rounded values over steps of 2⁻¹⁶: 2⁻⁵³·8 / 2⁻¹⁶ = 6e-11
    assert steepest >= 0.999 * slope


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 4, 5)], ids=str)
def test_guarded_memory_is_poisoned_and_sees_strays(shape, dtype, layout):
    guarded = guarded_empty(shape, dtype, layout)
    array = guarded.array
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert np.isnan(array).all() if array.dtype.kind == "f" else set(guarded.arena) == {0xA5}
    guarded.assert_intact()
    array[...] = 1
    guarded.assert_intact()
    for stray in (guarded.offset - 1, 0, guarded.arena.size - 1):
        inside = guarded_empty(shape, dtype, layout)
        before = inside.arena[stray]
        inside.array[...] = 1
        if inside.arena[stray] == before:  # not part of the array itself
            inside.arena[stray] ^= 1
            with pytest.raises(AssertionError, match="outside an array"):
                inside.assert_intact()


def test_a_write_into_the_gaps_of_a_strided_array_is_a_stray():
    guarded = guarded_empty((4, 4), "float32", "step")
    guarded.array.base[guarded.offset + 4] = 0  # the element between the first two
    with pytest.raises(AssertionError, match=r"1 bytes outside .* the first at \+4 bytes"):
        guarded.assert_intact()


def test_layouts_differ_in_what_a_kernel_can_see():
    strides = {layout: guarded_empty((2, 3, 4, 5), "float32", layout).array.strides for layout in LAYOUTS}
    assert strides["contiguous"] == strides["unaligned"] == (240, 80, 20, 4)
    assert strides["reversed"] == (-240, -80, -20, -4)
    assert strides["fortran"] == (4, 8, 24, 96)
    assert strides["last_axis_second"] == (240, 16, 4, 48)
    assert strides["second_axis_last"] == (240, 4, 60, 12)
    assert strides["step"] == (3840, 640, 80, 8)
    assert strides["crop"] == (1344, 224, 32, 4)
    assert guarded_empty((3,), "float32", "unaligned").array.ctypes.data % 4 == 1
    assert guarded_empty((3,), "float32").array.ctypes.data % 16 != 0


def test_guarded_copies_are_equal_and_read_only():
    x = np.arange(24.0).reshape(2, 3, 4)
    copy = guarded_copy(x, "crop")
    np.testing.assert_array_equal(copy, x)
    with pytest.raises(ValueError, match="read-only"):
        copy[0, 0, 0] = 1
    around = np.lib.stride_tricks.as_strided(copy, (1,), copy.strides[-1:], writeable=False)
    assert np.isfinite(around).all()


def test_view_variants_are_equal_and_differ_in_strides():
    x = np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)
    variants = dict(view_variants(x))
    assert set(variants) == set(LAYOUTS)
    for view in variants.values():
        np.testing.assert_array_equal(view, x)
        assert not view.flags.writeable
    constant = np.broadcast_to(x[:, :1], (1, 5, 3, 4))
    assert dict(view_variants(constant))["broadcast_axis_1"].strides[1] == 0


def test_map_operands_changes_arrays_only():
    operands = Operands(
        (np.ones(2),),
        weights=(2.0,),
        scales=(None,),
        shifts=(np.ones(1),),
        filters=Filters(np.ones((1, 1)), Layout.NHWC),
        residual=np.ones(3),
        residual_weight=np.ones(4),
    )
    doubled = map_operands(operands, lambda array: array * 2)
    assert doubled.weights == (2.0,)
    assert doubled.scales == (None,)
    assert doubled.bias is None
    for array in (doubled.sources[0], doubled.shifts[0], doubled.residual, doubled.residual_weight):
        assert (array == 2).all()
    assert (doubled.filters.array == 2).all()


EDGES = """
    one_pixel tile_minus_one tile_plus_one odd_channels one_channel_one_filter unequal_sources asymmetric_pad
    even_filter dilated two_groups depthwise depthwise_multiplier stride_two_same stride_three_same one_source
    filter_larger_than_map five_sources sixty_four_sources long_reduction many_filters wide_map seven_by_seven
    one_by_nine upsampled upsampled_unevenly residual residual_upsampled batch
"""


def test_every_edge_of_the_table_is_there():
    names = {problem.name for problem in PROBLEMS}
    for edge in EDGES.split():
        assert {f"concat_conv_{edge}{variant}" for variant in ("", "_nchw", "_f64")} <= names
    activations = {problem.spec.activation.name for problem in JOINS if problem.spec.activation}
    assert activations == {*testing.LIPSCHITZ, "leaky_relu"}
