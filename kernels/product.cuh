// The products that backward passes are made of: sums[m, n] = sum over d of A(m, d) * B(d, n), each operand by rows or by
// columns, f32 in memory or converted to it.
//
// A block has SIDE by SIDE sums and takes DEPTH of d at a time through two buffers in shared memory. An operand is a struct
// with `load(line, first, v)`: EACH elements (4 or 8) of a line from `first` on, a multiple of EACH, zeros where there are
// none. A line is a d (BY_DEPTH) or else an m or n. The d of one sum are added from the first to the last.
#pragma once
#include "ptx.cuh"

constexpr unsigned SIDE = 64, DEPTH = 32;

// Elements i..i + 3 of a vector of F32, F16 or BF16 that has n from i on.
__device__ __forceinline__ void load4(float (&v)[4], const void* p, uint32_t dtype, size_t i, uint32_t n) {
    const float4 x = load_float4(p, dtype, i, n);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}

// A matrix whose type is data: lines of `width` elements, `stride` apart.
template <bool BY_DEPTH_> struct Lines {
    static constexpr bool BY_DEPTH = BY_DEPTH_;
    static constexpr unsigned EACH = 4;
    const void* data;
    uint32_t dtype, lines, width, stride;

    __device__ __forceinline__ void load(uint32_t line, uint32_t first, float (&v)[4]) const {
        const bool there = line < lines && first < width;
        load4(v, data, dtype, size_t(line) * stride + first, there ? width - first : 0);
    }
};

// Lines of another operand from `start` on.
template <typename T> struct Shifted {
    static constexpr bool BY_DEPTH = T::BY_DEPTH;
    static constexpr unsigned EACH = T::EACH;
    T lines;
    uint32_t start;

    __device__ __forceinline__ void load(uint32_t line, uint32_t first, float (&v)[EACH]) const {
        lines.load(start + line, first, v);
    }
};

// On tensor cores: both operands are rounded to bf16, sums are f32. A tile by lines of d has rows of 8 pieces of 16
// bytes, the other kind rows of 4; pieces are swapped so that 8 rows of one piece, or 8 neighbouring pieces, are in
// different banks.
struct ProductBf16 {
    static constexpr unsigned THREADS = 128, TILE = SIDE * DEPTH * 2;
    // Two buffers, of A and of B.
    struct __align__(128) Tiles {
        uint8_t of[2][2][TILE];
    };
    // A warp's 32 by 32: [16 m][8 n] as mma has them.
    float d[2][4][4];

    template <bool BY_DEPTH> static __device__ __forceinline__ uint32_t place(unsigned line, unsigned piece) {
        return BY_DEPTH ? line * 128 + (piece ^ line % 8) * 16 : line * 64 + (piece ^ line / 2 % 4) * 16;
    }
    static __device__ __forceinline__ unsigned warp_m() { return threadIdx.x / WARP % 2 * 32; }
    static __device__ __forceinline__ unsigned warp_n() { return threadIdx.x / WARP / 2 * 32; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (unsigned i = 0; i < 32; ++i) (&d[0][0][0])[i] = 0.f;
    }

    template <typename T>
    static __device__ __forceinline__ void fill(const T& operand, uint32_t side, uint32_t depth, uint8_t* tile) {
        constexpr unsigned EACH = T::EACH, LINE = (T::BY_DEPTH ? SIDE : DEPTH) / EACH;
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < SIDE * DEPTH / EACH; i += THREADS) {
            const unsigned line = i / LINE, at = i % LINE * EACH;
            float v[EACH];
            operand.load((T::BY_DEPTH ? depth : side) + line, (T::BY_DEPTH ? side : depth) + at, v);
            uint8_t* to = tile + place<T::BY_DEPTH>(line, at / 8);
            if constexpr (EACH == 8) {
                *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                                           pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
            } else {
                *reinterpret_cast<uint2*>(to + at % 8 * 2) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
            }
        }
    }

    template <bool A, bool B> __device__ __forceinline__ void multiply(const uint8_t* a_tile, const uint8_t* b_tile) {
        const uint32_t a_at = shared_address(a_tile), b_at = shared_address(b_tile);
        const unsigned lane = threadIdx.x % WARP, row = lane % 8, second = lane / 8 % 2, third = lane / 16;
#pragma unroll
        for (unsigned k = 0; k < DEPTH; k += 16) {
            uint32_t a[2][4];
#pragma unroll
            for (unsigned band = 0; band < 2; ++band) {
                const unsigned m = warp_m() + band * 16;
                if (A) ldmatrix4_trans(a[band], a_at + place<true>(k + third * 8 + row, m / 8 + second));
                else ldmatrix4(a[band], a_at + place<false>(m + second * 8 + row, k / 8 + third));
            }
#pragma unroll
            for (unsigned pair = 0; pair < 2; ++pair) {
                const unsigned n = warp_n() + pair * 16;
                uint32_t b[4];
                if (B) ldmatrix4_trans(b, b_at + place<true>(k + second * 8 + row, n / 8 + third));
                else ldmatrix4(b, b_at + place<false>(n + third * 8 + row, k / 8 + second));
#pragma unroll
                for (unsigned band = 0; band < 2; ++band) {
                    mma_bf16(d[band][2 * pair], a[band], b[0], b[1]);
                    mma_bf16(d[band][2 * pair + 1], a[band], b[2], b[3]);
                }
            }
        }
    }

    // Adds the product of rows m.. of A and columns n.. of B over `depth`.
    template <typename A, typename B>
    __device__ __forceinline__ void add(Tiles& shared, const A& a, uint32_t m, const B& b, uint32_t n, uint32_t depth) {
        auto& tiles = shared.of;
        // One place fills and one multiplies: half of the code of a loop that begins with tiles filled before it.
#pragma unroll 1
        for (uint32_t at = 0, buffer = 0; at < depth + DEPTH; at += DEPTH, buffer ^= 1) {
            // The tiles of the round before are there, and nobody reads these any more.
            __syncthreads();
            if (at < depth) fill(a, m, at, tiles[buffer][0]), fill(b, n, at, tiles[buffer][1]);
            if (at > 0) multiply<A::BY_DEPTH, B::BY_DEPTH>(tiles[buffer ^ 1][0], tiles[buffer ^ 1][1]);
        }
    }

    // Calls f(m, n, sum of n, sum of n + 1) for all that this thread has.
    template <typename F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (unsigned band = 0; band < 2; ++band)
