"""What host_cuda refuses to compile or launch, what it caches and sanitizes, and what NVRTC reports.

What kernels do once they run is tested in test_host_cuda.py and test_host_cuda_faults.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from host_cuda import module, nvrtc
from host_cuda.module import CompileError, HostModule, LaunchRefused, sanitizer_environment

SOURCE = r"""
struct Pair { int a, b; };
extern "C" __global__ void launch_bounds_between __launch_bounds__(64) (float* y) { y[0] = 1; }
extern "C" __global__ void f(const float* x, float* y, int n, double scale, Pair pair) {
    y[threadIdx.x] = x[threadIdx.x] * n * scale + pair.a;
}
extern "C" __global__ void pointers(const float* floats, const short* bits, const void* any, Pair* pairs) {}
extern "C" __global__ void nothing() {}
"""
X, Y = np.ones(32, np.float32), np.zeros(32, np.float32)
READ_ONLY = np.broadcast_to(np.float32(1), 32)
N, SCALE, PAIR = np.int32(3), np.float64(0.5), np.array([(1, 2)], "i4,i4").view("V8")
ARGS = (X, Y, N, SCALE, PAIR)


@pytest.fixture(scope="module")
def host():
    return HostModule(SOURCE)


def test_arguments_reach_the_kernel(host):
    host.get_function("f")((1,), (32,), ARGS)
    assert (Y == 1 * 3 * 0.5 + 1).all()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 1, "a Python int"),
        (1, READ_ONLY, "read-only"),
        (1, X.astype(np.float64), "array of float64, the parameter points to f32"),
        (1, X.astype(np.int32), "array of int32, the parameter points to f32"),
        (1, np.float32(1), "a float32, the parameter a pointer"),
        (2, 3, "a Python int, which CuPy passes as 8"),
        (2, True, "a Python bool"),
        (2, np.int64(3), "8 bytes, the parameter 4"),
        (2, np.float32(3), "a float32, the parameter an integer"),
        (2, np.int16(3), "a int16; a number is passed as one of int32, int64"),
        (2, np.array([3], np.int32), "a ndarray; a number"),
        (3, 0.5, "a Python float"),
        (3, np.float32(0.5), "4 bytes, the parameter 8"),
        (3, np.int64(1), "a int64, the parameter a floating-point"),
        (4, np.zeros(2, "V8"), "the parameter a struct"),
        (4, np.zeros(1, "V12"), "12 bytes, the parameter 8"),
        (4, np.zeros(1, np.int64), "the parameter a struct"),
    ],
)
def test_argument_is_refused(host, position, value, message):
    args = [*ARGS]
    args[position] = value
    with pytest.raises(LaunchRefused, match=rf"f: args\[{position}\] .*{message}"):
        host.get_function("f")((1,), (32,), args)


@pytest.mark.parametrize("count", [0, 4, 6])
def test_number_of_arguments_is_refused(host, count):
    with pytest.raises(LaunchRefused, match=f"f: {count} arguments for 5 parameters"):
        host.get_function("f")((1,), (32,), (ARGS * 2)[:count])


def test_pointers_that_are_accepted(host):
    raw = np.zeros(64, np.uint8)
    for args in ((X, X.astype(np.float16), X, X), (READ_ONLY, raw, READ_ONLY, raw), (raw, None, None, None)):
        host.get_function("pointers")((1,), (1,), args)


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((1,), (1025,), r"block.x is 1025, needs an integer from 1 to 1024"),
        ((1,), (33, 32), r"\(33, 32\) is 1056 threads, 1024 are allowed"),
        ((1,), (1, 1, 65), r"block.z is 65, needs an integer from 1 to 64"),
        ((1,), (32, 0), r"block.y is 0"),
        ((0,), (1,), r"grid.x is 0"),
        ((1, 1, 0), (1,), r"grid.z is 0"),
        ((-1,), (1,), r"grid.x is -1"),
        ((2**31,), (1,), r"grid.x is 2147483648"),
        ((1, 65_536), (1,), r"grid.y is 65536, needs an integer from 1 to 65535"),
        ((1, 1, 65_536), (1,), r"grid.z is 65536"),
        ((1, 1, 1, 1), (1,), r"grid is \(1, 1, 1, 1\), needs a tuple"),
        (1, (1,), r"grid is 1, needs a tuple"),
        ((1,), (1.5,), r"block.x is 1.5"),
    ],
)
def test_extent_is_refused(host, grid, block, message):
    with pytest.raises(LaunchRefused, match=f"nothing: .*{message}"):
        host.get_function("nothing")(grid, block, ())


def test_largest_extents_are_accepted(host):
    for grid, block in (((1, 65_535), (1,)), ((1, 1, 65_535), (1,)), ((70_000,), (1,)), ((1,), (16, 1, 64))):
        host.get_function("nothing")(grid, block, ())


def test_shared_memory_has_limits():
    function = HostModule(SOURCE).get_function("nothing")
    function((1,), (1,), (), shared_mem=48 * 1024)
    with pytest.raises(LaunchRefused, match=r"49153 bytes .* max_dynamic_shared_size_bytes is 49152"):
        function((1,), (1,), (), shared_mem=48 * 1024 + 1)
    function.max_dynamic_shared_size_bytes = 227 * 1024
    function((1,), (1,), (), shared_mem=227 * 1024)
    with pytest.raises(LaunchRefused, match="232449 bytes"):
        function((1,), (1,), (), shared_mem=227 * 1024 + 1)
    with pytest.raises(LaunchRefused, match="a block has 232448"):
        function.max_dynamic_shared_size_bytes = 227 * 1024 + 1
    with pytest.raises(LaunchRefused, match="-1 bytes"):
        function((1,), (1,), (), shared_mem=-1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\nnope;", "kernel.cu:2:"),
        ("__global__ void f() { __shared__ float tile[32]; }", r"shared memory only as FUSIONOPS_SHARED"),
        ("__global__ void f(float* y) { atomicAdd(y, 1.f); }", "atomicAdd.* was not declared"),
        ("__global__ void f() { volatile char big[70000]; big[0] = 1; }", "frame size of 700.. bytes is larger"),
        ("struct Big { char c[32765]; };\n__global__ void f(Big big) {}", "at most 32764 bytes of parameters"),
        ("template <int N> __global__ void f() { static_assert(N == 4, \"N is not 4\"); }", "N is not 4"),
        ("", "f<3>:1:.*f.* was not declared"),
    ],
)  # fmt: skip
def test_source_is_refused(source, message):
    expression = "f<3>" if "template" in source or not source else "f"
    with pytest.raises(CompileError, match=f"(?s){message}"):
        HostModule(source, name_expressions=(expression,))


def test_module_without_a_kernel_is_refused():
    with pytest.raises(CompileError, match='no extern "C" kernel'):
        HostModule("__global__ void f() {}")


def test_unknown_kernel_is_named(host):
    with pytest.raises(LookupError, match="no kernel 'g<4>'"):
        host.get_function("g<4>")


def test_options_are_those_of_nvrtc(tmp_path):
    (tmp_path / "value.cuh").write_text("#define VALUE (A + B)\n")
    source = '#include "value.cuh"\nextern "C" __global__ void f(int* y) { *y = VALUE; }'
    y = np.zeros(1, np.int32)
    options = ("-DA=40", "-DB=2", f"-I{tmp_path}", "-std=c++17", "-arch=sm_90a")
    HostModule(source, options).get_function("f")((1,), (1,), (y,))
    assert y == 42
    with pytest.raises(ValueError, match="'--use_fast_math' is unknown"):
        HostModule(source, (*options, "--use_fast_math"))


def test_compiled_modules_are_kept(tmp_path, monkeypatch):
    """One library for the scheduler, and one for each text after preprocessing."""
    monkeypatch.setenv("FUSIONOPS_HOST_CUDA_CACHE", str(tmp_path))
    module._scheduler.cache_clear()
    header = tmp_path / "value.cuh"
    kept = []
    for value in ("1", "1", "2", "1"):
        header.write_text(value)
        source = 'extern "C" __global__ void f(int* y) { *y =\n#include "value.cuh"\n; }'
        y = np.zeros(1, np.int32)
        HostModule(source, (f"-I{tmp_path}",)).get_function("f")((1,), (1,), (y,))
        assert y == int(value)
        kept.append({path.stat().st_ino for path in tmp_path.glob("*.so")})
    module._scheduler.cache_clear()
    first, repeated, changed, restored = kept
    assert first == repeated < changed == restored  # what is compiled anew is another file
    assert (len(first), len(changed)) == (2, 3)
    assert {path.suffix for path in tmp_path.iterdir()} == {".so", ".cuh"}  # nothing half done


SANITIZED = """
    import sys
    import numpy as np
    from host_cuda.module import HostModule, KernelFault

    source = '''
    extern "C" __global__ void reverses(const float* x, float* y, int n) {
        FUSIONOPS_SHARED(float, shared);
        shared[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        const float mine = __shfl_xor_sync(~0u, shared[blockDim.x - 1 - threadIdx.x], 0);
        __syncthreads();
        float held[64];
        for (int i = 0; i < 64; ++i) held[(i + n) % 64] = mine;
        y[threadIdx.x + n] = held[threadIdx.x];
    }
    extern "C" __global__ void indexes(float* y, int n) {
        volatile float four[4] = {1, 2, 3, 4};
        y[threadIdx.x] = four[threadIdx.x + n];
        __syncwarp();  // here the others are abandoned
        y[threadIdx.x] += four[threadIdx.x];
    }'''
    host = HostModule(source, sanitize=True)
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    try:
        host.get_function("indexes")((1,), (4,), (y, np.int32(1)))
    except KernelFault as fault:
        print(fault)
    for order in range(20):
        host.order = order
        host.get_function("reverses")((64,), (64,), (x, y, np.int32(0)), shared_mem=256)
    assert (y == x[::-1]).all()
    print("correct")
    match sys.argv[1]:
        case "global":
            host.get_function("reverses")((1,), (64,), (x, y, np.int32(1)), shared_mem=256)
        case "shared":
            host.get_function("reverses")((1,), (64,), (x, y, np.int32(0)), shared_mem=252)
    print("ran to its end")
