// Linear maps of many tokens in precision fast: out = x * W^T (+ bias) on tensor cores, x bf16, weights bf16 or of any
// other type; gated linear units with gate and up projection in one block.
//
// bf16 weights go straight into the ring of matmul.cuh. Others come raw, a few hundred columns of each row at a time,
// into shared memory; tile by tile they are expanded to bf16 while the tile before is multiplied.
//
// Grid (tokens / tile, rows / tile, matrices), the matrices of one dtype; neighbours share the weights. Rows of plain
// types begin at multiples of 16 bytes: linear_f32.cu takes the others.
#define FOUR_LANES_A_ROW
#include "blocks.cuh"
#include "matmul.cuh"
#include "parts.cuh"

// Tile row n of a gated linear unit: 16 rows of the gate, the same 16 of the up projection, and so on, so that a thread
// has the sums of both.
constexpr unsigned GLU_ROWS = 16;

// Where the rows of a block's tile are in memory.
struct TileRows {
    const uint8_t* weights[2];
    uint32_t first, rows, row_bytes;
    bool glu;

    __device__ __forceinline__ const uint8_t* row(unsigned n) const {
        if (!glu) return weights[0] + size_t(first + n) * row_bytes;
        const uint8_t* half = n / GLU_ROWS % 2 ? weights[1] : weights[0];
        return half + size_t(first + n / (2 * GLU_ROWS) * GLU_ROWS + n % GLU_ROWS) * row_bytes;
    }
    __device__ __forceinline__ bool has(unsigned n) const {
        return first + (glu ? n / (2 * GLU_ROWS) * GLU_ROWS + n % GLU_ROWS : n) < rows;
    }
};

template <unsigned TILE_ROWS>
__device__ __forceinline__ DirectRows<TILE_ROWS, W_KEY> direct_rows(const TileRows& r, uint32_t cols) {
    static_assert(ROWS_AT_ONCE == 2 * GLU_ROWS);
    const unsigned n = threadIdx.x / PIECES, step = r.glu ? GLU_ROWS : ROWS_AT_ONCE;
    return {reinterpret_cast<const bf16*>(r.row(n)), size_t(step) * cols,
            own_rows(r.first + (r.glu ? n % GLU_ROWS : n), r.rows, step), cols};
}

// Rows in blocks, raw in shared memory: two buffers of COLUMNS columns of each row.
template <int CODE, unsigned TILE_ROWS> struct RawRows {
    using Format = Block<CODE>;
    static constexpr unsigned COLUMNS = Format::LEN == 8 ? 64 : CODE == Q8_0 ? 128 : 256, TILES = COLUMNS / DEPTH;
    static constexpr unsigned LENGTH = COLUMNS / Format::LEN * Format::BYTES;
    // A row may begin in the middle of 16 bytes. Rows are an odd number of them apart, or of f16 an odd number of 64
    // bytes: then the words that are read at a time are in different banks, unless rows begin differently.
    static constexpr unsigned LAST = Format::ALIGN >= 16 ? 0 : 16 - Format::ALIGN;
    static constexpr unsigned PIECES_EACH = CODE == F16 ? LENGTH / 16 : (LENGTH + LAST + 15) / 16 | 1;
    static constexpr unsigned SLOT = CODE == F16 ? LENGTH + 64 : PIECES_EACH * 16;
    static constexpr unsigned BYTES = 2 * TILE_ROWS * SLOT;

    const TileRows& r;
    uint8_t* raw;
    uint32_t cols;

    // Begins to bring part `p` of all rows.
    __device__ __forceinline__ void fetch(uint32_t p) const {
        if (p * COLUMNS >= cols) return;
        const uint32_t length = min(LENGTH, r.row_bytes - p * LENGTH);
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < TILE_ROWS * PIECES_EACH; i += MATMUL_THREADS) {
            const unsigned n = i / PIECES_EACH, at = i % PIECES_EACH * 16;
            if (!r.has(n)) continue;
            const uint8_t* from = r.row(n) + p * LENGTH;
            const uint32_t rest = reinterpret_cast<uintptr_t>(from) % 16, end = rest + length;
            if (at < end) {
                cp_async16(shared_address(raw + (p % 2 * TILE_ROWS + n) * SLOT + at), from - rest + at,
                           min(16u, end - at));
            }
        }
    }

    // Expands the columns of tile `tile` to bf16, zeros where there are none. The part they are in is in shared memory.
    __device__ __forceinline__ void expand(uint32_t tile, uint8_t* to) const {
        const unsigned piece = threadIdx.x % PIECES;
        const uint32_t p = tile / TILES, column = tile % TILES * DEPTH + piece * 8;
        const bool inside = p * COLUMNS + column < cols;
#pragma unroll
        for (unsigned i = 0; i < TILE_ROWS / ROWS_AT_ONCE; ++i) {
            const unsigned n = threadIdx.x / PIECES + i * ROWS_AT_ONCE;
            uint4 words = make_uint4(0, 0, 0, 0);
            if (inside && r.has(n)) {
                const uint32_t rest =
                    LAST ? (reinterpret_cast<uintptr_t>(r.row(n)) + p * LENGTH) % 16 : 0;
                const uint8_t* row = raw + (p % 2 * TILE_ROWS + n) * SLOT + rest;
                float v[8];
                Format::decode8(row + column / Format::LEN * Format::BYTES, column % Format::LEN, v);
                words = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                                   pack_bf16(v[6], v[7]));
            }
            *reinterpret_cast<uint4*>(to + place<W_KEY>(n, piece)) = words;
        }
    }
};

