// What one lane of a matrix-vector product reads of a row, format by format.
//
// A tile is 1024 columns of a row, 32 of them a lane, in four units of eight (F32: eight of four). Which columns a lane
// has is the format's choice, so that it unpacks whole words: a word of 4-bit quants is four elements of one half of a
// sub-block and four of the other. Every four consecutive columns, a quad, belong to one unit; the vector is kept in
// the units' order.
//
// A quant becomes a float without a conversion: a byte permutation puts it into the mantissa of 2^7 (or 2^15, for eight
// bits), and one multiply-add scales it and subtracts that power, the format's bias and its minimum. The subtrahend of
// a format without minimum is exact, so the weight is as decode8 gives it; with a minimum it is off by at most
// 2^-17 of the scale.
#pragma once
#include "blocks.cuh"

constexpr unsigned TILE = 1024;
template <typename LANE> constexpr unsigned UNITS = TILE / WARP / LANE::WIDTH;
// Bytes of a tile of the vector in shared memory.
template <typename LANE> constexpr unsigned X_TILE = UNITS<LANE> * LANE::PLANE;

// Elements `d * (byte - bias) - m` of four bytes below 128, where `c` = -(d * (128 + bias) + m).
__device__ __forceinline__ void scale_bytes(uint32_t bytes, float d, float c, float* out) {
    out[0] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7044)), c);
    out[1] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7144)), c);
    out[2] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7244)), c);
    out[3] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7344)), c);
}
// `d * byte` of four signed bytes, where `c` = -d * (2^15 + 128).
__device__ __forceinline__ void scale_signed_bytes(uint32_t bytes, float d, float c, float* out) {
    bytes ^= 0x80808080u;
    out[0] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x47000000u, 0x7404)), c);
    out[1] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x47000000u, 0x7414)), c);
    out[2] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x47000000u, 0x7424)), c);
    out[3] = fmaf(d, __uint_as_float(__byte_perm(bytes, 0x47000000u, 0x7434)), c);
}