#pragma unroll
            for (unsigned half = 0; half < 2; ++half)
#pragma unroll
                for (unsigned tile = 0; tile < 4; ++tile)
                    f(warp_m() + band * 16 + half * 8 + threadIdx.x % WARP / 4,
                      warp_n() + tile * 8 + threadIdx.x % 4 * 2, d[band][tile][2 * half], d[band][tile][2 * half + 1]);
    }
};

// The same in f32, by plain multiply-adds. Tiles are [DEPTH][SIDE]: element (d, i) is at SIDE d + (i ^ d / 4 * 4), so that
// neither stores nor loads meet in a bank.
struct ProductF32 {
    static constexpr unsigned THREADS = 256;
    // Of A and of B.
    struct __align__(16) Tiles {
        float of[2][SIDE * DEPTH];
    };
    // Of this thread: four m, and of n two and two that are 32 further.
    float d[4][4];

    static __device__ __forceinline__ unsigned own_m() { return threadIdx.x / 16 * 4; }
    static __device__ __forceinline__ unsigned own_n() { return threadIdx.x % 16 * 2; }
    static __device__ __forceinline__ unsigned place(unsigned depth, unsigned i) {
        return depth * SIDE + (i ^ depth / 4 * 4);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (unsigned i = 0; i < 16; ++i) (&d[0][0])[i] = 0.f;
    }

    template <typename T>
    static __device__ __forceinline__ void fill(const T& operand, uint32_t side, uint32_t depth, float* tile) {
        constexpr unsigned EACH = T::EACH, LINE = (T::BY_DEPTH ? SIDE : DEPTH) / EACH;
#pragma unroll
        for (unsigned i = threadIdx.x; i < SIDE * DEPTH / EACH; i += THREADS) {
            const unsigned line = i / LINE, at = i % LINE * EACH;
            float v[EACH];
            operand.load((T::BY_DEPTH ? depth : side) + line, (T::BY_DEPTH ? side : depth) + at, v);
            if constexpr (T::BY_DEPTH) {
                // Of eights, half of the lanes have their second four first: the others' are in the same banks.
#pragma unroll
                for (unsigned j = 0; j < EACH; j += 4) {
                    const unsigned k = EACH == 8 && threadIdx.x / 4 % 2 ? 4 - j : j;
                    const bool second = EACH == 8 && k == 4;
                    *reinterpret_cast<float4*>(tile + place(line, at + k)) =
                        second ? make_float4(v[EACH - 4], v[EACH - 3], v[EACH - 2], v[EACH - 1])
                               : make_float4(v[0], v[1], v[2], v[3]);
                }
            } else {
#pragma unroll
                for (unsigned j = 0; j < EACH; ++j) tile[place(at + j, line)] = v[j];
            }
        }
    }

    template <typename A, typename B>
    __device__ __forceinline__ void add(Tiles& shared, const A& a, uint32_t m, const B& b, uint32_t n, uint32_t depth) {
        auto& tiles = shared.of;
#pragma unroll 1
        for (uint32_t at = 0; at < depth; at += DEPTH) {
            __syncthreads();
            fill(a, m, at, tiles[0]);
            fill(b, n, at, tiles[1]);
            __syncthreads();
#pragma unroll 8
            for (unsigned k = 0; k < DEPTH; ++k) {
                const float4 x = *reinterpret_cast<const float4*>(tiles[0] + place(k, own_m()));
                const float2 low = *reinterpret_cast<const float2*>(tiles[1] + place(k, own_n()));
                const float2 high = *reinterpret_cast<const float2*>(tiles[1] + place(k, own_n() + 32));
                const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
                for (unsigned i = 0; i < 4; ++i)
#pragma unroll
                    for (unsigned j = 0; j < 4; ++j) d[i][j] = fmaf(xs[i], ys[j], d[i][j]);
            }
        }
    }

    template <typename F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i)
#pragma unroll
            for (unsigned j = 0; j < 4; j += 2) f(own_m() + i, own_n() + j * 16, d[i][j], d[i][j + 1]);
    }
};

// One store: the compiler takes those of two elements apart. `to` is at a multiple of 8.
__device__ __forceinline__ void store_pair(float* to, float x, float y) {
    *reinterpret_cast<uint64_t*>(to) = uint64_t(__float_as_uint(y)) << 32 | __float_as_uint(x);
}

// Assigns two neighbours to elements `at`, at + 1 of a row of `width`, or adds them.
__device__ __forceinline__ void put2(float* row, uint32_t at, uint32_t width, float x, float y, bool add) {
    if (at >= width) return;
    float* to = row + at;
    if (at + 1 < width && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        if (add) {
            const float2 before = *reinterpret_cast<const float2*>(to);
            x = before.x + x, y = before.y + y;
        }
        return store_pair(to, x, y);
    }
    to[0] = add ? to[0] + x : x;
    if (at + 1 < width) to[1] = add ? to[1] + y : y;
}
