// Attention of any number of new tokens of each sequence, over pages: out = softmax(scale * Q K^T + mask) V, causal.
// bf16 on tensor cores, and any type without; see attention.cuh for rows, tiles and why bits depend on neither.
//
// Grid kv_heads * (tokens * group / ROWS + sequences): see QueryTile. Keys and values come in tiles, the
// next one while the last is worked on.
//
// It must move q and out once, and for each tile of rows the keys and values it sees; 4 * head_dim operations a row and
// key.
#include "attention.cuh"
#include "attention_plain.cuh"

constexpr uint32_t WARPS = 4;

// M: sixteens of rows a warp. With two, a key or value that is read from shared memory serves twice as many products;
// with one there are twice as many blocks. Twin of `Kernels` in backend/cuda/attention.rs.
template <int D, int M> struct Layout {
    static constexpr uint32_t KEYS = D <= 64 ? 64 : 32, ROWS = WARPS * 16 * M;
    // In shared memory: the queries, whose place the results take in the end; then keys and values of two tiles.
    static constexpr uint32_t TILE = KEYS * D * 2, Q = 0, BUFFERS = ROWS * D * 2;
};

// Which keys a warp's rows see: each up to its own, at a distance below the window.
template <int M> struct Sight {
    uint32_t own[M][2];  // of the lane's rows
    uint32_t low, high;  // of the warp's first and last row

    __device__ Sight(const QueryTile& tile, uint32_t row, uint32_t group) {
        const uint32_t end = tile.row + tile.rows - 1;
        const auto at = [&](uint32_t r) { return tile.at + min(r, end) / group; };
        low = at(row), high = at(row + M * 16 - 1);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) own[m][h] = at(row + m * 16 + h * 8 + threadIdx.x % WARP / 4);
    }
};

// Takes in the tile of keys and values that begins at `start`. With EDGE some row does not see all of it; none sees a
// key outside `from..to` of the tile.
template <bool EDGE, int D, int M>
__device__ __forceinline__ void attend(Running<D, M>& running, const Exponent& exponent, const Sight<M>& sight,
                                       uint32_t window, uint32_t start, uint32_t from, uint32_t to,
                                       const TileLane<D>& queries, const TileLane<D>& keys,
                                       const TileLane<D>& values) {
    constexpr uint32_t KEYS = Layout<D, M>::KEYS;
    float s[M][KEYS / 8][4];
    const auto query = [&](int m, int k, uint32_t(&fragment)[4]) { ldmatrix4(fragment, queries.at(m * 16, k * 16)); };
    running.template products<KEYS, EDGE>(s, query, keys, from, to);
    if (exponent.inner > 0.f) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = exponent.capped(s[m][n][i]);
    }
    if (EDGE) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t key = start + n * 8 + threadIdx.x % 4 * 2 + i % 2;
                    // Keys after the query are at distances near 2^32.
                    if (sight.own[m][i / 2] - key >= window) s[m][n][i] = -INFINITY;
                }
    }
    running.template softmax<KEYS>(s, exponent.outer);
    running.template weigh<KEYS, EDGE>(s, values, from, to);
}

template <int D, int M> __device__ __forceinline__ void prefill(const AttentionArgs& a) {
    using L = Layout<D, M>;
    constexpr uint32_t KEYS = L::KEYS, CHUNKS = D / 8, SHARE = KEYS / WARPS;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t memory = shared_address(shared);
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, mine = warp * 16 * M;
    const uint32_t group = a.heads / a.kv_heads;

    QueryTile tile;
    if (!tile.find<L::ROWS>(a, group)) return;
    const uint32_t kv_head = tile.kv_head;
    const Keys keys(a, tile.sequence, kv_head);

    // What any row of the tile sees.
    const uint32_t first = first_key(a, tile.at + tile.row / group);
    const uint32_t end = tile.at + (tile.row + tile.rows - 1) / group + 1;
    // Each warp loads its share of a tile; it looks its block up a tile ahead.
    const auto block_at = [&](uint32_t start) { return block_of<SHARE>(keys, start + warp * SHARE, first, end); };
    const auto load = [&](uint32_t block, uint32_t start, uint32_t buffer) {
        const uint32_t key = start + warp * SHARE, to = memory + L::BUFFERS + buffer * 2 * L::TILE;
        load_rows<D, SHARE>(a, keys, block, key, first, end, to, to + L::TILE, warp * SHARE);
        cp_async_commit();
    };
    uint32_t start = first / KEYS * KEYS;
    uint32_t block = block_at(start);

    // A row's token and head.
    const auto token_of = [&](uint32_t r) { return tile.token + (tile.row + r) / group; };
    const auto head_of = [&](uint32_t r) { return kv_head * group + (tile.row + r) % group; };
    const bf16* q = static_cast<const bf16*>(a.q);
#pragma unroll 1
    for (uint32_t index = lane; index < M * 16 * CHUNKS; index += WARP) {
        const uint32_t r = mine + index / CHUNKS, chunk = index % CHUNKS;
        const bool there = r < tile.rows;
        const bf16* from = there ? q + size_t(token_of(r)) * a.q_stride + head_of(r) * D + chunk * 8 : q;
        cp_async16(memory + L::Q + tile_offset<D>(r, chunk), from, there ? 16 : 0);
    }
    load(block, start, 0);
    block = block_at(start + KEYS);

    Running<D, M> running;
    running.clear();
    const Exponent exponent(a);
    const Sight<M> sight(tile, tile.row + mine, group);
    const uint32_t window = window_of(a);
    const TileLane<D> queries = left_lane<D>(memory + L::Q + mine * D * 2);
#pragma unroll 1
    for (uint32_t buffer = 0; start < end; start += KEYS, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // The tile is there, and nobody reads the other buffer any more.
        if (start + KEYS < end) {
            load(block, start + KEYS, buffer ^ 1);
            block = block_at(start + 2 * KEYS);
        }
        // The same for the whole warp.
        const uint32_t from = max(first_key(a, sight.low), start) - start;
        const uint32_t to = min(sight.high + 1, start + KEYS) - start;
        if (mine >= tile.rows || start > sight.high || from >= KEYS) continue;
        const uint32_t k = memory + L::BUFFERS + buffer * 2 * L::TILE;
        const TileLane<D> k_lane = keys_lane<D>(k), v_lane = values_lane<D>(k + L::TILE);
        if (start < first_key(a, sight.high) || start + KEYS - 1 > sight.low)
            attend<true>(running, exponent, sight, window, start, from, to, queries, k_lane, v_lane);
        else
            attend<false>(running, exponent, sight, window, start, from, to, queries, k_lane, v_lane);
    }

    // Results go through shared memory, each warp's in place of its queries, to be written in whole sectors.
    __syncwarp();
    unsigned char* staged = shared + L::Q;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float scale = 1.f / running.total(m, h);
            const uint32_t r = mine + m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                // + 0 so that no sum is -0 for one way of tiling and +0 for another.
                const float* pair = &running.out[m][n][2 * h];
                *reinterpret_cast<uint32_t*>(staged + tile_offset<D>(r, n) + lane % 4 * 4) =
                    pack_bf16(pair[0] * scale + 0.f, pair[1] * scale + 0.f);
            }
        }
    __syncwarp();
