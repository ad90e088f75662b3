//! Backward of linear maps: kernels/linear_backward.cu.

use super::{Launch, dtype_code, launch::KernelArgs, linear_decode::PARTS};
use crate::{
    backend::{Precision, Tensor},
    ops::{LinearBackwardParams, Weight, WeightPart},
};

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct LinearBackwardArgs {
    weights: [u64; PARTS],
    grads: [u64; PARTS],
    dy: u64,
    x: u64,
    dx: u64,
    rows: [u32; PARTS],
    columns: [u32; PARTS],
    dtypes: [u32; PARTS],
    parts: u32,
    tokens: u32,
    cols: u32,
    stride: u32,
    x_dtype: u32,
    add: u32,
}

// SAFETY: twin of `LinearBackwardArgs` in kernels/linear_backward.cu.
unsafe impl KernelArgs for LinearBackwardArgs {}

/// Twin of `SIDE` in kernels/product.cuh: tokens, rows or columns of a block.
pub(super) const SIDE: u32 = 64;

/// Each part that has rows, with its first column of `dy`.
pub(super) fn columns(weight: &Weight) -> Vec<(u32, &WeightPart)> {
    let mut column = 0;
    let mut parts = Vec::with_capacity(weight.parts.len());
    for part in &weight.parts {
        parts.push((column, part));
        column += part.matrix.rows() as u32;
    }
    parts.retain(|(_, part)| part.matrix.rows() > 0);
    parts
}

/// `dx = dy · W`: a launch for up to three parts, the later ones add to the earlier.
pub(super) fn input(
    p: LinearBackwardParams,
    dy: &Tensor,
    weight: &Weight,
    dx: &Tensor,
) -> Vec<(Launch, LinearBackwardArgs)> {
    let parts = columns(weight);
    let kernel = name(p.precision, "linear_backward_input_bf16", "linear_backward_input_f32");
    let cols = dx.row_len() as u32;
    // Of no parts the sum is 0, which is written too.
    let groups: Vec<_> = if parts.is_empty() { vec![&parts[..]] } else { parts.chunks(PARTS).collect() };
    let launch = |(i, group): (usize, &&[(u32, &WeightPart)])| {
        let mut args = LinearBackwardArgs::new(p, dy, group);
        args.dx = dx.address();
        args.cols = cols;
        args.add = u32::from(p.accumulate || i > 0);
        for (to, (_, part)) in args.weights.iter_mut().zip(*group) {
            *to = part.matrix.address();
        }
        (launch(kernel, (p.tokens.div_ceil(SIDE), cols.div_ceil(SIDE), 1), p.precision), args)
    };
    groups.iter().enumerate().map(launch).collect()
}

/// `dW += dyᵀ · x`.
pub(super) fn weight(
    p: LinearBackwardParams,
    dy: &Tensor,
    x: &Tensor,
    grad: &Weight,
) -> Vec<(Launch, LinearBackwardArgs)> {
    let kernel = name(p.precision, "linear_backward_weight_bf16", "linear_backward_weight_f32");
    let launch = |group: &[(u32, &WeightPart)]| {
        let mut args = LinearBackwardArgs::new(p, dy, group);
        args.x = x.address();
        args.x_dtype = dtype_code(x.dtype());
        args.cols = x.row_len() as u32;
        for (to, (_, part)) in args.grads.iter_mut().zip(group) {
            *to = part.matrix.address();
        }
        let most = args.rows.into_iter().max().unwrap_or(0);
        let grid = (most.div_ceil(SIDE), args.cols.div_ceil(SIDE), group.len() as u32);
        (launch(kernel, grid, p.precision), args)
    };
    columns(grad).chunks(PARTS).map(launch).collect()
}

impl LinearBackwardArgs {
    fn new(p: LinearBackwardParams, dy: &Tensor, parts: &[(u32, &WeightPart)]) -> LinearBackwardArgs {
        let mut args = LinearBackwardArgs {
            dy: dy.address(),
            parts: parts.len() as u32,
            tokens: p.tokens,
            stride: dy.row_len() as u32,
            ..LinearBackwardArgs::default()
        };
        for (i, (column, part)) in parts.iter().enumerate() {
            args.rows[i] = part.matrix.rows() as u32;
            args.columns[i] = *column;
            args.dtypes[i] = dtype_code(part.matrix.dtype());
        }
        args
    }
}

fn name(precision: Precision, fast: &'static str, f32: &'static str) -> &'static str {
    if precision == Precision::Fast { fast } else { f32 }
}

/// A block of `Product::THREADS`.
fn launch(kernel: &'static str, grid: (u32, u32, u32), precision: Precision) -> Launch {
    Launch { kernel, grid, block: if precision == Precision::Fast { 128 } else { 256 }, shared: 0 }
}
