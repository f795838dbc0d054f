"""Filters that fill half of their last vector at most: only that half is multiplied, and no bit changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import fusionops as fo
from fusionops import dispatch, perform
from fusionops.cpu import device, direct, gemm, tiling
from fusionops.cpu.simd import VECTOR_BYTES
from fusionops.device import AVX2_LAPTOP, AVX512_SERVER
from fusionops.problems import conv
from fusionops.spec import Merge

FILTERS = (7, 8, 9, 17, 23, 24, 25, 36, 40)


@pytest.fixture
def without_halves(monkeypatch):
    """Runs a call with whole vectors of filters."""

    def run(call: Callable[[], np.ndarray]) -> np.ndarray:
        with monkeypatch.context() as patch:
            for module in (tiling, gemm):
                patch.setattr(module, "ends_in_half", lambda *facts: False)
            patch.setattr(perform, "_REPEATED", {})
            dispatch.choose.cache_clear()
            result = call()
        dispatch.choose.cache_clear()
        return result

    return run


@pytest.mark.parametrize("taps", [1, 3])
def test_halves_are_planned_where_registers_hold_them(taps):
    plan = (gemm if taps == 1 else direct).plan
    problems = {K: conv("", Merge.ADD, (32,), K, taps, taps, H=40, W=40).spec for K in FILTERS}

    def halves(dtype: str) -> list[int]:
        return [K for K, spec in problems.items() if plan(replace(spec, dtype=dtype), AVX2_LAPTOP).half]

    assert halves("float32") == [7, 8, 17, 23, 24, 36, 40]
    assert halves("float64") == [9, 17, 25, 36]
    assert not any(plan(spec, AVX512_SERVER).half for spec in problems.values())
    assert plan(problems[24], device()).half == (device().vector_bytes < VECTOR_BYTES)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    ("taps", "stride", "channels", "side"),
    [(1, 1, 24, 13), (1, 1, 2100, 6), (3, 2, 20, 11), (3, 1, 9, 2), (5, 3, 700, 7)],
)
def test_halves_change_no_bit(without_halves, filters, activation, taps, stride, channels, side):
    """Chunks of channels, few pixels, packed filters, channels apart; results that leave registers and that do not."""
    rng = np.random.default_rng(filters)
    x = [rng.standard_normal((2, side, side, channels), np.float32) for _ in range(2)]
    w = rng.standard_normal((taps, taps, channels, filters), np.float32)
    options = {"stride": stride, "padding": "same", "strict": True}
    residual = fo.add_conv(x, w, **options)
    options |= {"activation": activation, "bias": rng.standard_normal(filters, np.float32)}

    def run() -> np.ndarray:
        return fo.add_conv(x, w, residual=residual, **options)

    whole = without_halves(run)
    np.testing.assert_array_equal(run(), whole)
    np.testing.assert_array_equal(fo.add_conv(x, fo.prepack(w), residual=residual, **options), whole)
    *turned, rest = (np.ascontiguousarray(a.transpose(0, 3, 1, 2)) for a in (*x, residual))
    w = w.transpose(3, 2, 0, 1)
    apart = fo.add_conv(turned, w, residual=rest, layout="NCHW", **options)
    np.testing.assert_array_equal(apart.transpose(0, 2, 3, 1), whole)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("filters", [4, 7, 8, 12, 20, 24])
def test_halves_of_other_dtypes(without_halves, dtype, filters):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 9, 11, 30)).astype(dtype)
    for taps in (1, 3):
        w = rng.standard_normal((taps, taps, 60, filters)).astype(dtype)

        def run(w: np.ndarray = w) -> np.ndarray:
            return fo.concat_conv([x, x], w, padding="same", strict=True, activation="relu")

        np.testing.assert_array_equal(run(), without_halves(run))


@pytest.mark.parametrize("rows", [25, 64, 200])
@pytest.mark.parametrize("units", [8, 24, 40])
def test_halves_of_dense_layers(without_halves, rows, units):
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, 70), np.float32), rng.standard_normal((140, 48), np.float32)
    for matrix in (np.ascontiguousarray(w[:, :units]), w[:, :units]):

        def run(matrix: np.ndarray = matrix) -> np.ndarray:
            return fo.concat_dense([x, x], matrix)

        np.testing.assert_array_equal(run(), without_halves(run))
