"""CuPy arrays as arguments: which are taken and refused, what is copied, what may overlap.

Looks at bound calls; no kernel runs, and there is no GPU: fake_cupy stands for CuPy.
"""

from __future__ import annotations

import sys

import fake_cupy as cp
import numpy as np
import pytest
from cuda_calls import ARGUMENTS, F, X, bound_with, full, shape_of

import fusionops as fo
from fusionops.binding import bind_conv, bind_dense, bind_filters, bind_merge, cuda


@pytest.fixture(autouse=True)
def cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cp)


def host(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


# Sides


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_taken_on_the_gpu(name):
    call = bound_with(name, full(*shape_of(name)))
    assert (call.home, call.copies, call.returns) == ("gpu", (), None)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_argument_may_be_on_the_other_side(name):
    with pytest.raises(fo.SpecTypeError) as caught:
        bound_with(name, host(*shape_of(name)))
    gpu_names, cpu_names = str(caught.value).partition(" and NumPy arrays (")[::2]
    assert "add_conv: GPU arrays (sources[" in gpu_names
    assert cpu_names.startswith(f"{name}) are mixed; nothing is transferred unasked\nhint: ")
    assert "cupy.asarray(x) or cupy.asnumpy(x)" in cpu_names


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_argument_may_be_on_another_gpu(name):
    with pytest.raises(fo.SpecError) as caught:
        bound_with(name, full(*shape_of(name), device=1))
    assert f" and GPU 1 ({name}); one call runs on one GPU" in str(caught.value)
    assert "arrays are on GPU 0 (" in str(caught.value)
    assert "hint: with cupy.cuda.Device(0): x = cupy.asarray(x)" in str(caught.value)


def test_a_gpu_array_among_numpys_is_the_one_on_the_wrong_side():
    for arguments in ({"out": full(3)}, {"weights": [None, full(3)]}):
        with pytest.raises(fo.SpecTypeError, match=r"and NumPy arrays \(sources\[0\], sources\[1\]\) are mixed"):
            bind_merge("add", [host(3), host(3)], **arguments)
    with pytest.raises(fo.SpecTypeError, match=r"GPU arrays \(matrix\) and NumPy arrays \(sources\[0\]\)"):
        bind_dense("add_dense", [host(2, 3)], full(3, 4))
    with pytest.raises(fo.SpecTypeError, match=r"GPU arrays \(out\) and NumPy arrays \(sources\[0\], matrix\)"):
        bind_dense("add_dense", [host(2, 3)], host(3, 4), out=full(2, 4))


def test_prepacked_filters_belong_to_a_side_and_a_gpu():
    with pytest.raises(fo.SpecTypeError, match=r"NumPy arrays \(filters\)"):
        bind_conv("add_conv", [X], fo.prepack(host(3, 3, 4, 5)))
    with pytest.raises(fo.SpecTypeError, match=r"GPU arrays \(filters\) and NumPy arrays \(sources\[0\]\)"):
        bind_conv("add_conv", [host(1, 6, 6, 4)], fo.prepack(F))
    with pytest.raises(fo.SpecError, match=r"GPU 1 \(filters\)"):
        bind_conv("add_conv", [X], bind_filters(full(3, 3, 4, 5, device=1)))


def test_prepacked_filters_are_a_copy_on_their_gpu():
    mine = full(3, 3, 4, 5, device=1)
    filters = bind_filters(mine)
    mine._memory[:] = 0
    assert (filters.array.get() == 1).all()
    assert filters.array.device.id == 1
    call = bind_conv("add_conv", [full(1, 6, 6, 4, device=1)], filters)
    assert (call.operands.filters, call.home) == (filters, "gpu")


def test_numpy_calls_stay_at_home_beside_cupy():
    assert bind_merge("add", [host(3), host(3)], out=host(3)).home == "cpu"
    assert bind_merge("add", [host(3), [1.5] * 3], weights=[1, [1, 2, 3]]).home == "cpu"


# The same judgement


def test_both_sides_share_what_was_judged():
    sides = [bind_conv("add_conv", [x, x], f).judgement for x, f in ((X, F), (host(*X.shape), host(*F.shape)))]
    assert sides[0] is sides[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bind_merge("add", [full(2, 3), full(3, 2)]), "sources[1] has 2 along axis -1"),
        (lambda: bind_merge("concat", [full(2, 3), full(2, 3)], axis=2), "axis is 2"),
        (lambda: bind_merge("add", [full(3, dtype=complex)]), "hint: complex is not supported"),
        (lambda: bind_conv("add_conv", [X], full(3, 3, 4, 5, dtype=np.float64)), "filters has dtype float64"),
        (lambda: bind_conv("concat_conv", [X, X], F), "filters take 4 channels, the sources have 4 + 4 = 8"),
        (lambda: bind_dense("add_dense", [full(2, 3)], full(4, 3)), "matrix has 4 rows"),
        (lambda: bind_filters(full(3)), "filters has 1 axes"),
        (lambda: bind_merge("add", [full(3)], out=full(4)), 'hint: cupy.empty((3,), "float32") fits'),
        (lambda: bind_merge("add", [full(3)], out=full(3, dtype=np.float64)), "out has dtype float64"),
        (lambda: bind_merge("add", [full(2, dtype=int)], weights=[2]), "activations need a floating dtype"),
        (
            lambda: bind_merge("add", full(2)),
            "sources is a cupy.ndarray, needs a list or tuple of arrays\nhint: pass a list",
        ),
        (lambda: bind_merge("add", [[full(2), full(2)]]), "sources[0] cannot be made an array: Implicit conversion"),
    ],
)
def test_bad_input_is_refused_as_numpys(call, said):
    with pytest.raises(fo.FusionError) as caught:
        call()
    assert said in str(caught.value)


