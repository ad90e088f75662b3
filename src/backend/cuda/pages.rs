//! Copies between pages and out of matrices: kernels/pages.cu.

use super::{Launch, launch::KernelArgs};
use crate::{backend::Tensor, ops::KvPages};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CopySlotsArgs {
    from: [u64; 2],
    to: [u64; 2],
    from_slots: u64,
    to_slots: u64,
    kv_heads: u32,
    from_block_size: u32,
    to_block_size: u32,
    row_bytes: u32,
}

// SAFETY: twin of `CopySlotsArgs` in kernels/pages.cu.
unsafe impl KernelArgs for CopySlotsArgs {}

/// A block takes the keys, or the values, of one slot.
///
/// # Panics
/// If the rows of a page are no multiple of 4 bytes: heads have an even number of elements.
pub(super) fn copy_slots(
    from: &KvPages,
    from_slots: &Tensor,
    to: &KvPages,
    to_slots: &Tensor,
) -> (Launch, CopySlotsArgs) {
    let row_bytes = row_bytes(&from.keys);
    let args = CopySlotsArgs {
        from: [from.keys.address(), from.values.address()],
        to: [to.keys.address(), to.values.address()],
        from_slots: from_slots.address(),
        to_slots: to_slots.address(),
        kv_heads: from.kv_heads() as u32,
        from_block_size: from.block_size() as u32,
        to_block_size: to.block_size() as u32,
        row_bytes,
    };
    let kernel = if row_bytes.is_multiple_of(16) { "copy_slots_16" } else { "copy_slots_4" };
    (Launch { kernel, grid: (from_slots.elements() as u32, 2, 1), block: 128, shared: 0 }, args)
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct GatherRowsArgs {
    x: u64,
    rows: u64,
    out: u64,
    row_bytes: u32,
}

// SAFETY: twin of `GatherRowsArgs` in kernels/pages.cu.
unsafe impl KernelArgs for GatherRowsArgs {}

/// A block a row.
///
/// # Panics
/// If the rows are no multiple of 4 bytes.
pub(super) fn gather_rows(x: &Tensor, rows: &Tensor, out: &Tensor) -> (Launch, GatherRowsArgs) {
    let row_bytes = row_bytes(x);
    let args = GatherRowsArgs { x: x.address(), rows: rows.address(), out: out.address(), row_bytes };
    let kernel = if row_bytes.is_multiple_of(16) { "gather_rows_16" } else { "gather_rows_4" };
    (Launch { kernel, grid: (rows.elements() as u32, 1, 1), block: 256, shared: 0 }, args)
}

/// Tensors begin at multiples of 256 bytes, views of them at rows: what divides a row divides its address.
fn row_bytes(x: &Tensor) -> u32 {
    let bytes = x.row_len() * x.dtype().block_bytes();
    assert!(bytes.is_multiple_of(4), "rows of {bytes} bytes");
    bytes as u32
}
