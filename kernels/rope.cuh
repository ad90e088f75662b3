// What rope.cu and its backward share: a warp's share of a head as pairs that rotate together.
#pragma once
#include "common.cuh"

constexpr uint32_t WARPS = 8, MAX_DIM = 256;

template <typename T, int N> struct __align__(sizeof(T) * N) Packed {
    T x[N];
};

// One store each: the compiler takes those of two elements apart.
__device__ __forceinline__ void store_packed(bf16* to, const float (&x)[2]) {
    *reinterpret_cast<uint32_t*>(to) = pack_bf16(x[0], x[1]);
}
__device__ __forceinline__ void store_packed(float* to, const float (&x)[2]) {
    *reinterpret_cast<uint64_t*>(to) = uint64_t(__float_as_uint(x[1])) << 32 | __float_as_uint(x[0]);
}
template <typename T> __device__ __forceinline__ void store_packed(T* to, const float (&x)[1]) {
    *to = from_float<T>(x[0]);
}

// A lane's share of a head: pairs `index(i)`, N consecutive ones each.
template <int N> struct Pairs {
    static constexpr int STEPS = MAX_DIM / 2 / WARP / N;
    float low[STEPS][N], high[STEPS][N];

    __device__ static uint32_t index(int step) { return (step * WARP + threadIdx.x % WARP) * N; }

    // Calls f(step, index) for the shares that a head has.
    template <typename F> __device__ static void each(uint32_t half, F f) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            if (index(step) < half) f(step, index(step));
    }

    template <typename T> __device__ void load(const T* from, uint32_t half, bool interleaved) {
        each(half, [&](int step, uint32_t i) {
            if (interleaved) {
                const auto both = *reinterpret_cast<const Packed<T, 2 * N>*>(from + 2 * i);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    low[step][n] = to_float(both.x[2 * n]);
                    high[step][n] = to_float(both.x[2 * n + 1]);
                }
            } else {
                const auto a = *reinterpret_cast<const Packed<T, N>*>(from + i);
                const auto b = *reinterpret_cast<const Packed<T, N>*>(from + half + i);
#pragma unroll
                for (int n = 0; n < N; ++n) low[step][n] = to_float(a.x[n]), high[step][n] = to_float(b.x[n]);
            }
        });
    }

    template <typename T> __device__ void store(T* to, uint32_t half) const {
        each(half, [&](int step, uint32_t i) {
            store_packed(to + i, low[step]);
            store_packed(to + half + i, high[step]);
        });
    }
    __device__ void store(float* to, uint32_t half, bool interleaved) const {
        if (!interleaved) return store(to, half);
        each(half, [&](int step, uint32_t i) {
            if constexpr (N == 2) {
                *reinterpret_cast<float4*>(to + 2 * i) =
                    make_float4(low[step][0], high[step][0], low[step][1], high[step][1]);
            } else {
                const float both[2] = {low[step][0], high[step][0]};
                store_packed(to + 2 * i, both);
            }
        });
    }

    __device__ void normalise(const Pairs& weight, uint32_t half, float eps) {
        float squares = 0.f;
        each(half, [&](int step, uint32_t) {
#pragma unroll
            for (int n = 0; n < N; ++n) squares += low[step][n] * low[step][n] + high[step][n] * high[step][n];
        });
        const float scale = 1.f / sqrtf(warp_sum(squares) / float(2 * half) + eps);
        each(half, [&](int step, uint32_t) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                low[step][n] *= scale * weight.low[step][n];
                high[step][n] *= scale * weight.high[step][n];
            }
        });
    }

    // By angles whose cosines are `low` and sines `high`.
    __device__ void rotate(const Pairs& angles, uint32_t half) {
        each(half, [&](int step, uint32_t) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float a = low[step][n], b = high[step][n];
                const float cos = angles.low[step][n], sin = angles.high[step][n];
                low[step][n] = a * cos - b * sin;
                high[step][n] = b * cos + a * sin;
            }
        });
    }
};
