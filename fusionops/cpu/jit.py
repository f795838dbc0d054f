"""Compilation policy of the CPU backend: the one place for compiler flags, the on-disk cache and lazy compilation.

Contains no arithmetic. Everything compiled here is compiled at its first use, never at import.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numba
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

T = TypeVar("T")
LOG = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {
    # No fastmath, not even "contract": a fused multiply-add is written out where it is wanted (Lanes.multiply_add), and
    # the merge must round products and sums one by one to equal NumPy's bits. A NaN in the input must reach the output.
    "fastmath": False,
    # Division follows IEEE instead of raising: nothing may raise inside a kernel.
    "error_model": "numpy",
    # Nothing is allocated inside a kernel, so nothing is counted either: machine code needs no runtime to be loaded.
    "_nrt": False,
}

_LOCK = RLock()  # compilation is rare; numba's cache location is process-wide while one is under way


def _forget_lock() -> None:
    """In a forked child, where the thread that held the lock may not exist."""
    global _LOCK
    _LOCK = RLock()


os.register_at_fork(after_in_child=_forget_lock)

# What a damaged or half-written cache entry raises when it is loaded.
CACHE_ERRORS = (EOFError, pickle.UnpicklingError, OSError, ValueError, KeyError, IndexError, AttributeError,
                ImportError, TypeError, RuntimeError)  # fmt: skip


@functools.cache
def source_digest() -> str:
    """A hash of the sources that kernels are made of: numba does not notice that a callee in another file changed."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):  # with the contract, whose constants they hold
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cache_directory() -> str | None:
    """Where compiled kernels are kept between processes, or None where nothing can be written."""
    roots = [numba.config.CACHE_DIR] if numba.config.CACHE_DIR else [os.environ.get("XDG_CACHE_HOME"), "~/.cache"]
    for root in roots:
        if not root:
            continue
        path = Path(root).expanduser() / f"fusionops-{source_digest()}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return str(path)
        except (OSError, RuntimeError) as error:
            LOG.info("kernels are not cached in %s: %s", path, error)
    return None


@contextmanager
def _numba_cache_in(directory: str) -> Iterator[None]:
    """Points numba's cache at `directory` while a function of ours is decorated; the user's own setting comes back."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = directory
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _compile(make: Callable[[bool], T]) -> T:
    """make(cache), with the cache where there is one; a damaged cache is thrown away and made anew, once."""
    with _LOCK:
        directory = cache_directory()
        if directory is None:
            return make(False)
        with _numba_cache_in(directory):
            try:
                return make(True)
            except CACHE_ERRORS as error:
                LOG.warning("the kernel cache %s is damaged and is rebuilt: %s", directory, error)
                shutil.rmtree(directory, ignore_errors=True)
                Path(directory).mkdir(parents=True, exist_ok=True)
            try:
                return make(True)
            except CACHE_ERRORS as error:  # a full disk, say: what cannot be kept can still be run
                LOG.warning("kernels cannot be kept in %s: %s", directory, error)
                return make(False)


class _MachineCode(FunctionCache):  # type: ignore[misc]  # its base is untyped in numba
    """numba's cache of functions, from which a load does not fill numba's tables of types and operations.

    Those are for compiling, which fills them by itself; machine code needs none. They take half of the first call of a
    process, and more where SciPy is installed, whose BLAS they look for: 0.84 s with them, 0.42 s without.
    """

    def load_overload(self, signature: Any, context: Any) -> Any:
        with self._guard_against_spurious_io_errors():
            return self._load_overload(signature, context)


def _machine_code(function: Callable[..., None], cache: bool) -> Any:
    """A compiled function of integers that returns nothing, with the `address` of its machine code."""
    made: Any = CFunc(function, ((types.int64,) * function.__code__.co_argcount, types.void), {}, OPTIONS)
    if cache:
        made._cache = _MachineCode(function)
    made.compile()
    return made


def task(function: Callable[..., None]) -> int:
    """Compiles a kernel  task(params, index, slot)  and returns the address of its machine code.

    params   address of the block of int64 that describes the call
    index    which tile of the output
    slot     which of the scratch areas is this thread's

    Or a procedure of kernels, of any number of integers, which they find at an address in the block (`simd.call`): what
    is inlined instead is compiled again by every kernel, and by every function in between.

    What the function holds from where it was made has to be numbers: they are part of its key in the cache, in which
    an object would have another name in each process, and be compiled in each.
    """
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    if not all(isinstance(value, int) for value in held):
        raise TypeError(f"{function.__name__} holds {held}, needs integers alone to be found in the cache")
    compiled = _compile(functools.partial(_machine_code, function))
    _KEEP.append(compiled)
    return int(compiled.address)


def entry(signature: Any, function: Callable[..., Any], *, releases: bool = True) -> Callable[..., Any]:
    """Compiles a function that Python calls; whether it releases the GIL while it runs."""

    def make(cache: bool) -> Callable[..., Any]:
        made: Any = numba.njit(nogil=releases, **OPTIONS)(function)
        if cache:
            made._cache = _MachineCode(function)
        made.compile(signature)
        made.disable_compile()
        _KEEP.append(made)
        # The function itself: the dispatcher would look at the types of its arguments first, for 0.3 µs.
        return made.overloads[signature.args].entry_point  # type: ignore[no-any-return]  # untyped in numba

    return _compile(make)


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call; compiled into each of them, hence without a cache entry of its own."""
    made: Callable[..., Any] = numba.njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)
    return made


def spliced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`inline` for what is called from one place: numba copies it into its caller before it types and compiles that."""
    made: Callable[..., Any] = numba.njit(function, inline="always", **OPTIONS)
    return made


_KEEP: list[object] = []  # machine code lives as long as the object that owns it
