// The instructions of Hopper, compute capability 9.0, each with the plain C++ that stands for it on the host: barriers in
// shared memory, copies of boxes of a tensor, and products of a warpgroup. As primitives.cuh; nothing else holds PTX.
#pragma once
#include "common.cuh"

// A tensor in global memory of which boxes are copied: on a device what the driver makes of it.
struct alignas(64) TensorMap {
#ifdef FUSIONOPS_HOST
    const char* base;
    u64 steps[4];  // bytes from one element to the next, of the axes behind the first
    u32 extents[5], box[5], rank, bytes;  // bytes of an element
    char rest[128 - 8 - 32 - 48];
#else
    char opaque[128];
#endif
};

// Barriers. A phase ends when as many threads have arrived as the barrier counts and all bytes that were announced have
// come; mbar_wait waits until the phase of that parity, 0 for the first, has ended. What a thread wrote to shared memory
// before it arrived is seen by those that waited; what products and copies of boxes shall see needs fence_products too.
//
// On the host every second copy of a box happens at once, as if the device were ahead of the threads, and the others only
// when its barrier is waited for.
#ifdef FUSIONOPS_HOST
#include <vector>
struct BarrierBits { u16 count; short pending; int bytes_and_phase; };  // twice the bytes, plus the parity of the phase
struct PendingBox { u64* barrier; char* to; const TensorMap* map; int at[5]; };
inline std::vector<PendingBox>& pending_boxes() {
    static thread_local std::vector<PendingBox> of_block;
    return of_block;
}
inline BarrierBits& bits_of(u64* barrier) { return *reinterpret_cast<BarrierBits*>(barrier); }
inline void end_phase(u64* barrier) {
    BarrierBits& bits = bits_of(barrier);
    if (bits.pending < 0) fusionops_host::fail("more threads arrived at a barrier than it counts");
    if (bits.pending == 0 && bits.bytes_and_phase >> 1 == 0) bits.bytes_and_phase ^= 1, bits.pending = short(bits.count);
}
inline u32 shared_offset(const void* p) {
    return u32(static_cast<const char*>(p) - fusionops_host::current->block->shared);
}
// Where the hardware puts a byte of rows of 128: the 16-byte pieces of eight rows are exchanged.
inline u32 exchanged(u32 offset) { return offset ^ (offset >> 7 & 7) << 4; }
inline void copy_box(const PendingBox& box) {
    const TensorMap& map = *box.map;
    char* const shared = box.to - shared_offset(box.to);
    u32 count = 1;
    for (u32 axis = 0; axis < map.rank; ++axis) count *= map.box[axis];
    for (u32 i = 0; i < count; ++i) {
        const char* from = map.base;
        bool inside = true;
        u32 rest = i;
        for (u32 axis = 0; axis < map.rank; ++axis) {
            const i64 here = box.at[axis] + i64(rest % map.box[axis]);
            rest /= map.box[axis];
            inside &= here >= 0 && here < i64(map.extents[axis]);
            from += here * i64(axis ? map.steps[axis - 1] : map.bytes);
        }
        char* const to = shared + exchanged(shared_offset(box.to) + i * map.bytes);
        if (inside) memcpy(to, from, map.bytes); else memset(to, 0, map.bytes);
    }
    bits_of(box.barrier).bytes_and_phase -= int(count * map.bytes) * 2;
    end_phase(box.barrier);
}
inline void bring_boxes(u64* barrier) {
    auto& pending = pending_boxes();
    for (size_t i = 0; i < pending.size();)
        if (pending[i].barrier == barrier) {
            const PendingBox box = pending[i];
            pending.erase(pending.begin() + long(i));
            copy_box(box);
        } else {
            ++i;
        }
}
inline void mbar_init(u64* barrier, int count) {
    auto& pending = pending_boxes();  // of a block that was abandoned
    for (size_t i = pending.size(); i-- > 0;)
        if (pending[i].barrier == barrier) pending.erase(pending.begin() + long(i));
    bits_of(barrier) = {u16(count), short(count), 0};
}
inline void mbar_publish() {}
inline void mbar_arrive(u64* barrier) {
    --bits_of(barrier).pending;
    end_phase(barrier);
}
inline void mbar_announce(u64* barrier, u32 bytes) {
    bits_of(barrier).bytes_and_phase += int(bytes) * 2;
    mbar_arrive(barrier);
}
inline void mbar_wait(u64* barrier, u32 parity) {
    fusionops_host::wait_until([=] {
        bring_boxes(barrier);
        return u32(bits_of(barrier).bytes_and_phase & 1) != parity;
    }, "wait at a barrier in shared memory");
}
inline void fence_products() {}
template <int RANK> inline void copy_box_async(void* to, const TensorMap& map, u64* barrier, const int (&at)[RANK]) {
    static thread_local bool at_once = false;
    if (map.rank != RANK) fusionops_host::fail("a box of rank %d of a tensor of rank %u", RANK, map.rank);
    if (shared_offset(to) % 1024) fusionops_host::fail("a box is copied to byte %u of shared memory", shared_offset(to));
    PendingBox box{barrier, static_cast<char*>(to), &map, {}};
    for (int axis = 0; axis < RANK; ++axis) box.at[axis] = at[axis];
    at_once = !at_once;
    if (at_once) copy_box(box); else pending_boxes().push_back(box);
}
template <int COUNT> inline void more_registers() {}
template <int COUNT> inline void fewer_registers() {}
#else
__device__ __forceinline__ void mbar_init(u64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes new barriers known to the copies.
__device__ __forceinline__ void mbar_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbar_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbar_announce(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbar_wait(u64* barrier, u32 parity) {
    asm volatile("{\n\t"
                 ".reg .pred over;\n\t"
                 "again_%=:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n\t"
                 "@!over bra again_%=;\n\t"
                 "}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
__device__ __forceinline__ void fence_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int RANK>
__device__ __forceinline__ void copy_box_async(void* to, const TensorMap& map, u64* barrier, const int (&at)[RANK]) {
    static_assert(RANK == 3 || RANK == 4, "boxes of filters, and of maps");
    if constexpr (RANK == 3)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5}], [%2];"
                     ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2])
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                     ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]),
                     "r"(at[3]) : "memory");
}
// Registers of the threads of this warpgroup, which another one gives up.
template <int COUNT> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
#endif

