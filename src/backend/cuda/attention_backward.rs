//! Backward of attention over pages: kernels/attention_backward.cu.

use super::{
    Launch,
    attention::{self, AttentionArgs},
    launch::KernelArgs,
    linear_backward::SIDE,
};
use crate::{
    backend::DType,
    ops::{AttentionGrads, AttentionOperands, AttentionParams},
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttentionBackwardArgs {
    forward: AttentionArgs,
    dout: u64,
    dq: u64,
    dkeys: u64,
    dvalues: u64,
    logs: u64,
    deltas: u64,
}

// SAFETY: twin of `AttentionBackwardArgs` in kernels/attention_backward.cu.
unsafe impl KernelArgs for AttentionBackwardArgs {}

/// F32 elements: of each row the logarithm of its sum of exponentials, and what all of its scores' gradients have in common.
pub(super) fn scratch_len(tokens: usize, heads: usize) -> usize {
    2 * tokens * heads
}

/// First by tiles of queries, then by tiles of keys.
///
/// # Panics
/// If the size of a head is odd or above 256, the block size no power of two, or the scale not positive.
pub(super) fn attention_backward(
    p: AttentionParams,
    forward: &AttentionOperands,
    grads: &AttentionGrads,
) -> ([Launch; 2], AttentionBackwardArgs) {
    let logs = grads.scratch.address();
    let args = AttentionBackwardArgs {
        forward: attention::args(p, forward),
        dout: grads.dout.address(),
        dq: grads.dq.address(),
        dkeys: grads.dkv.keys.address(),
        dvalues: grads.dkv.values.address(),
        logs,
        deltas: logs + 4 * u64::from(p.tokens) * u64::from(p.heads),
    };
    (launches(p, forward.q.dtype(), forward.pages.block_size() as u32), args)
}

/// Blocks have all columns of a head up to 128.
pub(super) fn launches(p: AttentionParams, q: DType, block_size: u32) -> [Launch; 2] {
    assert!(p.head_dim <= 256 && p.head_dim.is_multiple_of(2), "attention_backward: heads of {}", p.head_dim);
    let (kernels, block) = match (q, p.head_dim <= 64) {
        (DType::Bf16, true) => (["attention_backward_q_64_bf16", "attention_backward_kv_64_bf16"], 128),
        (DType::Bf16, false) => (["attention_backward_q_128_bf16", "attention_backward_kv_128_bf16"], 128),
        (_, true) => (["attention_backward_q_64_f32", "attention_backward_kv_64_f32"], 256),
        (_, false) => (["attention_backward_q_128_f32", "attention_backward_kv_128_f32"], 256),
    };
    let columns = p.head_dim.div_ceil(128);
    // Each sequence may have a tile that is not full: see `QueryTile`.
    let tiles = p.tokens * (p.heads / p.kv_heads) / SIDE + p.sequences;
    let keys = (p.max_blocks * block_size).div_ceil(SIDE);
    let launch = |kernel, grid| Launch { kernel, grid, block, shared: 0 };
    [
        launch(kernels[0], (tiles * p.kv_heads, columns, 1)),
        launch(kernels[1], (keys, p.kv_heads * columns, p.sequences)),
    ]
}
