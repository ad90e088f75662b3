// Dropout of single elements, and its backward, which is the same: see `ops::dropout`. A thread four elements: one draw of
// the generator has four numbers.
#include "philox.cuh"

// Twin of `backend::cuda::dropout::DropoutArgs`.
struct DropoutArgs {
    const float* x;
    float* out;
    uint64_t elements;
    uint32_t seed[2], part, step;
    float probability, kept;
    uint32_t accumulate;
};

extern "C" __global__ void __launch_bounds__(256) dropout(const __grid_constant__ DropoutArgs a) {
    constexpr uint32_t DROPOUT = 3;
    const uint32_t block = blockIdx.x * blockDim.x + threadIdx.x;
    const uint64_t first = uint64_t(block) * 4;
    if (first >= a.elements) return;
    const Rng rng{{a.seed[0], a.seed[1]}, a.step, a.part, DROPOUT};
    uint32_t bits[4];
    rng.bits(block, bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint64_t at = first + i;
        if (at >= a.elements) return;
        const float y = Rng::unit(bits[i]) < a.probability ? 0.f : a.x[at] * a.kept;
        a.out[at] = a.accumulate ? a.out[at] + y : y;
    }
}
