// The weight formats, as a GGUF file lays them out: eight consecutive elements of a block as f32.
//
// Twin of backend/cpu/blocks.rs, where every layout is spelled out; the values are the same bit for bit. That holds
// with multiplications and additions fused or not: a scale has 11 significant bits, a sub-block's scale at most 7 more
// and a quant at most 5 more, so a product of the three is exact in f32 and only the minimum's addition rounds.
#pragma once
#include "common.cuh"

// Four bytes, and eight, at an address of which only ALIGN (2, 4 or 8) is known.
template <int ALIGN> __device__ __forceinline__ uint32_t load_bytes4(const uint8_t* p) {
    if constexpr (ALIGN >= 4) return *reinterpret_cast<const uint32_t*>(p);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
    return halves[0] | uint32_t(halves[1]) << 16;
}
template <int ALIGN> __device__ __forceinline__ uint2 load_bytes8(const uint8_t* p) {
#ifdef FOUR_LANES_A_ROW
    // In shared memory, four lanes a row, rows an odd number of 16 bytes apart: those of every other row take the
    // second word first, and a warp meets every bank once.
    const unsigned odd = threadIdx.x / 4 % 2;
    const uint32_t a = load_bytes4<ALIGN>(p + 4 * odd), b = load_bytes4<ALIGN>(p + 4 * (1 - odd));
    return odd ? make_uint2(b, a) : make_uint2(a, b);
#else
    if constexpr (ALIGN >= 8) return *reinterpret_cast<const uint2*>(p);
    return make_uint2(load_bytes4<ALIGN>(p), load_bytes4<ALIGN>(p + 4));
#endif
}

// The f16 at `p`.
__device__ __forceinline__ float load_half(const uint8_t* p) {
    return __half2float(*reinterpret_cast<const __half*>(p));
}

// Byte `k` of `bytes` minus `bias`. The byte becomes the last bits of 2^23's mantissa: unlike an integer conversion,
// which runs at an eighth of the rate, a permutation and a subtraction.
template <int K> __device__ __forceinline__ float byte_to_float(uint32_t bytes, float bias) {
    return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 | K)) - (8388608.f + bias);
}
__device__ __forceinline__ void bytes_to_floats(uint2 bytes, float bias, float (&out)[8]) {
    out[0] = byte_to_float<0>(bytes.x, bias);
    out[1] = byte_to_float<1>(bytes.x, bias);
    out[2] = byte_to_float<2>(bytes.x, bias);
    out[3] = byte_to_float<3>(bytes.x, bias);
    out[4] = byte_to_float<0>(bytes.y, bias);
    out[5] = byte_to_float<1>(bytes.y, bias);
    out[6] = byte_to_float<2>(bytes.y, bias);
    out[7] = byte_to_float<3>(bytes.y, bias);
}

// Bits `shift`.. of each byte that `mask` names.
__device__ __forceinline__ uint2 bits_of_bytes(uint2 bytes, int shift, uint32_t mask) {
    return make_uint2(bytes.x >> shift & mask, bytes.y >> shift & mask);
}
__device__ __forceinline__ uint2 operator|(uint2 a, uint2 b) { return make_uint2(a.x | b.x, a.y | b.y); }

// The four lowest bits of `bits`, one a byte, at place 4.
__device__ __forceinline__ uint32_t fifth_bits(uint32_t bits) { return (bits & 0xf) * 0x02040810u & 0x10101010u; }

// What the 4-bit quants of IQ4_NL stand for, of four of them at once, one a byte: the table's halves are looked up by
// the lower three bits, and the fourth chooses.
__device__ __forceinline__ uint32_t iq4_nl_values(uint32_t quants) {
    const uint32_t pairs = quants | quants >> 4;
    const uint32_t nibbles = __byte_perm(pairs, 0, 0x4420);
    const uint32_t low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, nibbles & 0x7777);
    const uint32_t high = __byte_perm(0x26190d01u, 0x71594535u, nibbles & 0x7777);
    return __byte_perm(low, high, 0x3210 | (nibbles & 0x8888) >> 1);
}

