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
use super::{gemm_int8::Input, lanes_avx2};
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
    // SAFETY: rows and a token in range, ours alone says the caller.
    let put = |token: usize, row: usize, y: &[f32]| unsafe { output.put(token, row, y) };
    #[cfg(target_arch = "x86_64")]
    if simd != Simd::Portable && lanes_avx2::takes(rows.dtype) {
        for begin in (0..x.tokens()).step_by(TOKENS) {
            let count = TOKENS.min(x.tokens() - begin);
            let input = Input::at(x, begin, 0, x.cols());
            let put = |token: usize, first: usize, y: &[f32]| put(begin + token, first, y);
            // SAFETY: the level says that the processor has AVX2; rows and tokens have the same number of columns.
            unsafe { lanes_avx2::rows(rows, range.clone(), input, count, put) }
        }
        return;
    }
    let mut token = 0;
    while token < x.tokens() {
        // A block that is read for eight is taken apart once.
        let count = match x.tokens() - token {
            left @ ..4 => left,
            4..TOKENS => 4,
            _ => TOKENS,
        };
        let tokens: [Token; TOKENS] = std::array::from_fn(|i| x.token(token + i.min(count - 1)));
        let begin = token;
        token += count;
        let put = |row: usize, y: &[f32]| y.iter().enumerate().for_each(|(i, &y)| put(begin + i, row, &[y]));
        #[cfg(target_arch = "x86_64")]
        if simd != Simd::Portable {
            // SAFETY: as above.
            unsafe {
                match count {
                    1 => super::dots_avx2::rows(rows, range.clone(), first::<1>(&tokens), put),
                    2 => super::dots_avx2::rows(rows, range.clone(), first::<2>(&tokens), put),
                    3 => super::dots_avx2::rows(rows, range.clone(), first::<3>(&tokens), put),
                    4 => super::dots_avx2::rows(rows, range.clone(), first::<4>(&tokens), put),
                    _ => super::dots_avx2::rows(rows, range.clone(), &tokens, put),
                }
            }
            continue;
        }
        for row in range.clone() {
            let mut y = [0.0; TOKENS];
            portable(rows, row, x.cols(), &tokens[..count], &mut y[..count]);
            put(row, &y[..count]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn first<'a, const T: usize>(tokens: &'a [Token<'a>; TOKENS]) -> &'a [Token<'a>; T] {
    tokens.first_chunk().expect("no more than there are")
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
                    (product(GROUP * g, GROUP), levels.min[g] * x.sum[g])
                };
                *y += sum as f32 * (levels.scale[g] * x.scale[g]) + offset;
            }
        }
    }
}
