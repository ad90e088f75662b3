//! Few tokens by block formats: bound by reading the weights, each block read once for all tokens, straight from
//! where it lies.

use super::{
    super::Simd,
    gemm::Output,
    levels::{GROUP, Levels, SLICE, form},
    pack::{Rows, unpack},
    quantize::{Activations, Token},
};
#[cfg(target_arch = "x86_64")]
use super::{dots_avx2, gemm_int8::Input};
use std::ops::Range;

/// Rows that the kernels take side by side.
pub(super) const ROWS: usize = 8;
/// Tokens that share a reading of the weights.
pub(super) const TOKENS: usize = 8;

/// `y[tokens, rows] = x · Wᵀ`.
///
/// # Safety
/// The processor has `simd`; nobody else has these rows of `output`.
pub(super) unsafe fn gemv_quant(
    simd: Simd,
    rows: Rows,
    range: Range<usize>,
    x: &Activations,
    output: Output,
) {
    for begin in (0..x.tokens()).step_by(TOKENS) {
        let count = TOKENS.min(x.tokens() - begin);
        // SAFETY: a row and a token in range, ours alone says the caller.
        let put = |token: usize, row: usize, y: f32| unsafe { output.put(begin + token, row, y) };
        #[cfg(target_arch = "x86_64")]
        if simd != Simd::Portable {
            let input = Input::at(x, begin, 0, x.cols());
            // SAFETY: the level says that the processor has AVX2; rows and tokens have the same number of columns.
            unsafe { dots_avx2::rows(rows, range.clone(), input, count, put) }
            continue;
        }
        let tokens: [Token; TOKENS] = std::array::from_fn(|i| x.token(begin + i.min(count - 1)));
        for row in range.clone() {
            let mut y = [0.0; TOKENS];
            portable(rows, row, x.cols(), &tokens[..count], &mut y[..count]);
            y[..count].iter().enumerate().for_each(|(token, &y)| put(token, row, y));
        }
    }
}

/// What every integer kernel computes, up to the order of its f32 additions.
fn portable(rows: Rows, row: usize, cols: usize, tokens: &[Token], y: &mut [f32]) {
    let halves = form(rows.dtype).is_some_and(|form| form.halves);
    let mut levels = Levels::ZERO;
    let slice = SLICE / rows.dtype.block_len() * rows.dtype.block_bytes();
    for (k, blocks) in (0..cols).step_by(SLICE).zip(rows.row(row).chunks(slice)) {
        unpack(Simd::Portable, rows.dtype, blocks, &mut levels);
        let n = SLICE.min(cols - k);
        for (token, y) in tokens.iter().zip(&mut *y) {
            let x = token.after(k);
            let product = |start: usize, len: usize| -> i32 {
                let pairs = levels.q[start..start + len].iter().zip(&x.q[start..]);
                pairs.map(|(&w, &v)| i32::from(w) * i32::from(v)).sum()
            };
            for g in 0..n / GROUP {
                let (sum, offset) = if halves {
                    let half = |h: usize| levels.sub[h] * product(16 * h, 16);
                    let min = |h: usize| levels.min[h] * x.half_sum[h];
                    (half(2 * g) + half(2 * g + 1), min(2 * g) + min(2 * g + 1))
                } else {
                    (product(GROUP * g, GROUP), levels.min[g] * x.pair[g][1])
                };
                *y += sum as f32 * (levels.scale[g] * x.pair[g][0]) + offset;
            }
        }
    }
}
