"""A stand-in for cupy.RawModule that compiles CUDA C with g++ and runs it on NumPy arrays.

Refuses what CUDA or CuPy would refuse. Cannot see what only devices have: PTX, memory ordering, bank conflicts, speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
OS_THREADS = len(os.sched_getaffinity(0))

FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-march=native"),
    "-ffp-contract=off",  # each operation rounds on its own: what is fused, the kernel says
    "-Werror=frame-larger-than=65536",  # half a fiber's stack: a larger frame could step over the canary at its end
    # Thread-local pointers without a call; glibc keeps static storage for the few bytes of libraries loaded late.
    "-ftls-model=initial-exec",
)
# A misaligned access is an error on a device, so it is one here, reported by fibers.cpp; this costs half the speed.
KERNEL_FLAGS = ("-fsanitize=alignment",)
SANITIZE = ("-fsanitize=address,bounds", "-fno-omit-frame-pointer", "-g")

# What CUDA allows, for every device since sm_80.
THREADS_MAX = 1024
BLOCK_MAX = (1024, 1024, 64)
GRID_MAX = (2**31 - 1, 65_535, 65_535)
SHARED_DEFAULT_BYTES = 48 * 1024
SHARED_MAX_BYTES = 227 * 1024  # sm_90

SCALARS = (np.int32, np.int64, np.uint32, np.uint64, np.float32, np.float64)
EXTERN_C = re.compile(r'extern\s+"C"\s+__attribute__\(\(used\)\)\s+void\s+(\w+)\s*\(')

_order: int | None = None


class CompileError(RuntimeError):
    """The host compiler refused the source."""


class LaunchRefused(RuntimeError):
    """CUDA or CuPy would not launch this, or would launch it with other arguments than meant."""


class KernelFault(RuntimeError):
    """The kernel did what no correct kernel does."""


@contextmanager
def thread_order(order: int) -> Iterator[None]:
    """Run every launch in this order of threads: 0 forward, 1 reverse (blocks too), from 2 on a seed of random ones."""
    global _order
    before, _order = _order, order
    try:
        yield
    finally:
        _order = before


class _Parameter(ctypes.Structure):
    """fusionops_host::Parameter of cuda_on_host.h."""

    _fields_ = (
        ("kind", ctypes.c_char),
        ("element_kind", ctypes.c_char),
        ("is_const", ctypes.c_uint16),
        ("bytes", ctypes.c_uint32),
        ("element_bytes", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    """fusionops_host::Launch of fibers.h."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("patience_s", ctypes.c_double),
        ("next_block", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("failed", ctypes.c_uint32),
        ("error", ctypes.c_char * 1020),
    )


class _Kernel(ctypes.Structure):
    """fusionops_host::Kernel of cuda_on_host.h."""

    _fields_ = (
        ("run", ctypes.CFUNCTYPE(None, ctypes.POINTER(_Launch), ctypes.c_char_p)),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("count", ctypes.c_uint64),
    )


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """OS threads beside the calling one, for the blocks of a launch. One pool a process: a fork has no threads."""
    return ThreadPoolExecutor(OS_THREADS, thread_name_prefix=f"host_cuda-{process}")


def _compiler(*arguments: str, source: str) -> tuple[str, str]:
    """What g++ writes to its two outputs when it reads the source."""
    environment = os.environ | {"LD_PRELOAD": ""}  # what sanitizer_environment preloads is not for the compiler
    command = ["g++", *arguments]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise CompileError(f"g++ {' '.join(arguments)}\n{done.stderr}")
    return done.stdout, done.stderr


@cache
def _host(flags: tuple[str, ...]) -> str:
    """The compiler's version and what -march=native stands for here."""
    return _compiler(*flags, "-###", "-E", "-x", "c++", "-", source="")[1]


