//! Backward of RMSNorm: kernels/norm_backward.cu.

use super::{Launch, dtype_code, launch::KernelArgs};
use crate::{
    backend::Tensor,
    ops::{NormOutput, RmsNormParams},
};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RmsNormBackwardArgs {
    x: u64,
    weight: u64,
    dy: u64,
    dx: u64,
    partials: u64,
    weight_dtype: u32,
    rows: u32,
    cols: u32,
    eps: f32,
    offset: f32,
    add: u32,
}

// SAFETY: twin of `RmsNormBackwardArgs` in kernels/norm_backward.cu.
unsafe impl KernelArgs for RmsNormBackwardArgs {}

/// Rows that a block takes, and so adds to one row of partial sums.
const ROWS: u32 = 8;

/// Rows of partial sums.
pub(super) fn blocks(rows: u32) -> u32 {
    rows.div_ceil(ROWS)
}

/// `partials`: F32`[blocks, cols]`, for the gradient of the weight.
pub(super) fn rms_norm_backward(
    p: RmsNormParams,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    dx: &Tensor,
    partials: Option<&Tensor>,
) -> (Launch, RmsNormBackwardArgs) {
    let args = RmsNormBackwardArgs {
        x: x.address(),
        weight: weight.address(),
        dy: dy.address(),
        dx: dx.address(),
        partials: partials.map_or(0, Tensor::address),
        weight_dtype: dtype_code(weight.dtype()),
        rows: p.rows,
        cols: p.cols,
        eps: p.eps,
        offset: p.offset,
        add: u32::from(p.output == NormOutput::Add),
    };
    (Launch { kernel: "rms_norm_backward", grid: (blocks(p.rows), 1, 1), block: 256, shared: 0 }, args)
}
