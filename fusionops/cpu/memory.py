"""Addresses of arrays and the scratch memory of calls. Knows nothing of what the memory holds."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGNMENT = 4096  # bytes: whole pages, so that no two threads' areas share one

# This process's memory as machine words, which Python may index: 0.2 µs a read, where `array.ctypes.data` takes 1.8 and
# a small call needs five addresses.
_WORD = ctypes.sizeof(ctypes.c_size_t)
_MEMORY = (ctypes.c_size_t * (2**62 // _WORD)).from_address(0)


@functools.cache
def _data_word() -> int | None:
    """Which word of an ndarray is its data pointer: the first after the object header, as NumPy's C API has it.

    Verified on live arrays; None where it is not so, and the slow public attribute is used.
    """
    word = object.__basicsize__ // _WORD
    for probe in (np.empty(3), np.empty((2, 5), np.float32)[1:, ::2]):
        if _MEMORY[id(probe) // _WORD + word] != probe.ctypes.data:
            return None
    return word


_DATA = _data_word()


def address(array: np.ndarray[Any, Any]) -> int:
    """The address of the first element."""
    return int(array.ctypes.data) if _DATA is None else _MEMORY[id(array) // _WORD + _DATA]


@dataclass(slots=True)
class Area:
    """A stretch of memory: `start` is a multiple of ALIGNMENT, `size` bytes from there on are usable."""

    array: np.ndarray[Any, Any]
    start: int
    size: int


def allocate(size: int) -> Area:
    """An area with arbitrary contents."""
    array = np.empty(size + ALIGNMENT, np.uint8)
    return Area(array, -(-address(array) // ALIGNMENT) * ALIGNMENT, size)


class Workspace:
    """Scratch memory that calls borrow and give back, so that the pages of a call are warm for the next one.

    At most `keep` areas of at most `largest` bytes are kept. Needs no lock: a list hands each of its items out once.
    """

    def __init__(self, keep: int = 4, largest: int = 32 * 1024 * 1024) -> None:
        self.keep, self.largest = keep, largest
        self._free: list[Area] = []

    def borrow(self, size: int) -> Area:
        """An area of at least `size` bytes with arbitrary contents."""
        try:
            area = self._free.pop()
        except IndexError:
            return allocate(size)
        return area if area.size >= size else allocate(size)

    def give_back(self, area: Area) -> None:
        if area.size <= self.largest and len(self._free) < self.keep:
            self._free.append(area)

    def clear(self) -> None:
        """Returns all kept memory to the system."""
        self._free.clear()


WORKSPACE = Workspace()
