"""The one owner of parallel launches: a loop over independent tasks, with every guard of the threading layers in it.

    for index in range(tasks): task(params, index, slot)

Tasks are handed out one by one, so a slow core takes fewer; `slot` numbers the threads of one launch and picks scratch memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from threading import RLock
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fusionops.cpu import jit
from fusionops.cpu.simd import I64, word


@intrinsic
def call_task(typing, function, params, index, slot):
    signature = types.void(types.intp, types.intp, types.intp, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def take_next(typing, counter):
    """The value of the int64 at address `counter`, which is increased by one atomically."""
    signature = types.intp(types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), word(1), "monotonic")

    return signature, codegen


def _serial(function, params, first, last):
    for index in range(first, last):
        call_task(function, params, index, 0)


def _parallel(function, params, counter, last, slots):
    for slot in numba.prange(slots):
        mine = np.int64(slot)  # a prange index is unsigned
        index = take_next(counter)
        while index < last:
            call_task(function, params, index, mine)
            index = take_next(counter)


@functools.cache
def _serial_entry() -> Callable[..., None]:
    return jit.entry(types.void(*[types.int64] * 4), _serial)


@functools.cache
def _parallel_entry() -> Callable[..., None]:
    return jit.entry(types.void(*[types.int64] * 5), _parallel, parallel=True)


class _Layer:
    """What this process knows of numba's threading layer. Guards measured in `docs/decisions`."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.first_pid: int | None = None  # of the process that launched first
        self.name: str | None = None

    def after_fork(self) -> None:
        self.lock = RLock()  # its owner may not exist in the child


_LAYER = _Layer()
os.register_at_fork(after_in_child=_LAYER.after_fork)

# Below this much work in all, a second thread takes longer to wake and to be waited for than it saves. Measured on two
# cores: a parallel launch costs 4.5 µs, a serial one 1.9 µs; 3 MFLOP are some 20 µs of one core.
SERIAL_FLOPS = 3.0e6

# Python sees signals only between launches, so a launch ends after about this much work of each thread: 50 ms at
# 100 GFLOP/s. Shorter launches cost more waiting for the last task of each.
LAUNCH_FLOPS = 5.0e9


@functools.cache
def available_threads() -> int:
    """Cores this process may run on when it first asks, as far as numba's pool reaches."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(numba.config.NUMBA_NUM_THREADS))


_requested: int | None = None


def set_num_threads(count: int) -> None:
    """Threads that later calls use, in every Python thread."""
    global _requested
    _requested = count


def get_num_threads() -> int:
    return _requested if _requested is not None else available_threads()


def layer_name() -> str | None:
    """Numba's threading layer, once a launch has started it."""
    return _LAYER.name


def parallel_for(task: int, params: int, tasks: int, threads: int, flops_per_task: float) -> None:
    """Runs `tasks` tasks on up to `threads` threads; the work of a task that computes little is what FLOPs take as long."""
    slice_tasks = max(threads, int(threads * LAUNCH_FLOPS / max(flops_per_task, 1.0)))
    if threads > 1 and _LAYER.first_pid not in (None, os.getpid()) and _LAYER.name == "omp":
        threads = 1  # an OpenMP runtime kills a forked child at its first team
    if threads == 1 or tasks == 1 or tasks * flops_per_task < SERIAL_FLOPS:
        run = _serial_entry()
        for first in range(0, tasks, slice_tasks):
            run(task, params, first, min(tasks, first + slice_tasks))
        return
    counter = np.zeros(1, np.int64)
    for first in range(0, tasks, slice_tasks):
        counter[0] = first
        _launch(task, params, counter, min(tasks, first + slice_tasks), min(threads, tasks - first))


def _launch(task: int, params: int, counter: np.ndarray, last: int, slots: int) -> None:
    run = _parallel_entry()
    if _LAYER.name is None or _LAYER.name == "workqueue":
        with (
            _LAYER.lock
        ):  # two launches at once abort the process on workqueue; the first launch finds out which layer it is
            run(task, params, counter.ctypes.data, last, slots)
            if _LAYER.name is None:
                _LAYER.name = numba.threading_layer()
                _LAYER.first_pid = os.getpid()
    else:
        run(task, params, counter.ctypes.data, last, slots)


def prepare() -> None:
    """Compiles both launchers."""
    _serial_entry()
    _parallel_entry()
