"""What this machine's GPUs are, and why there may be none to use. Asks CuPy once of each, when first asked."""

from __future__ import annotations

import functools
from typing import Any

from fusionops.device import GpuDevice

OLDEST_CUPY = (14, 2)  # before it, templates were compiled again in every process
OLDEST_CAPABILITY = (8, 0)


def reasons_unusable(number: int | None = None) -> tuple[str, ...]:
    """Every reason why no kernel can run on the GPU of that number, or on the current one; empty means they can."""
    if reasons := machine_reasons():
        return reasons
    here = device(number)
    if here.capability < OLDEST_CAPABILITY:
        has, needs = (".".join(map(str, capability)) for capability in (here.capability, OLDEST_CAPABILITY))
        return (f"{here.name} has compute capability {has}, needs {needs} or higher",)
    return ()


@functools.cache
def machine_reasons() -> tuple[str, ...]:
    """Every reason why no kernel can run on any GPU of this machine."""
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
    try:
        compiler()
    except (RuntimeError, ImportError, OSError) as error:
        hint = "pip install fusionops[cuda13] brings it, or fusionops[cuda12]"
        return (f"CUDA's compiler, NVRTC, cannot be loaded: {error}; {hint}",)
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


def device(number: int | None = None) -> GpuDevice:
    """The GPU of that number, or the current one."""
    import cupy

    return _device(cupy.cuda.runtime.getDevice() if number is None else number)


@functools.cache
def _device(number: int) -> GpuDevice:
    import cupy

    here = cupy.cuda.Device(number)
    attributes, capability = here.attributes, here.compute_capability  # such as "90", or "120"
    return GpuDevice(
        cupy.cuda.runtime.getDeviceProperties(number)["name"].decode(),
        (int(capability[:-1]), int(capability[-1])),
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
