// Runs of 16 bytes of channels: what tensor core kernels load, merge and multiply at a time.
#pragma once
#include "igemm.cuh"

template <class T> const int RUN_OF = 16 / sizeof(T);  // elements

template <class T> __device__ __forceinline__ uint4 add_run(uint4 a, uint4 b) {
    return make_uint4(add_word<T>(a.x, b.x), add_word<T>(a.y, b.y), add_word<T>(a.z, b.z), add_word<T>(a.w, b.w));
}
template <class T> __device__ __forceinline__ uint4 mul_run(uint4 a, uint4 b) {
    return make_uint4(mul_word<T>(a.x, b.x), mul_word<T>(a.y, b.y), mul_word<T>(a.z, b.z), mul_word<T>(a.w, b.w));
}

// The weights of neighbouring channels from c on.
template <class T> __device__ __forceinline__ uint4 weights_of(const Weight& weight, int c) {
    if (weight.kind == WEIGHT_VECTOR) {
        const T* const vector = static_cast<const T*>(weight.vector) + c;  // aligned to no more than an element
        return make_uint4(word_of(vector), word_of(vector + RUN_OF<T> / 4),
                          word_of(vector + RUN_OF<T> / 2), word_of(vector + RUN_OF<T> / 4 * 3));
    }
    const T same[2] = {narrow<T>(Wide<T>(weight.number)), narrow<T>(Wide<T>(weight.number))};
    const u32 word = word_of(same);
    return make_uint4(word, word, word, word);
}

// Neighbouring channels, from c on, of the sum of the sources from `first` to before `last`, whose channels lie side by
// side.
template <class T, int SOURCES>
__device__ __forceinline__ uint4
summed_run(const IgemmParams<SOURCES>& p, int first, int last, int n, int h, int w, int c) {
    uint4 sum;
    for (int j = first; j < last; ++j) {
        const MapSource& from = p.source[j];
        const Weight& weight = from.weight;
        uint4 x = *reinterpret_cast<const uint4*>(static_cast<const T*>(from.base) + offset_of(from, n, h, w) + c);
        if (weight.kind != WEIGHT_NONE) x = mul_run<T>(weights_of<T>(weight, c), x);
        sum = j == first ? x : add_run<T>(sum, x);
    }
    return sum;
}

// One element of the merged map, from wherever it lies.
template <class T, bool ADD, int SOURCES>
__device__ __forceinline__ T gathered(const IgemmParams<SOURCES>& p, int n, int h, int w, int c) {
    const int first = ADD ? 0 : source_at(p, c);
    const int channel = c - (ADD ? 0 : int(p.source[first].first));
    Wide<T> x = load_map<T>(p.source[first], n, h, w, channel);
    if (ADD)
        for (int j = 1; j < p.sources; ++j) x = merge_add<T>(x, load_map<T>(p.source[j], n, h, w, channel));
    return narrow<T>(x);
}
