// Cross-entropy: the loss of each row, and its gradient in place of the logits. A block a row.
#include "common.cuh"
#include <cfloat>

// Twin of `backend::cuda::cross_entropy::CrossEntropyArgs`.
struct CrossEntropyArgs {
    float* logits;           // [rows, vocab]
    const uint32_t* labels;  // [rows], IGNORED or below vocab
    float* loss;             // [rows]
    uint32_t rows, vocab;
    float scale;     // of the gradient
    float soft_cap;  // that the logits have gone through; 0 = none
};

constexpr int WARPS = 16;
constexpr uint32_t THREADS = WARPS * WARP, IGNORED = ~0u;

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy(const __grid_constant__ CrossEntropyArgs a) {
    __shared__ float scratch[WARPS];
    float* logits = a.logits + size_t(blockIdx.x) * a.vocab;
    const uint32_t label = a.labels[blockIdx.x];
    if (label == IGNORED) {
        for (uint32_t i = threadIdx.x; i < a.vocab; i += THREADS) logits[i] = 0.f;
        if (threadIdx.x == 0) a.loss[blockIdx.x] = 0.f;
        return;
    }
    // A thread's maximum so far, and its sum under that.
    float top = -FLT_MAX, sum = 0.f;
    for (uint32_t i = threadIdx.x; i < a.vocab; i += THREADS) {
        const float x = logits[i];
        if (x > top) {
            sum *= expf(top - x);
            top = x;
        }
        sum += expf(x - top);
    }
    const float of_label = logits[label];
    const float most = block_max<WARPS>(top, scratch);
    const float total = block_sum<WARPS>(sum * expf(top - most), scratch);
    if (threadIdx.x == 0) a.loss[blockIdx.x] = logf(total) - (of_label - most);
    for (uint32_t i = threadIdx.x; i < a.vocab; i += THREADS) {
        const float x = logits[i];
        float gradient = a.scale * (expf(x - most) / total - (i == label ? 1.f : 0.f));
        if (a.soft_cap > 0.f) {
            const float bent = x / a.soft_cap;
            gradient *= 1.f - bent * bent;
        }
        logits[i] = gradient;
    }
}
