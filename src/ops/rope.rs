//! q/k norm, rotary embedding and the paged K/V write, in one pass over `[q | k | v]`.

use super::{FLOATS, KvPages, ShapeError, activations, check, check_apart, training};
use crate::backend::{DType, Queue, Tensor};

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RopeParams {
    pub tokens: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    /// Of the q/k norm.
    pub norm_eps: f32,
    /// Of the q/k norm: see [`super::RmsNormParams::offset`].
    pub norm_offset: f32,
    /// 1 where q and k rows come in GGUF-Llama order (pairs `2i, 2i+1` rotate); the cache is always written in Hugging
    /// Face order (`i, i + head_dim/2`), so that caches and fusers don't depend on the file a model came from.
    pub interleaved: u32,
}

/// Operands of [`rope_kv_write`].
#[derive(Clone, Debug)]
pub struct RopeOperands {
    /// Activations `[tokens, (heads + 2 · kv_heads) · head_dim]`.
    pub qkv: Tensor,
    /// Where the normalised and rotated q goes, as `qkv` `[tokens, heads · head_dim]`; `None`: in place.
    pub q_out: Option<Tensor>,
    /// Float `[head_dim]`, both or none.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
    /// F32`[tokens, head_dim]`: for each token `head_dim/2` cosines, then as many sines.
    pub cos_sin: Tensor,
    /// U32`[tokens]`: where each token's K and V go.
    pub slots: Tensor,
    pub pages: KvPages,
}

/// Normalises (where the model has q/k norms) and rotates q and k, writes k and v to the pages.
pub fn rope_kv_write(queue: &Queue, p: RopeParams, operands: &RopeOperands) -> Result<(), ShapeError> {
    const OP: &str = "rope_kv_write";
    let (tokens, head_dim) = (p.tokens as usize, p.head_dim as usize);
    let width = (p.heads as usize + 2 * p.kv_heads as usize) * head_dim;
    check(OP, "qkv", &operands.qkv, activations(queue), &[tokens, width])?;
    if let Some(q_out) = &operands.q_out {
        check(OP, "q_out", q_out, &[operands.qkv.dtype()], &[tokens, p.heads as usize * head_dim])?;
        check_apart(OP, q_out, &[("qkv", &operands.qkv)])?;
    }
    check(OP, "cos_sin", &operands.cos_sin, &[DType::F32], &[tokens, head_dim])?;
    check(OP, "slots", &operands.slots, &[DType::U32], &[tokens])?;
    for (name, norm) in [("q_norm", &operands.q_norm), ("k_norm", &operands.k_norm)] {
        if let Some(norm) = norm {
            check(OP, name, norm, FLOATS, &[head_dim])?;
        }
    }
    operands.pages.check(OP, "pages.keys", "pages.values")?;
    let pages = operands.pages.keys.shape();
    check(
        OP,
        "pages.keys",
        &operands.pages.keys,
        super::KV_DTYPES,
        &[pages[0], p.kv_heads as usize, pages[2], head_dim],
    )?;
    queue.backend().rope_kv_write(queue.id(), p, operands);
    Ok(())
}

/// Operands of [`rope_backward`].
#[derive(Clone, Debug)]
pub struct RopeBackwardOperands {
    /// What [`rope_kv_write`] read (its q went to `q_out`); only looked at where there are norms.
    pub qkv: Tensor,
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
    pub cos_sin: Tensor,
    pub slots: Tensor,
    /// Gradient of the rotated q, F32`[tokens, heads · head_dim]`.
    pub dq: Tensor,
    /// Gradients of K and V, F32 pages: those at `slots` are read.
    pub dkv: KvPages,
    /// As `qkv`, F32, assigned.
    pub dqkv: Tensor,
    /// F32`[head_dim]`, added to.
    pub dq_norm: Option<Tensor>,
    pub dk_norm: Option<Tensor>,
}

/// Backward of [`rope_kv_write`].
pub fn rope_backward(
    queue: &Queue,
    p: RopeParams,
    operands: &RopeBackwardOperands,
) -> Result<(), ShapeError> {
    const OP: &str = "rope_backward";
    let o = operands;
    let (tokens, head_dim, heads) = (p.tokens as usize, p.head_dim as usize, p.heads as usize);
    let width = (heads + 2 * p.kv_heads as usize) * head_dim;
    check(OP, "qkv", &o.qkv, activations(queue), &[tokens, width])?;
    check(OP, "cos_sin", &o.cos_sin, &[DType::F32], &[tokens, head_dim])?;
    check(OP, "slots", &o.slots, &[DType::U32], &[tokens])?;
    check(OP, "dq", &o.dq, &[DType::F32], &[tokens, heads * head_dim])?;
    check(OP, "dqkv", &o.dqkv, &[DType::F32], &[tokens, width])?;
    check_apart(OP, &o.dqkv, &[("qkv", &o.qkv), ("dq", &o.dq)])?;
    for (name, norm) in [("q_norm", &o.q_norm), ("k_norm", &o.k_norm)] {
        if let Some(norm) = norm {
            check(OP, name, norm, FLOATS, &[head_dim])?;
        }
    }
    for (name, grad, norm) in [("dq_norm", &o.dq_norm, &o.q_norm), ("dk_norm", &o.dk_norm, &o.k_norm)] {
        if let Some(grad) = grad {
            check(OP, name, grad, &[DType::F32], &[head_dim])?;
            if norm.is_none() {
                return Err(ShapeError {
                    op: OP,
                    operand: name,
                    found: "a gradient".into(),
                    expected: "none: there is no norm".into(),
                });
            }
        }
    }
    o.dkv.check(OP, "dkv.keys", "dkv.values")?;
    let pages = o.dkv.keys.shape();
    let dims = [pages[0], p.kv_heads as usize, pages[2], head_dim];
    check(OP, "dkv.keys", &o.dkv.keys, &[DType::F32], &dims)?;
    training(OP, queue)?.rope_backward(queue.id(), p, o);
    Ok(())
}
