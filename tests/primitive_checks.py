"""What every primitive of the CUDA backend must do, against NumPy: wherever the kernels of primitives.cu are run.

Tests run them on the host, `benchmarks/gpu_check.py` on a GPU; PTX and its stand-ins answer to the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # bfloat16 for NumPy
import numpy as np

from fusionops.gpu import module

SOURCE, HOPPER_SOURCE = (Path(__file__).parent / name for name in ("primitives.cu", "primitives_sm90.cu"))
FORMATS = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
NAMES = (
    "rounded_arithmetic",
    "rounded_to_tf32",
    "tf32_product",
    *(f"{kernel}<{kind}>" for kernel in ("widened", "narrowed", "pairs", "tile_product") for kind in FORMATS),
)
THREADS = 256

HOPPER_FILTERS = (64, 128, 256)
HOPPER_NAMES = (
    *(f"box_product<{kind}, {filters}>" for kind in FORMATS for filters in HOPPER_FILTERS),
    *(f"stored_product<{kind}>" for kind in FORMATS),
)


@dataclass(frozen=True)
class Boxes:
    """Stands for an argument: the tensor map of an array; `shape` of the boxes, the array's last axis first."""

    array: np.ndarray[Any, Any]
    shape: tuple[int, ...]

    def tensor_map(self, runtime: module.Runtime, address: int) -> np.ndarray[Any, Any]:
        extents, steps = self.array.shape[::-1], self.array.strides[-2::-1]
        map_ = runtime.tensor_map(self.array.dtype.name, address, extents, steps, self.shape)
        return np.frombuffer(map_, np.dtype(f"V{len(map_)}"))


# launch(name, blocks, threads, arrays, shared bytes): runs a kernel on the arrays, which it may write.
Launch = Callable[[str, int, int, tuple[Any, ...], int], None]


def source(of: Path = SOURCE) -> str:
    """The kernels with the backend's headers in place."""
    header = "common.cuh" if of == SOURCE else "primitives_sm90.cuh"
    first, *rest = of.read_text(encoding="utf-8").split(f'#include "{header}"')
    return first + module.read_source(header) + "".join(rest)


def check_all(launch: Launch) -> None:
    """Raises AssertionError at the first primitive that differs."""
    check_rounded_arithmetic(launch)
    check_tf32(launch)
    for kind in FORMATS:
        check_conversions(launch, kind)
        check_pairs(launch, kind)
        check_tile_product(launch, kind)


