// Attention of any number of new tokens of each sequence, over pages: out = softmax(scale * Q K^T + mask) V, causal.
// bf16 on tensor cores; see attention.cuh for rows, tiles and why bits depend on neither.
//
// Grid (tiles, kv_heads), tiles = tokens * group / ROWS + sequences: see QueryTile. K and V have one buffer each, and
// each is filled while the other is used: V of a tile during Q K^T, K of the next during softmax and P V.
//
// It must move q and out once, and a tile of rows the keys and values it sees once; 4 * head_dim operations a row and
// key.
#include "attention.cuh"
#include "attention_plain.cuh"

constexpr uint32_t WARPS = 4;

// Keys of a tile.
constexpr uint32_t tile_keys(int d) { return d <= 128 ? 64 : 32; }

template <int D, int M> struct Layout {
    static constexpr uint32_t KEYS = tile_keys(D), ROWS = WARPS * 16 * M;
    // Where K, V and Q lie in shared memory. Results take the place of Q at the end.
    static constexpr uint32_t K = 0, V = K + KEYS * D * 2, Q = V + KEYS * D * 2;
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

template <int D, int M> struct Warp {
    using L = Layout<D, M>;
    Running<D, M> running;
    float s[M][L::KEYS / 8][4];

    template <bool EDGE>
    __device__ void scores(const TileLane<D>& queries, const TileLane<D>& keys, uint32_t from, uint32_t to) {
        const auto query = [&](int m, int k, uint32_t(&fragment)[4]) {
            ldmatrix4(fragment, queries.at(m * 16, k * 16));
        };
        running.template products<L::KEYS, EDGE>(s, query, keys, from, to);
    }

    // Soft cap, mask (of a tile that begins at `start`), softmax, product with the values.
    template <bool EDGE>
    __device__ void attend(const Exponent& exponent, const Sight<M>& sight, uint32_t window, uint32_t start,
                           const TileLane<D>& values, uint32_t from, uint32_t to) {
        if (exponent.inner > 0.f) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < L::KEYS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) s[m][n][i] = exponent.capped(s[m][n][i]);
        }
        if (EDGE) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < L::KEYS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t key = start + n * 8 + threadIdx.x % 4 * 2 + i % 2;
                        // Keys after the query are at distances near 2^32.
                        if (sight.own[m][i / 2] - key >= window) s[m][n][i] = -INFINITY;
                    }
        }
        running.template softmax<L::KEYS>(s, exponent.outer);
        running.template weigh<L::KEYS, EDGE>(s, values, from, to);
    }
};

template <int D, int M> __device__ __forceinline__ void prefill(const AttentionArgs& a) {
    using L = Layout<D, M>;
    constexpr uint32_t KEYS = L::KEYS, CHUNKS = D / 8, SHARE = KEYS / WARPS;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t buffers = shared_address(shared);
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint32_t group = a.heads / a.kv_heads, kv_head = blockIdx.y;

    QueryTile tile;
    if (!tile.find<L::ROWS>(a, group)) return;
    const Keys keys(a, tile.sequence, kv_head);
    const bf16 *k_pages = static_cast<const bf16*>(a.keys), *v_pages = static_cast<const bf16*>(a.values);

    // What any row of the tile sees.
    const uint32_t first = first_key(a, tile.at + tile.row / group);
    const uint32_t end = tile.at + (tile.row + tile.rows - 1) / group + 1;
    // Each warp loads its share of a tile; it looks its block up a tile ahead.
    uint32_t start = first / KEYS * KEYS;
    uint32_t block = block_of<SHARE>(keys, start + warp * SHARE, first, end), next;
    const auto load = [&](const bf16* pages, uint32_t block, uint32_t start, uint32_t buffer) {
        load_rows<D, SHARE>(pages, keys, block, start + warp * SHARE, first, end, buffers + buffer, warp * SHARE);
        cp_async_commit();
    };

    const bf16* q = static_cast<const bf16*>(a.q);
    const uint32_t mine = warp * 16 * M;
#pragma unroll
    for (uint32_t i = 0; i < M * 16 * CHUNKS / WARP; ++i) {
        const uint32_t index = i * WARP + lane, r = mine + index / CHUNKS, chunk = index % CHUNKS;
        const uint32_t row = tile.row + r, token = row / group;
        const bf16* from = q;
        if (r < tile.rows)
            from += size_t(tile.token + token) * a.q_stride + (kv_head * group + row - token * group) * D + chunk * 8;
        cp_async16(buffers + L::Q + tile_offset<D>(r, chunk), from, r < tile.rows ? 16 : 0);
    }
    cp_async_commit();
    load(k_pages, block, start, L::K);

    Warp<D, M> w;
    w.running.clear();
    const TileLane<D> q_lane = left_lane<D>(buffers + L::Q + mine * D * 2);
    const TileLane<D> k_lane = keys_lane<D>(buffers + L::K), v_lane = values_lane<D>(buffers + L::V);
    const Exponent exponent(a);
    const Sight<M> sight(tile, tile.row + mine, group);
    const uint32_t window = window_of(a);
    for (; start < end; start += KEYS, block = next) {
        // The same for the whole warp: keys of the tile that one of its rows sees, and whether all rows see all of it.
        const uint32_t from = max(first_key(a, sight.low), start) - start;
        const uint32_t to = min(sight.high + 1, start + KEYS) - start;
        const bool seen = mine < tile.rows && start <= sight.high && from < KEYS;
        const bool edge = start < first_key(a, sight.high) || start + KEYS - 1 > sight.low;

        cp_async_wait<0>();
        __syncthreads();  // K (and Q) is there, and nobody reads V any more.
        load(v_pages, block, start, L::V);
        next = block_of<SHARE>(keys, start + KEYS + warp * SHARE, first, end);
        if (seen && edge) w.template scores<true>(q_lane, k_lane, from, to);
        if (seen && !edge) w.template scores<false>(q_lane, k_lane, from, to);

        cp_async_wait<0>();
        __syncthreads();  // V is there, and nobody reads K any more.
        if (start + KEYS < end) load(k_pages, next, start + KEYS, L::K);
        if (seen && edge) w.template attend<true>(exponent, sight, window, start, v_lane, from, to);
        if (seen && !edge) w.template attend<false>(exponent, sight, window, start, v_lane, from, to);
    }

    // Results go through shared memory, each warp's in place of its queries, to be written in whole sectors.
    __syncwarp();
    unsigned char* staged = shared + L::Q;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float scale = 1.f / w.running.total(m, h);
            const uint32_t r = mine + m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                // + 0 so that no sum is -0 for one way of tiling and +0 for another.
                const float* pair = &w.running.out[m][n][2 * h];
                *reinterpret_cast<uint32_t*>(staged + tile_offset<D>(r, n) + lane % 4 * 4) =
                    pack_bf16(pair[0] * scale + 0.f, pair[1] * scale + 0.f);
            }
        }
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < M * 16 * CHUNKS / WARP; ++i) {
        const uint32_t index = i * WARP + lane, r = mine + index / CHUNKS, chunk = index % CHUNKS;
        if (r >= tile.rows) continue;
        const uint32_t row = tile.row + r, token = row / group;
        bf16* to = static_cast<bf16*>(a.out) + (size_t(tile.token + token) * a.heads + kv_head * group + row - token * group) * D;
        *reinterpret_cast<uint4*>(to + chunk * 8) = *reinterpret_cast<const uint4*>(staged + tile_offset<D>(r, chunk));
    }
}

