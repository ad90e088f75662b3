// The fuser: the projections of the keys and values of any number of layers as one grouped problem. blockIdx.z is the
// problem: one half of one layer. docs/math.md, "The fuser".
//
// Every product is [tokens, cols] by [rows, cols], its x the columns of one or two caches, gathered by slot, or rows of
// scratch, which are a cache of one head in blocks of one. Its epilogue says where the sums go, at the end straight into
// the receiver's pages. The residual stream z, the weights of heads and the gated sum are f32.
//
// `fuse_128` and `fuse_64` copy bf16 16 bytes at a time into the ring of matmul.cuh; `fuse_any_weights` converts weights
// of other types on the way; `fuse_any` takes every type and width an element at a time; `fuse_f32` is precision f32,
// with plain multiply-adds.
#include "blocks.cuh"
#include "columns.cuh"
#include "matmul.cuh"

// A matrix [rows, cols] and its bias, or the weight of a norm as the vector.
struct FuseMatrix {
    const void* weights;
    const void* vector;
    uint32_t dtype, vector_dtype;
};

// The pages of a problem.
struct FuseProblem {
    const void* source;
    const void* target;
    const void* base;
    void* out;
    float gate;
    uint32_t unused;
};

enum FuseEpilogue : uint32_t {
    TO_Z = 0,        // z = y
    ADD_TO_Z = 1,    // z += y
    TO_ROWS = 2,     // out = y
    TO_GELU = 3,     // out = gelu(y)
    Z_TO_ROWS = 4,   // out = z + y
    TO_WEIGHTS = 5,  // weights = sigmoid(y)
    TO_PAGES = 6     // out pages = base + gate * weight * y, less gate * target if that is replaced
};

struct FuseArgs {
    const FuseMatrix* matrices;   // [problems, matrices_each]
    const FuseProblem* problems;  // [problems]
    // Null: the source's pages. Else [problems, tokens, first.dim].
    const void* x;
    float* z;      // [problems, tokens, z_stride]
    void* out;     // [problems, tokens, out_stride]
    float* weights;  // [problems, tokens, target.heads], or null: all 1
    FuseColumns first, second;  // of x, the second from the target's pages; of width 0: none
    FuseColumns target, base, to;
    uint32_t tokens, rows, cols;
    // The product's place among the matrices.
    uint32_t matrix, matrices_each;
    uint32_t z_stride, out_stride;
    uint32_t epilogue;
    uint32_t replaces_target;
    float eps;
};

__device__ __forceinline__ const FuseMatrix& matrix_of(const FuseArgs& a) {
    return a.matrices[size_t(blockIdx.z) * a.matrices_each + a.matrix];
}

__device__ __forceinline__ const uint8_t* first_columns(const FuseArgs& a, const FuseProblem& problem,
                                                        unsigned element) {
    if (!a.x) return static_cast<const uint8_t*>(problem.source);
    return static_cast<const uint8_t*>(a.x) + size_t(blockIdx.z) * a.tokens * a.first.dim * element;
}

// Loader of x: heads of a multiple of eight bf16. See `DirectRows`.
template <unsigned TILE_ROWS> struct DirectColumns {
    static constexpr unsigned EACH = TILE_ROWS / ROWS_AT_ONCE;
    const FuseArgs& a;
    const bf16 *first, *second;
    uint32_t first_rows[EACH], second_rows[EACH];
    unsigned rows;

    __device__ __forceinline__ DirectColumns(const FuseArgs& a, const FuseProblem& problem, uint32_t first_token)
        : a(a),
          first(reinterpret_cast<const bf16*>(first_columns(a, problem, sizeof(bf16)))),
          second(static_cast<const bf16*>(problem.target)) {
        const uint32_t token = first_token + threadIdx.x / PIECES;
        rows = own_rows(token, a.tokens);
#pragma unroll
        for (unsigned i = 0; i < EACH; ++i) {
            const uint32_t mine = min(token + i * ROWS_AT_ONCE, a.tokens - 1);
            first_rows[i] = column_row(a.first, mine);
            second_rows[i] = a.second.width ? column_row(a.second, mine) : 0;
        }
    }

    __device__ __forceinline__ void fetch(uint32_t tile, uint32_t to) const {
        const unsigned piece = threadIdx.x % PIECES;
        uint32_t k = tile * DEPTH + piece * 8;
        const bool from_first = k < a.first.width;
        const FuseColumns& c = from_first ? a.first : a.second;
        const bf16* data = from_first ? first : second;
        if (!from_first) k -= a.first.width;
        const uint32_t bytes = k < c.width ? min(16u, (c.width - k) * 2) : 0;
        const uint32_t head = bytes ? k / c.dim : 0, within = k - head * c.dim;
#pragma unroll
        for (unsigned i = 0; i < EACH; ++i) {
            const uint32_t row = (from_first ? first_rows[i] : second_rows[i]) + head * c.block_size;
            cp_async16(to + place<X_KEY>(threadIdx.x / PIECES + i * ROWS_AT_ONCE, piece),
                       data + size_t(row) * c.dim + within, i < rows ? bytes : 0);
        }
    }
};

