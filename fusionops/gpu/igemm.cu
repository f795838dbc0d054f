// {add,concat}_{conv,dense}_fprop_igemm: an implicit matrix product on CUDA cores; the kernel that runs every contraction.
//
//   y[m,k] = act( Σ_l a[m,l] · b[l,k] + bias[k] + residual[m,k] )
//   m = (n,p,q)    l = (r,s,c) of one group, c fastest    a[m,l] = merged[n, h, w, c]    b[l,k] = f[r,s,c,k]
//
// A block owns BM pixels × BN filters of one group; a thread TM × TN of them, in quarters of the block's tile. The block
// walks along l in steps of BL: it loads the next a, merging the sources on the way, and b into registers, while those
// loaded before are multiplied from shared memory (two buffers of BL·(BM + BN) numbers; `Tile.shared_bytes` counts all).
// Order of the sum: l ascending, one product after the other, whatever the tile.
//
// Padding is skipped, not multiplied: it is loaded as 0, and 0 times a finite filter adds nothing. A step whose filters
// are not all finite is summed product by product, those of the padding left out.
//
// Requires: blockDim.x = (BM / TM)·(BN / TN), a multiple of both BM and BL; all strides in elements.
#include "igemm.cuh"

// A position along the reduction: its tap, relative to a pixel; its source, and the channel of that.
struct Term {
    int h, w, source, c;
    i64 filter;  // offset of (r,s,c) among the filters
};

template <bool ADD, int SOURCES>
__device__ __forceinline__ Term term_of(const IgemmParams<SOURCES>& p, i64 group, int l) {
    const int tap = l / int(p.C), c = l - tap * int(p.C), r = tap / int(p.S), s = tap - r * int(p.S);
    Term term{int(r * p.dilation_h), int(s * p.dilation_w), 0, int(group * p.C) + c,
              r * p.filter_steps[0] + s * p.filter_steps[1] + c * p.filter_steps[2]};
    if (!ADD) {
        term.source = source_at(p, term.c);
        term.c -= int(p.source[term.source].first);
    }
    return term;
}

template <int SOURCES>
__device__ __forceinline__ bool is_inside(const IgemmParams<SOURCES>& p, const Pixel& pixel, const Term& term) {
    return unsigned(pixel.h + term.h) < unsigned(p.H) && unsigned(pixel.w + term.w) < unsigned(p.W);
}

// The merged map under a pixel, inside the map.
template <class T, bool ADD, int SOURCES>
__device__ __forceinline__ Wide<T> load_merged(const IgemmParams<SOURCES>& p, const Pixel& pixel, const Term& term) {
    const int h = pixel.h + term.h, w = pixel.w + term.w;
    Wide<T> x = load_map<T>(p.source[ADD ? 0 : term.source], pixel.n, h, w, term.c);
    if constexpr (ADD)
        for (int j = 1; j < p.sources; ++j) x = merge_add<T>(x, load_map<T>(p.source[j], pixel.n, h, w, term.c));
    return x;
}

template <class X> __device__ __forceinline__ bool is_finite(X x) { return x - x == X(0); }

template <class T, bool ADD, int BM, int BN, int BL, int TM, int TN, int SOURCES>
__global__ void __launch_bounds__((BM / TM) * (BN / TN))
conv_fprop_igemm(const __grid_constant__ IgemmParams<SOURCES> p) {
    typedef Wide<T> X;
    constexpr int THREADS = (BM / TM) * (BN / TN), COLUMNS = BN / TN, QM = TM / 2, QN = TN / 2;
    constexpr int LOADS_A = BM * BL / THREADS, LOADS_B = BN * BL / THREADS, PITCH_A = BM + 4, PITCH_B = BN + 4;
    static_assert(THREADS % BM == 0 || BM % THREADS == 0, "rows of a are shared out evenly");
    static_assert(THREADS % BL == 0 && BM * BL % THREADS == 0 && BN * BL % THREADS == 0, "and so are the loads");
    FUSIONOPS_SHARED(unsigned char, shared);
    Pixel* const pixels = reinterpret_cast<Pixel*>(shared);
    X* const a = reinterpret_cast<X*>(shared + BM * sizeof(Pixel));
    X* const b = a + 2 * BL * PITCH_A;
    Term* const terms = reinterpret_cast<Term*>(b + 2 * BL * PITCH_B);  // of three steps: summed, loaded, to come

    const int t = threadIdx.x;
    const i64 M = p.N * p.P * p.Q, tiles_m = (M + BM - 1) / BM, tiles_n = (p.K + BN - 1) / BN;
    const i64 tile = blockIdx.x, group = tile / (tiles_m * tiles_n), inside = tile - group * tiles_m * tiles_n;
    const i64 m0 = inside / tiles_n * BM, k0 = inside % tiles_n * BN;  // neighbours share their pixels
    const int L = int(p.R * p.S * p.C);
    for (int i = t; i < BM; i += THREADS) pixels[i] = pixel_of(p, m0 + i < M ? m0 + i : M - 1);
    auto place_terms = [&](int l0, int step) {
        if (t < BL && l0 + t < L) terms[step % 3 * BL + t] = term_of<ADD>(p, group, l0 + t);
    };
    place_terms(0, 0);
    place_terms(BL, 1);
    __syncthreads();

    // Neighbouring threads load neighbours in memory: channels, or pixels of maps that are channels first.
    const bool by_channel = p.source[0].steps[3] == 1, by_filter = p.filter_steps[3] == 1;
    X next_a[LOADS_A], next_b[LOADS_B];
    bool odd = false;  // whether a filter of the coming step is Inf or NaN

    auto load = [&](int l0, int step) {
        const Term* const here = terms + step % 3 * BL;
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            const int at = t + i * THREADS, l = by_channel ? at % BL : at / BM;
            const Pixel pixel = pixels[by_channel ? at / BL : at % BM];
            next_a[i] = l0 + l < L && is_inside(p, pixel, here[l]) ? load_merged<T, ADD>(p, pixel, here[l]) : X(0);
        }
        odd = false;
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) {
            const int at = t + i * THREADS, l = by_filter ? at / BN : at % BL;
            const i64 k = k0 + (by_filter ? at % BN : at / BL);
            X x = X(0);
            if (l0 + l < L && k < p.K)
                x = widen(static_cast<const T*>(p.filters)[here[l].filter + (group * p.K + k) * p.filter_steps[3]]);
            odd |= !is_finite(x);
            next_b[i] = x;
        }
    };
    auto store = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < LOADS_A; ++i) {
            const int at = t + i * THREADS;
            a[(buffer * BL + (by_channel ? at % BL : at / BM)) * PITCH_A + (by_channel ? at / BL : at % BM)] = next_a[i];
        }
