"""A GPU to use where there is none: fake_cupy for CuPy, the host for its kernels. As a plugin of pytest, for all tests.

Its times and copy rate are those of fake_cupy's clock, so they are known beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import fake_cupy as cp
import pytest
from gpu_on_host import HostRuntime

from fusionops import dispatch
from fusionops.gpu import host, module, probe

LAUNCH_NS = 5_000_000  # of the device for each kernel: more than the host needs for the small ones of tests
ARRAY_BYTES = 1 << 16  # in place of those that pass every cache


class FakeCupyRuntime(HostRuntime):
    arrays = cp

    def function(self, source, name):
        cp.enqueue(LAUNCH_NS)
        return super().function(source, name)

    def address(self, array):
        return array.data.ptr

    def wait(self):
        super().wait()
        now = cp.Event()
        now.record()
        now.synchronize()


def forget() -> None:
    of_the_machine = host.machine_reasons, host._device, host.compiler
    for cached in (*of_the_machine, dispatch.backend, dispatch.choose):
        cached.cache_clear()


@contextmanager
def usable_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupyRuntime]:
    monkeypatch.setitem(sys.modules, "cupy", cp)
    monkeypatch.setattr(probe, "BEYOND_CACHES", ARRAY_BYTES)
    forget()
    with module.use(FakeCupyRuntime()) as runtime:
        yield runtime
    forget()


def pytest_configure(config: pytest.Config) -> None:
    monkeypatch = pytest.MonkeyPatch()
    context = usable_gpu(monkeypatch)
    context.__enter__()
    config.add_cleanup(lambda: (context.__exit__(None, None, None), monkeypatch.undo()))
