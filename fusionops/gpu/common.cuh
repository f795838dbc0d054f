// What all kernels share: element formats, the merge, activations, the launch parameters, shared memory.
#pragma once
#include "primitives.cuh"

#ifndef FUSIONOPS_HOST
#define FUSIONOPS_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#endif

// Element formats. `Wide<T>` is what elements of T are computed in; `rounded<T>` is what storing and loading would make of
// such a number, so that a fused merge has the bits of a stored one.

template <class T> struct WideOf { typedef T type; };
template <> struct WideOf<f16> { typedef float type; };
template <> struct WideOf<bf16> { typedef float type; };
template <class T> using Wide = typename WideOf<T>::type;

template <class T> __device__ __forceinline__ T widen(T x) { return x; }

template <class T> struct Narrow {
    static __device__ __forceinline__ T of(T x) { return x; }
};
template <> struct Narrow<f16> {
    static __device__ __forceinline__ f16 of(float x) { return narrow_f16(x); }
};
template <> struct Narrow<bf16> {
    static __device__ __forceinline__ bf16 of(float x) { return narrow_bf16(x); }
};
template <class T> __device__ __forceinline__ T narrow(Wide<T> x) { return Narrow<T>::of(x); }
template <class T> __device__ __forceinline__ Wide<T> rounded(Wide<T> x) { return widen(narrow<T>(x)); }

// Integers wrap: two's complement, whatever their sign. A sum of booleans is their disjunction.
struct boolean { u8 value; };
template <class I> __device__ __forceinline__ I add_rn(I a, I b) { return a + b; }
__device__ __forceinline__ boolean add_rn(boolean a, boolean b) { return boolean{u8(a.value | b.value)}; }

template <class T> __device__ __forceinline__ Wide<T> merge_add(Wide<T> a, Wide<T> b) { return rounded<T>(add_rn(a, b)); }
template <class T> __device__ __forceinline__ Wide<T> merge_mul(Wide<T> a, Wide<T> b) { return rounded<T>(mul_rn(a, b)); }

// Weights and activations are for floating formats; for others they do not exist.
template <class T> struct IsFloating { static const bool value = false; };
template <> struct IsFloating<f16> { static const bool value = true; };
template <> struct IsFloating<bf16> { static const bool value = true; };
template <> struct IsFloating<float> { static const bool value = true; };
template <> struct IsFloating<double> { static const bool value = true; };

// A run of V elements that is moved by one instruction.
template <class T, int V> struct alignas(sizeof(T) * V) Run { T at[V]; };

// The weight of a source: none, one number, or one number a channel.
enum WeightKind { WEIGHT_NONE, WEIGHT_SCALAR, WEIGHT_VECTOR };

struct Weight {
    i64 kind;
    double number;
    const void* vector;
};

// Of a weight that is not none.
template <class T> __device__ __forceinline__ Wide<T> factor_of(const Weight& weight, i64 channel) {
    if (weight.kind == WEIGHT_SCALAR) return Wide<T>(weight.number);
    return widen(static_cast<const T*>(weight.vector)[channel]);
}

template <class T> __device__ __forceinline__ Wide<T> weighted(const Weight& weight, Wide<T> x, i64 channel) {
    if constexpr (IsFloating<T>::value)
        if (weight.kind != WEIGHT_NONE) return merge_mul<T>(factor_of<T>(weight, channel), x);
    return x;
}

// Activations, numbered as in `spec.ACTIVATIONS`, 0 for none. NaN goes through every one as NaN.
enum Activation { NONE, RELU, RELU6, LEAKY_RELU, SIGMOID, TANH, SILU, HARDSWISH, HARDSIGMOID, GELU };

template <class X> __device__ __forceinline__ X relu(X x) { return is_less(x, X(0)) ? X(0) : x; }
template <class X> __device__ __forceinline__ X relu6(X x) { return relu(x) > X(6) ? X(6) : relu(x); }
template <class X> __device__ __forceinline__ X hardsigmoid(X x) { return relu6(add_rn(x, X(3))) / X(6); }

template <class X> __device__ __forceinline__ X sigmoid(X x) {
    X power = exp(x < X(0) ? x : -x);  // never overflows
    return (x < X(0) ? power : X(1)) / (X(1) + power);
}

// x·Φ(x), Φ the normal distribution: Φ(−|x|) = erfc(|x|/√2)/2 keeps its relative accuracy.
__device__ __forceinline__ double gelu(double x) { return x * (0.5 * erfc(-0.70710678118654752440 * x)); }
__device__ __forceinline__ float gelu(float x) { return float(gelu(double(x))); }

template <class X> __device__ __noinline__ X transcendental(i64 kind, X x) {
    switch (kind) {
        case SIGMOID: return sigmoid(x);
        case TANH: return tanh(x);
        case SILU: return mul_rn(x, sigmoid(x));
        case GELU: return gelu(x);
    }
    return x;
}

template <class T> __device__ __forceinline__ Wide<T> activated(i64 kind, double slope, Wide<T> x) {
    typedef Wide<T> X;
    if constexpr (IsFloating<T>::value) {
        if (kind == NONE) return x;
        if (kind == RELU) return relu(x);
        if (kind == RELU6) return relu6(x);
        if (kind == LEAKY_RELU) return is_less(x, X(0)) ? mul_rn(x, X(slope)) : x;
        if (kind == HARDSWISH) return mul_rn(x, hardsigmoid(x));
        if (kind == HARDSIGMOID) return hardsigmoid(x);
        return transcendental(kind, x);  // called, not copied to where each sum is stored: these are long
    }
    return x;
}
