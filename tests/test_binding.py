"""Bad input: a row for each kind, with the type of the error, what its message says, and that `out` is untouched.

Good input of unusual kinds is in test_binding_arrays; nothing here reaches a kernel.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import fusionops as fo


def full(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


X = full(1, 6, 6, 4)
F = full(3, 3, 8, 5)  # for concat_conv([X, X])
ADD_F = full(3, 3, 4, 5)
READ_ONLY = np.zeros(3, np.float32)
READ_ONLY.flags.writeable = False


def conv(sources: Any = (X, X), filters: Any = F, bias: Any = None, **options: Any) -> Callable[..., Any]:
    return lambda **out: fo.concat_conv(sources, filters, bias, **options, **out)


def add_conv(sources: Any = (X, X), filters: Any = ADD_F, bias: Any = None, **options: Any) -> Callable[..., Any]:
    return lambda **out: fo.add_conv(sources, filters, bias, **options, **out)


def dense(sources: Any, matrix: Any, bias: Any = None, **options: Any) -> Callable[..., Any]:
    return lambda **out: fo.concat_dense(sources, matrix, bias, **options, **out)


def add_dense(*sources: Any, **options: Any) -> Callable[..., Any]:
    return lambda **out: fo.add_dense(sources, full(3, 2), **options, **out)


def add(*sources: Any, **options: Any) -> Callable[..., Any]:
    return lambda **out: fo.add(list(sources), **options, **out)


def concat(*sources: Any, **options: Any) -> Callable[..., Any]:
    return lambda **out: fo.concat(list(sources), **options, **out)


def source(array: Any = X, **options: Any) -> fo.Source:
    return fo.Source(array, **options)


# Of each row: its subject, a call that must fail, the built-in error it fails with, parts of what the message says.
SHAPES = [
    ("add_not_broadcastable", add(full(2, 3), full(3, 2)), ValueError, "add: sources[1] has 2", "(2, 3)", "(3, 2)"),
    ("add_not_broadcastable_later", add(full(3), full(1), full(2)), ValueError, "sources[2] has 2", "sources[0] has 3"),
    ("add_conv_channels", add_conv((X, full(1, 6, 6, 3))), ValueError, "C=3", "C=4", "hint: concat_conv"),
    ("add_conv_one_channel", add_conv((X, full(1, 6, 6, 1))), ValueError, "C=1", "equal N, H, W and C"),
    ("different_batch", conv((X, full(2, 6, 6, 4))), ValueError, "N=2", "N=1", "equal N, H and W"),
    ("concat_off_axis", concat(full(2, 3), full(3, 3)), ValueError, "sources[1] has 3 along axis 0", "only axis 1"),
    ("concat_ranks", concat(full(2, 3), full(3)), ValueError, "sources[1] has 1 axes", "sources[0] has 2"),
    ("concat_of_nothing", concat(), ValueError, "concat: sources is empty", "at least one"),
    ("conv_of_nothing", conv(()), ValueError, "concat_conv: sources is empty"),
    ("axis_out_of_range", concat(X, X, axis=4), IndexError, "axis is 4", "-4 … 3"),
    ("axis_out_of_range_is_value", concat(X, X, axis=-5), ValueError, "axis is -5"),
    ("concat_no_axes", concat(np.float32(1), np.float32(2)), ValueError, "no axes", "hint: np.atleast_1d"),
    ("dense_no_axes", dense([np.float32(1)], full(1, 1)), ValueError, "sources[0] has no axes"),
    ("unbatched_map", conv((X[0], X[0])), ValueError, "3 axes", "(N, H, W, C)", "hint: sources[0][None]"),
    ("map_of_rank_5", conv((X[None],)), ValueError, "5 axes", "needs 4"),
    ("filters_rank", conv(filters=F[0]), ValueError, "filters has 3 axes", "(R, S, C/groups, K)"),
    ("filters_rank_nchw", conv(filters=F[0], layout="NCHW"), ValueError, "(K, C/groups, R, S)"),
    ("matrix_rank", dense([full(2, 3)], full(3)), ValueError, "matrix has 1 axes", "(channels, units)"),
    ("channels_of_filters", conv(filters=full(3, 3, 7, 5)), ValueError, "take 7 channels", "4 + 4 = 8"),
    ("channels_of_add", add_conv(filters=F), ValueError, "filters take 8 channels", "hint: concat_conv takes these"),
    ("channels_swapped_filters", conv(filters=full(5, 8, 3, 3)), ValueError, "look like OIHW", "transpose(2, 3, 1, 0)"),
    ("channels_swapped_maps", conv((full(1, 4, 6, 7),) * 2), ValueError, "maps look like NCHW", "(0, 2, 3, 1)"),
    ("channels_all_nchw", conv((full(1, 4, 6, 7),) * 2, full(5, 8, 3, 3)), ValueError, 'fit layout="NCHW"'),
    ("channels_all_nhwc", conv(layout="NCHW"), ValueError, 'fit layout="NHWC"'),
    ("channels_not_grouped", conv(filters=full(3, 3, 2, 6)), ValueError, "hint: groups=4 would fit"),
    ("filters_for_add", conv(filters=ADD_F), ValueError, "hint: add_conv takes these filters"),
    ("channels_of_matrix", dense([full(2, 3), full(2, 1)], full(5, 2)), ValueError, "5 rows", "3 + 1 = 4"),
    ("matrix_transposed", dense([full(2, 3)], full(7, 3)), ValueError, "matrix has 7 rows", "hint: matrix.T"),
    ("leading_axes", dense([full(2, 3), full(4, 3)], full(6, 2)), ValueError, "(4,)", "(2,)", "leading axes"),
    ("add_dense_channels", add_dense(full(2, 3), full(2, 1)), ValueError, "[1] has 1 channels", "hint: concat_dense"),
    ("groups_of_channels", conv(groups=3), ValueError, "4 + 4 = 8", "groups=3"),
    ("groups_of_filters", conv(filters=full(3, 3, 4, 5), groups=2), ValueError, "5 filters", "groups=2"),
    ("fewer_filters_than_groups", conv(filters=full(3, 3, 2, 2), groups=4), ValueError, "2 filters", "groups=4"),
    ("empty_kernel", conv(filters=full(0, 3, 8, 5)), ValueError, "0 rows R"),
    ("no_filters", conv(filters=full(3, 3, 8, 0)), ValueError, "0 filters K"),
    ("no_units", dense([full(2, 3)], full(3, 0)), ValueError, "matrix has 0 columns"),
    ("kernel_beyond_map", conv(filters=full(3, 7, 8, 5)), ValueError, "spans 7 along W", "W=6", 'hint: padding="same"'),
    ("dilation_beyond_map", conv(dilation=3), ValueError, "spans 7 along H", "H=6 with padding 0 + 0 is 6"),
    ("no_channels", conv((X, full(1, 6, 6, 0))), ValueError, "sources[1] has 0 channels"),
    ("dense_no_channels", dense([full(2, 0)], full(0, 3)), ValueError, "sources[0] has 0 channels"),
    ("no_pixels", conv((full(1, 0, 6, 4),) * 2), ValueError, "spans 3 along H", "H=0"),
    ("bias_shape", conv(bias=full(4)), ValueError, "bias has shape (4,)", "(5,)"),
    ("bias_rank", conv(bias=full(1, 1, 1, 5)), ValueError, "hint: bias.ravel()"),
    ("residual_shape", conv(residual=full(1, 4, 4, 1)), ValueError, "(1, 4, 4, 1)", "(1, 4, 4, 5)", "never broadcast"),
    ("residual_upsampled", conv(residual=source(full(1, 3, 3, 5), upsample=2)), ValueError, "after upsampling"),
    ("residual_scaled", conv(residual=source(full(1, 4, 4, 5), scale=full(5))), ValueError, "scale or shift"),
    ("upsampled_size", conv((X, source(full(1, 3, 2, 4), upsample=2))), ValueError, "W=4 after upsampling", "W=6"),
    ("size_by_factor", conv((X, full(1, 3, 3, 4))), ValueError, "H=3", "hint: Source(x, upsample=2) for sources[1]"),
    ("size_by_crop", conv((full(1, 7, 7, 4), X)), ValueError, "H=6", "H=7", "7x7 and 6x6", "[:, :6, :6]"),
]  # fmt: skip

KINDS = [
    ("dtypes_mixed", conv((X, X.astype(np.float64))), TypeError, "float64", "float32", "hint: sources[1].astype"),
    ("dtype_of_filters", conv(filters=F.astype(np.float64)), TypeError, "filters has dtype float64"),
    ("dtype_of_bias", conv(bias=full(5, dtype=np.float64)), TypeError, "bias has dtype float64"),
    ("dtype_of_residual", conv(residual=full(1, 4, 4, 5, dtype=np.float16)), TypeError, "residual has dtype float16"),
    ("integers_in_conv", conv((full(1, 6, 6, 4, dtype=int),) * 2), TypeError, "int64", "floating", "hint"),
    ("integers_in_dense", dense([full(2, 3, dtype=np.uint8)], full(3, 2)), TypeError, "uint8", "floating"),
    ("complex", add(full(3, dtype=complex)), TypeError, "complex128", "hint: complex is not supported"),
    ("complex_bias", conv(bias=full(5, dtype=np.complex64)), TypeError, "bias has dtype complex64"),
    ("object", add(np.array([None, 1])), TypeError, "sources[0] has dtype object, needs bool, integers of 8 to 64"),
    ("none", add(None), TypeError, "from a NoneType"),
    ("string", concat(np.array(["a"])), TypeError, "<U1"),
    ("datetime", add(np.array(["2020-01-01"], "M8[D]")), TypeError, "datetime64"),
    ("timedelta", add(np.array([1], "m8[s]")), TypeError, "timedelta64"),
    ("longdouble", add(full(3, dtype=np.longdouble)), TypeError, "hint: cast it: sources[0].astype(np.float64)"),
    ("structured", concat(np.zeros(3, "f4,f4")), TypeError, "hint: structured"),
    ("no_common_dtype", add(full(2, dtype="f2"), full(2, dtype=bfloat16)), TypeError, "no common dtype"),
    ("ragged", add([[1.0], [1.0, 2.0]]), ValueError, "sources[0] cannot be made an array", "inhomogeneous"),
    ("masked", add(np.ma.masked_array([1.0], [True])), TypeError, "masked", "hint: x.filled(value)"),
    ("sources_one_array", lambda **out: fo.add(X, **out), TypeError, "sources is an array", "hint: pass a list"),
    ("sources_one_source", lambda **out: fo.add(source(), **out), TypeError, "is a fusionops.Source", "pass a list"),
    ("sources_generator", lambda **out: fo.add((x for x in [X]), **out), TypeError, "a generator", "list or tuple"),
    ("source_of_source", add(source(source())), TypeError, "sources[0] is a Source of a Source"),
    ("int_beyond_dtype", add(full(2, dtype=np.uint8), 300), ValueError, "sources[1] is 300", "uint8"),
    ("weights_for_integers", add(full(2, dtype=int), weights=[2]), TypeError, "floating", "int64"),
    ("activation_of_integers", add(full(2, dtype=int), activation="relu"), TypeError, "floating", "int64"),
    ("upsampled_integers", concat(source(full(1, 2, 2, 1, dtype=int), upsample=2)), TypeError, "floating"),
]  # fmt: skip

OPTIONS = [
    ("groups_zero", conv(groups=0), ValueError, "groups is 0", "needs at least 1"),
    ("groups_negative", conv(groups=-1), ValueError, "groups is -1"),
    ("groups_float", conv(groups=1.0), TypeError, "groups is 1.0", "integer"),
    ("stride_zero", conv(stride=0), ValueError, "stride is 0"),
    ("stride_negative", conv(stride=(1, -1)), ValueError, "stride[1] is -1"),
    ("stride_huge", conv(stride=2**40), ValueError, f"stride is {2**40}", "at most 2147483647"),
    ("stride_length", conv(stride=(1, 1, 1)), ValueError, "stride is (1, 1, 1)", "not 3"),
    ("stride_float", conv(stride=1.5), TypeError, "stride is 1.5", "integer"),
    ("stride_string", conv(stride="1"), TypeError, "stride is '1'"),
    ("stride_bool", conv(stride=True), TypeError, "stride is True"),
    ("stride_bool_in_pair", conv(stride=(1, True)), TypeError, "stride[1] is True"),
    ("stride_array", conv(stride=np.array([1, 1])), TypeError, "stride is an array (2,)"),
    ("dilation_zero", conv(dilation=0), ValueError, "dilation is 0"),
    ("dilation_negative", conv(dilation=(-2, 1)), ValueError, "dilation[0] is -2"),
    ("padding_negative", conv(padding=-1), ValueError, "padding is -1", "needs at least 0"),
    ("padding_negative_side", conv(padding=((0, -1), (0, 0))), ValueError, "padding[0][1] is -1"),
    ("padding_unknown", conv(padding="full"), ValueError, "'full'", '"valid", "same"', "((top, bottom), (left"),
    ("padding_four", conv(padding=(1, 1, 1, 1)), ValueError, "not 4", "hint: ((top, bottom), (left, right))"),
    ("padding_one_pair", conv(padding=((1, 1),)), ValueError, "needs two pairs"),
    ("padding_float", conv(padding=0.5), TypeError, "padding is 0.5"),
    ("padding_none", conv(padding=None), TypeError, "padding is None"),
    ("upsample_zero", add(source(upsample=0)), ValueError, "sources[0].upsample is 0"),
    ("upsample_negative", add(source(upsample=(2, -2))), ValueError, "sources[0].upsample[1] is -2"),
    ("upsample_fraction", add(source(upsample=1.5)), TypeError, "sources[0].upsample is 1.5"),
    ("upsample_rank", add(source(full(2, 2), upsample=2)), ValueError, "2 axes", "(N, H, W, C)"),
    ("upsample_dense", dense([source(full(2, 3), upsample=2)], full(3, 2)), ValueError, "no H and W"),
    ("mode_unknown", add(source(mode="bilinear")), ValueError, "sources[0].mode is 'bilinear'", '"nearest"'),
    ("activation_unknown", conv(activation="Relu"), ValueError, "'Relu'", '"gelu"', '"relu" is the name here'),
    ("activation_alias", conv(activation="swish"), ValueError, '"silu" is the name here'),
    ("activation_kind", conv(activation=np.tanh), TypeError, "needs None, a name or a pair"),
    ("activation_parameter", conv(activation=("relu", 0.1)), ValueError, "takes no parameter", "leaky_relu"),
    ("activation_slope", conv(activation=("leaky_relu", "x")), TypeError, "slope of activation is 'x'"),
    ("activation_slope_nan", conv(activation=("leaky_relu", np.nan)), ValueError, "nan", "finite"),
    ("activation_of_source", add(source(activation="swish")), ValueError, "sources[0].activation is 'swish'"),
    ("layout_unknown", conv(layout="NHCW"), ValueError, "'NHCW'", '"NHWC" or "NCHW"'),
    ("layout_keras", conv(layout="channels_last"), ValueError, 'hint: "NHWC" is the name here'),
    ("layout_kind", conv(layout=None), TypeError, "layout is None"),
    ("strict_kind", conv(strict=1), TypeError, "strict is 1", "True or False"),
    ("return_sum_kind", add_conv(return_sum="yes"), TypeError, "return_sum is 'yes'"),
    ("precision_unknown", conv(precision="fp16"), ValueError, "'fp16'", '"tf32"'),
    ("axis_kind", concat(X, axis=1.0), TypeError, "axis is 1.0"),
    ("axis_none", concat(X, axis=None), TypeError, "axis is None", "hint: flatten first"),
    ("weights_number", add(X, X, weights=0.5), TypeError, "weights is 0.5", "list"),
    ("weights_count", add(X, X, weights=[1.0]), ValueError, "weights has 1 entries", "2 sources"),
    ("weight_rank", add(X, weights=[full(2, 2)]), ValueError, "weights[0] has shape (2, 2)", "vector (C,)"),
    ("weight_length", add(X, weights=[full(3)]), ValueError, "weight of sources[0] is a vector (3,)", "(4,)"),
    ("weight_of_source_length", conv((source(weight=full(3)), X)), ValueError, "weight of sources[0]", "(4,)"),
    ("weight_string", add(X, weights=["a"]), TypeError, "weights[0] is 'a'", "real number"),
    ("weight_bool", add(X, weights=[True]), TypeError, "weights[0] is True"),
    ("weight_bools", add(X, weights=[full(4, dtype=bool)]), TypeError, "weights[0] holds bools"),
    ("weight_complex", add(X, weights=[1j]), TypeError, "weights[0] is 1j"),
    ("weight_twice", add(source(weight=2), weights=[2]), ValueError, "weight of its own", "weights[0]", "hint"),
    ("scale_number", add(source(scale=2.0)), ValueError, "scale of sources[0] is a number", "(4,)"),
    ("normalize_unknown", add(X, weights=[1], normalize="sum"), ValueError, "'sum'", '"relu", "softmax"'),
    ("normalize_alone", add(X, X, normalize="relu"), ValueError, "weight of every", "hint: weights=[1.0, 1.0]"),
    ("normalize_vectors", add(X, weights=[full(4)], normalize="relu"), ValueError, "vectors and None"),
    ("prepacked_layout", conv(filters=fo.prepack(F), layout="NCHW"), ValueError, "prepacked for layout NHWC", "hint"),
]  # fmt: skip


@pytest.mark.parametrize("row", [*SHAPES, *KINDS, *OPTIONS], ids=lambda row: row[0])
def test_bad_input(row):
    _, call, error, *said = row
    out = np.full((2, 3), 7.0, np.float32)
    with pytest.raises(error) as caught:
        call(out=out)
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert isinstance(caught.value, fo.FusionError)
    assert (out == 7).all()


def test_message_reads_as_a_whole():
    with pytest.raises(fo.SpecError) as caught:
        fo.concat_conv([full(2, 7, 9, 16), full(2, 14, 18, 24)], full(3, 3, 40, 8))
    assert str(caught.value) == (
        "concat_conv: sources[1] has H=14, sources[0] has H=7; concat needs equal N, H and W\n"
        "  sources[0]: (2, 7, 9, 16) float32     sources[1]: (2, 14, 18, 24) float32"
        "     filters: (3, 3, 40, 8) float32\n"
        "hint: Source(x, upsample=2) for sources[0] makes them equal"
    )


def test_message_counts_what_it_does_not_list():
    with pytest.raises(fo.SpecError, match=r"sources\[5\]: \(1,\) float32     and 59 more\n?"):
        fo.concat([*[full(1)] * 64, full(1, 1)])


OUTS = [
    ("read_only", READ_ONLY, ValueError, "out is read-only"),
    ("shape", np.zeros((3, 1), np.float32), ValueError, "out has shape (3, 1), the result has (3,)"),
    ("shape_to_broadcast_into", np.zeros((2, 3), np.float32), ValueError, "out has shape (2, 3)"),
    ("dtype_wider", np.zeros(3), TypeError, "out has dtype float64, the result has float32"),
    ("dtype_swapped", np.zeros(3, ">f4"), TypeError, "out has dtype >f4"),
    ("a_dtype", np.float32, TypeError, "out is a type, needs a NumPy array"),
    ("list", [0.0] * 3, TypeError, "out is [0.0, 0.0, 0.0], needs a NumPy array"),
    ("masked", np.ma.zeros(3, np.float32), TypeError, "needs a NumPy array"),
]


@pytest.mark.parametrize(("out", "error", "said"), [row[1:] for row in OUTS], ids=[row[0] for row in OUTS])
def test_bad_out(out, error, said):
    before = np.array(out)
    with pytest.raises(error) as caught:
        fo.add([full(3), full(3)], out=out)
    assert said in str(caught.value)
    np.testing.assert_array_equal(np.asarray(out), before)


@pytest.mark.parametrize("strides", [(4, 4), (0, 4), (8, 4), (-4, 4)], ids=str)
def test_out_that_overlaps_itself(strides):
    memory = np.zeros(32, np.float32)
    out = np.lib.stride_tricks.as_strided(memory[16:], (4, 3), strides)
    with pytest.raises(fo.SpecError, match="out overlaps itself"):
        fo.add([full(4, 3)], out=out)
    assert not memory.any()


def test_result_that_no_machine_can_address():
    tall, wide = np.broadcast_to(np.float32(0), (2**31, 1)), np.broadcast_to(np.float32(0), (2**31,))
    with pytest.raises(fo.SpecError, match=r"larger than 2\*\*63 - 1 bytes"):
        fo.add([tall, wide])


def test_result_that_this_machine_cannot_hold():
    tall, wide = np.broadcast_to(np.float32(0), (2**24, 1)), np.broadcast_to(np.float32(0), (2**24,))
    with pytest.raises(MemoryError):
        fo.add([tall, wide])


class Foreign:
    """Stands for another library's array: has what NumPy needs, but must not be converted."""

    def __init__(self) -> None:
        self.shape, self.dtype, self.ndim = (3,), np.dtype(np.float32), 1

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise AssertionError("converted unasked")


@pytest.fixture
def foreign(monkeypatch):
    """An array of a library that seems to be imported."""

    def pretend(library: str, name: str) -> Foreign:
        module = types.ModuleType(library)
        setattr(module, name, Foreign)
        monkeypatch.setitem(sys.modules, library, module)
        return Foreign()

    return pretend


@pytest.mark.parametrize(
    ("library", "name", "hint"),
    [("torch", "Tensor", ".cpu().numpy()"), ("jax", "Array", "np.asarray(x)"), ("tensorflow", "Tensor", "x.numpy()")],
)
def test_array_of_another_library(foreign, library, name, hint):
    with pytest.raises(fo.SpecTypeError) as caught:
        fo.add([full(3), foreign(library, name)])
    assert f"sources[1] is a {library} {name}" in str(caught.value)
    assert hint in str(caught.value)