// N words in shared memory at an address of which only ALIGN is known: aligned words, shifted together. If ALIGN is 2,
// up to two bytes on either side are read too; they are in the 16 bytes that were copied with the first or last word.
template <int ALIGN, int N> __device__ __forceinline__ void load_words(const uint8_t* p, uint32_t (&out)[N]) {
    if constexpr (ALIGN >= 16 && N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 words = reinterpret_cast<const uint4*>(p)[i / 4];
            out[i] = words.x, out[i + 1] = words.y, out[i + 2] = words.z, out[i + 3] = words.w;
        }
    } else if constexpr (ALIGN >= 8 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const uint2 words = reinterpret_cast<const uint2*>(p)[i / 2];
            out[i] = words.x, out[i + 1] = words.y;
        }
    } else if constexpr (ALIGN >= 4) {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = reinterpret_cast<const uint32_t*>(p)[i];
    } else {
        const uint32_t rest = reinterpret_cast<uintptr_t>(p) & 2;
        const uint32_t* words = reinterpret_cast<const uint32_t*>(p - rest);
        uint32_t low = words[0];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint32_t high = words[i + 1];
            out[i] = __funnelshift_r(low, high, rest * 8);
            low = high;
        }
    }
}
// The f16 at `p` and the N words after it.
template <int N> __device__ __forceinline__ float load_scale_and_words(const uint8_t* p, uint32_t (&out)[N]) {
    const uint32_t rest = reinterpret_cast<uintptr_t>(p) & 2;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(p - rest);
    uint32_t low = words[0];
    const __half_raw scale = {static_cast<unsigned short>(low >> rest * 8)};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const uint32_t high = words[i + 1];
        out[i] = __funnelshift_rc(low, high, 16 + rest * 8);
        low = high;
    }
    return __half2float(scale);
}
__device__ __forceinline__ float2 halves(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// `WIDTH`: elements of a unit. `PLANE`: bytes between the units of a tile of the vector in shared memory: those of 32
// lanes and padding that spreads the words of a sub-block over the banks when they are stored. `ADJACENT`: quads 2i and
// 2i + 1 lie side by side there. `PAD`: bytes left free after every `GROUP` lanes' blocks of the ring, which keep the
// lanes' words in different banks; only where a tile begins at 16 bytes, else blocks lie across the gaps.
template <int CODE> struct Lane;

// The plain types: unit u of lane l is bytes 512 u + 16 l.. of the tile, so that a load takes whole sectors; of the
// tile's columns the row has `left`. They are read from global memory directly, all of them before the first is used.
template <int CODE> struct PlainLane {
    static constexpr unsigned WIDTH = 16 / (Block<CODE>::BYTES / 8), PLANE = WARP * WIDTH * 2, GROUP = WARP, PAD = 0;
    static constexpr bool ADJACENT = true;
    static __device__ __forceinline__ unsigned place(unsigned quad) { return quad * 8; }
    static __device__ __forceinline__ unsigned column(int u, unsigned lane) { return (u * WARP + lane) * WIDTH; }
    uint4 words[TILE / WARP / WIDTH];
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, uint32_t left) {
        const uint4* from = reinterpret_cast<const uint4*>(tile) + lane;
#pragma unroll
        for (int u = 0; u < int(UNITS<PlainLane>); ++u) {
            words[u] = column(u, lane) < left ? __ldg(from + u * WARP) : make_uint4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ void unit(int u, float (&out)[WIDTH]) const {
        if constexpr (CODE == F32) {
            out[0] = __uint_as_float(words[u].x), out[1] = __uint_as_float(words[u].y);
            out[2] = __uint_as_float(words[u].z), out[3] = __uint_as_float(words[u].w);
        } else {
            Block<CODE>::decode8(reinterpret_cast<const uint8_t*>(&words[u]), 0, out);
        }
    }
};
template <> struct Lane<F32> : PlainLane<F32> {};
template <> struct Lane<F16> : PlainLane<F16> {};
template <> struct Lane<BF16> : PlainLane<BF16> {};

// The formats of 32 elements: a block a lane, unit u its columns 4 u + 0..3 and 16 + 4 u + 0..3.
template <int CODE, unsigned GROUP_ = WARP, unsigned PAD_ = 0> struct Lane32 {
    static constexpr unsigned WIDTH = 8, PLANE = 512 + 32, GROUP = GROUP_, PAD = PAD_;
    static constexpr bool ADJACENT = false;
    static __device__ __forceinline__ unsigned place(unsigned quad) {
        return quad % 4 * PLANE + quad / 8 * 16 + quad / 4 % 2 * 8;
    }
    static __device__ __forceinline__ const uint8_t* block(const uint8_t* tile, unsigned lane, bool padded) {
        return tile + lane * Block<CODE>::BYTES + (padded ? lane / GROUP * PAD : 0);
    }
};

template <int CODE, bool MIN, bool FIFTH, unsigned... PADDING> struct NibbleLane : Lane32<CODE, PADDING...> {
    uint32_t quants[4], high;
    float d, c;
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, bool padded) {
        const uint8_t* block = this->block(tile, lane, padded);
        constexpr int HEAD = FIFTH ? 1 : 0;
        uint32_t words[MIN + HEAD + 4];
        if constexpr (MIN) {
            load_words<Block<CODE>::ALIGN>(block, words);
            const float2 both = halves(words[0]);
            d = both.x, c = both.y - 128.f * d;
        } else {
            d = load_scale_and_words(block, words);
            c = -d * (FIFTH ? 144.f : 136.f);
        }
        if constexpr (FIFTH) high = words[MIN];
#pragma unroll
        for (int i = 0; i < 4; ++i) quants[i] = words[MIN + HEAD + i];
    }
    __device__ __forceinline__ void unit(int u, float (&out)[8]) const {
        uint32_t first = quants[u] & 0x0f0f0f0fu, second = quants[u] >> 4 & 0x0f0f0f0fu;
        if constexpr (FIFTH) first |= fifth_bits(high >> 4 * u), second |= fifth_bits(high >> (16 + 4 * u));
        scale_bytes(first, d, c, out), scale_bytes(second, d, c, out + 4);
    }
};
template <> struct Lane<Q4_0> : NibbleLane<Q4_0, false, false, 8, 16> {};
template <> struct Lane<Q4_1> : NibbleLane<Q4_1, true, false> {};
template <> struct Lane<Q5_0> : NibbleLane<Q5_0, false, true> {};
template <> struct Lane<Q5_1> : NibbleLane<Q5_1, true, true> {};

template <> struct Lane<IQ4_NL> : Lane32<IQ4_NL, 8, 16> {
    uint32_t quants[4];
    float d;
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, bool padded) {
        d = load_scale_and_words(block(tile, lane, padded), quants);
    }
    __device__ __forceinline__ void unit(int u, float (&out)[8]) const {
        const float c = -d * (32768.f + 128.f);
        scale_signed_bytes(iq4_nl_values(quants[u] & 0x0f0f0f0fu), d, c, out);
        scale_signed_bytes(iq4_nl_values(quants[u] >> 4 & 0x0f0f0f0fu), d, c, out + 4);
    }
};

