// Backward of causal attention over pages (FlashAttention-2, arXiv 2307.08691, algorithm 2, without atomics). With
// p = softmax(e), e the scores after scale and soft cap, do the gradient of the output and delta = sum of p dp:
//
//   dV = p^T do      dp = do V^T      ds = p (dp - delta) * slope      dQ = ds K      dK = ds^T Q
//
// `attention_backward_q` has a tile of rows (see attention.cuh: the heads of a kv head stacked), goes over their keys once
// for delta and the sum of exponentials and once more for dQ, and leaves both sums to `attention_backward_kv`, which has a
// tile of keys and goes over the rows that see it. (delta is also sum of do out, but a row of one key would then have a
// gradient of rounding errors.) Every sum is one block's, in one order. Blocks have up to 64 N columns of a
// head; larger heads take several, which compute the scores again. Blocks of the tables are one sequence's each.
#include "attention.cuh"
#include "product.cuh"

// Twin of `backend::cuda::attention_backward::AttentionBackwardArgs`.
struct AttentionBackwardArgs {
    AttentionArgs forward;
    const float* dout;  // [tokens, heads * head_dim]
    float* dq;          // the same
    float* dkeys;       // as forward.keys
    float* dvalues;
    float* logs;    // [tokens, heads]: log2 of a row's sum of exponentials
    float* deltas;  // [tokens, heads]
};

constexpr uint32_t PITCH = SIDE + 8;  // Of a tile of scores: pairs of rows are in different banks.

// Stacked rows of one sequence and kv head.
struct Rows {
    uint32_t token, group, kv_head, rows;

    __device__ __forceinline__ size_t line(uint32_t row, uint32_t stride, uint32_t head_dim) const {
        return size_t(token + row / group) * stride + (kv_head * group + row % group) * head_dim;
    }
};
template <bool BY_DEPTH_> struct RowLines {
    static constexpr bool BY_DEPTH = BY_DEPTH_;
    static constexpr unsigned EACH = 4;
    Rows rows;
    const void* data;
    uint32_t dtype, stride, head_dim;

    __device__ __forceinline__ void load(uint32_t row, uint32_t first, float (&v)[4]) const {
        const bool there = row < rows.rows && first < head_dim;
        load4(v, data, dtype, there ? rows.line(row, stride, head_dim) + first : 0, there ? head_dim - first : 0);
    }
};
// Keys or values first..end of a sequence; others are not looked at.
template <bool BY_DEPTH_> struct KeyLines {
    static constexpr bool BY_DEPTH = BY_DEPTH_;
    static constexpr unsigned EACH = 4;
    Keys keys;
    const void* data;
    uint32_t dtype, first_key, end, head_dim;

    __device__ __forceinline__ void load(uint32_t key, uint32_t first, float (&v)[4]) const {
        const bool there = first_key <= key && key < end && first < head_dim;
        load4(v, data, dtype, there ? keys.offset(keys.block(key), key, head_dim) + first : 0,
              there ? head_dim - first : 0);
    }
};
// A tile of shared memory.
template <bool BY_DEPTH_> struct TileLines {
    static constexpr bool BY_DEPTH = BY_DEPTH_;
    static constexpr unsigned EACH = 4;
    const float* tile;

    __device__ __forceinline__ void load(uint32_t line, uint32_t first, float (&v)[4]) const {
        load4(v, tile, F32, line * PITCH + first, 4);
    }
};

// Scores as exponents of 2, and their slopes.
struct Scores {
    const AttentionArgs& a;
    Exponent exponent;

    __device__ explicit Scores(const AttentionArgs& a) : a(a), exponent(a) {}
    __device__ float of(float product) const {
        return exponent.outer * (a.soft_cap > 0.f ? exponent.capped_exactly(product) : product);
    }
    // Of the score whose exponent this is, with respect to the product.
    __device__ float slope(float e) const {
        const float bend = a.soft_cap > 0.f ? e / exponent.outer : 0.f;
        return a.scale * (1.f - bend * bend);
    }
};

