// Attention of one new token of each sequence, over pages: bound by reading the keys and values, each once for all heads
// that share them.
//
// A sequence's keys are cut into splits (FlashDecoding), whose partial results `attention_combine` adds up in their
// order. How many keys a split has follows from how many the sequence has, from nothing else: not from the company, nor
// from the grid, whose `splits` is the most that a context can have. A captured launch may therefore be replayed while
// contexts grow: blocks without a split of their own leave.
//
// Grid (splits, kv_heads, sequences); groups of more than 16 heads take several blocks each, along y. It must move the
// keys and values, and of each split and head head_dim + 2 floats out and in again; 4 * head_dim operations a head and
// key.
#include "attention.cuh"
#include "attention_plain.cuh"

// Keys of the sequence that the new token sees, from a multiple of 16 on, and how they are cut.
struct Splits {
    uint32_t first, end;  // seen
    uint32_t start;       // `first` rounded down
    uint32_t length, count;

    __device__ Splits(const AttentionArgs& a, uint32_t sequence) {
        end = a.context[sequence];
        first = first_key(a, end - 1);
        start = first / 16 * 16;
        // Up to 32 splits, so that one sequence keeps a card busy, but none so short that partial results weigh.
        const uint32_t keys = end - start;
        length = 128;
        while (length < 1024 && length * 32 < keys) length *= 2;
        count = div_up(keys, length);
    }
};

// Partial results: sums of values `[sequences, splits, heads, head_dim]`, then `[sequences, heads, splits]` maxima of
// the exponents with the sums of exponentials under them.
struct Partials {
    float* sums;    // of split 0; `stride` floats on, of the next
    float2* stats;  // of split 0
    size_t stride;

    __device__ Partials(const AttentionArgs& a, uint32_t sequence, uint32_t head)
        : stride(size_t(a.heads) * a.head_dim) {
        sums = a.partials + sequence * a.splits * stride + size_t(head) * a.head_dim;
        stats = reinterpret_cast<float2*>(a.partials + a.sequences * a.splits * stride) +
                (size_t(sequence) * a.heads + head) * a.splits;
    }
};

// The block's kv head, and up to ROWS of the heads that share it.
template <uint32_t ROWS> struct GroupPart {
    uint32_t kv_head, head, heads;

    __device__ explicit GroupPart(const AttentionArgs& a) {
        const uint32_t group = a.heads / a.kv_heads, parts = div_up(group, ROWS);
        const uint32_t before = blockIdx.y % parts * ROWS;
        kv_head = blockIdx.y / parts;
        head = kv_head * group + before;
        heads = min(ROWS, group - before);
    }
};

// One warp's running result, left in shared memory to be merged with those of the block's other warps.
template <int ROWS, int WIDTH> struct Share {
    float sums[ROWS][WIDTH];
    float top[ROWS], sum[ROWS];
};

// Merges the warps' results, in their order, into the split's partial result.
template <int WARPS, int ROWS, int WIDTH>
__device__ __forceinline__ void merge(const AttentionArgs& a, const Share<ROWS, WIDTH>* shares, uint32_t sequence,
                                      uint32_t head, uint32_t rows) {
    for (uint32_t row = threadIdx.x / WARP; row < rows; row += WARPS) {
        float top = shares[0].top[row];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) top = fmaxf(top, shares[w].top[row]);
        float weight[WARPS], sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            weight[w] = exp2_approx(shares[w].top[row] - top);
            sum += weight[w] * shares[w].sum[row];
        }
        const Partials partials(a, sequence, head + row);
        float* to = partials.sums + blockIdx.x * partials.stride;
        for (uint32_t d = threadIdx.x % WARP; d < a.head_dim; d += WARP) {
            float total = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += weight[w] * shares[w].sums[row][d];
            to[d] = total;
        }
        if (threadIdx.x % WARP == 0) partials.stats[blockIdx.x] = make_float2(top, sum);
    }
}

// Tensor cores: each warp takes 16 keys at a time, in buffers of its own, all heads of the group as one operand of 16
// rows. Two pairs of buffers a warp keep 64 KiB on the way.
template <int D> struct Decode {
    static constexpr uint32_t WARPS = D <= 128 ? 4 : 2, STAGES = 2, TILE = 16 * D * 2;
    // Of the queries; then of the warps' buffers, later of their results.
    static constexpr uint32_t Q = 0, BUFFERS = TILE;
    // Rows of results end 8 floats on, so that four rows are in different banks.
    using Result = Share<16, D + 8>;
};

