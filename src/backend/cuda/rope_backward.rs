//! Backward of the rotary embedding, the q/k norms and the paged K/V write: kernels/rope_backward.cu.

use super::{Launch, dtype_code, launch::KernelArgs};
use crate::{
    backend::{DType, Tensor},
    ops::{RopeBackwardOperands, RopeParams},
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RopeBackwardArgs {
    qkv: u64,
    q_norm: u64,
    k_norm: u64,
    cos_sin: u64,
    slots: u64,
    dq: u64,
    dkeys: u64,
    dvalues: u64,
    dqkv: u64,
    q_partials: u64,
    k_partials: u64,
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    q_norm_dtype: u32,
    k_norm_dtype: u32,
    interleaved: u32,
    norm_eps: f32,
    norm_offset: f32,
}

// SAFETY: twin of `RopeBackwardArgs` in kernels/rope_backward.cu.
unsafe impl KernelArgs for RopeBackwardArgs {}

/// Tokens of a block.
const TOKENS: u32 = 16;

/// Rows of `head_dim` partial sums for the gradients of the norms of q and of k.
pub(super) fn partial_rows(p: RopeParams) -> [usize; 2] {
    let blocks = p.tokens.div_ceil(TOKENS) as usize;
    [blocks * p.heads as usize, blocks * p.kv_heads as usize]
}

/// A block takes 8 heads of 16 tokens. `partials`: those of the norms whose gradients are wanted.
///
/// # Panics
/// If the size of a head is odd or above 256.
pub(super) fn rope_backward(
    p: RopeParams,
    o: &RopeBackwardOperands,
    partials: [Option<&Tensor>; 2],
) -> (Launch, RopeBackwardArgs) {
    assert!(p.head_dim <= 256 && p.head_dim.is_multiple_of(2), "rope_backward: heads of {}", p.head_dim);
    let norm = |norm: &Option<Tensor>| norm.as_ref().map_or((0, 0), |n| (n.address(), dtype_code(n.dtype())));
    let ((q_norm, q_norm_dtype), (k_norm, k_norm_dtype)) = (norm(&o.q_norm), norm(&o.k_norm));
    let [q_partials, k_partials] = partials.map(|partials| partials.map_or(0, Tensor::address));
    let args = RopeBackwardArgs {
        qkv: o.qkv.address(),
        q_norm,
        k_norm,
        cos_sin: o.cos_sin.address(),
        slots: o.slots.address(),
        dq: o.dq.address(),
        dkeys: o.dkv.keys.address(),
        dvalues: o.dkv.values.address(),
        dqkv: o.dqkv.address(),
        q_partials,
        k_partials,
        tokens: p.tokens,
        heads: p.heads,
        kv_heads: p.kv_heads,
        head_dim: p.head_dim,
        block_size: o.dkv.block_size() as u32,
        q_norm_dtype,
        k_norm_dtype,
        interleaved: p.interleaved,
        norm_eps: p.norm_eps,
        norm_offset: p.norm_offset,
    };
    let kernel = if o.qkv.dtype() == DType::Bf16 { "rope_backward_bf16" } else { "rope_backward_f32" };
    let grid = (p.tokens.div_ceil(TOKENS), (p.heads + 2 * p.kv_heads).div_ceil(8), 1);
    (Launch { kernel, grid, block: 256, shared: 0 }, args)
}
