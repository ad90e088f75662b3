// Backward of the token embedding: dtable[ids[t]] += scale * dout[t], the tokens of an id in order.
//
// The block of an id's first token adds all of them; those of the others leave. Grid (tokens, hidden / COLUMNS).
#include "common.cuh"

// Twin of `backend::cuda::embed::EmbedBackwardArgs`.
struct EmbedBackwardArgs {
    const uint32_t* ids;  // [tokens], below the table's rows
    const float* dout;    // [tokens, hidden]
    float* dtable;        // [vocab, hidden]
    uint32_t tokens, hidden;
    float scale;
};

constexpr uint32_t WARPS = 8, THREADS = WARPS * WARP, EACH = 4, COLUMNS = THREADS * EACH;

extern "C" __global__ void __launch_bounds__(THREADS) embed_backward(const __grid_constant__ EmbedBackwardArgs a) {
    // Which of the next THREADS tokens have the id.
    __shared__ uint32_t same[WARPS];
    const uint32_t first = blockIdx.x, id = a.ids[first];
    const auto look = [&](uint32_t from, uint32_t end) {
        const uint32_t token = from + threadIdx.x;
        const uint32_t found = __ballot_sync(FULL_MASK, token < end && a.ids[token] == id);
        __syncthreads();
        if (threadIdx.x % WARP == 0) same[threadIdx.x / WARP] = found;
        __syncthreads();
    };
    for (uint32_t from = 0; from < first; from += THREADS) {
        look(from, first);
        uint32_t any = 0;
#pragma unroll
        for (unsigned w = 0; w < WARPS; ++w) any |= same[w];
        if (any) return;
    }
    float* row = a.dtable + size_t(id) * a.hidden;
    const uint32_t column = blockIdx.y * COLUMNS + threadIdx.x;
    float sums[EACH];
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) sums[i] = column + i * THREADS < a.hidden ? row[column + i * THREADS] : 0.f;
    for (uint32_t from = first; from < a.tokens; from += THREADS) {
        look(from, a.tokens);
#pragma unroll 1
        for (unsigned w = 0; w < WARPS; ++w) {
            for (uint32_t left = same[w]; left; left &= left - 1) {
                const float* dout = a.dout + size_t(from + w * WARP + __ffs(left) - 1) * a.hidden;
#pragma unroll
                for (unsigned i = 0; i < EACH; ++i) {
                    if (column + i * THREADS < a.hidden) sums[i] += a.scale * dout[column + i * THREADS];
                }
            }
        }
    }
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        if (column + i * THREADS < a.hidden) row[column + i * THREADS] = sums[i];
    }
}
