"""The scratch memory of calls. Knows nothing of what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionops.address import address

ALIGNMENT = 4096  # bytes: whole pages, so that no two threads' areas share one


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
