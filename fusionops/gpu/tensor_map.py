"""Tensor maps, by which Hopper's kernels copy boxes of a tensor: made by the driver, which CuPy does not ask for."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from fusionops.errors import BackendError

BYTES, ALIGNMENT = 128, 64
# Of the driver's enumerations.
DTYPES = {"float16": 6, "bfloat16": 9}
NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTE_TO_256_BYTES, ZEROS_OUTSIDE = 0, 3, 3, 0


@functools.cache
def _driver() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    longs, ints = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, longs, longs, ints, ints,
                         *[ctypes.c_int] * 4]  # fmt: skip
    return function


@functools.lru_cache(maxsize=1024)
def encode(dtype: str, address: int, extents: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """Of a tensor whose first axis lies without gaps; of the others `steps` are bytes, multiples of 16.

    Boxes arrive in rows of 128 bytes whose pieces of 16 are exchanged, zeros where they reach beyond the tensor.
    """
    rank = len(extents)
    memory = ctypes.create_string_buffer(BYTES + ALIGNMENT)
    start = -ctypes.addressof(memory) % ALIGNMENT
    status = _driver()(
        ctypes.addressof(memory) + start, DTYPES[dtype], rank, address, (ctypes.c_uint64 * rank)(*extents),
        (ctypes.c_uint64 * (rank - 1))(*steps), (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTE_TO_256_BYTES, ZEROS_OUTSIDE,
    )  # fmt: skip
    if status:
        raise BackendError(
            f"cuTensorMapEncodeTiled returned {status} for {dtype} at {address:#x}, extents {extents}, "
            f"steps {steps} B, box {box}"
        )
    return memory.raw[start : start + BYTES]
