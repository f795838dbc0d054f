"""The stand-in for a GPU itself: host_cuda runs CUDA C as a device would, in any order of its threads.

What it makes of faulty kernels is tested in test_host_cuda_faults.py; nothing here is about the package's kernels.
"""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
from host_cuda import module
from host_cuda.module import HostModule, thread_order

ORDERS = (0, 1, 2, 7)

MATMUL = r"""
// c = a b for square matrices of n: a block owns 16 x 16 of c, a thread one of them.
extern "C" __global__ void matmul(const float* a, const float* b, float* c, int n) {
    constexpr int TILE = 16;
    FUSIONOPS_SHARED(float, shared);
    float *tile_a = shared, *tile_b = shared + TILE * TILE;
    const int m = blockIdx.y * TILE + threadIdx.y, j = blockIdx.x * TILE + threadIdx.x;
    const int here = threadIdx.y * TILE + threadIdx.x;
    float sum = 0;
    for (int k = 0; k < n; k += TILE) {
        tile_a[here] = a[m * n + k + threadIdx.x];
        tile_b[here] = b[(k + threadIdx.y) * n + j];
        BARRIER;
        for (int i = 0; i < TILE; ++i) sum += tile_a[threadIdx.y * TILE + i] * tile_b[i * TILE + threadIdx.x];
        BARRIER;
    }
    c[m * n + j] = sum;
}
"""


def run_matmul(barrier: str, order: int) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, and what it should: integers, so exact in any order of summation."""
    matmul = HostModule(MATMUL, (f"-DBARRIER={barrier}",), order=order).get_function("matmul")
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (48, 48)).astype(np.float32) for _ in range(2))
    c = np.full_like(a, np.nan)
    matmul((3, 3), (16, 16), (a, b, c, np.int32(48)), shared_mem=2 * 16 * 16 * 4)
    return c, a @ b


@pytest.mark.parametrize("order", ORDERS)
def test_matmul_equals_numpy(order):
    np.testing.assert_array_equal(*run_matmul("__syncthreads()", order))


def test_missing_barrier_shows_in_the_order_of_threads():
    results = [run_matmul("", order)[0].tobytes() for order in ORDERS]
    assert len(set(results)) > 1


SOUND = r"""
using namespace fusionops_host;

extern "C" __global__ void unwritten(float* y) {
    FUSIONOPS_SHARED(float, shared);
    y[threadIdx.x] = shared[threadIdx.x];
    shared[threadIdx.x] = 1;
}

struct alignas(64) Params {
    float* y;
    float scale[8000];
};
extern "C" __global__ void by_value(const __grid_constant__ Params params, int n) {
    params.y[threadIdx.x] = params.scale[threadIdx.x + n];
}

extern "C" __global__ void warp_functions(int* y) {  // (14, 32)
    const int lane = threadIdx.x, value = 100 + lane;
    int* out = y + lane;
    const auto put = [&](int result) { *out = result; out += 32; };
    put(__shfl_sync(~0u, value, 5));
    put(__shfl_sync(~0u, value, lane + 3, 8));
    put(__shfl_up_sync(~0u, value, 3));
    put(__shfl_up_sync(~0u, value, 3, 16));
    put(__shfl_down_sync(~0u, value, 3));
    put(__shfl_down_sync(~0u, value, 3, 4));
    put(__shfl_xor_sync(~0u, value, 1));
    put(__shfl_xor_sync(~0u, value, 17, 16));
    put(__ballot_sync(~0u, lane % 3 == 0));
    put(lane < 12 ? __ballot_sync(0xFFF, lane % 2) : __ballot_sync(0xFFFFF000, lane % 2 == 0));
    put(__any_sync(~0u, lane == 31));
    put(__any_sync(~0u, lane == 32));
    put(__all_sync(~0u, lane < 32));
    put(__all_sync(~0u, lane < 31));
}

extern "C" __global__ void votes(int* y, int n) {
    y += 3 * threadIdx.x;
    y[0] = __syncthreads_count(threadIdx.x < n);
    y[1] = __syncthreads_and(threadIdx.x < n);
    y[2] = __syncthreads_or(threadIdx.x < n);
}

// The first 32 threads hand n values, one at a time, to the other 32.
extern "C" __global__ void hands_over(int* y, int n) {
    FUSIONOPS_SHARED(int, slot);
    if (threadIdx.x < 32) {
        for (int i = 0; i < n; ++i) {
            if (i) bar_sync(2, 64);
            slot[threadIdx.x] = i * threadIdx.x;
            bar_arrive(1, 64);
        }
    } else {
        for (int i = 0; i < n; ++i) {
            bar_sync(1, 64);
            y[32 * i + threadIdx.x - 32] = slot[threadIdx.x - 32];
            if (i + 1 < n) bar_arrive(2, 64);
        }
    }
}

