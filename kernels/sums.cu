// Sums in an order that depends on nothing but their length.
#include "sums.cuh"

// Twin of `backend::cuda::sums::SumRowsArgs`.
struct SumRowsArgs {
    const float* x;  // [rows, stride]
    float* out;      // [cols]
    uint32_t rows, cols, stride;
};

// Grid (cols / 32).
extern "C" __global__ void __launch_bounds__(LINES* WARP) sum_rows(const __grid_constant__ SumRowsArgs a) {
    add_rows(a.x, a.rows, a.stride, a.out, a.cols);
}

// Twin of `backend::cuda::sums::SumOfSquaresArgs`.
struct SumOfSquaresArgs {
    const float* x;
    float* partials;  // [blocks]
    float* out;       // [1]
    uint64_t len;
    uint32_t blocks;
};

constexpr int WARPS = 8;
constexpr uint32_t THREADS = WARPS * WARP;

// Grid (blocks), the same on every card.
extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares(const __grid_constant__ SumOfSquaresArgs a) {
    __shared__ float scratch[WARPS];
    float sum = 0.f;
    for (uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x; i < a.len; i += uint64_t(a.blocks) * THREADS) {
        sum += a.x[i] * a.x[i];
    }
    sum = block_sum<WARPS>(sum, scratch);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares_end(const __grid_constant__ SumOfSquaresArgs a) {
    __shared__ float scratch[WARPS];
    float sum = 0.f;
    for (uint32_t i = threadIdx.x; i < a.blocks; i += THREADS) sum += a.partials[i];
    sum = block_sum<WARPS>(sum, scratch);
    if (threadIdx.x == 0) a.out[0] = sum;
}
