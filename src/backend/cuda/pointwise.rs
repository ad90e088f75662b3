//! RMSNorm and the soft cap on logits.

use super::{Launch, dtype_code, launch::KernelArgs};
use crate::{
    backend::{DType, Tensor},
    ops::{NormOutput, RmsNormParams},
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RmsNormArgs {
    x: u64,
    weight: u64,
    out: u64,
    weight_dtype: u32,
    rows: u32,
    cols: u32,
    eps: f32,
    offset: f32,
}

// SAFETY: twin of `RmsNormArgs` in kernels/norm.cu.
unsafe impl KernelArgs for RmsNormArgs {}

/// A block a row.
pub(super) fn rms_norm(p: RmsNormParams, x: &Tensor, weight: &Tensor, out: &Tensor) -> (Launch, RmsNormArgs) {
    let kernel = match (p.output, out.dtype()) {
        (NormOutput::Add, _) => "rms_norm_add",
        (NormOutput::Assign, DType::Bf16) => "rms_norm_bf16",
        (NormOutput::Assign, _) => "rms_norm_f32",
    };
    let args = RmsNormArgs {
        x: x.address(),
        weight: weight.address(),
        out: out.address(),
        weight_dtype: dtype_code(weight.dtype()),
        rows: p.rows,
        cols: p.cols,
        eps: p.eps,
        offset: p.offset,
    };
    (Launch { kernel, grid: (p.rows, 1, 1), block: 256, shared: 0 }, args)
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SoftCapArgs {
    x: u64,
    elements: u64,
    cap: f32,
}

// SAFETY: twin of `SoftCapArgs` in kernels/soft_cap.cu.
unsafe impl KernelArgs for SoftCapArgs {}

/// A thread an element.
pub(super) fn soft_cap(cap: f32, x: &Tensor) -> (Launch, SoftCapArgs) {
    let elements = x.elements() as u64;
    let grid = (elements.div_ceil(256) as u32, 1, 1);
    (
        Launch { kernel: "soft_cap", grid, block: 256, shared: 0 },
        SoftCapArgs { x: x.address(), elements, cap },
    )
}
