// Linear maps in precision f32: out = x * W^T (+ bias) with plain multiply-adds, weights of any dtype expanded exactly.
//
// `linear_f32` is for many tokens: 64 tokens by 64 rows a block. `linear_row_f32` is for a few: a warp a row.
// `linear_row_bf16` is the same with x in bf16: for what gemv.cu does not take, plain rows that don't begin at multiples
// of 16 bytes and gate and up projections of two dtypes. The additions of one output are in one order, whatever the
// other tokens and rows. Dtypes are data: the matrices of a launch may differ in them.
#include "weights.cuh"

template <int X>
__device__ __forceinline__ void x8(const PartsArgs& a, uint32_t token, uint32_t column, float (&out)[8]) {
    elements8<X>(static_cast<const uint8_t*>(a.x), token, column, a.cols, out);
}

// Tiles of shared memory are [depth, 64]: element (k, i) is at 64 k + (i ^ k / 4 * 4), so that neither the stores, four or
// eight k's of one i a thread, nor the loads, four i's of one k, meet in a bank.
constexpr unsigned SIDE = 64, DEPTH = 32, THREADS = 256, EACH = 4;
static_assert(SIDE * DEPTH == THREADS * 8 && SIDE * SIDE == THREADS * EACH * EACH);

__device__ __forceinline__ void store_tile(float (&tile)[DEPTH][SIDE], unsigned i, unsigned k, float4 v) {
    tile[k][i ^ k] = v.x, tile[k + 1][i ^ k] = v.y, tile[k + 2][i ^ k] = v.z, tile[k + 3][i ^ k] = v.w;
}
__device__ __forceinline__ float4 load_tile(const float (&tile)[DEPTH][SIDE], unsigned k, unsigned i) {
    return *reinterpret_cast<const float4*>(&tile[k][i ^ k / 4 * 4]);
}
__device__ __forceinline__ bool is_plain(uint32_t dtype) { return dtype == F32 || dtype == F16 || dtype == BF16; }

// Row i of a block's 64: of a GLU, gate and up in turn.
extern "C" __global__ void __launch_bounds__(THREADS, 3) linear_f32(const __grid_constant__ PartsArgs a) {
    __shared__ __align__(16) float tiles[2][DEPTH][SIDE];
    auto &w_tile = tiles[0], &x_tile = tiles[1];
    const bool glu = a.epilogue == GLU;
    const Part w = part(a, blockIdx.z), up = part(a, 1);
    const uint32_t rows_each = glu ? SIDE / 2 : SIDE;
    const uint32_t first_row = blockIdx.x * rows_each, first_token = blockIdx.y * SIDE;
    if (first_row >= w.rows) return;
    // What this thread brings: of blocks, eight columns of row `i8`; of x and plain weights, four of row `i4` and of the
    // row 32 further, so that neighbours read neighbours.
    const unsigned i8 = threadIdx.x / (DEPTH / 8), k8 = threadIdx.x % (DEPTH / 8) * 8;
    const unsigned i4 = threadIdx.x / (DEPTH / 4), k4 = threadIdx.x % (DEPTH / 4) * 4;
    const Part w8 = part(a, glu ? i8 % 2 : blockIdx.z), w4 = part(a, glu ? i4 % 2 : blockIdx.z);
    const bool blocks = !is_plain(w8.dtype), plain = is_plain(w4.dtype);
    const auto row = [&](unsigned i) { return first_row + (glu ? i / 2 : i); };
    // What it computes: four rows of four tokens.
    const unsigned r = threadIdx.x % (SIDE / EACH) * EACH, t = threadIdx.x / (SIDE / EACH) * EACH;
    float sums[EACH][EACH] = {};
    for (uint32_t column = 0; column < a.cols; column += DEPTH) {
        float v8[8] = {};
        if (blocks && row(i8) < w.rows && column + k8 < a.cols) weights8(w8, row(i8), column + k8, a.cols, v8);
        const unsigned left = column + k4 < a.cols ? a.cols - column - k4 : 0;
        const auto quad = [&](const void* from, uint32_t dtype, uint32_t at, uint32_t rows) {
            return load_float4(from, dtype, size_t(at) * a.cols + column + k4, at < rows ? left : 0);
        };
        float4 v4[2], x4[2];
#pragma unroll
        for (unsigned h = 0; h < 2; ++h) {
            const unsigned i = i4 + h * (SIDE / 2);
            if (plain) v4[h] = quad(w4.weights, w4.dtype, row(i), w.rows);
            x4[h] = quad(a.x, F32, first_token + i, a.tokens);
        }
        __syncthreads();
        if (blocks) {
            store_tile(w_tile, i8, k8, make_float4(v8[0], v8[1], v8[2], v8[3]));
            store_tile(w_tile, i8, k8 + 4, make_float4(v8[4], v8[5], v8[6], v8[7]));
        }
#pragma unroll
        for (unsigned h = 0; h < 2; ++h) {
            const unsigned i = i4 + h * (SIDE / 2);
            if (plain) store_tile(w_tile, i, k4, v4[h]);
            store_tile(x_tile, i, k4, x4[h]);
        }
        __syncthreads();
#pragma unroll 8
        for (unsigned d = 0; d < DEPTH; ++d) {
            const float4 wd = load_tile(w_tile, d, r), xd = load_tile(x_tile, d, t);
            const float ws[EACH] = {wd.x, wd.y, wd.z, wd.w}, xs[EACH] = {xd.x, xd.y, xd.z, xd.w};
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
        const float* sum = result + local_token * SIDE + local * (glu ? 2 : 1);
        float y = sum[0] + w.bias(to);
        if (glu) y = activate(a.activation, y) * (sum[1] + up.bias(to));
        put(a, size_t(first_token + local_token) * a.out_stride + w.column + to, y);
    }
}

constexpr unsigned WARPS = 4, TOKENS = 4;

// A warp has one row, of a gated linear unit of both matrices, and four tokens; of tokens past the last: the last.
template <int X> __device__ __forceinline__ void linear_row(const PartsArgs& a) {
    const Part w = part(a, blockIdx.z);
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / WARP, token = blockIdx.y * TOKENS;
    const unsigned lane = threadIdx.x % WARP;
    if (row >= w.rows) return;
    // Of lane t: the outputs of token t.
    float y = 0.f;
#pragma unroll 1
    for (unsigned p = 0; p < (a.epilogue == GLU ? 2 : 1); ++p) {
        const Part of = part(a, blockIdx.z + p);
        float sums[TOKENS] = {};
#pragma unroll 1
        for (uint32_t column = lane * 8; column < a.cols; column += WARP * 8) {
            float v[8];
            weights8(of, row, column, a.cols, v);
#pragma unroll
            for (unsigned t = 0; t < TOKENS; ++t) {
                float x[8];
                x8<X>(a, min(token + t, a.tokens - 1), column, x);
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[t] = fmaf(v[i], x[i], sums[t]);
            }
        }
        float mine = 0.f;
#pragma unroll
        for (unsigned t = 0; t < TOKENS; ++t) {
            const float sum = warp_sum(sums[t]);
            if (lane == t) mine = sum;
        }
        mine += of.bias(row);
        y = p == 0 ? mine : activate(a.activation, y) * mine;
    }
    if (lane < TOKENS && token + lane < a.tokens) {
        put(a, size_t(token + lane) * a.out_stride + w.column + row, y);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) linear_row_f32(const __grid_constant__ PartsArgs a) {
    linear_row<F32>(a);
}
extern "C" __global__ void __launch_bounds__(WARPS * WARP) linear_row_bf16(const __grid_constant__ PartsArgs a) {
    linear_row<BF16>(a);
}
