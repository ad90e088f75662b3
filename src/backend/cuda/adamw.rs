//! The optimiser: kernels/adamw.cu.

use super::{Launch, launch::KernelArgs};
use crate::{backend::Tensor, ops::AdamwParams};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AdamwArgs {
    weights: u64,
    grad: u64,
    m: u64,
    v: u64,
    p: AdamwParams,
}

// SAFETY: twin of `AdamwArgs` in kernels/adamw.cu.
unsafe impl KernelArgs for AdamwArgs {}

/// A thread a parameter.
pub(super) fn adamw(
    p: AdamwParams,
    weights: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
) -> (Launch, AdamwArgs) {
    let args =
        AdamwArgs { weights: weights.address(), grad: grad.address(), m: m.address(), v: v.address(), p };
    (Launch { kernel: "adamw", grid: (p.len.div_ceil(256), 1, 1), block: 256, shared: 0 }, args)
}
