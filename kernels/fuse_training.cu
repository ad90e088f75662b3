// The fuser in training, forward and backward: all layers of a call, keys and values alike, as one grouped problem.
// docs/math.md, "Backward of the fuser". blockIdx.z is the problem: one half of one layer.
//
// What a problem works on (weights, their gradients, pages, rows between the steps) is a list of operands; a launch names
// them by their number there, so one launch does a step of all problems. Rows are f32. An FFN block keeps u, what its GELU
// reads, and the GELU is applied where rows are read; its row before the norm is the input of the block.
//
// Products are in bf16 on tensor cores with f32 sums, or in f32: product.cuh.
#include "columns.cuh"
#include "norm_backward.cuh"
#include "philox.cuh"
#include "product.cuh"
#include "sums.cuh"

struct FuseOperand {
    void* data;
    uint32_t dtype;
    uint32_t part;  // of operand 0: layer and half, see `ops::dropout_part`
};

// Twin of `backend::cuda::fuse_training::FuseTrainingArgs`. Each kernel says what it takes.
struct FuseTrainingArgs {
    const FuseOperand* operands;  // [problems, operands_each]
    uint32_t operands_each;
    // Numbers of operands; 0: there is none.
    uint32_t x, y, weight, bias, extra, out, dlogits;
    uint32_t tokens, rows, cols;
    // Of x, y and out. What is not said to have one has rows that follow one another.
    uint32_t x_stride, y_stride, out_stride;
    uint32_t gelu;  // x goes through it
    uint32_t add;   // to out
    // Of an FFN block: elements whose number is below `dropout` are 0, others are multiplied by `kept`.
    float dropout, kept;
    uint32_t seed[2], step, block;
    float eps;
    uint32_t replaces_target;
    FuseColumns columns, second, third;
};

struct Problem {
    const FuseTrainingArgs& a;
    const FuseOperand* operands;

    __device__ __forceinline__ explicit Problem(const FuseTrainingArgs& a)
        : a(a), operands(a.operands + size_t(blockIdx.z) * a.operands_each) {}
    __device__ __forceinline__ float* rows(uint32_t operand) const {
        return operand ? static_cast<float*>(operands[operand].data) : nullptr;
    }
    __device__ __forceinline__ Rng rng() const {
        constexpr uint32_t DROPOUT = 3;
        return {{a.seed[0], a.seed[1]}, a.step, operands[0].part | a.block, DROPOUT};
    }
    __device__ __forceinline__ float drop(const Rng& rng, uint32_t index, float x) const {
        return rng.uniform(index) < a.dropout ? 0.f : x * a.kept;
    }
};

// Rows of x as an operand of a product.
template <bool BY_DEPTH_> struct Activations {
    static constexpr bool BY_DEPTH = BY_DEPTH_;
    static constexpr unsigned EACH = 4;
    Lines<BY_DEPTH_> lines;
    bool gelu;

    __device__ __forceinline__ void load(uint32_t line, uint32_t first, float (&v)[4]) const {
        lines.load(line, first, v);
        if (!gelu) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = activate(GELU_ERF, v[i]);
    }
};

// out = (drop of) x * weight^T + bias, (+ y). Grid (tokens / SIDE, rows / SIDE, problems).
template <typename P> __device__ __forceinline__ void linear(const FuseTrainingArgs& a) {
    __shared__ typename P::Tiles tiles;
    const Problem p(a);
    const FuseOperand weight = p.operands[a.weight], bias = p.operands[a.bias];
    const uint32_t token = blockIdx.x * SIDE, row = blockIdx.y * SIDE;
    const Activations<false> x{{p.rows(a.x), F32, a.tokens, a.cols, a.x_stride}, a.gelu != 0};
    const Lines<false> w{weight.data, weight.dtype, a.rows, a.cols, a.cols};
    P sums;
    sums.clear();
    sums.add(tiles, x, token, w, row, a.cols);
    const float* residual = p.rows(a.y);
    float* out = p.rows(a.out);
    const Rng rng = p.rng();
    const auto finish = [&](uint32_t t, uint32_t r, float y) {
        if (r >= a.rows) return 0.f;
        if (bias.data) y += load_float(bias.data, bias.dtype, r);
        if (a.dropout > 0.f) y = p.drop(rng, t * a.rows + r, y);
        return residual ? residual[size_t(t) * a.y_stride + r] + y : y;
    };
    sums.each([&](unsigned m, unsigned n, float x, float y) {
        const uint32_t t = token + m, r = row + n;
        if (t >= a.tokens) return;
        put2(out + size_t(t) * a.out_stride, r, a.rows, finish(t, r, x), finish(t, r + 1, y), false);
    });
}

