// The product on tensor cores that linear.cu and fuse.cu are made of: sums[token, row] = x[token, :] * W[row, :], both
// operands by rows in bf16, sums in f32.
//
// A block has TOKENS by ROWS sums, each of its four warps a part of them in registers. Tiles of DEPTH columns of x and W
// go through a ring in shared memory; a loader says where they come from. The columns of one sum are added 16 at a time
// from the first to the last, by one instruction each, whatever the size of the tile: a token's bits depend neither on
// its neighbours nor on which kernel takes it.
//
// A tile in shared memory has rows of four pieces of 16 bytes, at place piece ^ key of the row. Eight neighbouring
// lanes, two rows of a copy or one 8x8 matrix of ldmatrix, then meet all 32 banks once. The key of x changes every two
// rows. That of W every four: ldmatrix takes its rows in an order such that a thread's sums are of four neighbouring
// rows, which it stores as one vector.
#pragma once
#include "ptx.cuh"

constexpr unsigned DEPTH = 32, PIECES = DEPTH / 8, MATMUL_THREADS = 128, STAGES = 3;
constexpr unsigned X_KEY = 2, W_KEY = 4;

template <unsigned KEY> __device__ __forceinline__ uint32_t place(unsigned row, unsigned piece) {
    return row * (DEPTH * 2) + (piece ^ (row / KEY % PIECES)) * 16;
}

template <unsigned TOKENS_, unsigned ROWS_, unsigned WARP_TOKENS_, unsigned WARP_ROWS_> struct Shape {
    static constexpr unsigned TOKENS = TOKENS_, ROWS = ROWS_, WARP_TOKENS = WARP_TOKENS_, WARP_ROWS = WARP_ROWS_;
    static constexpr unsigned X_BYTES = TOKENS * DEPTH * 2, W_BYTES = ROWS * DEPTH * 2;
    static_assert(TOKENS / WARP_TOKENS * (ROWS / WARP_ROWS) * WARP == MATMUL_THREADS);
};

// A warp's sums: [16 tokens, 16 rows] at a time.
template <typename S> struct Sums {
    static constexpr unsigned BANDS = S::WARP_TOKENS / 16, PAIRS = S::WARP_ROWS / 16;
    float d[BANDS][PAIRS][2][4];

    static __device__ __forceinline__ unsigned warp_token() {
        return threadIdx.x / WARP % (S::TOKENS / S::WARP_TOKENS) * S::WARP_TOKENS;
    }
    static __device__ __forceinline__ unsigned warp_row() {
        return threadIdx.x / WARP / (S::TOKENS / S::WARP_TOKENS) * S::WARP_ROWS;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (unsigned i = 0; i < BANDS * PAIRS * 8; ++i) (&d[0][0][0][0])[i] = 0.f;
    }

    // Adds the product of two tiles, at these addresses of shared memory.
    __device__ __forceinline__ void add(uint32_t x_tile, uint32_t w_tile) {
        const unsigned lane = threadIdx.x % WARP;
        const unsigned token = warp_token() + lane % 16;
        // Matrices of ldmatrix: rows 4 i, 4 i + 1 of 16, columns 0..7, then 8..15; the same of rows 4 i + 2, 4 i + 3.
        const unsigned row = warp_row() + lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
#pragma unroll
        for (unsigned k = 0; k < PIECES; k += 2) {
            uint32_t x[BANDS][4];
#pragma unroll
            for (unsigned band = 0; band < BANDS; ++band) {
                ldmatrix4(x[band], x_tile + place<X_KEY>(token + band * 16, k + lane / 16));
            }
#pragma unroll
            for (unsigned pair = 0; pair < PAIRS; ++pair) {
                uint32_t w[4];
                ldmatrix4(w, w_tile + place<W_KEY>(row + pair * 16, k + lane / 8 % 2));
#pragma unroll
                for (unsigned band = 0; band < BANDS; ++band) {
                    mma_bf16(d[band][pair][0], x[band], w[0], w[1]);
                    mma_bf16(d[band][pair][1], x[band], w[2], w[3]);
                }
            }
        }
    }

    // Calls `f(token, band, half)` for every token that this thread has sums of, counted in the block's tile. Of each it
    // has, pair after pair, `quad`s of the four rows from `row` on, a multiple of four.
    template <typename F> __device__ __forceinline__ void each_token(F f) const {
#pragma unroll
        for (unsigned band = 0; band < BANDS; ++band) {
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
                f(warp_token() + band * 16 + half * 8 + threadIdx.x % WARP / 4, band, half);
            }
        }
    }
    static __device__ __forceinline__ unsigned row(unsigned pair) {
        return warp_row() + pair * 16 + threadIdx.x % 4 * 4;
    }
    __device__ __forceinline__ float4 quad(unsigned band, unsigned pair, unsigned half) const {
        const float(&low)[4] = d[band][pair][0], (&high)[4] = d[band][pair][1];
        return make_float4(low[2 * half], low[2 * half + 1], high[2 * half], high[2 * half + 1]);
    }
};

