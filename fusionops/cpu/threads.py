"""The one owner of parallel launches: a pool of threads that share the tasks of a launch.

    for index in range(tasks): task(params, index, slot)

`slot` is the number of the thread, 0 the caller's, and picks scratch memory. Each thread has a range of the tasks, the
same one in each launch of as many, so that what it read or wrote in the last call is still in its core's cache; when
its range is done it helps with the others'. The caller works too, and waits only for tasks that another thread has
begun: a worker that the system has not scheduled by then costs nothing. Why not numba's layers:
`docs/decisions/0002-a-thread-pool-of-our-own.md`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.address import address
from fusionops.cpu import jit
from fusionops.cpu.memory import allocate
from fusionops.cpu.simd import I32, I64, words

LOG = logging.getLogger(__name__)

# Words of a pool, each at the start of a cache line of its own where two threads write.
OPEN = 0  # 1 while the tasks of a launch may be taken
ACTIVE = 8  # workers that may be looking at the launch
TASK, PARAMS, SLOTS = 16, 17, 18  # of the launch
STOP = 24  # 1 when the process ends
BORN = 32  # workers that have begun: the number of each is how many there are with it
THREAD = 40  # from here on THREAD_WORDS for each thread:
NEXT, LAST = 0, 1  # the task of its range that is handed out next, and where the range ends
BELL = 8  # a POSIX semaphore that wakes it
THREAD_WORDS = 16
MOST_THREADS = 1024  # of a launch

# How often a worker asks for the next launch before it sleeps, yielding in between: some 50 µs, in which calls that
# follow one another find it awake.
PATIENCE = 100


@intrinsic
def call_task(typing, function, params, index, slot):
    signature = types.void(types.intp, types.intp, types.intp, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def fetch_add(typing, address, amount):
    """The int64 at `address`, to which `amount` is added atomically."""
    signature = types.intp(types.intp, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return signature, codegen


@intrinsic
def exchange(typing, address, value):
    """The int64 at `address`, which becomes `value`."""
    signature = types.intp(types.intp, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("xchg", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return signature, codegen


def _library_call(name: str, takes_address: bool) -> Any:
    @intrinsic
    def call(typing, address):
        """A function of the C library that takes a pointer or nothing, and returns an int."""

        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            pointer = ir.IntType(8).as_pointer()
            kind = ir.FunctionType(I32, [pointer] if takes_address else [])
            function = cgutils.get_or_insert_function(b.module, kind, name)
            result = b.call(function, [b.inttoptr(args[0], pointer)] if takes_address else [])
            return b.sext(result, I64)

        return types.intp(types.intp), codegen

    return call


sem_post = _library_call("sem_post", True)
sem_wait = _library_call("sem_wait", True)
sem_trywait = _library_call("sem_trywait", True)
sched_yield = _library_call("sched_yield", False)


def _serial(function, params, first, last):
    for index in range(first, last):
        call_task(function, params, index, 0)


@jit.inline
def _take(pool, slot):
    """Runs tasks of an open launch until none is left: first the thread's own, then those of the threads after it."""
    p = words(pool)
    slots = p[SLOTS]
    for turn in range(slots):
        place = THREAD + (slot + turn) % slots * THREAD_WORDS
        index = fetch_add(pool + 8 * (place + NEXT), 1)
        while index < p[place + LAST]:
            call_task(p[TASK], p[PARAMS], index, slot)
            index = fetch_add(pool + 8 * (place + NEXT), 1)


def _work(pool):
    """A worker's life: sleep, look whether a launch is open, take its tasks."""
    p = words(pool)
    number = fetch_add(pool + 8 * BORN, 1) + 1
    if number >= MOST_THREADS:
        return
    bell = pool + 8 * (THREAD + number * THREAD_WORDS + BELL)
    while True:
        tries = 0
        while sem_trywait(bell) != 0:
            tries += 1
            if tries > PATIENCE:
                sem_wait(bell)
                break
            sched_yield(0)
        if fetch_add(pool + 8 * STOP, 0) != 0:
            return
        fetch_add(pool + 8 * ACTIVE, 1)  # before looking: who closes a launch waits for all who may have seen it open
        if fetch_add(pool + 8 * OPEN, 0) != 0 and number < p[SLOTS]:
            _take(pool, number)
        fetch_add(pool + 8 * ACTIVE, -1)


