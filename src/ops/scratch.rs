//! Scratch memory: F32, given by the caller, as much as the device says it needs.

use super::{FuseExtent, ShapeError};
use crate::backend::{DType, Queue, Tensor};

/// A use of scratch. [`crate::backend::Backend::scratch_len`] says how many F32 elements it takes on a device. Ops of one queue may
/// share scratch: they run one after the other, and nothing in it outlives an op.
#[derive(Clone, Copy, Debug)]
pub enum Scratch {
    /// [`super::linear_glu`] of `tokens` rows to `width` columns.
    LinearGlu { tokens: usize, width: usize },
    /// [`super::paged_attention`] of up to `sequences` sequences of at most `context` keys.
    Attention { sequences: usize, heads: usize, head_dim: usize, context: usize },
    /// [`super::fuse`] and [`super::fuse_forward`].
    Fuse(FuseExtent),
    /// What [`super::fuse_forward`] keeps of one layer, keys and values: [`super::FuseTape::saved`].
    FuseSaved(FuseExtent),
    /// [`super::fuse_backward`].
    FuseBackward(FuseExtent),
    /// [`super::attention_backward`].
    AttentionBackward { tokens: usize, sequences: usize, heads: usize, head_dim: usize, context: usize },
}

pub(super) fn check_scratch(
    op: &'static str,
    queue: &Queue,
    scratch: &Tensor,
    need: Scratch,
) -> Result<(), ShapeError> {
    let need = queue.backend().scratch_len(need);
    if scratch.dtype() == DType::F32 && scratch.elements() >= need {
        return Ok(());
    }
    Err(ShapeError {
        op,
        operand: "scratch",
        found: format!("{scratch:?}"),
        expected: format!("F32[≥ {need}]"),
    })
}