#define KERNEL(D, BLOCKS)                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS)                                                 \
        attention_prefill_##D##_bf16(const __grid_constant__ AttentionArgs a) {                                       \
        prefill<D, 1>(a);                                                                                             \
    }
KERNEL(16, 4)
KERNEL(32, 4)
KERNEL(64, 4)
KERNEL(96, 3)
KERNEL(128, 3)
KERNEL(256, 2)

// Without tensor cores: each warp 8 rows, from their first key to their last.
template <typename Q, typename T, int SLOTS> __device__ __forceinline__ void prefill_plain(const AttentionArgs& a) {
    const uint32_t group = a.heads / a.kv_heads, kv_head = blockIdx.y, lane = threadIdx.x % WARP;
    QueryTile tile;
    if (!tile.find<WARPS * PLAIN_ROWS>(a, group)) return;
    const uint32_t row = tile.row + threadIdx.x / WARP * PLAIN_ROWS, rows_end = tile.row + tile.rows;
    if (row >= rows_end) return;
    const Keys keys(a, tile.sequence, kv_head);
    const Exponent exponent(a);
    const auto at = [&](uint32_t r) { return tile.at + min(r, rows_end - 1) / group; };
    // Where row `r` begins in a tensor of `stride` elements a token.
    const auto offset = [&](uint32_t r, uint32_t stride) {
        return size_t(tile.token + r / group) * stride + (kv_head * group + r % group) * a.head_dim;
    };

    PlainRows<Q, T, SLOTS> rows;
    rows.clear();
#pragma unroll
    for (uint32_t r = 0; r < PLAIN_ROWS; ++r)
        if (row + r < rows_end)
            rows.load(rows.q[r], static_cast<const Q*>(a.q) + offset(row + r, a.q_stride), a.head_dim);
    const uint32_t first = first_key(a, at(row)), end = at(row + PLAIN_ROWS - 1) + 1, own = at(row + lane / PLAIN_KEYS);
    for (uint32_t key = first / PLAIN_KEYS * PLAIN_KEYS; key < end; key += PLAIN_KEYS)
        rows.attend(a, exponent, keys, key, first, end, own, window_of(a));

    const float scale = 1.f / rows.total();
#pragma unroll
    for (uint32_t r = 0; r < PLAIN_ROWS; ++r) {
        const float row_scale = __shfl_sync(FULL_MASK, scale, r * PLAIN_KEYS);
        if (row + r >= rows_end) continue;
        Q* to = static_cast<Q*>(a.out) + offset(row + r, a.heads * a.head_dim);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const uint32_t d = i * WARP + lane;
            if (d < a.head_dim) to[d] = from_float<Q>(rows.out[r][i] * row_scale + 0.f);
        }
    }
}

// Names say the largest head_dim and the types of queries and pages.
#define PLAIN(D, Q_NAME, Q, T_NAME, T)                                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                                         \
        attention_prefill_plain_##D##_##Q_NAME##_##T_NAME(const __grid_constant__ AttentionArgs a) {                  \
        prefill_plain<Q, T, D / WARP>(a);                                                                             \
    }
#define PLAINS(D)                                                                                                     \
    PLAIN(D, f32, float, f32, float)                                                                                  \
    PLAIN(D, f32, float, bf16, bf16)                                                                                  \
    PLAIN(D, bf16, bf16, bf16, bf16)                                                                                  \
    PLAIN(D, bf16, bf16, f32, float)
PLAINS(128)
PLAINS(256)