// Loaders have `fetch(tile, to)`: begins to bring columns DEPTH * tile.. into the tile at `to`, zeros where there are
// none. What it stores or copies is there after this thread's cp.async groups are done and a barrier.
//
// Thread i brings piece i % 4 of rows i / 4, i / 4 + 32..
constexpr unsigned ROWS_AT_ONCE = MATMUL_THREADS / PIECES;

// The ring: STAGES tiles of x and of W each.
template <typename S, typename X, typename W>
__device__ __forceinline__ void matmul(uint8_t* shared, uint32_t cols, const X& x, const W& w, Sums<S>& sums) {
    const uint32_t x_ring = shared_address(shared), w_ring = x_ring + STAGES * S::X_BYTES;
    const uint32_t tiles = div_up(cols, DEPTH);
    const auto fetch = [&](uint32_t tile, unsigned slot) {
        if (tile < tiles) {
            x.fetch(tile, x_ring + slot * S::X_BYTES);
            w.fetch(tile, w_ring + slot * S::W_BYTES);
        }
        cp_async_commit();
    };
#pragma unroll
    for (unsigned i = 0; i + 1 < STAGES; ++i) fetch(i, i);
    sums.clear();
    unsigned slot = 0, next = STAGES - 1;
#pragma unroll 1
    for (uint32_t tile = 0; tile < tiles; ++tile) {
        cp_async_wait<STAGES - 2>();
        // The tile is everyone's, and nobody reads the slot of the one before it any more.
        __syncthreads();
        fetch(tile + STAGES - 1, next);
        sums.add(x_ring + slot * S::X_BYTES, w_ring + slot * S::W_BYTES);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
}

// Rows of bf16 that begin at multiples of 16 bytes: `rows` tile rows whose first for this thread begins at `first`, and
// whose next, ROWS_AT_ONCE further in the tile, `step` elements on.
template <unsigned TILE_ROWS, unsigned KEY> struct DirectRows {
    const bf16* first;
    size_t step;
    // Of this thread's.
    unsigned rows;
    uint32_t cols;

    __device__ __forceinline__ void fetch(uint32_t tile, uint32_t to) const {
        const unsigned piece = threadIdx.x % PIECES;
        const uint32_t column = tile * DEPTH + piece * 8;
        const uint32_t bytes = column < cols ? min(16u, (cols - column) * 2) : 0;
#pragma unroll
        for (unsigned i = 0; i < TILE_ROWS / ROWS_AT_ONCE; ++i) {
            const unsigned row = threadIdx.x / PIECES + i * ROWS_AT_ONCE;
            cp_async16(to + place<KEY>(row, piece), first + i * step + column, i < rows ? bytes : 0);
        }
    }
};

// How many of this thread's tile rows there are, of `rows` that follow one another ROWS_AT_ONCE at a time.
__device__ __forceinline__ unsigned own_rows(uint32_t first, uint32_t rows, unsigned step = ROWS_AT_ONCE) {
    return first < rows ? div_up(rows - first, step) : 0;
}

// Rows of x, [tokens, stride], from `first_token` on.
template <unsigned TILE_ROWS>
__device__ __forceinline__ DirectRows<TILE_ROWS, X_KEY> rows_of_x(const void* x, uint32_t tokens, uint32_t cols,
                                                                  uint32_t stride, uint32_t first_token) {
    const uint32_t token = first_token + threadIdx.x / PIECES;
    return {static_cast<const bf16*>(x) + size_t(token) * stride, size_t(ROWS_AT_ONCE) * stride,
            own_rows(token, tokens), cols};
}
