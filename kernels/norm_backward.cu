// Backward of RMSNorm. With r = 1 / sqrt(mean(x^2) + eps) and g = dy * (offset + weight):
// dx = r g - x r^3 mean(g x), dweight += sum over the rows of dy x r.
//
// A block takes ROWS rows, one after the other. A thread has the same columns of each, so that it can add up its share of
// dweight in `partials`; sum_rows adds those of the blocks.
#include "common.cuh"

// Twin of `backend::cuda::norm_backward::RmsNormBackwardArgs`.
struct RmsNormBackwardArgs {
    const float* x;
    const void* weight;
    const float* dy;
    float* dx;        // may be dy
    float* partials;  // [blocks, cols] or null
    uint32_t weight_dtype;
    uint32_t rows, cols;
    float eps, offset;
    uint32_t add;  // to dx
};

constexpr int WARPS = 8;
constexpr uint32_t ROWS = 8, THREADS = WARPS * WARP;

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward(const __grid_constant__ RmsNormBackwardArgs a) {
    __shared__ float scratch[WARPS];
    const uint32_t first = blockIdx.x * ROWS, end = min(first + ROWS, a.rows);
    float* partial = a.partials + size_t(blockIdx.x) * a.cols;
    for (uint32_t row = first; row < end; ++row) {
        const float *x = a.x + size_t(row) * a.cols, *dy = a.dy + size_t(row) * a.cols;
        float* dx = a.dx + size_t(row) * a.cols;
        float squares = 0.f, dot = 0.f;
        for (uint32_t i = threadIdx.x; i < a.cols; i += THREADS) {
            squares += x[i] * x[i];
            dot += x[i] * dy[i] * (a.offset + load_float(a.weight, a.weight_dtype, i));
        }
        const float scale = 1.f / sqrtf(block_sum<WARPS>(squares, scratch) / float(a.cols) + a.eps);
        const float pull = block_sum<WARPS>(dot, scratch) / float(a.cols) * scale * scale;
        for (uint32_t i = threadIdx.x; i < a.cols; i += THREADS) {
            const float own = dy[i], normed = x[i] * scale;
            const float y = scale * (own * (a.offset + load_float(a.weight, a.weight_dtype, i)) - x[i] * pull);
            dx[i] = a.add ? dx[i] + y : y;
            if (a.partials) partial[i] = row == first ? own * normed : partial[i] + own * normed;
        }
    }
}
