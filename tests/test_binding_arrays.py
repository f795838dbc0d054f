"""Unusual but good input: what of it reaches a kernel as it is, what is copied, and how options are written down.

Looks at bound calls; no kernel runs.
"""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

import fusionops as fo
from fusionops.binding import bind_conv, bind_dense, bind_filters, bind_merge
from fusionops.spec import Activation, Conv2d, Dense


def full(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


X = full(1, 6, 6, 4)
F = full(3, 3, 4, 5)


def bound_source(array):
    """What becomes of an array on its way to a kernel, and what is said about it."""
    call = bind_merge("add", [array])
    return call.operands.sources[0], call.copies


def misaligned():
    memory = np.zeros(4 * 3 + 1, np.uint8)
    return memory[1:].view(np.float32)


AS_THEY_ARE = {
    "contiguous": full(4, 3),
    "transposed": full(3, 4).T,
    "fortran": np.asfortranarray(full(4, 3)),
    "every_other": full(8, 6)[::2, ::2],
    "backwards": full(4, 3)[::-1, ::-1],
    "broadcast": np.broadcast_to(full(3), (4, 3)),
    "cropped": full(1, 8, 8, 2)[:, 1:-1, 2:-1],
    "misaligned": misaligned(),
    "no_axes": np.array(1.0),
    "empty": full(0, 3),
}


@pytest.mark.parametrize("array", AS_THEY_ARE.values(), ids=AS_THEY_ARE)
def test_view_reaches_the_kernel_as_it_is(array):
    array.flags.writeable = False
    source, copies = bound_source(array)
    assert source is array
    assert copies == ()


def test_misaligned_example_is_misaligned():
    assert not misaligned().flags.aligned


def test_subclass_becomes_its_base_without_a_copy():
    matrix = full(2, 3).view(np.matrix)
    source, copies = bound_source(matrix)
    assert type(source) is np.ndarray
    assert np.shares_memory(source, matrix)
    assert copies == ()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.arange(6.0).astype(">f8"), "sources[0]: byte order is not this machine's"),
        (np.arange(6.0).astype(">f8")[::-2], "sources[0]: byte order is not this machine's"),
        (np.array([(1.0, 2), (3.0, 4)], "f4,i2")["f0"], "sources[0]: strides are not whole items"),
    ],
    ids=["swapped", "swapped_view", "field"],
)
def test_what_kernels_cannot_read_is_copied(array, said):
    source, copies = bound_source(array)
    assert copies == (said,)
    assert source.dtype.isnative
    assert not any(step % source.itemsize for step in source.strides)
    np.testing.assert_array_equal(source, array)


@pytest.mark.parametrize(
    ("value", "said"),
    [([[1, 2], [3, 4]], "a list"), ((1.5, 2.5), "a tuple"), (3.0, "a float"), (range(3), "a range")],
    ids=["list", "tuple", "number", "range"],
)
def test_what_is_no_array_is_converted_once(value, said):
    source, copies = bound_source(value)
    np.testing.assert_array_equal(source, np.asarray(value))
    assert source.dtype == np.asarray(value).dtype
    assert copies == (f"sources[0]: {said}, converted to an array",)


def test_nothing_is_copied_before_all_is_judged(monkeypatch):
    def copied(*args, **options):
        raise AssertionError("copied before the error")

    monkeypatch.setattr("fusionops.binding.arrays.Intake.settle", copied)
    with pytest.raises(fo.SpecError, match="out has shape"):
        fo.add([X.astype(">f4")], out=full(2))


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint64, np.float16, bfloat16, np.longlong])
def test_dtype_is_known(dtype):
    call = bind_merge("concat", [np.zeros(3, dtype)], axis=0)
    assert call.judgement.spec.dtype == np.dtype(dtype).name
    assert call.judgement.dtype == dtype