#pragma unroll 1
    for (uint32_t index = lane; index < M * 16 * CHUNKS; index += WARP) {
        const uint32_t r = mine + index / CHUNKS, chunk = index % CHUNKS;
        if (r >= tile.rows) break;
        bf16* to = static_cast<bf16*>(a.out) + (size_t(token_of(r)) * a.heads + head_of(r)) * D;
        *reinterpret_cast<uint4*>(to + chunk * 8) = *reinterpret_cast<const uint4*>(staged + tile_offset<D>(r, chunk));
    }
}

// Names say head_dim; `long` is for prompts that fill a card with half as many blocks.
#define KERNEL(NAME, D, M, BLOCKS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS) NAME(const __grid_constant__ AttentionArgs a) { \
        prefill<D, M>(a);                                                                                             \
    }
KERNEL(attention_prefill_16_bf16, 16, 1, 4)
KERNEL(attention_prefill_32_bf16, 32, 1, 4)
KERNEL(attention_prefill_64_bf16, 64, 1, 4)
KERNEL(attention_prefill_96_bf16, 96, 1, 3)
KERNEL(attention_prefill_128_bf16, 128, 1, 3)
KERNEL(attention_prefill_256_bf16, 256, 1, 2)
KERNEL(attention_prefill_64_long_bf16, 64, 2, 2)
KERNEL(attention_prefill_96_long_bf16, 96, 2, 2)
KERNEL(attention_prefill_128_long_bf16, 128, 2, 2)

// Without tensor cores: each warp 8 rows, from their first key to their last.
template <int SLOTS> __device__ __forceinline__ void prefill_plain(const AttentionArgs& a) {
    const uint32_t group = a.heads / a.kv_heads, lane = threadIdx.x % WARP;
    QueryTile tile;
    if (!tile.find<WARPS * PLAIN_ROWS>(a, group)) return;
    const uint32_t kv_head = tile.kv_head;
    const uint32_t row = tile.row + threadIdx.x / WARP * PLAIN_ROWS, rows_end = tile.row + tile.rows;
    if (row >= rows_end) return;
    const Keys keys(a, tile.sequence, kv_head);
    const Exponent exponent(a);
    const auto at = [&](uint32_t r) { return tile.at + min(r, rows_end - 1) / group; };
    // Where row `r` begins in a tensor of `stride` elements a token.
    const auto offset = [&](uint32_t r, uint32_t stride) {
        return size_t(tile.token + r / group) * stride + (kv_head * group + r % group) * a.head_dim;
    };

    PlainRows<SLOTS> rows;
    rows.clear();
#pragma unroll
    for (uint32_t r = 0; r < PLAIN_ROWS; ++r)
        if (row + r < rows_end)
            rows.load(rows.q[r], a.q, a.q_dtype, offset(row + r, a.q_stride), true, a.head_dim);
    const uint32_t first = first_key(a, at(row)), end = at(row + PLAIN_ROWS - 1) + 1, own = at(row + lane / PLAIN_KEYS);
    for (uint32_t key = first / PLAIN_KEYS * PLAIN_KEYS; key < end; key += PLAIN_KEYS)
        rows.attend(a, exponent, keys, key, first, end, own, window_of(a));

    const float scale = 1.f / rows.total();
#pragma unroll
    for (uint32_t r = 0; r < PLAIN_ROWS; ++r) {
        const float row_scale = __shfl_sync(FULL_MASK, scale, r * PLAIN_KEYS);
        if (row + r < rows_end)
            rows.store(rows.out[r], row_scale, a.out, a.q_dtype, offset(row + r, a.heads * a.head_dim), a.head_dim);
    }
}

// Names say the largest head_dim.
#define PLAIN(D)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, 2)                                                      \
        attention_prefill_plain_##D(const __grid_constant__ AttentionArgs a) {                                        \
        prefill_plain<D / WARP>(a);                                                                                   \
    }
PLAIN(128)
PLAIN(256)
