// From logits to tokens without the host: argmax, the k most probable tokens, the sum that log-probabilities need, and a
// draw by temperature, top-k, top-p and min-p. Twin of engine/{select,softmax,sampling}.rs.
//
// Three launches: `sample_chunks` ranks every 2048 logits of a row by themselves; `sample_sums`, wanted only where a sum
// over the vocabulary is, adds exponentials; `sample_draw` merges the chunks, one block a row, and draws.
//
// The exponential is the host's, operation by operation, and so are the comparisons, the order of additions among the
// ranked tokens and the random number: where top-k is at work, the same token is drawn as on the host. Sums over the
// vocabulary (top-p without top-k, and no filter or min-p alone) are f64 like the host's, but added chunk by chunk; a
// draw or the nucleus' edge may differ from the host's if it falls within 1e-13 of the boundary between two tokens.
#include "common.cuh"

constexpr unsigned CHUNK = 2048, THREADS = 256, WARPS = THREADS / WARP, MAX_K = 256;

// One row's parameters. `top_k` 0, `top_p` 1 and `min_p` 0 are off; `published`: top-p drops the token that crosses p.
struct SampleRow {
    // Low and high half.
    uint32_t seed[2];
    uint32_t choice, step;
    float temperature;
    uint32_t top_k;
    float top_p, min_p;
    uint32_t published;
};

// NEEDS_HOST: the draw reaches past the k ranked tokens.
enum Status : uint32_t { DRAWN = 0, NOT_A_NUMBER = 1, INFINITE = 2, NOTHING_POSSIBLE = 3, NEEDS_HOST = 4 };

struct SampledRow {
    // Sum of exp(x - max) over the row: log-sum-exp = max + ln(sum). 0 without `sums`.
    double sum;
    float max;
    // The token drawn; of NOT_A_NUMBER: the first such logit.
    uint32_t token;
    uint32_t status;
    // The most probable token, of equals the first.
    uint32_t best;
};

struct SampleArgs {
    // [rows, vocab]
    const float* logits;
    // [rows]; null: argmax
    const SampleRow* params;
    // Scratch: [rows, chunks, k], [rows, chunks], [rows, chunks], [rows, chunks, 2] or null.
    uint64_t* keys;
    uint64_t* best;
    uint32_t* nan;
    double* sums;
    // [rows]
    SampledRow* out;
    // [rows, k], most probable first, (2^32 - 1, -inf) past the last; null where k is 0.
    uint32_t* top_ids;
    float* top_values;
    // k <= MAX_K; chunks = vocab / CHUNK rounded up
    uint32_t vocab, chunks, k;
};

// A logit's rank as an integer: larger logits first, in the order of f32::total_cmp, then lower ids. 0 is no logit.
__device__ __forceinline__ uint64_t rank_key(float x, uint32_t id) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(order) << 32 | (0xffffffffu - id);
}
__device__ __forceinline__ float key_logit(uint64_t key) {
    const uint32_t order = key >> 32;
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}
__device__ __forceinline__ uint32_t key_id(uint64_t key) { return 0xffffffffu - uint32_t(key); }

// engine/softmax.rs' exp: e^x for x <= 0, without fused operations.
__device__ __forceinline__ float host_exp(float x) {
    const float bounded = fmaxf(x, -87.f), shifted = __fadd_rn(__fmul_rn(bounded, 1.44269504f), 12582912.f);
    const float n = __fsub_rn(shifted, 12582912.f);
    const float r = __fadd_rn(__fsub_rn(bounded, __fmul_rn(n, 355.f / 512.f)), __fmul_rn(n, 2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 0.16666665f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
    const float y = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.f);
    return x < -87.f ? 0.f : __fmul_rn(y, power);
}
__device__ __forceinline__ float weight(float x, float max, float temperature) {
    return host_exp(__fsub_rn(x, max) / temperature);
}

// rng.rs: the first uniform number in [0, 1) of (seed, Purpose::Sampling, choice, step), Philox4x32-10.
__device__ __forceinline__ double uniform(const SampleRow& p) {
    uint32_t c0 = 0, c1 = p.step, c2 = p.choice, c3 = 0, k0 = p.seed[0], k1 = p.seed[1];
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t a = __umulhi(0xd2511f53u, c0), b = __umulhi(0xcd9e8d57u, c2);
        const uint32_t c1_next = 0xcd9e8d57u * c2, c3_next = 0xd2511f53u * c0;
        c0 = b ^ c1 ^ k0, c2 = a ^ c3 ^ k1;
        c1 = c1_next, c3 = c3_next;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    return double((uint64_t(c0) << 32 | c1) >> 11) * (1.0 / 9007199254740992.0);
}

// A value of all threads reduced, the order of operations fixed; every thread gets it. `scratch`: WARPS values.
template <typename T, typename F> __device__ __forceinline__ T block_reduce(T x, T* scratch, F combine) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(FULL_MASK, x, offset));
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (unsigned w = 1; w < WARPS; ++w) x = combine(x, scratch[w]);
    __syncthreads();
    return x;
}
__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
__device__ __forceinline__ double plus(double a, double b) { return a + b; }