// Products of a warpgroup: sums (64×N) += a (64×16) · b (N×16)ᵀ, both in shared memory as boxes of rows of 128 bytes lie,
// 64 numbers, of which a `matrix` names the first row and 16 columns; 16 columns further it is 2 more. Thread t holds the
// sums (t/32·16 + t%32/4 + 8·(i/2%2), i/4·8 + t%4·2 + i%2). They are formed behind the threads: neither sums nor shared
// memory may be touched until products_wait says that the group which products_commit closed is done.
//
// On the host they are formed when they are waited for, not before.
#ifdef FUSIONOPS_HOST
__attribute__((always_inline)) inline u64 matrix_at(const void* p) {
    return u64(shared_offset(p) & 0x3FFFF) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
struct Product { float* sums; u64 a, b; int n; bool accumulate; float (*number)(const void*); };
inline std::vector<std::vector<Product>>& pending_products() {
    static thread_local std::vector<std::vector<std::vector<Product>>> of_threads(1024);
    return of_threads[threadIdx.x];
}
template <class T> inline float number_at(const void* p) { return widen(*static_cast<const T*>(p)); }
inline void read_matrix(float* to, u64 matrix, int rows, float (*number)(const void*)) {
    const u32 base = u32(matrix & 0x3FFF) << 4, step = u32(matrix >> 32 & 0x3FFF) << 4;
    const char* const shared = fusionops_host::current->block->shared;
    for (int row = 0; row < rows; ++row)
        for (int k = 0; k < 16; ++k)
            to[row * 16 + k] = number(shared + exchanged(base + u32(row / 8) * step + u32(row % 8) * 128 + u32(k) * 2));
}
inline void products_begin() {}
template <class T, int N> inline void multiply_async(float (&sums)[N / 2], u64 a, u64 b, bool accumulate) {
    auto& groups = pending_products();
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({sums, a, b, N, accumulate, number_at<T>});
}
inline void products_commit() { pending_products().emplace_back(); }
inline void form_products(const std::vector<Product>& mine) {
    struct Group { const Product* products; size_t count; } here{mine.data(), mine.size()};
    fusionops_host::warpgroup_collective(here, [](auto threads) {
        static thread_local std::vector<float> rows(64 * 16), columns(256 * 16);
        float *const a = rows.data(), *const b = columns.data();
        for (size_t i = 0; i < threads[0].count; ++i) {
            const Product first = threads[0].products[i];
            read_matrix(a, first.a, 64, first.number);
            read_matrix(b, first.b, first.n, first.number);
            for (unsigned t = 0; t < 128; ++t) {
                if (threads[t].count != threads[0].count) fusionops_host::fail("threads of a warpgroup form other products");
                float* const sums = threads[t].products[i].sums;
                for (int at = 0; at < first.n / 2; ++at) {
                    const float* const row = a + (t / 32 * 16 + t % 32 / 4 + 8 * (at / 2 % 2)) * 16;
                    const float* const column = b + (at / 4 * 8 + int(t % 4) * 2 + at % 2) * 16;
                    float sum = 0;
                    for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
                    sums[at] = first.accumulate ? sums[at] + sum : sum;
                }
            }
        }
    });
}
template <int OPEN> inline void products_wait() {  // until at most OPEN committed groups are under way
    auto& groups = pending_products();
    while (int(groups.size()) > OPEN + 1) {
        form_products(groups.front());
        groups.erase(groups.begin());
    }
}
#else
__device__ __forceinline__ u64 matrix_at(const void* p) {
    return u64(shared_address(p) & 0x3FFFF) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;  // 1024 bytes from 8 rows to 8 rows
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OPEN> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OPEN) : "memory");
}
template <class T, int N> struct WarpgroupMultiply;
#define FUSIONOPS_REGISTERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSIONOPS_REGISTERS_128 FUSIONOPS_REGISTERS_64 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSIONOPS_REGISTERS_256 FUSIONOPS_REGISTERS_128 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FUSIONOPS_SUMS_8(i)                                                                                             \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]),       \
        "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define FUSIONOPS_SUMS_32(i) \
    FUSIONOPS_SUMS_8(i), FUSIONOPS_SUMS_8(i + 8), FUSIONOPS_SUMS_8(i + 16), FUSIONOPS_SUMS_8(i + 24)