def _launch(pool, function, params, first, last, slots):
    """Opens a launch, wakes slots - 1 workers, works, closes the launch and waits for who is still at a task."""
    p = words(pool)
    p[TASK], p[PARAMS], p[SLOTS] = function, params, slots
    for slot in range(slots):
        place = THREAD + slot * THREAD_WORDS
        p[place + LAST] = first + (last - first) * (slot + 1) // slots
        exchange(pool + 8 * (place + NEXT), first + (last - first) * slot // slots)
    exchange(pool + 8 * OPEN, 1)
    for slot in range(1, slots):
        sem_post(pool + 8 * (THREAD + slot * THREAD_WORDS + BELL))
    _take(pool, 0)
    exchange(pool + 8 * OPEN, 0)
    while fetch_add(pool + 8 * ACTIVE, 0) != 0:
        sched_yield(0)


@functools.cache
def _serial_entry() -> Callable[..., None]:
    return jit.entry(types.void(*[types.int64] * 4), _serial)


@functools.cache
def _work_entry() -> Callable[..., None]:
    return jit.entry(types.void(types.int64), _work)


@functools.cache
def _launch_entry() -> Callable[..., None]:
    return jit.entry(types.void(*[types.int64] * 6), _launch)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Pool:
    """Worker threads and the block of words through which they are given launches."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one launch at a time
        area = allocate(8 * (THREAD + MOST_THREADS * THREAD_WORDS))
        # A worker may look at the words while the interpreter dismantles itself: they are never freed.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(area.array))
        area.array[:] = 0
        self.address = area.start
        start = area.start - address(area.array)
        self.words = area.array[start : start + area.size].view(np.int64)
        self.workers: list[threading.Thread] = []
        for number in range(MOST_THREADS):
            _libc().sem_init(self._bell(number), 0, 0)

    def _bell(self, number: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.address + 8 * (THREAD + number * THREAD_WORDS + BELL))

    def grow(self, count: int) -> None:
        """Makes sure that there are `count` workers, or as many as the system allows: fewer only take longer."""
        while len(self.workers) < count:
            name = f"fusionops-{len(self.workers) + 1}"
            worker = threading.Thread(target=_work_entry(), args=(self.address,), name=name, daemon=True)
            try:
                worker.start()
            except RuntimeError as error:
                LOG.info("no more than %d threads: %s", len(self.workers) + 1, error)
                return
            self.workers.append(worker)

    def stop(self) -> None:
        """Ends the workers, so that none is in compiled code when that goes."""
        self.words[STOP] = 1
        for number in range(1, max(len(self.workers), int(self.words[BORN])) + 1):  # some may be about to begin
            _libc().sem_post(self._bell(number))
        for worker in self.workers:
            worker.join(timeout=1.0)


_POOL: Pool | None = None
_POOL_LOCK = threading.Lock()


def _pool() -> Pool:
    global _POOL
    if _POOL is None:
        with _POOL_LOCK:
            if _POOL is None:
                _POOL = Pool()
                atexit.register(_POOL.stop)
    return _POOL


def _forget_pool() -> None:
    """In a forked child, where the workers do not exist: the next launch makes a pool of its own."""
    global _POOL, _POOL_LOCK
    if _POOL is not None:
        atexit.unregister(_POOL.stop)
    _POOL, _POOL_LOCK = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)

# Below this much work in all, waking a second thread costs more than it saves: 8 µs of one core at 125 GFLOP/s.
SERIAL_FLOPS = 1.0e6

# Python sees signals only between launches, so a launch ends after about this much work of each thread: 50 ms at
# 100 GFLOP/s. Shorter launches cost more waiting for the last task of each.
LAUNCH_FLOPS = 5.0e9


@functools.cache
def available_threads() -> int:
    """Cores this process may run on when it first asks, at most NUMBA_NUM_THREADS; 1 where there are no semaphores."""
    if not sys.platform.startswith("linux"):
        return 1
    return min(len(os.sched_getaffinity(0)), int(numba.config.NUMBA_NUM_THREADS))


_requested: int | None = None


def set_num_threads(count: int) -> None:
    """Threads that later calls use, in every Python thread."""
    global _requested
    _requested = count


def get_num_threads() -> int:
    return _requested if _requested is not None else available_threads()


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """set_num_threads for the body of a with statement."""
    global _requested
    before, _requested = _requested, count
    try:
        yield
    finally:
        _requested = before


def parallel_for(task: int, params: int, tasks: int, threads: int, flops_per_task: float) -> None:
    """Runs `tasks` tasks on up to `threads` threads; a task that computes little counts as what FLOPs take as long.

    While another Python thread's launch has the pool, the caller works alone: the bits are the same.
    """
    flops = tasks * flops_per_task
    if threads > 1 and tasks > 1 and flops >= SERIAL_FLOPS:
        pool, count = _pool(), min(threads, MOST_THREADS)
        if pool.lock.acquire(blocking=False):
            try:
                pool.grow(count - 1)
                launch = _launch_entry()
                for first, last in _slices(tasks, flops, count):
                    launch(pool.address, task, params, first, last, count)
            finally:
                pool.lock.release()
            return
    run = _serial_entry()
    if flops <= LAUNCH_FLOPS:
        run(task, params, 0, tasks)
        return
    for first, last in _slices(tasks, flops, 1):
        run(task, params, first, last)


def _slices(tasks: int, flops: float, threads: int) -> Sequence[tuple[int, int]]:
    """The ranges of tasks after each of which Python is returned to: LAUNCH_FLOPS of each thread."""
    if flops <= threads * LAUNCH_FLOPS:
        return ((0, tasks),)
    step = max(threads, int(threads * LAUNCH_FLOPS * tasks / flops))
    return [(first, min(tasks, first + step)) for first in range(0, tasks, step)]


def prepare() -> None:
    """Compiles the launchers."""
    _serial_entry()
    _work_entry()
    _launch_entry()
