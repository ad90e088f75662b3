// The operands of a linear map whose weights are up to three matrices of one width, stacked: q, k and v of a layer; gate
// and up projection.
#pragma once
#include "common.cuh"

constexpr unsigned PARTS = 3;

enum Epilogue : uint32_t { ASSIGN = 0, ADD = 1, GLU = 2 };

// blockIdx.z is the matrix; of a gated linear unit there is one output, act(x * W0^T + b0) * (x * W1^T + b1).
struct PartsArgs {
    // [rows, cols]
    const void* weights[PARTS];
    // [rows] or null
    const void* biases[PARTS];
    // [tokens, cols]
    const void* x;
    // [tokens, out_stride]
    void* out;
    // `columns`: where a matrix's first row is in `out`.
    uint32_t rows[PARTS], columns[PARTS], dtypes[PARTS], bias_dtypes[PARTS];
    uint32_t tokens, cols, out_stride;
    // `out` is bf16, not f32. ADD is to f32.
    uint32_t out_bf16;
    uint32_t epilogue, activation;
    // Of gemv.cu: tiles of x that are held in shared memory at a time.
    uint32_t segment;
};

struct Part {
    const uint8_t* weights;
    const void* biases;
    uint32_t rows, column, dtype, bias_dtype;
    __device__ __forceinline__ float bias(uint32_t row) const {
        return biases ? load_float(biases, bias_dtype, row) : 0.f;
    }
};
__device__ __forceinline__ Part part(const PartsArgs& a, unsigned p) {
    const auto pick = [p](auto x, auto y, auto z) { return p == 0 ? x : p == 1 ? y : z; };
    return {static_cast<const uint8_t*>(pick(a.weights[0], a.weights[1], a.weights[2])),
            pick(a.biases[0], a.biases[1], a.biases[2]),
            pick(a.rows[0], a.rows[1], a.rows[2]),
            pick(a.columns[0], a.columns[1], a.columns[2]),
            pick(a.dtypes[0], a.dtypes[1], a.dtypes[2]),
            pick(a.bias_dtypes[0], a.bias_dtypes[1], a.bias_dtypes[2])};
}

// Writes the finished sum `y`, its bias added, to element `at` of the output.
__device__ __forceinline__ void put(const PartsArgs& a, size_t at, float y) {
    if (a.out_bf16) static_cast<bf16*>(a.out)[at] = from_float<bf16>(y);
    else if (a.epilogue == ADD) static_cast<float*>(a.out)[at] += y;
    else static_cast<float*>(a.out)[at] = y;
}