// Elements k..k + 7 of x of a token, and of a row of W, of any type; zeros past the last.
struct AnyColumns {
    const FuseArgs& a;
    const void *first, *second;
    uint32_t first_token;

    __device__ __forceinline__ AnyColumns(const FuseArgs& a, const FuseProblem& problem, uint32_t first_token)
        : a(a),
          first(first_columns(a, problem, a.first.dtype == F32 ? 4 : 2)),
          second(problem.target),
          first_token(first_token) {}

    __device__ __forceinline__ void load(unsigned n, uint32_t k, float (&v)[8]) const {
        const uint32_t token = first_token + n;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = 0.f;
        if (token >= a.tokens) return;
        const uint32_t row = column_row(a.first, token), other = a.second.width ? column_row(a.second, token) : 0;
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            if (k + i < a.first.width) {
                v[i] = load_float(first, a.first.dtype, column_element(a.first, row, k + i));
            } else if (k + i < a.first.width + a.second.width) {
                v[i] = load_float(second, a.second.dtype, column_element(a.second, other, k + i - a.first.width));
            }
        }
    }
};
struct AnyRows {
    const uint8_t* weights;
    uint32_t dtype, first, rows, cols;

    __device__ __forceinline__ void load(unsigned n, uint32_t k, float (&v)[8]) const {
        const uint32_t row = first + n;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = 0.f;
        if (row >= rows || k >= cols) return;
        const size_t at = size_t(row) * cols + k;
        if (cols % 8 == 0) {
            if (dtype == F32) Block<F32>::decode8(weights + at * 4, 0, v);
            else if (dtype == F16) Block<F16>::decode8(weights + at * 2, 0, v);
            else Block<BF16>::decode8(weights + at * 2, 0, v);
            return;
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            if (k + i < cols) v[i] = load_float(weights, dtype, at + i);
        }
    }
};

// A loader of the ring that stores what `E` reads.
template <typename E, unsigned TILE_ROWS, unsigned KEY> struct Converted {
    const E& elements;
    uint8_t* shared;

    __device__ __forceinline__ void fetch(uint32_t tile, uint32_t to) const {
        const unsigned piece = threadIdx.x % PIECES;
#pragma unroll 1
        for (unsigned i = 0; i < TILE_ROWS / ROWS_AT_ONCE; ++i) {
            const unsigned n = threadIdx.x / PIECES + i * ROWS_AT_ONCE;
            float v[8];
            elements.load(n, tile * DEPTH + piece * 8, v);
            *reinterpret_cast<uint4*>(shared + (to - shared_address(shared)) + place<KEY>(n, piece)) =
                make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
        }
    }
};

// Four neighbours of a row of scratch or of a page.
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 load4(const bf16* p) {
    const uint2 words = *reinterpret_cast<const uint2*>(p);
    return make_float4(__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u),
                       __uint_as_float(words.y << 16), __uint_as_float(words.y & 0xffff0000u));
}
__device__ __forceinline__ void store4(float* p, float4 y) { *reinterpret_cast<float4*>(p) = y; }
__device__ __forceinline__ void store4(bf16* p, float4 y) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
}
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Elements of a page of either type.
__device__ __forceinline__ float4 page_quad(const void* pages, uint32_t dtype, size_t at) {
    return dtype == F32 ? load4(static_cast<const float*>(pages) + at) : load4(static_cast<const bf16*>(pages) + at);
}

