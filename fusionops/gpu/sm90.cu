// {add,concat}_{conv,dense}_fprop_igemm_sm90: the implicit matrix product of igemm.cu on Hopper's tensor cores, float16
// and bfloat16 with sums in float32.
//
//   y[m,k] = act( Σ_l a[m,l] · b[l,k] + bias[k] + residual[m,k] )     l = (r, s, c)
//
// A block has three warpgroups. The first brings factors: a step of the sum is one tap and 64 merged channels, for a tile
// of 128 pixels (a box of images × rows × columns) and BN filters. It waits in one of STAGES buffers; barriers tell when
// one is full and when it is empty again. The others multiply, 64 pixels each, and finish their sums. Blocks stay and take
// one tile after the other, so that the next tile's factors come meanwhile.
//
// Filters come as boxes of a tensor, and so do steps that belong to one source of a concatenation which is stored in a way
// such copies take: what lies beyond the map arrives as 0. All others are loaded, merged and stored by the threads of the
// first warpgroup, in runs of 16 bytes where sources consist of such, else element by element: neither strides nor
// addresses nor the split into sources change a bit. Order of the sum: taps, in each 16 merged channels at a time.
//
// Requires: sm_90a, 384 threads, shared memory of `sm90.block_shared_bytes`, filters packed as [tap][filter][channel] with
// rows of whole runs of 16 bytes.
#include "primitives_sm90.cuh"
#include "runs.cuh"

const int BM = 128, BC = 64, PRODUCERS = 128, THREADS = 384;
const int BUFFER_BYTES = 192 * 1024;  // of all stages
const int STAGED = 32, ROWS = 4;      // columns of sums that a warp finishes at a time, and rows

template <int SOURCES> struct HopperParams {
    TensorMap filters;
    TensorMap source[SOURCES];
    u64 boxes, runs;             // bits of the sources that come as boxes; of those that consist of runs
    i64 tile_n, tile_h, tile_w;  // a tile of pixels
    IgemmParams<SOURCES> p;
};

// Where a tile of outputs begins.
struct Tile { int n, p, q, k; };

template <int BN, int SOURCES> struct Tiles {
    int across_k, across_q, across_p, count;

    __device__ __forceinline__ explicit Tiles(const HopperParams<SOURCES>& h) {
        across_k = (int(h.p.K) + BN - 1) / BN;
        across_q = int((h.p.Q + h.tile_w - 1) / h.tile_w);
        across_p = int((h.p.P + h.tile_h - 1) / h.tile_h);
        count = across_k * across_q * across_p * int((h.p.N + h.tile_n - 1) / h.tile_n);
    }
    __device__ __forceinline__ Tile at(const HopperParams<SOURCES>& h, int i) const {  // neighbours share their pixels
        const int pixels = i / across_k, line = pixels / across_q;
        return Tile{line / across_p * int(h.tile_n), line % across_p * int(h.tile_h), pixels % across_q * int(h.tile_w),
                    i % across_k * BN};
    }
};

// The output pixel in a row of a tile.
template <int SOURCES>
__device__ __forceinline__ Pixel pixel_in(const HopperParams<SOURCES>& h, const Tile& tile, int row) {
    const int line = row / int(h.tile_w);
    const int n = tile.n + line / int(h.tile_h), p = tile.p + line % int(h.tile_h), q = tile.q + row % int(h.tile_w);
    return Pixel{n, p, q, int(p * h.p.stride_h - h.p.pad_top), int(q * h.p.stride_w - h.p.pad_left)};
}

// Calls step(r, s, c) for every step of the sum, in its order.
template <int SOURCES, class Step>
__device__ __forceinline__ void for_each_step(const IgemmParams<SOURCES>& p, const Step& step) {
    for (int r = 0; r < int(p.R); ++r)
        for (int s = 0; s < int(p.S); ++s)
            for (int c = 0; c < int(p.C); c += BC) step(r, s, c);
}

// The channel behind the last one of a source of a concatenation.
template <int SOURCES> __device__ __forceinline__ int end_of(const IgemmParams<SOURCES>& p, int source) {
    return source + 1 < int(p.sources) ? int(p.source[source + 1].first) : int(p.C);
}