def _library(preprocessed: str, flags: tuple[str, ...], *libraries: str) -> Path:
    """A shared library from preprocessed C++, out of the cache if it was compiled before."""
    default = Path(tempfile.gettempdir()) / f"fusionops-host-cuda-{os.getuid()}"
    folder = Path(os.environ.get("FUSIONOPS_HOST_CUDA_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = (*flags, "-shared", "-x", "c++-cpp-output", "-", "-x", "none", *libraries)
    everything = "\0".join((_host(flags), *command, preprocessed))
    path = folder / f"{hashlib.sha256(everything.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            new = f"{place}/new.so"
            _compiler(*command, "-o", new, source=preprocessed)
            os.replace(new, path)  # a process that looks meanwhile finds all of it or nothing
    return path


@cache
def _scheduler(flags: tuple[str, ...]) -> Path:
    """The library with fibers.cpp, which all modules of a process share, and with it the stacks of its OS threads."""
    preprocessed, _ = _compiler(*flags, "-E", "-I", str(HERE), "-x", "c++", "-", source='#include "fibers.cpp"\n')
    return _library(preprocessed, flags)


def _translated(options: Sequence[str]) -> tuple[list[str], str]:
    """Options of NVRTC as options of g++ and as #define lines, which cuda_on_host.h need not know of."""
    folders, definitions = [], ""
    for option in options:
        if option.startswith("-I"):
            folders.append(option)
        elif option.startswith("-D"):
            name, _, value = option.removeprefix("-D").partition("=")
            definitions += f"#define {name} {value or 1}\n"
        elif option not in ("-std=c++17", "--std=c++17") and not option.startswith(("-arch=", "--gpu-architecture=")):
            raise ValueError(f"option {option!r} is unknown; known are -D…, -I…, -std=c++17 and -arch=…")
    return folders, definitions


def sanitizer_environment() -> dict[str, str]:
    """Environment in which a new Python process can run modules with sanitize=True."""
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # Python leaves memory to the end of the process, which is no leak of ours.
    return {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}


@dataclass(frozen=True)
class LaunchStatistics:
    """What a launch took: blocks, and switches between the threads of a block."""

    blocks: int
    switches: int


class HostModule:
    """Kernels of a CUDA C source: those named in name_expressions, and each that is extern "C".

    options   of NVRTC: -D…, -I…, -std=c++17; -arch=… is ignored
    order     of the threads of a block, as for thread_order, which has precedence
    sanitize  with the address sanitizer; needs a process that was started in sanitizer_environment()
    checks_alignment  whether a misaligned access is an error, as on a device
    """

    def __init__(
        self,
        code: str,
        options: Sequence[str] = (),
        name_expressions: Sequence[str] = (),
        *,
        order: int = 0,
        sanitize: bool = False,
        checks_alignment: bool = True,
    ) -> None:
        if sanitize and not hasattr(ctypes.CDLL(None), "__asan_init"):
            raise RuntimeError("the address sanitizer is not in this process: start it in sanitizer_environment()")
        common = (*FLAGS, *SANITIZE) if sanitize else FLAGS
        flags = (*common, *KERNEL_FLAGS) if checks_alignment else common
        folders, definitions = _translated(options)
        source = f'#include "cuda_on_host.h"\n{definitions}#line 1 "kernel.cu"\n{code}\n'
        preprocessed, _ = _compiler(*flags, "-E", "-I", str(HERE), *folders, "-x", "c++", "-", source=source)
        names = tuple(dict.fromkeys((*name_expressions, *EXTERN_C.findall(preprocessed))))
        if not names:
            raise CompileError('the source has no extern "C" kernel, and no name_expressions were given')
        table = "".join(f'\n# 1 "{name}"\nfusionops_host::kernel<({name})>,' for name in names)
        preprocessed += f'extern "C" const fusionops_host::Kernel fusionops_kernels[] = {{{table}}};\n'
        path = _library(preprocessed, flags, str(_scheduler(common)))
        self._kernels = (_Kernel * len(names)).in_dll(ctypes.CDLL(str(path)), "fusionops_kernels")
        self._functions = {name: HostFunction(self, name, self._kernels[i]) for i, name in enumerate(names)}
        self.order = order
        self.patience_s = 10.0  # how long the threads of a block may call yield() without anything else happening
        self.last_launch: LaunchStatistics | None = None

    def get_function(self, name: str) -> HostFunction:
        if name not in self._functions:
            raise LookupError(f'no kernel {name!r}: make it extern "C" or give it in name_expressions')
        return self._functions[name]


class HostFunction:
    """A kernel, called as CuPy's: function(grid, block, args, shared_mem=bytes). The call returns when it has run."""

    def __init__(self, module: HostModule, name: str, kernel: _Kernel) -> None:
        self.name = name
        self._module = module
        self._run = kernel.run
        self._parameters = kernel.parameters[: kernel.count]
        self._shared_limit = SHARED_DEFAULT_BYTES

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._shared_limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, limit: int) -> None:
        if limit > SHARED_MAX_BYTES:
            raise self._refusal(f"max_dynamic_shared_size_bytes is {limit}, a block has {SHARED_MAX_BYTES}")
        self._shared_limit = limit

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[object], *, shared_mem: int = 0
    ) -> None:
        blocks = self._extent("grid", grid, GRID_MAX)
        threads = self._extent("block", block, BLOCK_MAX)
        if math.prod(threads) > THREADS_MAX:
            raise self._refusal(f"a block of {block} is {math.prod(threads)} threads, {THREADS_MAX} are allowed")
        if not 0 <= shared_mem <= self._shared_limit:
            limit = f"max_dynamic_shared_size_bytes is {self._shared_limit}"
            raise self._refusal(f"{shared_mem} bytes of shared memory, but {limit}")
        if len(args) != len(self._parameters):
            raise self._refusal(f"{len(args)} arguments for {len(self._parameters)} parameters")
        packed = b"".join(map(self._packed, range(len(args)), self._parameters, args))
        order = self._module.order if _order is None else _order
        launch = _Launch(blocks, threads, shared_mem, order, self._module.patience_s)
        self._run_blocks(launch, packed, min(math.prod(blocks), OS_THREADS))
        self._module.last_launch = LaunchStatistics(math.prod(blocks), launch.switches)
        if launch.failed:
            raise KernelFault(f"{self.name}: {launch.error.decode()}")

    def _run_blocks(self, launch: _Launch, packed: bytes, os_threads: int) -> None:
        helpers = []
        if os_threads > 1:
            pool = _pool(os.getpid())
            helpers = [pool.submit(self._run, launch, packed) for _ in range(os_threads - 1)]
        self._run(launch, packed)
        for helper in helpers:
            if not helper.cancel():  # too late: it has begun
                helper.result()

    def _refusal(self, reason: str) -> LaunchRefused:
        return LaunchRefused(f"{self.name}: {reason}")

    def _extent(self, what: str, extent: tuple[int, ...], limits: tuple[int, int, int]) -> tuple[int, ...]:
        if not (isinstance(extent, tuple) and 1 <= len(extent) <= 3):
            raise self._refusal(f"{what} is {extent!r}, needs a tuple of one to three integers")
        for axis, size, limit in zip("xyz", extent, limits, strict=False):
            if not (isinstance(size, int | np.integer) and 1 <= size <= limit):
                raise self._refusal(f"{what}.{axis} is {size}, needs an integer from 1 to {limit}")
        return (*map(int, extent), 1, 1)[:3]

    def _packed(self, position: int, parameter: _Parameter, value: object) -> bytes:
        """The bytes of an argument, provided that they are what the kernel takes them for."""
        reason = _mismatch(parameter, value)
        if reason is not None:
            raise self._refusal(f"args[{position}] {reason}")
        if parameter.kind == b"p":
            return (0 if value is None else value.ctypes.data).to_bytes(8, sys.byteorder)
        return value.tobytes()


