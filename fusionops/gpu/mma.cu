// {add,concat}_{conv,dense}_fprop_igemm_sm80: the implicit matrix product of igemm.cu on tensor cores: float16, bfloat16,
// and float32 whose merged map and filters are rounded to TF32; sums in float32.
//
//   y[m,k] = act( Σ_l a[m,l] · b[l,k] + bias[k] + residual[m,k] )     l = (r, s, c) of one group
//
// A block of 8 warps owns 128 pixels × BN filters (128 or 64) of one group, a warp 32 filters of 64 or 32 pixels. A step
// of the sum is one tap and 64 bytes of merged channels, whose a and b wait in one of STAGES buffers. Filters, and
// sources of a concatenation, are copied there asynchronously, STAGES − 1 steps ahead; a sum of sources is loaded and
// merged before a step is multiplied, and stored after it. Concatenation is an order of visits: where runs of 16 bytes of
// channels belong to one source each, every run is read from where it lies. What is not aligned so is gathered element by
// element into the same places: strides never change a bit. Order of the sum: taps, in each the 32 bytes of channels that
// an instruction multiplies.
//
// Rows of a buffer are stored with their 16-byte pieces exchanged (`piece_a`, `piece_b`), so that the eight rows that one
// matrix load reads lie in different banks; filters of float32, which no instruction loads turned, have gaps between rows.
//
// Requires: sm_80, 256 threads, shared memory of `mma.block_shared_bytes`. vectors_a only if channels have step 1 and
// every other step, first channel and base of the sources, and C, is a multiple of 16 bytes; vectors_b likewise of the
// filters.
#include "runs.cuh"

const int BM = 128, STAGES = 4, THREADS = 256;
const int PIECES = 4;  // of 16 bytes, in a row of a

template <class T> struct Extents {
    static const int RUN = RUN_OF<T>, BC = PIECES * RUN;  // elements of a piece; channels of a step
    static const int GAP = sizeof(T) == 4 ? 8 : 0;             // behind a row of b: four rows are read at once
};

// Where the 16 bytes `piece` of a row begin, in elements of its buffer.
template <class T> __device__ __forceinline__ int piece_a(int row, int piece) {
    return (row * PIECES + (piece ^ row / 2 % PIECES)) * Extents<T>::RUN;
}
template <class T, int BN> __device__ __forceinline__ int piece_b(int row, int piece) {
    return row * (BN + Extents<T>::GAP) + (sizeof(T) == 2 ? piece ^ row % 8 : piece) * Extents<T>::RUN;
}

// What a lane holds of the filters of 16 columns for two products: of 16 rows of 16-bit numbers, or of 8 of TF32.
template <class T, int BN>
__device__ __forceinline__ void load_columns(u32 (&columns)[4], const T* b, int half, int column) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        load_matrices<true>(columns, b + piece_b<T, BN>(half * 16 + lane % 16, column / 8 + lane / 16));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = half * 8 + i % 2 * 4 + lane % 4, at = column + i / 2 * 8 + lane / 4;
            columns[i] = tf32_of(b[piece_b<T, BN>(row, at / 4) + at % 4]);
        }
    }
}

template <class T> __device__ __forceinline__ void load_rows(u32 (&rows)[4], const T* a, int half, int row) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(rows, a + piece_a<T>(row + lane % 16, half * 2 + lane / 16));
    if constexpr (sizeof(T) == 4)
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = tf32_of(__uint_as_float(rows[i]));
}

// A step of the sum: its tap and first channel, counted in one group.
template <int BC> struct Step {
    int r, s, c;

    template <int SOURCES> __device__ __forceinline__ void advance(const IgemmParams<SOURCES>& p) {
        c += BC;
        if (c < p.C) return;
        c = 0;
        if (++s < p.S) return;
        s = 0;
        ++r;
    }
};

