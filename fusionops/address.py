"""Where NumPy and CPython keep what an array says of itself, read faster than they tell.

Words of 8 bytes from the address of an object (its `id`) on, as the C APIs of both have them, which do not change: of
an ndarray the data pointer, extents, strides, dtype and flags, of a list its items. Verified on live objects at import.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

# This process's memory as machine words, which Python may index: 0.2 µs a read, where `array.ctypes.data` takes 1.8 and
# a small call needs five addresses.
_WORD = ctypes.sizeof(ctypes.c_size_t)
_MEMORY = (ctypes.c_size_t * (2**62 // _WORD)).from_address(0)

_HEADER = object.__basicsize__ // _WORD
LIST_LENGTH, LIST_ITEMS = _HEADER, _HEADER + 1  # the latter is where the addresses of its items are
DATA, NDIM, EXTENTS, STRIDES, DTYPE, FLAGS = (_HEADER + k for k in (0, 1, 2, 3, 5, 6))  # of an ndarray
LOW_HALF = 0xFFFFFFFF  # of a word: NDIM and FLAGS are C ints
WRITEABLE = 0x0400  # in FLAGS


def _read(word: int, count: int) -> list[int]:
    return [ctypes.c_ssize_t(_MEMORY[word + k]).value for k in range(count)]


def _headers_are_known() -> bool:
    if _WORD != 8:
        return False
    frozen = np.empty((4, 3), np.float64)[::-2]
    frozen.flags.writeable = False
    probes: list[np.ndarray[Any, Any]] = [
        np.empty(3),
        np.empty((2, 5), np.float32)[1:, ::2],
        frozen,
        np.zeros((), np.int8),
    ]
    here = id(probes) // _WORD
    if _MEMORY[here + LIST_LENGTH] != len(probes):
        return False
    items = _MEMORY[here + LIST_ITEMS] // _WORD
    for i, probe in enumerate(probes):
        here = id(probe) // _WORD
        ndim, flags = (_MEMORY[here + word] & LOW_HALF for word in (NDIM, FLAGS))
        # In this order: an address is followed only after what is nearer was found where it belongs.
        if not (
            _MEMORY[here + DATA] == probe.ctypes.data
            and ndim == probe.ndim
            and bool(flags & WRITEABLE) == probe.flags.writeable
            and _MEMORY[here + DTYPE] == id(probe.dtype)
            and _read(_MEMORY[here + EXTENTS] // _WORD, ndim) == [*probe.shape]
            and _read(_MEMORY[here + STRIDES] // _WORD, ndim) == [*probe.strides]
            and _MEMORY[items + i] == id(probe)
        ):
            return False
    return True


# Whether objects look as this module says; where they do not, slower public attributes are used.
HEADERS_ARE_KNOWN = _headers_are_known()


def address(array: np.ndarray[Any, Any]) -> int:
    """The address of the first element."""
    return _MEMORY[id(array) // _WORD + DATA] if HEADERS_ARE_KNOWN else int(array.ctypes.data)
