// What prefill and decode attention share: their arguments, a sequence's keys in pages, swizzled tiles in shared
// memory, and the step that takes rows of queries over a tile of keys on tensor cores (FlashAttention-2,
// arXiv 2307.08691, algorithm 1).
//
// A *row* is one head's query of one new token. The rows of all heads that share a kv head stack up, token by token:
// row r of a sequence is token r / group, head kv_head * group + r % group, so that its keys are read once for all.
//
// Bits: a row's keys are cut at multiples of a fixed number from the sequence's first key on. A tile that a row does
// not see leaves it as it is, exactly: its maximum stays, so sums are multiplied by exp2(0) = 1 and get 0 added. What
// other rows share the tile, and which tiles are skipped, therefore changes nothing.
#pragma once
#include "ptx.cuh"
#include <cfloat>

// Twin of `backend::cuda::attention::AttentionArgs`.
struct AttentionArgs {
    const void* q;                 // [tokens, q_stride]; the first heads * head_dim of a row are used
    const void* keys;              // [blocks, kv_heads, block_size, head_dim]
    const void* values;            // the same
    const uint32_t* cu_q;          // [sequences + 1]: rows of q of each sequence; prefill only
    const uint32_t* context;       // [sequences]: keys, the new tokens' own included
    const uint32_t* block_tables;  // [sequences, max_blocks]
    void* out;                     // [tokens, heads * head_dim]
    float* partials;               // decode only: see attention_decode.cu
    uint32_t sequences, heads, kv_heads, head_dim, q_stride, max_blocks;
    uint32_t block_size;  // a power of two
    uint32_t splits;      // decode only: the most that any context has
    uint32_t window;      // a query sees keys at distance < window; 0 = all
    float scale;          // > 0
    float soft_cap;       // s = cap * tanh(s / cap); 0 = none
    // F32 or BF16: of q and out, of keys and values. Kernels whose names say bf16 take them as that.
    uint32_t q_dtype, kv_dtype;
};

// What a product of query and key becomes: outer * x as an exponent of 2, or with a soft cap outer * tanh(inner * x).
// `outer` comes last, in the rounding of the difference to the maximum: scores of some hundreds would lose the digits
// that matter if they were rounded before.
struct Exponent {
    float inner, outer;

    __device__ explicit Exponent(const AttentionArgs& a) {
        constexpr float LOG2_E = 1.4426950408889634f;
        inner = a.soft_cap > 0.f ? a.scale / a.soft_cap : 0.f;
        outer = (a.soft_cap > 0.f ? a.soft_cap : a.scale) * LOG2_E;
    }
    // To within 1e-7 of 1, which is what bf16 products deserve.
    __device__ float capped(float x) const {
        return 1.f - __fdividef(2.f, 1.f + exp2_approx(2.f * 1.4426950408889634f * inner * x));
    }
    __device__ float capped_exactly(float x) const { return tanhf(inner * x); }
};

__device__ __forceinline__ void store_float(void* to, uint32_t dtype, size_t i, float x) {
    if (dtype == F32)
        static_cast<float*>(to)[i] = x;
    else
        static_cast<bf16*>(to)[i] = from_float<bf16>(x);
}

// The first key that a query at key index `at` sees.
__device__ __forceinline__ uint32_t first_key(const AttentionArgs& a, uint32_t at) {
    return a.window > 0 && at + 1 > a.window ? at + 1 - a.window : 0;
}

// How far keys are seen. A key after the query is at a distance near 2^32.
__device__ __forceinline__ uint32_t window_of(const AttentionArgs& a) {
    return a.window > 0 ? min(a.window, 1u << 31) : 1u << 31;
}

// The keys of one sequence and kv head.
struct Keys {
    const uint32_t* table;
    uint32_t bits, kv_heads, kv_head;

    __device__ Keys(const AttentionArgs& a, uint32_t sequence, uint32_t kv_head)
        : table(a.block_tables + size_t(sequence) * a.max_blocks), bits(31 - __clz(a.block_size)),
          kv_heads(a.kv_heads), kv_head(kv_head) {}
    __device__ uint32_t block(uint32_t key) const { return table[key >> bits]; }
    // Where a key, or its value, begins in the pages.
    __device__ size_t offset(uint32_t block, uint32_t key, uint32_t head_dim) const {
        const uint32_t row = key & ((1u << bits) - 1);
        return ((size_t(block) * kv_heads + kv_head << bits) + row) * head_dim;
    }
};

// Some consecutive rows of a sequence, for one kv head.
struct QueryTile {
    uint32_t kv_head = 0;
    uint32_t sequence = 0;
    uint32_t token = 0;  // the sequence's first, in q
    uint32_t at = 0;     // its key index
    uint32_t row = 0, rows = 0;

