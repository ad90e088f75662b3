// q/k norm, rotary embedding and the paged K/V write in one pass over [q | k | v]: each head of each token is read
// once; q goes back in its place or to a tensor of its own, k and v go to the pages. Heads are written in Hugging
// Face's order of pairs (i, i + head_dim / 2), whatever order they come in. All arithmetic in f32.
//
// A warp takes one head of several tokens, a block 8 heads; what heads or tokens share (cosines and sines, norm
// weights) passes through shared memory. Grid (tokens / TOKENS, (heads + 2 kv_heads) / WARPS), both rounded up.
#include "rope.cuh"

// Twin of `backend::cuda::rope::RopeArgs`.
struct RopeArgs {
    void* qkv;              // [tokens, (heads + 2 kv_heads) * head_dim]
    void* q;                // rows of q_stride: qkv itself, or where q goes instead
    const void* q_norm;     // [head_dim] or null
    const void* k_norm;     // the same
    const float* cos_sin;   // [tokens, head_dim]: half cosines, half sines
    const uint32_t* slots;  // [tokens]
    void* keys;             // [blocks, kv_heads, block_size, head_dim]
    void* values;           // the same
    uint32_t tokens, heads, kv_heads, head_dim, block_size;
    uint32_t q_norm_dtype, k_norm_dtype;
    uint32_t interleaved;  // pairs come as (2i, 2i + 1)
    uint32_t q_stride;
    float norm_eps, norm_offset;
};

constexpr uint32_t TOKENS = 4;

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
        const T* x = static_cast<const T*>(a.qkv) + (size_t(token) * (qk_heads + a.kv_heads) + head) * a.head_dim;
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
            pairs.store(static_cast<T*>(a.q) + size_t(token) * a.q_stride + head * a.head_dim, half);
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
