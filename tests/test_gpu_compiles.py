"""Every instantiation of every CUDA kernel, compiled for the oldest supported GPU and for Hopper, in its budget."""

from __future__ import annotations

import os
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor

import primitive_checks
import pytest
from gpu_on_host import SYMBOLS
from host_cuda.nvrtc import compile_cubin

from fusionops.device import A100
from fusionops.gpu import grouped, igemm, mma, module, sm90, stream

# Threads of a multiprocessor that registers must not keep from being resident: two blocks, of Hopper's kernel one.
THREADS = {each.SOURCE: 2 * 256 for each in (stream, igemm, mma, grouped)} | {sm90.SOURCE: sm90.THREADS}
CASES = [(source, arch) for source in SYMBOLS for arch in ("sm_80", "sm_90a") if (source, arch) != ("sm90.cu", "sm_80")]


@pytest.mark.parametrize(("source", "arch"), CASES)
def test_registers_are_within_budget_and_none_spill(source, arch):
    flags = (*module.FLAGS, "-ftz=true")  # as CuPy compiles
    symbols = SYMBOLS[source]

    def resources(names):
        return compile_cubin(module.read_source(source), arch, flags, names).kernels

    with ThreadPoolExecutor() as pool:
        workers = os.cpu_count() or 1
        kernels = dict(ChainMap(*pool.map(resources, (symbols[i::workers] for i in range(workers)))))
    assert set(kernels) == set(symbols)
    budget = A100.registers // THREADS[source]
    over = {
        name: found
        for name, found in kernels.items()
        if found.registers > budget or found.spill_stores or found.spill_loads or found.shared
    }
    assert over == {}


@pytest.mark.parametrize(
    ("source", "names", "arch"),
    [
        (primitive_checks.SOURCE, primitive_checks.NAMES, "sm_80"),
        (primitive_checks.HOPPER_SOURCE, primitive_checks.HOPPER_NAMES, "sm_90a"),
    ],
)
def test_the_kernels_that_check_primitives_on_a_device_compile(source, names, arch):
    kernels = compile_cubin(primitive_checks.source(source), arch, module.FLAGS, names).kernels
    assert set(kernels) == set(names)


@pytest.mark.cupy
@pytest.mark.parametrize(("source", "arch"), [(source, arch[3:5]) for source, arch in CASES])
def test_cupy_compiles_them_with_the_options_it_adds(monkeypatch, source, arch):
    """-ftz=true and its own -arch behind ours; it would ask the driver for the architecture, which is not here."""
    from cupy.cuda import compiler

    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    options = (*module.FLAGS, *module.ARCHITECTURES.get(source, ()), "-ftz=true")
    name = SYMBOLS[source][0]
    code = module.read_source(source)
    cubin, mangled = compiler.compile_using_nvrtc(code, options, arch, source, name_expressions=(name,))
    assert cubin.startswith(b"\x7fELF")
    assert (b"sm_90a" in cubin) == (source == sm90.SOURCE)
    assert mangled[name].encode() in cubin


def test_every_file_of_the_backend_is_compiled():
    assert {path.name for path in module.HERE.glob("*.cu")} == set(SYMBOLS)
