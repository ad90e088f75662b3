// Copies of rows: between pages, and out of a matrix. What a row holds does not matter, only its bytes.
#include "common.cuh"

// Twin of `backend::cuda::pages::CopySlotsArgs`.
struct CopySlotsArgs {
    const void* from[2];         // keys and values, [blocks, kv_heads, block_size, row_bytes]
    void* to[2];                 // the same with blocks of their own number and size
    const uint32_t* from_slots;  // [slots]
    const uint32_t* to_slots;    // [slots]
    uint32_t kv_heads, from_block_size, to_block_size, row_bytes;
};

constexpr uint32_t COPY_THREADS = 128;

// Grid (slots, 2): keys, then values. W divides the rows and their addresses.
template <typename W> __device__ __forceinline__ void copy_slots(const CopySlotsArgs& a) {
    const uint32_t words = a.row_bytes / sizeof(W);
    const uint32_t from_slot = a.from_slots[blockIdx.x], to_slot = a.to_slots[blockIdx.x];
    const W* from = static_cast<const W*>(a.from[blockIdx.y]);
    W* to = static_cast<W*>(a.to[blockIdx.y]);
    for (uint32_t i = threadIdx.x; i < a.kv_heads * words; i += COPY_THREADS) {
        const uint32_t head = i / words, word = i % words;
        to[page_offset(to_slot, head, a.kv_heads, a.to_block_size, words) + word] =
            from[page_offset(from_slot, head, a.kv_heads, a.from_block_size, words) + word];
    }
}

// Twin of `backend::cuda::pages::GatherRowsArgs`.
struct GatherRowsArgs {
    const void* x;         // [n, row_bytes]
    const uint32_t* rows;  // [m]
    void* out;             // [m, row_bytes]
    uint32_t row_bytes;
};

constexpr uint32_t GATHER_THREADS = 256;

// out[i] = x[rows[i]]. Grid (m).
template <typename W> __device__ __forceinline__ void gather_rows(const GatherRowsArgs& a) {
    const uint32_t words = a.row_bytes / sizeof(W);
    const W* from = static_cast<const W*>(a.x) + size_t(a.rows[blockIdx.x]) * words;
    W* to = static_cast<W*>(a.out) + size_t(blockIdx.x) * words;
    for (uint32_t i = threadIdx.x; i < words; i += GATHER_THREADS) to[i] = from[i];
}

// Names say the bytes of W.
#define KERNELS(BYTES, W)                                                                                             \
    extern "C" __global__ void __launch_bounds__(COPY_THREADS)                                                        \
        copy_slots_##BYTES(const __grid_constant__ CopySlotsArgs a) {                                                 \
        copy_slots<W>(a);                                                                                             \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(GATHER_THREADS)                                                      \
        gather_rows_##BYTES(const __grid_constant__ GatherRowsArgs a) {                                               \
        gather_rows<W>(a);                                                                                            \
    }
KERNELS(16, uint4)
KERNELS(4, uint32_t)
