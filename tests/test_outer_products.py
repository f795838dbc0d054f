"""Sums of outer products: both ways to compute them, whichever one this processor takes."""

import ctypes

import numpy as np
import pytest

from fusionops.cpu import jit, outer_products
from fusionops.cpu.simd import words

GUARD = 64  # elements around the sums


def _in_tiles(params):
    p = words(params)
    outer_products._add_in_tiles(32, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9])


def _in_vectors(params):
    p = words(params)
    outer_products._add_in_vectors(32, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9])


WAYS = [_in_vectors, *([_in_tiles] if outer_products.IN_TILES else [])]


def address(array):
    return array.__array_interface__["data"][0]


@pytest.fixture(scope="module")
def add():
    """Adds A·B to sums, each way in turn; returns what the ways made of them."""
    kinds = ctypes.CFUNCTYPE(None, ctypes.c_int64)
    entries = [kinds(jit.task(way)) for way in WAYS]

    def run(a, b, sums, line):
        rows, channels = a.shape
        results = []
        for entry in entries:
            result = sums.copy()
            params = np.array(
                [rows, channels, address(a), a.strides[0], address(b), b.strides[0], 0, b.shape[1],
                 address(result) + 4 * GUARD, 4 * line], np.int64
            )  # fmt: skip
            entry(address(params))
            results.append(result)
        return results

    return run


def aligned(elements, offset):
    """Float32 that begin `offset` elements after a cache line."""
    array = np.full(elements + 32, np.nan, np.float32)
    start = (-address(array) % 64) // 4 + offset
    return array[start : start + elements]


@pytest.mark.parametrize("count", [1, 11, 16, 17, 100, 255, 272])
@pytest.mark.parametrize("offset", [0, 4, 15])
@pytest.mark.parametrize("gap", [0, 16, 23])
def test_every_number_of_rows(add, count, offset, gap):
    """Beside B and the sums nothing is read that counts, and nothing is written."""
    rng = np.random.default_rng(count)
    pitch = -(-count // 16) * 16 + gap
    for rows in range(1, outer_products.MOST_PIXELS + 1, 1 if count == 100 else 5):
        channels = int(rng.integers(1, outer_products.CHANNELS + 1))
        a = rng.standard_normal((rows, channels + 3)).astype(np.float32)[:, :channels]
        memory = aligned(channels * pitch, offset)
        b = memory.reshape(channels, pitch)[:, :count]
        b[:] = rng.standard_normal((channels, count))
        line = -(-count // 16) * 16
        sums = np.full(rows * line + 2 * GUARD, 7, np.float32)
        inside = sums[GUARD:-GUARD].reshape(rows, line)[:, :count]
        inside[:] = rng.standard_normal((rows, count))
        expected = inside.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
        scale = np.abs(inside) + np.abs(a).astype(np.float64) @ np.abs(b)
        results = add(a, b, sums, line)
        for result in results:
            found = result[GUARD:-GUARD].reshape(rows, line)[:, :count]
            assert (np.abs(found - expected) <= (channels + 1) * 2.0**-24 * scale).all()
            np.testing.assert_array_equal(found, results[0][GUARD:-GUARD].reshape(rows, line)[:, :count])
            assert (np.concatenate([result[:GUARD], result[-GUARD:]]) == 7).all()
