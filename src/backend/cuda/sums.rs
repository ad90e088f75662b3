//! Sums over rows and over everything: kernels/sums.cu.

use super::{Launch, launch::KernelArgs};
use crate::backend::Tensor;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SumRowsArgs {
    x: u64,
    out: u64,
    rows: u32,
    cols: u32,
    stride: u32,
}

// SAFETY: twin of `SumRowsArgs` in kernels/sums.cu.
unsafe impl KernelArgs for SumRowsArgs {}

/// Adds the rows of the F32 matrix at address `x`, `stride` elements apart, to `out`: a block 32 columns.
pub(super) fn sum_rows(x: u64, rows: usize, stride: usize, out: &Tensor) -> (Launch, SumRowsArgs) {
    let cols = out.elements() as u32;
    let args = SumRowsArgs { x, out: out.address(), rows: rows as u32, cols, stride: stride as u32 };
    (Launch { kernel: "sum_rows", grid: (cols.div_ceil(32), 1, 1), block: 512, shared: 0 }, args)
}

/// Partial sums of a sum of squares, on every card.
pub(super) const SQUARES_BLOCKS: u32 = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SumOfSquaresArgs {
    x: u64,
    partials: u64,
    out: u64,
    len: u64,
    blocks: u32,
}

// SAFETY: twin of `SumOfSquaresArgs` in kernels/sums.cu.
unsafe impl KernelArgs for SumOfSquaresArgs {}

/// `partials`: [`SQUARES_BLOCKS`] elements.
pub(super) fn sum_of_squares(x: &Tensor, partials: &Tensor, out: &Tensor) -> ([Launch; 2], SumOfSquaresArgs) {
    let args = SumOfSquaresArgs {
        x: x.address(),
        partials: partials.address(),
        out: out.address(),
        len: x.elements() as u64,
        blocks: SQUARES_BLOCKS,
    };
    let launch = |kernel, blocks| Launch { kernel, grid: (blocks, 1, 1), block: 256, shared: 0 };
    ([launch("sum_of_squares", SQUARES_BLOCKS), launch("sum_of_squares_end", 1)], args)
}
