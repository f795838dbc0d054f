"""Stands for the module `cupy` where there is no GPU: arrays that lie in host memory but are no NumPy arrays.

As strict as CuPy, or stricter: NumPy may not touch an array, a new one is made on the current device, work on an array
of another device is an error, and so is whatever would make the host wait. `sys.modules["cupy"] = fake_cupy` installs
it; `asnumpy` and `get` are for tests.
"""

from __future__ import annotations

import math
import types
from typing import Any, NamedTuple, NoReturn

import numpy as np

__version__ = "14.2.0"

_devices = [0]  # the stack of current ones


class Device:
    """A GPU; entering it makes it the current one."""

    def __init__(self, device: int | None = None) -> None:
        self.id = _devices[-1] if device is None else device

    def __enter__(self) -> Device:
        _devices.append(self.id)
        return self

    def __exit__(self, *error: object) -> None:
        _devices.pop()

    def synchronize(self) -> NoReturn:
        raise AssertionError("the host waits for the device")


class OutOfMemoryError(MemoryError):
    """As CuPy's, which is a MemoryError too."""

    def __init__(self, size: int) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes")


class Flags(NamedTuple):
    """All that CuPy tells; its arrays have no `writeable`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


cuda = types.SimpleNamespace(
    Device=Device,
    memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError, limit=2**34),
    runtime=types.SimpleNamespace(getDevice=lambda: _devices[-1]),
)


class ndarray:
    """A CuPy array whose memory is NumPy's: `data.ptr` is a true address."""

    __array_ufunc__ = None
    __array_priority__ = 100

    def __init__(self, memory: np.ndarray, device: int | None = None, base: ndarray | None = None) -> None:
        self._memory = memory
        self.base = base
        self.device = Device(device)
        self.data = types.SimpleNamespace(ptr=memory.ctypes.data, device_id=self.device.id)
        self.shape, self.strides, self.dtype = memory.shape, memory.strides, memory.dtype
        self.itemsize, self.size, self.ndim, self.nbytes = memory.itemsize, memory.size, memory.ndim, memory.nbytes

    @property
    def flags(self) -> Flags:
        return Flags(self._memory.flags.c_contiguous, self._memory.flags.f_contiguous, self.base is None)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._memory.__array_interface__ | {"stream": 1}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __dlpack__(self, **options: Any) -> ndarray:
        return self._seen(self._memory)  # stands for the capsule

    def __array__(self, *args: Any, **options: Any) -> NoReturn:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_function__(self, function: Any, *args: Any) -> NoReturn:
        raise TypeError(f"{function.__name__} of NumPy is applied to a CuPy array")

    def __float__(self) -> NoReturn:
        raise AssertionError("the host waits for a number")

    __int__ = __index__ = __bool__ = item = tolist = __float__

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, key: Any) -> ndarray:
        axes = key if isinstance(key, tuple) else (key,)
        return self._seen(self._memory[axes if ... in axes else (*axes, ...)])  # an array even of one number

    def __setitem__(self, key: Any, value: ndarray | float) -> None:
        self._work()
        if isinstance(value, ndarray):
            value._work()
            value = value._memory
        elif not isinstance(value, (int, float)):
            raise TypeError(f"Unsupported type {type(value)}")
        self._memory[key] = value

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ndarray:
        return self._result(self._memory.astype(dtype, order=order, copy=copy))

    def copy(self, order: str = "C") -> ndarray:
        return self._result(self._memory.copy(order))

    def reshape(self, *shape: Any) -> ndarray:
        return self._result(self._memory.reshape(*shape))

    def transpose(self, *axes: Any) -> ndarray:
        return self._seen(self._memory.transpose(*axes))

    def view(self, dtype: Any) -> ndarray:
        return self._seen(self._memory.view(dtype))

    @property
    def T(self) -> ndarray:
        return self.transpose()

    def get(self) -> np.ndarray:
        return self._memory.copy()

    def _seen(self, memory: np.ndarray) -> ndarray:
        return type(self)(memory, self.device.id, self)

    def _result(self, memory: np.ndarray) -> ndarray:
        """What NumPy made of the array: itself, a view, or a new array on the current device."""
        if memory is self._memory:
            return self
        if memory.size and np.shares_memory(memory, self._memory):
            return self._seen(memory)
        self._work()
        return type(self)(memory)

    def _work(self) -> None:
        """As kernels do, which run on the current device."""
        assert self.device.id == _devices[-1], f"an array of GPU {self.device.id} is used on GPU {_devices[-1]}"


ndarray.__module__ = "cupy"


def empty(shape: int | tuple[int, ...], dtype: Any = float) -> ndarray:
    size = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
    if size > cuda.memory.limit:
        raise OutOfMemoryError(size)
    return ndarray(np.full(shape, 7, dtype))


def asarray(value: Any, dtype: Any = None) -> ndarray:
    if isinstance(value, ndarray):
        return value if dtype is None else value.astype(dtype, copy=False)
    if hasattr(value, "__cuda_array_interface__"):
        holder = types.SimpleNamespace(__array_interface__=value.__cuda_array_interface__, owner=value)
        return ndarray(np.asarray(holder))
    return ndarray(np.array(value, dtype))


def from_dlpack(value: Any) -> ndarray:
    lent: ndarray = value.__dlpack__()
    return lent


def asnumpy(value: Any) -> np.ndarray:
    return value.get() if isinstance(value, ndarray) else np.asarray(value)
