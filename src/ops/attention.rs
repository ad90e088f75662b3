//! Causal attention over pages, for any mix of prefill and decode sequences.

use super::{
    KvPages, Pass, Scratch, ShapeError, activations, check, check_apart, scratch::check_scratch, training,
};
use crate::backend::{DType, Queue, Tensor};

#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// [`Pass::Decode`]: one new token of each sequence.
    pub pass: Pass,
    pub tokens: u32,
    pub sequences: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    /// Row stride of `q` in elements: q may be the left part of `[q | k | v]`.
    pub q_stride: u32,
    pub max_blocks: u32,
    pub scale: f32,
    /// `s = cap · tanh(s / cap)` before the softmax; 0 = none.
    pub soft_cap: f32,
    /// A query sees keys at distance `< window`; 0 = all earlier ones.
    pub window: u32,
}

/// Operands of [`paged_attention`].
#[derive(Clone, Debug)]
pub struct AttentionOperands {
    /// Activations `[tokens, q_stride]`; the first `heads · head_dim` of a row are used.
    pub q: Tensor,
    pub pages: KvPages,
    /// U32`[sequences + 1]`: rows `cu_q[s]..cu_q[s+1]` of q belong to sequence s, in order.
    pub cu_q: Tensor,
    /// U32`[sequences]`: keys of sequence s, its own new tokens included. Query i of n sits at key index
    /// `context − n + i`.
    pub context: Tensor,
    /// U32`[sequences, max_blocks]`.
    pub block_tables: Tensor,
    /// As `q`, `[tokens, heads · head_dim]`.
    pub out: Tensor,
    /// See [`Scratch::Attention`].
    pub scratch: Tensor,
}

/// `out[t, h] = softmax(scale · q[t, h] · Kᵀ + mask) · V`, K and V of head `h / (heads / kv_heads)`.
pub fn paged_attention(
    queue: &Queue,
    p: AttentionParams,
    operands: &AttentionOperands,
) -> Result<(), ShapeError> {
    const OP: &str = "paged_attention";
    let (tokens, sequences) = (p.tokens as usize, p.sequences as usize);
    let width = (p.heads * p.head_dim) as usize;
    check(OP, "q", &operands.q, activations(queue), &[tokens, p.q_stride as usize])?;
    check(OP, "out", &operands.out, &[operands.q.dtype()], &[tokens, width])?;
    check(OP, "cu_q", &operands.cu_q, &[DType::U32], &[sequences + 1])?;
    check(OP, "context", &operands.context, &[DType::U32], &[sequences])?;
    check(OP, "block_tables", &operands.block_tables, &[DType::U32], &[sequences, p.max_blocks as usize])?;
    operands.pages.check(OP, "pages.keys", "pages.values")?;
    let pages = &operands.pages;
    if pages.kv_heads() != p.kv_heads as usize
        || pages.head_dim() != p.head_dim as usize
        || p.kv_heads == 0
        || !p.heads.is_multiple_of(p.kv_heads)
    {
        return Err(ShapeError {
            op: OP,
            operand: "pages.keys",
            found: format!("{:?}", pages.keys),
            expected: format!("{} kv heads × {} dividing {} heads", p.kv_heads, p.head_dim, p.heads),
        });
    }
    if !(p.scale > 0.0 && p.scale.is_finite()) {
        return Err(ShapeError {
            op: OP,
            operand: "scale",
            found: p.scale.to_string(),
            expected: "a positive number".into(),
        });
    }
    if p.pass == Pass::Decode {
        check(OP, "cu_q", &operands.cu_q, &[DType::U32], &[tokens + 1])?;
        let context = p.max_blocks as usize * pages.block_size();
        let (heads, head_dim) = (p.heads as usize, p.head_dim as usize);
        let need = Scratch::Attention { sequences, heads, head_dim, context };
        check_scratch(OP, queue, &operands.scratch, need)?;
        check_apart(OP, &operands.scratch, &[("q", &operands.q), ("out", &operands.out)])?;
    }
    let inputs = [("q", &operands.q), ("pages.keys", &pages.keys), ("pages.values", &pages.values)];
    check_apart(OP, &operands.out, &inputs)?;
    if (p.q_stride as usize) < width {
        return Err(ShapeError {
            op: OP,
            operand: "q",
            found: format!("rows of {}", p.q_stride),
            expected: format!("at least {} heads × {}", p.heads, p.head_dim),
        });
    }
    queue.backend().paged_attention(queue.id(), p, operands);
    Ok(())
}