template <> struct Lane<Q8_0> : Lane32<Q8_0, 16, 32> {
    uint32_t quants[8];
    float d;
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, bool padded) {
        d = load_scale_and_words(block(tile, lane, padded), quants);
    }
    __device__ __forceinline__ void unit(int u, float (&out)[8]) const {
        const float c = -d * (32768.f + 128.f);
        scale_signed_bytes(quants[u], d, c, out), scale_signed_bytes(quants[u + 4], d, c, out + 4);
    }
};

// Q2_K and Q3_K: lane 8 s + p has bytes 8 p..8 p + 7 of superblock s's quants; unit u is their bits 2 u, 2 u + 1, eight
// consecutive columns of quarter u of the half p / 4.
struct TwoBitLane {
    static constexpr unsigned WIDTH = 8, PLANE = 512 + 64, GROUP = WARP, PAD = 0;
    static constexpr bool ADJACENT = true;
    static __device__ __forceinline__ unsigned place(unsigned quad) {
        const unsigned lane = quad / 64 * 8 + quad / 32 % 2 * 4 + quad / 2 % 4;
        return quad / 8 % 4 * PLANE + lane * 16 + quad % 2 * 8;
    }
};

template <> struct Lane<Q2_K> : TwoBitLane {
    uint32_t quants[2], scales[2];
    float d, dmin;
    unsigned side;
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, bool) {
        const uint8_t* block = tile + lane / 8 * Block<Q2_K>::BYTES;
        const unsigned p = lane % 8;
        side = p / 2 % 2 * 8;
        load_words<4>(block + p / 4 * 8, scales);
        load_words<4>(block + 16 + p * 8, quants);
        uint32_t both[1];
        load_words<4>(block + 80, both);
        d = halves(both[0]).x, dmin = halves(both[0]).y;
    }
    __device__ __forceinline__ void unit(int u, float (&out)[8]) const {
        const uint32_t scale = scales[u / 2] >> (u % 2 * 16 + side);
        const float ds = d * small_to_float(scale & 15);
        const float c = -(ds * 128.f + dmin * small_to_float(scale >> 4 & 15));
        scale_bytes(quants[0] >> 2 * u & 0x03030303u, ds, c, out);
        scale_bytes(quants[1] >> 2 * u & 0x03030303u, ds, c, out + 4);
    }
};

template <> struct Lane<Q3_K> : TwoBitLane {
    uint32_t quants[2], third[2], scales[3];
    float d;
    unsigned half, side;
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, bool) {
        const uint8_t* block = tile + lane / 8 * Block<Q3_K>::BYTES;
        const unsigned p = lane % 8;
        half = p / 4, side = p / 2 % 2 * 8;
        load_words<2>(block + p % 4 * 8, third);
        load_words<2>(block + 32 + p * 8, quants);
        load_words<2>(block + 96, scales);
        d = load_half(block + 108);
    }
    __device__ __forceinline__ void unit(int u, float (&out)[8]) const {
        const uint32_t low = scales[u / 2] >> (u % 2 * 16 + side + half * 4) & 15;
        const uint32_t top = scales[2] >> (u % 2 * 16 + side + half * 4 + u / 2 * 2) & 3;
        const float ds = d * (small_to_float(low | top << 4) - 32.f), c = ds * -132.f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t clear = third[i] >> (half * 4 + u) & 0x01010101u;
            scale_bytes((quants[i] >> 2 * u & 0x03030303u) | clear << 2, ds, c, out + 4 * i);
        }
    }
};

