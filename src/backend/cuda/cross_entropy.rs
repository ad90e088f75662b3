//! The loss and its gradient: kernels/cross_entropy.cu.

use super::{Launch, launch::KernelArgs};
use crate::{backend::Tensor, ops::CrossEntropyParams};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CrossEntropyArgs {
    logits: u64,
    labels: u64,
    loss: u64,
    p: CrossEntropyParams,
}

// SAFETY: twin of `CrossEntropyArgs` in kernels/cross_entropy.cu.
unsafe impl KernelArgs for CrossEntropyArgs {}

/// A block a row.
pub(super) fn cross_entropy(
    p: CrossEntropyParams,
    logits: &Tensor,
    labels: &Tensor,
    loss: &Tensor,
) -> (Launch, CrossEntropyArgs) {
    let args =
        CrossEntropyArgs { logits: logits.address(), labels: labels.address(), loss: loss.address(), p };
    (Launch { kernel: "cross_entropy", grid: (p.rows, 1, 1), block: 512, shared: 0 }, args)
}
