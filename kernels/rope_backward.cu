// Backward of rope_kv_write: from the gradients of the rotated q and of the pages' K and V to that of [q | k | v], in the
// order of pairs that it came in, and of the norms' weights. All arithmetic in f32.
//
// A warp takes one head of TOKENS tokens; what it adds to a norm's gradient is a row of `q_partials` or `k_partials`,
// summed by sum_rows. Grid (tokens / TOKENS, (heads + 2 kv_heads) / WARPS), both rounded up.
#include "rope.cuh"

// Twin of `backend::cuda::rope::RopeBackwardArgs`.
struct RopeBackwardArgs {
    const void* qkv;        // [tokens, (heads + 2 kv_heads) * head_dim], read where there are norms
    const void* q_norm;     // [head_dim] or null
    const void* k_norm;     // the same
    const float* cos_sin;   // [tokens, head_dim]: half cosines, half sines
    const uint32_t* slots;  // [tokens]
    const float* dq;        // [tokens, heads * head_dim]
    const float* dkeys;     // [blocks, kv_heads, block_size, head_dim]
    const float* dvalues;   // the same
    float* dqkv;            // as qkv
    float* q_partials;      // [tokens / TOKENS, heads, head_dim] or null
    float* k_partials;      // [tokens / TOKENS, kv_heads, head_dim] or null
    uint32_t tokens, heads, kv_heads, head_dim, block_size;
    uint32_t q_norm_dtype, k_norm_dtype;
    uint32_t interleaved;  // pairs of qkv are (2i, 2i + 1)
    float norm_eps, norm_offset;
};

constexpr uint32_t TOKENS = 16;

// `dy` becomes the gradient of x, what is added to that of the weight is added to `dweight`.
template <int N>
__device__ __forceinline__ void norm_backward(Pairs<N>& dy, const Pairs<N>& x, const Pairs<N>& weight,
                                              Pairs<N>& dweight, uint32_t half, float eps) {
    float squares = 0.f, dot = 0.f;
    dy.each(half, [&](int step, uint32_t) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float a = x.low[step][n], b = x.high[step][n];
            squares += a * a + b * b;
            dot += a * dy.low[step][n] * weight.low[step][n] + b * dy.high[step][n] * weight.high[step][n];
        }
    });
    const float scale = 1.f / sqrtf(warp_sum(squares) / float(2 * half) + eps);
    const float pull = warp_sum(dot) / float(2 * half) * scale * scale;
    dy.each(half, [&](int step, uint32_t) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float a = x.low[step][n], b = x.high[step][n];
            dweight.low[step][n] += dy.low[step][n] * a * scale;
            dweight.high[step][n] += dy.high[step][n] * b * scale;
            dy.low[step][n] = scale * (dy.low[step][n] * weight.low[step][n] - a * pull);
            dy.high[step][n] = scale * (dy.high[step][n] * weight.high[step][n] - b * pull);
        }
    });
}

template <typename T, int N> __device__ __forceinline__ void rope_backward(const RopeBackwardArgs& a) {
    const uint32_t first = blockIdx.x * TOKENS, end = min(first + TOKENS, a.tokens), half = a.head_dim / 2;
    const uint32_t head = blockIdx.y * WARPS + threadIdx.x / WARP, qk_heads = a.heads + a.kv_heads;
    if (head >= qk_heads + a.kv_heads) return;
    const bool is_q = head < a.heads, is_v = head >= qk_heads;
    const void* norm = is_v ? nullptr : is_q ? a.q_norm : a.k_norm;
    const bool interleaved = a.interleaved && !is_v;
    Pairs<N> weight, dweight;
    weight.each(half, [&](int step, uint32_t i) {
#pragma unroll
        for (uint32_t n = 0; n < N; ++n) {
            const uint32_t low = interleaved ? 2 * (i + n) : i + n, high = interleaved ? low + 1 : low + half;
            const uint32_t dtype = is_q ? a.q_norm_dtype : a.k_norm_dtype;
            weight.low[step][n] = norm ? a.norm_offset + load_float(norm, dtype, low) : 1.f;
            weight.high[step][n] = norm ? a.norm_offset + load_float(norm, dtype, high) : 1.f;
            dweight.low[step][n] = dweight.high[step][n] = 0.f;
        }
    });
#pragma unroll 1
    for (uint32_t token = first; token < end; ++token) {
        const size_t at = (size_t(token) * (qk_heads + a.kv_heads) + head) * a.head_dim;
        Pairs<N> dy;
        if (is_q) {
            dy.load(a.dq + (size_t(token) * a.heads + head) * a.head_dim, half, false);
        } else {
            const uint32_t kv_head = head - (is_v ? qk_heads : a.heads);
            const size_t page = page_offset(a.slots[token], kv_head, a.kv_heads, a.block_size, a.head_dim);
            dy.load((is_v ? a.dvalues : a.dkeys) + page, half, false);
        }
        if (!is_v) {
            Pairs<N> angles;
            angles.load(a.cos_sin + size_t(token) * a.head_dim, half, false);
            // Back by the same angles.
            angles.each(half, [&](int step, uint32_t) {
#pragma unroll
                for (int n = 0; n < N; ++n) angles.high[step][n] = -angles.high[step][n];
            });
            dy.rotate(angles, half);
        }
        if (norm) {
            Pairs<N> x;
            x.load(static_cast<const T*>(a.qkv) + at, half, interleaved);
            norm_backward(dy, x, weight, dweight, half, a.norm_eps);
        }
        dy.store(a.dqkv + at, half, interleaved);
    }
    float* partials = is_v ? nullptr : is_q ? a.q_partials : a.k_partials;
    if (!partials) return;
    const size_t row = is_q ? size_t(blockIdx.x) * a.heads + head : size_t(blockIdx.x) * a.kv_heads + head - a.heads;
    dweight.store(partials + row * a.head_dim, half, interleaved);
}

// Names say the type of qkv.
#define KERNEL(NAME, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                                         \
        rope_backward_##NAME(const __grid_constant__ RopeBackwardArgs a) {                                            \
        if (a.head_dim % 4 == 0)                                                                                      \
            rope_backward<T, 2>(a);                                                                                   \
        else                                                                                                          \
            rope_backward<T, 1>(a);                                                                                   \
    }
KERNEL(f32, float)
KERNEL(bf16, bf16)
