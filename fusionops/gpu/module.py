"""From CUDA C to functions: sources, compiler flags, and the runtime that compiles, addresses and launches.

The one place that launches. Kernels reach CuPy as a `Runtime`; tests put one in its place that executes the same
sources on the host (`use`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusionops.errors import BackendError
from fusionops.gpu import tensor_map

Extent = tuple[int, ...]

FLAGS = (
    "-std=c++17",
    "-fmad=false",  # a multiply-add is written out where it is wanted: the merge rounds products and sums one by one
)
ARCHITECTURES = {"sm90.cu": ("-arch=sm_90a",)}  # CuPy's own would be sm_90, which has none of Hopper's products
BLOCK_SHARED_BYTES = 48 * 1024  # of dynamic shared memory, which every kernel may use unasked

HERE = Path(__file__).parent


class Function(Protocol):
    """A compiled kernel, as CuPy's RawKernel is."""

    max_dynamic_shared_size_bytes: int

    def __call__(self, grid: Extent, block: Extent, args: tuple[Any, ...], *, shared_mem: int = 0) -> Any: ...


class Runtime(Protocol):
    """Where kernels run.

    arrays     the array library whose arrays they take: what has no kernel is left to it
    function(source, name)   an instantiation of a kernel of one of the sources in this folder
    address(array)           of its first element, as the device sees it
    tensor_map(…)            what a kernel needs to copy boxes of a tensor: `TensorMap` in primitives_sm90.cuh
    wait()                   until the current stream has run all that was launched; raises what went wrong
    """

    @property
    def arrays(self) -> Any: ...

    def function(self, source: str, name: str) -> Function: ...

    def address(self, array: Any) -> int: ...

    def tensor_map(self, dtype: str, address: int, extents: Extent, steps: Extent, box: Extent) -> bytes: ...

    def wait(self) -> None: ...


@functools.cache
def read_source(name: str) -> str:
    """A source with the headers of this folder in place: the text alone then decides what CuPy's cache holds."""
    seen: set[str] = set()

    def lines(name: str) -> Iterator[str]:
        seen.add(name)
        for line in (HERE / name).read_text(encoding="utf-8").splitlines():
            included = line.removeprefix('#include "').removesuffix('"') if line.startswith('#include "') else None
            if included is None:
                if line != "#pragma once":
                    yield line
            elif included not in seen:
                yield from lines(included)

    return "\n".join(lines(name)) + "\n"


class CupyRuntime:
    """Kernels compiled by CuPy for the current device, launched on its current stream."""

    def __init__(self) -> None:
        import cupy

        self.arrays: Any = cupy
        self._functions: dict[tuple[int, str, str], Function] = {}

    def function(self, source: str, name: str) -> Function:
        key = self.arrays.cuda.runtime.getDevice(), source, name
        made = self._functions.get(key)
        if made is None:
            options = FLAGS + ARCHITECTURES.get(source, ())
            module = self.arrays.RawModule(code=read_source(source), options=options, name_expressions=(name,))
            try:
                made = self._functions[key] = module.get_function(name)
            except self.arrays.cuda.compiler.CompileException as error:
                raise BackendError(f"{name} of {source} cannot be compiled for this GPU: {error}") from error
        return made

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def tensor_map(self, dtype: str, address: int, extents: Extent, steps: Extent, box: Extent) -> bytes:
        return tensor_map.encode(dtype, address, extents, steps, box)

    def wait(self) -> None:
        self.arrays.cuda.get_current_stream().synchronize()


_runtime: Runtime | None = None


def runtime() -> Runtime:
    """CuPy's, unless a test put another one in its place."""
    global _runtime
    if _runtime is None:
        _runtime = CupyRuntime()
    return _runtime


@contextmanager
def use(other: Runtime) -> Iterator[Runtime]:
    """Lets kernels run in `other` for the body of a with statement."""
    global _runtime
    before, _runtime = _runtime, other
    try:
        yield other
    finally:
        _runtime = before


def launch(
    source: str, name: str, grid: Extent, block: int, params: np.ndarray[Any, Any], shared_bytes: int = 0
) -> None:
    """Starts a kernel whose one parameter is a struct; returns before it has run.

    With FUSIONOPS_SYNC=1 in the environment it waits: what fails is then known by name, not at some later call.
    """
    waits = os.environ.get("FUSIONOPS_SYNC") == "1"
    try:
        function = runtime().function(source, name)
        if shared_bytes > BLOCK_SHARED_BYTES and function.max_dynamic_shared_size_bytes < shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        function(grid, (block,), (params,), shared_mem=shared_bytes)
        if waits:
            runtime().wait()
    except BackendError:  # explained already
        raise
    except RuntimeError as error:  # CuPy's errors of CUDA are such
        hint = "" if waits else "\nhint: an earlier kernel may be to blame; FUSIONOPS_SYNC=1 in the environment tells"
        raise BackendError(f"{name} failed on {grid} blocks of {block} threads: {error}{hint}") from error


def on_device_of(array: Any) -> AbstractContextManager[Any]:
    """Makes the device of `array` the current one for the body of a with statement."""
    context: AbstractContextManager[Any] = array.device
    return context


def empty(shape: Extent, dtype: Any) -> Any:
    """An array with arbitrary contents on the current device."""
    return runtime().arrays.empty(shape, dtype)


def borrow(array: Any) -> Any:
    """Another library's array on a GPU, without a copy: by DLPack, else by `__cuda_array_interface__`."""
    library = runtime().arrays
    return library.from_dlpack(array) if hasattr(array, "__dlpack__") else library.asarray(array)
