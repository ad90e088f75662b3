//! q/k norm, rotary embedding and the paged K/V write: kernels/rope.cu.

use super::{Launch, dtype_code, launch::KernelArgs};
use crate::{
    backend::{DType, Tensor},
    ops::{RopeOperands, RopeParams},
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RopeArgs {
    qkv: u64,
    q: u64,
    q_norm: u64,
    k_norm: u64,
    cos_sin: u64,
    slots: u64,
    keys: u64,
    values: u64,
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    q_norm_dtype: u32,
    k_norm_dtype: u32,
    interleaved: u32,
    q_stride: u32,
    norm_eps: f32,
    norm_offset: f32,
}

// SAFETY: twin of `RopeArgs` in kernels/rope.cu.
unsafe impl KernelArgs for RopeArgs {}

/// A block takes 8 heads of 4 tokens.
///
/// # Panics
/// If the size of a head is odd or above 256.
pub(super) fn rope_kv_write(p: RopeParams, o: &RopeOperands) -> (Launch, RopeArgs) {
    assert!(p.head_dim <= 256 && p.head_dim.is_multiple_of(2), "rope_kv_write: heads of {}", p.head_dim);
    // No norm: address 0, whose type nobody asks for.
    let norm = |norm: &Option<Tensor>| norm.as_ref().map_or((0, 0), |n| (n.address(), dtype_code(n.dtype())));
    let ((q_norm, q_norm_dtype), (k_norm, k_norm_dtype)) = (norm(&o.q_norm), norm(&o.k_norm));
    let q = o.q_out.as_ref().unwrap_or(&o.qkv);
    let args = RopeArgs {
        qkv: o.qkv.address(),
        q: q.address(),
        q_norm,
        k_norm,
        cos_sin: o.cos_sin.address(),
        slots: o.slots.address(),
        keys: o.pages.keys.address(),
        values: o.pages.values.address(),
        tokens: p.tokens,
        heads: p.heads,
        kv_heads: p.kv_heads,
        head_dim: p.head_dim,
        block_size: o.pages.block_size() as u32,
        q_norm_dtype,
        k_norm_dtype,
        interleaved: p.interleaved,
        q_stride: q.row_len() as u32,
        norm_eps: p.norm_eps,
        norm_offset: p.norm_offset,
    };
    (launch(p, o.qkv.dtype(), o.pages.keys.dtype()), args)
}

/// The launch for operands of these types.
pub(super) fn launch(p: RopeParams, qkv: DType, pages: DType) -> Launch {
    let kernel = match (qkv, pages) {
        (DType::Bf16, DType::Bf16) => "rope_kv_write_bf16_bf16",
        (DType::Bf16, _) => "rope_kv_write_bf16_f32",
        (_, DType::Bf16) => "rope_kv_write_f32_bf16",
        (_, _) => "rope_kv_write_f32_f32",
    };
    let grid = (p.tokens.div_ceil(4), (p.heads + 2 * p.kv_heads).div_ceil(8), 1);
    Launch { kernel, grid, block: 256, shared: 0 }
}
