// CUDA C for the host compiler: module.py puts this header in front of a CUDA source and g++ compiles both as C++.
//
// Sources tell the host by FUSIONOPS_HOST and reach dynamic shared memory through FUSIONOPS_SHARED(type, name), which
// a device build defines as `extern __shared__ __align__(1024) type name[]`.
// Missing on purpose: float atomics (the order of additions would be left to chance) and __activemask.
#pragma once
#define FUSIONOPS_HOST 1

#include "fibers.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__ __attribute__((used))  // module.py looks for it
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static_assert(false, "shared memory only as FUSIONOPS_SHARED(type, name): only that is poisoned");
#define FUSIONOPS_SHARED(type, name) type* const name = reinterpret_cast<type*>(fusionops_host::current->block->shared)

#define threadIdx (fusionops_host::current->thread)
#define blockIdx (fusionops_host::current->block->index)
#define blockDim (fusionops_host::current->block->extent)
#define gridDim (fusionops_host::current->block->grid)
constexpr int warpSize = fusionops_host::WARP;

struct dim3 : uint3 {
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

// Aligned as on the device, where a misaligned access is an error.
#define FUSIONOPS_HOST_VECTOR(scalar, name)                                                 \
    struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                            \
    struct alignas(16) name##4 { scalar x, y, z, w; };                                      \
    constexpr name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                 \
    constexpr name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
FUSIONOPS_HOST_VECTOR(float, float)
FUSIONOPS_HOST_VECTOR(double, double)
FUSIONOPS_HOST_VECTOR(int, int)
FUSIONOPS_HOST_VECTOR(unsigned, uint)
#undef FUSIONOPS_HOST_VECTOR

// ---- Barriers, votes and shuffles

inline void __syncthreads() { fusionops_host::syncthreads(); }
inline int __syncthreads_count(int predicate) { return fusionops_host::syncthreads(predicate != 0); }
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }

inline void __syncwarp(unsigned mask = ~0u) {
    char nothing;
    fusionops_host::warp_collective(mask, nothing, [](auto) {});
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    struct Vote {
        bool yes;
        unsigned ballot;
    } mine{predicate != 0, 0};
    fusionops_host::warp_collective(mask, mine, [](auto lanes) {
        unsigned ballot = 0;
        for (unsigned lane = 0; lane < fusionops_host::WARP; ++lane)
            if (lanes.mask >> lane & 1) ballot |= unsigned(lanes[lane].yes) << lane;
        for (unsigned lane = 0; lane < fusionops_host::WARP; ++lane)
            if (lanes.mask >> lane & 1) lanes[lane].ballot = ballot;
    });
    return mine.ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }

namespace fusionops_host {

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
    struct Shuffle {
        T value, result;
        unsigned source;
    } mine{value, value, source};
    warp_collective(mask, mine, [](auto lanes) {
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (lanes.mask >> lane & 1) lanes[lane].result = lanes[lanes[lane].source].value;
    });
    return mine.result;
}

inline unsigned lane() { return current->number % WARP; }

}  // namespace fusionops_host

// A lane whose source lies outside its segment of `width` lanes keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    const unsigned lane = fusionops_host::lane(), inside = width - 1;
    return fusionops_host::shuffle(mask, value, (lane & ~inside) | (source & inside));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    const unsigned lane = fusionops_host::lane(), inside = width - 1;
    return fusionops_host::shuffle(mask, value, (lane & inside) < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    const unsigned lane = fusionops_host::lane(), inside = width - 1;
    return fusionops_host::shuffle(mask, value, (lane & inside) + delta > inside ? lane : lane + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int width = warpSize) {
    const unsigned lane = fusionops_host::lane(), inside = width - 1, source = lane ^ flipped;
    return fusionops_host::shuffle(mask, value, source > (lane | inside) ? lane : source);
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { fusionops_host::fail("__trap()"); }

// ---- Memory: what hints at caches says nothing here

template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> void __stcg(T* address, T value) { *address = value; }
template <class T> void __stcs(T* address, T value) { *address = value; }

// ---- Arithmetic; -ffp-contract=off keeps products and sums apart, as the _rn functions promise

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline int __mulhi(int a, int b) { return int64_t(a) * b >> 32; }

namespace fusionops_host {

template <class To, class From>
To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To same;
    memcpy(&same, &value, sizeof same);
    return same;
}

}  // namespace fusionops_host

inline unsigned __float_as_uint(float value) { return fusionops_host::bits<unsigned>(value); }
inline int __float_as_int(float value) { return fusionops_host::bits<int>(value); }
inline float __uint_as_float(unsigned value) { return fusionops_host::bits<float>(value); }
inline float __int_as_float(int value) { return fusionops_host::bits<float>(value); }
inline long long __double_as_longlong(double value) { return fusionops_host::bits<long long>(value); }
inline double __longlong_as_double(long long value) { return fusionops_host::bits<double>(value); }

// Of two numbers, also of different types; of a number and a NaN the number, as CUDA has it.
template <class A, class B>
constexpr auto min(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) || T(a) != T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr auto max(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) || T(a) != T(a) ? T(b) : T(a);
}

// ---- What module.py reads from the library

namespace fusionops_host {

struct Parameter {  // module._Parameter is the same in ctypes
    char kind;          // p pointer, f floating-point number, i integer, s struct
    char element_kind;  // of what a pointer points to: f, i, s
    uint16_t is_const;  // what a pointer points to
    uint32_t bytes, element_bytes;
};

struct Kernel {  // module._Kernel is the same in ctypes
    void (*run)(Launch&, const char*);
    const Parameter* parameters;
    uint64_t count;
};

template <class T>
constexpr char kind_of() {
    return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : std::is_class_v<T> ? 's' : 'i';
}

template <class T>
constexpr Parameter describe() {
    using Element = std::conditional_t<std::is_void_v<std::remove_pointer_t<T>>, char, std::remove_pointer_t<T>>;
    static_assert(std::is_trivially_copyable_v<T>, "a kernel's arguments are copied byte by byte");
    return {kind_of<T>(), kind_of<std::remove_cv_t<Element>>(), std::is_const_v<std::remove_pointer_t<T>>, sizeof(T),
            sizeof(Element)};
}

template <class T>
T take(const char*& packed) {
    T value;
    memcpy(&value, packed, sizeof value);
    packed += sizeof value;
    return value;
}

template <auto function, class = decltype(function)>
struct KernelOf;

template <auto function, class... T>
struct KernelOf<function, void (*)(T...)> {
    static_assert((0 + ... + sizeof(T)) <= 32764, "CUDA passes at most 32764 bytes of parameters");
    using Arguments = std::tuple<T...>;

    static constexpr Parameter parameters[sizeof...(T) + 1] = {describe<T>()...};

    // `packed` holds the arguments without gaps.
    static void run(Launch& launch, [[maybe_unused]] const char* packed) {
        const Arguments arguments{take<T>(packed)...};  // braces: from the first to the last
        run_blocks(launch, [](const void* arguments) {
            std::apply(function, *static_cast<const Arguments*>(arguments));
        }, &arguments);
    }
};

template <auto function>
constexpr Kernel kernel = {KernelOf<function>::run, KernelOf<function>::parameters,
                           sizeof KernelOf<function>::parameters / sizeof(Parameter) - 1};

}  // namespace fusionops_host
