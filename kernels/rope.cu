// q/k norm, rotary embedding and the paged K/V write in one pass over [q | k | v]: each head of each token is read
// once; q goes back in its place, k and v go to the pages. Heads are written in Hugging Face's order of pairs
// (i, i + head_dim / 2), whatever order they come in. All arithmetic in f32.
//
// A warp takes one head of several tokens, a block 8 heads; what heads or tokens share (cosines and sines, norm
// weights) passes through shared memory. Grid (tokens / TOKENS, (heads + 2 kv_heads) / WARPS), both rounded up.
#include "common.cuh"

// Twin of `backend::cuda::rope::RopeArgs`.
struct RopeArgs {
    void* qkv;              // [tokens, (heads + 2 kv_heads) * head_dim]
    const void* q_norm;     // [head_dim] or null
    const void* k_norm;     // the same
    const float* cos_sin;   // [tokens, head_dim]: half cosines, half sines
    const uint32_t* slots;  // [tokens]
    void* keys;             // [blocks, kv_heads, block_size, head_dim]
    void* values;           // the same
    uint32_t tokens, heads, kv_heads, head_dim, block_size;
    uint32_t q_norm_dtype, k_norm_dtype;
    uint32_t interleaved;  // pairs come as (2i, 2i + 1)
    float norm_eps, norm_offset;
};

constexpr uint32_t WARPS = 8, TOKENS = 4, MAX_DIM = 256;

template <typename T, int N> struct __align__(sizeof(T) * N) Packed {
    T x[N];
};

// One store each: the compiler takes those of two elements apart.
__device__ __forceinline__ void store_packed(bf16* to, const float (&x)[2]) {
    *reinterpret_cast<uint32_t*>(to) = pack_bf16(x[0], x[1]);
}
__device__ __forceinline__ void store_packed(float* to, const float (&x)[2]) {
    *reinterpret_cast<uint64_t*>(to) = uint64_t(__float_as_uint(x[1])) << 32 | __float_as_uint(x[0]);
}
template <typename T> __device__ __forceinline__ void store_packed(T* to, const float (&x)[1]) {
    *to = from_float<T>(x[0]);
}

// A lane's share of a head: pairs `index(i)`, N consecutive ones each.
template <int N> struct Pairs {
    static constexpr int STEPS = MAX_DIM / 2 / WARP / N;
    float low[STEPS][N], high[STEPS][N];

    __device__ static uint32_t index(int step) { return (step * WARP + threadIdx.x % WARP) * N; }

    // Calls f(step, index) for the shares that a head has.
    template <typename F> __device__ static void each(uint32_t half, F f) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            if (index(step) < half) f(step, index(step));
    }

    template <typename T> __device__ void load(const T* from, uint32_t half, bool interleaved) {
        each(half, [&](int step, uint32_t i) {
            if (interleaved) {
                const auto both = *reinterpret_cast<const Packed<T, 2 * N>*>(from + 2 * i);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    low[step][n] = to_float(both.x[2 * n]);
                    high[step][n] = to_float(both.x[2 * n + 1]);
                }
            } else {
                const auto a = *reinterpret_cast<const Packed<T, N>*>(from + i);
                const auto b = *reinterpret_cast<const Packed<T, N>*>(from + half + i);
#pragma unroll
                for (int n = 0; n < N; ++n) low[step][n] = to_float(a.x[n]), high[step][n] = to_float(b.x[n]);
            }
        });
    }

    template <typename T> __device__ void store(T* to, uint32_t half) const {
        each(half, [&](int step, uint32_t i) {
            store_packed(to + i, low[step]);
            store_packed(to + half + i, high[step]);
        });
    }

    __device__ void normalise(const Pairs& weight, uint32_t half, float eps) {
        float squares = 0.f;
        each(half, [&](int step, uint32_t) {
#pragma unroll
            for (int n = 0; n < N; ++n) squares += low[step][n] * low[step][n] + high[step][n] * high[step][n];
        });
        const float scale = 1.f / sqrtf(warp_sum(squares) / float(2 * half) + eps);
        each(half, [&](int step, uint32_t) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                low[step][n] *= scale * weight.low[step][n];
                high[step][n] *= scale * weight.high[step][n];
            }
        });
    }

    // By angles whose cosines are `low` and sines `high`.
    __device__ void rotate(const Pairs& angles, uint32_t half) {
        each(half, [&](int step, uint32_t) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float a = low[step][n], b = high[step][n];
                const float cos = angles.low[step][n], sin = angles.high[step][n];
                low[step][n] = a * cos - b * sin;
                high[step][n] = b * cos + a * sin;
            }
        });
    }
};

