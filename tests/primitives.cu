// Each primitive of the backend in a kernel of its own, for `primitive_checks` to compare with NumPy.
#include "common.cuh"

__global__ void rounded_arithmetic(const float* a, const float* b, float* sums, float* products, float* both,
                                   unsigned char* less) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    sums[i] = add_rn(a[i], b[i]);
    products[i] = mul_rn(a[i], b[i]);
    both[i] = fma_rn(a[i], b[i], a[i]);
    less[i] = is_less(a[i], b[i]);
}

template <class T> __global__ void widened(const T* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = widen(x[i]);
}

template <class T> __global__ void narrowed(const float* x, T* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = narrow<T>(x[i]);
}

template <class T> __global__ void pairs(const u32* a, const u32* b, u32* sums, u32* products) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    sums[i] = add_pair<T>(a[i], b[i]);
    products[i] = mul_pair<T>(a[i], b[i]);
}

__global__ void rounded_to_tf32(const float* x, u32* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = tf32_of(x[i]);
}

// One warp: c (16×8) = a (16×8) · b (8×8) + c in TF32, a through shared memory, all row by row.
__global__ void tf32_product(const float* a, const float* b, float* c) {
    FUSIONOPS_SHARED(unsigned char, memory);
    float* const shared = reinterpret_cast<float*>(memory);
    const int lane = threadIdx.x;
    copy_async(shared + lane * 4, a + lane * 4, 16);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    u32 rows[4];
    load_matrices<false>(rows, shared + lane % 16 * 8 + lane / 16 * 4);
    const u32 column[2] = {__float_as_uint(b[lane % 4 * 8 + lane / 4]), __float_as_uint(b[(lane % 4 + 4) * 8 + lane / 4])};
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    multiply_tile<float>(sums, rows, column);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// One warp: c (16×8) = a (16×16) · b (16×8) + c, both copied to shared memory, all row by row.
template <class T> __global__ void tile_product(const T* a, const T* b, float* c) {
    FUSIONOPS_SHARED(unsigned char, memory);
    T* const shared = reinterpret_cast<T*>(memory);
    const int lane = threadIdx.x;
    T* const here_b = shared + 16 * 16;
    copy_async(shared + lane * 8, a + lane * 8, 16);
    copy_async(here_b + lane * 8, b + lane % 16 * 8, lane < 16 ? 16 : 0);  // the rest is zeroed, beside b
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    u32 rows[4], columns[4];
    load_matrices<false>(rows, shared + lane % 16 * 16 + lane / 16 * 8);
    load_matrices<true>(columns, here_b + lane * 8);
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    const u32 column[2] = {columns[0], columns[1]};
    multiply_tile<T>(sums, rows, column);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <class X> __global__ void activations(const X* x, X* y, i64 kind, double slope) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = activated<X>(kind, slope, x[i]);
}