#pragma unroll
        for (int i = 0; i < LOADS_B; ++i) {
            const int at = t + i * THREADS;
            b[(buffer * BL + (by_filter ? at / BN : at % BL)) * PITCH_B + (by_filter ? at % BN : at / BL)] = next_b[i];
        }
    };
    // A thread's rows and columns: half of them in each half of the tile, so that a warp reads whole lines of banks.
    const int row0 = t / COLUMNS * QM, column0 = t % COLUMNS * QN;
    auto row_of = [&](int i) { return row0 + i % QM + i / QM * (BM / 2); };
    auto column_of = [&](int j) { return column0 + j % QN + j / QN * (BN / 2); };

    X sums[TM][TN];
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) sums[i][j] = X(0);

    load(0, 0);
    store(0);
    bool is_odd = __syncthreads_or(odd);
    for (int l0 = 0, step = 0; l0 < L; l0 += BL, ++step) {
        const bool is_last = l0 + BL >= L;
        const int buffer = step % 2;
        if (!is_last) load(l0 + BL, step + 1);
        place_terms(l0 + 2 * BL, step + 2);
        const X* const here_a = a + buffer * BL * PITCH_A;
        const X* const here_b = b + buffer * BL * PITCH_B;
#pragma unroll
        for (int l = 0; l < BL; ++l) {
            X rows[TM], columns[TN];
#pragma unroll
            for (int i = 0; i < TM; ++i) rows[i] = here_a[l * PITCH_A + row_of(i)];
#pragma unroll
            for (int j = 0; j < TN; ++j) columns[j] = here_b[l * PITCH_B + column_of(j)];
            if (!is_odd) {
#pragma unroll
                for (int i = 0; i < TM; ++i)
#pragma unroll
                    for (int j = 0; j < TN; ++j) sums[i][j] = fma_rn(rows[i], columns[j], sums[i][j]);
            } else if (l0 + l < L) {
                const Term term = terms[step % 3 * BL + l];
#pragma unroll
                for (int i = 0; i < TM; ++i)
                    if (is_inside(p, pixels[row_of(i)], term))
#pragma unroll
                        for (int j = 0; j < TN; ++j) sums[i][j] = fma_rn(rows[i], columns[j], sums[i][j]);
            }
        }
        if (!is_last) {
            store(buffer ^ 1);
            is_odd = __syncthreads_or(odd);
        }
    }

    // Sums are finished in the order in which outputs lie in memory, half a tile at a time.
    const bool to_channels = p.out_steps[3] == 1;
    X* const staged = a;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < QM; ++i)
#pragma unroll
            for (int j = 0; j < TN; ++j) staged[(row0 + i) * (BN + 1) + column_of(j)] = sums[half * QM + i][j];
        __syncthreads();
#pragma unroll 1
        for (int at = t; at < BM / 2 * BN; at += THREADS) {
            const int row = to_channels ? at / BN : at % (BM / 2), column = to_channels ? at % BN : at / (BM / 2);
            const i64 m = m0 + half * (BM / 2) + row, k = k0 + column;
            if (m < M && k < p.K) finish<T>(p, pixels[half * (BM / 2) + row], group * p.K + k, staged[row * (BN + 1) + column]);
        }
    }
}
