// Token embedding: out[t] = scale * table[ids[t]] in f32, the table of any dtype. A block a token.
#include "blocks.cuh"

struct EmbedArgs {
    // [tokens], below the table's rows
    const uint32_t* ids;
    // [vocab, hidden]
    const void* table;
    // [tokens, hidden]
    float* out;
    uint32_t tokens, hidden;
    float scale;
};

constexpr unsigned THREADS = 128;

template <int CODE> __device__ __forceinline__ void embed(const EmbedArgs& a) {
    using Format = Block<CODE>;
    float* out = a.out + size_t(blockIdx.x) * a.hidden;
    const size_t row = a.ids[blockIdx.x];
    if constexpr (Format::LEN == 8) {
        for (uint32_t i = threadIdx.x; i < a.hidden; i += THREADS) {
            out[i] = a.scale * load_float(a.table, CODE, row * a.hidden + i);
        }
    } else {
        const uint8_t* blocks = static_cast<const uint8_t*>(a.table) + row * (a.hidden / Format::LEN * Format::BYTES);
        for (uint32_t i = threadIdx.x * 8; i < a.hidden; i += THREADS * 8) {
            float v[8];
            Format::decode8(blocks + i / Format::LEN * Format::BYTES, i % Format::LEN, v);
            float4* to = reinterpret_cast<float4*>(out + i);
            to[0] = make_float4(a.scale * v[0], a.scale * v[1], a.scale * v[2], a.scale * v[3]);
            to[1] = make_float4(a.scale * v[4], a.scale * v[5], a.scale * v[6], a.scale * v[7]);
        }
    }
}

#define KERNEL(NAME, CODE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ EmbedArgs a) {                 \
        embed<CODE>(a);                                                                                               \
    }
KERNEL(embed_f32, F32)
KERNEL(embed_f16, F16)
KERNEL(embed_bf16, BF16)
KERNEL(embed_q4_0, Q4_0)
KERNEL(embed_q4_1, Q4_1)
KERNEL(embed_q5_0, Q5_0)
KERNEL(embed_q5_1, Q5_1)
KERNEL(embed_q8_0, Q8_0)
KERNEL(embed_q2_k, Q2_K)
KERNEL(embed_q3_k, Q3_K)
KERNEL(embed_q4_k, Q4_K)
KERNEL(embed_q5_k, Q5_K)
KERNEL(embed_q6_k, Q6_K)
KERNEL(embed_iq4_nl, IQ4_NL)