// mma.sync.m16n8k8 in float: a lane holds two rows and two columns of a, two rows of b, four values of d.
struct Mma { float a[4], b[2], d[4]; };
extern "C" __global__ void mma(const float* a, const float* b, float* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    Mma mine;
    for (int i = 0; i < 4; ++i) mine.a[i] = a[(g + i % 2 * 8) * 8 + t + i / 2 * 4];
    for (int i = 0; i < 2; ++i) mine.b[i] = b[(t + i * 4) * 8 + g];
    warp_collective(~0u, mine, [](auto lanes) {
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 8; ++n) {
                float sum = 0;
                for (int k = 0; k < 8; ++k)
                    sum += lanes[m % 8 * 4 + k % 4].a[m / 8 + k / 4 * 2] * lanes[n * 4 + k % 4].b[k / 4];
                lanes[m % 8 * 4 + n / 2].d[m / 8 * 2 + n % 2] = sum;
            }
    });
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = mine.d[i];
}

struct Sum { int value, sum; };
extern "C" __global__ void warpgroup_sums(int* y) {
    Sum mine{int(threadIdx.x), 0};
    warpgroup_collective(mine, [](auto lanes) {
        int sum = 0;
        for (int lane = 0; lane < 128; ++lane) sum += lanes[lane].value;
        for (int lane = 0; lane < 128; ++lane) lanes[lane].sum = sum;
    });
    y[threadIdx.x] = mine.sum;
}

// Each thread waits for the one before it, by whatever way there is.
extern "C" __global__ void in_turn(volatile int* y, int spin) {
    const unsigned me = threadIdx.x;
    if (me && spin) while (y[me - 1] == 0) yield();
    if (me && !spin) wait_until([=] { return y[me - 1] != 0; }, "wait for their turn");
    y[me] = me ? y[me - 1] + 1 : 1;
}

extern "C" __global__ void indices(int* y) {
    const dim3 size(gridDim.x, gridDim.y, gridDim.z);
    const int block = (blockIdx.z * size.y + blockIdx.y) * size.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] +=
        1000 * (100 * blockIdx.z + 10 * blockIdx.y + blockIdx.x) + 100 * threadIdx.z + 10 * threadIdx.y + threadIdx.x;
}

extern "C" __global__ void ranks(int* threads, int* blocks) {  // right only on one OS thread
    threads[1 + threadIdx.x] = threads[0]++;
    if (threadIdx.x == 0) blocks[1 + blockIdx.x] = blocks[0]++;
}

extern "C" __global__ void existing_lanes(unsigned* y) { y[threadIdx.x] = __ballot_sync(~0u, 1); }

extern "C" __global__ void arithmetic(float* y) {
    const float nan = __int_as_float(0x7FC00000);
    const float x = 1 + 0x1p-12f * gridDim.x;  // unknown while compiling
    const float results[] = {min(nan, 1.f), min(1.f, nan), max(nan, 1.f), max(1.f, nan),
                             float(max(-1, 2L)), __uint_as_float(0x3F800001),
                             __fmaf_rn(x, x, -1.f), __fadd_rn(__fmul_rn(x, x), -1.f),
                             float(__umulhi(0xFFFFFFFF, 0x10)), float(__clz(1)), float(__ffs(8)), float(__popc(0xFF))};
    y[threadIdx.x] = results[threadIdx.x];
}

