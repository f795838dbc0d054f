// Instructions that have no spelling in CUDA C that keeps their meaning, each with the plain C++ that stands for it where
// kernels are executed on the host (FUSIONOPS_HOST). Nothing else in this folder holds PTX.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// IEEE arithmetic, one rounding, subnormal numbers kept: CuPy compiles with -ftz=true, which would flush those of
// operators, comparisons among them, and of __fadd_rn alike, and merges promise NumPy's bits.
#ifdef FUSIONOPS_HOST
static inline float add_rn(float a, float b) { return a + b; }
static inline float mul_rn(float a, float b) { return a * b; }
static inline float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline bool is_less(float a, float b) { return a < b; }
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
__device__ __forceinline__ bool is_less(float a, float b) {
    u32 is;
    asm("{.reg .pred less; setp.lt.f32 less, %1, %2; selp.u32 %0, 1, 0, less;}" : "=r"(is) : "f"(a), "f"(b));
    return is != 0;
}
#endif
__device__ __forceinline__ bool is_less(double a, double b) { return a < b; }
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

// Sums and products of two 16-bit numbers at once, each rounded once. bfloat16 has only the multiply-add on sm_80: with a
// factor of 1 it is a sum, with a summand of −0 a product.
#ifdef FUSIONOPS_HOST
template <class T> inline T narrow_to(float x);
template <> inline f16 narrow_to<f16>(float x) { return narrow_f16(x); }
template <> inline bf16 narrow_to<bf16>(float x) { return narrow_bf16(x); }
template <class T> inline u32 add_pair(u32 a, u32 b) {
    const float low = widen(T{u16(a)}) + widen(T{u16(b)}), high = widen(T{u16(a >> 16)}) + widen(T{u16(b >> 16)});
    return narrow_to<T>(low).bits | u32(narrow_to<T>(high).bits) << 16;
}
template <class T> inline u32 mul_pair(u32 a, u32 b) {
    const float low = widen(T{u16(a)}) * widen(T{u16(b)}), high = widen(T{u16(a >> 16)}) * widen(T{u16(b >> 16)});
    return narrow_to<T>(low).bits | u32(narrow_to<T>(high).bits) << 16;
}
#else
template <class T> __device__ u32 add_pair(u32 a, u32 b);
template <class T> __device__ u32 mul_pair(u32 a, u32 b);
template <> __device__ __forceinline__ u32 add_pair<f16>(u32 a, u32 b) {
    u32 c;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
template <> __device__ __forceinline__ u32 mul_pair<f16>(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
template <> __device__ __forceinline__ u32 add_pair<bf16>(u32 a, u32 b) {
    u32 c;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return c;
}
template <> __device__ __forceinline__ u32 mul_pair<bf16>(u32 a, u32 b) {
    u32 c;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(b), "r"(0x80008000u));
    return c;
}
#endif

// The same of what a 32-bit word holds, two numbers or one.
template <class T> __device__ __forceinline__ u32 add_word(u32 a, u32 b) { return add_pair<T>(a, b); }
template <class T> __device__ __forceinline__ u32 mul_word(u32 a, u32 b) { return mul_pair<T>(a, b); }
template <> __device__ __forceinline__ u32 add_word<float>(u32 a, u32 b) {
    return __float_as_uint(add_rn(__uint_as_float(a), __uint_as_float(b)));
}
template <> __device__ __forceinline__ u32 mul_word<float>(u32 a, u32 b) {
    return __float_as_uint(mul_rn(__uint_as_float(a), __uint_as_float(b)));
}
template <class T> __device__ __forceinline__ u32 word_of(const T* two) { return two[0].bits | u32(two[1].bits) << 16; }
__device__ __forceinline__ u32 word_of(const float* one) { return __float_as_uint(*one); }

// The TF32 number, 10 bits behind the point, nearest to a float32; of two the one further from 0.
#ifdef FUSIONOPS_HOST
inline u32 tf32_of(float x) {
    const u32 bits = __float_as_uint(x);
    return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & ~0x1FFFu;
}
#else
__device__ __forceinline__ u32 tf32_of(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
#endif

// Copies of 16 bytes from global to shared memory that run beside the kernel, in groups. Of each the first `bytes` (0 or
// 16) are read and the rest is zero. On the host they happen when they are waited for, not before.
#ifdef FUSIONOPS_HOST
#include <vector>
struct PendingCopy { void* to; const void* from; int bytes; };
inline std::vector<std::vector<PendingCopy>>& pending_copies() {
    static thread_local std::vector<std::vector<std::vector<PendingCopy>>> of_threads(1024);
    return of_threads[threadIdx.x];
}
inline void copy_async(void* to, const void* from, int bytes) {
    auto& groups = pending_copies();
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, from, bytes});
}
inline void copy_commit() { pending_copies().emplace_back(); }
template <int OPEN> inline void copy_wait() {  // until at most OPEN committed groups are under way
    auto& groups = pending_copies();
    while (int(groups.size()) > OPEN + 1) {
        for (const PendingCopy& copy : groups.front()) {
            memset(copy.to, 0, 16);
            memcpy(copy.to, copy.from, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}
#else
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int OPEN> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}
#endif

// Four 8×8 matrices of 16-bit numbers, whose rows of 16 bytes lie where the lanes say: lanes 0–7 name the rows of the
// first, and so on. A lane receives of each the elements (lane/4, 2·(lane%4)) and the next in its row, or of rows of four
// 32-bit numbers (lane/4, lane%4); turned, of the transpose.
#ifdef FUSIONOPS_HOST
template <bool TURNED> inline void load_matrices(u32 (&to)[4], const void* row) {
    struct Lane { const u16* row; u32 to[4]; } mine{static_cast<const u16*>(row), {}};
    fusionops_host::warp_collective(~0u, mine, [](auto lanes) {
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m) {
                const int r = lane / 4, c = lane % 4 * 2;
                const u16 low = TURNED ? lanes[m * 8 + c].row[r] : lanes[m * 8 + r].row[c];
                const u16 high = TURNED ? lanes[m * 8 + c + 1].row[r] : lanes[m * 8 + r].row[c + 1];
                lanes[lane].to[m] = low | u32(high) << 16;
            }
    });
    memcpy(to, mine.to, sizeof to);
}
#else
template <bool TURNED> __device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
    if (TURNED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}
#endif

// sums (16×8) += a (16×16) · b (16×8), products summed in float32. With g = lane/4 and t = lane%4 a lane holds
//   a: (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8), two neighbours in a row each     b: (2t, g) (2t+8, g), two in a column
//   sums: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
// For T = float the factors are TF32: sums += a (16×8) · b (8×8), and a lane holds
//   a: (g, t) (g+8, t) (g, t+4) (g+8, t+4)     b: (t, g) (t+4, g)     sums as above
#ifdef FUSIONOPS_HOST
template <class T> inline float number_of(u32 word, int i) { return widen(T{u16(word >> 16 * i)}); }
template <> inline float number_of<float>(u32 word, int) { return __uint_as_float(word & ~0x1FFFu); }  // 19 bits are read
template <class T> inline void multiply_tile(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    struct Lane { float sums[4]; u32 a[4], b[2]; } mine;
    memcpy(mine.sums, sums, sizeof sums), memcpy(mine.a, a, sizeof a), memcpy(mine.b, b, sizeof b);
    fusionops_host::warp_collective(~0u, mine, [](auto lanes) {
        const int WORD = 4 / sizeof(T), DEPTH = 8 * WORD;  // numbers of a word
        float rows[16][DEPTH], columns[8][DEPTH];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * WORD;
            for (int i = 0; i < WORD; ++i) {
                for (int r = 0; r < 4; ++r)
                    rows[g + r % 2 * 8][t + r / 2 * 4 * WORD + i] = number_of<T>(lanes[lane].a[r], i);
                for (int r = 0; r < 2; ++r) columns[g][t + r * 4 * WORD + i] = number_of<T>(lanes[lane].b[r], i);
            }
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                float sum = 0;
                for (int k = 0; k < DEPTH; ++k) sum += rows[lane / 4 + i / 2 * 8][k] * columns[lane % 4 * 2 + i % 2][k];
                lanes[lane].sums[i] += sum;
            }
    });
    memcpy(sums, mine.sums, sizeof sums);
}
#else
template <class T> struct Multiply;
#define FUSIONOPS_MULTIPLY(T, name, depth)                                                                      \
    template <> struct Multiply<T> {                                                                            \
        static __device__ __forceinline__ void tile(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {   \
            asm volatile("mma.sync.aligned.m16n8k" depth ".row.col.f32." name "." name ".f32 "                  \
                         "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
                         : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
        }                                                                                                       \
    };
FUSIONOPS_MULTIPLY(f16, "f16", "16")
FUSIONOPS_MULTIPLY(bf16, "bf16", "16")
FUSIONOPS_MULTIPLY(float, "tf32", "8")
#undef FUSIONOPS_MULTIPLY
template <class T>
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    Multiply<T>::tile(sums, a, b);
}
#endif
