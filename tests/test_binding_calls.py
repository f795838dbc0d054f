"""Bound calls: where the result may be written directly, and that an equal call is judged once.

Looks at bound calls; no kernel runs.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

import fusionops as fo
from fusionops.binding import bind_conv, bind_dense, bind_merge


def full(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


X = full(1, 6, 6, 4)
F = full(3, 3, 4, 5)


# Where the result goes


def target_of(sources, out):
    return bind_merge("add", sources, out=out).target


def test_out_of_any_strides_is_written_directly():
    for out in (full(3, 4).T, full(8, 6)[::2, ::-2], np.zeros((4, 6), np.float32)[:, ::2]):
        assert target_of([full(4, 3)], out) is out


def test_out_as_a_source_itself_is_written_directly():
    x = full(4, 3)
    assert target_of([x, full(4, 3)], x) is x
    assert target_of([full(4, 3), x], x) is x


@pytest.mark.parametrize(
    "shifted",
    [lambda m: m[1:4], lambda m: m[:3][::-1], lambda m: m[0:1], lambda m: m[:3, :1]],
    ids=["by_a_row", "backwards", "a_row_of_it", "a_column_of_it"],
)
def test_out_that_overlaps_a_source_is_staged(shifted):
    memory = full(4, 3)
    call = bind_merge("add", [full(3, 3), shifted(memory)], out=memory[:3])
    assert call.target is None
    assert call.copies == ("out: its memory overlaps an input's, so the result is computed elsewhere and copied",)


def test_out_is_compared_with_arrays_that_own_their_memory():
    x = full(4, 4)
    assert target_of([x], x[::-1]) is None
    assert target_of([x, x.T], x) is None  # the same place, but not element for element
    assert bind_dense("add_dense", [x], full(4, 4), out=x).target is None


@pytest.mark.parametrize("role", ["source", "filters", "bias", "residual", "weight"])
def test_out_that_overlaps_any_operand_of_a_convolution_is_staged(role):
    memory = np.ones(500, np.float32)
    out = memory[: 4 * 4 * 5].reshape(1, 4, 4, 5)
    arrays = {
        "source": {"sources": [memory[: 6 * 6 * 4].reshape(1, 6, 6, 4)]},
        "filters": {"filters": memory[: 3 * 3 * 4 * 5].reshape(3, 3, 4, 5)},
        "bias": {"bias": memory[:5]},
        "residual": {"residual": out},
        "weight": {"weights": [memory[:4]]},
    }
    call = bind_conv("add_conv", **({"sources": [X], "filters": F} | arrays[role]), out=out)
    assert call.target is None


def test_out_of_a_dense_layer_is_collapsed_in_place_or_staged():
    x, matrix = full(2, 3, 4), full(4, 5)
    out = np.zeros((2, 3, 5), np.float32)
    assert np.shares_memory(bind_dense("add_dense", [x], matrix, out=out).target, out)
    call = bind_dense("add_dense", [x], matrix, out=np.zeros((3, 2, 5), np.float32).transpose(1, 0, 2))
    assert call.target is None
    assert call.copies == ("out: its leading axes cannot be collapsed in place, so the result is copied into it",)


# A second call


def test_equal_calls_share_one_spec():
    def spec(x, **options):
        return bind_conv("concat_conv", [x, x], full(3, 3, 8, 5), full(5), **options).judgement.spec

    first = spec(X, stride=2, padding=((1, 1), (1, 1)), activation=("leaky_relu", 0.5))
    assert spec(X.copy(), stride=(2, 2), padding=1, activation=["leaky_relu", 0.5]) is first
    assert (
        spec(X[:, ::-1], stride=2, padding=1, activation=("leaky_relu", 0.5)) is first
    )  # strides are no part of a spec
    assert spec(X, stride=2, padding=1) is not first


def test_what_is_remembered_does_not_let_bad_input_pass():
    for good, bad in ((1, True), (1, 1.0), ((1, 1), (1, True)), ((1, 1), (1, 1.0))):
        bind_conv("add_conv", [X], F, stride=good)
        with pytest.raises(fo.SpecTypeError, match="integer"):
            bind_conv("add_conv", [X], F, stride=bad)


def test_threads_bind_alike():
    specs, shapes = [], [(1, size, size, 4) for size in range(3, 40)]

    def bind():
        specs.append([bind_conv("add_conv", [full(*shape)], F, padding="same").judgement.spec for shape in shapes])

    threads = [threading.Thread(target=bind) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(specs) == 8
    assert all(found == specs[0] for found in specs)