// Compares the keys of `n` that are `distance` apart; runs of `size` come to be in descending and ascending order in turn.
__device__ __forceinline__ void compare_exchange(uint64_t* keys, unsigned n, unsigned size, unsigned distance) {
    for (unsigned i = threadIdx.x; i < n / 2; i += THREADS) {
        const unsigned low = 2 * i - (i & (distance - 1)), high = low + distance;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & size) == 0)) keys[low] = b, keys[high] = a;
    }
    __syncthreads();
}

// Puts the `k` largest of `n` <= CHUNK keys first, in descending order; both are powers of two, k <= n. Begins and ends
// with a barrier. Bitonic: sorted runs of k; of a descending and an ascending one, the larger of each two neighbours
// are the k largest, and a bitonic sequence, which is merged to the next run.
__device__ __forceinline__ void rank(uint64_t* keys, unsigned n, unsigned k) {
    __syncthreads();
    for (unsigned size = 2; size <= k; size *= 2) {
        for (unsigned distance = size / 2; distance > 0; distance /= 2) compare_exchange(keys, n, size, distance);
    }
    for (n /= 2; n >= k; n /= 2) {
        uint64_t kept[CHUNK / 2 / THREADS];
#pragma unroll
        for (unsigned j = 0; j < CHUNK / 2 / THREADS; ++j) {
            const unsigned i = threadIdx.x + j * THREADS, at = i / k * 2 * k + i % k;
            if (i < n) kept[j] = larger(keys[at], keys[at + k]);
        }
        __syncthreads();
#pragma unroll
        for (unsigned j = 0; j < CHUNK / 2 / THREADS; ++j) {
            const unsigned i = threadIdx.x + j * THREADS;
            if (i < n) keys[i] = kept[j];
        }
        __syncthreads();
        for (unsigned distance = k / 2; distance > 0; distance /= 2) compare_exchange(keys, n, k, distance);
    }
}
// The least power of two that is not below `n`.
__device__ __forceinline__ unsigned power_of_two(unsigned n) { return n <= 1 ? 1 : 1u << (32 - __clz(n - 1)); }

// Grid (chunks, rows).
extern "C" __global__ void __launch_bounds__(THREADS) sample_chunks(const __grid_constant__ SampleArgs a) {
    __shared__ uint64_t keys[CHUNK];
    __shared__ uint64_t best_scratch[WARPS];
    __shared__ uint32_t nan_scratch[WARPS];
    const size_t chunk = size_t(blockIdx.y) * a.chunks + blockIdx.x;
    const float* row = a.logits + size_t(blockIdx.y) * a.vocab;
    uint64_t best = 0;
    uint32_t nan = 0xffffffffu;
#pragma unroll
    for (unsigned i = 0; i < CHUNK / THREADS; ++i) {
        const unsigned at = threadIdx.x + i * THREADS;
        const uint32_t id = blockIdx.x * CHUNK + at;
        const float x = id < a.vocab ? row[id] : -INFINITY;
        uint64_t key = 0;
        if (x != x) {
            nan = smaller(nan, id);
        } else if (x > -INFINITY) {
            key = rank_key(x, id);
            // The largest by value: of zeros of either sign the first.
            best = larger(best, rank_key(x + 0.f, id));
        }
        keys[at] = key;
    }
    best = block_reduce(best, best_scratch, larger);
    nan = block_reduce(nan, nan_scratch, smaller);
    if (threadIdx.x == 0) a.best[chunk] = best, a.nan[chunk] = nan;
    if (a.k == 0) return;
    rank(keys, CHUNK, power_of_two(a.k));
    for (unsigned i = threadIdx.x; i < a.k; i += THREADS) a.keys[chunk * a.k + i] = keys[i];
}

// The best logit of row `row`, in all threads.
__device__ __forceinline__ uint64_t row_best(const SampleArgs& a, uint32_t row, uint64_t* scratch) {
    uint64_t best = 0;
    for (uint32_t i = threadIdx.x; i < a.chunks; i += THREADS) best = larger(best, a.best[size_t(row) * a.chunks + i]);
    return block_reduce(best, scratch, larger);
}

