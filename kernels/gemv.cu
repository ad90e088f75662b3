// Matrix-vector products for decoding: out = x * W^T (+ bias), the weights as they lie in memory, x bf16.
//
// Bound by reading the weights: they are read once for up to eight tokens. A warp has two rows of the weights (of a
// gated linear unit: a row of the gate and its partner of the up projection) and goes through their columns tile by
// tile. Rows of blocks come through a ring of tiles in shared memory, 16 bytes a lane whatever the block's size; plain
// rows come straight into registers. x waits in shared memory. A row's sum has the same order for any number of tokens,
// rows and blocks: 32 lanes, each over its columns in the order of the tiles, then a butterfly.
//
// Grid (tokens / TOKENS, blocks that share the rows, matrices): what runs together reads the same rows. The matrices are
// of one dtype. Rows of plain types begin at multiples of 16 bytes: linear_f32.cu takes the others.
#include "lanes.cuh"
#include "parts.cuh"
#include "ptx.cuh"

constexpr unsigned WARPS = 4, THREADS = WARPS * WARP, ROWS = 2, STAGES = 3;

// x of `tiles` tiles from tile `first` on into shared memory, in the lanes' order; the last token again in place of
// tokens past the last. What lies past the last column is not written, nor read.
template <typename LANE, unsigned TOKENS>
__device__ __forceinline__ void stage_x(const PartsArgs& a, uint32_t first, uint32_t tiles, uint8_t* shared) {
    const uint32_t pieces = min(tiles * TILE, a.cols - first * TILE) / 8;
#pragma unroll
    for (unsigned t = 0; t < TOKENS; ++t) {
        const uint32_t token = min(blockIdx.x * TOKENS + t, a.tokens - 1);
        const bf16* from = static_cast<const bf16*>(a.x) + size_t(token) * a.cols + first * TILE;
        const uint4* x = reinterpret_cast<const uint4*>(from);
#pragma unroll (TOKENS == 1 ? 4 : 1)
        for (uint32_t i = threadIdx.x; i < pieces; i += THREADS) {
            const uint4 words = x[i];
            uint8_t* tile = shared + (t * a.segment + i / (TILE / 8)) * X_TILE<LANE>;
            const uint32_t quad = i % (TILE / 8) * 2;
            if constexpr (LANE::ADJACENT) {
                *reinterpret_cast<uint4*>(tile + LANE::place(quad)) = words;
            } else {
                *reinterpret_cast<uint2*>(tile + LANE::place(quad)) = make_uint2(words.x, words.y);
                *reinterpret_cast<uint2*>(tile + LANE::place(quad + 1)) = make_uint2(words.z, words.w);
            }
        }
    }
}

// A unit of x.
template <int WIDTH> __device__ __forceinline__ void load_x(const uint8_t* p, float (&out)[WIDTH]) {
    uint32_t pairs[WIDTH / 2];
    load_words<WIDTH * 2>(p, pairs);
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
        out[2 * i] = __uint_as_float(pairs[i] << 16), out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}
template <int WIDTH> __device__ __forceinline__ float dot(const float (&a)[WIDTH], const float (&b)[WIDTH]) {
    float sum = a[0] * b[0];
#pragma unroll
    for (int i = 1; i < WIDTH; ++i) sum = fmaf(a[i], b[i], sum);
    return sum;
}

// A warp's sums, `row` and, but of a GLU, the row after it, to where they belong: lane t has those of token t.
template <unsigned TOKENS>
__device__ __forceinline__ void store(const PartsArgs& a, const Part& w, uint32_t row, float (&sums)[TOKENS][ROWS]) {
    const unsigned lane = threadIdx.x % WARP;
    float y[ROWS] = {};
#pragma unroll
    for (unsigned t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (unsigned r = 0; r < ROWS; ++r) {
            const float sum = warp_sum(sums[t][r]);
            if (lane == t) y[r] = sum;
        }
    }
    const uint32_t token = blockIdx.x * TOKENS + lane;
    if (lane >= TOKENS || token >= a.tokens) return;
    const size_t at = size_t(token) * a.out_stride + w.column + row;
    y[0] += w.bias(row);
    if (a.epilogue == GLU) {
        put(a, at, activate(a.activation, y[0]) * (y[1] + part(a, 1).bias(row)));
    } else {
        put(a, at, y[0]);
        if (row + 1 < w.rows) put(a, at + 1, y[1] + w.bias(row + 1));
    }
}