    // The host knows the number of tokens but not whose they are: the grid has room for the tiles of any division into
    // sequences, at most tokens * group / ROWS + sequences, times kv_heads, and each block looks for its own. The last
    // tiles, which have the most keys, start first. False if there is none.
    template <uint32_t ROWS> __device__ bool find(const AttentionArgs& a, uint32_t group) {
        uint32_t tile = (gridDim.x - 1 - blockIdx.x) / a.kv_heads;
        kv_head = blockIdx.x % a.kv_heads;
        for (sequence = 0; sequence < a.sequences; ++sequence) {
            token = a.cu_q[sequence];
            const uint32_t tokens = a.cu_q[sequence + 1] - token;
            const uint32_t total = tokens * group, tiles = div_up(total, ROWS);
            if (tile < tiles) {
                at = a.context[sequence] - tokens;
                row = tile * ROWS;
                rows = min(ROWS, total - row);
                return true;
            }
            tile -= tiles;
        }
        return false;
    }
};

// Tiles `[rows][D]` of bf16 in shared memory, in chunks of 16 bytes. Chunk c of row r lies at c ^ swizzle(r), so that
// 8 rows of one column, as ldmatrix reads them, are in different banks.
template <int D> __device__ __forceinline__ uint32_t swizzle(uint32_t row) {
    constexpr uint32_t CHUNKS = D / 8, SPAN = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    static_assert(D % 16 == 0, "a row is an even number of chunks");
    return row / (8 / SPAN) % SPAN;
}
template <int D> __device__ __forceinline__ uint32_t tile_offset(uint32_t row, uint32_t chunk) {
    return row * (D * 2) + (chunk ^ swizzle<D>(row)) * 16;
}

// The addresses that one lane gives to ldmatrix: row `row` (< 16) of 16, the lower or upper chunk of a pair.
template <int D> struct TileLane {
    uint32_t base, flip;

    __device__ TileLane(uint32_t tile, uint32_t row, uint32_t upper)
        : base(tile + row * (D * 2)), flip((upper ^ swizzle<D>(row)) * 16) {}
    // Of 16 rows and columns from there on. `flip` is below 128: all but four addresses differ by a constant.
    __device__ uint32_t at(uint32_t row, uint32_t column) const {
        const uint32_t bytes = column * 2;
        return base + (bytes % 128 ^ flip) + (row * (D * 2) + bytes / 128 * 128);
    }
};

// Copies `ROWS` keys and values from `key` on, a multiple of ROWS, to rows `row`.. of their tiles. Those outside
// `first..end` become 0: slots not yet written may hold anything, NaN included, and their blocks may not exist.
// `block` is the one of `key`, where a block has at least ROWS slots. One warp's work; the caller commits.
template <int D, uint32_t ROWS>
__device__ __forceinline__ void load_rows(const AttentionArgs& a, const Keys& keys, uint32_t block, uint32_t key,
                                          uint32_t first, uint32_t end, uint32_t k_tile, uint32_t v_tile,
                                          uint32_t row) {
    constexpr uint32_t CHUNKS = D / 8, STEPS = ROWS * CHUNKS / WARP;
    static_assert(ROWS * CHUNKS % WARP == 0);
    const bf16 *k = static_cast<const bf16*>(a.keys), *v = static_cast<const bf16*>(a.values);
    const bool one_block = a.block_size >= ROWS;
    if (one_block && first <= key && key + ROWS <= end) {
        // Rows of a block follow each other.
        const size_t from = keys.offset(block, key, D) + threadIdx.x % WARP * 8;
#pragma unroll
        for (uint32_t i = 0; i < STEPS; ++i) {
            const uint32_t index = i * WARP + threadIdx.x % WARP;
            const uint32_t to = tile_offset<D>(row + index / CHUNKS, index % CHUNKS);
            cp_async16(k_tile + to, k + from + i * WARP * 8);
            cp_async16(v_tile + to, v + from + i * WARP * 8);
        }
        return;
    }
#pragma unroll 1
    for (uint32_t i = 0; i < STEPS; ++i) {
        const uint32_t index = i * WARP + threadIdx.x % WARP, r = index / CHUNKS, chunk = index % CHUNKS;
        const uint32_t to = tile_offset<D>(row + r, chunk);
        const bool seen = first <= key + r && key + r < end;
        size_t from = 0;
        if (seen) from = keys.offset(one_block ? block : keys.block(key + r), key + r, D) + chunk * 8;
        cp_async16(k_tile + to, k + from, seen ? 16 : 0);
        cp_async16(v_tile + to, v + from, seen ? 16 : 0);
    }
}

