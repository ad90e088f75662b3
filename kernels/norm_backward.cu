// Backward of RMSNorm: norm_backward.cuh. Grid (rows / NORM_ROWS).
#include "norm_backward.cuh"

// Twin of `backend::cuda::norm_backward::RmsNormBackwardArgs`.
struct RmsNormBackwardArgs {
    const float* x;
    const void* weight;
    const float* dy;
    float* dx;        // may be dy
    float* partials;  // [blocks, cols] or null
    uint32_t weight_dtype;
    uint32_t rows, cols;
    float eps, offset;
    uint32_t add;  // to dx
};

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    rms_norm_backward(const __grid_constant__ RmsNormBackwardArgs a) {
    norm_backward({a.x, a.weight, a.dy, a.dx, a.partials, a.weight_dtype, a.rows, a.cols, a.eps, a.offset, a.add != 0});
}