def test_promotion_and_broadcasting_are_numpys():
    call = bind_merge("add", [full(2, 1, dtype=np.int32), full(3), 1.5])
    assert (call.judgement.shape, call.judgement.dtype) == ((2, 3), np.float64)


def test_conversions_run_where_the_arrays_are():
    call = bind_merge("add", [full(2, dtype=np.uint8, device=1), full(2, device=1)], activation="relu")
    assert [source.dtype for source in call.operands.sources] == ["float32", "float32"]
    assert [source.device.id for source in call.operands.sources] == [1, 1]
    assert call.copies == ("sources[0]: converted from uint8 to float32, the dtype of the result",)


# Numbers


def test_weights_are_rounded_and_placed_where_the_arrays_are():
    x, vector = full(1, 6, 6, 4, device=1), full(4, dtype=np.float64, device=1)[::-1]
    call = bind_conv("add_conv", [x, x, x], full(3, 3, 4, 5, device=1), weights=[0.1, [1, 2, 3, 4], vector])
    number, numbers, column = call.operands.weights
    assert number == float(np.float32(0.1))
    for placed in (numbers, column):
        assert (type(placed), placed.dtype, placed.device.id) == (cp.ndarray, np.float32, 1)
        assert placed.flags.c_contiguous
    assert numbers.get().tolist() == [1, 2, 3, 4]


def test_numbers_as_sources_go_where_the_arrays_are():
    call = bind_merge("add", [1.5, full(2, device=1), [1, 2]])
    assert [(type(source), source.device.id) for source in call.operands.sources] == [(cp.ndarray, 1)] * 3
    assert [source.dtype for source in call.operands.sources] == ["float32", "float32", "int64"]


def test_lists_as_operands_of_a_contraction_go_where_the_arrays_are():
    call = bind_dense("add_dense", [full(3, dtype=np.float64)], full(3, 2, dtype=np.float64), [1.0, 2.0])
    assert call.operands.bias.get().tolist() == [1.0, 2.0]
    assert call.copies == ("bias: a list, converted to an array",)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([full()], "weights[0] has shape (), needs a number or a vector (C,)"),
        (full(1), "weights[0] has shape (), needs a number or a vector (C,)"),
        ([full(1)], "weights[0] is one number on a GPU, needs the number"),
    ],
    ids=["no_axes", "vector_of_numbers", "one_channel"],
)
def test_a_number_is_not_read_from_a_gpu(weights, said):
    with pytest.raises(fo.FusionError) as caught:
        bind_merge("add", [full(3, 1)], weights=weights)
    assert said in str(caught.value)
    assert "hint: float(x) reads it, and waits for what the GPU is doing" in str(caught.value)


def test_rows_of_weights_may_be_on_the_gpu():
    call = bind_merge("add", [full(2, 4), full(4)], weights=full(2, 4))
    assert [weight.shape for weight in call.operands.weights] == [(4,), (4,)]


def test_vector_of_one_listed_number_is_a_number():
    assert bind_merge("add", [full(3, 1)], weights=[[2]]).operands.weights == (2.0,)


# Layouts


@pytest.mark.parametrize(
    "array",
    [full(4, 3), full(3, 4).T, full(8, 6)[::2, ::2], full(4, 3)[::-1], full(0, 3), full(), full(3, dtype="bfloat16")],
    ids=["contiguous", "transposed", "every_other", "backwards", "empty", "no_axes", "bfloat16"],
)
def test_view_reaches_the_kernel_as_it_is(array):
    call = bind_merge("add", [array])
    assert call.operands.sources[0] is array
    assert call.copies == ()