# What NumPy gives x0 + x1 + …, also for Python numbers, is what the spec says.
PROMOTIONS = [
    (full(2), np.float64(1)),
    (full(2), 1.5),
    (1.5, full(2)),
    (1, 2.5),
    (1, 2, full(2)),
    (full(2, dtype=np.uint8), 7, full(2, dtype=np.int8)),
    (full(2, dtype=np.int8), 1.5, full(2)),
    (full(2, dtype=bool), 1),
    (full(2, dtype=bool), full(2, dtype=bool)),
    (full(2, dtype=np.float16), full(2, dtype=np.int64)),
    (full(2, dtype=">f4"), full(2, dtype=">f4")),
]


@pytest.mark.parametrize("terms", PROMOTIONS, ids=lambda terms: "_".join(np.asarray(t).dtype.name for t in terms))
def test_promotion_is_numpys(terms):
    total = terms[0]
    for term in terms[1:]:
        total = np.add(total, term)
    call = bind_merge("add", list(terms))
    assert call.judgement.dtype == total.dtype
    assert call.judgement.dtype.isnative
    assert call.judgement.shape == total.shape


def test_sources_of_a_plain_add_keep_their_dtypes():
    call = bind_merge("add", [full(2, dtype=np.uint8), full(2)])
    assert [source.dtype for source in call.judgement.spec.sources] == ["uint8", "float32"]
    assert call.copies == ()


def test_sources_of_a_weighted_add_get_the_dtype_of_the_result():
    call = bind_merge("add", [full(2, dtype=np.uint8), full(2)], weights=[1, 2])
    assert [source.dtype for source in call.operands.sources] == ["float32", "float32"]
    assert call.copies == ("sources[0]: converted from uint8 to float32, the dtype of the result",)


def test_sources_of_an_activated_add_get_the_dtype_of_the_result():
    call = bind_merge("add", [full(2, dtype=np.float64), full(2)], activation="relu")
    assert [source.dtype for source in call.operands.sources] == ["float64", "float64"]
    assert call.copies == ("sources[1]: converted from float32 to float64, the dtype of the result",)


def test_weights_are_rounded_to_the_dtype_of_the_data():
    vector = np.array([0.1, 0.2, 0.3, 0.4])[::-1]
    call = bind_conv("add_conv", [X, fo.Source(X, weight=0.1), X], F, weights=[0.1, None, vector])
    scalar, own, column = call.operands.weights
    assert (scalar, own) == (float(np.float32(0.1)),) * 2
    assert (column.dtype, column.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(column, vector.astype(np.float32))
    assert [source.weight for source in call.judgement.spec.sources] == ["scalar", "scalar", "vector"]


def test_vector_of_one_channel_is_a_number():
    call = bind_merge("add", [full(3, 1), full(5)], weights=[[2], None])
    assert call.operands.weights == (2.0, None)
    assert call.judgement.spec.sources[0].weight == "scalar"


def test_weights_beyond_the_dtype_are_infinite_without_a_warning():
    assert bind_merge("add", [full(2)], weights=[1e300]).operands.weights == (np.inf,)


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("relu", [2 / (6 + 1e-4), 0.0, 4 / (6 + 1e-4)]),
        ("softmax", np.exp([-2.0, -7.0, 0.0]) / np.exp([-2.0, -7.0, 0.0]).sum()),
    ],
)
def test_normalisation_happens_in_float64(normalize, expected):
    call = bind_merge("add", [full(2)] * 3, weights=[2, -3, 4], normalize=normalize)
    assert call.operands.weights == tuple(float(np.float32(share)) for share in expected)


def test_softmax_of_large_weights_does_not_overflow():
    assert bind_merge("add", [full(2)] * 2, weights=[1e4, 1e4], normalize="softmax").operands.weights == (0.5, 0.5)


def test_source_says_all_it_can():
    scaled = fo.Source(
        full(1, 3, 2, 4), upsample=(2, 3), scale=full(4), shift=[1, 2, 3, 4], activation="relu", weight=2
    )
    call = bind_conv("add_conv", [X, scaled], F)
    source = call.judgement.spec.sources[1]
    assert (source.upsample, source.scale, source.shift, source.weight) == ((2, 3), True, True, "scalar")
    assert source.activation == Activation("relu")
    assert call.operands.scales[0] is None
    assert call.operands.shifts[1].dtype == np.float32