// 64 channels of the merged map under a pixel inside the map, from c on, as row `row` of a box; zeros behind the last one.
template <class T, bool ADD, int SOURCES>
__device__ __forceinline__ void
store_row(const HopperParams<SOURCES>& h, T* to, int row, int source, int n, int y, int x, int c) {
    constexpr int RUN = RUN_OF<T>, PIECES = BC / RUN;
    const IgemmParams<SOURCES>& p = h.p;
    auto place = [&](int piece) { return to + row * BC + (piece ^ row % 8) * RUN; };
    const int last = ADD ? int(p.sources) : 1;
    const bool runs = h.runs == ~0ull >> (64 - int(p.sources)) ||
                      (!ADD && h.runs >> source & 1 && min(c + BC, int(p.C)) <= end_of(p, source));
    if (runs) {
        uint4 sum[PIECES];
#pragma unroll 1
        for (int j = 0; j < last; ++j) {
            uint4 one[PIECES];  // all are under way before the first is needed
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const int here = c + i * RUN;  // of a concatenation, all of a run belongs to one source
                const MapSource& from = p.source[ADD ? j : here < end_of(p, source) ? source : source_at(p, here)];
                const T* const base = static_cast<const T*>(from.base) + (here - (ADD ? 0 : int(from.first)));
                one[i] = make_uint4(0, 0, 0, 0);
                if (here < int(p.C)) one[i] = *reinterpret_cast<const uint4*>(base + offset_of(from, n, y, x));
            }
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const int here = c + i * RUN;
                const MapSource& from = p.source[ADD ? j : here < end_of(p, source) ? source : source_at(p, here)];
                if (from.weight.kind != WEIGHT_NONE && here < int(p.C))
                    one[i] = mul_run<T>(weights_of<T>(from.weight, here - (ADD ? 0 : int(from.first))), one[i]);
                sum[i] = j == 0 ? one[i] : add_run<T>(sum[i], one[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < PIECES; ++i) *reinterpret_cast<uint4*>(place(i)) = sum[i];
    } else {
#pragma unroll 1
        for (int i = 0; i < BC; ++i)
            place(i / RUN)[i % RUN] = c + i < int(p.C) ? gathered<T, ADD>(p, n, y, x, c + i) : T{};
    }
}

template <class T, bool ADD, int BN, int SOURCES>
__global__ void __launch_bounds__(THREADS, 1) conv_fprop_igemm_sm90(const __grid_constant__ HopperParams<SOURCES> h) {
    static_assert(sizeof(T) == 2, "rows of 128 bytes are 64 channels");
    constexpr int STAGES = BUFFER_BYTES / ((BM + BN) * BC * 2);
    FUSIONOPS_SHARED(unsigned char, shared);
    T* const a = reinterpret_cast<T*>(shared);
    T* const b = a + STAGES * BM * BC;
    u64* const full = reinterpret_cast<u64*>(b + STAGES * BN * BC);
    u64* const empty = full + STAGES;
    float* const staged = reinterpret_cast<float*>(empty + STAGES);

    const IgemmParams<SOURCES>& p = h.p;
    const int t = threadIdx.x, lane = t % 32;
    const Tiles<BN, SOURCES> tiles(h);
    if (t == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbar_init(full + stage, 1 + PRODUCERS / 32);                // one announces boxes, every warp has stored
            mbar_init(empty + stage, (THREADS - PRODUCERS) / 32);  // every warp has multiplied
        }
        mbar_publish();
    }
    __syncthreads();

    int step = 0;  // of all tiles
    if (t < PRODUCERS) {
        fewer_registers<120>();  // of 168 a thread: 24 more for each of the other two warpgroups
        for (int i = blockIdx.x; i < tiles.count; i += gridDim.x) {
            const Tile tile = tiles.at(h, i);
            const Pixel pixel = pixel_in(h, tile, t);
            const bool exists = pixel.n < int(p.N) && pixel.p < int(p.P) && pixel.q < int(p.Q);
            for_each_step(p, [&](int r, int s, int c) {
                const int stage = step % STAGES, source = ADD ? 0 : source_at(p, c);
                const int y = pixel.h + int(r * p.dilation_h), x = pixel.w + int(s * p.dilation_w);
                const bool box = h.boxes >> source & 1 && (ADD || min(c + BC, int(p.C)) <= end_of(p, source));
                T* const to = a + stage * BM * BC;
                mbar_wait(empty + stage, step / STAGES % 2 ^ 1);
                if (t == 0) {
                    mbar_announce(full + stage, (BN + (box ? BM : 0)) * BC * 2);
                    copy_box_async(b + stage * BN * BC, h.filters, full + stage, {c, tile.k, int(r * p.S) + s});
                    const int channel = c - int(p.source[source].first);
                    if (box) copy_box_async(to, h.source[source], full + stage, {channel, x, y, tile.n});
                }
                if (!box) {
                    const bool inside = exists && unsigned(y) < unsigned(p.H) && unsigned(x) < unsigned(p.W);
                    if (inside)
                        store_row<T, ADD>(h, to, t, source, pixel.n, y, x, c);
                    else
#pragma unroll
                        for (int i = 0; i < BC / RUN_OF<T>; ++i)
                            reinterpret_cast<uint4*>(to + t * BC)[i] = make_uint4(0, 0, 0, 0);
                    fence_products();
                }
                __syncwarp();
                if (lane == 0) mbar_arrive(full + stage);
                ++step;
            });
        }
        return;
    }

    more_registers<192>();
    const int warp = t / 32 - PRODUCERS / 32;  // of 8: 16 rows each
    float* const mine = staged + warp * 16 * (STAGED + 1);
    float sums[BN / 2];
    for (int i = blockIdx.x; i < tiles.count; i += gridDim.x) {
        const Tile tile = tiles.at(h, i);
        bool begun = false;
        for_each_step(p, [&](int, int, int) {
            const int stage = step % STAGES;
            mbar_wait(full + stage, step / STAGES % 2);
            const u64 rows = matrix_at(a + stage * BM * BC + warp / 4 * 64 * BC), columns = matrix_at(b + stage * BN * BC);
            products_begin();
#pragma unroll
            for (int k = 0; k < BC / 16; ++k) multiply_async<T, BN>(sums, rows + 2 * k, columns + 2 * k, begun || k > 0);
            products_commit();
            products_wait<1>();  // those of the step before: its buffer is empty
            if (begun && lane == 0) mbar_arrive(empty + (step - 1) % STAGES);
            begun = true;
            ++step;
        });
        products_wait<0>();
        if (begun && lane == 0) mbar_arrive(empty + (step - 1) % STAGES);

        // A warp finishes its 16 rows some columns at a time, in the order in which outputs lie in memory. Of a row the
        // lane of the same number knows where it lies.
        const Pixel pixel = pixel_in(h, tile, warp * 16 + lane % 16);
        const bool exists = pixel.n < int(p.N) && pixel.p < int(p.P) && pixel.q < int(p.Q);
        const i64 to = out_offset(p, pixel), residual = exists ? residual_offset(p, pixel) : 0;
        const u32 rows = __ballot_sync(~0u, exists);
#pragma unroll
        for (int column0 = 0; column0 < BN; column0 += STAGED) {
            __syncwarp();
#pragma unroll
            for (int e = 0; e < STAGED / 2; ++e)
                mine[(lane / 4 + 8 * (e / 2 % 2)) * (STAGED + 1) + e / 4 * 8 + lane % 4 * 2 + e % 2] = sums[column0 / 2 + e];
            __syncwarp();
            const int k = tile.k + column0 + lane;
            const bool filters = k < int(p.K);
            const Wide<T> bias = p.bias && filters ? widen(static_cast<const T*>(p.bias)[k]) : Wide<T>(0);
#pragma unroll 1
            for (int row0 = 0; row0 < 16; row0 += ROWS) {  // what is read for some rows is under way at once
                Wide<T> residuals[ROWS];
                bool here[ROWS];
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    const i64 from = __shfl_sync(~0u, residual, row0 + i);
                    here[i] = filters && rows >> (row0 + i) & 1;
                    if (here[i] && p.residual.base) residuals[i] = load_residual<T>(p, from, k);
                }
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    const i64 at = __shfl_sync(~0u, to, row0 + i);
                    Wide<T> y = mine[(row0 + i) * (STAGED + 1) + lane];
                    if (p.bias) y = add_rn(y, bias);
                    if (p.residual.base) y = add_rn(y, residuals[i]);
                    if (here[i])
                        static_cast<T*>(p.out)[at + k * p.out_steps[3]] = narrow<T>(activated<T>(p.activation, p.slope, y));
                }
            }
        }
    }
}
