//! Cross-entropy of logits with the next token.

use super::{ShapeError, check, check_apart, training};
use crate::backend::{DType, Queue, Tensor};

/// A label that is not learned from: its loss and its gradient are 0.
pub const IGNORED: u32 = u32::MAX;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropyParams {
    pub rows: u32,
    pub vocab: u32,
    /// Factor of the gradient: 1 / (number of labels in the batch).
    pub scale: f32,
    /// The cap that the logits have gone through ([`super::soft_cap`]), 0 = none: the gradient is that of what came before it.
    pub soft_cap: f32,
}

/// `loss[i] = −ln softmax(logits[i])[labels[i]]`, and the gradient takes the logits' place: `scale · (softmax − onehot)`. `logits`
/// F32`[rows, vocab]`, `labels` U32`[rows]` (or [`IGNORED`]), `loss` F32`[rows]`. Labels past the vocabulary are the caller's error.
pub fn cross_entropy(
    queue: &Queue,
    logits: &Tensor,
    labels: &Tensor,
    scale: f32,
    soft_cap: f32,
    loss: &Tensor,
) -> Result<(), ShapeError> {
    const OP: &str = "cross_entropy";
    let (rows, vocab) = (logits.rows(), logits.row_len());
    check(OP, "logits", logits, &[DType::F32], &[rows, vocab])?;
    check(OP, "labels", labels, &[DType::U32], &[rows])?;
    check(OP, "loss", loss, &[DType::F32], &[rows])?;
    check_apart(OP, loss, &[("logits", logits), ("labels", labels)])?;
    let p = CrossEntropyParams { rows: rows as u32, vocab: vocab as u32, scale, soft_cap };
    training(OP, queue)?.cross_entropy(queue.id(), p, logits, labels, loss);
    Ok(())
}