template <class T, int N>
__global__ void fill(T* y) { y[blockIdx.x] = N; }
"""
FILL = "fill<unsigned short, 3>"


@pytest.fixture(scope="module", params=[(), ("-DFUSIONOPS_HOST_UCONTEXT",)], ids=["assembly", "ucontext"])
def sound(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FLAGS", (*module.FLAGS, *request.param))
        return HostModule(SOUND, name_expressions=(FILL,))


@pytest.fixture(params=ORDERS)
def launch(sound, request):
    """Launches a kernel of SOUND in some order of threads."""

    def run(name, threads, *args, grid=(1,), shared_mem=0):
        with thread_order(request.param):
            sound.get_function(name)(grid, threads, args, shared_mem=shared_mem)

    return run


def test_unwritten_shared_memory_is_nan(launch):
    y = np.zeros(32, np.float32)
    launch("unwritten", (32,), y, grid=(4,), shared_mem=128)
    assert np.isnan(y).all()


def test_struct_comes_by_value(launch):
    y = np.zeros(1024, np.float32)
    params = np.zeros(1, [("y", np.uint64), ("scale", np.float32, 8000), ("pad", "V56")])
    params["y"], params["scale"] = y.ctypes.data, np.arange(8000)
    launch("by_value", (1024,), params.view("V32064"), np.int32(6000))
    np.testing.assert_array_equal(y, np.arange(6000, 7024))


def test_warp_functions(launch):
    y = np.zeros((14, 32), np.int32)
    launch("warp_functions", (32,), y)
    lane = np.arange(32)

    def from_lane(source, allowed):
        return 100 + np.where(allowed, source, lane)

    expected = [
        from_lane(5, True),
        from_lane(lane // 8 * 8 + (lane + 3) % 8, True),
        from_lane(lane - 3, lane >= 3),
        from_lane(lane - 3, lane % 16 >= 3),
        from_lane(lane + 3, lane + 3 < 32),
        from_lane(lane + 3, lane % 4 + 3 < 4),
        from_lane(lane ^ 1, True),
        from_lane(lane ^ 17, lane >= 16),  # the others' source lies above their segment
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.where(lane < 12, 0xAAA, 0x55555000),
        *(np.full(32, result) for result in (1, 0, 1, 0)),
    ]
    np.testing.assert_array_equal(y, np.array(expected).astype(np.uint32).view(np.int32))


@pytest.mark.parametrize(("n", "expected"), [(0, (0, 0, 0)), (1, (1, 0, 1)), (40, (40, 1, 1))])
def test_votes(launch, n, expected):
    y = np.zeros((40, 3), np.int32)
    launch("votes", (40,), y, np.int32(n))
    assert (y == expected).all()


def test_named_barriers_hand_values_over(launch):
    y = np.full((5, 32), -1, np.int32)
    launch("hands_over", (64,), y, np.int32(5), shared_mem=128)
    np.testing.assert_array_equal(y, np.outer(np.arange(5), np.arange(32)))


def test_warp_collective_emulates_mma(launch):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    d = np.full((16, 8), np.nan, np.float32)
    launch("mma", (32,), a, b, d)
    np.testing.assert_array_equal(d, a @ b)


def test_warpgroup_collective(launch):
    y = np.zeros((2, 128), np.int32)
    launch("warpgroup_sums", (256,), y)
    np.testing.assert_array_equal(y, [[sum(range(128))] * 128, [sum(range(128, 256))] * 128])


@pytest.mark.parametrize("spin", [0, 1])
def test_threads_can_wait_for_one_another(launch, spin):
    y = np.zeros(100, np.int32)
    launch("in_turn", (100,), y, np.int32(spin))
    np.testing.assert_array_equal(y, np.arange(1, 101))


def test_every_thread_of_every_block_runs_once(launch):
    y = np.zeros((5, 4, 3, 4, 3, 2), np.int32)
    launch("indices", (2, 3, 4), y, grid=(3, 4, 5))
    digits = np.moveaxis(np.indices(y.shape), 0, -1)
    np.testing.assert_array_equal(y, digits @ 10 ** np.arange(5, -1, -1))


def test_orders_of_threads_and_blocks(sound, monkeypatch):
    monkeypatch.setattr(module, "OS_THREADS", 1)
    permutations = []
    for order in ORDERS:
        threads, blocks = np.zeros(1 + 50, np.int32), np.zeros(1 + 6, np.int32)
        with thread_order(order):
            with thread_order(order + 1):
                pass  # what it changed, it restores
            for _ in range(2):
                threads[0] = blocks[0] = 0
                sound.get_function("ranks")((1,), (50,), (threads, blocks))
                permutations.append(threads[1:].tolist())
            sound.get_function("ranks")((6,), (1,), (threads, blocks))
        assert blocks[1:].tolist() == [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]][order % 2]
    assert permutations[::2] == permutations[1::2]  # repeatable
    forward, reverse, *random = permutations[::2]
    assert (forward, reverse) == ([*range(50)], [*range(49, -1, -1)])
    assert len({*map(tuple, permutations)}) == len(ORDERS)
    assert all(sorted(ranks) == forward for ranks in random)


def test_mask_may_name_lanes_that_do_not_exist(launch):
    y = np.zeros(52, np.uint32)
    launch("existing_lanes", (52,), y)
    assert y.tolist() == [2**32 - 1] * 32 + [2**20 - 1] * 20


def test_arithmetic(launch):
    y = np.zeros(12, np.float32)
    launch("arithmetic", (12,), y)
    ulp = 2.0**-23
    np.testing.assert_array_equal(y, [1, 1, 1, 1, 2, 1 + ulp, 2.0**-11 + 2.0**-24, 2.0**-11, 15, 31, 4, 8])


def test_array_of_a_type_numpy_does_not_know(launch):
    y = np.zeros(1, ml_dtypes.bfloat16)  # one element of kind V, but the parameter is a pointer
    launch(FILL, (1,), y)
    assert y.view(np.uint16) == 3


def test_switches_are_counted(sound):
    sound.get_function("unwritten")((6,), (8,), (np.zeros(8, np.float32),), shared_mem=32)
    assert sound.last_launch == module.LaunchStatistics(blocks=6, switches=6 * 7)


def test_one_block_needs_no_other_os_thread(sound, monkeypatch):
    monkeypatch.setattr(module, "_pool", lambda process: pytest.fail("a pool was asked for"))
    sound.get_function("unwritten")((1,), (32,), (np.zeros(32, np.float32),), shared_mem=128)


def test_child_of_a_fork_can_launch(sound):
    y = np.zeros((64, 32), np.int32)
    indices = sound.get_function("indices")
    indices((64,), (32,), (y,))
    expected = 2 * y
    child = os.fork()
    if child == 0:
        indices((64,), (32,), (y,))
        os._exit(0 if (y == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
