"""What this machine can do at most, measured now: the FMA peak and the copy bandwidth. Judges no kernel."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np

from fusionops.cpu import stream, threads
from fusionops.cpu.host import device
from fusionops.cpu.jit import task
from fusionops.cpu.memory import address
from fusionops.cpu.microkernel import gemm_tile
from fusionops.cpu.simd import VECTOR_BYTES, words
from fusionops.cpu.tiling import register_tiles
from fusionops.kernel import Operands
from fusionops.spec import FusionSpec, Merge, SourceSpec

DEPTH = 256  # of the reduction: 64 KiB of filters at most, read from L2 as in a convolution
REPEATS = 800  # of it in a task: launches of some 10 ms, which a scheduler's slice does not double


@functools.cache
def _peak_task(bits: int, mr: int, nv: int) -> int:
    def multiply(params, index, slot):
        p = words(params)
        for _ in range(p[0]):
            gemm_tile(bits, mr, nv, p[1], p[2], 0, 1, 0, 0, 1, 0, 0, p[3], p[4], p[5] + slot * p[6], 0, p[4], 0)

    return task(multiply)


def fma_peak(threads_used: int, dtype: str = "float32", seconds: float = 0.2) -> float:
    """FLOP/s of the register tile alone on operands in the cache, all threads together: the best of many short runs."""
    mr, nv = register_tiles(device())[0]
    item = np.dtype(dtype).itemsize
    width = nv * VECTOR_BYTES // item
    rng = np.random.default_rng(0)
    a, panel = rng.random(DEPTH).astype(dtype), rng.random(DEPTH * width).astype(dtype)
    sums, pixels = np.zeros(threads_used * mr * width, dtype), np.zeros(mr, np.int64)
    words_of_call = [REPEATS, address(a), address(pixels), DEPTH, address(panel), address(sums), mr * width * item]
    params = np.array(words_of_call, np.int64)
    flops = 2.0 * REPEATS * DEPTH * mr * width
    task_address, tasks = _peak_task(8 * item, mr, nv), 8 * threads_used

    def run() -> None:
        threads.parallel_for(task_address, address(params), tasks, threads_used, flops)

    return flops * tasks / _best(run, seconds)


def copy_bandwidth(threads_used: int, nbytes: int, seconds: float = 0.2) -> float:
    """Bytes read plus bytes written per second when an array of `nbytes` is copied with the stores the kernels use."""
    x = np.ones(max(1, nbytes // 4), np.float32)
    out = np.empty_like(x)
    spec = FusionSpec(Merge.ADD, (SourceSpec(x.shape, "float32"),))
    config = stream.plan(spec, device())
    before = threads.get_num_threads()
    threads.set_num_threads(threads_used)
    try:
        return 2.0 * x.nbytes / _best(lambda: stream.run_add(spec, config, Operands((x,), (None,)), out), seconds)
    finally:
        threads.set_num_threads(before)


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
