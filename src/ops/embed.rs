//! Token embedding: `out[t] = scale · table[ids[t]]`.

use super::{ShapeError, check, check_apart, training};
use crate::backend::{DType, Queue, Tensor};

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EmbedParams {
    pub tokens: u32,
    pub hidden: u32,
    /// 1, or √hidden for Gemma.
    pub scale: f32,
}

/// `ids` U32`[tokens]`, `table` any dtype `[vocab, hidden]`, `out` F32`[tokens, hidden]`. Ids past the vocabulary are
/// the caller's error; `model` refuses them before they get here.
pub fn embed(
    queue: &Queue,
    ids: &Tensor,
    table: &Tensor,
    scale: f32,
    out: &Tensor,
) -> Result<(), ShapeError> {
    let tokens = ids.elements();
    let hidden = table.row_len();
    check("embed", "ids", ids, &[DType::U32], &[tokens])?;
    check("embed", "table", table, &DType::ALL, &[table.rows(), hidden])?;
    check("embed", "out", out, &[DType::F32], &[tokens, hidden])?;
    check_apart("embed", out, &[("ids", ids), ("table", table)])?;
    let p = EmbedParams { tokens: tokens as u32, hidden: hidden as u32, scale };
    queue.backend().embed(queue.id(), p, ids, table, out);
    Ok(())
}

/// Backward of [`embed`]: `dtable[ids[t]] += scale · dout[t]`, tokens in order; `dout` F32`[tokens, hidden]`, `dtable`
/// F32`[vocab, hidden]`.
pub fn embed_backward(
    queue: &Queue,
    ids: &Tensor,
    scale: f32,
    dout: &Tensor,
    dtable: &Tensor,
) -> Result<(), ShapeError> {
    const OP: &str = "embed_backward";
    let (tokens, hidden) = (ids.elements(), dtable.row_len());
    check(OP, "ids", ids, &[DType::U32], &[tokens])?;
    check(OP, "dout", dout, &[DType::F32], &[tokens, hidden])?;
    check(OP, "dtable", dtable, &[DType::F32], &[dtable.rows(), hidden])?;
    check_apart(OP, dtable, &[("ids", ids), ("dout", dout)])?;
    let p = EmbedParams { tokens: tokens as u32, hidden: hidden as u32, scale };
    training(OP, queue)?.embed_backward(queue.id(), p, ids, dout, dtable);
    Ok(())
}