template <int D> __device__ __forceinline__ void decode(const AttentionArgs& a) {
    using L = Decode<D>;
    constexpr uint32_t CHUNKS = D / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t buffers = shared_address(shared);
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const GroupPart<16> part(a);
    const uint32_t sequence = blockIdx.z;
    const Splits splits(a, sequence);
    if (blockIdx.x >= splits.count) return;
    const Keys keys(a, sequence, part.kv_head);

    const uint32_t start = splits.start + blockIdx.x * splits.length;
    const uint32_t end = min(start + splits.length, splits.end);
    const auto load = [&](uint32_t key, uint32_t stage) {
        const uint32_t tile = buffers + L::BUFFERS + (warp * L::STAGES + stage) * 2 * L::TILE;
        if (key < end) {
            const uint32_t block = block_of<16>(keys, key, splits.first, end);
            load_rows<D, 16>(a, keys, block, key, splits.first, end, tile, tile + L::TILE, 0);
        }
        cp_async_commit();
    };

    const bf16* q = static_cast<const bf16*>(a.q) + size_t(sequence) * a.q_stride + size_t(part.head) * D;
    for (uint32_t i = threadIdx.x; i < 16 * CHUNKS; i += L::WARPS * WARP) {
        const uint32_t r = i / CHUNKS, chunk = i % CHUNKS;
        cp_async16(buffers + L::Q + tile_offset<D>(r, chunk), r < part.heads ? q + i * 8 : q, r < part.heads ? 16 : 0);
    }
    cp_async_commit();
    uint32_t key = start + warp * 16;
#pragma unroll
    for (uint32_t stage = 0; stage < L::STAGES; ++stage) load(key + stage * L::WARPS * 16, stage);

    cp_async_wait<L::STAGES>();
    __syncthreads();
    const TileLane<D> queries = left_lane<D>(buffers + L::Q);
    const Exponent exponent(a);
    Running<D, 1> running;
    running.clear();
    for (uint32_t stage = 0; key < end; key += L::WARPS * 16, stage = (stage + 1) % L::STAGES) {
        cp_async_wait<L::STAGES - 1>();
        __syncwarp();
        const uint32_t tile = buffers + L::BUFFERS + (warp * L::STAGES + stage) * 2 * L::TILE;
        float s[1][2][4];
        const auto query = [&](int, int k, uint32_t(&fragment)[4]) { ldmatrix4(fragment, queries.at(0, k * 16)); };
        running.template products<16, false>(s, query, keys_lane<D>(tile), 0, 16);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (exponent.inner > 0.f) s[0][n][i] = exponent.capped(s[0][n][i]);
                const uint32_t at = key + n * 8 + lane % 4 * 2 + i % 2;
                if (at < splits.first || at >= end) s[0][n][i] = -INFINITY;
            }
        running.template softmax<16>(s, exponent.outer);
        running.template weigh<16, false>(s, values_lane<D>(tile + L::TILE), 0, 16);
        __syncwarp();
        load(key + L::STAGES * L::WARPS * 16, stage);
    }

    __syncthreads();
    typename L::Result* results = reinterpret_cast<typename L::Result*>(shared + L::BUFFERS);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t row = h * 8 + lane / 4;
        const float sum = running.total(0, h);
        if (row >= part.heads) continue;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            *reinterpret_cast<float2*>(&results[warp].sums[row][n * 8 + lane % 4 * 2]) =
                make_float2(running.out[0][n][2 * h], running.out[0][n][2 * h + 1]);
        if (lane % 4 == 0) results[warp].top[row] = running.top[0][h], results[warp].sum[row] = sum;
    }
    __syncthreads();
    merge<L::WARPS>(a, results, sequence, part.head, part.heads);
}

#define KERNEL(D)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(Decode<D>::WARPS* WARP)                                              \
        attention_decode_##D##_bf16(const __grid_constant__ AttentionArgs a) {                                        \
        decode<D>(a);                                                                                                 \
    }
