// Weights whose type is data, eight elements of a row at a time as f32.
#pragma once
#include "blocks.cuh"
#include "parts.cuh"

template <int CODE>
__device__ __forceinline__ void elements8(const uint8_t* rows, uint32_t row, uint32_t column, uint32_t cols,
                                          float (&out)[8]) {
    using Format = Block<CODE>;
    if constexpr (Format::LEN == 8) {
        if (cols % 8 != 0) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                out[i] = column + i < cols ? load_float(rows, CODE, size_t(row) * cols + column + i) : 0.f;
            }
            return;
        }
    }
    const size_t blocks = size_t(row) * (cols / Format::LEN) + column / Format::LEN;
    Format::decode8(rows + blocks * Format::BYTES, column % Format::LEN, out);
}

// Columns column..column + 7 of row `row` as f32, zeros past the last. Rows of plain types may have any length.
__device__ __forceinline__ void weights8(const Part& w, uint32_t row, uint32_t column, uint32_t cols,
                                         float (&out)[8]) {
    switch (w.dtype) {
        case F32: return elements8<F32>(w.weights, row, column, cols, out);
        case F16: return elements8<F16>(w.weights, row, column, cols, out);
        case BF16: return elements8<BF16>(w.weights, row, column, cols, out);
        case Q4_0: return elements8<Q4_0>(w.weights, row, column, cols, out);
        case Q4_1: return elements8<Q4_1>(w.weights, row, column, cols, out);
        case Q5_0: return elements8<Q5_0>(w.weights, row, column, cols, out);
        case Q5_1: return elements8<Q5_1>(w.weights, row, column, cols, out);
        case Q8_0: return elements8<Q8_0>(w.weights, row, column, cols, out);
        case Q2_K: return elements8<Q2_K>(w.weights, row, column, cols, out);
        case Q3_K: return elements8<Q3_K>(w.weights, row, column, cols, out);
        case Q4_K: return elements8<Q4_K>(w.weights, row, column, cols, out);
        case Q5_K: return elements8<Q5_K>(w.weights, row, column, cols, out);
        case Q6_K: return elements8<Q6_K>(w.weights, row, column, cols, out);
        case IQ4_NL: return elements8<IQ4_NL>(w.weights, row, column, cols, out);
    }
}
