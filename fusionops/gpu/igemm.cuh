// What implicit matrix products share: launch parameters, output pixels, loads of maps, the end of a sum.
#pragma once
#include "common.cuh"

struct MapSource {
    const void* base;
    i64 steps[4];  // N H W C
    i64 up_h, up_w;
    i64 first;     // of its channels in a concatenation
    Weight weight;
};

template <int SOURCES> struct IgemmParams {
    i64 N, H, W, C, K, R, S, P, Q;  // C and K of one group
    i64 stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
    i64 groups, sources, activation, vectors_a, vectors_b;  // the last two: see mma.cu
    double slope;
    const void* filters;
    i64 filter_steps[4];  // r s c k
    const void* bias;     // or null
    void* out;
    i64 out_steps[4];     // n p q k
    MapSource residual;   // base null: none; along N P Q K
    MapSource source[SOURCES];
};

// An output pixel (n, p, q), and where its first tap lies in the map.
struct Pixel { int n, p, q, h, w; };

template <int SOURCES> __device__ __forceinline__ Pixel pixel_of(const IgemmParams<SOURCES>& p, i64 m) {
    const i64 line = m / p.Q;
    const int q = int(m - line * p.Q), n = int(line / p.P), row = int(line - n * p.P);
    return Pixel{n, row, q, int(row * p.stride_h - p.pad_top), int(q * p.stride_w - p.pad_left)};
}

// The source that holds channel c of the merged map: the last one that begins there or before.
template <int SOURCES> __device__ __forceinline__ int source_at(const IgemmParams<SOURCES>& p, int c) {
    int low = 0, high = int(p.sources);
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (p.source[middle].first <= c) low = middle; else high = middle;
    }
    return low;
}

// Elements from a map's first one to a pixel of the upsampled map.
__device__ __forceinline__ i64 offset_of(const MapSource& from, int n, int h, int w) {
    if (from.up_h != 1) h /= int(from.up_h);
    if (from.up_w != 1) w /= int(from.up_w);
    return n * from.steps[0] + h * from.steps[1] + w * from.steps[2];
}

template <class T> __device__ __forceinline__ Wide<T> load_map(const MapSource& from, int n, int h, int w, i64 c) {
    const i64 offset = offset_of(from, n, h, w) + c * from.steps[3];
    return weighted<T>(from.weight, widen(static_cast<const T*>(from.base)[offset]), c);
}

// Elements from the first output to a pixel's, and of the residual.
template <int SOURCES> __device__ __forceinline__ i64 out_offset(const IgemmParams<SOURCES>& p, const Pixel& at) {
    return at.n * p.out_steps[0] + at.p * p.out_steps[1] + at.q * p.out_steps[2];
}
template <int SOURCES> __device__ __forceinline__ i64 residual_offset(const IgemmParams<SOURCES>& p, const Pixel& at) {
    return p.residual.base ? offset_of(p.residual, at.n, at.p, at.q) : 0;
}

template <class T, int SOURCES>
__device__ __forceinline__ Wide<T> load_residual(const IgemmParams<SOURCES>& p, i64 offset, i64 k) {
    const Wide<T> x = widen(static_cast<const T*>(p.residual.base)[offset + k * p.residual.steps[3]]);
    return weighted<T>(p.residual.weight, x, k);
}

// The end of a sum, whose filter k counts those of all groups: bias, then residual and activation; where it is stored.
template <class T, int SOURCES>
__device__ __forceinline__ Wide<T> biased(const IgemmParams<SOURCES>& p, i64 k, Wide<T> y) {
    return p.bias ? add_rn(y, widen(static_cast<const T*>(p.bias)[k])) : y;
}
template <class T, int SOURCES>
__device__ __forceinline__ Wide<T> ended(const IgemmParams<SOURCES>& p, const Pixel& at, i64 k, Wide<T> y) {
    if (p.residual.base) y = add_rn(y, load_residual<T>(p, residual_offset(p, at), k));
    return activated<Wide<T>>(p.activation, p.slope, y);
}
template <int SOURCES>
__device__ __forceinline__ i64 place_of(const IgemmParams<SOURCES>& p, const Pixel& at, i64 k) {
    return out_offset(p, at) + k * p.out_steps[3];
}

// All of it.
template <class T, int SOURCES>
__device__ __forceinline__ void finish(const IgemmParams<SOURCES>& p, const Pixel& at, i64 k, Wide<T> y) {
    static_cast<T*>(p.out)[place_of(p, at, k)] = narrow<T>(ended<T>(p, at, k, biased<T>(p, k, y)));
}
