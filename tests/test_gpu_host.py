"""What is said of a machine's GPU, on machines that differ in one thing each: stand-ins for CuPy and its driver."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from fusionops.gpu import host


class CUDARuntimeError(RuntimeError):
    pass


def cupy(version="14.2.0", *, error=None, driver=13000, runtime=13000, capability=(9, 0)):
    def count():
        if error:
            raise CUDARuntimeError(error)
        return 1

    attributes = {
        "ComputeCapabilityMajor": capability[0],
        "ComputeCapabilityMinor": capability[1],
        "MultiProcessorCount": 132,
        "MaxRegistersPerMultiprocessor": 65536,
        "MaxSharedMemoryPerMultiprocessor": 233472,
        "MaxSharedMemoryPerBlockOptin": 232448,
        "MaxThreadsPerMultiProcessor": 2048,
        "L2CacheSize": 62914560,
    }
    calls = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=count,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: runtime,
        getDeviceProperties=lambda device: {"name": b"NVIDIA Pretended"},
    )
    here = SimpleNamespace(id=0, attributes=attributes)
    return SimpleNamespace(__version__=version, cuda=SimpleNamespace(runtime=calls, Device=lambda: here))


@pytest.fixture(autouse=True)
def forget():
    for cached in (host.reasons_unusable, host.device):
        cached.cache_clear()
    yield
    for cached in (host.reasons_unusable, host.device):
        cached.cache_clear()


TOO_OLD = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (None, "CuPy is not installed: pip install fusionops[cuda13] brings it, or fusionops[cuda12]"),
        (cupy("13.6.0"), "CuPy is 13.6.0, needs 14.2 or newer"),
        (cupy(error=TOO_OLD, driver=0), "there is no NVIDIA driver"),
        (cupy(error=TOO_OLD, driver=12040), "the NVIDIA driver supports CUDA 12.4, CuPy needs 13.0"),
        (cupy(error="cudaErrorNoDevice: no device"), "there is no NVIDIA GPU to use: cudaErrorNoDevice: no device"),
        (cupy(capability=(7, 5)), "NVIDIA Pretended has compute capability 7.5, needs 8.0 or higher"),
    ],
)
def test_the_reason_is_told(monkeypatch, library, reason):
    monkeypatch.setitem(sys.modules, "cupy", library)
    assert host.reasons_unusable() == (reason,)
    assert host.facts() == {}


def test_a_usable_gpu_is_described(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy())
    assert host.reasons_unusable() == ()
    assert host.device().multiprocessors == 132
    assert host.device().capability == (9, 0)
    assert host.facts()["gpu"] == "NVIDIA Pretended"


def test_importing_the_backend_imports_no_cupy():
    program = "import sys, fusionops.gpu; sys.exit('cupy' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