// Whether the draw is among the ranked tokens, whose number then is not 0.
__device__ __forceinline__ bool ranks(const SampleArgs& a, const SampleRow& p) {
    return (p.top_k != 0 && p.top_k < a.vocab) || p.top_p < 1.f;
}

// Grid (chunks, rows). First the sum of exp(x - max), then that of exp((x - max) / temperature): of the whole chunk
// where tokens are ranked, else of what min-p leaves.
extern "C" __global__ void __launch_bounds__(THREADS) sample_sums(const __grid_constant__ SampleArgs a) {
    __shared__ uint64_t best_scratch[WARPS];
    __shared__ double scratch[WARPS];
    const float max = key_logit(row_best(a, blockIdx.y, best_scratch));
    const float* row = a.logits + size_t(blockIdx.y) * a.vocab;
    float temperature = 1.f, least = 0.f;
    if (a.params) {
        const SampleRow p = a.params[blockIdx.y];
        temperature = p.temperature;
        if (!ranks(a, p)) least = p.min_p;
    }
    double sum = 0, weights = 0;
#pragma unroll
    for (unsigned i = 0; i < CHUNK / THREADS; ++i) {
        const uint32_t id = blockIdx.x * CHUNK + threadIdx.x + i * THREADS;
        if (id >= a.vocab) break;
        const float x = row[id], w = weight(x, max, temperature);
        sum += double(host_exp(__fsub_rn(x, max)));
        if (w >= least) weights += double(w);
    }
    sum = block_reduce(sum, scratch, plus);
    weights = block_reduce(weights, scratch, plus);
    if (threadIdx.x == 0) {
        double* to = a.sums + (size_t(blockIdx.y) * a.chunks + blockIdx.x) * 2;
        to[0] = sum, to[1] = weights;
    }
}

// The token at `u` of the distribution over the `count` ranked tokens' `weights`; `total` that of the vocabulary, if
// top-k is off. One thread: the host's additions in the host's order. `a.k` is returned if that takes more tokens.
__device__ __forceinline__ unsigned draw_ranked(const SampleArgs& a, const SampleRow& p, const float* weights,
                                                unsigned count, double total, double u) {
    const bool by_k = p.top_k != 0 && p.top_k < a.vocab;
    if (by_k) {
        if (p.top_k > a.k) return a.k;
        count = min(count, p.top_k);
        total = 0;
        for (unsigned i = 0; i < count; ++i) total += double(weights[i]);
    } else if (!a.sums) {
        return a.k;
    }
    if (p.top_p < 1.f) {
        const double limit = double(p.top_p) * total;
        double sum = 0;
        unsigned crossing = 0;
        for (; crossing < count; ++crossing) {
            sum += double(weights[crossing]);
            if (p.published ? sum > limit : sum >= limit) break;
        }
        if (crossing < count) count = p.published ? max(crossing, 1u) : crossing + 1;
        else if (!by_k && count == a.k) return a.k;
    }
    // Ranked weights fall: min-p takes from the end.
    while (count > 0 && weights[count - 1] < p.min_p) --count;
    total = 0;
    for (unsigned i = 0; i < count; ++i) total += double(weights[i]);
    const double target = u * total;
    double sum = 0;
    for (unsigned i = 0; i < count; ++i) {
        sum += double(weights[i]);
        if (sum > target) return i;
    }
    while (count > 1 && weights[count - 1] == 0.f) --count;
    return count - 1;
}

// The token at `u` of the distribution over the whole vocabulary, in its order, in all threads.
__device__ __forceinline__ uint32_t draw_any(const SampleArgs& a, const SampleRow& p, float max, double u) {
    __shared__ double prefix[THREADS];
    __shared__ double before_chunk, target;
    __shared__ uint32_t chunk, crossing, last;
    const double* sums = a.sums + size_t(blockIdx.x) * a.chunks * 2;
    if (threadIdx.x == 0) {
        double total = 0;
        for (uint32_t i = 0; i < a.chunks; ++i) total += sums[2 * i + 1];
        double before = 0;
        uint32_t found = 0;
        target = u * total;
        for (uint32_t i = 0; i < a.chunks; ++i) {
            const double in_chunk = sums[2 * i + 1];
            if (in_chunk == 0) continue;
            found = i, before_chunk = before;
            before += in_chunk;
            if (before > target) break;
        }
        chunk = found, crossing = last = 0xffffffffu;
    }
    __syncthreads();
    constexpr unsigned EACH = CHUNK / THREADS;
    const uint32_t first = chunk * CHUNK + threadIdx.x * EACH;
    const float* row = a.logits + size_t(blockIdx.x) * a.vocab;
    float w[EACH];
    double sum = 0;
    uint32_t positive = 0xffffffffu;
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        w[i] = first + i < a.vocab ? weight(row[first + i], max, p.temperature) : 0.f;
        if (w[i] < p.min_p) w[i] = 0.f;
        if (w[i] > 0.f) positive = first + i;
        sum += double(w[i]);
    }
    prefix[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned distance = 1; distance < THREADS; distance *= 2) {
        const double add = threadIdx.x >= distance ? prefix[threadIdx.x - distance] : 0.0;
        __syncthreads();
        prefix[threadIdx.x] += add;
        __syncthreads();
    }
    double before = before_chunk + (threadIdx.x ? prefix[threadIdx.x - 1] : 0.0);
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        before += double(w[i]);
        if (w[i] > 0.f && before > target) {
            atomicMin(&crossing, first + i);
            break;
        }
    }
    // Rounding may leave the sum a hair below the target: then the last possible token. Ids count from 1 here.
    if (threadIdx.x == 0) last = 0;
    __syncthreads();
    if (positive != 0xffffffffu) atomicMax(&last, positive + 1);
    __syncthreads();
    return crossing != 0xffffffffu ? crossing : last - 1;
}

