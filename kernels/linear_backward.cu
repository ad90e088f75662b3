// Backward of linear maps: dx = dy * W, and dW += dy^T * x. Weights of any type are expanded tile by tile as they are read;
// up to three of them, stacked, share a launch. Gradients are f32. Precision fast rounds the operands of products to bf16.
#include "product.cuh"
#include "weights.cuh"

// Twin of `backend::cuda::linear_backward::LinearBackwardArgs`.
struct LinearBackwardArgs {
    const void* weights[PARTS];  // [rows, cols]: read by the one
    float* grads[PARTS];         // the same: added to by the other
    const float* dy;             // [tokens, stride]
    const void* x;               // [tokens, cols]
    float* dx;                   // [tokens, cols]
    // `columns`: where a matrix's first row is in `dy`.
    uint32_t rows[PARTS], columns[PARTS], dtypes[PARTS];
    uint32_t parts, tokens, cols, stride;
    uint32_t x_dtype;
    uint32_t add;  // to dx
};

// Rows of W, which are the depth.
struct WeightLines {
    static constexpr bool BY_DEPTH = true;
    static constexpr unsigned EACH = 8;
    Part part;
    uint32_t cols;

    __device__ __forceinline__ void load(uint32_t row, uint32_t column, float (&v)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = 0.f;
        if (row < part.rows && column < cols) weights8(part, row, column, cols, v);
    }
};

template <typename T> __device__ __forceinline__ T pick(const T (&of)[PARTS], unsigned p) {
    return p == 0 ? of[0] : p == 1 ? of[1] : of[2];
}

// Grid (tokens / SIDE, cols / SIDE).
template <typename P> __device__ __forceinline__ void backward_input(const LinearBackwardArgs& a) {
    const uint32_t token = blockIdx.x * SIDE, column = blockIdx.y * SIDE;
    __shared__ typename P::Tiles tiles;
    P sums;
    sums.clear();
#pragma unroll 1
    for (unsigned p = 0; p < a.parts; ++p) {
        const uint32_t rows = pick(a.rows, p);
        const Part part{static_cast<const uint8_t*>(pick(a.weights, p)), nullptr, rows, 0, pick(a.dtypes, p), 0};
        const Lines<false> dy{a.dy + pick(a.columns, p), F32, a.tokens, rows, a.stride};
        sums.add(tiles, dy, token, WeightLines{part, a.cols}, column, rows);
    }
    sums.each([&](unsigned m, unsigned n, float x, float y) {
        if (token + m < a.tokens) put2(a.dx + size_t(token + m) * a.cols, column + n, a.cols, x, y, a.add);
    });
}

// Grid (rows / SIDE, cols / SIDE, parts).
template <typename P> __device__ __forceinline__ void backward_weight(const LinearBackwardArgs& a) {
    const uint32_t row = blockIdx.x * SIDE, column = blockIdx.y * SIDE, rows = pick(a.rows, blockIdx.z);
    if (row >= rows) return;
    const Lines<true> dy{a.dy + pick(a.columns, blockIdx.z), F32, a.tokens, rows, a.stride};
    const Lines<true> x{a.x, a.x_dtype, a.tokens, a.cols, a.cols};
    __shared__ typename P::Tiles tiles;
    P sums;
    sums.clear();
    sums.add(tiles, dy, row, x, column, a.tokens);
    float* grad = pick(a.grads, blockIdx.z);
    sums.each([&](unsigned m, unsigned n, float x, float y) {
        if (row + m < rows) put2(grad + size_t(row + m) * a.cols, column + n, a.cols, x, y, true);
    });
}

#define KERNELS(NAME, P)                                                                                              \
    extern "C" __global__ void __launch_bounds__(P::THREADS, 1)                                                        \
        linear_backward_input_##NAME(const __grid_constant__ LinearBackwardArgs a) {                                  \
        backward_input<P>(a);                                                                                         \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(P::THREADS, 1)                                                        \
        linear_backward_weight_##NAME(const __grid_constant__ LinearBackwardArgs a) {                                 \
        backward_weight<P>(a);                                                                                        \
    }
KERNELS(bf16, ProductBf16)
KERNELS(f32, ProductF32)
