// The sum of rows, as sums.cu and fuse_training.cu need it.
#pragma once
#include "common.cuh"

constexpr unsigned LINES = 16;

// out[c] += the sum of column c of [rows, stride]. A warp adds every 16th row of 32 columns, then the first warp the sums
// of all. Of a block of LINES warps, for columns 32 * blockIdx.x and on.
__device__ __forceinline__ void add_rows(const float* x, uint32_t rows, uint32_t stride, float* out, uint32_t cols) {
    __shared__ float sums[LINES][WARP];
    const uint32_t lane = threadIdx.x % WARP, line = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum = 0.f;
    if (column < cols) {
#pragma unroll 4
        for (uint32_t row = line; row < rows; row += LINES) sum += x[size_t(row) * stride + column];
    }
    sums[line][lane] = sum;
    __syncthreads();
    if (line > 0 || column >= cols) return;
#pragma unroll
    for (unsigned i = 1; i < LINES; ++i) sum += sums[i][lane];
    out[column] += sum;
}
