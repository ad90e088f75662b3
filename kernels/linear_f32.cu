// Linear maps in precision f32: out = x * W^T (+ bias) with plain multiply-adds, weights of any dtype expanded exactly.
//
// `linear_f32_*` is for many tokens: 64 tokens by 64 rows a block. `linear_row_f32_*` is for a few: a warp a row.
// `linear_row_bf16_*` is the same with x in bf16: for plain weights whose rows gemv.cu cannot read 16 bytes at a time.
// The additions of one output are in one order, whatever the other tokens and rows.
#include "blocks.cuh"

constexpr unsigned PARTS = 3;

enum Epilogue : uint32_t { ASSIGN = 0, ADD = 1, GLU = 2 };

// Up to three matrices of one dtype and one width, blockIdx.z the matrix; of a GLU: gate and up projection, together.
struct LinearF32Args {
    // [rows, cols]
    const void* weights[PARTS];
    // [rows] or null
    const void* biases[PARTS];
    // [tokens, cols]
    const void* x;
    // [tokens, out_stride]
    void* out;
    // `columns`: where a matrix's first row is in `out`.
    uint32_t rows[PARTS], columns[PARTS], bias_dtypes[PARTS];
    uint32_t tokens, cols, out_stride;
    uint32_t epilogue, activation;
    // Of `linear_row_bf16_*`: `out` is bf16, not f32; ADD needs f32.
    uint32_t out_bf16;
};

struct Part {
    const uint8_t* weights;
    const void* biases;
    uint32_t rows, column, bias_dtype;
};
__device__ __forceinline__ Part part(const LinearF32Args& a, unsigned p) {
    const auto pick = [p](auto x, auto y, auto z) { return p == 0 ? x : p == 1 ? y : z; };
    return {static_cast<const uint8_t*>(pick(a.weights[0], a.weights[1], a.weights[2])),
            pick(a.biases[0], a.biases[1], a.biases[2]), pick(a.rows[0], a.rows[1], a.rows[2]),
            pick(a.columns[0], a.columns[1], a.columns[2]),
            pick(a.bias_dtypes[0], a.bias_dtypes[1], a.bias_dtypes[2])};
}
__device__ __forceinline__ float bias(const Part& w, uint32_t row) {
    return w.biases ? load_float(w.biases, w.bias_dtype, row) : 0.f;
}

// Columns column..column + 7 of row `row` as f32, zeros past the last. Rows of plain types may have any length.
template <int CODE>
__device__ __forceinline__ void weights8(const Part& w, uint32_t row, uint32_t column, uint32_t cols,
                                         float (&out)[8]) {
    using Format = Block<CODE>;
    if constexpr (Format::LEN == 8) {
        if (cols % 8 != 0) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                out[i] = column + i < cols ? load_float(w.weights, CODE, size_t(row) * cols + column + i) : 0.f;
            }
            return;
        }
    }
    const size_t blocks = size_t(row) * (cols / Format::LEN) + column / Format::LEN;
    Format::decode8(w.weights + blocks * Format::BYTES, column % Format::LEN, out);
}
template <int X>
__device__ __forceinline__ void x8(const LinearF32Args& a, uint32_t token, uint32_t column, float (&out)[8]) {
    Part x = {};
    x.weights = static_cast<const uint8_t*>(a.x);
    weights8<X>(x, token, column, a.cols, out);
}

// Tiles of shared memory are [depth, 64]: element (k, i) is at 64 k + (i ^ k / 8 * 8), so that neither the stores, eight
// k's of one i a thread, nor the loads, four i's of one k, meet in a bank.
constexpr unsigned SIDE = 64, DEPTH = 32, THREADS = 256, EACH = 4;
static_assert(SIDE * DEPTH == THREADS * 8 && SIDE * SIDE == THREADS * EACH * EACH);

__device__ __forceinline__ void store_tile(float (&tile)[DEPTH][SIDE], unsigned i, unsigned k, const float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) tile[k + j][i ^ k] = v[j];
}
__device__ __forceinline__ float4 load_tile(const float (&tile)[DEPTH][SIDE], unsigned k, unsigned i) {
    return *reinterpret_cast<const float4*>(&tile[k][i ^ k / 8 * 8]);
}