def test_trivial_source_is_the_array():
    assert bind_merge("add", [fo.Source(X)]).judgement.spec is bind_merge("add", [X]).judgement.spec


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("valid", ((0, 0), (0, 0))),
        ("VALID", ((0, 0), (0, 0))),
        ("same", ((0, 1), (0, 1))),
        (1, ((1, 1), (1, 1))),
        (np.int64(1), ((1, 1), (1, 1))),
        ((1, 2), ((1, 1), (2, 2))),
        ([1, 2], ((1, 1), (2, 2))),
        (((0, 1), (2, 3)), ((0, 1), (2, 3))),
        ([[0, 1], [2, 3]], ((0, 1), (2, 3))),
    ],
    ids=str,
)
def test_padding_is_written_down_in_one_form(padding, expected):
    spec = bind_conv("add_conv", [X], F, padding=padding, stride=(2, np.int32(2)), dilation=1).judgement.spec
    assert spec.contraction == Conv2d(5, 3, 3, (2, 2), expected)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("leaky_relu", Activation("leaky_relu", (float(np.float32(0.01)),))),
        (("leaky_relu", 0.2), Activation("leaky_relu", (float(np.float32(0.2)),))),
        (["leaky_relu", np.float32(0.25)], Activation("leaky_relu", (0.25,))),
        ("gelu", Activation("gelu")),
        (None, None),
    ],
    ids=str,
)
def test_activation_is_written_down_in_one_form(activation, expected):
    assert bind_conv("add_conv", [X], F, activation=activation).judgement.spec.activation == expected


def test_nchw_reads_extents_where_they_are():
    spec = bind_conv(
        "concat_conv", [full(2, 3, 6, 7), full(2, 1, 6, 7)], full(5, 4, 3, 2), layout="NCHW"
    ).judgement.spec
    assert (spec.N, spec.H, spec.W, spec.C, spec.channels) == (2, 6, 7, 4, (3, 1))
    assert spec.out_shape == (2, 5, 4, 6)


def test_padding_alone_can_make_a_result():
    assert bind_conv("add_conv", [full(1, 0, 3, 4)], F, padding=2).judgement.shape == (1, 2, 5, 5)


def test_bias_is_made_contiguous():
    call = bind_conv("add_conv", [X], F, full(10)[::2])
    assert call.operands.bias.flags.c_contiguous
    assert call.copies == ("bias: not contiguous",)


def test_dense_collapses_leading_axes_in_place_where_it_can():
    x, z = full(2, 3, 4), full(2, 3, 5)
    call = bind_dense("add_dense", [x, x[::-1]], full(4, 5), residual=z)
    assert (call.judgement.spec.contraction, call.judgement.shape) == (Dense(5), (2, 3, 5))
    assert [source.shape for source in call.operands.sources] == [(6, 4), (6, 4)]
    assert np.shares_memory(call.operands.sources[0], x)
    assert np.shares_memory(call.operands.residual, z)
    assert call.copies == ("sources[1]: leading axes cannot be collapsed to rows in place",)


def test_dense_of_one_row():
    call = bind_dense("concat_dense", [full(3), full(1)], full(4, 5), residual=full(5))
    assert (call.judgement.shape, call.judgement.spec.out_shape) == ((5,), (1, 5))


def test_prepacked_filters_are_a_copy_of_their_own():
    mine = F.copy()
    filters = bind_filters(mine[::-1])
    mine[:] = 0
    assert (filters.array == 1).all()
    assert not filters.array.flags.writeable
    assert bind_conv("add_conv", [X], filters).operands.filters is filters
    swapped = bind_filters(F.astype(">f4"))
    assert swapped.array.dtype.isnative


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: fo.prepack(full(3)), ValueError, "filters has 1 axes"),
        (lambda: fo.prepack(full(3, 3, dtype=int)), TypeError, "filters has dtype int64"),
        (lambda: fo.prepack(F, layout="HWIO"), ValueError, "layout is 'HWIO'"),
        (lambda: fo.prepack(fo.prepack(F)), TypeError, "prepacked already"),
    ],
    ids=["rank", "dtype", "layout", "twice"],
)
def test_prepack_judges_too(call, error, said):
    with pytest.raises(error, match=said):
        call()
