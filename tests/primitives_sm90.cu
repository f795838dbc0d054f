// Hopper's primitives in a kernel of their own, for `primitive_checks` to compare with NumPy.
#include "primitives_sm90.cuh"

// One warpgroup: sums (64×N) += a (64×64) · b (N×64)ᵀ, row by row. a is a box of 2 × 8 × 4 pixels of a map that begins at
// (0, −1, −1, c), b one of a tensor of filters that begins at (1, k, c).
template <class T, int N>
__global__ void box_product(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap filters, float* sums,
                            int c, int k) {
    FUSIONOPS_SHARED(unsigned char, memory);
    T* const shared = reinterpret_cast<T*>(memory);
    T* const b = shared + 64 * 64;
    u64* const barrier = reinterpret_cast<u64*>(b + N * 64);
    const int t = threadIdx.x;
    if (t == 0) {
        mbar_init(barrier, 1);
        mbar_publish();
    }
    __syncthreads();
    if (t == 0) {
        mbar_announce(barrier, (64 + N) * 64 * 2);
        copy_box_async(shared, map, barrier, {c, -1, -1, 0});
        copy_box_async(b, filters, barrier, {c, k, 1});
    }
    mbar_wait(barrier, 0);
    float mine[N / 2];
    for (int half = 0; half < 2; ++half) {  // first all products but the last 16 columns, then these on top
        products_begin();
#pragma unroll
        for (int i = 0; i < 3; ++i)
            if (half == 0)
                multiply_async<T, N>(mine, matrix_at(shared) + 2 * i, matrix_at(b) + 2 * i, i > 0);
            else if (i == 0)
                multiply_async<T, N>(mine, matrix_at(shared) + 6, matrix_at(b) + 6, true);
        products_commit();
        products_wait<0>();
    }
    for (int i = 0; i < N / 2; ++i)
        sums[(t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2)) * N + i / 4 * 8 + t % 4 * 2 + i % 2] = mine[i];
}

// Threads store 64 rows of 64 numbers as boxes lie, and products read them: sums (64×64) = a · aᵀ.
template <class T> __global__ void stored_product(const T* a, float* sums) {
    FUSIONOPS_SHARED(unsigned char, memory);
    T* const shared = reinterpret_cast<T*>(memory);
    const int t = threadIdx.x;
    if (t < 64)
        for (int piece = 0; piece < 8; ++piece)
            for (int e = 0; e < 8; ++e) shared[t * 64 + (piece ^ t % 8) * 8 + e] = a[t * 64 + piece * 8 + e];
    fence_products();
    __syncthreads();
    float mine[32];
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_async<T, 64>(mine, matrix_at(shared) + 2 * i, matrix_at(shared) + 2 * i, i > 0);
    products_commit();
    products_wait<0>();
    for (int i = 0; i < 32; ++i)
        sums[(t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2)) * 64 + i / 4 * 8 + t % 4 * 2 + i % 2] = mine[i];
}
