// RMSNorm: y = x / sqrt(mean(x^2) + eps) * (offset + weight), assigned (f32 or bf16) or added to f32.
// One block a row, four columns a thread at a time; rows of up to 4096 columns are read once.
#include "common.cuh"

struct RmsNormArgs {
    const float* x;
    const void* weight;
    void* out;
    uint32_t weight_dtype;
    uint32_t rows, cols;
    float eps, offset;
};

constexpr int WARPS = 8;
// Fours of columns that a thread keeps in registers.
constexpr unsigned THREADS = WARPS * WARP, HELD = 4;

enum class Output { Assign, Add };

// Writes `n` of four neighbours: in one store where all are there and lie so that it can be.
__device__ __forceinline__ void store4(float* to, float4 y, unsigned n) {
    if (n >= 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        *reinterpret_cast<float4*>(to) = y;
        return;
    }
    if (n > 0) to[0] = y.x;
    if (n > 1) to[1] = y.y;
    if (n > 2) to[2] = y.z;
    if (n > 3) to[3] = y.w;
}
__device__ __forceinline__ void store4(bf16* to, float4 y, unsigned n) {
    if (n >= 4 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
        return;
    }
    if (n > 0) to[0] = from_float<bf16>(y.x);
    if (n > 1) to[1] = from_float<bf16>(y.y);
    if (n > 2) to[2] = from_float<bf16>(y.z);
    if (n > 3) to[3] = from_float<bf16>(y.w);
}

template <typename T, Output OUTPUT> __device__ __forceinline__ void rms_norm(const RmsNormArgs& a) {
    __shared__ float scratch[WARPS];
    const size_t row = size_t(blockIdx.x) * a.cols;
    T* out = static_cast<T*>(a.out) + row;
    const auto load = [&](uint32_t i) { return load_float4(a.x, F32, row + i, a.cols - i); };
    const auto square = [](float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; };
    float4 held[HELD];
    float squares = 0.f;
#pragma unroll
    for (unsigned k = 0; k < HELD; ++k) {
        const uint32_t i = 4 * (k * THREADS + threadIdx.x);
        if (i < a.cols) held[k] = load(i), squares += square(held[k]);
    }
    const uint32_t rest = 4 * (HELD * THREADS + threadIdx.x);
    for (uint32_t i = rest; i < a.cols; i += 4 * THREADS) squares += square(load(i));
    const float scale = 1.f / sqrtf(block_sum<WARPS>(squares, scratch) / float(a.cols) + a.eps);
    const auto put = [&](uint32_t i, float4 x) {
        const unsigned n = a.cols - i;
        const float4 w = load_float4(a.weight, a.weight_dtype, i, n);
        float4 y = make_float4(x.x * scale * (a.offset + w.x), x.y * scale * (a.offset + w.y),
                               x.z * scale * (a.offset + w.z), x.w * scale * (a.offset + w.w));
        if constexpr (OUTPUT == Output::Add) y = sum4(load_float4(a.out, F32, row + i, n), y);
        store4(out + i, y, n);
    };
#pragma unroll
    for (unsigned k = 0; k < HELD; ++k) {
        const uint32_t i = 4 * (k * THREADS + threadIdx.x);
        if (i < a.cols) put(i, held[k]);
    }
    for (uint32_t i = rest; i < a.cols; i += 4 * THREADS) put(i, load(i));
}

#define KERNEL(NAME, T, OUTPUT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ RmsNormArgs a) {               \
        rms_norm<T, OUTPUT>(a);                                                                                       \
    }
KERNEL(rms_norm_f32, float, Output::Assign)
KERNEL(rms_norm_bf16, bf16, Output::Assign)
KERNEL(rms_norm_add, float, Output::Add)
