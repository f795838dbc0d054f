"""What a user may pass as an array, brought to plain NumPy or CuPy arrays; judges dtypes and places, never shapes.

Nothing is copied while arrays are read, so that every other argument is judged before memory is spent; `settle` copies,
once all are known to be right. Arrays of other libraries are recognised without importing those libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from fusionops.binding import cuda
from fusionops.binding.messages import complaint, spelled
from fusionops.errors import FusionError, SpecError, SpecTypeError
from fusionops.spec import FLOATS, ITEM_BYTES

Array = np.ndarray[Any, Any]  # or CuPy's, which has all that is asked of it but writeable, aligned, owndata and ctypes
Shape = tuple[int, ...]
DType = np.dtype[Any]
IsPlain = Callable[[Any], bool]
T = TypeVar("T")

_ndarray = np.ndarray  # is_plain runs for every array of every call, and a global is found faster than an attribute

# bfloat16 belongs to ml_dtypes: it is recognised by its name when it is first seen, and stands here from then on.
_NATIVE = {np.dtype(name) for name in ITEM_BYTES if name != "bfloat16"}

# Numbers that were written down: on neither side, they go where the arrays are.
_LITERALS = (int, float, list, tuple, range, np.generic)

# Where another library's array comes from, and how its user gets a NumPy array from it.
_FOREIGN = (
    ("torch", "Tensor", "x.detach().cpu().numpy()"),
    ("jax", "Array", "np.asarray(x)"),
    ("tensorflow", "Tensor", "x.numpy()"),
)


def is_plain(value: Any) -> bool:
    """Whether `value` can be handed to a kernel as it is. Aligned arrays have strides of whole items."""
    return type(value) is _ndarray and value.flags.aligned and value.dtype in _NATIVE


class PlainOnGpu:
    """`is_plain` for the CuPy arrays of one call: all on the GPU of the first that it is asked about."""

    __slots__ = ("device", "kind")

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind
        self.device: int | None = None

    def __call__(self, value: Any) -> bool:
        if type(value) is not self.kind or value.dtype not in _NATIVE:
            return False
        data = value.data
        if self.device is None:
            self.device = data.device_id
        if data.device_id != self.device or data.ptr % value.itemsize:
            return False
        return value.flags.c_contiguous or is_settled(value)


def plain_on_gpu(read: Callable[..., T | None], *arguments: Any, out: Any) -> T | None:
    """What `read` makes of arguments whose arrays, and `out`, are CuPy's, on one GPU, as kernels take them; else None.

    `read` is handed the arguments and the test for their arrays.
    """
    cupy_array = cuda.type_of(*cuda.CUPY)
    if cupy_array is None:
        return None
    is_plain_there = PlainOnGpu(cupy_array)
    return read(*arguments, is_plain_there) if out is None or is_plain_there(out) else None


class Intake:
    """Reads the arrays of one call, and remembers what has to be copied before a kernel may see it.

    copies      what binding copied or converted and why, in words
    unsettled   whether a NumPy array was read that `settle` must copy
    on_cpu      names of the arguments that are NumPy arrays
    on_gpu      the arguments that are on a GPU, as CuPy arrays
    """

    __slots__ = ("_out", "_take", "copies", "on_cpu", "on_gpu", "op", "unsettled")

    def __init__(self, op: str) -> None:
        self.op = op
        self.copies: tuple[str, ...] = ()
        self.on_cpu: tuple[str, ...] = ()
        self.on_gpu: dict[str, cuda.CupyArray] = {}
        self.unsettled = False
        self._take: cuda.Take | None = None
        self._out: tuple[Any, Array | None] = (None, None)

    def array(self, name: str, value: Any) -> Array:
        """`value` as an array of the base class and a dtype that fusionops knows, in either byte order."""
        if is_plain(value):
            self.on_cpu += (name,)
            return value  # type: ignore[no-any-return]  # is_plain has looked at its type
        if cuda.is_cuda(value):
            return self._lent(name, value)
        self._reject_foreign(name, value)
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError) as error:
            raise SpecError(complaint(self.op, f"{name} cannot be made an array: {error}")) from error
        except TypeError as error:
            raise SpecTypeError(complaint(self.op, f"{name} cannot be made an array: {error}")) from error
        if not isinstance(value, _LITERALS):
            self.on_cpu += (name,)
        is_array = isinstance(value, (np.ndarray, np.generic))
        self._judge_dtype(name, array.dtype, "" if is_array else f" (from a {type(value).__name__})")
        if not is_array:
            self.copies += (f"{name}: a {type(value).__name__}, converted to an array",)
        self.unsettled = self.unsettled or not is_settled(array)
        return array

    def destination(self, value: Any) -> Array | None:
        """The array to write the result into, the last that is read: now all must be NumPy's, or all on one GPU."""
        array = None if value is None else self._writeable(value)
        self._out = value, array
        self._judge_places()
        return array

    def _writeable(self, value: Any) -> Array:
        if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
            self.on_cpu += ("out",)
            return value
        if not cuda.is_cuda(value):
            raise SpecTypeError(complaint(self.op, f"out is {spelled(value)}, needs a NumPy array or a CuPy array"))
        if cuda.is_immutable(value):
            raise SpecTypeError(complaint(self.op, f"out is {spelled(value)}, which cannot be written"))
        return self._lent("out", value)

    def _judge_places(self) -> None:
        if not self.on_gpu:
            return
        if self.on_cpu:
            problem = f"GPU arrays ({', '.join(self.on_gpu)}) and NumPy arrays ({', '.join(self.on_cpu)}) are mixed"
            hint = "move all to one side with cupy.asarray(x) or cupy.asnumpy(x)"
            raise SpecTypeError(complaint(self.op, f"{problem}; nothing is transferred unasked", hint=hint))
        devices: dict[int, list[str]] = {}
        for name, array in self.on_gpu.items():
            devices.setdefault(array.data.device_id, []).append(name)
        if len(devices) > 1:
            where = " and ".join(f"GPU {device} ({', '.join(names)})" for device, names in sorted(devices.items()))
            hint = f"with cupy.cuda.Device({min(devices)}): x = cupy.asarray(x) brings one to GPU {min(devices)}"
            raise SpecError(complaint(self.op, f"arrays are on {where}; one call runs on one GPU", hint=hint))

    @property
    def returns(self) -> cuda.Returns | None:
        """What gives results back; None where the caller's arrays are NumPy's or CuPy's."""
        out, lent = self._out
        return None if self._take is None and out is lent else cuda.Returns(self._take, out, lent)

    @property
    def device(self) -> AbstractContextManager[Any]:
        """A context in which copies are made where the arrays are."""
        for array in self.on_gpu.values():
            return cuda.device_of(array)
        return nullcontext()

    def settle(self, name: str, array: Array) -> Array:
        """`array` as kernels take it: native byte order and strides of whole items; a copy where it is not."""
        if is_settled(array):
            return self.placed(array)
        reason = "strides are not whole items" if array.dtype.isnative else "byte order is not this machine's"
        self.copies += (f"{name}: {reason}",)
        return self.placed(array.astype(native(array.dtype), order="C"))

    def placed(self, array: Array) -> Array:
        """`array` where the arrays of the call are: numbers that were written down beside those of a GPU go there."""
        if self.on_gpu and isinstance(array, np.ndarray):
            return cuda.uploaded(array)  # type: ignore[no-any-return]  # CuPy has no types
        return array

    def _lent(self, name: str, value: Any) -> Array:
        """An array on a GPU as CuPy's; results are of the first one's kind, which is that of the first source."""
        if not self.on_gpu:
            self._take = cuda.taker(value)
        array = value
        if not cuda.is_cupy(value):
            try:
                array = cuda.borrowed(value)
            except FusionError:
                raise
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                problem = f"{name} is {spelled(value)}, which CuPy cannot borrow: {error}"
                raise SpecTypeError(complaint(self.op, problem)) from error
        self._judge_dtype(name, array.dtype)
        if array.data.ptr % array.itemsize:
            problem = f"{name} begins at address {array.data.ptr:#x}, needs a multiple of {array.itemsize} bytes"
            raise SpecError(complaint(self.op, problem, hint=f"{name}.copy() begins at one"))
        self.on_gpu[name] = array
        return array  # type: ignore[no-any-return]  # CuPy has no types

    def _reject_foreign(self, name: str, value: Any) -> None:
        if isinstance(value, np.ma.MaskedArray):
            hint = "x.filled(value) makes it a plain array"
            raise SpecTypeError(complaint(self.op, f"{name} is a masked array; masks are not supported", hint=hint))
        for library, kind, recipe in _FOREIGN:
            if cuda.belongs_to(value, library, kind):
                problem = f"{name} is a {library} {kind}, needs a NumPy array"
                raise SpecTypeError(complaint(self.op, problem, hint=f"pass {recipe}"))

    def _judge_dtype(self, name: str, dtype: DType, origin: str = "") -> None:
        if dtype in _NATIVE:
            return
        if dtype.name in ITEM_BYTES:
            if dtype.isnative:
                _NATIVE.add(dtype)
            return
        hints = {
            "c": "complex is not supported; fuse x.real and x.imag by themselves",
            "f": f"cast it: {name}.astype(np.float64)",
            "V": "structured dtypes are not supported; pass one field",
        }
        problem = f"{name} has dtype {dtype}{origin}, needs bool, integers of 8 to 64 bits, {', '.join(FLOATS)}"
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


def is_of_rows(array: Array) -> bool:
    """Whether the leading axes of `array` are one walk of equal steps, so that (…, C) is (rows, C) in place."""
    if array.flags.c_contiguous or not array.size:
        return True
    walked = [axis for axis in zip(array.shape[:-1], array.strides[:-1], strict=True) if axis[0] > 1]
    return all(outer == extent * step for (_, outer), (extent, step) in pairwise(walked))
