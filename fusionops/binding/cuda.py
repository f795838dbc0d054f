"""Arrays in the memory of a GPU: recognised, borrowed, compared by address and given back, without importing a library.

Reads what arrays say of themselves, never an element. Kernels take CuPy arrays; an array of another library is borrowed
as one on the same memory, by the function that `borrow_with` was handed, since only a backend may import CuPy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

CUPY = ("cupy", "ndarray")
CUDA_DEVICES = (2, 13)  # of DLPack: kDLCUDA and kDLCUDAManaged

# Libraries that take an array back by DLPack: the type of theirs, and the module that has from_dlpack.
_LENDERS = (("torch", "Tensor", "torch"), ("jax", "Array", "jax.numpy"))
_IMMUTABLE = (("jax", "Array"),)


class Pointer(Protocol):
    """Where an array begins: its address and the number of the GPU."""

    ptr: int
    device_id: int


class CupyArray(Protocol):
    """What is read here of a CuPy array, besides that it has shape, dtype and strides as NumPy's have."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    size: int
    data: Pointer
    device: AbstractContextManager[Any]


Borrow = Callable[[Any], Any]
Take = Callable[[Any], Any]

_borrow: Borrow


def borrow_with(borrow: Borrow) -> None:
    """Name the function that makes a CuPy array of another library's, on the same memory."""
    global _borrow
    _borrow = borrow


def borrowed(value: Any) -> Any:
    """A CuPy array on the memory of another library's array."""
    return _borrow(value)


def type_of(library: str, kind: str) -> type | None:
    """The type `library.kind`; None where nobody has imported the library, and there are no such arrays."""
    array_type = getattr(sys.modules.get(library), kind, None)
    return array_type if isinstance(array_type, type) else None


def belongs_to(value: object, library: str, kind: str) -> bool:
    array_type = type_of(library, kind)
    return array_type is not None and isinstance(value, array_type)


def is_cupy(value: object) -> bool:
    return belongs_to(value, *CUPY)


def is_cuda(value: Any) -> bool:
    """Whether `value` is an array on a GPU, CuPy's or another library's."""
    if is_cupy(value):
        return True
    # DLPack is asked first: of a tensor that records gradients, PyTorch refuses to look up the other attribute.
    device = getattr(value, "__dlpack_device__", None)
    if device is None:
        return hasattr(value, "__cuda_array_interface__")
    try:
        return device()[0] in CUDA_DEVICES
    except (BufferError, RuntimeError, TypeError, ValueError):  # it has no memory of its own, so none on a GPU
        return False


def is_immutable(value: object) -> bool:
    return any(belongs_to(value, *immutable) for immutable in _IMMUTABLE)


def taker(value: object) -> Take | None:
    """What turns a CuPy array into an array of `value`'s library, on the same memory; None where it stays CuPy's."""
    for library, kind, module in _LENDERS:
        if belongs_to(value, library, kind):
            take: Take = sys.modules[module].from_dlpack
            return take
    return None


@dataclass(frozen=True, slots=True)
class Returns:
    """Gives results back in the caller's kind of array.

    take       makes one of a CuPy array; None where the caller's are CuPy's
    out, lent  the caller's own array for the result, and the CuPy array on its memory
    """

    take: Take | None
    out: Any
    lent: Any

    def __call__(self, array: Any) -> Any:
        if array is self.lent:
            take_out = taker(self.out)
            if take_out is not None:
                take_out(array)  # for what comes with it: the library's stream waits for CuPy's, which writes it
            return self.out
        return array if self.take is None else self.take(array)


def uploaded(array: Any) -> Any:
    """Numbers that the caller wrote down as such, on the current GPU, beside arrays that are there."""
    return sys.modules["cupy"].asarray(array)


def device_of(array: Any) -> AbstractContextManager[Any]:
    """A context in which new arrays are made where `array` is."""
    if isinstance(array, np.ndarray):
        return nullcontext()
    device: AbstractContextManager[Any] = array.device
    return device


def may_share_memory(one: CupyArray, other: CupyArray) -> bool:
    """Whether the bytes between the first and the last of each array meet; as in NumPy, interleaved ones do."""
    if not (one.size and other.size):
        return False
    (first, end), (other_first, other_end) = span(one), span(other)
    return first < other_end and other_first < end


def span(array: CupyArray) -> tuple[int, int]:
    """The addresses of the first byte of `array` and of the one after its last."""
    first = last = array.data.ptr
    for extent, step in zip(array.shape, array.strides, strict=True):
        if step < 0:
            first += (extent - 1) * step
        else:
            last += (extent - 1) * step
    return first, last + array.itemsize
