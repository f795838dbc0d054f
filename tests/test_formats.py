"""Conversions between what is stored and what is computed, against NumPy's and ml_dtypes' own; with and without the
processor's instructions for float16."""

from __future__ import annotations

import ctypes
import dataclasses

import ml_dtypes
import numba
import numpy as np
import pytest
from numba import types

from fusionops.cpu import formats
from fusionops.cpu.formats import BF16, F16, load_element, store_rows
from fusionops.cpu.simd import elements
from fusionops.cpu.target import target

DTYPES = {F16: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture(params=[(F16, True), (F16, False), (BF16, True)], ids=["f16", "f16_by_arithmetic", "bf16"])
def stored(request, monkeypatch):
    kind, in_hardware = request.param
    if not in_hardware:
        monkeypatch.setattr(formats, "target", lambda: dataclasses.replace(target(), converts_half=False))
    return kind


def compiled(function):
    """Compiled anew each time: a cache would not notice what the fixture has changed."""
    made = numba.cfunc(types.void(types.int64, types.int64, types.int64), cache=False)(function)
    return made, ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(made.address)


def assert_same_numbers(actual, expected):
    nans = expected != expected
    assert ((actual != actual) == nans).all()
    bits = f"u{expected.itemsize}"
    assert (actual.view(bits)[~nans] == expected.view(bits)[~nans]).all()


def test_every_number_is_widened(stored):
    def widen(to, source, count):
        d = elements(32, to)
        for i in range(count):
            d[i] = load_element(stored, source, i)

    x = np.arange(2**16, dtype=np.uint16).view(DTYPES[stored])
    y = np.full(x.shape, -1, np.float32)
    _keep, call = compiled(widen)
    call(y.ctypes.data, x.ctypes.data, x.size)
    with np.errstate(invalid="ignore"):  # a signalling NaN is among them
        assert_same_numbers(y, x.astype(np.float32))


def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(stored):
    def narrow(to, source, count):
        store_rows(32, stored, to, 0, source, 0, 1, count)

    rng = np.random.default_rng(0)
    dtype = DTYPES[stored]
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    largest = np.float32([65504, 65519.996, 65520, 65536, 3.4e38, 3.3961775e38, np.inf, np.nan, 1e-45, 2.0**-25])
    anything = rng.integers(0, 2**32, 2**18, np.uint32).view(np.float32)
    x = np.concatenate([every, ties, *beside, largest, -largest, anything])
    y = np.zeros(x.shape, dtype)
    _keep, call = compiled(narrow)
    call(y.ctypes.data, x.ctypes.data, x.size)
    with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN is among them
        assert_same_numbers(y, x.astype(dtype))
