// Merges without a contraction, one pass over the maps.
//
// add_fprop_stream<T, V, I, SOURCES>
//   y = act( w0·x0[up] + w1·x1[up] + … )     a left fold; every product and sum is rounded to T by itself
//   A thread computes a few runs of V neighbours along the innermost of the joined axes (`axes.add_grid`), a block's
//   runs lying side by side. Stages nothing.
//   Requires: V > 1 only where the innermost axis is a multiple of V, with step 1 and factor 1 for every operand or
//   step 0, every other step a multiple of V, and every base aligned to sizeof(T)·V (bytes). I holds the number of runs.
//
// concat_fprop_stream<W, SOURCES>
//   y[row, first_j + i] = x_j[row, i]     rows of whole words W; blockIdx.y is the source j
//   Requires: bases, steps and lengths that are multiples of sizeof(W).
#include "common.cuh"

const int RANK = 8;    // joined axes

// Runs of a thread: loads in flight, which hide one another's latency, as far as there are registers for their elements.
__device__ constexpr int rounds(int elements) { return elements > 8 ? 2 : 4; }

struct StreamOperand {
    const void* base;
    i64 steps[RANK];    // elements
    i64 factors[RANK];  // of upsampling
    Weight weight;
};

template <int SOURCES> struct StreamParams {
    i64 runs;  // of V elements
    i64 rank, sources, channel, activation;
    double slope;
    i64 extents[RANK];  // the last in runs
    StreamOperand out;
    StreamOperand source[SOURCES];
};

template <class T, int V>
__device__ __forceinline__ Run<T, V> load_run(const T* from, bool is_spread) {
    if (V > 1 && !is_spread) return *reinterpret_cast<const Run<T, V>*>(from);
    Run<T, V> run;
#pragma unroll
    for (int v = 0; v < V; ++v) run.at[v] = *from;
    return run;
}

template <class T, int V, class I, int SOURCES>
__global__ void __launch_bounds__(256) add_fprop_stream(const __grid_constant__ StreamParams<SOURCES> p) {
    static_assert(sizeof(T) * V <= 16, "one access moves at most 16 bytes");
    constexpr int ROUNDS = rounds(V);
    const int inner = int(p.rank) - 1;
    const I first = I(blockIdx.x) * (blockDim.x * ROUNDS) + threadIdx.x;
    Wide<T> sums[ROUNDS][V];
    for (int j = 0; j < p.sources; ++j) {
        const StreamOperand& source = p.source[j];
        const bool is_spread = source.steps[inner] == 0;
        Run<T, V> loaded[ROUNDS];
        i64 channels[ROUNDS];
#pragma unroll
        for (int u = 0; u < ROUNDS; ++u) {
            I rest = first + I(u) * blockDim.x;
            if (rest >= I(p.runs)) rest = 0;  // loaded in vain, never stored
            i64 offset = 0;
            channels[u] = 0;
            for (int d = inner; d >= 0; --d) {
                I extent = I(p.extents[d]), at = rest % extent;
                rest /= extent;
                i64 place = i64(at) * (d == inner ? V : 1);
                if (d == p.channel) channels[u] = place;
                if (source.factors[d] != 1) place = i64(at / I(source.factors[d]));
                offset += place * source.steps[d];
            }
            loaded[u] = load_run<T, V>(static_cast<const T*>(source.base) + offset, is_spread);
        }
#pragma unroll
        for (int u = 0; u < ROUNDS; ++u)
#pragma unroll
            for (int v = 0; v < V; ++v) {
                i64 channel = channels[u] + (p.channel == inner ? v : 0);
                Wide<T> x = weighted<T>(source.weight, widen(loaded[u].at[v]), channel);
                sums[u][v] = j == 0 ? x : merge_add<T>(sums[u][v], x);
            }
    }
#pragma unroll
    for (int u = 0; u < ROUNDS; ++u) {
        I rest = first + I(u) * blockDim.x;
        if (rest >= I(p.runs)) continue;
        i64 offset = 0;
        for (int d = inner; d >= 0; --d) {
            I extent = I(p.extents[d]), at = rest % extent;
            rest /= extent;
            offset += i64(at) * (d == inner ? V : 1) * p.out.steps[d];
        }
        Run<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v)
            result.at[v] = narrow<T>(activated<T>(p.activation, p.slope, sums[u][v]));
        *reinterpret_cast<Run<T, V>*>(static_cast<T*>(const_cast<void*>(p.out.base)) + offset) = result;
    }
}

struct ConcatSpan {
    const void* base;
    i64 step, first, words;  // from row to row; where it starts in a row of the output; of a row
};

template <int SOURCES> struct ConcatParams {
    void* out;
    i64 step, rows;
    ConcatSpan source[SOURCES];
};

const i64 LONG_ROW = 1 << 16;  // words: no block reaches further than into the next row

template <class W, int SOURCES>
__global__ void __launch_bounds__(256) concat_fprop_stream(const __grid_constant__ ConcatParams<SOURCES> p) {
    constexpr int ROUNDS = rounds(1);
    const ConcatSpan& span = p.source[blockIdx.y];
    // Divided in 64 bits once for a block; the steps from there fit 32, and a long row ends in it once at most.
    const i64 start = i64(blockIdx.x) * (blockDim.x * ROUNDS), words = span.words;
    const i64 first_row = start / words, first_word = start - first_row * words;
    W loaded[ROUNDS];
    i64 to[ROUNDS];
    bool exists[ROUNDS];
#pragma unroll
    for (int u = 0; u < ROUNDS; ++u) {
        i64 word = first_word + threadIdx.x + u * blockDim.x, row = first_row;
        if (words >= LONG_ROW) {
            row += word >= words;
            word -= word >= words ? words : 0;
        } else {
            const u32 rows = u32(word) / u32(words);
            row += rows;
            word -= i64(rows) * words;
        }
        exists[u] = row < p.rows;
        to[u] = row * p.step + span.first + word;
        if (exists[u]) loaded[u] = static_cast<const W*>(span.base)[row * span.step + word];
    }
#pragma unroll
    for (int u = 0; u < ROUNDS; ++u)
        if (exists[u]) static_cast<W*>(p.out)[to[u]] = loaded[u];
}
