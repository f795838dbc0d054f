"""Stands for the module `cupy` where there is no GPU: arrays that lie in host memory but are no NumPy arrays.

As strict as CuPy, or stricter: NumPy may not touch an array, a new one is made on the current device, work on an array
of another device is an error, and so is whatever would make the host wait, but for `Event.synchronize`.
`sys.modules["cupy"] = fake_cupy` installs it; `asnumpy` and `get` wait, for whoever measures and tests.

Work is done at once by the host, but takes its time on a device with a clock of its own: FILL_NS or COPY_NS each, and
what tests `enqueue`. So a device may be at work long after a call has returned, and events tell by how much.
"""

from __future__ import annotations

import math
import time
import types
import weakref
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fusionops.device import H200, GpuDevice

__version__ = "14.2.0"

PROFILES: dict[int, GpuDevice] = {}  # of GPUs that are no H200
_devices = [0]  # the stack of current ones

FILL_NS, COPY_NS = 2_000_000, 1_000_000
POOL_UNIT = 512  # bytes

_idle_from_ns = 0  # when the device will have done all that was enqueued


def enqueue(nanoseconds: int) -> None:
    """Work for the device, which begins it when it has done all before."""
    global _idle_from_ns
    _idle_from_ns = max(_idle_from_ns, time.perf_counter_ns()) + nanoseconds


class Event:
    """A point in the work of the device."""

    at_ns: int

    def record(self) -> None:
        self.at_ns = max(_idle_from_ns, time.perf_counter_ns())

    @property
    def done(self) -> bool:
        return time.perf_counter_ns() >= self.at_ns

    def synchronize(self) -> None:
        while not self.done:
            time.sleep(max(0.0, self.at_ns - time.perf_counter_ns()) / 1e9)


def get_elapsed_time(begin: Event, end: Event) -> float:
    """Milliseconds."""
    assert begin.done, "an event has not been waited for"
    assert end.done, "an event has not been waited for"
    return (end.at_ns - begin.at_ns) / 1e6


_hooks: list[MemoryHook] = []


class MemoryHook:
    """Is told of what arrays take of the pool and give back, inside a with statement."""

    def __enter__(self) -> MemoryHook:
        _hooks.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _hooks.remove(self)

    def malloc_postprocess(self, **taken: int) -> None: ...

    def free_postprocess(self, **freed: int) -> None: ...


def _pooled(memory: np.ndarray) -> np.ndarray:
    """New memory, of which hooks are told now and when nobody uses it any more."""
    size = -(-memory.nbytes // POOL_UNIT) * POOL_UNIT

    def freed() -> None:
        for hook in _hooks:
            hook.free_postprocess(mem_size=size)

    for hook in _hooks:
        hook.malloc_postprocess(size=memory.nbytes, mem_size=size)
    weakref.finalize(memory, freed)
    return memory


class Device:
    """A GPU; entering it makes it the current one."""

    def __init__(self, device: int | None = None) -> None:
        self.id = _devices[-1] if device is None else device

    @property
    def compute_capability(self) -> str:
        major, minor = PROFILES.get(self.id, H200).capability
        return f"{major}{minor}"

    @property
    def attributes(self) -> dict[str, int]:
        here = PROFILES.get(self.id, H200)
        return {
            "MultiProcessorCount": here.multiprocessors,
            "MaxRegistersPerMultiprocessor": here.registers,
            "MaxSharedMemoryPerMultiprocessor": here.shared_bytes,
            "MaxSharedMemoryPerBlockOptin": here.block_shared_bytes,
            "MaxThreadsPerMultiProcessor": here.threads,
            "L2CacheSize": here.l2_bytes,
        }

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
    nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
    Device=Device,
    Event=Event,
    MemoryHook=MemoryHook,
    get_elapsed_time=get_elapsed_time,
    memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError, limit=2**34),
    runtime=types.SimpleNamespace(
        CUDARuntimeError=RuntimeError,
        getDevice=lambda: _devices[-1],
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda device: {"name": b"Pretended H200"},
    ),
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

    def fill(self, value: float) -> None:
        self[...] = value
        enqueue(FILL_NS)

    def _seen(self, memory: np.ndarray) -> ndarray:
        return type(self)(memory, self.device.id, self)

    def _result(self, memory: np.ndarray) -> ndarray:
        """What NumPy made of the array: itself, a view, or a new array on the current device."""
        if memory is self._memory:
            return self
        if memory.size and np.shares_memory(memory, self._memory):
            return self._seen(memory)
        self._work()
        return type(self)(_pooled(memory))

    def _work(self) -> None:
        """As kernels do, which run on the current device."""
        assert self.device.id == _devices[-1], f"an array of GPU {self.device.id} is used on GPU {_devices[-1]}"


ndarray.__module__ = "cupy"


def empty(shape: int | tuple[int, ...], dtype: Any = float) -> ndarray:
    size = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
    if size > cuda.memory.limit:
        raise OutOfMemoryError(size)
    return ndarray(_pooled(np.full(shape, 7, dtype)))


def zeros(shape: int | tuple[int, ...], dtype: Any = float) -> ndarray:
    made = empty(shape, dtype)
    made[...] = 0
    return made


def broadcast_to(array: ndarray, shape: tuple[int, ...]) -> ndarray:
    return array._seen(np.broadcast_to(array._memory, shape))


def copyto(target: ndarray, source: ndarray) -> None:
    target[...] = source
    enqueue(COPY_NS)


def asarray(value: Any, dtype: Any = None) -> ndarray:
    if isinstance(value, ndarray):
        return value if dtype is None else value.astype(dtype, copy=False)
    if hasattr(value, "__cuda_array_interface__"):
        holder = types.SimpleNamespace(__array_interface__=value.__cuda_array_interface__, owner=value)
        return ndarray(np.asarray(holder))
    return ndarray(_pooled(np.array(value, dtype)))


def from_dlpack(value: Any) -> ndarray:
    lent: ndarray = value.__dlpack__()
    return lent


def asnumpy(value: Any) -> np.ndarray:
    return value.get() if isinstance(value, ndarray) else np.asarray(value)