// Q4_K and Q5_K: lane 8 s + p has bytes 16 p..16 p + 15 of superblock s's quants: half of sub-block 2 (p / 2) in the
// low nibbles, half of the next in the high ones; unit u is word u of them.
template <int CODE, bool FIFTH> struct KNibbleLane {
    using Format = Block<CODE>;
    static constexpr unsigned WIDTH = 8, PLANE = 512 + 32, GROUP = WARP, PAD = 0;
    static constexpr bool ADJACENT = false;
    static __device__ __forceinline__ unsigned place(unsigned quad) {
        const unsigned lane = quad / 64 * 8 + quad / 16 % 4 * 2 + quad / 4 % 2;
        return quad % 4 * PLANE + lane * 16 + quad / 8 % 2 * 8;
    }
    uint32_t quants[4], high[4];
    float d[2], c[2];
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, bool) {
        const uint8_t* block = tile + lane / 8 * Format::BYTES;
        const unsigned p = lane % 8;
        uint32_t head[4];
        load_words<16>(block, head);
        load_words<16>(block + Format::QUANTS + p * 16, quants);
        if constexpr (FIFTH) {
            load_words<16>(block + 16 + p % 2 * 16, high);
#pragma unroll
            for (int i = 0; i < 4; ++i) high[i] >>= p / 2 * 2;
        }
        // Scales and minima of the two sub-blocks, each pair in the low two bytes of a word: see scale_and_min.
        const unsigned shift = p / 2 % 2 * 16;
        const uint32_t a = head[1] >> shift, b = head[2] >> shift, rest = head[3] >> shift;
        const uint32_t scales = p < 4 ? a & 0x3f3f : (rest & 0x0f0f) | (a >> 2 & 0x3030);
        const uint32_t minima = p < 4 ? b & 0x3f3f : (rest >> 4 & 0x0f0f) | (b >> 2 & 0x3030);
        const float2 both = halves(head[0]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            d[i] = both.x * small_to_float(scales >> 8 * i & 63);
            c[i] = -(d[i] * 128.f + both.y * small_to_float(minima >> 8 * i & 63));
        }
    }
    __device__ __forceinline__ void unit(int u, float (&out)[8]) const {
        uint32_t first = quants[u] & 0x0f0f0f0fu, second = quants[u] >> 4 & 0x0f0f0f0fu;
        if constexpr (FIFTH) first |= (high[u] & 0x01010101u) << 4, second |= (high[u] & 0x02020202u) << 3;
        scale_bytes(first, d[0], c[0], out), scale_bytes(second, d[1], c[1], out + 4);
    }
};
template <> struct Lane<Q4_K> : KNibbleLane<Q4_K, false> {};
template <> struct Lane<Q5_K> : KNibbleLane<Q5_K, true> {};

// Lane 8 s + p has bytes 16 p..16 p + 15 of superblock s's low nibbles: a sub-block of 16 in the low ones, the one 64
// columns on in the high ones; unit u is word u of them.
template <> struct Lane<Q6_K> {
    static constexpr unsigned WIDTH = 8, PLANE = 512 + 32, GROUP = WARP, PAD = 0;
    static constexpr bool ADJACENT = false;
    static __device__ __forceinline__ unsigned place(unsigned quad) {
        const unsigned lane = quad / 64 * 8 + quad / 32 % 2 * 4 + quad / 4 % 4;
        return quad % 4 * PLANE + lane * 16 + quad / 16 % 2 * 8;
    }
    uint32_t low[4], high[4];
    float d[2];
    __device__ __forceinline__ void load(const uint8_t* tile, unsigned lane, bool) {
        const uint8_t* block = tile + lane / 8 * Block<Q6_K>::BYTES;
        const unsigned p = lane % 8;
        load_words<2>(block + p * 16, low);
        load_words<2>(block + 128 + p / 4 * 32 + p % 2 * 16, high);
#pragma unroll
        for (int i = 0; i < 4; ++i) high[i] >>= p / 2 % 2 * 2;
        const int8_t* scales = reinterpret_cast<const int8_t*>(block) + 192 + p / 4 * 8 + p % 4;
        const float all = load_half(block + 208);
        d[0] = all * float(scales[0]), d[1] = all * float(scales[4]);
    }
    __device__ __forceinline__ void unit(int u, float (&out)[8]) const {
        const uint32_t first = (low[u] & 0x0f0f0f0fu) | (high[u] & 0x03030303u) << 4;
        const uint32_t second = (low[u] >> 4 & 0x0f0f0f0fu) | (high[u] & 0x30303030u);
        scale_bytes(first, d[0], d[0] * -160.f, out), scale_bytes(second, d[1], d[1] * -160.f, out + 4);
    }
};