KERNEL(16)
KERNEL(32)
KERNEL(64)
KERNEL(96)
KERNEL(128)
KERNEL(256)

// Without tensor cores: each warp takes 4 keys at a time, up to 8 heads a block.
constexpr uint32_t PLAIN_WARPS = 4;

template <int SLOTS> __device__ __forceinline__ void decode_plain(const AttentionArgs& a) {
    __shared__ Share<PLAIN_ROWS, SLOTS * WARP> shares[PLAIN_WARPS];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const GroupPart<PLAIN_ROWS> part(a);
    const uint32_t sequence = blockIdx.z;
    const Splits splits(a, sequence);
    if (blockIdx.x >= splits.count) return;
    const Keys keys(a, sequence, part.kv_head);
    const Exponent exponent(a);

    PlainRows<SLOTS> rows;
    rows.clear();
    const size_t q = size_t(sequence) * a.q_stride + size_t(part.head) * a.head_dim;
#pragma unroll
    for (uint32_t r = 0; r < PLAIN_ROWS; ++r)
        if (r < part.heads) rows.load(rows.q[r], a.q, a.q_dtype, q + r * a.head_dim, true, a.head_dim);
    const uint32_t start = splits.start + blockIdx.x * splits.length, end = min(start + splits.length, splits.end);
    for (uint32_t key = start + warp * PLAIN_KEYS; key < end; key += PLAIN_WARPS * PLAIN_KEYS)
        rows.attend(a, exponent, keys, key, splits.first, end, splits.end - 1, window_of(a));

    const float sum = rows.total();
    if (lane % PLAIN_KEYS == 0) {
        shares[warp].top[lane / PLAIN_KEYS] = rows.top;
        shares[warp].sum[lane / PLAIN_KEYS] = sum;
    }
#pragma unroll
    for (uint32_t r = 0; r < PLAIN_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) shares[warp].sums[r][i * WARP + lane] = rows.out[r][i];
    __syncthreads();
    merge<PLAIN_WARPS>(a, shares, sequence, part.head, part.heads);
}

// Names say the largest head_dim.
#define PLAIN(D)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(PLAIN_WARPS* WARP, 2)                                                \
        attention_decode_plain_##D(const __grid_constant__ AttentionArgs a) {                                         \
        decode_plain<D / WARP>(a);                                                                                    \
    }
PLAIN(128)
PLAIN(256)

// Adds up the partial results of one head of one sequence. Grid (heads, sequences), a thread an element of head_dim.
constexpr uint32_t COMBINE_THREADS = 128;
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    attention_combine(const __grid_constant__ AttentionArgs a) {
    const uint32_t head = blockIdx.x, sequence = blockIdx.y, lane = threadIdx.x % WARP;
    const uint32_t count = Splits(a, sequence).count;
    const Partials from(a, sequence, head);
    // Each lane has every 32nd split's.
    const auto stats_of = [&](uint32_t split) {
        return split < count ? from.stats[split] : make_float2(-FLT_MAX, 0.f);
    };
    const float2 first = stats_of(lane);
    float top = first.x;
    for (uint32_t split = lane + WARP; split < count; split += WARP) top = fmaxf(top, from.stats[split].x);
    top = warp_max(top);

    // Whole warps, so that lanes can pass their splits' shares on.
    for (uint32_t d = threadIdx.x; d - lane < a.head_dim; d += blockDim.x) {
        float total = 0.f, weight = 0.f;
        for (uint32_t start = 0; start < count; start += WARP) {
            const float2 stats = start == 0 ? first : stats_of(start + lane);
            const float share = exp2_approx(stats.x - top);
            weight += share * stats.y;
            const float* sums = from.sums + start * from.stride + d;
#pragma unroll 8
            for (uint32_t j = 0; j < min(WARP, count - start); ++j) {
                const float x = d < a.head_dim ? sums[j * from.stride] : 0.f;
                total += __shfl_sync(FULL_MASK, share, j) * x;
            }
        }
        weight = warp_sum(weight);
        if (d >= a.head_dim) continue;
        // No keys: a place of the batch that is not in use.
        const float mean = count > 0 ? total / weight : 0.f;
        store_float(a.out, a.q_dtype, (size_t(sequence) * a.heads + head) * a.head_dim + d, mean);
    }
}