#define FUSIONOPS_MULTIPLY(T, name, N, registers, a_at, b_at, scale_at, ...)                                            \
    template <> struct WarpgroupMultiply<T, N> {                                                                        \
        static __device__ __forceinline__ void tile(float (&sums)[N / 2], u64 a, u64 b, int accumulate) {               \
            asm volatile("{\n\t"                                                                                        \
                         ".reg .pred accumulate;\n\t"                                                                   \
                         "setp.ne.b32 accumulate, %" scale_at ", 0;\n\t"                                                \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " "                            \
                         "{" registers "}, %" a_at ", %" b_at ", accumulate, 1, 1, 0, 0;\n\t"                           \
                         "}" : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate));                                          \
        }                                                                                                               \
    };
#define FUSIONOPS_MULTIPLY_ALL(T, name)                                                                                 \
    FUSIONOPS_MULTIPLY(T, name, 64, FUSIONOPS_REGISTERS_64, "32", "33", "34", FUSIONOPS_SUMS_32(0))                     \
    FUSIONOPS_MULTIPLY(T, name, 128, FUSIONOPS_REGISTERS_128, "64", "65", "66", FUSIONOPS_SUMS_32(0),                   \
                       FUSIONOPS_SUMS_32(32))                                                                           \
    FUSIONOPS_MULTIPLY(T, name, 256, FUSIONOPS_REGISTERS_256, "128", "129", "130", FUSIONOPS_SUMS_32(0),                \
                       FUSIONOPS_SUMS_32(32), FUSIONOPS_SUMS_32(64), FUSIONOPS_SUMS_32(96))
FUSIONOPS_MULTIPLY_ALL(f16, "f16")
FUSIONOPS_MULTIPLY_ALL(bf16, "bf16")
#undef FUSIONOPS_MULTIPLY_ALL
#undef FUSIONOPS_MULTIPLY
template <class T, int N>
__device__ __forceinline__ void multiply_async(float (&sums)[N / 2], u64 a, u64 b, bool accumulate) {
    WarpgroupMultiply<T, N>::tile(sums, a, b, accumulate);
}
#endif
