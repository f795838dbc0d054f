"""Time and peak memory of the arms of a comparison: proves the arms equal, runs them turn by turn.

An arm is one merge computed one way. Prints nothing. Run as a program, this file is the child process in which the
memory of one arm is measured.
"""

from __future__ import annotations

import os
import pickle
import platform
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import fusionops as fo
from fusionops import cpu, gpu
from fusionops.compare.instance import Array, Instance, build, explain, normal_numbers, to_numpy
from fusionops.compare.workloads import Workload
from fusionops.cost import Cost
from fusionops.cpu.memory import WORKSPACE
from fusionops.errors import BackendError, FusionError
from fusionops.gpu import probe
from fusionops.spec import Merge

FUSED, MATERIALISED = "fused", "materialised"
TURN_S = 0.03  # of one arm in one round: some calls of a small workload, one of a large one
# Of each of the two arrays of a copy: beyond the last-level cache of a server, within the memory of a laptop.
BANDWIDTH_BYTES = 128 << 20
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Arm:
    """One merge, one way, on one backend; `run` writes `out`, on a GPU some time after it has returned.

    rounds_more   whether the way rounds to a narrow dtype what the fused one does not: a result before its residual
    """

    merge: Merge
    way: str
    run: Callable[[], None]
    out: Array
    kernel: str
    cost: Cost
    backend: str = "cpu"
    rounds_more: bool = False


def arms(instance: Instance) -> list[Arm]:
    """Every merge of the workload, fused and, where it stores anything more, materialised."""
    listed = []
    for merge in instance.workload.merges:
        explained = explain(instance.workload, merge, instance.backend)
        out, kernel, backend = instance.outs[merge], explained.kernel, explained.backend
        listed.append(Arm(merge, FUSED, partial(instance.fused, merge), out, kernel, explained.cost, backend))
        if instance.workload.ways_differ:
            run = partial(instance.materialised, merge)
            rounds_more = instance.workload.residual is not None and instance.workload.dtype == "float16"
            cost = explained.cost.materialised
            listed.append(Arm(merge, MATERIALISED, run, out, kernel, cost, backend, rounds_more))
    return listed


SEES_UPSAMPLING = "_commuted_"  # in a kernel's name
# Relative L2, of a call without strict=True. Promised of float32; float64 is held to as many of its roundings; float16
# is computed in float32 and rounded once.
PROMISED_ERROR = {"float32": 4e-6, "float64": 4e-6 * 2.0**-29, "float16": 4e-6 + 2.0**-11}


def differences(compared: Sequence[Arm]) -> list[str]:
    """Runs every arm and says how results differ that should not: ways, and then backends.

    A materialised way has the bits of the fused one. Excepted is a kernel that multiplies before it upsamples: it may
    round a stored map's products otherwise, as docs/numerics.md says. So may another backend, and a way that stores
    narrow numbers before it adds a residual. Both results then lie within the error promised, hence within twice that
    of one another.
    """
    found = []
    fused: dict[tuple[str, Merge], Array] = {}
    others: dict[Merge, tuple[str, Array]] = {}
    for arm in compared:
        result = _result(arm)
        expected = fused.setdefault((arm.backend, arm.merge), result)
        may_differ = SEES_UPSAMPLING in arm.kernel or arm.rounds_more
        if not _same_bits(expected, result) and not (may_differ and _is_near(expected, result)):
            found.append(f"{arm.merge}: {_how_far(expected, result)}")
        if np.isnan(result).any():
            found.append(f"{arm.merge} {arm.way}: some results were never written")
        other, expected = others.setdefault(arm.merge, (arm.backend, result))
        if arm.way == FUSED and other != arm.backend and not _is_near(expected, result):
            found.append(f"{arm.merge}, {arm.backend} against {other}: {_how_far(expected, result)}")
    return found


def _result(arm: Arm) -> Array:
    with _named(arm):
        arm.out.fill(np.nan)
        arm.run()
        return to_numpy(arm.out).copy()


@contextmanager
def _named(arm: Arm) -> Iterator[None]:
    """What goes wrong on a GPU is seen by the next call that waits for it: says at least which arm that was."""
    try:
        yield
    except FusionError:
        raise
    except RuntimeError as error:  # CuPy's errors of CUDA are such
        if arm.backend != "gpu":
            raise
        hint = "FUSIONOPS_SYNC=1 fusionops check --backend gpu names the kernel"
        raise BackendError(f"{arm.merge} {arm.way} failed on the GPU: {error}\nhint: {hint}") from error


def _same_bits(one: Array, other: Array) -> bool:
    return bool((_bits(one) == _bits(other)).all())


def _is_near(one: Array, other: Array) -> bool:
    wide, difference = one.astype(np.float64), one.astype(np.float64) - other
    return bool(np.linalg.norm(difference) <= 2 * PROMISED_ERROR[one.dtype.name] * np.linalg.norm(wide))


def _how_far(one: Array, other: Array) -> str:
    unequal = np.count_nonzero(_bits(one) != _bits(other))
    return f"{unequal} of {one.size} results differ, by up to {np.abs(one - other).max():.3g}"


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


class Times(NamedTuple):
    """Seconds of a call.

    seconds   of the backend at work
    host_s    until the call returned, where that is another time: on a GPU
    """

    seconds: float
    host_s: float | None = None


