"""What is said of a machine's GPU, on machines that differ in one thing each: stand-ins for CuPy and its driver."""

from __future__ import annotations

import subprocess
import sys
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest

from fusionops.errors import BackendError
from fusionops.gpu import host, module


class CUDARuntimeError(RuntimeError):
    pass


def cupy(version="14.2.0", *, error=None, driver=13000, runtime=13000, capability=(9, 0), without_compiler=False):
    def count():
        if error:
            raise CUDARuntimeError(error)
        return 1

    attributes = {
        "MultiProcessorCount": 132,
        "MaxRegistersPerMultiprocessor": 65536,
        "MaxSharedMemoryPerMultiprocessor": 233472,
        "MaxSharedMemoryPerBlockOptin": 232448,
        "MaxThreadsPerMultiProcessor": 2048,
        "L2CacheSize": 62914560,
    }
    calls = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDevice=lambda: 0,
        getDeviceCount=count,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: runtime,
        getDeviceProperties=lambda device: {"name": b"NVIDIA Pretended"},
    )
    here = SimpleNamespace(attributes=attributes, compute_capability="".join(map(str, capability)))

    def compiler():
        if without_compiler:
            raise RuntimeError("libnvrtc.so was not found")
        return 13, 0

    nvrtc = SimpleNamespace(getVersion=compiler)
    return SimpleNamespace(
        __version__=version, cuda=SimpleNamespace(runtime=calls, Device=lambda number: here, nvrtc=nvrtc)
    )


CACHED = host.machine_reasons, host._device, host.compiler


@pytest.fixture(autouse=True)
def forget():
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
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
        (
            cupy(without_compiler=True),
            "CUDA's compiler, NVRTC, cannot be loaded: libnvrtc.so was not found; "
            "pip install fusionops[cuda13] brings it, or fusionops[cuda12]",
        ),
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


def test_a_capability_has_two_parts(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy(capability=(12, 0)))
    assert host.device().capability == (12, 0)


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    class CompileException(Exception):  # CuPy's is no RuntimeError either
        pass

    class Module:
        def __init__(self, **options):
            pass

        def get_function(self, name):
            raise CompileException("line 7: error: identifier is undefined")

    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0), compiler=SimpleNamespace(CompileException=CompileException)
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=Module))
    with pytest.raises(BackendError, match=r"an_add<float> of stream\.cu cannot be compiled .* line 7: error"):
        module.CupyRuntime().function("stream.cu", "an_add<float>")
    with module.use(module.CupyRuntime()), pytest.raises(BackendError) as caught:
        module.launch("stream.cu", "an_add<float>", (1,), 32, np.zeros(1))
    assert "an earlier kernel" not in str(caught.value)


@pytest.mark.cupy
def test_stand_ins_offer_nothing_that_cupy_has_not():
    """CuPy is installed, if without a driver."""
    import cupy as real
    import fake_cupy

    def missing(stand_in, of, ours=()):
        return {name for name in vars(stand_in) if not name.startswith("_")} - set(ours) - set(dir(of))

    assert missing(fake_cupy.cuda, real.cuda) == set()
    assert missing(fake_cupy.cuda.memory, real.cuda.memory, ours=["limit"]) == set()
    assert missing(fake_cupy.cuda.nvrtc, real.cuda.nvrtc) == set()
    made = {name: value for name, value in vars(fake_cupy).items() if getattr(value, "__module__", "") == "fake_cupy"}
    functions = {name for name, value in made.items() if type(value) is FunctionType and not name.startswith("_")}
    assert functions - {"enqueue", "get_elapsed_time"} <= set(dir(real))
    assert missing(fake_cupy.ndarray, real.ndarray) == set()
    for kind in ("Device", "Event", "MemoryHook"):
        assert missing(getattr(fake_cupy, kind), getattr(real.cuda, kind), ours=["at_ns"]) == set()
    for stand_in in (fake_cupy.cuda, cupy().cuda):
        assert missing(stand_in.runtime, real.cuda.runtime) == set()
        assert {f"cudaDevAttr{name}" for name in stand_in.Device(0).attributes} <= set(dir(real.cuda.runtime))


def test_importing_the_backend_imports_no_cupy():
    program = "import sys, fusionops.gpu; sys.exit('cupy' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