template <int CODE, unsigned TOKENS> __device__ __forceinline__ void gemv(const PartsArgs& a) {
    using Format = Block<CODE>;
    using Weights = Lane<CODE>;
    constexpr bool PLAIN = Format::LEN == 8;
    constexpr unsigned TILE_BYTES = TILE / Format::LEN * Format::BYTES;
    constexpr unsigned PAD = Weights::PAD, GROUP_BYTES = Weights::GROUP * Format::BYTES;
    // A tile may begin in the middle of 16 bytes.
    constexpr unsigned SLOT = PLAIN ? 0 : (TILE_BYTES + 14 + 15) / 16 * 16 + (WARP / Weights::GROUP - 1) * PAD;
    constexpr unsigned WIDTH = Weights::WIDTH;
    extern __shared__ uint4 dynamic[];
    uint8_t* xs = reinterpret_cast<uint8_t*>(dynamic);
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint8_t* ring = xs + TOKENS * a.segment * X_TILE<Weights> + warp * (STAGES * ROWS * SLOT);

    const bool glu = a.epilogue == GLU;
    const Part w = part(a, blockIdx.z);
    const uint32_t row_bytes = a.cols / Format::LEN * Format::BYTES, tiles = div_up(a.cols, TILE);
    const uint32_t step = glu ? 1 : ROWS, first = (blockIdx.y * WARPS + warp) * step, stride = gridDim.y * WARPS * step;
    const uint8_t* up = static_cast<const uint8_t*>(a.weights[1]);
    // Both rows of a warp; past the last row, the last once more: it is not stored.
    const auto find = [&](uint32_t row, const uint8_t* (&rows)[ROWS]) {
        rows[0] = w.weights + size_t(min(row, w.rows - 1)) * row_bytes;
        rows[1] = (glu ? up : w.weights) + size_t(min(row + step - 1, w.rows - 1)) * row_bytes;
    };

    // What is fetched next: tile `next_tile` of `next_rows`, the rows at `next`.
    uint32_t next = first, next_tile = 0;
    unsigned slot = 0;
    const uint8_t* next_rows[ROWS];
    find(next, next_rows);
    const auto fetch = [&] {
        if (next < w.rows) {
            const uint32_t length = min(TILE_BYTES, row_bytes - next_tile * TILE_BYTES);
#pragma unroll
            for (unsigned r = 0; r < ROWS; ++r) {
                const uint8_t* from = next_rows[r] + next_tile * TILE_BYTES;
                const uint32_t rest = reinterpret_cast<uintptr_t>(from) % 16, end = rest + length;
                const uint32_t to = shared_address(ring + (slot * ROWS + r) * SLOT);
#pragma unroll 1
                for (uint32_t at = lane * 16; at < end; at += WARP * 16) {
                    const uint32_t pad = PAD && rest == 0 ? at / GROUP_BYTES * PAD : 0;
                    cp_async16(to + at + pad, from - rest + at, min(16u, end - at));
                }
            }
            if (++next_tile == tiles) next_tile = 0, find(next += stride, next_rows);
        }
        cp_async_commit();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    };
    if constexpr (!PLAIN) {
#pragma unroll 1
        for (unsigned i = 0; i + 1 < STAGES; ++i) fetch();
    }

    unsigned current = 0;
    bool staged = false;
    // All warps go through the same number of rows, for the barriers about x.
    for (uint32_t row = first; row - warp * step < w.rows; row += stride) {
        const uint8_t* rows[ROWS];
        find(row, rows);
        float sums[TOKENS][ROWS] = {};
        for (uint32_t tile = 0, in_segment = 0; tile < tiles; ++tile, ++in_segment) {
            if (in_segment == a.segment) in_segment = 0;
            if (in_segment == 0 && (tiles > a.segment || !staged)) {
                __syncthreads();
                stage_x<Weights, TOKENS>(a, tile, a.segment, xs);
                __syncthreads();
                staged = true;
            }
            const uint8_t* x = xs + in_segment * X_TILE<Weights> + lane * (WIDTH * 2);
            const auto multiply = [&](int u, const Weights (&mine)[ROWS]) {
                float v[ROWS][WIDTH];
#pragma unroll
                for (unsigned r = 0; r < ROWS; ++r) mine[r].unit(u, v[r]);
#pragma unroll
                for (unsigned t = 0; t < TOKENS; ++t) {
                    float mine_x[WIDTH];
                    load_x(x + t * a.segment * X_TILE<Weights> + u * Weights::PLANE, mine_x);
#pragma unroll
                    for (unsigned r = 0; r < ROWS; ++r) sums[t][r] += dot(v[r], mine_x);
                }
            };
            Weights mine[ROWS];
            if constexpr (PLAIN) {
                const uint32_t left = a.cols - tile * TILE;
#pragma unroll
                for (unsigned r = 0; r < ROWS; ++r) mine[r].load(rows[r] + tile * TILE_BYTES, lane, left);
#pragma unroll
                for (int u = 0; u < int(UNITS<Weights>); ++u) {
                    if (Weights::column(u, lane) < left) multiply(u, mine);
                }
            } else {
                cp_async_wait<STAGES - 2>();
                // After it, every lane sees the others' bytes, and nobody reads the slot that is filled next.
                __syncwarp();
                fetch();
                if (row < w.rows && tile * TILE + lane * 32 / Format::LEN * Format::LEN < a.cols) {
#pragma unroll
                    for (unsigned r = 0; r < ROWS; ++r) {
                        const uint32_t rest = (reinterpret_cast<uintptr_t>(rows[r]) + tile * TILE_BYTES) % 16;
                        mine[r].load(ring + (current * ROWS + r) * SLOT + rest, lane, rest == 0);
                    }
#pragma unroll
                    for (int u = 0; u < int(UNITS<Weights>); ++u) multiply(u, mine);
                }
                current = current + 1 == STAGES ? 0 : current + 1;
            }
        }
        if (row < w.rows) store<TOKENS>(a, w, row, sums);
    }
}