template <typename P> struct Shared {
    typename P::Tiles tiles;
    __align__(16) float scores[SIDE * PITCH];
    float logs[SIDE], deltas[SIDE], tops[SIDE], sums[SIDE];
};

// Grid (tiles * kv_heads, head_dim / (64 N)), see `QueryTile`.
template <typename P, unsigned N> __device__ __forceinline__ void backward_q(const AttentionBackwardArgs& b) {
    __shared__ Shared<P> shared;
    constexpr unsigned WARPS = P::THREADS / WARP;
    const AttentionArgs& a = b.forward;
    const uint32_t group = a.heads / a.kv_heads, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    QueryTile tile;
    if (!tile.find<SIDE>(a, group)) return;
    const Keys keys(a, tile.sequence, tile.kv_head);
    const Rows rows{tile.token, group, tile.kv_head, tile.row + tile.rows};
    const uint32_t width = a.heads * a.head_dim, window = window_of(a);
    const uint32_t first = first_key(a, tile.at + tile.row / group);
    const uint32_t end = tile.at + (tile.row + tile.rows - 1) / group + 1;
    const RowLines<false> q{rows, a.q, a.q_dtype, a.q_stride, a.head_dim};
    const RowLines<false> dout{rows, b.dout, F32, width, a.head_dim};
    const KeyLines<false> k{keys, a.keys, a.kv_dtype, first, end, a.head_dim};
    const KeyLines<false> v{keys, a.values, a.kv_dtype, first, end, a.head_dim};
    const Scores scores(a);
    // Keys after the query are at distances near 2^32.
    const auto seen = [&](unsigned m, uint32_t key) {
        return m < tile.rows && tile.at + (tile.row + m) / group - key < window;
    };

    for (unsigned m = threadIdx.x; m < SIDE; m += P::THREADS)
        shared.tops[m] = -FLT_MAX, shared.sums[m] = shared.deltas[m] = 0.f;
    const uint32_t start = first / SIDE * SIDE;
#pragma unroll 1
    for (uint32_t key = start; key < end; key += SIDE) {
        P s;
        s.clear();
        s.add(shared.tiles, q, tile.row, k, key, a.head_dim);
        s.each([&](unsigned m, unsigned n, float x, float y) {
            store_pair(&shared.scores[m * PITCH + n], seen(m, key + n) ? scores.of(x) : -INFINITY,
                       seen(m, key + n + 1) ? scores.of(y) : -INFINITY);
        });
        __syncthreads();
        for (unsigned m = warp; m < SIDE; m += WARPS) {
            float* row = &shared.scores[m * PITCH + lane];
            const float x = row[0], y = row[WARP], before = shared.tops[m], top = fmaxf(before, warp_max(fmaxf(x, y)));
            row[0] = exp2f(x - top), row[WARP] = exp2f(y - top);
            const float sum = warp_sum(row[0] + row[WARP]), shrink = exp2f(before - top);
            __syncwarp();
            if (lane > 0) continue;
            shared.tops[m] = top, shared.sums[m] = shared.sums[m] * shrink + sum, shared.deltas[m] *= shrink;
        }
        P dp;
        dp.clear();
        dp.add(shared.tiles, dout, tile.row, v, key, a.head_dim);
        dp.each([&](unsigned m, unsigned n, float x, float y) {
            float* pair = &shared.scores[m * PITCH + n];
            const float2 before = *reinterpret_cast<const float2*>(pair);
            store_pair(pair, before.x * x, before.y * y);
        });
        __syncthreads();
        for (unsigned m = warp; m < SIDE; m += WARPS) {
            const float* row = &shared.scores[m * PITCH + lane];
            const float sum = warp_sum(row[0] + row[WARP]);
            if (lane == 0) shared.deltas[m] += sum;
        }
    }
    __syncthreads();
    for (unsigned m = threadIdx.x; m < SIDE; m += P::THREADS) {
        if (m >= tile.rows) continue;
        shared.logs[m] = shared.tops[m] + log2f(shared.sums[m]);
        shared.deltas[m] /= shared.sums[m];
        if (blockIdx.y > 0) continue;
        const size_t at = rows.line(tile.row + m, a.heads, 1);
        b.logs[at] = shared.logs[m], b.deltas[at] = shared.deltas[m];
    }
    const KeyLines<true> k_depth{keys, a.keys, a.kv_dtype, first, end, a.head_dim};
    const uint32_t column = blockIdx.y * SIDE * N;
    P dq[N];
#pragma unroll
    for (unsigned i = 0; i < N; ++i) dq[i].clear();
#pragma unroll 1
    for (uint32_t key = start; key < end; key += SIDE) {
        P s;
        s.clear();
        s.add(shared.tiles, q, tile.row, k, key, a.head_dim);
        // Each thread leaves the scores where it will look for them.
        s.each([&](unsigned m, unsigned n, float x, float y) {
            store_pair(&shared.scores[m * PITCH + n], x, y);
        });
        P dp;
        dp.clear();
        dp.add(shared.tiles, dout, tile.row, v, key, a.head_dim);
        const auto ds = [&](unsigned m, uint32_t key, float s, float dp) {
            if (!seen(m, key)) return 0.f;
            const float e = scores.of(s);
            return exp2f(e - shared.logs[m]) * (dp - shared.deltas[m]) * scores.slope(e);
        };
        dp.each([&](unsigned m, unsigned n, float x, float y) {
            float* pair = &shared.scores[m * PITCH + n];
            const float2 before = *reinterpret_cast<const float2*>(pair);
            store_pair(pair, ds(m, key + n, before.x, x), ds(m, key + n + 1, before.y, y));
        });
#pragma unroll
        for (unsigned i = 0; i < N; ++i)
            dq[i].add(shared.tiles, TileLines<false>{shared.scores}, 0, Shifted<KeyLines<true>>{k_depth, key},
                      column + i * SIDE, SIDE);
    }
#pragma unroll
    for (unsigned i = 0; i < N; ++i)
        dq[i].each([&](unsigned m, unsigned n, float x, float y) {
            if (m < tile.rows)
                put2(b.dq + rows.line(tile.row + m, width, a.head_dim), column + i * SIDE + n, a.head_dim, x, y, false);
        });
}

