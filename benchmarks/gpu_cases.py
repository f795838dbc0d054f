"""The cases by which gpu_check.py proves the GPU backend: every instantiation, every primitive, every kernel."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # whose checks are made here

import primitive_checks
from gpu_parts import Case
from kernel_checks import assert_same_bits, assert_within, expected_of, rng_of

from fusionops import gpu, testing
from fusionops.device import GpuDevice
from fusionops.gpu import grouped, igemm, mma, module, sm90, stream
from fusionops.kernel import Kernel
from fusionops.problems import ALIGNED, ANY_ORDER, PROBLEMS, Problem, join
from fusionops.problems.rows import ADD, CONCAT

# In the order in which a kernel that hangs costs least: what is simple comes first.
FAMILIES = (stream, grouped, igemm, mma, sm90)
KERNELS = tuple(kernel for family in FAMILIES for kernel in family.KERNELS)
RUNS = tuple(
    join(f"runs_{dtype}", merge, (5, 64), (5, 64), dtypes=dtype, axis=1 if merge is CONCAT else 0)
    for merge in (ADD, CONCAT)
    for dtype in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "bool")
)
"""Merges whose rows are whole runs of 16 bytes: few of PROBLEMS are."""
TABLES = (RUNS, PROBLEMS, ANY_ORDER, ALIGNED)
EVERY = tuple(problem for table in TABLES for problem in table)

WATCHED = 6  # problems of each family and table that a sanitizer watches
SMALL = 3e7  # multiply-adds of such a problem at most


def pairs(
    problems: tuple[Problem, ...] = EVERY, kernels: tuple[Kernel, ...] = KERNELS
) -> Iterator[tuple[Kernel, Problem]]:
    for kernel in kernels:
        for problem in problems:
            if not kernel.unsupported(problem.spec):
                yield kernel, problem


def watched() -> Iterator[tuple[Kernel, Problem]]:
    """Of every family some problems of each table, evenly spaced."""
    for family in FAMILIES:
        for table in TABLES:
            small = tuple(problem for problem in table if _work(problem) <= SMALL)
            able = list(pairs(small, family.KERNELS))
            yield from able[:: max(1, len(able) // WATCHED)][:WATCHED]


def _work(problem: Problem) -> float:
    """Multiply-adds, by which a sanitizer's time grows."""
    spec = problem.spec
    return 0.0 if spec.contraction is None else float(np.prod(spec.gemm))


def other_tiles(kernel: Kernel, problem: Problem, device: GpuDevice) -> Iterator[tuple[str, Any]]:
    """Every config that a plan might choose for a larger problem of the kind."""
    spec = problem.spec
    if kernel in sm90.KERNELS:  # other instructions, of which the host's emulation cannot tell
        yield from ((f"{filters} filters", sm90.with_tile(spec, filters, device)) for filters in sm90.FILTERS)
    elif kernel in mma.KERNELS:
        yield from ((f"{filters} filters", mma.with_tile(spec, filters)) for filters in mma.FILTERS)
    elif kernel in igemm.KERNELS:
        tiles = igemm.TILES[igemm.computed_bytes(spec.dtype)]
        yield from ((f"{tile.bm} × {tile.bn}", igemm.with_tile(spec, tile)) for tile in tiles)


def check_case(
    kernel: Kernel,
    problem: Problem,
    device: GpuDevice,
    to_device: Callable[[Any], Any],
    to_host: Callable[[Any], Any],
) -> None:
    """Raises AssertionError where a kernel leaves the bound on random numbers, or repeats itself with other bits."""
    spec = problem.spec
    operands = testing.random_operands(spec, rng_of(problem))
    expected = expected_of(spec, operands)
    there = testing.map_operands(operands, to_device)

    def results(config: Any) -> list[np.ndarray[Any, Any]]:
        out = to_device(np.full(spec.out_shape, np.nan if np.dtype(spec.dtype).kind not in "iub" else 1, spec.dtype))
        if spec.return_sum:
            there.merged = to_device(np.zeros(spec.merged_shape, spec.dtype))
        kernel.run(spec, config, there, out)
        return [to_host(out), *([to_host(there.merged)] if spec.return_sum else [])]

    first = results(kernel.plan(spec, device))
    assert_within(first[0], expected[0], testing.error_bound(spec, operands))
    assert_same_bits(first[1:], expected[1:])
    assert_same_bits(results(kernel.plan(spec, device)), first, "when run again")
    for name, config in other_tiles(kernel, problem, device):
        assert_same_bits(results(config), first, f"with tiles of {name}")


