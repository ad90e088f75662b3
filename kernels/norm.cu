// RMSNorm: y = x / sqrt(mean(x^2) + eps) * (offset + weight), assigned (f32 or bf16) or added to f32.
// One block a row; reads x once from global memory and once more from cache.
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

enum class Output { Assign, Add };

template <typename T, Output OUTPUT> __device__ __forceinline__ void rms_norm(const RmsNormArgs& a) {
    __shared__ float scratch[WARPS];
    const float* x = a.x + size_t(blockIdx.x) * a.cols;
    T* out = static_cast<T*>(a.out) + size_t(blockIdx.x) * a.cols;
    float squares = 0.f;
    for (uint32_t i = threadIdx.x; i < a.cols; i += WARPS * WARP) squares += x[i] * x[i];
    const float scale = 1.f / sqrtf(block_sum<WARPS>(squares, scratch) / float(a.cols) + a.eps);
    for (uint32_t i = threadIdx.x; i < a.cols; i += WARPS * WARP) {
        const float y = x[i] * scale * (a.offset + load_float(a.weight, a.weight_dtype, i));
        out[i] = OUTPUT == Output::Add ? from_float<T>(to_float(out[i]) + y) : from_float<T>(y);
    }
}

#define KERNEL(NAME, T, OUTPUT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) NAME(const __grid_constant__ RmsNormArgs a) {          \
        rms_norm<T, OUTPUT>(a);                                                                                       \
    }
KERNEL(rms_norm_f32, float, Output::Assign)
KERNEL(rms_norm_bf16, bf16, Output::Assign)
KERNEL(rms_norm_add, float, Output::Add)