/// Operands of [`attention_backward`], beside those of the forward op.
#[derive(Clone, Debug)]
pub struct AttentionGrads {
    /// F32`[tokens, heads · head_dim]`
    pub dout: Tensor,
    /// F32`[tokens, heads · head_dim]`, assigned.
    pub dq: Tensor,
    /// F32 pages of as many blocks and the same geometry as the forward op's: gradients of every key and value that a
    /// query saw are added, the context before the new tokens (a fused past) included.
    pub dkv: KvPages,
    /// See [`Scratch::AttentionBackward`].
    pub scratch: Tensor,
}

/// Backward of [`paged_attention`] with [`Pass::Prefill`]. `forward.out` holds its result; the scores are computed again.
pub fn attention_backward(
    queue: &Queue,
    p: AttentionParams,
    forward: &AttentionOperands,
    grads: &AttentionGrads,
) -> Result<(), ShapeError> {
    const OP: &str = "attention_backward";
    let (tokens, sequences) = (p.tokens as usize, p.sequences as usize);
    let width = (p.heads * p.head_dim) as usize;
    check(OP, "q", &forward.q, activations(queue), &[tokens, p.q_stride as usize])?;
    check(OP, "out", &forward.out, &[forward.q.dtype()], &[tokens, width])?;
    check(OP, "cu_q", &forward.cu_q, &[DType::U32], &[sequences + 1])?;
    check(OP, "context", &forward.context, &[DType::U32], &[sequences])?;
    check(OP, "block_tables", &forward.block_tables, &[DType::U32], &[sequences, p.max_blocks as usize])?;
    forward.pages.check(OP, "pages.keys", "pages.values")?;
    grads.dkv.check(OP, "dkv.keys", "dkv.values")?;
    let dims = forward.pages.keys.shape();
    let expected = [dims[0], p.kv_heads as usize, dims[2], p.head_dim as usize];
    check(OP, "pages.keys", &forward.pages.keys, super::KV_DTYPES, &expected)?;
    check(OP, "dkv.keys", &grads.dkv.keys, &[DType::F32], &expected)?;
    for (name, tensor) in [("dout", &grads.dout), ("dq", &grads.dq)] {
        check(OP, name, tensor, &[DType::F32], &[tokens, width])?;
    }
    let inputs = [("q", &forward.q), ("out", &forward.out), ("dout", &grads.dout)];
    check_apart(OP, &grads.dq, &inputs)?;
    let context = p.max_blocks as usize * forward.pages.block_size();
    let (heads, head_dim) = (p.heads as usize, p.head_dim as usize);
    let need = Scratch::AttentionBackward { tokens, sequences, heads, head_dim, context };
    check_scratch(OP, queue, &grads.scratch, need)?;
    if p.pass != Pass::Prefill
        || !p.heads.is_multiple_of(p.kv_heads.max(1))
        || !(p.scale > 0.0 && p.scale.is_finite())
        || (p.q_stride as usize) < width
    {
        return Err(ShapeError {
            op: OP,
            operand: "params",
            found: format!("{p:?}"),
            expected: "a prefill pass, kv heads dividing heads, a positive scale".into(),
        });
    }
    training(OP, queue)?.attention_backward(queue.id(), p, forward, grads);
    Ok(())
}