// As `matmul` of matmul.cuh; shared memory: the ring of x, two tiles of W, the raw rows.
template <typename S, typename X, typename W>
__device__ __forceinline__ void matmul_raw(uint8_t* shared, uint32_t cols, const X& x, const W& w, Sums<S>& sums) {
    uint8_t* w_tiles = shared + STAGES * S::X_BYTES;
    const uint32_t x_ring = shared_address(shared), w_ring = shared_address(w_tiles);
    const uint32_t tiles = div_up(cols, DEPTH);
    const auto fetch = [&](uint32_t tile, unsigned slot) {
        if (tile < tiles) x.fetch(tile, x_ring + slot * S::X_BYTES);
        cp_async_commit();
    };
    static_assert(STAGES == 3 && W::TILES >= 2);
    w.fetch(0);
    fetch(0, 0);
    w.fetch(1);
    fetch(1, 1);
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    w.expand(0, w_tiles);
    sums.clear();
    unsigned slot = 0, next = STAGES - 1;
#pragma unroll 1
    for (uint32_t tile = 0; tile < tiles; ++tile) {
        cp_async_wait<STAGES - 2>();
        // The tile of x and the expanded tile of W are everyone's; nobody reads those of the round before any more, nor
        // the part of the raw rows before the one of the next tile.
        __syncthreads();
        if ((tile + 1) % W::TILES == 0) w.fetch((tile + 1) / W::TILES + 1);
        fetch(tile + STAGES - 1, next);
        if (tile + 1 < tiles) w.expand(tile + 1, w_tiles + (tile + 1) % 2 * S::W_BYTES);
        sums.add(x_ring + slot * S::X_BYTES, w_ring + tile % 2 * S::W_BYTES);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
}

// Writes `n` of four neighbours. `vector`: `at` is a multiple of four.
__device__ __forceinline__ void put4(const PartsArgs& a, size_t at, float4 y, unsigned n, bool vector) {
    if (n == 4 && vector) {
        if (a.out_bf16) {
            uint2* out = reinterpret_cast<uint2*>(static_cast<bf16*>(a.out) + at);
            *out = make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
        } else {
            float4* out = reinterpret_cast<float4*>(static_cast<float*>(a.out) + at);
            *out = a.epilogue == ADD ? sum4(*out, y) : y;
        }
        return;
    }
    if (n > 0) put(a, at, y.x);
    if (n > 1) put(a, at + 1, y.y);
    if (n > 2) put(a, at + 2, y.z);
    if (n > 3) put(a, at + 3, y.w);
}

__device__ __forceinline__ float4 add_bias(const Part& w, uint32_t row, unsigned n, float4 y) {
    return w.biases ? sum4(y, load_float4(w.biases, w.bias_dtype, row, n)) : y;
}

template <typename S>
__device__ __forceinline__ void store(const PartsArgs& a, const TileRows& r, const Part& w, uint32_t first_token,
                                      const Sums<S>& sums) {
    const Part up = part(a, 1);
    const bool vector = a.out_stride % 4 == 0 && w.column % 4 == 0;
    sums.each_token([&](unsigned token, unsigned band, unsigned half) {
        token += first_token;
        if (token >= a.tokens) return;
        const size_t line = size_t(token) * a.out_stride + w.column;
        // Of a gated linear unit, the next pair is the up projection's.
#pragma unroll
        for (unsigned pair = 0; pair < Sums<S>::PAIRS; ++pair) {
            const unsigned n = Sums<S>::row(pair);
            if (r.glu && pair % 2 == 1) continue;
            const uint32_t row = r.first + (r.glu ? n / (2 * GLU_ROWS) * GLU_ROWS + n % GLU_ROWS : n);
            if (row >= w.rows) continue;
            const unsigned count = min(4u, w.rows - row);
            float4 y = add_bias(w, row, count, sums.quad(band, pair, half));
            if (r.glu) {
                const float4 u = add_bias(up, row, count, sums.quad(band, pair | 1, half));
                y = make_float4(activate(a.activation, y.x) * u.x, activate(a.activation, y.y) * u.y,
                                activate(a.activation, y.z) * u.z, activate(a.activation, y.w) * u.w);
            }
            put4(a, line + row, y, count, vector);
        }
    });
}

template <int CODE, typename S> __device__ __forceinline__ void linear(const PartsArgs& a) {
    extern __shared__ uint4 dynamic[];
    uint8_t* shared = reinterpret_cast<uint8_t*>(dynamic);
    const bool glu = a.epilogue == GLU;
    const Part w = part(a, blockIdx.z);
    const uint32_t first_token = blockIdx.x * S::TOKENS, first_row = blockIdx.y * (glu ? S::ROWS / 2 : S::ROWS);
    if (first_row >= w.rows) return;
    const uint32_t row_bytes = a.cols / Block<CODE>::LEN * Block<CODE>::BYTES;
    const TileRows r{{w.weights, static_cast<const uint8_t*>(a.weights[1])}, first_row, w.rows, row_bytes, glu};
    const auto x = rows_of_x<S::TOKENS>(a.x, a.tokens, a.cols, a.cols, first_token);
    Sums<S> sums;
    if constexpr (CODE == BF16) {
        const auto rows = direct_rows<S::ROWS>(r, a.cols);
        matmul<S>(shared, a.cols, x, rows, sums);
    } else {
        const RawRows<CODE, S::ROWS> rows{r, shared + STAGES * S::X_BYTES + 2 * S::W_BYTES, a.cols};
        matmul_raw<S>(shared, a.cols, x, rows, sums);
    }
    store(a, r, w, first_token, sums);
}

// Named by the type of the weights and tokens and rows of the tile.
#define KERNEL(NAME, CODE, TOKENS, ROWS, WARP_TOKENS, WARP_ROWS, BLOCKS)                                              \
    extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, BLOCKS)                                              \
        NAME##_##TOKENS##x##ROWS(const __grid_constant__ PartsArgs a) {                                               \
        linear<CODE, Shape<TOKENS, ROWS, WARP_TOKENS, WARP_ROWS>>(a);                                                 \
    }
#define RAW_KERNELS(NAME, CODE)                                                                                       \
    KERNEL(NAME, CODE, 128, 64, 64, 32, 3)                                                                            \
    KERNEL(NAME, CODE, 64, 64, 32, 32, 3)
KERNEL(linear_bf16, BF16, 128, 128, 64, 64, 2)
KERNEL(linear_bf16, BF16, 64, 64, 32, 32, 4)
RAW_KERNELS(linear_f32, F32)
RAW_KERNELS(linear_f16, F16)
RAW_KERNELS(linear_q4_0, Q4_0)
RAW_KERNELS(linear_q4_1, Q4_1)
RAW_KERNELS(linear_q5_0, Q5_0)
RAW_KERNELS(linear_q5_1, Q5_1)
RAW_KERNELS(linear_q8_0, Q8_0)
RAW_KERNELS(linear_q2_k, Q2_K)
RAW_KERNELS(linear_q3_k, Q3_K)
RAW_KERNELS(linear_q4_k, Q4_K)
RAW_KERNELS(linear_q5_k, Q5_K)
RAW_KERNELS(linear_q6_k, Q6_K)
RAW_KERNELS(linear_iq4_nl, IQ4_NL)
