// The fuser's view of a cache: one column a fused token, found by slot.
#pragma once
#include "common.cuh"

// Columns of a cache, [blocks, heads, block_size, dim]: of token t that of slot slots[t], or t without slots.
struct FuseColumns {
    const uint32_t* slots;
    uint32_t dtype, width, heads, block_size, dim, unused;
};

// Where the column of a token begins, in units of `dim` elements; its heads are block_size such rows apart.
__device__ __forceinline__ uint32_t column_row(const FuseColumns& c, uint32_t token) {
    const uint32_t slot = c.slots ? c.slots[token] : token;
    return slot / c.block_size * c.heads * c.block_size + slot % c.block_size;
}
__device__ __forceinline__ size_t column_element(const FuseColumns& c, uint32_t row, uint32_t k) {
    return size_t(row + k / c.dim * c.block_size) * c.dim + k % c.dim;
}

// An element of a page of either type.
__device__ __forceinline__ float page_element(const void* pages, uint32_t dtype, size_t at) {
    return dtype == F32 ? static_cast<const float*>(pages)[at] : to_float(static_cast<const bf16*>(pages)[at]);
}
