"""What this machine's GPU is, and why there may be none to use. Asks CuPy once, when first asked."""

from __future__ import annotations

import functools
from typing import Any

from fusionops.device import GpuDevice

OLDEST_CUPY = (14, 2)  # before it, templates were compiled again in every process
OLDEST_CAPABILITY = (8, 0)


@functools.cache
def reasons_unusable() -> tuple[str, ...]:
    """Every reason why no kernel can run here; empty means they can."""
    try:
        import cupy
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return ("CuPy is not installed: pip install fusionops[cuda13] brings it, or fusionops[cuda12]",)
        return (f"CuPy cannot be imported: {error}",)
    found = tuple(int(part) for part in cupy.__version__.split(".")[:2])
    if found < OLDEST_CUPY:
        return (f"CuPy is {cupy.__version__}, needs {'.'.join(map(str, OLDEST_CUPY))} or newer",)
    runtime = cupy.cuda.runtime
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return (_why_no_device(runtime, error),)
    capability = device().capability
    if capability < OLDEST_CAPABILITY:
        needed = ".".join(map(str, OLDEST_CAPABILITY))
        return (f"{device().name} has compute capability {capability[0]}.{capability[1]}, needs {needed} or higher",)
    return ()


def _why_no_device(runtime: Any, error: Exception) -> str:
    """The driver answers a missing and an old one alike; its version tells them apart."""
    driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver < needed:
        return f"the NVIDIA driver supports CUDA {_version(driver)}, CuPy needs {_version(needed)}"
    return f"there is no NVIDIA GPU to use: {error}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def compiler() -> tuple[int, int]:
    """The version of CUDA whose compiler CuPy calls."""
    import cupy

    major, minor = cupy.cuda.nvrtc.getVersion()
    return major, minor


@functools.cache
def device() -> GpuDevice:
    """The current GPU."""
    import cupy

    here = cupy.cuda.Device()
    attributes = here.attributes
    return GpuDevice(
        cupy.cuda.runtime.getDeviceProperties(here.id)["name"].decode(),
        (attributes["ComputeCapabilityMajor"], attributes["ComputeCapabilityMinor"]),
        attributes["MultiProcessorCount"],
        attributes["MaxRegistersPerMultiprocessor"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxThreadsPerMultiProcessor"],
        attributes["L2CacheSize"],
    )


def facts() -> dict[str, object]:
    """What is worth knowing of the GPU and its libraries."""
    if reasons_unusable():
        return {}
    import cupy

    here = device()
    return {
        "cupy": cupy.__version__,
        "gpu": here.name,
        "compute capability": ".".join(map(str, here.capability)),
        "multiprocessors": here.multiprocessors,
    }
