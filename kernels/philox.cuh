// Philox4x32-10, as src/rng.rs: numbers that are a function of (seed, purpose, part, step, index) alone.
#pragma once
#include "common.cuh"

struct Rng {
    uint32_t key[2];
    uint32_t step, part, purpose;

    // The numbers of indices 4 * block and on, 32 random bits each.
    __device__ __forceinline__ void bits(uint32_t block, uint32_t (&c)[4]) const {
        c[0] = block, c[1] = step, c[2] = part, c[3] = purpose;
        uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const uint32_t a = __umulhi(0xD2511F53u, c[0]), b = __umulhi(0xCD9E8D57u, c[2]);
            const uint32_t low_a = 0xD2511F53u * c[0], low_b = 0xCD9E8D57u * c[2];
            c[0] = b ^ c[1] ^ k0, c[1] = low_b, c[2] = a ^ c[3] ^ k1, c[3] = low_a;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
    }

    // Of 32 bits: uniform in (0, 1), a multiple of 2^-24.
    static __device__ __forceinline__ float unit(uint32_t bits) { return (float(bits >> 9) + 0.5f) * (1.f / 8388608.f); }

    __device__ __forceinline__ float uniform(uint32_t index) const {
        uint32_t c[4];
        bits(index / 4, c);
        return unit(index % 4 == 0 ? c[0] : index % 4 == 1 ? c[1] : index % 4 == 2 ? c[2] : c[3]);
    }
};
