// Attention without tensor cores: f32 operands, and head sizes that the tiles of attention.cuh are not made for.
//
// A warp has 8 rows, each lane every 32nd element of each. It takes 4 keys at a time, which makes 32 scores, one a lane:
// lane l has key l % 4 of row l / 4, and with it the row's maximum and its share of the row's sum.
#pragma once
#include "attention.cuh"

constexpr uint32_t PLAIN_ROWS = 8, PLAIN_KEYS = 4;

// Lane l gets the sum over all lanes of their x[l]: 31 shuffles. Each step halves what a lane still adds up.
template <uint32_t HALF = WARP / 2> __device__ __forceinline__ float transposed_sum(float (&x)[WARP]) {
    const bool upper = threadIdx.x & HALF;
#pragma unroll
    for (uint32_t i = 0; i < HALF; ++i) {
        const float kept = upper ? x[i + HALF] : x[i], sent = upper ? x[i] : x[i + HALF];
        x[i] = kept + __shfl_xor_sync(FULL_MASK, sent, HALF);
    }
    if constexpr (HALF > 1) return transposed_sum<HALF / 2>(x);
    return x[0];
}

// SLOTS * 32 >= head_dim.
template <int SLOTS> struct PlainRows {
    float q[PLAIN_ROWS][SLOTS];
    float out[PLAIN_ROWS][SLOTS];
    float top, sum;

    __device__ void clear() {
#pragma unroll
        for (uint32_t r = 0; r < PLAIN_ROWS; ++r)
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) q[r][i] = out[r][i] = 0.f;
        // Finite, so that nothing minus it is NaN.
        top = -FLT_MAX, sum = 0.f;
    }

    // Elements `offset`.. of a tensor, one row of them; zeros if it is not there.
    __device__ static void load(float (&x)[SLOTS], const void* from, uint32_t dtype, size_t offset, bool there,
                                uint32_t head_dim) {
        const auto fill = [&](const auto* row) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                const uint32_t d = i * WARP + threadIdx.x % WARP;
                x[i] = there && d < head_dim ? to_float(row[d]) : 0.f;
            }
        };
        if (dtype == F32)
            fill(static_cast<const float*>(from) + offset);
        else
            fill(static_cast<const bf16*>(from) + offset);
    }
    __device__ static void store(const float (&x)[SLOTS], float scale, void* to, uint32_t dtype, size_t offset,
                                 uint32_t head_dim) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const uint32_t d = i * WARP + threadIdx.x % WARP;
            // + 0 so that no sum is -0 for one way of tiling and +0 for another.
            if (d < head_dim) store_float(to, dtype, offset + d, x[i] * scale + 0.f);
        }
    }

    // Takes in keys `key`.., a multiple of 4; only those in `first..end` are read. The lane's row sees them up to
    // `own`, at distances below the window.
    __device__ void attend(const AttentionArgs& a, const Exponent& exponent, const Keys& keys, uint32_t key,
                           uint32_t first, uint32_t end, uint32_t own, uint32_t window) {
        const bool one_block = a.block_size >= PLAIN_KEYS;
        const uint32_t block = block_of<PLAIN_KEYS>(keys, key, first, end);
        const auto row_of = [&](const void* pages, uint32_t key, float(&x)[SLOTS]) {
            const bool seen = first <= key && key < end;
            const size_t offset = seen ? keys.offset(one_block ? block : keys.block(key), key, a.head_dim) : 0;
            load(x, pages, a.kv_dtype, offset, seen, a.head_dim);
        };
        float products[WARP];
#pragma unroll
        for (uint32_t j = 0; j < PLAIN_KEYS; ++j) {
            float k[SLOTS];
            row_of(a.keys, key + j, k);
#pragma unroll
            for (uint32_t r = 0; r < PLAIN_ROWS; ++r) {
                float product = 0.f;
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) product = fmaf(q[r][i], k[i], product);
                products[r * PLAIN_KEYS + j] = product;
            }
        }
        float score = transposed_sum(products);
        if (exponent.inner > 0.f) score = exponent.capped_exactly(score);
        // Keys after the row's own are at distances near 2^32.
        if (own - (key + threadIdx.x % PLAIN_KEYS) >= window) score = -INFINITY;

        float largest = fmaxf(score, __shfl_xor_sync(FULL_MASK, score, 1));
        largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
        const float now = fmaxf(top, largest * exponent.outer);
        const float shrink = exp2_approx(top - now), p = exp2_approx(fmaf(score, exponent.outer, -now));
        top = now;
        sum = sum * shrink + p;
#pragma unroll
        for (uint32_t r = 0; r < PLAIN_ROWS; ++r) {
            const float row_shrink = __shfl_sync(FULL_MASK, shrink, r * PLAIN_KEYS);
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) out[r][i] *= row_shrink;
        }
#pragma unroll
        for (uint32_t j = 0; j < PLAIN_KEYS; ++j) {
            float v[SLOTS];
            row_of(a.values, key + j, v);
#pragma unroll
            for (uint32_t r = 0; r < PLAIN_ROWS; ++r) {
                const float row_p = __shfl_sync(FULL_MASK, p, r * PLAIN_KEYS + j);
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) out[r][i] = fmaf(row_p, v[i], out[r][i]);
            }
        }
    }

    // The sum of the lane's row, from its four lanes.
    __device__ float total() const {
        const float x = sum + __shfl_xor_sync(FULL_MASK, sum, 1);
        return x + __shfl_xor_sync(FULL_MASK, x, 2);
    }
};
