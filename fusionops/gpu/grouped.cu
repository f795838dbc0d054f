// {add,concat}_conv_fprop_grouped: convolutions in groups of few filters, depthwise ones first of all, on CUDA cores.
//
//   y[n,p,q,k] = act( Σ_{r,s,c} merged[n, h, w, group(k)·C + c] · f[r,s,c,k] + bias[k] + residual[n,p,q,k] )
//   h = p·stride_h + r·dilation_h − pad_top    w likewise    group(k) = k / K    C, K of one group
//
// A thread owns V neighbouring filters of TQ neighbouring columns of a row, all sums in registers, and takes one such
// strip after the other. V is a run of filters, channels and outputs that one instruction each moves, or 1. Per row of
// taps:
//   where groups have one channel, and columns and taps lie side by side, neighbouring columns share all taps but one:
//   every pixel is loaded once, and moves along the thread's columns from tap to tap;
//   elsewhere every column loads its pixel of each tap: a channel for each filter, or a run that all filters share.
// Filters are the same for all strips of their run, and come from the cache after the first. Nothing is staged.
// Order of the sum: r, s, c ascending, one product after the other. Padding is skipped, not multiplied.
//
// Requires: THREADS threads. V > 1 only if channels, filters and outputs have step 1; every other step, the channels and
// the first channel of every source, and all filters are multiples of V; every base lies at a multiple of V elements; and
// groups have one channel and one filter, or multiples of V of both. A residual and a bias may lie anywhere.
#include "igemm.cuh"

const int THREADS = 256;
const int TAPS = 3;   // that are multiplied between two loads
const int BATCH = 4;  // loads in flight

// Columns of a thread: as many as fit the registers with their pixels, and with loads that wait to be added to these.
__device__ constexpr int columns(bool adds) { return adds ? 4 : 8; }

// The first column of a strip, and its run of filters. Neighbouring threads take neighbours in memory, then the rows
// below, whose taps are in part the same.
struct Strip { Pixel first; int k; };

template <class I, int V, int TQ, int SOURCES>
__device__ __forceinline__ Strip strip_of(const IgemmParams<SOURCES>& p, I item, I runs, I strips) {
    const bool by_channel = V > 1 || p.source[0].steps[3] == 1;
    const I inner = by_channel ? runs : strips, outer = by_channel ? strips : runs, rows = I(p.P);
    const I i = item % inner, row = item / inner % rows, rest = item / inner / rows, o = rest % outer;
    const int q = int(by_channel ? o : i) * TQ, line = int(row), n = int(rest / outer);
    const int h = int(line * p.stride_h - p.pad_top), w = int(q * p.stride_w - p.pad_left);
    return Strip{Pixel{n, line, q, h, w}, int(by_channel ? i : o) * V};
}

// V channels, from c on, of a source or of the sum of all, under COUNT pixels of row h, `step` apart from w on. Bit i of
// the result says that pixel i is inside the map; nothing is read outside.
template <class T, bool ADD, int V, int COUNT, int SOURCES>
__device__ __forceinline__ u32 fetch(const IgemmParams<SOURCES>& p, Wide<T> (*x)[V], int source, int n, int h, int w,
                                     int step, int c) {
    u32 inside = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) inside |= u32(unsigned(w + i * step) < unsigned(p.W)) << i;
#pragma unroll 1
    for (int j = source; j < (ADD ? int(p.sources) : source + 1); ++j) {
        const MapSource& from = p.source[j];
        const T* const row = static_cast<const T*>(from.base) + offset_of(from, n, h, 0) + c * from.steps[3];
        const T* next = row + w * from.steps[2];
#pragma unroll
        for (int i0 = 0; i0 < COUNT; i0 += BATCH) {
            const int count = COUNT - i0 < BATCH ? COUNT - i0 : BATCH;
            Run<T, V> loaded[BATCH] = {};
            Wide<T> one[BATCH][V];
#pragma unroll
            for (int i = 0; i < count; ++i) {
                const T* at = next;
                if (from.up_w != 1) at = row + (w + (i0 + i) * step) / int(from.up_w) * from.steps[2];
                if (inside >> (i0 + i) & 1) loaded[i] = *reinterpret_cast<const Run<T, V>*>(at);
                next += step * from.steps[2];
            }
#pragma unroll
            for (int i = 0; i < count; ++i)
#pragma unroll
                for (int v = 0; v < V; ++v) one[i][v] = widen(loaded[i].at[v]);
            if (from.weight.kind != WEIGHT_NONE)
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const Wide<T> factor = factor_of<T>(from.weight, c + v);
#pragma unroll
                    for (int i = 0; i < count; ++i) one[i][v] = merge_mul<T>(factor, one[i][v]);
                }
            if (ADD && j > 0) {
#pragma unroll
                for (int i = 0; i < count; ++i)
#pragma unroll
                    for (int v = 0; v < V; ++v) x[i0 + i][v] = merge_add<T>(x[i0 + i][v], one[i][v]);
            } else {
#pragma unroll
                for (int i = 0; i < count; ++i)
#pragma unroll
                    for (int v = 0; v < V; ++v) x[i0 + i][v] = one[i][v];
            }
        }
    }
    return inside;
}

