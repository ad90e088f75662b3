// The gated linear unit where gate and up projection are kept: out = act(gate) * up, and its backward.
#include "common.cuh"

// Twin of `backend::cuda::glu::GluArgs`. gate_up: [tokens, 2 * width], gate first; the others [tokens, width].
struct GluArgs {
    const void* gate_up;
    void* out;          // forward: as gate_up
    const float* dout;  // backward
    float* dgate_up;    // backward: as gate_up
    uint64_t elements;  // tokens * width
    uint32_t width, activation;
};

constexpr unsigned THREADS = 256;

template <typename T> __device__ __forceinline__ void glu(const GluArgs& a) {
    const uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= a.elements) return;
    const T* gate = static_cast<const T*>(a.gate_up) + i / a.width * a.width + i;
    static_cast<T*>(a.out)[i] = from_float<T>(activate(a.activation, to_float(gate[0])) * to_float(gate[a.width]));
}

template <typename T> __device__ __forceinline__ void glu_backward(const GluArgs& a) {
    const uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= a.elements) return;
    const uint64_t at = i / a.width * a.width + i;
    const T* both = static_cast<const T*>(a.gate_up) + at;
    const float gate = to_float(both[0]), up = to_float(both[a.width]), dout = a.dout[i];
    a.dgate_up[at] = dout * up * activation_slope(a.activation, gate);
    a.dgate_up[at + a.width] = dout * activate(a.activation, gate);
}

#define KERNELS(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) glu_##NAME(const __grid_constant__ GluArgs a) {             \
        glu<T>(a);                                                                                                    \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) glu_backward_##NAME(const __grid_constant__ GluArgs a) {    \
        glu_backward<T>(a);                                                                                           \
    }
KERNELS(f32, float)
KERNELS(bf16, bf16)
