"""Calls made again: the bits and errors of a call that is judged, whatever changed in between, in less time."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import timeit
from array import array as array_of_words
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusionops as fo
from fusionops import Source, SpecError, SpecTypeError, dispatch, perform
from fusionops.binding import bind_dense, reaches
from fusionops.cpu.guard import Guards
from fusionops.dispatch import Backend
from fusionops.kernel import Kernel, Replay


@pytest.fixture(autouse=True)
def forget():
    """Each test starts with calls that nobody has made."""
    perform._REPEATED.clear()


def drawn(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def viewed(array: np.ndarray, how: str) -> np.ndarray:
    """The array's values with other strides or at another kind of address."""
    if how == "reversed":
        return np.ascontiguousarray(array[::-1])[::-1]
    if how == "cropped":
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
        wide[..., 1:-2] = array
        return wide[..., 1:-2]
    if how == "misaligned":
        raw = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
        raw[...] = array
        return raw
    return array


def repeats() -> int:
    """How many kinds of calls would be run again without being judged."""
    return sum(kept is not None for guards in perform._REPEATED.values() for _, kept, *_ in guards._state[0])


@st.composite
def calls(draw):
    """An op, and a function that makes arguments of the same shapes and options from a generator."""
    op = draw(st.sampled_from(["add", "concat", "add_conv", "concat_conv", "add_dense", "concat_dense"]))
    count, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 40]))
    dtype = draw(st.sampled_from(["float32", "float64", "float16"]))
    views = draw(st.lists(st.sampled_from(["plain", "plain", "reversed", "cropped", "misaligned"]), min_size=count,
                          max_size=count))  # fmt: skip
    lead = (2, 6, 5) if op.endswith("conv") or draw(st.booleans()) else (7,)
    K, taps = draw(st.sampled_from([1, 8, 33])), draw(st.sampled_from([1, 3]))
    biased, added, kept, into, activation = (draw(st.booleans()) for _ in range(5))
    weighed = draw(st.sampled_from([None, None, list, tuple])) if op.startswith("add") else None
    merged = channels if op.startswith("add") else count * channels
    up = op.endswith("conv") and draw(st.booleans())

    def make(rng: np.random.Generator) -> tuple[list[Any], dict[str, Any]]:
        sources: list[Any] = [viewed(drawn(rng, *lead, channels, dtype=dtype), how) for how in views]
        options: dict[str, Any] = {}
        if weighed is not None:
            options["weights"] = weighed(rng.choice(np.array([None, 2, -0.5], object), count))
        shape = (*lead, channels if op == "add" else merged)
        if up and count > 1:
            sources[0] = Source(drawn(rng, 2, 3, 5, channels, dtype=dtype), upsample=2)
            sources[1:] = [drawn(rng, 2, 6, 10, channels, dtype=dtype) for _ in sources[1:]]
            shape = (2, 6, 10, merged)
        if op in ("add", "concat"):
            return [sources], options | ({"activation": "relu"} if op == "add" and activation else {})
        shape = (*shape[:-1], K)
        filters = drawn(rng, *((merged, K) if op.endswith("dense") else (taps, taps, merged, K)), dtype=dtype)
        options["activation"] = ("leaky_relu", 0.2) if activation else None
        if op.endswith("conv"):
            options["padding"] = "same" if activation else ((taps // 2, taps // 2), (taps // 2, taps // 2))
        if added:
            options["residual"] = drawn(rng, *shape, dtype=dtype)
        if into:
            options["out"] = np.empty(shape, dtype)
        return [sources, fo.prepack(filters) if kept else filters, *[drawn(rng, K, dtype=dtype)] * biased], options

    return op, make


@settings(max_examples=150, deadline=None)
@given(calls(), st.integers(0, 2**32 - 1))
def test_a_call_made_again_has_the_bits_of_one_that_is_judged(call, seed):
    op, make = call
    rng = np.random.default_rng(seed)
    for _ in range(3):
        arguments, options = make(rng)
        found = getattr(fo, op)(*arguments, **options).copy()
        options.pop("out", None)
        np.testing.assert_array_equal(found, getattr(fo, op)(*arguments, **options, backend="cpu"))


def outcome(op: str, arguments: list[Any], options: dict[str, Any]) -> Any:
    """The result, or the type of the error."""
    try:
        return getattr(fo, op)(*arguments, **options).copy()
    except ValueError as error:  # SpecError is one
        return type(error)
    except TypeError as error:
        return type(error)


@st.composite
def alike(draw):
    """A call from few shapes and many roles, such that two often have the same arrays in other places."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    op = draw(st.sampled_from(["add", "add", "concat", "add_dense", "concat_dense", "add_conv", "concat_conv"]))
    flat = op.endswith("dense") and draw(st.booleans())

    def array() -> np.ndarray:
        return drawn(rng, *((4,) if flat else (1, 4, 4, 4) if draw(st.booleans()) else (1, 8, 8, 4)))

    def source() -> Any:
        up = draw(st.sampled_from([None, None, None, 1, 2, (2, 2), True]))
        return array() if up is None else Source(array(), upsample=up)

    sources = [source() for _ in range(draw(st.integers(1, 3)))]
    options: dict[str, Any] = {}
    arguments: list[Any] = [sources]
    if "_" in op:
        channels = 4 if op.startswith("add") else 4 * len(sources)
        filters = drawn(rng, *((channels, 4) if op.endswith("dense") else (1, 1, channels, 4)))
        arguments.append(fo.prepack(filters) if draw(st.booleans()) else filters)
        for name in ("bias", "residual"):
            if draw(st.booleans()):
                options[name] = drawn(rng, 4) if flat or draw(st.booleans()) else array()
        options["activation"] = draw(st.sampled_from([None, "relu", ("leaky_relu", 0.5), ("leaky_relu", 2)]))
    if op.startswith("add") and draw(st.booleans()):
        options["weights"] = tuple(draw(st.sampled_from([None, 0.5, 2, 3.0])) for _ in sources)
        options["normalize"] = draw(st.sampled_from([None, "relu"]))
    if draw(st.booleans()):
        options["out"] = draw(st.sampled_from([array(), *(s for s in sources if isinstance(s, np.ndarray))]))
    return op, arguments, options


@settings(max_examples=20, deadline=None)
@given(st.lists(alike(), min_size=20, max_size=40))
def test_calls_that_look_alike_are_told_apart(made):
    for op, arguments, options in made * 2:
        before = [np.copy(s.array if isinstance(s, Source) else s) for s in arguments[0]]
        found = outcome(op, arguments, options)
        for source, values in zip(arguments[0], before, strict=True):  # out may have been one of them
            (source.array if isinstance(source, Source) else source)[...] = values
        expected = outcome(op, arguments, options | {"backend": "cpu"})
        for source, values in zip(arguments[0], before, strict=True):
            (source.array if isinstance(source, Source) else source)[...] = values
        if isinstance(expected, type):
            assert found is expected
        else:
            assert not isinstance(found, type), (op, arguments, options)
            np.testing.assert_array_equal(found, expected)


def test_a_first_call_with_copies_leaves_the_next_free():
    x, matrix = np.ones((8, 8), np.float32), np.eye(8, dtype=np.float32)
    fo.add_dense([x, x], matrix, out=x)
    assert repeats() == 0
    fo.add_dense([x.copy(), x.copy()], matrix, out=x)
    assert repeats() == 1


@pytest.mark.parametrize("op", ["add", "concat", "add_conv", "concat_conv", "add_dense", "concat_dense"])
def test_plain_calls_of_every_op_are_made_again_without_being_judged(op, monkeypatch):
    rng = np.random.default_rng(0)
    x = drawn(rng, 1, 4, 4, 8) if op.endswith("conv") else drawn(rng, 4, 8)
    channels = 8 if op.startswith("add") else 16
    filters = [drawn(rng, channels, 8)] if op.endswith("dense") else [drawn(rng, 3, 3, channels, 8)]
    arguments = [[x, x], *(filters if "_" in op else [])]
    first = getattr(fo, op)(*arguments)
    assert repeats() == 1
    monkeypatch.setattr(dispatch, "run", None)  # which a judged call goes through
    np.testing.assert_array_equal(getattr(fo, op)(*arguments), first)


def test_out_that_overlaps_an_input_is_noticed_each_time():
    rng = np.random.default_rng(0)
    matrix = drawn(rng, 16, 16)
    for shift in (0, 1, 16, 100):
        memory = drawn(rng, 20 * 16 + 100)
        x, out = memory[:320].reshape(20, 16), memory[shift : shift + 320].reshape(20, 16)
        expected = fo.add_dense([x.copy(), x.copy()], matrix)
        fo.add_dense([x.copy(), x.copy()], matrix, out=np.empty_like(expected))  # of the same key, and apart
        assert repeats() == 2
        assert fo.add_dense([x, x], matrix, out=out) is out
        np.testing.assert_array_equal(out, expected)
        expected = x + x
        fo.add([x.copy(), x.copy()], out=np.empty_like(expected))
        fo.add([x, x], out=out)
        np.testing.assert_array_equal(out, expected)
        perform._REPEATED.clear()


def test_an_add_in_place_is_made_again_in_place(monkeypatch):
    x, y = np.ones((4, 64), np.float32), np.ones((4, 64), np.float32)
    fo.add([x, y], out=x)
    monkeypatch.setattr(dispatch, "run", None)
    assert fo.add([x, y], out=x) is x
    np.testing.assert_array_equal(x, 3.0)


def test_what_is_wrong_is_found_each_time():
    x, filters = np.ones((1, 6, 6, 4), np.float32), np.ones((1, 1, 4, 4), np.float32)
    out = np.empty((1, 6, 6, 4), np.float32)
    fo.add_conv([x, x], filters, stride=1, strict=True, out=out)
    assert repeats() == 1
    with pytest.raises(SpecTypeError):
        fo.add_conv([x, x], filters, stride=True, strict=True, out=out)  # True == 1
    with pytest.raises(SpecTypeError):
        fo.add_conv([x, x], filters, stride=1, strict=1, out=out)
    with pytest.raises(SpecTypeError):
        fo.add_conv([x, x], filters, stride=1.0, strict=True, out=out)
    fo.add_conv([x, x], filters, stride=(1, 1), strict=True, out=out)
    with pytest.raises(SpecTypeError):
        fo.add_conv([x, x], filters, stride=(1, True), strict=True, out=out)
    out.flags.writeable = False
    with pytest.raises(SpecError, match="read-only"):
        fo.add_conv([x, x], filters, stride=1, strict=True, out=out)
    with pytest.raises(SpecTypeError):
        fo.add_conv([x, np.ma.masked_array(x)], filters, stride=1, strict=True)


def test_arrays_that_begin_between_elements_are_copied_each_time():
    rng = np.random.default_rng(0)
    x = drawn(rng, 8, 16)
    expected = fo.add([x, x])
    odd = viewed(x, "misaligned")
    assert not odd.flags.aligned
    np.testing.assert_array_equal(fo.add([odd, odd]), expected)


def test_prepacked_filters_are_told_apart_by_what_a_call_depends_on_not_by_what_they_hold():
    rng = np.random.default_rng(0)
    x = drawn(rng, 1, 8, 8, 16)
    for _ in range(3):
        filters = drawn(rng, 3, 3, 16, 16)
        kept = fo.prepack(filters)
        np.testing.assert_array_equal(fo.add_conv([x, x], kept), fo.add_conv([x, x], filters))
    with pytest.raises(SpecError, match="prepacked for layout"):
        fo.add_conv([x, x], fo.prepack(filters, layout="NCHW"))
    assert repeats() == 2  # with filters, and with those that are kept packed


def test_calls_of_too_many_kinds_are_forgotten(monkeypatch):
    monkeypatch.setattr(perform, "KEPT", 4)
    for extent in range(1, 12):
        fo.add([np.ones(extent), np.ones(extent)])
        assert 1 <= repeats() <= 4


def test_calls_of_one_kind_and_too_many_looks_are_forgotten(monkeypatch):
    monkeypatch.setattr(perform, "KEPT_OF_A_KEY", 4)
    for extent in range(1, 12):
        fo.concat([np.ones((2, 1)), np.ones((2, extent))])
        assert len(perform._REPEATED) == 1
        assert 1 <= repeats() <= 4


def unpickled(array: np.ndarray) -> np.ndarray:
    return pickle.loads(pickle.dumps(array))


def test_unpickled_arrays_are_those_of_a_call_made_before():
    """They have equal dtypes that are other objects."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert unpickled(x).dtype is not x.dtype
    for _ in range(5):
        np.testing.assert_array_equal(fo.add([unpickled(x), x]), 2 * x)
        assert repeats() == 1


def test_dtypes_that_numpy_has_no_one_object_of_are_judged_each_time():
    x = np.arange(12, dtype=">f4").reshape(3, 4)
    for _ in range(3):
        np.testing.assert_array_equal(fo.add([x, x]), x + x)
    assert not perform._REPEATED


def test_guards_work_here():
    assert dispatch.backend("cpu", 0).guards is Guards, "arrays do not look as `address` says: every call is judged"


def test_calls_are_judged_where_nobody_knows_what_arrays_look_like(monkeypatch):
    blind = dataclasses.replace(dispatch.backend("cpu", 0), guards=None)
    monkeypatch.setattr(dispatch, "backend", lambda name, number: blind)
    x = np.ones((4, 8), np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(fo.add([x, x]), 2 * x)
    assert not perform._REPEATED


def test_threads_that_remember_calls_at_the_same_time_get_their_own_results(monkeypatch):
    """More calls of one key and more keys than are kept, each several times, such that adding and finding meet."""
    monkeypatch.setattr(perform, "KEPT", 8)
    monkeypatch.setattr(perform, "KEPT_OF_A_KEY", 8)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for extent in rng.integers(1, 12, 300):
            x, y, z = drawn(rng, extent, 3), drawn(rng, extent, 3), drawn(rng, 2, extent)
            np.testing.assert_array_equal(fo.add([x, y]), x + y)
            np.testing.assert_array_equal(fo.concat([z[:, :1], z]), np.concatenate([z[:, :1], z], -1))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert repeats() >= 1


@pytest.mark.parametrize("op", ["add", "add_dense"])
def test_out_that_overlaps_a_reversed_input_is_noticed_each_time(op):
    rng = np.random.default_rng(0)
    rest = [] if op == "add" else [drawn(rng, 4, 4)]
    call = getattr(fo, op)
    for turned in ((1, -1), (-1, 1), (-1, -1)):
        for shift in range(-9, 10, 3):
            memory = drawn(rng, 40, 4)
            x = memory[10:18][:: turned[0]]
            out = memory[10 + shift : 18 + shift][:: turned[1]]
            expected = call([x.copy(), x.copy()], *rest)
            apart = np.zeros((40, 4), np.float32)
            call([apart[:8][:: turned[0]]] * 2, *rest, out=apart[20:28][:: turned[1]])
            call([x, x], *rest, out=out)
            np.testing.assert_array_equal(out, expected)
    assert repeats() == 4  # and the one without out


def test_an_array_without_elements_overlaps_nothing():
    empty = np.zeros((0, 4))
    for _ in range(2):
        assert fo.add([empty, empty], out=empty) is empty
    memory = np.zeros((10, 4), np.float32)
    call = bind_dense("add_dense", [memory[3:3]], np.eye(4, dtype=np.float32), out=memory[3:3])
    inputs = [memory[3:3], call.operands.filters]
    known = reaches(call, call.target, inputs)
    assert known is not None
    assert [(reach.low, reach.high) for reach in (known.inputs[0], known.out)] == [(0, 0), (0, 0)]


# The price of a call

# What the project grants a call on tiny arrays over its kernel, where the call is judged, and where it was made before.
JUDGED_S, REPEATED_S = 10e-6, 4.5e-6
# The budgets are for a machine that sums range(1000) in this time; a virtual one may run at half its speed for minutes.
# Measured with the two in turn: 0.56 and 0.22 of the sum.
YARDSTICK_S = 15e-6


@pytest.mark.parametrize(("options", "budget"), [({"backend": "cpu"}, JUDGED_S), ({}, REPEATED_S)])
def test_small_call_stays_within_its_budget(monkeypatch, options, budget):
    def full(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    x, y, matrix, bias, out = full(1, 32), full(1, 32), full(64, 64), full(64), full(1, 64)
    spec = bind_dense("concat_dense", [x, y], matrix, bias, activation="relu").judgement.spec
    _, config = dispatch.choose(spec, "cpu", 0)
    again = Replay(array_of_words("q", bytes(8 * 100)), (0, 1, 2, 3, 4), lambda block, filters: None)
    nothing = Kernel("cpu.nothing", lambda spec: (), lambda spec, device: config, lambda *args: None,
                     replay=lambda *args: again)  # fmt: skip
    idle = Backend("cpu", (nothing,), None, (), lambda: 1, guards=Guards)
    monkeypatch.setattr(dispatch, "backend", lambda name, number: idle)
    dispatch.choose.cache_clear()
    call = timeit.Timer(lambda: fo.concat_dense([x, y], matrix, bias, activation="relu", out=out, **options))
    yardstick = timeit.Timer("sum(range(1000))")
    times, sums = [], []

    def is_within() -> bool:
        return min(times) <= budget * max(1.0, min(sums) / YARDSTICK_S)

    try:  # in turn, so that the shortest of both are of one phase of the machine; longer where that one is busy
        while len(times) < 300 or (len(times) < 6000 and not is_within()):
            times.append(call.timeit(50) / 50)
            sums.append(yardstick.timeit(20) / 20)
    finally:
        dispatch.choose.cache_clear()
    assert repeats() == (not options)
    assert is_within()  # the shortest of many: a busy machine only adds to them