def rounds(compared: Sequence[Arm], count: int, advance: Callable[[], None] = lambda: None) -> list[tuple[Times, ...]]:
    """The times of a call of each arm in each round: medians of as many calls as fit in a turn.

    The arms take turns within a round and each round begins with another one. The first call of a turn is not counted:
    it finds in the cache what the arm before it left there.
    """
    clocks = {backend: _clock(backend) for backend in {arm.backend for arm in compared}}
    measured: list[list[Times]] = [[] for _ in compared]
    for turn in range(count):
        for place in range(len(compared)):
            index = (turn + place) % len(compared)
            arm = compared[index]
            with _named(arm):
                measured[index].append(_turn(arm.run, clocks[arm.backend]))
            advance()
    return [tuple(times) for times in measured]


def _turn(run: Callable[[], None], clock: Callable[[Callable[[], None]], Times]) -> Times:
    run()
    times: list[Times] = []
    end = time.perf_counter() + TURN_S
    while not times or time.perf_counter() < end:
        times.append(clock(run))
    host = [each.host_s for each in times if each.host_s is not None]
    return Times(median(each.seconds for each in times), median(host) if host else None)


def _clock(backend: str) -> Callable[[Callable[[], None]], Times]:
    """What times one call on a backend."""
    if backend == "gpu":
        clock = probe.Clock()
        return lambda run: Times(*clock(run))
    return _cpu_time


def _cpu_time(run: Callable[[], None]) -> Times:
    begin = time.perf_counter()
    run()
    return Times(time.perf_counter() - begin)


class Peak(NamedTuple):
    """The most memory a call holds beside what it is given and what it returns, bytes.

    traced     as Python's allocators saw it, or on a GPU CuPy's pool
    resident   as the memory of the process grew; None where the system does not tell, and on a GPU
    """

    traced: int
    resident: int | None


def allocated_peak(arm: Arm) -> Peak:
    """The memory of an arm that has run before, as allocated, in this process."""
    return Peak((probe.pool_peak if arm.backend == "gpu" else traced_peak)(arm.run), None)


def traced_peak(run: Callable[[], None]) -> int:
    """`Peak.traced` of a call that has run before; scratch kept from earlier calls is given up first, so it counts."""
    WORKSPACE.clear()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident_peak(run: Callable[[], None]) -> int | None:
    """`Peak.resident` of a call that has run before."""
    if not STATUS.exists():
        return None
    WORKSPACE.clear()
    before = _resident_bytes("VmRSS")
    with suppress(OSError):  # where it is forbidden, the peak of the first run stands, which was the same call
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise BackendError(f"{STATUS} has no {name}")


def memory_peak(workload: Workload, merge: Merge, way: str, *, backend: str | None, threads: int | None) -> Peak:
    """The memory of one arm on the CPU, in a process of its own, where nothing else has been allocated before."""
    root = str(Path(fo.__file__).parent.parent)
    # Arrays come from the system and return to it at once, so that resident memory shows them; else the C library keeps
    # those of the first call for the second.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=pickle.dumps((workload, merge, way, backend, threads)),
            capture_output=True,
            env=environment,
            check=True,
        )
    except subprocess.CalledProcessError as failure:
        last = failure.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BackendError(
            f"the process that measures the memory of {merge} {way} failed: {''.join(last)}"
        ) from failure
    return Peak(*pickle.loads(done.stdout))


def _child(stdin: BinaryIO, stdout: BinaryIO) -> None:
    workload, merge, way, backend, threads = pickle.load(stdin)
    if threads is not None:
        fo.set_num_threads(threads)
    instance = build(workload, normal_numbers(), backend)
    run = partial(instance.fused if way == FUSED else instance.materialised, merge)
    run()
    resident = resident_peak(run)
    pickle.dump((traced_peak(run), resident), stdout)


def default_threads() -> int:
    """Threads that calls use unless told otherwise."""
    return cpu.get_num_threads()


class Limits(NamedTuple):
    """The most the machine did: FLOP/s of multiply-adds on registers, bytes/s read and written by a copy."""

    peak_flops: float
    bandwidth: float


def limits(dtype: str, threads: int) -> Limits:
    """Measured now. Other programs can only lower it, so the larger of several measurements is the truer one."""
    return Limits(
        cpu.fma_peak(threads, "float32" if dtype == "float16" else dtype), cpu.copy_bandwidth(threads, BANDWIDTH_BYTES)
    )


def gpu_machine() -> dict[str, Any]:
    """What the figures of the gpu backend were measured on. Its FLOP rate is not measured."""
    return gpu.facts() | {"bandwidth": probe.copy_bandwidth()}


def machine(threads: int, *measured: Limits) -> dict[str, Any]:
    """What the figures were measured on, with the largest of the limits measured beside them."""
    facts = fo.info()
    return {
        "processor": facts.facts["processor"],
        "cores": facts.facts["cores"],
        "threads": threads,
        "vector_bytes": cpu.device().vector_bytes,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": facts.facts["numba"],
        "fusionops": facts.version,
        "peak_flops": max(limit.peak_flops for limit in measured),
        "bandwidth": max(limit.bandwidth for limit in measured),
    }


if __name__ == "__main__":
    _child(sys.stdin.buffer, sys.stdout.buffer)
