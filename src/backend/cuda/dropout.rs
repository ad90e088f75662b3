//! Dropout of single elements: kernels/dropout.cu.

use super::{Launch, launch::KernelArgs};
use crate::{backend::Tensor, ops::DropoutParams};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct DropoutArgs {
    x: u64,
    out: u64,
    elements: u64,
    seed: [u32; 2],
    part: u32,
    step: u32,
    probability: f32,
    kept: f32,
    accumulate: u32,
}

// SAFETY: twin of `DropoutArgs` in kernels/dropout.cu.
unsafe impl KernelArgs for DropoutArgs {}

/// A thread four elements, which one draw serves.
pub(super) fn dropout(p: DropoutParams, x: &Tensor, out: &Tensor) -> (Launch, DropoutArgs) {
    let elements = x.elements() as u64;
    let args = DropoutArgs {
        x: x.address(),
        out: out.address(),
        elements,
        seed: [p.seed as u32, (p.seed >> 32) as u32],
        part: p.part,
        step: p.step,
        probability: p.probability,
        kept: 1.0 / (1.0 - p.probability),
        accumulate: p.accumulate.into(),
    };
    let grid = (elements.div_ceil(4 * 256) as u32, 1, 1);
    (Launch { kernel: "dropout", grid, block: 256, shared: 0 }, args)
}
