"""What this machine can do at most, measured now: the FMA peak and the copy bandwidth. Judges no kernel."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusionops.address import address
from fusionops.cpu import stream, threads
from fusionops.cpu.host import device
from fusionops.cpu.jit import task
from fusionops.cpu.memory import allocate
from fusionops.cpu.microkernel import gemm_rows
from fusionops.cpu.simd import VECTOR_BYTES, Lanes, word, words
from fusionops.kernel import Operands
from fusionops.spec import FusionSpec, Merge, SourceSpec

TASK_FLOPS = 1.0e8  # of one task: launches of some 10 ms, which a scheduler's slice does not double
DEPTH = 96  # of the reduction of a tile that is timed: its filters lie in L1


@intrinsic(prefer_literal=True)
def fma_chains(typing, bits, chains, repeats, result):
    """x = x·y + z, `repeats` times in each of `chains` registers that are independent; stores their sum."""
    if not (isinstance(bits, types.IntegerLiteral) and isinstance(chains, types.IntegerLiteral)):
        return None
    signature = types.void(bits, chains, types.intp, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        lanes = Lanes(b, bits.literal_value)
        factor, term = (lanes.load(lanes.pointer(b.add(args[3], word(VECTOR_BYTES * i)))) for i in (1, 2))
        sums = [cgutils.alloca_once_value(b, lanes.constant(i)) for i in range(chains.literal_value)]
        with cgutils.for_range(b, args[2]):
            for s in sums:
                b.store(lanes.multiply_add(b.load(s), factor, term), s)
        total = lanes.constant(0.0)
        for s in sums:
            total = b.fadd(total, b.load(s))
        lanes.store(total, lanes.pointer(args[3]))
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def _chains_task(bits: int, chains: int) -> int:
    def multiply(params, index, slot):
        p = words(params)
        fma_chains(bits, chains, p[0], p[1] + slot * 4096)

    return task(multiply)


@functools.cache
def _tile_task(bits: int, mr: int, nv: int) -> int:
    def multiply(params, index, slot):
        p = words(params)
        for _ in range(p[0]):
            gemm_rows(bits, mr, nv, p[1], 0, p[2], p[3], p[6], p[4] + slot * p[5], 0, p[3], 0, p[1])

    return task(multiply)


def fma_peak(threads_used: int, dtype: str = "float32", seconds: float = 0.2) -> float:
    """FLOP/s of multiply-adds on registers alone, all threads together: the best of many short runs."""
    item = np.dtype(dtype).itemsize
    per_vector = VECTOR_BYTES // device().vector_bytes
    chains = max(2, (device().vector_registers - 4) // per_vector - 1)  # all registers but those of factor and term
    step_flops = 2.0 * chains * VECTOR_BYTES / item
    memory = np.ones(threads_used * 4096, np.uint8).view(dtype)
    memory[:] = 0.5
    params = np.array([int(TASK_FLOPS / step_flops), address(memory)], np.int64)
    return _rate(_chains_task(8 * item, chains), params, params[0] * step_flops, threads_used, seconds)


def tile_rate(threads_used: int, mr: int, nv: int, dtype: str = "float32", seconds: float = 0.2) -> float:
    """FLOP/s of a register tile of mr pixels × nv vectors on operands in L1, timed as `fma_peak` is."""
    item = np.dtype(dtype).itemsize
    width = nv * VECTOR_BYTES // item
    rng = np.random.default_rng(0)
    a, panel = rng.random(DEPTH).astype(dtype), allocate(DEPTH * width * item)  # aligned, as packed filters are
    panel.array[:] = 0
    sums = np.zeros(threads_used * mr * width, dtype)
    step_flops = 2.0 * DEPTH * mr * width
    repeats = int(TASK_FLOPS / step_flops)
    addresses = [address(a), DEPTH, panel.start, address(sums), mr * width * item, width]
    params = np.array([repeats, *addresses], np.int64)
    return _rate(_tile_task(8 * item, mr, nv), params, repeats * step_flops, threads_used, seconds)


def _rate(work: int, params: np.ndarray[Any, Any], flops: float, threads_used: int, seconds: float) -> float:
    tasks = 8 * threads_used

    def run() -> None:
        threads.parallel_for(work, address(params), tasks, threads_used, flops)

    return flops * tasks / _best(run, seconds)


def copy_bandwidth(threads_used: int, nbytes: int, seconds: float = 0.2) -> float:
    """Bytes read plus bytes written per second when an array of `nbytes` is copied with the stores the kernels use."""
    x = np.ones(max(1, nbytes // 4), np.float32)
    out = np.empty_like(x)
    spec = FusionSpec(Merge.ADD, (SourceSpec(x.shape, "float32"),))
    config = stream.plan(spec, device())
    with threads.num_threads(threads_used):
        return 2.0 * x.nbytes / _best(lambda: stream.run_add(spec, config, Operands((x,), (None,)), out), seconds)


def _best(run: Callable[[], None], seconds: float) -> float:
    """Shortest time of one run among those that fit into `seconds`, at least three."""
    run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
