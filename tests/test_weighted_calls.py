"""Calls with weights, made again: numbers tell calls apart, vectors are judged each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusionops as fo
from fusionops import Source, SpecError, SpecTypeError, dispatch, perform


@pytest.fixture(autouse=True)
def forget():
    """Each test starts with calls that nobody has made."""
    perform._REPEATED.clear()
    perform._WEIGHED_ONCE.clear()


def call(op: str, dtype: Any, *weights: Any, how: str = "list", **options: Any) -> np.ndarray:
    """Of two maps that are the same in every call; the first is upsampled where a Source can say so."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((1, 6, 6, 40)).astype(dtype) for _ in range(2))
    if op.endswith("dense"):
        x, y = x[0, 0], y[0, 0]
    sources: list[Any] = [x, y]
    if how == "sources":
        sources = [Source(source, weight=weight) for source, weight in zip((x, y), weights, strict=True)]
        if not op.endswith("dense"):
            sources[0] = Source(x[:, :3, :3], upsample=2, weight=weights[0])
    else:
        options["weights"] = list(weights) if how == "list" else tuple(weights)
    channels = 40 if op.startswith("add") else 80
    shape = (channels, 24) if op.endswith("dense") else (3, 3, channels, 24)
    filters = [] if op == "add" else [rng.standard_normal(shape).astype(dtype)]
    return getattr(fo, op)(sources, *filters, **options)


@pytest.mark.parametrize("how", ["list", "tuple", "sources"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", ["add", "add_conv", "concat_conv", "add_dense", "concat_dense"])
def test_numbers_are_made_again_without_being_judged(op, dtype, how, monkeypatch):
    several = [(0.5, 2.0), (2.0, 0.5), (2, 0.5), (0.1, None), (-0.0, 1e-3), (0.0, 1e-3)]
    how = "sources" if op.startswith("concat") else how  # the only way to weigh what is concatenated
    expected = [call(op, dtype, *weights, how=how, backend="cpu") for weights in several]
    for weights in 2 * several:
        call(op, dtype, *weights, how=how)
    monkeypatch.setattr(dispatch, "run", None)  # which a judged call goes through
    for weights, result in zip(several, expected, strict=True):
        assert call(op, dtype, *weights, how=how).tobytes() == result.tobytes()


def test_numbers_that_share_out_one():
    for _ in range(3):
        for weights in ((1.0, 3.0), (3.0, 1.0)):
            for how in ("relu", "softmax"):
                found = call("add", "float32", *weights, normalize=how)
                assert found.tobytes() == call("add", "float32", *weights, normalize=how, backend="cpu").tobytes()
    assert call("add", "float32", 1.0, 3.0).tobytes() != call("add", "float32", 1.0, 3.0, normalize="relu").tobytes()


@pytest.mark.parametrize("how", ["list", "sources"])
def test_the_sum_is_that_of_the_reference(how):
    """Each time; above, both sides have what the same code made of the weights."""
    expected = call("add", "float32", 0.75, -3, how=how, backend="reference")
    for _ in range(4):
        assert call("add", "float32", 0.75, -3, how=how).tobytes() == expected.tobytes()


def test_weights_that_do_not_come_again_push_nothing_out(monkeypatch):
    monkeypatch.setattr(perform, "KEPT", 8)
    x = np.ones((4, 8), np.float32)
    fo.add([x, x])
    for step in range(30):
        assert (fo.add([x, x], weights=[step, 2.0]) == step + 2.0).all()
        assert len(perform._WEIGHED_ONCE) <= 8
    monkeypatch.setattr(dispatch, "run", None)
    np.testing.assert_array_equal(fo.add([x, x]), 2.0)


def test_vectors_are_read_each_time():
    vector = np.ones(40, np.float32)
    for step in range(3):
        vector[:] = step
        found = call("add", "float32", vector, 2.0)
        assert found.tobytes() == call("add", "float32", np.full(40, step, "f4"), 2.0, backend="cpu").tobytes()
    number = np.ones((), np.float32)  # which changes where it is
    for step in range(3):
        number[...] = step
        assert call("add", "float32", number, 2.0).tobytes() == call("add", "float32", float(step), 2.0).tobytes()


def test_what_is_wrong_is_found_each_time():
    for _ in range(3):
        call("add", "float32", 1, 2)
        with pytest.raises(SpecTypeError):
            call("add", "float32", True, 2)
        with pytest.raises(SpecTypeError):
            call("add", "float32", "1", 2)
        with pytest.raises(OverflowError):
            call("add", "float32", 10**5000, 2)
        with pytest.raises(OverflowError):
            call("add", "float32", 10**5000, 2, how="sources")
        endless: list[Any] = [1]
        endless.append(endless)
        with pytest.raises(SpecError, match="cannot be made an array"):
            fo.add([np.ones(3), np.ones(3)], weights=endless)
        with pytest.raises(SpecError, match="entries"):
            call("add", "float32", 1, 2, 3)
        with pytest.raises(SpecError, match="of its own"):
            call("add", "float32", 1, 2, how="sources", weights=[1, 2])