def to_gpu(array: np.ndarray[Any, Any]) -> Any:
    import cupy

    return cupy.asarray(_bits(array)).view(array.dtype)


def to_host(array: Any) -> np.ndarray[Any, Any]:
    host = array.view(np.uint16).get() if array.dtype.name == "bfloat16" else array.get()
    return np.asarray(host).view(array.dtype)


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As another dtype of the same size, where CuPy cannot transfer the array's own."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def compilations() -> list[Case]:
    """Every instantiation that cases and timed layers may ask for, which is all but those that count in 64 bits."""
    hopper = not sm90.lacking(gpu.device())
    return [
        (f"{family.SOURCE} {name}", functools.partial(_compile, family.SOURCE, name))
        for family in reversed(FAMILIES)  # the longest first
        for name in family.SYMBOLS
        if ", u64, " not in name and (family is not sm90 or hopper)
    ]


def _compile(source: str, name: str) -> dict[str, float]:
    begin = time.perf_counter()
    module.runtime().function(source, name)
    return {"seconds": round(time.perf_counter() - begin, 2)}


def primitives() -> list[Case]:
    launch = _launcher(primitive_checks.source(), module.FLAGS, primitive_checks.NAMES)
    checks: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("rounded_arithmetic", primitive_checks.check_rounded_arithmetic, (launch,)),
        ("tf32", primitive_checks.check_tf32, (launch,)),
    ]
    checks += [
        (f"{name} {kind}", getattr(primitive_checks, f"check_{name}"), (launch, kind))
        for kind in primitive_checks.FORMATS
        for name in ("conversions", "pairs", "tile_product")
    ]
    if gpu.device().capability == sm90.CAPABILITY:
        options = module.FLAGS + module.ARCHITECTURES[sm90.SOURCE]
        code = primitive_checks.source(primitive_checks.HOPPER_SOURCE)
        launch = _launcher(code, options, primitive_checks.HOPPER_NAMES)
        for kind in primitive_checks.FORMATS:
            checks.append((f"stored_product {kind}", primitive_checks.check_stored_product, (launch, kind)))
            for filters in primitive_checks.HOPPER_FILTERS:
                name = f"box_product {kind} {filters}"
                checks.append((name, primitive_checks.check_box_product, (launch, kind, filters)))
    return [(name, functools.partial(check, *given)) for name, check, given in checks]


def _launcher(code: str, options: tuple[str, ...], names: tuple[str, ...]) -> primitive_checks.Launch:
    @functools.cache
    def compiled() -> Any:
        import cupy

        return cupy.RawModule(code=code, options=options, name_expressions=names)

    def launch(name: str, blocks: int, threads: int, arguments: tuple[Any, ...], shared_bytes: int) -> None:
        import cupy

        function, given, copies = compiled().get_function(name), [], []
        for each in arguments:
            array = each.array if isinstance(each, primitive_checks.Boxes) else each
            if isinstance(array, np.generic):
                given.append(array)
                continue
            copies.append((array, cupy.asarray(_bits(array))))
            there = copies[-1][1]
            given.append(each.tensor_map(module.runtime(), there.data.ptr) if array is not each else there)
        if shared_bytes > module.BLOCK_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared_bytes
        function((blocks,), (threads,), tuple(given), shared_mem=shared_bytes)
        for array, there in copies:
            _bits(array)[...] = cupy.asnumpy(there)

    return launch


def kernels() -> list[Case]:
    return _cases(pairs(EVERY))


def sanitized() -> list[Case]:
    """Without pools, which would hide what lies beyond an array in a larger block."""
    import cupy

    cupy.cuda.set_allocator(None)
    cupy.cuda.set_pinned_memory_allocator(None)
    return _cases(watched())


def _cases(pairs: Iterator[tuple[Kernel, Problem]]) -> list[Case]:
    """Of the kernels that this GPU can run."""
    here = gpu.device()
    return [_case(kernel, problem) for kernel, problem in pairs if not kernel.lacking(here)]


def _case(kernel: Kernel, problem: Problem) -> Case:
    return f"{kernel.name} {problem.name}", lambda: check_case(kernel, problem, gpu.device(), to_gpu, to_host)


def is_lost() -> bool:
    """Whether the GPU refuses this process whatever it asks: after an illegal access, for one."""
    try:
        module.runtime().arrays.cuda.runtime.deviceSynchronize()
    except RuntimeError:  # CuPy's errors of CUDA are such
        return True
    return False