// One tap of one channel of a group: every filter's own, or channel `at` of the run, which all filters share.
template <bool OWN, int V, int TQ, class X>
__device__ __forceinline__ void multiply(X (&sums)[TQ][V], const X (*x)[V], u32 inside, int at, const X (&f)[V]) {
#pragma unroll
    for (int t = 0; t < TQ; ++t)
        if (inside >> t & 1)
#pragma unroll
            for (int v = 0; v < V; ++v) sums[t][v] = fma_rn(x[t][OWN ? v : at], f[v], sums[t][v]);
}

template <class T, bool ADD, int V, int SOURCES>
__global__ void __launch_bounds__(THREADS, 2) conv_fprop_grouped(const __grid_constant__ IgemmParams<SOURCES> p) {
    static_assert(sizeof(T) * V <= 16, "one access moves at most 16 bytes");
    typedef Wide<T> X;
    constexpr int TQ = columns(ADD);
    const i64 runs = p.groups * p.K / V, strips = (p.Q + TQ - 1) / TQ, items = p.N * p.P * strips * runs;
    const int S = int(p.S), span = p.C == 1 ? 1 : V;
    const bool slides = p.C == 1 && p.stride_w == 1 && p.dilation_w == 1;
    for (i64 item = i64(blockIdx.x) * THREADS + threadIdx.x; item < items; item += i64(gridDim.x) * THREADS) {
        const Strip strip = items >> 32 ? strip_of<u64, V, TQ>(p, u64(item), u64(runs), u64(strips))
                                        : strip_of<u32, V, TQ>(p, u32(item), u32(runs), u32(strips));
        const Pixel first = strip.first;
        const int c0 = strip.k / int(p.K) * int(p.C);  // of the run's first group
        const T* const filters = static_cast<const T*>(p.filters) + strip.k * p.filter_steps[3];
        auto filter = [&](X (&f)[V], int r, int s, int c) {
            const i64 offset = r * p.filter_steps[0] + s * p.filter_steps[1] + c * p.filter_steps[2];
            const Run<T, V> run = *reinterpret_cast<const Run<T, V>*>(filters + offset);
#pragma unroll
            for (int v = 0; v < V; ++v) f[v] = widen(run.at[v]);
        };
        X sums[TQ][V], x[TQ + TAPS - 1][V];
#pragma unroll
        for (int t = 0; t < TQ; ++t)
#pragma unroll
            for (int v = 0; v < V; ++v) sums[t][v] = X(0);

#pragma unroll 1
        for (int r = 0; r < p.R; ++r) {
            const int h = first.h + r * int(p.dilation_h);
            if (unsigned(h) >= unsigned(p.H)) continue;
            if (slides) {
                const int source = ADD ? 0 : source_at(p, c0), c = c0 - (ADD ? 0 : int(p.source[source].first));
                u32 inside = fetch<T, ADD, V, TQ - 1>(p, x, source, first.n, h, first.w, 1, c);
#pragma unroll 1
                for (int s0 = 0; s0 < S; s0 += TAPS) {
                    const int w = first.w + s0 + TQ - 1;
                    inside |= fetch<T, ADD, V, TAPS>(p, x + (TQ - 1), source, first.n, h, w, 1, c) << (TQ - 1);
#pragma unroll
                    for (int u = 0; u < TAPS; ++u)
                        if (s0 + u < S) {
                            X f[V];
                            filter(f, r, s0 + u, 0);
                            multiply<true>(sums, x + u, inside >> u, 0, f);
                        }
                    inside >>= TAPS;
#pragma unroll
                    for (int i = 0; i < TQ - 1; ++i)
#pragma unroll
                        for (int v = 0; v < V; ++v) x[i][v] = x[i + TAPS][v];
                }
            } else {
#pragma unroll 1
                for (int s = 0; s < S; ++s)
#pragma unroll 1
                    for (int c = 0; c < p.C; c += span) {
                        const int source = ADD ? 0 : source_at(p, c0 + c), w = first.w + s * int(p.dilation_w);
                        const int at = c0 + c - (ADD ? 0 : int(p.source[source].first));
                        const u32 inside = fetch<T, ADD, V, TQ>(p, x, source, first.n, h, w, int(p.stride_w), at);
                        X f[V];
                        if (span == 1) {
                            filter(f, r, s, c);
                            multiply<true>(sums, x, inside, 0, f);
                        } else {
#pragma unroll
                            for (int i = 0; i < V; ++i) {
                                filter(f, r, s, c + i);
                                multiply<false>(sums, x, inside, i, f);
                            }
                        }
                    }
            }
        }

#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int t = 0; t < TQ; ++t) sums[t][v] = biased<T>(p, strip.k + v, sums[t][v]);
#pragma unroll 1
        for (int t = 0; t < TQ && first.q + t < p.Q; ++t) {
            const Pixel at{first.n, first.p, first.q + t, first.h, first.w};
            Run<T, V> result;
#pragma unroll
            for (int v = 0; v < V; ++v) result.at[v] = narrow<T>(ended<T>(p, at, strip.k + v, sums[0][v]));
            *reinterpret_cast<Run<T, V>*>(static_cast<T*>(p.out) + place_of(p, at, strip.k)) = result;
            // The loop is not unrolled, as activations are long, and registers cannot be indexed: the others move up.
#pragma unroll
            for (int i = 0; i < TQ - 1; ++i)
#pragma unroll
                for (int v = 0; v < V; ++v) sums[i][v] = sums[i + 1][v];
        }
    }
}
