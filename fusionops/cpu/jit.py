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

T = TypeVar("T")
LOG = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {
    # No fastmath, not even "contract": a fused multiply-add is written out where it is wanted (Lanes.multiply_add), and
    # the merge must round products and sums one by one to equal NumPy's bits. A NaN in the input must reach the output.
    "fastmath": False,
    # Division follows IEEE instead of raising: nothing may raise inside a kernel.
    "error_model": "numpy",
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
    """A hash of this package's own sources: numba does not notice that a callee in another file changed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
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


def task(function: Callable[[int, int, int], None]) -> int:
    """Compiles a kernel  task(params, index, slot)  and returns the address of its machine code.

    params   address of the block of int64 that describes the call
    index    which tile of the output
    slot     which of the scratch areas is this thread's
    """
    signature = types.void(types.int64, types.int64, types.int64)
    compiled = _compile(lambda cache: numba.cfunc(signature, cache=cache, **OPTIONS)(function))
    _KEEP.append(compiled)
    return int(compiled.address)


def entry(signature: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function that Python calls, without the GIL while it runs."""

    def make(cache: bool) -> Callable[..., Any]:
        made: Callable[..., Any] = numba.njit(signature, nogil=True, cache=cache, **OPTIONS)(function)
        return made

    return _compile(make)


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call; compiled into each of them, hence without a cache entry of its own."""
    made: Callable[..., Any] = numba.njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)
    return made


_KEEP: list[object] = []  # machine code lives as long as the object that owns it