// Scale and minimum `j` of the eight 6-bit pairs in the 12 bytes of Q4_K and Q5_K.
__device__ __forceinline__ void scale_and_min(const uint8_t* packed, int j, uint32_t& scale, uint32_t& minimum) {
    const int k = j & 3;
    const uint32_t a = packed[k], b = packed[k + 4], c = packed[k + 8];
    scale = j < 4 ? a & 63 : (c & 15) | a >> 6 << 4;
    minimum = j < 4 ? b & 63 : c >> 4 | b >> 6 << 4;
}

__device__ __forceinline__ float small_to_float(uint32_t x) {
    return __uint_as_float(0x4b000000u | x) - 8388608.f;
}

// LEN elements in BYTES bytes that begin at a multiple of ALIGN. `decode8` gives elements first..first + 7, `first` a
// multiple of 8 below LEN. The plain types are blocks of eight.
template <int CODE> struct Block;

template <> struct Block<F32> {
    static constexpr int LEN = 8, BYTES = 32, ALIGN = 16;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int, float (&out)[8]) {
        const float4 a = reinterpret_cast<const float4*>(block)[0], b = reinterpret_cast<const float4*>(block)[1];
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    }
};

template <> struct Block<F16> {
    static constexpr int LEN = 8, BYTES = 16, ALIGN = 16;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int, float (&out)[8]) {
        const uint4 words = *reinterpret_cast<const uint4*>(block);
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
            out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
    }
};

template <> struct Block<BF16> {
    static constexpr int LEN = 8, BYTES = 16, ALIGN = 16;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int, float (&out)[8]) {
        const uint4 words = *reinterpret_cast<const uint4*>(block);
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = __uint_as_float(pairs[i] << 16), out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
        }
    }
};

// The formats of 32 elements: a scale, perhaps a minimum, perhaps 32 fifth bits, then 16 bytes whose low nibbles are
// the first half and whose high nibbles are the second.
template <int BYTES_, int ALIGN_, bool MIN, bool FIFTH> struct Nibbles {
    static constexpr int LEN = 32, BYTES = BYTES_, ALIGN = ALIGN_;
    static constexpr int HIGH = MIN ? 4 : 2, QUANTS = HIGH + (FIFTH ? 4 : 0);
    static __device__ __forceinline__ uint2 quants8(const uint8_t* block, int first) {
        uint2 quants = load_bytes8<ALIGN>(block + QUANTS + first % 16);
        quants = bits_of_bytes(quants, first / 16 * 4, 0x0f0f0f0fu);
        if constexpr (FIFTH) {
            const uint32_t bits = block[HIGH + first / 8];
            quants = quants | make_uint2(fifth_bits(bits), fifth_bits(bits >> 4));
        }
        return quants;
    }
    static __device__ __forceinline__ void decode8(const uint8_t* block, int first, float (&out)[8]) {
        const float d = load_half(block);
        bytes_to_floats(quants8(block, first), MIN ? 0.f : FIFTH ? 16.f : 8.f, out);
        if constexpr (MIN) {
            const float m = load_half(block + 2);
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] = d * out[i] + m;
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] = d * out[i];
        }
    }
};
template <> struct Block<Q4_0> : Nibbles<18, 2, false, false> {};
template <> struct Block<Q4_1> : Nibbles<20, 4, true, false> {};
template <> struct Block<Q5_0> : Nibbles<22, 2, false, true> {};
template <> struct Block<Q5_1> : Nibbles<24, 8, true, true> {};