// What becomes of the sums of one token. T: of activations. Rows of scratch are padded to a multiple of four.
template <typename T> struct Finish {
    const FuseArgs& a;
    const FuseMatrix& matrix;
    const FuseProblem& problem;
    uint32_t token;
    size_t line;
    uint32_t base, target, to;
    uint32_t head;
    float factor;

    __device__ __forceinline__ Finish(const FuseArgs& a, const FuseMatrix& matrix, const FuseProblem& problem,
                                      uint32_t token)
        : a(a), matrix(matrix), problem(problem), token(token), line(size_t(blockIdx.z) * a.tokens + token), head(~0u) {
        if (a.epilogue == TO_PAGES) {
            base = column_row(a.base, token), to = column_row(a.to, token);
            if (a.replaces_target) target = column_row(a.target, token);
        }
    }

    // gate * weight of a head.
    __device__ __forceinline__ float factor_of(uint32_t of) {
        if (of != head) {
            head = of;
            factor = problem.gate * (a.weights ? a.weights[line * a.target.heads + head] : 1.f);
        }
        return factor;
    }

    // One element of the output column.
    __device__ __forceinline__ void put_page(uint32_t k, float y) {
        float x = page_element(problem.base, a.base.dtype, column_element(a.base, base, k));
        if (a.replaces_target) {
            x -= problem.gate * page_element(problem.target, a.target.dtype, column_element(a.target, target, k));
        }
        y = x + factor_of(k / a.to.dim) * y;
        const size_t at = column_element(a.to, to, k);
        if (a.to.dtype == F32) static_cast<float*>(problem.out)[at] = y;
        else static_cast<bf16*>(problem.out)[at] = from_float<bf16>(y);
    }
    __device__ __forceinline__ void put_page4(uint32_t k, float4 y) {
        float4 x = page_quad(problem.base, a.base.dtype, column_element(a.base, base, k));
        if (a.replaces_target) {
            const float4 t = page_quad(problem.target, a.target.dtype, column_element(a.target, target, k));
            const float g = problem.gate;
            x = make_float4(x.x - g * t.x, x.y - g * t.y, x.z - g * t.z, x.w - g * t.w);
        }
        const float f = factor_of(k / a.to.dim);
        y = make_float4(x.x + f * y.x, x.y + f * y.y, x.z + f * y.z, x.w + f * y.w);
        const size_t at = column_element(a.to, to, k);
        if (a.to.dtype == F32) store4(static_cast<float*>(problem.out) + at, y);
        else store4(static_cast<bf16*>(problem.out) + at, y);
    }

    // The sums of rows row..row + 3.
    __device__ __forceinline__ void put(uint32_t row, float4 y) {
        if (row >= a.rows) return;
        const unsigned n = min(4u, a.rows - row);
        if (matrix.vector) y = sum4(y, load_float4(matrix.vector, matrix.vector_dtype, row, n));
        // Past the last row there is padding.
        float* z = a.z + line * a.z_stride + row;
        T* out = static_cast<T*>(a.out) + line * a.out_stride + row;
        switch (a.epilogue) {
            case TO_Z: return store4(z, y);
            case ADD_TO_Z: return store4(z, sum4(load4(z), y));
            case Z_TO_ROWS: return store4(out, sum4(load4(z), y));
            case TO_ROWS: return store4(out, y);
            case TO_GELU:
                return store4(out, make_float4(activate(GELU_ERF, y.x), activate(GELU_ERF, y.y),
                                               activate(GELU_ERF, y.z), activate(GELU_ERF, y.w)));
            case TO_WEIGHTS: {
                float* weights = a.weights + line * a.target.heads + row;
                y = make_float4(sigmoid(y.x), sigmoid(y.y), sigmoid(y.z), sigmoid(y.w));
                if (a.target.heads % 4 == 0) return store4(weights, y);
                weights[0] = y.x;
                if (n > 1) weights[1] = y.y;
                if (n > 2) weights[2] = y.z;
                if (n > 3) weights[3] = y.w;
                return;
            }
            case TO_PAGES:
                if (a.to.dim % 4 == 0) return put_page4(row, y);
                put_page(row, y.x);
                if (n > 1) put_page(row + 1, y.y);
                if (n > 2) put_page(row + 2, y.z);
                if (n > 3) put_page(row + 3, y.w);
                return;
        }
    }
};

