// Instructions that have no spelling in CUDA C that keeps their meaning, each with the plain C++ that stands for it where
// kernels are executed on the host (FUSIONOPS_HOST). Nothing else in this folder holds PTX.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// IEEE arithmetic, one rounding, subnormal numbers kept: CuPy compiles with -ftz=true, which would flush those of
// operators and of __fadd_rn alike, and merges promise NumPy's bits.
#ifdef FUSIONOPS_HOST
static inline float add_rn(float a, float b) { return a + b; }
static inline float mul_rn(float a, float b) { return a * b; }
static inline float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
#else
__device__ __forceinline__ float add_rn(float a, float b) {
    float c;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ __forceinline__ float mul_rn(float a, float b) {
    float c;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ __forceinline__ float fma_rn(float a, float b, float c) {
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}
#endif
__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double fma_rn(double a, double b, double c) { return fma(a, b, c); }

// float16 and bfloat16 are storage only: bits, without the headers of the CUDA toolkit.
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

#ifdef FUSIONOPS_HOST
static inline float widen(f16 x) {
    u32 sign = u32(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | fraction << 13);
    float size = exponent ? ldexpf(float(1024 + fraction), int(exponent) - 25) : ldexpf(float(fraction), -24);
    return sign ? -size : size;
}
static inline f16 narrow_f16(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return f16{u16(sign | 0x7FFF)};
    float magnitude = __uint_as_float(size);
    if (magnitude >= 65520.0f) return f16{u16(sign | 0x7C00)};
    int exponent = magnitude < 6.103515625e-05f ? -14 : int(size >> 23) - 127;
    float rounded = nearbyintf(ldexpf(magnitude, 10 - exponent));  // of at most 2048 steps
    u32 steps = u32(rounded);
    return f16{u16(sign | (steps + (exponent + 14) * 1024))};
}
static inline bf16 narrow_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return bf16{0x7FFF};
    return bf16{u16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
#else
__device__ __forceinline__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ f16 narrow_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
__device__ __forceinline__ bf16 narrow_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#endif
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
