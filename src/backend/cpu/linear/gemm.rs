//! The loops around the tile kernels: slices of the columns, panels of rows, blocks of tokens.

use super::{super::team::SendPtr, pack::Window};
use std::ops::Range;

/// Where results go: `[tokens, stride]`, one row of the weights a column.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    pub y: SendPtr<f32>,
    pub stride: usize,
    /// Column of the part's first row.
    pub column: usize,
    pub bias: Option<&'a [f32]>,
    pub accumulate: bool,
}

impl Output<'_> {
    /// # Safety
    /// Token and row are in range and no other task has them.
    #[inline(always)]
    unsafe fn at(&self, token: usize, row: usize) -> *mut f32 {
        // SAFETY: in range, says the caller.
        unsafe { self.y.get().add(token * self.stride + self.column + row) }
    }

    /// Stores finished products of a token with the rows from `row` on.
    ///
    /// # Safety
    /// As [`Output::at`], for all of the rows.
    #[inline(always)]
    pub unsafe fn put(&self, token: usize, row: usize, products: &[f32]) {
        // SAFETY: says the caller.
        let y = unsafe { std::slice::from_raw_parts_mut(self.at(token, row), products.len()) };
        match self.bias.map(|bias| &bias[row..][..products.len()]) {
            None if self.accumulate => y.iter_mut().zip(products).for_each(|(y, product)| *y += product),
            None => y.copy_from_slice(products),
            Some(bias) => {
                for ((y, product), bias) in y.iter_mut().zip(products).zip(bias) {
                    let value = product + bias;
                    *y = if self.accumulate { *y + value } else { value };
                }
            }
        }
    }

    /// Puts what the products are added to.
    ///
    /// # Safety
    /// As [`Output::at`], for all of the ranges.
    unsafe fn start(&self, tokens: Range<usize>, rows: Range<usize>) {
        for token in tokens {
            // SAFETY: says the caller.
            let y = unsafe { std::slice::from_raw_parts_mut(self.at(token, rows.start), rows.len()) };
            match self.bias.map(|bias| &bias[rows.clone()]) {
                Some(bias) if self.accumulate => y.iter_mut().zip(bias).for_each(|(y, b)| *y += b),
                Some(bias) => y.copy_from_slice(bias),
                None if self.accumulate => {}
                None => y.fill(0.0),
            }
        }
    }
}

/// Sizes of one kernel.
pub(super) struct Blocking {
    /// Rows of a panel.
    pub lanes: usize,
    /// Tokens of a tile.
    pub tile: usize,
    /// Tokens whose slice stays in the first-level cache while the panels pass; a multiple of `tile`.
    pub tokens: usize,
    /// Columns of a slice.
    pub slice: usize,
}

/// One tile: which panel, tokens `token..token + count`, columns `k..k + n`; what it computes is added to `count` rows
/// of `y`, `stride` apart.
pub(super) struct Tile {
    pub panel: usize,
    pub token: usize,
    pub count: usize,
    pub k: usize,
    pub n: usize,
    pub y: *mut f32,
    pub stride: usize,
}

/// Multiplies `rows` of a matrix with `tokens`. `pack` unpacks one panel, `tile` multiplies.
///
/// # Safety
/// No other task has these rows of these tokens of `output`.
pub(super) unsafe fn blocked<S>(
    b: Blocking,
    (rows, tokens, cols): (Range<usize>, Range<usize>, usize),
    output: Output,
    scratch: &mut S,
    pack: impl Fn(&mut S, usize, Window),
    tile: impl Fn(&S, Tile),
) {
    // SAFETY: says the caller.
    unsafe { output.start(tokens.clone(), rows.clone()) };
    let panels = rows.len().div_ceil(b.lanes);
    let panel_rows = |panel: usize| {
        let first = rows.start + panel * b.lanes;
        (first, b.lanes.min(rows.end - first))
    };
    for k in (0..cols).step_by(b.slice) {
        let n = b.slice.min(cols - k);
        for panel in 0..panels {
            let (first, count) = panel_rows(panel);
            pack(scratch, panel, Window { first, count, k, n });
        }
        for block in tokens.clone().step_by(b.tokens) {
            let end = tokens.end.min(block + b.tokens);
            for panel in 0..panels {
                let (first, lanes) = panel_rows(panel);
                for token in (block..end).step_by(b.tile) {
                    let count = b.tile.min(end - token);
                    // SAFETY: in range, and ours alone, says the caller.
                    let y = unsafe { output.at(token, first) };
                    if lanes == b.lanes {
                        tile(scratch, Tile { panel, token, count, k, n, y, stride: output.stride });
                        continue;
                    }
                    let mut whole = [0.0f32; 512];
                    debug_assert!(b.tile * b.lanes <= whole.len());
                    let stride = b.lanes;
                    tile(scratch, Tile { panel, token, count, k, n, y: whole.as_mut_ptr(), stride });
                    for (i, whole) in whole.chunks_exact(b.lanes).take(count).enumerate() {
                        for (j, v) in whole[..lanes].iter().enumerate() {
                            // SAFETY: row `first + j` exists (j < lanes) and is ours.
                            unsafe { *y.add(i * output.stride + j) += v }
                        }
                    }
                }
            }
        }
    }
}