template <class T, bool ADD, int BN, int SOURCES>
__global__ void __launch_bounds__(THREADS, 2) conv_fprop_igemm_sm80(const __grid_constant__ IgemmParams<SOURCES> p) {
    constexpr int RUN = Extents<T>::RUN, BC = Extents<T>::BC, BUFFER_B = BC * (BN + Extents<T>::GAP);
    static_assert(PIECES / 2 == BM * BC / RUN / THREADS, "a thread brings one run of a for every product of 32 bytes");
    constexpr int RUNS_A = BM * BC / RUN / THREADS, RUNS_B = BC * BN / RUN / THREADS;
    constexpr int COLUMNS = BN / 32, WARP_ROWS = BM / (8 / COLUMNS), TILES = WARP_ROWS / 16;  // of warps; of one
    FUSIONOPS_SHARED(unsigned char, shared);
    Pixel* const pixels = reinterpret_cast<Pixel*>(shared);
    T* const a = reinterpret_cast<T*>(shared + BM * sizeof(Pixel));
    T* const b = a + STAGES * BM * BC;

    const int t = threadIdx.x;
    const i64 M = p.N * p.P * p.Q;
    const int K = int(p.K), tiles_m = int((M + BM - 1) / BM), tiles_n = (K + BN - 1) / BN;
    const int group = blockIdx.x / (tiles_m * tiles_n), inside = blockIdx.x % (tiles_m * tiles_n);
    const i64 m0 = i64(inside / tiles_n) * BM;
    const int count = int(M - m0 < BM ? M - m0 : BM), k0 = inside % tiles_n * BN;  // neighbours share their pixels
    const int steps = int(p.R * p.S * ((p.C + BC - 1) / BC));
    for (int i = t; i < BM; i += THREADS) pixels[i] = pixel_of(p, m0 + (i < count ? i : count - 1));
    __syncthreads();

    // What a thread brings of a step: runs of its channels of some pixels, and of some filters.
    const bool vectors_a = p.vectors_a, vectors_b = p.vectors_b;
    const int piece = t % (BC / RUN), filter_piece = t % (BN / RUN);
    const int k = k0 + filter_piece * RUN;
    uint4 brought;  // a run of a sum

    auto row_of = [&](int i) { return t / (BC / RUN) + i * (THREADS / (BC / RUN)); };
    auto fetch_a = [&](const Step<BC>& at, int stage, int i) {
        const int left = int(p.C) - at.c - piece * RUN;
        const int c = group * int(p.C) + at.c + piece * RUN;
        const Pixel& pixel = pixels[row_of(i)];
        const int h = pixel.h + at.r * int(p.dilation_h), w = pixel.w + at.s * int(p.dilation_w);
        const bool exists = left > 0 && unsigned(h) < unsigned(p.H) && unsigned(w) < unsigned(p.W);
        T* const to = a + stage * BM * BC + piece_a<T>(row_of(i), piece);
        if (!vectors_a) {
#pragma unroll 1
            for (int j = 0; j < RUN; ++j)
                to[j] = exists && j < left ? gathered<T, ADD>(p, pixel.n, h, w, c + j) : T{};
        } else if (ADD) {
            brought = exists ? summed_run<T>(p, 0, int(p.sources), pixel.n, h, w, c) : make_uint4(0, 0, 0, 0);
        } else {
            const MapSource& from = p.source[left > 0 ? source_at(p, c) : 0];
            const T* place = static_cast<const T*>(from.base);
            if (exists) place += offset_of(from, pixel.n, h, w) + (c - int(from.first));
            copy_async(to, place, exists ? 16 : 0);
        }
    };
    auto put_a = [&](int stage, int i) {  // the sum that was loaded
        if (ADD && vectors_a)
            *reinterpret_cast<uint4*>(a + stage * BM * BC + piece_a<T>(row_of(i), piece)) = brought;
    };
    auto fetch_b = [&](const Step<BC>& at, int stage) {
#pragma unroll
        for (int i = 0; i < RUNS_B; ++i) {
            const int row = t / (BN / RUN) + i * (THREADS / (BN / RUN));
            const T* place = static_cast<const T*>(p.filters) + at.r * p.filter_steps[0] + at.s * p.filter_steps[1] +
                             (at.c + row) * p.filter_steps[2] + i64(group * K + k) * p.filter_steps[3];
            const bool exists = at.c + row < int(p.C) && k < K;
            T* const to = b + stage * BUFFER_B + piece_b<T, BN>(row, filter_piece);
            if (vectors_b) {
                copy_async(to, exists ? place : p.filters, exists ? 16 : 0);
            } else {
#pragma unroll 1
                for (int j = 0; j < RUN; ++j) to[j] = exists && k + j < K ? place[j * p.filter_steps[3]] : T{};
            }
        }
    };

    const int warp = t / 32, lane = t % 32, row0 = warp / COLUMNS * WARP_ROWS, column0 = warp % COLUMNS * 32;
    float sums[TILES][4][4];  // of tiles of 16 pixels × 8 filters
#pragma unroll
    for (int i = 0; i < TILES * 16; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;

    Step<BC> coming{0, 0, 0};
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) {
#pragma unroll
            for (int i = 0; i < RUNS_A; ++i) {
                fetch_a(coming, step, i);
                put_a(step, i);
            }
            fetch_b(coming, step);
        }
        copy_commit();
        coming.advance(p);
    }
    for (int step = 0; step < steps; ++step) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this step has come, and the buffer of the one before it is free
        const int next = step + STAGES - 1;
        if (next < steps) fetch_b(coming, next % STAGES);
        const T* const here_a = a + step % STAGES * BM * BC;
        const T* const here_b = b + step % STAGES * BUFFER_B;
#pragma unroll
        for (int half = 0; half < RUNS_A; ++half) {  // of the channels: 32 bytes
            if (next < steps) fetch_a(coming, next % STAGES, half);
            u32 columns[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j) load_columns<T, BN>(columns[j], here_b, half, column0 + j * 16);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                u32 rows[4];
                load_rows<T>(rows, here_a, half, row0 + i * 16);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const u32 column[2] = {columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]};
                    multiply_tile<T>(sums[i][j], rows, column);
                }
            }
            if (next < steps) put_a(next % STAGES, half);
        }
        copy_commit();
        coming.advance(p);
    }
    copy_wait<0>();

    // Sums are finished in the order in which outputs lie in memory, half a tile at a time.
    const bool to_channels = p.out_steps[3] == 1;
    float* const staged = reinterpret_cast<float*>(a);
    for (int half = 0; half < 2; ++half) {
        __syncthreads();
        if (row0 / (BM / 2) == half)
#pragma unroll
            for (int i = 0; i < TILES * 16; ++i) {
                const int part = i % 4, row = row0 % (BM / 2) + i / 16 * 16 + part / 2 * 8 + lane / 4;
                staged[row * (BN + 1) + column0 + i / 4 % 4 * 8 + lane % 4 * 2 + part % 2] = sums[i / 16][i / 4 % 4][part];
            }
        __syncthreads();
#pragma unroll 1
        for (int at = t; at < BM / 2 * BN; at += THREADS) {
            const int row = to_channels ? at / BN : at % (BM / 2), column = to_channels ? at % BN : at / (BM / 2);
            const int pixel = half * (BM / 2) + row, filter = k0 + column;
            if (pixel < count && filter < K)
                finish<T>(p, pixels[pixel], group * K + filter, staged[row * (BN + 1) + column]);
        }
    }
}
