// x = cap * tanh(x / cap), in place.
#include "common.cuh"

struct SoftCapArgs {
    float* x;
    uint64_t elements;
    float cap;
};

extern "C" __global__ void __launch_bounds__(256) soft_cap(const __grid_constant__ SoftCapArgs a) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.elements) a.x[i] = a.cap * tanhf(a.x[i] / a.cap);
}