// Grid (keys / SIDE, kv_heads * head_dim / (64 N), sequences).
template <typename P, unsigned N> __device__ __forceinline__ void backward_kv(const AttentionBackwardArgs& b) {
    __shared__ Shared<P> shared;
    const AttentionArgs& a = b.forward;
    const uint32_t group = a.heads / a.kv_heads, sequence = blockIdx.z;
    const uint32_t kv_head = blockIdx.y % a.kv_heads, column = blockIdx.y / a.kv_heads * SIDE * N;
    const uint32_t key = blockIdx.x * SIDE, context = a.context[sequence];
    const uint32_t token = a.cu_q[sequence], tokens = a.cu_q[sequence + 1] - token;
    if (key >= context) return;
    const uint32_t at = context - tokens, end = min(key + SIDE, context), window = window_of(a);
    // Tokens that see a key of the tile.
    const uint32_t first_token = key > at ? key - at : 0;
    const uint32_t end_token = end - 1 + window > at ? min(tokens, end - 1 + window - at) : 0;
    if (first_token >= end_token) return;
    const Keys keys(a, sequence, kv_head);
    const Rows rows{token, group, kv_head, end_token * group};
    const uint32_t width = a.heads * a.head_dim;
    const RowLines<false> q{rows, a.q, a.q_dtype, a.q_stride, a.head_dim};
    const RowLines<false> dout{rows, b.dout, F32, width, a.head_dim};
    const KeyLines<false> k{keys, a.keys, a.kv_dtype, key, end, a.head_dim};
    const KeyLines<false> v{keys, a.values, a.kv_dtype, key, end, a.head_dim};
    const Scores scores(a);
    P dk[N], dv[N];
#pragma unroll
    for (unsigned i = 0; i < N; ++i) dk[i].clear(), dv[i].clear();
#pragma unroll 1
    for (uint32_t row = first_token * group; row < rows.rows; row += SIDE) {
        const auto seen = [&](unsigned m, uint32_t key) {
            return row + m < rows.rows && key < end && at + (row + m) / group - key < window;
        };
        __syncthreads();
        for (unsigned m = threadIdx.x; m < SIDE; m += P::THREADS) {
            const bool there = row + m < rows.rows;
            const size_t of = there ? rows.line(row + m, a.heads, 1) : 0;
            shared.logs[m] = there ? b.logs[of] : 0.f, shared.deltas[m] = there ? b.deltas[of] : 0.f;
        }
        {
            P s;
            s.clear();
            s.add(shared.tiles, q, row, k, key, a.head_dim);
            const auto p = [&](unsigned m, uint32_t key, float s) {
                return seen(m, key) ? exp2f(scores.of(s) - shared.logs[m]) : 0.f;
            };
            s.each([&](unsigned m, unsigned n, float x, float y) {
                store_pair(&shared.scores[m * PITCH + n], p(m, key + n, x), p(m, key + n + 1, y));
            });
        }
        const TileLines<true> tile{shared.scores};
#pragma unroll
        for (unsigned i = 0; i < N; ++i) {
            const RowLines<true> lines{rows, b.dout, F32, width, a.head_dim};
            dv[i].add(shared.tiles, tile, 0, Shifted<RowLines<true>>{lines, row}, column + i * SIDE, SIDE);
        }
        {
            P dp;
            dp.clear();
            dp.add(shared.tiles, dout, row, v, key, a.head_dim);
            // p is small where its exponent cannot be told from it.
            const auto ds = [&](unsigned m, float p, float dp) {
                return p > 0.f ? p * (dp - shared.deltas[m]) * scores.slope(log2f(p) + shared.logs[m]) : 0.f;
            };
            dp.each([&](unsigned m, unsigned n, float x, float y) {
                float* pair = &shared.scores[m * PITCH + n];
                const float2 before = *reinterpret_cast<const float2*>(pair);
                store_pair(pair, ds(m, before.x, x), ds(m, before.y, y));
            });
        }
#pragma unroll
        for (unsigned i = 0; i < N; ++i) {
            const RowLines<true> lines{rows, a.q, a.q_dtype, a.q_stride, a.head_dim};
            dk[i].add(shared.tiles, tile, 0, Shifted<RowLines<true>>{lines, row}, column + i * SIDE, SIDE);
        }
    }
#pragma unroll
    for (unsigned i = 0; i < N; ++i) {
        const auto put = [&](float* pages) {
            return [&, pages](unsigned m, unsigned n, float x, float y) {
                if (key + m >= end) return;
                put2(pages + keys.offset(keys.block(key + m), key + m, a.head_dim), column + i * SIDE + n, a.head_dim,
                     x, y, true);
            };
        };
        dk[i].each(put(b.dkeys));
        dv[i].each(put(b.dvalues));
    }
}

#define KERNELS(NAME, P, N)                                                                                           \
    extern "C" __global__ void __launch_bounds__(P::THREADS, 1)                                                       \
        attention_backward_q_##NAME(const __grid_constant__ AttentionBackwardArgs a) {                                \
        backward_q<P, N>(a);                                                                                          \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(P::THREADS, 1)                                                       \
        attention_backward_kv_##NAME(const __grid_constant__ AttentionBackwardArgs a) {                               \
        backward_kv<P, N>(a);                                                                                         \
    }
// Names say the columns of a block.
KERNELS(64_bf16, ProductBf16, 1)
KERNELS(128_bf16, ProductBf16, 2)
KERNELS(64_f32, ProductF32, 1)
KERNELS(128_f32, ProductF32, 2)
