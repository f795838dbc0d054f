"""Faulty kernels: host_cuda reports what a device would punish by wrong results, by a hang, or not at all.

Correct kernels are in test_host_cuda.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from host_cuda.module import HostModule, KernelFault, thread_order

FAULTY = r"""
using namespace fusionops_host;
#define KERNEL(name) extern "C" __global__ void name(float* y, int n)
KERNEL(writes_behind) { FUSIONOPS_SHARED(float, shared); shared[int(threadIdx.x) + n] = 1; }
KERNEL(exits) { if (threadIdx.x >= n) return; __syncthreads(); }
KERNEL(misses) { if (threadIdx.x < n) __syncthreads(); y[threadIdx.x] = 0; }
KERNEL(two_barriers) { if (threadIdx.x < n) bar_sync(1, 64); else bar_sync(2, 64); }
KERNEL(counts_differ) { bar_sync(1, threadIdx.x < n ? 64 : 32); }
KERNEL(counts_oddly) { bar_sync(1, n); }
KERNEL(barrier_16) { bar_sync(16, 64); }
KERNEL(spins) { while (y[threadIdx.x] == 0) yield(); }
KERNEL(waits) { wait_until([=] { return y[0] != 0; }, "wait for y"); }
KERNEL(not_in_its_mask) { __syncwarp(n); }
KERNEL(absent_lane) { y[threadIdx.x] = __shfl_sync(0xFFu, 1.f, 9); }
KERNEL(part_of_a_warp) { if (threadIdx.x < n) __syncwarp(); }
KERNEL(masks_differ) { __syncwarp(threadIdx.x ? ~0u : ~2u); }
KERNEL(collectives_differ) { if (threadIdx.x < n) __syncwarp(); else __ballot_sync(~0u, 1); }
KERNEL(misaligned) { *reinterpret_cast<float4*>(y + n) = float4{}; }
KERNEL(writes_and_traps) { FUSIONOPS_SHARED(char, shared); shared[512] = 0; __trap(); }
KERNEL(traps) { if (threadIdx.x == n) __trap(); }
__device__ int deep(int n) {
    volatile int frame[1000];
    for (int i = 0; i < 1000; ++i) frame[i] = n;
    return n ? deep(n - 1) + frame[n] : 0;
}
KERNEL(recurses) { y[0] = deep(n); }
"""


@pytest.fixture(scope="module")
def faulty():
    return HostModule(FAULTY)


@pytest.mark.parametrize("order", [0, 1, 2, 7])
@pytest.mark.parametrize(
    ("kernel", "n", "message"),
    [
        ("writes_behind", 65, r"block \(0, 0, 0\): something wrote to byte 512 of 512 bytes of shared memory"),
        ("writes_behind", 2 * 64 + 13, "wrote to byte 564 of 512"),
        ("writes_behind", -1, "in front of the shared memory"),
        ("exits", 63, r"deadlock.* 63 of 64 threads wait at __syncthreads, .* 1 of 64 threads have left the kernel"),
        ("misses", 32, r"deadlock.* 32 of 64 threads wait at __syncthreads, the first is \(0, 0, 0\)"),
        ("two_barriers", 32, "64 of 64 threads wait at a named barrier"),
        ("counts_differ", 32, "threads expect to meet as|wait at a named barrier"),
        ("counts_oddly", 48, "counts 48 threads, not a multiple of 32"),
        ("barrier_16", 0, "barrier 16, the last is 15"),
        ("spins", 0, "64 of 64 threads call yield"),
        ("waits", 0, "64 of 64 threads wait for y"),
        ("not_in_its_mask", 1, r"calls with the mask 0x1, which does not contain it"),
        ("part_of_a_warp", 20, "20 of 64 threads wait at a collective"),
        ("masks_differ", 0, "32 of 64 threads wait at a collective"),
        ("collectives_differ", 7, "threads meet in different collectives"),
        ("misaligned", 1, r"kernel.cu:\d+: address 0x[0-9a-f]+ of a .*float4.* is not a multiple of 16"),
        ("traps", 5, r"thread \(5, 0, 0\): __trap"),
        ("writes_and_traps", 0, "__trap"),  # the first error, not the last
        ("recurses", 40, "took more stack than its 131072 bytes"),
    ],
)
def test_fault_is_reported(faulty, order, kernel, n, message):
    faulty.patience_s = 0.0  # seconds of yield() without progress
    arena = np.zeros(128 * 4, np.float32)
    aligned = arena[-arena.ctypes.data % 16 // 4 :]
    with thread_order(order), pytest.raises(KernelFault, match=f"(?s)^{kernel}: .*{message}"):
        faulty.get_function(kernel)((1,), (64,), (aligned, np.int32(n)), shared_mem=512)


def test_lane_that_does_not_take_part_cannot_be_read(faulty):
    with pytest.raises(KernelFault, match="needs lane 9, which does not take part"):
        faulty.get_function("absent_lane")((1,), (8,), (np.zeros(8, np.float32), np.int32(0)))


def test_module_works_on_after_a_fault(faulty):
    y = np.ones(64, np.float32)
    with pytest.raises(KernelFault):
        faulty.get_function("misses")((9,), (64,), (y, np.int32(32)))
    faulty.get_function("misses")((9,), (64,), (y, np.int32(0)))
    assert not y.any()


def test_of_many_blocks_the_faulty_one_is_named(faulty):
    source = 'extern "C" __global__ void f() { if (blockIdx.y == 3 && blockIdx.x == 2) __trap(); }'
    with pytest.raises(KernelFault, match=r"block \(2, 3, 0\), |block \(2, 3, 0\): thread"):
        HostModule(source).get_function("f")((5, 7), (32,), ())