"""


@pytest.mark.parametrize(
    ("access", "errors"),
    [
        ("none", ""),
        ("global", "heap-buffer-overflow .*WRITE of size 4 .* in reverses .*kernel.cu:10"),
        ("shared", "use-after-poison .*WRITE of size 4 .* in reverses .*kernel.cu:4"),
    ],
)
def test_sanitizer(access, errors):
    # -u: nothing is left in a buffer when the sanitizer ends the process.
    environment = os.environ | sanitizer_environment() | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-u", "-c", textwrap.dedent(SANITIZED), access]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    fault, *rest = done.stdout.splitlines()
    assert fault.endswith("thread (3, 0, 0): kernel.cu:14: index 4 of a 'float [4]'")
    assert rest == (["correct"] if errors else ["correct", "ran to its end"]), done.stderr
    assert re.fullmatch(f"(?s).*{errors}.*" if errors else "", done.stderr), done.stderr
    assert (done.returncode == 0) == (access == "none")


def test_sanitizer_has_to_be_in_the_process():
    with pytest.raises(RuntimeError, match="start it in sanitizer_environment"):
        HostModule(SOURCE, sanitize=True)


DEVICE_SOURCE = r"""
template <class T, int N>
__global__ void reverses(const T* x, T* y) {
    __shared__ T shared[N];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = shared[N - 1 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const double* x, double* y) {
    double held[40];
    for (int i = 0; i < 40; ++i) held[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 40; ++i) y[i * 1024 + threadIdx.x] = held[i] * held[39 - i];
}
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nvrtc_reports_resources(arch):
    names = ("reverses<float, 64>", "reverses<double, 64>")
    compiled = nvrtc.compile_cubin(DEVICE_SOURCE, arch, ("-std=c++17",), names)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert set(compiled.kernels) == {*names, "spills"}
    for name, shared in zip(names, (256, 512), strict=True):
        resources = compiled.kernels[name]
        assert 8 <= resources.registers <= 24
        assert (resources.stack, resources.spill_stores, resources.spill_loads) == (0, 0, 0)
        assert resources.shared == shared
    tight = compiled.kernels["spills"]
    assert tight.registers == 32  # 65,536 of a multiprocessor for 2 blocks of 1024 threads
    assert min(tight.stack, tight.spill_stores, tight.spill_loads) > 0


def test_nvrtc_reports_errors():
    with pytest.raises(nvrtc.CompileError, match=r'kernel.cu\(2\): error: identifier "nope" is undefined'):
        nvrtc.compile_cubin("__global__ void f() {\nnope; }", "sm_90a")
    with pytest.raises(nvrtc.CompileError, match="arch"):
        nvrtc.compile_cubin(DEVICE_SOURCE, "sm_1")
    with pytest.raises(nvrtc.CompileError, match="name"):
        nvrtc.compile_cubin(DEVICE_SOURCE, "sm_80", names=("absent<3>",))


def test_nvrtc_that_is_missing_is_named(monkeypatch):
    def files(wheel):
        raise importlib.metadata.PackageNotFoundError(wheel)

    monkeypatch.setattr(importlib.metadata, "files", files)
    nvrtc._nvrtc.cache_clear()
    with pytest.raises(nvrtc.CompileError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.compile_cubin(DEVICE_SOURCE, "sm_80")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("add", "flushes"),
    [("z = __fadd_rn(x, y)", True), ('asm("add.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y))', False)],
    ids=["intrinsic", "ptx"],
)
def test_only_inline_ptx_keeps_denormals(arch, add, flushes):
    """CuPy appends -ftz=true, and the last one counts: only PTX says itself whether denormals are flushed."""
    source = 'extern "C" __global__ void f(const float* p, float* out) { float x = p[0], y = p[1], z; %s; *out = z; }'
    kept, flushed = (nvrtc.compile_cubin(source % add, arch, ("-ftz=false", *more)) for more in ((), ("-ftz=true",)))
    assert (kept.cubin != flushed.cubin) == flushes
