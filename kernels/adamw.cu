// AdamW with decoupled weight decay: see `ops::adamw`. A thread a parameter.
#include "common.cuh"

// Twin of `backend::cuda::adamw::AdamwArgs`. All [len].
struct AdamwArgs {
    float *weights, *grad, *m, *v;
    uint32_t len;
    float learning_rate, beta1, beta2, eps, weight_decay;
    float correction1, correction2;  // 1 - beta^t
    float grad_scale;
};

constexpr unsigned THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) adamw(const __grid_constant__ AdamwArgs a) {
    const uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= a.len) return;
    const float g = a.grad_scale * a.grad[i];
    const float m = a.beta1 * a.m[i] + (1.f - a.beta1) * g;
    const float v = a.beta2 * a.v[i] + (1.f - a.beta2) * g * g;
    float w = a.weights[i];
    w -= a.learning_rate * a.weight_decay * w;
    w -= a.learning_rate * (m / a.correction1) / (sqrtf(v / a.correction2) + a.eps);
    a.m[i] = m, a.v[i] = v, a.weights[i] = w, a.grad[i] = 0.f;
}