// out = y * weight, times the slope of the GELU at `extra` [tokens, cols]. Grid (tokens / SIDE, cols / SIDE, problems).
template <typename P> __device__ __forceinline__ void input(const FuseTrainingArgs& a) {
    __shared__ typename P::Tiles tiles;
    const Problem p(a);
    const FuseOperand weight = p.operands[a.weight];
    const uint32_t token = blockIdx.x * SIDE, column = blockIdx.y * SIDE;
    const Lines<false> dy{p.rows(a.y), F32, a.tokens, a.rows, a.y_stride};
    const Lines<true> w{weight.data, weight.dtype, a.rows, a.cols, a.cols};
    P sums;
    sums.clear();
    sums.add(tiles, dy, token, w, column, a.rows);
    const float* u = p.rows(a.extra);
    float* out = p.rows(a.out);
    const auto finish = [&](uint32_t t, uint32_t c, float y) {
        return u && c < a.cols ? y * activation_slope(GELU_ERF, u[size_t(t) * a.cols + c]) : y;
    };
    sums.each([&](unsigned m, unsigned n, float x, float y) {
        const uint32_t t = token + m, c = column + n;
        if (t >= a.tokens) return;
        put2(out + size_t(t) * a.out_stride, c, a.cols, finish(t, c, x), finish(t, c + 1, y), a.add);
    });
}

// out [rows, cols] += y^T * x. Grid (rows / SIDE, cols / SIDE, problems).
template <typename P> __device__ __forceinline__ void weight(const FuseTrainingArgs& a) {
    __shared__ typename P::Tiles tiles;
    const Problem p(a);
    const uint32_t row = blockIdx.x * SIDE, column = blockIdx.y * SIDE;
    const Lines<true> dy{p.rows(a.y), F32, a.tokens, a.rows, a.y_stride};
    const Activations<true> x{{p.rows(a.x), F32, a.tokens, a.cols, a.x_stride}, a.gelu != 0};
    P sums;
    sums.clear();
    sums.add(tiles, dy, row, x, column, a.tokens);
    float* out = p.rows(a.out);
    sums.each([&](unsigned m, unsigned n, float x, float y) {
        if (row + m < a.rows) put2(out + size_t(row + m) * a.cols, column + n, a.cols, x, y, true);
    });
}

#define PRODUCTS(NAME, P)                                                                                             \
    extern "C" __global__ void __launch_bounds__(P::THREADS, 1)                                                        \
        fuse_training_linear_##NAME(const __grid_constant__ FuseTrainingArgs a) {                                     \
        linear<P>(a);                                                                                                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(P::THREADS, 1)                                                        \
        fuse_training_input_##NAME(const __grid_constant__ FuseTrainingArgs a) {                                      \
        input<P>(a);                                                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(P::THREADS, 1)                                                        \
        fuse_training_weight_##NAME(const __grid_constant__ FuseTrainingArgs a) {                                     \
        weight<P>(a);                                                                                                 \
    }
PRODUCTS(bf16, ProductBf16)
PRODUCTS(f32, ProductF32)

// out[c] += the sum of column c of x, [rows, x_stride]. Grid (cols / 32, 1, problems).
extern "C" __global__ void __launch_bounds__(LINES* WARP)
    fuse_training_sum(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    if (!p.rows(a.out)) return;
    add_rows(p.rows(a.x), a.rows, a.x_stride, p.rows(a.out), a.cols);
}

constexpr int ROW_WARPS = 4;
constexpr uint32_t ROW_THREADS = ROW_WARPS * WARP;

// out = x / sqrt(mean(x^2) + eps) * weight. Grid (tokens, 1, problems), as of all that follow, a block a token.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    fuse_training_norm(const __grid_constant__ FuseTrainingArgs a) {
    __shared__ float scratch[ROW_WARPS];
    const Problem p(a);
    const FuseOperand weight = p.operands[a.weight];
    const float* x = p.rows(a.x) + size_t(blockIdx.x) * a.cols;
    float* out = p.rows(a.out) + size_t(blockIdx.x) * a.cols;
    float squares = 0.f;
    for (uint32_t i = threadIdx.x; i < a.cols; i += ROW_THREADS) squares += x[i] * x[i];
    const float scale = 1.f / sqrtf(block_sum<ROW_WARPS>(squares, scratch) / float(a.cols) + a.eps);
    for (uint32_t i = threadIdx.x; i < a.cols; i += ROW_THREADS)
        out[i] = x[i] * scale * load_float(weight.data, weight.dtype, i);
}

// Adds to out, gradient of x, what comes of that of the norm, y; partial sums of the gradient of the weight go to
// `extra`. Grid (tokens / NORM_ROWS, 1, problems).
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    fuse_training_norm_backward(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    const FuseOperand weight = p.operands[a.weight];
    norm_backward({p.rows(a.x), weight.data, p.rows(a.y), p.rows(a.out), p.rows(a.extra), weight.dtype, a.tokens,
                   a.cols, a.eps, 0.f, true});
}

