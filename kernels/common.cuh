// What every kernel shares: element types, conversions, reductions. No inline PTX: that is ptx.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

using bf16 = __nv_bfloat16;

constexpr unsigned WARP = 32;
constexpr unsigned FULL_MASK = 0xffffffffu;

// Dtypes of operands whose type is data: norms, biases, embedding tables. Twin of `cuda::dtype_code`.
enum DTypeCode : uint32_t {
    F32 = 0, F16, BF16, U32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Element i of a vector stored as F32, F16 or BF16.
__device__ __forceinline__ float load_float(const void* p, uint32_t dtype, size_t i) {
    if (dtype == F32) return static_cast<const float*>(p)[i];
    if (dtype == F16) return __half2float(static_cast<const __half*>(p)[i]);
    return __bfloat162float(static_cast<const bf16*>(p)[i]);
}

// Elements i..i + n - 1, up to four, zeros for the others: one load where they are all there and lie so that it can be.
__device__ __forceinline__ float4 load_float4(const void* p, uint32_t dtype, size_t i, unsigned n) {
    const char* at = static_cast<const char*>(p) + i * (dtype == F32 ? 4 : 2);
    if (n >= 4 && reinterpret_cast<uintptr_t>(at) % (dtype == F32 ? 16 : 8) == 0) {
        if (dtype == F32) return *reinterpret_cast<const float4*>(at);
        const uint2 words = *reinterpret_cast<const uint2*>(at);
        if (dtype == F16) {
            const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&words.x));
            const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&words.y));
            return make_float4(low.x, low.y, high.x, high.y);
        }
        return make_float4(__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u),
                           __uint_as_float(words.y << 16), __uint_as_float(words.y & 0xffff0000u));
    }
    return make_float4(n > 0 ? load_float(p, dtype, i) : 0.f, n > 1 ? load_float(p, dtype, i + 1) : 0.f,
                       n > 2 ? load_float(p, dtype, i + 2) : 0.f, n > 3 ? load_float(p, dtype, i + 3) : 0.f);
}
__device__ __forceinline__ float4 sum4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Two floats, the first in the low half, as mma operands and bf16 rows want them.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// Butterfly reductions: the order of additions does not depend on the lane, so all lanes hold the same bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
    return x;
}

// Sum over a block of `WARPS` warps in a fixed order; every thread gets it. `scratch`: WARPS floats of shared memory.
// Starts with no barrier and ends with one: between two calls with one scratch the caller needs none.
template <int WARPS> __device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += scratch[w];
    __syncthreads();
    return total;
}

// The largest of a block, as `block_sum`.
template <int WARPS> __device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float most = scratch[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) most = fmaxf(most, scratch[w]);
    __syncthreads();
    return most;
}

enum Activation : uint32_t { SILU = 0, GELU_TANH = 1, GELU_ERF = 2 };

// Twin of `ops::Activation`.
__device__ __forceinline__ float activate(uint32_t activation, float x) {
    if (activation == SILU) return x / (1.f + __expf(-x));
    if (activation == GELU_TANH) {
        const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.f + tanhf(inner));
    }
    return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
}

// Its derivative.
__device__ __forceinline__ float activation_slope(uint32_t activation, float x) {
    if (activation == SILU) {
        const float gate = 1.f / (1.f + __expf(-x));
        return gate * (1.f + x * (1.f - gate));
    }
    if (activation == GELU_TANH) {
        const float t = tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
        // Finite: far out it is multiplied by 0.
        const float inner = 0.7978845608028654f * (1.f + 3.f * 0.044715f * fminf(x * x, 1e30f));
        return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * inner;
    }
    return 0.5f * (1.f + erff(x * 0.7071067811865476f)) + x * 0.3989422804014327f * __expf(-0.5f * x * x);
}

__host__ __device__ constexpr uint32_t div_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// One layer's keys or values in pages `[blocks, kv_heads, block_size, head_dim]`: where the column of `slot` begins.
__device__ __forceinline__ size_t page_offset(uint32_t slot, uint32_t head, uint32_t kv_heads, uint32_t block_size,
                                              uint32_t head_dim) {
    const uint32_t block = slot / block_size, row = slot % block_size;
    return ((size_t(block) * kv_heads + head) * block_size + row) * head_dim;
}
