// Backward of RMSNorm. With r = 1 / sqrt(mean(x^2) + eps) and g = dy * (offset + weight):
// dx = r g - x r^3 mean(g x), dweight += sum over the rows of dy x r.
//
// A block takes NORM_ROWS rows, one after the other. A thread has the same columns of each, so that it can add up its
// share of dweight in a row of partial sums; those of the blocks are added by `add_rows`.
#pragma once
#include "common.cuh"

constexpr int NORM_WARPS = 8;
constexpr uint32_t NORM_ROWS = 8, NORM_THREADS = NORM_WARPS * WARP;

struct NormBackward {
    const float* x;  // [rows, cols]
    const void* weight;
    const float* dy;
    float* dx;        // may be dy, if it is not added to
    float* partials;  // [blocks, cols] or null
    uint32_t weight_dtype, rows, cols;
    float eps, offset;
    bool add;  // to dx
};

__device__ __forceinline__ void norm_backward(const NormBackward& a) {
    __shared__ float scratch[NORM_WARPS];
    const uint32_t first = blockIdx.x * NORM_ROWS, end = min(first + NORM_ROWS, a.rows);
    float* partial = a.partials + size_t(blockIdx.x) * a.cols;
    for (uint32_t row = first; row < end; ++row) {
        const float *x = a.x + size_t(row) * a.cols, *dy = a.dy + size_t(row) * a.cols;
        float* dx = a.dx + size_t(row) * a.cols;
        float squares = 0.f, dot = 0.f;
        for (uint32_t i = threadIdx.x; i < a.cols; i += NORM_THREADS) {
            squares += x[i] * x[i];
            dot += (a.offset + load_float(a.weight, a.weight_dtype, i)) * dy[i] * x[i];
        }
        const float scale = 1.f / sqrtf(block_sum<NORM_WARPS>(squares, scratch) / float(a.cols) + a.eps);
        const float pull = block_sum<NORM_WARPS>(dot, scratch) / float(a.cols) * scale * scale;
        for (uint32_t i = threadIdx.x; i < a.cols; i += NORM_THREADS) {
            const float own = dy[i], normed = x[i] * scale;
            const float straight = __fmul_rn(a.offset + load_float(a.weight, a.weight_dtype, i), own);
            // Both rounded: of few columns they nearly cancel.
            const float y = scale * (straight - __fmul_rn(x[i], pull));
            dx[i] = a.add ? dx[i] + y : y;
            if (a.partials) partial[i] = row == first ? own * normed : partial[i] + own * normed;
        }
    }
}
