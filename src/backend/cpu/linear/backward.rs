//! Backward of a linear map: both halves are products `y[m, n] += a[m, k] · B[k, n]` with B's rows read as they lie, by the
//! tiles of the forward pass.
//!
//! `dx = dy · W` has B = W, of any format; `dW += dyᵀ · x` has B = x and a = dyᵀ, turned once.

use super::{
    super::{
        Simd,
        team::{SendPtr, Team},
    },
    apart, copy_apart,
    gemm::Output,
    pack::{Rows, to_f32},
};
#[cfg(target_arch = "x86_64")]
use super::{gemm_f32::gemm_f32, pack::Layout};
use crate::{
    backend::DType,
    ops::{LinearBackwardParams, Weight},
};
use std::{cell::RefCell, ops::Range};

/// Columns of a task: whole blocks of every format.
fn columns_of_task(dtype: DType) -> usize {
    dtype.block_len().max(64)
}

/// `a[m, k]` with its rows `stride` apart.
#[derive(Clone, Copy)]
struct Left<'a> {
    a: &'a [f32],
    stride: usize,
    m: usize,
}

/// `dx (+)= dy · W`: `dy` `[tokens, rows]`, `dx` `[tokens, cols]`.
pub fn input(
    team: &mut Team,
    simd: Simd,
    p: LinearBackwardParams,
    dy: &[f32],
    weight: &Weight,
    dx: &mut [f32],
) {
    let (tokens, rows, cols) = (p.tokens as usize, weight.rows(), weight.cols());
    assert!(dy.len() >= tokens * rows && dx.len() >= tokens * cols, "checked in ops");
    with_apart(team, rows, &dy[..tokens * rows], |team, dy, stride| {
        let (mut first, mut accumulate) = (0, p.accumulate);
        for part in &weight.parts {
            let matrix = rows_of(&part.matrix);
            let left = Left { a: &dy[first..], stride, m: tokens };
            product(team, simd, left, matrix, part.matrix.rows(), cols, accumulate, dx);
            first += part.matrix.rows();
            accumulate = true;
        }
    })
}

/// `dW += dyᵀ · x`, `db += Σ dy`: `dy` `[tokens, rows]`, `x` `[tokens, cols]`.
pub fn weight(team: &mut Team, simd: Simd, p: LinearBackwardParams, dy: &[f32], x: &[f32], grad: &Weight) {
    let (tokens, rows, cols) = (p.tokens as usize, grad.rows(), grad.cols());
    assert!(dy.len() >= tokens * rows && x.len() >= tokens * cols, "checked in ops");
    let x = Rows { dtype: DType::F32, bytes: bytemuck::cast_slice(&x[..tokens * cols]), row_bytes: 4 * cols };
    with_turned(team, tokens, rows, dy, |team, turned, stride| {
        let mut first = 0;
        for part in &grad.parts {
            let m = part.matrix.rows();
            let left = Left { a: &turned[first * stride..], stride, m };
            if let Some(bias) = &part.bias {
                team.chunks_mut(bias.host_mut::<f32>(), 64, |task, bias| {
                    for (row, sum) in (64 * task..).zip(bias) {
                        *sum += left.a[row * stride..][..tokens].iter().sum::<f32>();
                    }
                });
            }
            product(team, simd, left, x, tokens, cols, true, part.matrix.host_mut());
            first += m;
        }
    })
}

fn rows_of(matrix: &crate::backend::Tensor) -> Rows<'_> {
    let row_bytes = matrix.bytes() / matrix.rows().max(1);
    Rows { dtype: matrix.dtype(), bytes: matrix.host_bytes(), row_bytes }
}

/// `y[m, n] (+)= a[m, k] · B[k, n]`
#[allow(clippy::too_many_arguments)]
fn product(
    team: &mut Team,
    simd: Simd,
    left: Left,
    b: Rows,
    k: usize,
    n: usize,
    accumulate: bool,
    y: &mut [f32],
) {
    assert!(y.len() >= left.m * n);
    if left.m == 0 || n == 0 {
        return;
    }
    let chunk = columns_of_task(b.dtype);
    let column_tasks = n.div_ceil(chunk);
    // Few columns for many threads: share out the rows too. Which rows share a task changes no sum.
    let splits = (4 * team.threads()).div_ceil(column_tasks).clamp(1, left.m.div_ceil(96));
    let split = left.m.div_ceil(splits).next_multiple_of(24);
    let y = SendPtr(y.as_mut_ptr());
    team.run(column_tasks * left.m.div_ceil(split), &|task| {
        let (column, row) = (task % column_tasks * chunk, task / column_tasks * split);
        let (columns, rows) = (column..n.min(column + chunk), row..left.m.min(row + split));
        let output = Output { y, stride: n, column: 0, bias: None, accumulate };
        // SAFETY: `simd` is what the processor has; tasks cover different rows or columns of `y`, which is borrowed until all
        // are done.
        unsafe { task_product(simd, left, b, k, columns, rows, output) }
    });
}

/// One task.
///
/// # Safety
/// The processor has `simd`, and no other task has these rows and columns of `output`.
unsafe fn task_product(
    simd: Simd,
    left: Left,
    b: Rows,
    k: usize,
    columns: Range<usize>,
    rows: Range<usize>,
    output: Output,
) {
    #[cfg(target_arch = "x86_64")]
    if simd != Simd::Portable {
        // SAFETY: passed on.
        unsafe { gemm_f32(simd, b, Layout::Columns, columns, rows, (left.a, left.stride), k, output) };
        return;
    }
    let mut sums = vec![0.0f32; rows.len() * columns.len()];
    let mut line = vec![0.0f32; columns.len()];
    for step in 0..k {
        to_f32(simd, b.dtype, b.window(step, columns.start, columns.len()), &mut line);
        for (row, sums) in rows.clone().zip(sums.chunks_exact_mut(columns.len())) {
            let a = left.a[row * left.stride + step];
            sums.iter_mut().zip(&line).for_each(|(sum, b)| *sum += a * b);
        }
    }
    for (row, sums) in rows.zip(sums.chunks_exact(columns.len())) {
        for (column, &sum) in columns.clone().zip(sums) {
            // SAFETY: in range, and ours alone, says the caller.
            unsafe { output.put(row, column, &[sum]) }
        }
    }
}

thread_local!(static COPY: RefCell<Vec<f32>> = RefCell::default());

/// Lends `x` with its rows at a distance that suits the caches.
fn with_apart(team: &mut Team, cols: usize, x: &[f32], work: impl FnOnce(&mut Team, &[f32], usize)) {
    if apart(cols) == cols {
        return work(team, x, cols);
    }
    COPY.with_borrow_mut(|copy| {
        copy_apart(team, cols, x, copy);
        work(team, copy, apart(cols))
    })
}

/// Lends `xᵀ`: `x` is `[rows, cols]`, the result `[cols, stride]` with stride ≥ rows.
fn with_turned(
    team: &mut Team,
    rows: usize,
    cols: usize,
    x: &[f32],
    work: impl FnOnce(&mut Team, &[f32], usize),
) {
    const SIDE: usize = 16;
    let stride = apart(rows);
    COPY.with_borrow_mut(|copy| {
        copy.resize(cols * stride, 0.0);
        team.chunks_mut(copy, SIDE * stride, |task, out| {
            let first = SIDE * task;
            for block in (0..rows).step_by(SIDE) {
                for (c, out) in (first..).zip(out.chunks_exact_mut(stride)) {
                    for r in block..rows.min(block + SIDE) {
                        out[r] = x[r * cols + c];
                    }
                }
            }
        });
        work(team, copy, stride)
    })
}