// The block of `key`, if any of the `ROWS` keys from there on is in `first..end`.
template <uint32_t ROWS>
__device__ __forceinline__ uint32_t block_of(const Keys& keys, uint32_t key, uint32_t first, uint32_t end) {
    return first < key + ROWS && key < end ? keys.block(max(key, first)) : 0;
}

// The running result of one warp: M times 16 rows. A lane has rows lane / 4 and lane / 4 + 8 of each 16, and of every 8
// columns 2 * (lane % 4) and the next: the accumulator of mma.m16n8k16.
template <int D, int M> struct Running {
    float out[M][D / 8][4];
    float top[M][2];  // of the exponents
    float sum[M][2];  // this lane's share

    __device__ void clear() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[m][n][i] = 0.f;
            // Finite, so that nothing minus it is NaN.
            top[m][0] = top[m][1] = -FLT_MAX;
            sum[m][0] = sum[m][1] = 0.f;
        }
    }

    // Turns scores into exponentials under the rows' new maxima, and shrinks what was summed under the old ones.
    template <int KEYS> __device__ void softmax(float (&s)[M][KEYS / 8][4], float outer) {
        float shrink[M][2];
        bool moved = false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float largest = -INFINITY;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) largest = fmaxf(largest, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 2));
                const float before = top[m][h], now = fmaxf(before, largest * outer);
                shrink[m][h] = exp2_approx(before - now);
                moved |= now > before;
                top[m][h] = now;
                float total = 0.f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int i = 2 * h; i < 2 * h + 2; ++i) {
                        s[m][n][i] = exp2_approx(fmaf(s[m][n][i], outer, -now));
                        total += s[m][n][i];
                    }
                sum[m][h] = sum[m][h] * shrink[m][h] + total;
            }
        // Maxima soon stop moving: then all factors are 1.
        if (__any_sync(FULL_MASK, moved)) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) out[m][n][i] *= shrink[m][i / 2];
        }
    }

    // s = Q K^T for the tile's keys, of which with EDGE only the sixteens that contain one of `from..to` are computed.
    // `query(m, k, fragment)` gives the left operand: 16 rows, columns 16 k..
    template <int KEYS, bool EDGE, typename Query>
    __device__ void products(float (&s)[M][KEYS / 8][4], Query query, const TileLane<D>& keys, uint32_t from,
                             uint32_t to) const {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t q[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) query(m, k, q[m]);
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                if (EDGE && (n * 16 + 15 < from || n * 16 >= to)) continue;
                uint32_t b[4];
                ldmatrix4(b, keys.at(n * 16, k * 16));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_bf16(s[m][2 * n], q[m], b[0], b[1]);
                    mma_bf16(s[m][2 * n + 1], q[m], b[2], b[3]);
                }
            }
        }
    }

    // out += P V. The accumulators of 16 keys' scores are, as bf16 pairs, the left operand.
    template <int KEYS, bool EDGE>
    __device__ void weigh(const float (&p)[M][KEYS / 8][4], const TileLane<D>& values, uint32_t from, uint32_t to) {
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            if (EDGE && (n * 16 + 15 < from || n * 16 >= to)) continue;
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = &p[m][2 * n + i / 2][i % 2 * 2];
                    a[m][i] = pack_bf16(pair[0], pair[1]);
                }
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t b[4];
                ldmatrix4_trans(b, values.at(n * 16, d * 16));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_bf16(out[m][2 * d], a[m], b[0], b[1]);
                    mma_bf16(out[m][2 * d + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // The sum of a row's exponentials, from its four lanes.
    __device__ float total(int m, int h) const {
        float x = sum[m][h];
        x += __shfl_xor_sync(FULL_MASK, x, 1);
        return x + __shfl_xor_sync(FULL_MASK, x, 2);
    }
};

// The lane's rows and chunks for the three kinds of operand.
template <int D> __device__ __forceinline__ TileLane<D> left_lane(uint32_t tile) {
    const uint32_t lane = threadIdx.x % WARP;
    return TileLane<D>(tile, lane % 16, lane / 16);
}
// Rows of the tile are columns of the operand: a key each.
template <int D> __device__ __forceinline__ TileLane<D> keys_lane(uint32_t tile) {
    const uint32_t lane = threadIdx.x % WARP;
    return TileLane<D>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
// For ldmatrix.trans: rows of the tile are rows of the operand.
template <int D> __device__ __forceinline__ TileLane<D> values_lane(uint32_t tile) { return left_lane<D>(tile); }
