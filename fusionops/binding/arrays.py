"""What a user may pass as an array, brought to plain NumPy arrays; judges containers and dtypes, never shapes.

Nothing is copied while arrays are read, so that every other argument is judged before memory is spent; `settle` copies,
once all are known to be right. Arrays of other libraries are recognised without importing those libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

from fusionops.binding.messages import complaint
from fusionops.errors import BackendError, SpecError, SpecTypeError
from fusionops.spec import FLOATS, ITEM_BYTES

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
DType = np.dtype[Any]

_ndarray = np.ndarray  # is_plain runs for every array of every call, and a global is found faster than an attribute

# bfloat16 belongs to ml_dtypes: it is recognised by its name when it is first seen, and stands here from then on.
_NATIVE = {np.dtype(name) for name in ITEM_BYTES if name != "bfloat16"}

# Where another library's array comes from, and how its user gets a NumPy array from it.
_FOREIGN = (
    ("torch", "Tensor", "x.detach().cpu().numpy()"),
    ("jax", "Array", "np.asarray(x)"),
    ("tensorflow", "Tensor", "x.numpy()"),
)


def is_plain(value: Any) -> bool:
    """Whether `value` can be handed to a kernel as it is. Aligned arrays have strides of whole items."""
    return type(value) is _ndarray and value.flags.aligned and value.dtype in _NATIVE


class Intake:
    """Reads the arrays of one call, and remembers what has to be copied before a kernel may see it.

    copies      what binding copied or converted and why, in words
    unsettled   whether an array was read that `settle` must copy
    on_gpu      names of the arguments that are CuPy arrays
    """

    __slots__ = ("copies", "on_gpu", "op", "unsettled")

    def __init__(self, op: str) -> None:
        self.op = op
        self.copies: tuple[str, ...] = ()
        self.on_gpu: tuple[str, ...] = ()
        self.unsettled = False

    def array(self, name: str, value: Any) -> Array:
        """`value` as an array of the base class and a dtype that fusionops knows, in either byte order."""
        if is_plain(value):
            return value  # type: ignore[no-any-return]  # is_plain has looked at its type
        if _is_cupy(value):
            self.on_gpu += (name,)
            return value  # type: ignore[no-any-return]  # looks like an array until turn_away_gpu
        self._reject_foreign(name, value)
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError) as error:
            raise SpecError(complaint(self.op, f"{name} cannot be made an array: {error}")) from error
        except TypeError as error:
            raise SpecTypeError(complaint(self.op, f"{name} cannot be made an array: {error}")) from error
        if array.dtype.name not in ITEM_BYTES:
            self._reject_dtype(name, value, array.dtype)
        if array.dtype.isnative:
            _NATIVE.add(array.dtype)
        if not isinstance(value, (np.ndarray, np.generic)):
            self.copies += (f"{name}: a {type(value).__name__}, converted to an array",)
        self.unsettled = self.unsettled or not is_settled(array)
        return array

    def settle(self, name: str, array: Array) -> Array:
        """`array` as kernels take it: native byte order and strides of whole items; a copy where it is not."""
        if is_settled(array):
            return array
        reason = "strides are not whole items" if array.dtype.isnative else "byte order is not this machine's"
        self.copies += (f"{name}: {reason}",)
        return np.array(array, native(array.dtype), order="C")

    def turn_away_gpu(self, arrays: Iterable[Any]) -> NoReturn:
        """Why CuPy arrays cannot be fused: mixed with NumPy's, or because there is no backend for them yet."""
        if any(isinstance(array, np.ndarray) for array in arrays):
            names = ", ".join(self.on_gpu)
            problem = f"CuPy arrays ({names}) and NumPy arrays are mixed; nothing is transferred unasked"
            hint = "move all to one side with cupy.asarray(x) or cupy.asnumpy(x)"
            raise SpecTypeError(complaint(self.op, problem, hint=hint))
        problem = "CuPy arrays run on the gpu backend, which is not part of this version"
        raise BackendError(complaint(self.op, problem, hint="cupy.asnumpy(x) brings an array to the cpu backend"))

    def _reject_foreign(self, name: str, value: Any) -> None:
        if isinstance(value, np.ma.MaskedArray):
            hint = "x.filled(value) makes it a plain array"
            raise SpecTypeError(complaint(self.op, f"{name} is a masked array; masks are not supported", hint=hint))
        for library, kind, recipe in _FOREIGN:
            array_type = getattr(sys.modules.get(library), kind, None)
            if isinstance(array_type, type) and isinstance(value, array_type):
                problem = f"{name} is a {library} {kind}, needs a NumPy array"
                raise SpecTypeError(complaint(self.op, problem, hint=f"pass {recipe}"))

    def _reject_dtype(self, name: str, value: Any, dtype: DType) -> NoReturn:
        hints = {
            "c": "complex is not supported; fuse x.real and x.imag by themselves",
            "f": f"cast it: {name}.astype(np.float64)",
            "V": "structured dtypes are not supported; pass one field",
        }
        what = "" if isinstance(value, (np.ndarray, np.generic)) else f" (from a {type(value).__name__})"
        problem = f"{name} has dtype {dtype}{what}, needs bool, integers of 8 to 64 bits, {', '.join(FLOATS)}"
        raise SpecTypeError(complaint(self.op, problem, hint=hints.get(dtype.kind, "pass an array of numbers")))


def native(dtype: DType) -> DType:
    """`dtype` in this machine's byte order."""
    return dtype if dtype in _NATIVE else dtype.newbyteorder("=")


def is_floating(dtype: DType) -> bool:
    return dtype.name in FLOATS


def is_settled(array: Array) -> bool:
    """Whether a kernel can walk through `array`: native byte order, strides of whole items."""
    steps = zip(array.shape, array.strides, strict=True)
    return array.dtype.isnative and not any(step % array.itemsize for extent, step in steps if extent > 1)


def _is_cupy(value: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)