template <> struct Block<IQ4_NL> : Nibbles<18, 2, false, false> {
    static __device__ __forceinline__ void decode8(const uint8_t* block, int first, float (&out)[8]) {
        const float d = load_half(block);
        const uint2 quants = quants8(block, first);
        const uint2 values = make_uint2(iq4_nl_values(quants.x) ^ 0x80808080u, iq4_nl_values(quants.y) ^ 0x80808080u);
        bytes_to_floats(values, 128.f, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * out[i];
    }
};

template <> struct Block<Q8_0> {
    static constexpr int LEN = 32, BYTES = 34, ALIGN = 2;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int first, float (&out)[8]) {
        const float d = load_half(block);
        const uint2 quants = load_bytes8<ALIGN>(block + 2 + first);
        bytes_to_floats(make_uint2(quants.x ^ 0x80808080u, quants.y ^ 0x80808080u), 128.f, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * out[i];
    }
};

// Q2_K and Q3_K: two halves of 128 elements, each 32 bytes read at four shifts.
template <int ALIGN> __device__ __forceinline__ uint2 two_bits8(const uint8_t* quants, int first) {
    return bits_of_bytes(load_bytes8<ALIGN>(quants + first / 128 * 32 + first % 32), first % 128 / 32 * 2, 0x03030303u);
}

template <> struct Block<Q2_K> {
    static constexpr int LEN = 256, BYTES = 84, ALIGN = 4;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int first, float (&out)[8]) {
        const uint32_t scale = block[first / 16];
        const float d = load_half(block + 80) * small_to_float(scale & 15);
        const float m = load_half(block + 82) * small_to_float(scale >> 4);
        bytes_to_floats(two_bits8<ALIGN>(block + 16, first), 0.f, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * out[i] - m;
    }
};

template <> struct Block<Q3_K> {
    static constexpr int LEN = 256, BYTES = 110, ALIGN = 2;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int first, float (&out)[8]) {
        const int group = first / 16;
        const uint32_t low = block[96 + group % 8] >> (group / 8 * 4) & 15;
        const uint32_t top = block[104 + group % 4] >> (group / 4 * 2) & 3;
        const float d = load_half(block + 108) * (small_to_float(low | top << 4) - 32.f);
        // A third bit that is clear means four less.
        const uint2 third = bits_of_bytes(load_bytes8<ALIGN>(block + first % 32), first / 32, 0x01010101u);
        const uint2 quants = two_bits8<ALIGN>(block + 32, first) | make_uint2(third.x << 2, third.y << 2);
        bytes_to_floats(quants, 4.f, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * out[i];
    }
};

// Q4_K and Q5_K: four times 32 bytes whose low nibbles are 32 elements and whose high nibbles are the next.
template <int BYTES_, bool FIFTH> struct KNibbles {
    static constexpr int LEN = 256, BYTES = BYTES_, ALIGN = 16;
    static constexpr int QUANTS = FIFTH ? 48 : 16;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int first, float (&out)[8]) {
        const int group = first / 32;
        uint32_t scale, minimum;
        scale_and_min(block + 4, group, scale, minimum);
        const float d = load_half(block) * small_to_float(scale), m = load_half(block + 2) * small_to_float(minimum);
        uint2 quants = load_bytes8<ALIGN>(block + QUANTS + group / 2 * 32 + first % 32);
        quants = bits_of_bytes(quants, group % 2 * 4, 0x0f0f0f0fu);
        if constexpr (FIFTH) {
            const uint2 fifth = bits_of_bytes(load_bytes8<ALIGN>(block + 16 + first % 32), group, 0x01010101u);
            quants = quants | make_uint2(fifth.x << 4, fifth.y << 4);
        }
        bytes_to_floats(quants, 0.f, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * out[i] - m;
    }
};
template <> struct Block<Q4_K> : KNibbles<144, false> {};
template <> struct Block<Q5_K> : KNibbles<176, true> {};

template <> struct Block<Q6_K> {
    static constexpr int LEN = 256, BYTES = 210, ALIGN = 2;
    static __device__ __forceinline__ void decode8(const uint8_t* block, int first, float (&out)[8]) {
        const int half = first / 128, at = first % 128;
        const float scale = float(reinterpret_cast<const int8_t*>(block)[192 + first / 16]);
        const float d = load_half(block + 208) * scale;
        const uint2 low = load_bytes8<ALIGN>(block + 64 * half + at % 64);
        const uint2 high = load_bytes8<ALIGN>(block + 128 + 32 * half + at % 32);
        const uint2 top = bits_of_bytes(high, at / 32 * 2, 0x03030303u);
        const uint2 quants = bits_of_bytes(low, at / 64 * 4, 0x0f0f0f0fu) | make_uint2(top.x << 4, top.y << 4);
        bytes_to_floats(quants, 32.f, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * out[i];
    }
};