// N: pairs that a lane takes together; half a head is a multiple of it.
template <typename T, typename P, int N> __device__ __forceinline__ void rope_kv_write(const RopeArgs& a) {
    __shared__ __align__(16) float cos_sin[TOKENS][MAX_DIM];
    __shared__ __align__(16) float norms[2][MAX_DIM];
    __shared__ uint32_t slots[TOKENS];
    const uint32_t first_token = blockIdx.x * TOKENS, tokens = min(TOKENS, a.tokens - first_token);
    const uint32_t first_head = blockIdx.y * WARPS, qk_heads = a.heads + a.kv_heads, half = a.head_dim / 2;
    if (first_head < qk_heads) {
        for (uint32_t i = threadIdx.x; i < tokens * a.head_dim; i += WARPS * WARP)
            cos_sin[i / a.head_dim][i % a.head_dim] = a.cos_sin[size_t(first_token) * a.head_dim + i];
        for (uint32_t i = threadIdx.x; i < a.head_dim; i += WARPS * WARP) {
            if (a.q_norm && first_head < a.heads) norms[0][i] = a.norm_offset + load_float(a.q_norm, a.q_norm_dtype, i);
            if (a.k_norm && first_head + WARPS > a.heads)
                norms[1][i] = a.norm_offset + load_float(a.k_norm, a.k_norm_dtype, i);
        }
    }
    if (threadIdx.x < tokens) slots[threadIdx.x] = a.slots[first_token + threadIdx.x];
    __syncthreads();

    const uint32_t head = first_head + threadIdx.x / WARP;
    if (head >= qk_heads + a.kv_heads) return;
    const bool is_q = head < a.heads, is_v = head >= qk_heads;
    const bool normed = !is_v && (is_q ? a.q_norm : a.k_norm), interleaved = a.interleaved && !is_v;
    Pairs<N> weight;
    if (normed) weight.load(norms[is_q ? 0 : 1], half, interleaved);
#pragma unroll 1
    for (uint32_t t = 0; t < tokens; ++t) {
        const uint32_t token = first_token + t;
        T* x = static_cast<T*>(a.qkv) + (size_t(token) * (qk_heads + a.kv_heads) + head) * a.head_dim;
        Pairs<N> pairs;
        pairs.load(x, half, interleaved);
        if (normed) pairs.normalise(weight, half, a.norm_eps);
        if (!is_v) {
            Pairs<N> angles;
            angles.load(cos_sin[t], half, false);
            pairs.rotate(angles, half);
        }
        if (is_q) {
            __syncwarp();  // Every lane has read what others overwrite: the orders of pairs may differ.
            pairs.store(x, half);
        } else {
            P* pages = static_cast<P*>(is_v ? a.values : a.keys);
            const uint32_t kv_head = head - (is_v ? qk_heads : a.heads);
            pairs.store(pages + page_offset(slots[t], kv_head, a.kv_heads, a.block_size, a.head_dim), half);
        }
    }
}

// Names say the types of qkv and of the pages.
#define KERNEL(T_NAME, T, P_NAME, P)                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                                         \
        rope_kv_write_##T_NAME##_##P_NAME(const __grid_constant__ RopeArgs a) {                                       \
        if (a.head_dim % 4 == 0)                                                                                      \
            rope_kv_write<T, P, 2>(a);                                                                                \
        else                                                                                                          \
            rope_kv_write<T, P, 1>(a);                                                                                \
    }
KERNEL(f32, float, f32, float)
KERNEL(f32, float, bf16, bf16)
KERNEL(bf16, bf16, bf16, bf16)
KERNEL(bf16, bf16, f32, float)