// out = drop of x, [tokens, cols].
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    fuse_training_drop(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    const Rng rng = p.rng();
    const float* x = p.rows(a.x) + size_t(blockIdx.x) * a.cols;
    float* out = p.rows(a.out) + size_t(blockIdx.x) * a.cols;
    for (uint32_t i = threadIdx.x; i < a.cols; i += ROW_THREADS) out[i] = p.drop(rng, blockIdx.x * a.cols + i, x[i]);
}

// out += x, [tokens, cols].
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    fuse_training_add(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    const float* x = p.rows(a.x) + size_t(blockIdx.x) * a.cols;
    float* out = p.rows(a.out) + size_t(blockIdx.x) * a.cols;
    for (uint32_t i = threadIdx.x; i < a.cols; i += ROW_THREADS) out[i] += x[i];
}

// out [tokens, out_stride] = the columns `columns` of the pages x.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    fuse_training_gather(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    const uint32_t row = column_row(a.columns, blockIdx.x);
    float* out = p.rows(a.out) + size_t(blockIdx.x) * a.out_stride;
    for (uint32_t i = threadIdx.x; i < a.columns.width; i += ROW_THREADS)
        out[i] = page_element(p.operands[a.x].data, a.columns.dtype, column_element(a.columns, row, i));
}

// Adds x [tokens, x_stride] to the columns of the pages out, which are f32.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    fuse_training_scatter(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    const uint32_t row = column_row(a.columns, blockIdx.x);
    if (!p.rows(a.out)) return;
    const float* x = p.rows(a.x) + size_t(blockIdx.x) * a.x_stride;
    for (uint32_t i = threadIdx.x; i < a.columns.width; i += ROW_THREADS)
        p.rows(a.out)[column_element(a.columns, row, i)] += x[i];
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// out pages = base - gate * target, where that is replaced, + gate * sigmoid(logit) * x. `y`: gates, `extra`: logits or
// none, both [tokens, heads]; `weight`: pages of the base, `bias`: of the target; `columns`, `second`, `third`: out, base,
// target.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    fuse_training_gate(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    const uint32_t to = column_row(a.columns, blockIdx.x), base = column_row(a.second, blockIdx.x);
    const uint32_t target = a.replaces_target ? column_row(a.third, blockIdx.x) : 0;
    const float* x = p.rows(a.x) + size_t(blockIdx.x) * a.columns.width;
    const float* gates = p.rows(a.y) + size_t(blockIdx.x) * a.columns.heads;
    const float* logits = a.extra ? p.rows(a.extra) + size_t(blockIdx.x) * a.columns.heads : nullptr;
    void* out = p.operands[a.out].data;
    for (uint32_t i = threadIdx.x; i < a.columns.width; i += ROW_THREADS) {
        const uint32_t head = i / a.columns.dim;
        const float gate = gates[head];
        float y = page_element(p.operands[a.weight].data, a.second.dtype, column_element(a.second, base, i));
        if (a.replaces_target) {
            y -= gate * page_element(p.operands[a.bias].data, a.third.dtype, column_element(a.third, target, i));
        }
        y += gate * (logits ? sigmoid(logits[head]) : 1.f) * x[i];
        const size_t at = column_element(a.columns, to, i);
        if (a.columns.dtype == F32) static_cast<float*>(out)[at] = y;
        else static_cast<bf16*>(out)[at] = from_float<bf16>(y);
    }
}

// From the gradients of the fused columns, the f32 pages `weight`: of the projection x to out, of the gates y to `bias`,
// of the logits `extra`, if there are any, to `dlogits`. A warp a head.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    fuse_training_gate_backward(const __grid_constant__ FuseTrainingArgs a) {
    const Problem p(a);
    const uint32_t row = column_row(a.columns, blockIdx.x), lane = threadIdx.x % WARP;
    const size_t line = size_t(blockIdx.x) * a.columns.width;
    for (uint32_t head = threadIdx.x / WARP; head < a.columns.heads; head += ROW_WARPS) {
        const size_t at = size_t(blockIdx.x) * a.columns.heads + head;
        const float gate = p.rows(a.y)[at], weight = a.extra ? sigmoid(p.rows(a.extra)[at]) : 1.f;
        float dot = 0.f;
        for (uint32_t i = head * a.columns.dim + lane; i < (head + 1) * a.columns.dim; i += WARP) {
            const float d = p.rows(a.weight)[column_element(a.columns, row, i)];
            dot += d * p.rows(a.x)[line + i];
            p.rows(a.out)[line + i] = gate * weight * d;
        }
        dot = warp_sum(dot);
        if (lane > 0) continue;
        p.rows(a.bias)[at] = weight * dot;
        if (a.extra) p.rows(a.dlogits)[at] = gate * dot * weight * (1.f - weight);
    }
}