def check_rounded_arithmetic(launch: Launch) -> None:
    """One rounding each, subnormal numbers kept."""
    rng = np.random.default_rng(0)
    size = 64 * THREADS
    a, b = ((rng.standard_normal(size) * 2.0 ** rng.integers(-149, 60, size)).astype(np.float32) for _ in range(2))
    a[:THREADS] = rng.integers(0, 1 << 12, THREADS).astype(np.uint32).view(np.float32)  # subnormal
    b[: THREADS // 2] = rng.integers(0, 1 << 12, THREADS // 2).astype(np.uint32).view(np.float32)
    a[-THREADS:-1], b[-THREADS:] = -a[: THREADS - 1], 0.0
    a[-1] = np.nan
    sums, products, both = (np.full(size, np.nan, np.float32) for _ in range(3))
    less = np.zeros(size, np.uint8)
    launch("rounded_arithmetic", size // THREADS, THREADS, (a, b, sums, products, both, less), 0)
    np.testing.assert_array_equal(less, a < b)
    with np.errstate(all="ignore"):
        _same(sums, a + b)
        _same(products, a * b)
    # The product of two float32 is exact in float64, so the sum there rounds once, and again to float32: within one
    # unit, and never further than that.
    exact = a.astype(np.float64) * b + a
    is_number = ~np.isnan(a)
    both, exact = both[is_number], exact[is_number]
    assert (np.abs(both - exact) <= np.maximum(np.spacing(np.abs(exact.astype(np.float32))), 2.0**-149)).all()


def check_conversions(launch: Launch, kind: str) -> None:
    """Every 16-bit number to float32 and back; rounding to nearest even between neighbours, at ties and beyond them."""
    dtype = FORMATS[kind]
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = np.zeros(every.size, np.float32)
    launch(f"widened<{kind}>", every.size // THREADS, THREADS, (every, wide), 0)
    _same(wide, every.astype(np.float32))
    finite = np.sort(every[np.isfinite(every.astype(np.float32))].astype(np.float32))
    between = np.nextafter(finite[:-1] / 2 + finite[1:] / 2, np.float32(np.inf))
    rng = np.random.default_rng(1)
    numbers = np.concatenate([
        finite, finite[:-1] / 2 + finite[1:] / 2, between, [np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-40],
        rng.standard_normal(5 * THREADS) * 10.0 ** rng.uniform(-40, 38, 5 * THREADS),
    ]).astype(np.float32)  # fmt: skip
    numbers = np.resize(numbers, -(-numbers.size // THREADS) * THREADS)
    narrow = np.zeros(numbers.size, dtype)
    launch(f"narrowed<{kind}>", numbers.size // THREADS, THREADS, (numbers, narrow), 0)
    with np.errstate(all="ignore"):
        _same(narrow.astype(np.float32), numbers.astype(dtype).astype(np.float32))


def check_pairs(launch: Launch, kind: str) -> None:
    dtype = FORMATS[kind]
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 1 << 16, 256 * THREADS, np.uint16).view(dtype) for _ in range(2))
    sums, products = np.zeros_like(a), np.zeros_like(a)
    launch(
        f"pairs<{kind}>", a.size // 2 // THREADS, THREADS, tuple(x.view(np.uint32) for x in (a, b, sums, products)), 0
    )
    with np.errstate(all="ignore"):
        for found, expected in ((sums, a + b), (products, a * b)):
            _same(found.astype(np.float32), expected.astype(np.float32))


def check_tile_product(launch: Launch, kind: str) -> None:
    """Integers: exact in any order of the sum. Each position has products of its own, so that none can be exchanged."""
    dtype = FORMATS[kind]
    rng = np.random.default_rng(3)
    a, b, c = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8)), rng.integers(-99, 99, (16, 8))
    sums = c.astype(np.float32)
    launch(f"tile_product<{kind}>", 1, 32, (a.astype(dtype), b.astype(dtype), sums), 2 * 16 * 16 * 2)
    np.testing.assert_array_equal(sums, a @ b + c)


def check_tf32(launch: Launch) -> None:
    """13 bits dropped, ties away from 0; and a product of factors that need no rounding, exact in any order."""
    rng = np.random.default_rng(4)
    x = (rng.standard_normal(64 * THREADS) * 2.0 ** rng.integers(-120, 120, 64 * THREADS)).astype(np.float32)
    x[:THREADS].view(np.uint32)[:] = x[:THREADS].view(np.uint32) & ~np.uint32(0x1FFF) | np.uint32(0x1000)  # ties
    x[THREADS : THREADS + 4] = np.inf, -np.inf, 0.0, -0.0
    rounded = np.zeros(x.size, np.uint32)
    launch("rounded_to_tf32", x.size // THREADS, THREADS, (x, rounded), 0)
    scale = np.exp2(np.floor(np.log2(np.abs(x, where=np.isfinite(x) & (x != 0), out=np.ones_like(x)))) - 10)
    expected = np.where(
        np.isfinite(x), np.sign(x) * np.floor(np.abs(x, dtype=np.float64) / scale + 0.5) * scale, x
    ).astype(np.float32)
    np.testing.assert_array_equal(rounded.view(np.float32), expected)
    a, b, c = rng.integers(-999, 1000, (16, 8)), rng.integers(-999, 1000, (8, 8)), rng.integers(-99, 99, (16, 8))
    sums = c.astype(np.float32)
    launch("tf32_product", 1, 32, (a.astype(np.float32), b.astype(np.float32), sums), 16 * 8 * 4)
    np.testing.assert_array_equal(sums, a @ b + c)


def check_hopper(launch: Launch) -> None:
    for kind in FORMATS:
        check_stored_product(launch, kind)
        for filters in HOPPER_FILTERS:
            check_box_product(launch, kind, filters)


def check_stored_product(launch: Launch, kind: str) -> None:
    rng = np.random.default_rng(5)
    a, sums = rng.integers(-8, 9, (64, 64)), np.full((64, 64), np.nan, np.float32)
    launch(f"stored_product<{kind}>", 1, 128, (a.astype(FORMATS[kind]), sums), 64 * 64 * 2)
    np.testing.assert_array_equal(sums, a @ a.T)


def check_box_product(launch: Launch, kind: str, filters: int) -> None:
    """Boxes that reach over every edge of their tensors, where they must be 0."""
    rng = np.random.default_rng(6)
    c, k = 24, 5
    x, w = rng.integers(-8, 9, (2, 5, 2, 72)), rng.integers(-8, 9, (3, 40, 72))
    sums = np.full((64, filters), np.nan, np.float32)
    arrays = Boxes(x.astype(FORMATS[kind]), (64, 4, 8, 2)), Boxes(w.astype(FORMATS[kind]), (64, filters, 1))
    shared_bytes = (64 + filters) * 64 * 2 + 8
    launch(f"box_product<{kind}, {filters}>", 1, 128, (*arrays, sums, np.int32(c), np.int32(k)), shared_bytes)
    a, b = np.zeros((2, 8, 4, 64), int), np.zeros((filters, 64), int)
    a[:, 1:6, 1:3, : 72 - c] = x[:, :, :, c:]
    b[: 40 - k, : 72 - c] = w[1, k:, c:]
    np.testing.assert_array_equal(sums, a.reshape(64, 64) @ b.T)


def _same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Equal bits, but that any NaN equals any other."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    unequal = (found.view(np.uint32) != expected.view(np.uint32)) & ~nan
    assert not unequal.any(), (
        f"{np.count_nonzero(unequal)} differ, the first {found[unequal][0]} for {expected[unequal][0]}"
    )