// Calls `f` with a loader of the rows of W.
template <typename S, bool DIRECT, typename F>
__device__ __forceinline__ void with_rows(const FuseArgs& a, const FuseMatrix& matrix, uint32_t first_row,
                                          uint8_t* shared, F f) {
    if constexpr (DIRECT) {
        const uint32_t row = first_row + threadIdx.x / PIECES;
        const DirectRows<S::ROWS, W_KEY> w{static_cast<const bf16*>(matrix.weights) + size_t(row) * a.cols,
                                           size_t(ROWS_AT_ONCE) * a.cols, own_rows(row, a.rows), a.cols};
        f(w);
    } else {
        const AnyRows rows{static_cast<const uint8_t*>(matrix.weights), matrix.dtype, first_row, a.rows, a.cols};
        f(Converted<AnyRows, S::ROWS, W_KEY>{rows, shared});
    }
}

// Grid (tokens / S::TOKENS, rows / S::ROWS, problems).
template <typename S, bool DIRECT_X, bool DIRECT_W> __device__ __forceinline__ void fuse(const FuseArgs& a) {
    extern __shared__ uint4 dynamic[];
    uint8_t* shared = reinterpret_cast<uint8_t*>(dynamic);
    const FuseMatrix matrix = matrix_of(a);
    const FuseProblem problem = a.problems[blockIdx.z];
    const uint32_t first_token = blockIdx.x * S::TOKENS, first_row = blockIdx.y * S::ROWS;
    Sums<S> sums;
    with_rows<S, DIRECT_W>(a, matrix, first_row, shared, [&](const auto& w) {
        if constexpr (DIRECT_X) {
            matmul<S>(shared, a.cols, DirectColumns<S::TOKENS>(a, problem, first_token), w, sums);
        } else {
            const AnyColumns columns(a, problem, first_token);
            matmul<S>(shared, a.cols, Converted<AnyColumns, S::TOKENS, X_KEY>{columns, shared}, w, sums);
        }
    });
    sums.each_token([&](unsigned token, unsigned band, unsigned half) {
        if (first_token + token >= a.tokens) return;
        Finish<bf16> finish(a, matrix, problem, first_token + token);
#pragma unroll
        for (unsigned pair = 0; pair < Sums<S>::PAIRS; ++pair) {
            finish.put(first_row + Sums<S>::row(pair), sums.quad(band, pair, half));
        }
    });
}

extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, 2) fuse_128(const __grid_constant__ FuseArgs a) {
    fuse<Shape<128, 128, 64, 64>, true, true>(a);
}
extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, 4) fuse_64(const __grid_constant__ FuseArgs a) {
    fuse<Shape<64, 64, 32, 32>, true, true>(a);
}
extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, 3) fuse_any_weights(const __grid_constant__ FuseArgs a) {
    fuse<Shape<64, 64, 32, 32>, true, false>(a);
}
extern "C" __global__ void __launch_bounds__(MATMUL_THREADS, 3) fuse_any(const __grid_constant__ FuseArgs a) {
    fuse<Shape<64, 64, 32, 32>, false, false>(a);
}