def test_memory_that_no_gpu_can_read_is_refused():
    with pytest.raises(fo.SpecError, match=r"needs a multiple of 4 bytes\nhint: sources\[0\]\.copy"):
        bind_merge("add", [full(13, dtype=np.uint8)[1:].view(np.float32)])


def test_strides_that_are_not_whole_items_are_copied():
    memory = np.zeros(3, [("x", "f4"), ("y", "i2")])["x"]
    call = bind_merge("add", [cp.ndarray(memory)])
    assert call.copies == ("sources[0]: strides are not whole items",)
    assert call.operands.sources[0].strides == (4,)


def test_bias_is_made_contiguous_where_it_is():
    call = bind_conv("add_conv", [full(1, 6, 6, 4, device=1)], full(3, 3, 4, 5, device=1), full(10, device=1)[::2])
    assert call.operands.bias.flags.c_contiguous
    assert call.copies == ("bias: not contiguous",)


def test_dense_collapses_leading_axes_in_place_where_it_can():
    x = full(2, 3, 4, device=1)
    call = bind_dense("add_dense", [x, x[::-1]], full(4, 5, device=1), residual=full(2, 3, 5, device=1))
    in_place, copied = call.operands.sources
    assert (in_place.shape, in_place.data.ptr) == ((6, 4), x.data.ptr)
    assert (copied.shape, copied.base) == ((6, 4), None)
    assert call.copies == ("sources[1]: leading axes cannot be collapsed to rows in place",)


# Where the result goes


def target_of(sources, out):
    return bind_merge("add", sources, out=out).target


def test_out_is_written_directly():
    for out in (full(4, 3), full(3, 4).T, full(8, 6)[::2, ::-2]):
        assert target_of([full(4, 3)], out) is out
    x = full(4, 3)
    assert target_of([x, full(4, 3)], x) is x


@pytest.mark.parametrize(
    "shifted",
    [
        lambda m: m[1:4],
        lambda m: m[:3][::-1],
        lambda m: m[1:4][::-1],
        lambda m: m[0:1],
        lambda m: m[:3, :1],
        lambda m: m[2, 2],
    ],
    ids=["by_a_row", "backwards", "backwards_by_a_row", "a_row_of_it", "a_column_of_it", "its_last_number"],
)
def test_out_that_overlaps_a_source_is_staged(shifted):
    memory = full(5, 3)
    call = bind_merge("add", [full(3, 3), shifted(memory)], out=memory[:3])
    assert call.target is None
    assert call.copies == ("out: its memory overlaps an input's, so the result is computed elsewhere and copied",)


def test_neighbours_do_not_overlap():
    memory = full(6, 3)
    assert target_of([memory[3:]], memory[:3]) is not None
    assert target_of([memory[:3][::-1]], memory[3:]) is not None
    assert bind_merge("concat", [memory[:2, :0], full(2, 3)], axis=1, out=memory[:2]).target is not None


@pytest.mark.parametrize("role", ["filters", "bias", "residual", "weight"])
def test_out_that_overlaps_any_operand_of_a_convolution_is_staged(role):
    memory = full(500)
    out = memory[: 4 * 4 * 5].reshape(1, 4, 4, 5)
    arrays = {
        "filters": {"filters": memory[: 3 * 3 * 4 * 5].reshape(3, 3, 4, 5)},
        "bias": {"bias": memory[:5]},
        "residual": {"residual": out},
        "weight": {"weights": [memory[:4]]},
    }
    call = bind_conv("add_conv", **({"sources": [X], "filters": F} | arrays[role]), out=out)
    assert call.target is None


def test_out_that_overlaps_itself():
    memory = np.zeros(32, np.float32)
    out = cp.ndarray(np.lib.stride_tricks.as_strided(memory, (4, 3), (4, 4)))
    with pytest.raises(fo.SpecError, match="out overlaps itself"):
        bind_merge("add", [full(4, 3)], out=out)


def test_out_of_a_dense_layer_is_collapsed_in_place_or_staged():
    x, matrix, out = full(2, 3, 4), full(4, 5), full(2, 3, 5)
    assert bind_dense("add_dense", [x], matrix, out=out).target.data.ptr == out.data.ptr
    call = bind_dense("add_dense", [x], matrix, out=full(3, 2, 5).transpose(1, 0, 2))
    assert call.target is None
    assert call.copies == ("out: its leading axes cannot be collapsed in place, so the result is copied into it",)


def test_without_cupy_nothing_is_looked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cuda.type_of(*cuda.CUPY) is None
    assert bind_merge("add", [host(3)]).home == "cpu"