// Blocks a multiprocessor is to hold: they bound the registers of a thread to 168, 128, 96, 80.
constexpr int blocks_at_once(int code, unsigned tokens) {
    return code == F32 ? 4 : tokens == 8 ? code == F16 || code == BF16 ? 4 : 3 : tokens == 4 ? 5 : 6;
}

#define KERNEL(NAME, CODE, TOKENS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks_at_once(CODE, TOKENS))                               \
        NAME##_##TOKENS(const __grid_constant__ PartsArgs a) {                                                         \
        gemv<CODE, TOKENS>(a);                                                                                        \
    }
#define KERNELS(NAME, CODE)                                                                                           \
    KERNEL(NAME, CODE, 1)                                                                                             \
    KERNEL(NAME, CODE, 2)                                                                                             \
    KERNEL(NAME, CODE, 4)                                                                                             \
    KERNEL(NAME, CODE, 8)
KERNELS(gemv_f32, F32)
KERNELS(gemv_f16, F16)
KERNELS(gemv_bf16, BF16)
KERNELS(gemv_q4_0, Q4_0)
KERNELS(gemv_q4_1, Q4_1)
KERNELS(gemv_q5_0, Q5_0)
KERNELS(gemv_q5_1, Q5_1)
KERNELS(gemv_q8_0, Q8_0)
KERNELS(gemv_q2_k, Q2_K)
KERNELS(gemv_q3_k, Q3_K)
KERNELS(gemv_q4_k, Q4_K)
KERNELS(gemv_q5_k, Q5_K)
KERNELS(gemv_q6_k, Q6_K)
KERNELS(gemv_iq4_nl, IQ4_NL)