// Row i of a block's 64: of a GLU, gate and up in turn.
template <int CODE> __device__ __forceinline__ void linear_f32(const LinearF32Args& a) {
    __shared__ __align__(16) float tiles[2][DEPTH][SIDE];
    auto &w_tile = tiles[0], &x_tile = tiles[1];
    const bool glu = a.epilogue == GLU;
    const Part w = part(a, blockIdx.z), up = part(a, 1);
    const uint32_t rows_each = glu ? SIDE / 2 : SIDE, first_row = blockIdx.x * rows_each, first_token = blockIdx.y * SIDE;
    if (first_row >= w.rows) return;
    // What this thread brings: eight columns of one row and one token.
    const unsigned i = threadIdx.x / (DEPTH / 8), k = threadIdx.x % (DEPTH / 8) * 8;
    const uint32_t row = first_row + (glu ? i / 2 : i), token = first_token + i;
    // What it computes: four rows of four tokens.
    const unsigned r = threadIdx.x % (SIDE / EACH) * EACH, t = threadIdx.x / (SIDE / EACH) * EACH;
    float sums[EACH][EACH] = {};
    for (uint32_t column = 0; column < a.cols; column += DEPTH) {
        float v[8] = {};
        if (row < w.rows && column + k < a.cols) weights8<CODE>(glu && i % 2 ? up : w, row, column + k, a.cols, v);
        float u[8] = {};
        if (token < a.tokens && column + k < a.cols) x8<F32>(a, token, column + k, u);
        __syncthreads();
        store_tile(w_tile, i, k, v);
        store_tile(x_tile, i, k, u);
        __syncthreads();
#pragma unroll 8
        for (unsigned d = 0; d < DEPTH; ++d) {
            const float4 w4 = load_tile(w_tile, d, r), x4 = load_tile(x_tile, d, t);
            const float ws[EACH] = {w4.x, w4.y, w4.z, w4.w}, xs[EACH] = {x4.x, x4.y, x4.z, x4.w};
#pragma unroll
            for (unsigned y = 0; y < EACH; ++y) {
#pragma unroll
                for (unsigned x = 0; x < EACH; ++x) sums[y][x] = fmaf(xs[y], ws[x], sums[y][x]);
            }
        }
    }
    // Through shared memory, [tokens, rows], so that neighbours write neighbours.
    static_assert(sizeof(tiles) == SIDE * SIDE * sizeof(float));
    float* result = &tiles[0][0][0];
    __syncthreads();
#pragma unroll
    for (unsigned y = 0; y < EACH; ++y) {
        const float4 quad = make_float4(sums[y][0], sums[y][1], sums[y][2], sums[y][3]);
        *reinterpret_cast<float4*>(result + (t + y) * SIDE + r) = quad;
    }
    __syncthreads();
#pragma unroll 1
    for (unsigned at = threadIdx.x; at < SIDE * rows_each; at += THREADS) {
        const unsigned local_token = at / rows_each, local = at % rows_each;
        const uint32_t to = first_row + local;
        if (to >= w.rows || first_token + local_token >= a.tokens) continue;
        float* out = static_cast<float*>(a.out) + size_t(first_token + local_token) * a.out_stride + w.column + to;
        const float* sum = result + local_token * SIDE + local * (glu ? 2 : 1);
        float y = sum[0] + bias(w, to);
        if (glu) y = activate(a.activation, y) * (sum[1] + bias(up, to));
        *out = a.epilogue == ADD ? *out + y : y;
    }
}

constexpr unsigned WARPS = 4, TOKENS = 4;

// Row `row` times four tokens from `token` on, in all lanes; of tokens past the last: the last.
template <int CODE, int X>
__device__ __forceinline__ void row_sums(const LinearF32Args& a, const Part& w, uint32_t row, uint32_t token,
                                         float (&sums)[TOKENS]) {
#pragma unroll
    for (unsigned t = 0; t < TOKENS; ++t) sums[t] = 0.f;
    for (uint32_t column = threadIdx.x % WARP * 8; column < a.cols; column += WARP * 8) {
        float v[8];
        weights8<CODE>(w, row, column, a.cols, v);
#pragma unroll
        for (unsigned t = 0; t < TOKENS; ++t) {
            float x[8];
            x8<X>(a, min(token + t, a.tokens - 1), column, x);
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[t] = fmaf(v[i], x[i], sums[t]);
        }
    }
#pragma unroll
    for (unsigned t = 0; t < TOKENS; ++t) sums[t] = warp_sum(sums[t]);
}

template <int CODE, int X> __device__ __forceinline__ void linear_row(const LinearF32Args& a) {
    const Part w = part(a, blockIdx.z);
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / WARP, token = blockIdx.y * TOKENS;
    if (row >= w.rows) return;
    float sums[TOKENS], ups[TOKENS] = {};
    row_sums<CODE, X>(a, w, row, token, sums);
    const bool glu = a.epilogue == GLU;
    const Part up = part(a, 1);
    if (glu) row_sums<CODE, X>(a, up, row, token, ups);
    const unsigned lane = threadIdx.x % WARP;
    float y = 0.f, other = 0.f;
#pragma unroll
    for (unsigned t = 0; t < TOKENS; ++t) {
        if (lane == t) y = sums[t], other = ups[t];
    }
    if (lane >= TOKENS || token + lane >= a.tokens) return;
    y += bias(w, row);
    if (glu) y = activate(a.activation, y) * (other + bias(up, row));
    const size_t at = size_t(token + lane) * a.out_stride + w.column + row;
    if (a.out_bf16) static_cast<bf16*>(a.out)[at] = from_float<bf16>(y);
    else if (a.epilogue == ADD) static_cast<float*>(a.out)[at] += y;
    else static_cast<float*>(a.out)[at] = y;
}

#define ROW_KERNEL(NAME, CODE, X)                                                                                     \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP, 8) NAME(const __grid_constant__ LinearF32Args a) {        \
        linear_row<CODE, X>(a);                                                                                       \
    }
#define KERNELS(NAME, CODE)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                          \
        linear_f32_##NAME(const __grid_constant__ LinearF32Args a) {                                                  \
        linear_f32<CODE>(a);                                                                                          \
    }                                                                                                                 \
    ROW_KERNEL(linear_row_f32_##NAME, CODE, F32)
KERNELS(f32, F32)
KERNELS(f16, F16)
KERNELS(bf16, BF16)
KERNELS(q4_0, Q4_0)
KERNELS(q4_1, Q4_1)
KERNELS(q5_0, Q5_0)
KERNELS(q5_1, Q5_1)
KERNELS(q8_0, Q8_0)
KERNELS(q2_k, Q2_K)
KERNELS(q3_k, Q3_K)
KERNELS(q4_k, Q4_K)
KERNELS(q5_k, Q5_K)
KERNELS(q6_k, Q6_K)
KERNELS(iq4_nl, IQ4_NL)
ROW_KERNEL(linear_row_bf16_f32, F32, BF16)
ROW_KERNEL(linear_row_bf16_f16, F16, BF16)
ROW_KERNEL(linear_row_bf16_bf16, BF16, BF16)
