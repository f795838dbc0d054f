"""The one place that decides which tests do not run, and that says so: nothing else in the suite skips.

Holds no fixtures of a single module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache

import hypothesis
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by its name from here on
import pytest

pytest_plugins = ["pytester"]

# Deterministic: a run is repeatable, and what an earlier run found lives on as a named problem, not in a database.
hypothesis.settings.register_profile("fusionops", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("fusionops")

NOT_RUN = pytest.StashKey[dict[str, list[str]]]()


@cache
def why_no_gpu() -> str | None:
    """Why the tests marked gpu cannot run here; None if they can."""
    try:
        import cupy
    except ImportError as error:
        return f"no CUDA device: {error}"
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if devices else "no CUDA device"


@cache
def why_no_pool(module: str) -> str | None:
    """Why numba cannot run its threads in that pool here; None if it can."""
    try:
        importlib.import_module(f"numba.np.ufunc.{module}")
    except ImportError as error:
        return str(error)
    return None


def why_no_detector() -> str | None:
    """Why the test extra does not install the detector of the example here; None if it does."""
    return "rapidocr-onnxruntime 1.4.4 excludes Python 3.13 and newer" if sys.version_info >= (3, 13) else None


def why_no_cupy() -> str | None:
    """Why stand-ins cannot be held to CuPy here; the test extra leaves open which of its wheels to install."""
    return None if importlib.util.find_spec("cupy") else "CuPy is not installed"


def why_no_torch() -> str | None:
    """Why the tests of what the GPU is timed against cannot run here; the test extra does not install it."""
    return None if importlib.util.find_spec("torch") else "torch is not installed"


# What a test can need, as a marker of that name: what it is, and why it is not here.
NEEDS: dict[str, tuple[str, Callable[[], str | None]]] = {
    "gpu": ("CuPy and a CUDA device", lambda: why_no_gpu()),
    "omp": ("numba's OpenMP threads", lambda: why_no_pool("omppool")),
    "tbb": ("numba's TBB threads", lambda: why_no_pool("tbbpool")),
    "cupy": ("CuPy, if without a driver", why_no_cupy),
    "torch": ("torch, on its CPU", why_no_torch),
    "detector": ("the trained text detector that an example opens", why_no_detector),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail the tests that need a CUDA device if there is none"
    )


def pytest_configure(config: pytest.Config) -> None:
    for need, (what, _) in NEEDS.items():
        config.addinivalue_line("markers", f"{need}: needs {what}")
    config.stash[NOT_RUN] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for need, (_, why_not) in NEEDS.items():
        reason = why_not() if item.get_closest_marker(need) else None
        if reason is None:
            continue
        if need == "gpu" and item.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu, but {reason}", pytrace=False)
        item.config.stash[NOT_RUN].setdefault(need, []).append(item.nodeid)
        pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for need, tests in config.stash[NOT_RUN].items():
        terminalreporter.write_line(f"{need}: {len(tests)} tests not run ({NEEDS[need][1]()})", yellow=True)


@pytest.fixture
def around(monkeypatch):
    """Outputs of every size are stored around the caches, whatever the host's are."""
    from fusionops import dispatch, perform
    from fusionops.cpu import stream

    monkeypatch.setattr(stream, "goes_around", lambda spec, device: True)
    monkeypatch.setattr(perform, "_REPEATED", {})
    dispatch.choose.cache_clear()  # what is remembered is planned for the host
    yield
    dispatch.choose.cache_clear()