def _mismatch(parameter: _Parameter, value: object) -> str | None:
    """Why a value cannot be the argument for a parameter; None if it can."""
    kind, name = parameter.kind.decode(), type(value).__name__
    if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
        return f"is a Python {name}, which CuPy passes as 8 or 16 bytes; needs a NumPy scalar"
    if kind == "p":
        return None if value is None else _pointer_mismatch(parameter, value)
    if kind == "s":
        if not (isinstance(value, np.ndarray) and value.dtype.kind == "V" and value.size == 1):
            return f"is a {name}, the parameter a struct: needs a NumPy array of one element of kind V"
    elif not isinstance(value, SCALARS):
        return f"is a {name}; a number is passed as one of {', '.join(scalar.__name__ for scalar in SCALARS)}"
    elif isinstance(value, np.floating) != (kind == "f"):
        return f"is a {name}, the parameter {'a floating-point number' if kind == 'f' else 'an integer'}"
    if value.nbytes != parameter.bytes:
        return f"has {value.nbytes} bytes, the parameter {parameter.bytes}"
    return None


def _pointer_mismatch(parameter: _Parameter, value: object) -> str | None:
    """As _mismatch. Arrays of bytes pass for anything, and any array for a pointer to structs or bytes."""
    if not isinstance(value, np.ndarray):
        return f"is a {type(value).__name__}, the parameter a pointer: needs an array"
    if not (parameter.is_const or value.flags.writeable):
        return "is a read-only array, the parameter a pointer to what may be written"
    element, size = parameter.element_kind.decode(), parameter.element_bytes
    if element == "s" or 1 in (size, value.itemsize):
        return None
    if value.itemsize != size or (element == "f" and value.dtype.kind != "f"):
        return f"is an array of {value.dtype}, the parameter points to {element}{8 * size}"
    return None