// 64 tokens by 64 rows, four by four a thread. Tiles of shared memory are [k, 64], element i of row k at i ^ k / 8 * 8:
// neither the stores, eight k's of one i a thread, nor the loads meet in a bank.
constexpr unsigned SIDE = 64, PLAIN_THREADS = 256, EACH = 4;
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS, 2) fuse_f32(const __grid_constant__ FuseArgs a) {
    __shared__ __align__(16) float x_tile[DEPTH][SIDE], w_tile[DEPTH][SIDE];
    const FuseMatrix matrix = matrix_of(a);
    const FuseProblem problem = a.problems[blockIdx.z];
    const uint32_t first_token = blockIdx.x * SIDE, first_row = blockIdx.y * SIDE;
    const AnyColumns columns(a, problem, first_token);
    const AnyRows rows{static_cast<const uint8_t*>(matrix.weights), matrix.dtype, first_row, a.rows, a.cols};
    const unsigned n = threadIdx.x / PIECES, piece = threadIdx.x % PIECES * 8;
    const unsigned r = threadIdx.x % (SIDE / EACH) * EACH, t = threadIdx.x / (SIDE / EACH) * EACH;
    float sums[EACH][EACH] = {};
#pragma unroll 1
    for (uint32_t column = 0; column < a.cols; column += DEPTH) {
        float x[8], w[8];
        columns.load(n, column + piece, x);
        rows.load(n, column + piece, w);
        __syncthreads();
#pragma unroll
        for (unsigned i = 0; i < 8; ++i) x_tile[piece + i][n ^ piece] = x[i], w_tile[piece + i][n ^ piece] = w[i];
        __syncthreads();
#pragma unroll 8
        for (unsigned k = 0; k < DEPTH; ++k) {
            const float4 x4 = load4(&x_tile[k][t ^ k / 8 * 8]), w4 = load4(&w_tile[k][r ^ k / 8 * 8]);
            const float xs[EACH] = {x4.x, x4.y, x4.z, x4.w}, ws[EACH] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
            for (unsigned i = 0; i < EACH; ++i) {
#pragma unroll
                for (unsigned j = 0; j < EACH; ++j) sums[i][j] = fmaf(xs[i], ws[j], sums[i][j]);
            }
        }
    }
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        const uint32_t token = first_token + t + i;
        if (token >= a.tokens) continue;
        Finish<float> finish(a, matrix, problem, token);
        finish.put(first_row + r, make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
    }
}

// out = z / sqrt(mean(z^2) + eps) * weight, for each row of z. Grid (tokens, 1, problems).
constexpr unsigned NORM_WARPS = 4, NORM_THREADS = NORM_WARPS * WARP, HELD = 4;
template <typename T> __device__ __forceinline__ void fuse_norm(const FuseArgs& a) {
    __shared__ float scratch[NORM_WARPS];
    const FuseMatrix matrix = matrix_of(a);
    const size_t line = size_t(blockIdx.z) * a.tokens + blockIdx.x;
    const float* z = a.z + line * a.z_stride;
    T* out = static_cast<T*>(a.out) + line * a.out_stride;
    // Padding counts as zeros; the first HELD vectors are kept in registers, which is all of them up to 2048 columns.
    const auto load = [&](uint32_t k) {
        float4 x = load4(z + k);
        if (k + 1 >= a.cols) x.y = 0.f;
        if (k + 2 >= a.cols) x.z = 0.f;
        if (k + 3 >= a.cols) x.w = 0.f;
        return x;
    };
    const auto square = [](float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; };
    float4 held[HELD];
    float squares = 0.f;
#pragma unroll
    for (unsigned i = 0; i < HELD; ++i) {
        const uint32_t k = (i * NORM_THREADS + threadIdx.x) * 4;
        if (k < a.cols) held[i] = load(k), squares += square(held[i]);
    }
    for (uint32_t k = (HELD * NORM_THREADS + threadIdx.x) * 4; k < a.cols; k += NORM_THREADS * 4) {
        squares += square(load(k));
    }
    const float scale = 1.f / sqrtf(block_sum<NORM_WARPS>(squares, scratch) / float(a.cols) + a.eps);
    const auto put = [&](uint32_t k, float4 x) {
        const float4 w = load_float4(matrix.vector, matrix.vector_dtype, k, min(4u, a.cols - k));
        store4(out + k, make_float4(x.x * scale * w.x, x.y * scale * w.y, x.z * scale * w.z, x.w * scale * w.w));
    };
#pragma unroll
    for (unsigned i = 0; i < HELD; ++i) {
        const uint32_t k = (i * NORM_THREADS + threadIdx.x) * 4;
        if (k < a.cols) put(k, held[i]);
    }
    for (uint32_t k = (HELD * NORM_THREADS + threadIdx.x) * 4; k < a.cols; k += NORM_THREADS * 4) put(k, load(k));
}
extern "C" __global__ void __launch_bounds__(NORM_THREADS) fuse_norm_bf16(const __grid_constant__ FuseArgs a) {
    fuse_norm<bf16>(a);
}
extern "C" __global__ void __launch_bounds__(NORM_THREADS) fuse_norm_f32(const __grid_constant__ FuseArgs a) {
    fuse_norm<float>(a);
}