// Grid (rows).
extern "C" __global__ void __launch_bounds__(THREADS, 4) sample_draw(const __grid_constant__ SampleArgs a) {
    __shared__ uint64_t keys[CHUNK];
    __shared__ uint64_t best_scratch[WARPS];
    __shared__ uint32_t nan_scratch[WARPS];
    __shared__ double sum_scratch[WARPS];
    __shared__ float weights[MAX_K];
    const uint32_t row = blockIdx.x;
    SampledRow out = {};
    const uint64_t best = row_best(a, row, best_scratch);
    uint32_t nan = 0xffffffffu;
    double sum = 0;
    for (uint32_t i = threadIdx.x; i < a.chunks; i += THREADS) {
        const size_t chunk = size_t(row) * a.chunks + i;
        nan = smaller(nan, a.nan[chunk]);
        if (a.sums) sum += a.sums[2 * chunk];
    }
    nan = block_reduce(nan, nan_scratch, smaller);
    out.sum = block_reduce(sum, sum_scratch, plus);
    out.max = best ? key_logit(best) : -INFINITY;
    out.token = out.best = key_id(best);

    if (a.k > 0) {
        // The best so far, then as many of the chunks' as there is place for; again until all were there.
        const uint64_t* ranked = a.keys + size_t(row) * a.chunks * a.k;
        const uint32_t all = a.chunks * a.k;
        unsigned have = 0;
        for (uint32_t from = 0; from < all;) {
            const unsigned take = min(all - from, CHUNK - have);
            const unsigned n = power_of_two(max(have + take, a.k));
            for (unsigned i = threadIdx.x; have + i < n; i += THREADS) keys[have + i] = i < take ? ranked[from + i] : 0;
            rank(keys, n, power_of_two(a.k));
            have = min(a.k, have + take), from += take;
        }
        for (unsigned i = threadIdx.x; i < a.k; i += THREADS) {
            const uint64_t key = i < have ? keys[i] : 0;
            a.top_ids[size_t(row) * a.k + i] = key ? key_id(key) : 0xffffffffu;
            a.top_values[size_t(row) * a.k + i] = key ? key_logit(key) : -INFINITY;
        }
    }

    if (nan != 0xffffffffu) {
        out.status = NOT_A_NUMBER, out.token = nan;
    } else if (best == 0) {
        out.status = NOTHING_POSSIBLE;
    } else if (out.max == INFINITY) {
        out.status = INFINITE;
    } else if (a.params && a.params[row].temperature >= 1e-5f) {
        const SampleRow p = a.params[row];
        const double u = uniform(p);
        if (!ranks(a, p)) {
            if (a.sums) out.token = draw_any(a, p, out.max, u);
            else out.status = NEEDS_HOST;
        } else {
            static_assert(MAX_K <= THREADS);
            const unsigned i = threadIdx.x;
            const bool possible = i < a.k && keys[i] != 0;
            if (possible) weights[i] = weight(key_logit(keys[i]), out.max, p.temperature);
            const unsigned count = __syncthreads_count(possible);
            double total = 0;
            if (a.sums) {
                for (uint32_t i = threadIdx.x; i < a.chunks; i += THREADS) {
                    total += a.sums[(size_t(row) * a.chunks + i) * 2 + 1];
                }
            }
            total = block_reduce(total, sum_scratch, plus);
            if (threadIdx.x == 0) {
                const unsigned drawn = draw_ranked(a, p, weights, count, total, u);
                if (drawn < a.k) out.token = key_id(keys[drawn]);
                else out.status = NEEDS_HOST;
            }
        }
    }
    if (threadIdx.x == 0) a.out[row] = out;
}
