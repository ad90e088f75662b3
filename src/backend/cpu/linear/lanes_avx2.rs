//! Dot products of rows of blocks with a few quantised tokens, on AVX2: eight rows at once, one in each 32-bit lane.
//!
//! The eight rows' blocks are read where they lie and turned in registers, so that a vector has four neighbouring
//! columns of every row; levels are taken out of their bits after that, for eight rows by one instruction. Per token a
//! group of 32 columns then takes eight products with four inputs spread to all lanes, added up in i16 as far as
//! levels of that size allow, and one conversion, one scale and one offset for all eight rows, with nothing to add up
//! across lanes in the end. A row's sum is the same in any lane and beside any number of tokens.

mod formats;

use super::{gemm_int8::Input, levels::GROUP, pack::Rows};
use crate::backend::DType;
use formats::*;
use std::{arch::x86_64::*, ops::Range};

/// Rows side by side.
const LANES: usize = super::gemv_quant::ROWS;
/// Most tokens, each with a vector of sums.
const TOKENS: usize = super::gemv_quant::TOKENS;

/// One block of each row.
type Blocks = [*const u8; LANES];

/// 32 columns of eight rows.
struct Group {
    /// Four neighbouring columns of each row.
    levels: [__m256i; 8],
    scale: __m256,
    /// What sums of i16 pairs are multiplied by, of each half group: ones without half groups.
    sub: [__m256i; 2],
    /// What the inputs' sum is multiplied by, of each half group; the first one of all 32 without half groups.
    min: [__m256; 2],
}

/// A block format. A block is `RUNS` runs of bits, each of them with the levels of `GROUPS` groups.
trait Format {
    const BYTES: usize;
    const RUNS: usize;
    const GROUPS: usize;
    /// Column quadruples that are added up in i16. One: the levels are signed bytes, and there is no offset.
    const QUADS: usize;
    const HALVES: bool;
    /// What is read once a block.
    type Head;
    type Run;
    unsafe fn head(blocks: Blocks) -> Self::Head;
    unsafe fn run(blocks: Blocks, run: usize) -> Self::Run;
    /// Group `i` of run `run`.
    unsafe fn group(head: &Self::Head, bits: &Self::Run, run: usize, i: usize) -> Group;
}

/// Whether these are rows for [`rows`]. With more bits a level one token is slower this way: what eight rows need arrives
/// more slowly from memory than one row after the other.
pub(super) fn takes(dtype: DType) -> bool {
    !matches!(dtype, DType::Q8_0 | DType::Q5K | DType::Q6K)
}

/// Calls `put(token, row, products)`, of consecutive rows, for the first `tokens` ≤ [`TOKENS`] tokens of `x` and all rows.
///
/// # Safety
/// AVX2, FMA, F16C; `x` has as many tokens, and tokens have as many columns as rows.
pub(super) unsafe fn rows(
    rows: Rows,
    range: Range<usize>,
    x: Input,
    tokens: usize,
    put: impl Fn(usize, usize, &[f32]),
) {
    // SAFETY: passed on.
    unsafe {
        match rows.dtype {
            DType::Q4_0 => rows_of::<Q4_0>(rows, range, x, tokens, put),
            DType::Q4_1 => rows_of::<Q4_1>(rows, range, x, tokens, put),
            DType::Q5_0 => rows_of::<Q5_0>(rows, range, x, tokens, put),
            DType::Q5_1 => rows_of::<Q5_1>(rows, range, x, tokens, put),
            DType::Iq4Nl => rows_of::<Iq4Nl>(rows, range, x, tokens, put),
            DType::Q2K => rows_of::<Q2K>(rows, range, x, tokens, put),
            DType::Q3K => rows_of::<Q3K>(rows, range, x, tokens, put),
            DType::Q4K => rows_of::<Q4K>(rows, range, x, tokens, put),
            dtype => unreachable!("{dtype} takes rows one by one, or has no blocks"),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<F: Format>(
    rows: Rows,
    range: Range<usize>,
    x: Input,
    tokens: usize,
    put: impl Fn(usize, usize, &[f32]),
) {
    assert!(tokens <= TOKENS && x.groups * F::BYTES == rows.row_bytes * F::RUNS * F::GROUPS);
    for first in range.clone().step_by(LANES) {
        let count = LANES.min(range.end - first);
        // Lanes without a row of their own repeat the last.
        let from = std::array::from_fn(|i| rows.row(first + i.min(count - 1)).as_ptr());
        // SAFETY: eight rows of as many groups as `x` has, and tokens, says the caller.
        let sums = unsafe {
            // One token alone: its sum has a register, and its loop is none.
            match tokens {
                1 => eight::<F, true>(from, rows.row_bytes, x, 1),
                _ => eight::<F, false>(from, rows.row_bytes, x, tokens),
            }
        };
        for (token, sum) in sums[..tokens].iter().enumerate() {
            let mut y = [0.0; LANES];
            // SAFETY: eight numbers.
            unsafe { _mm256_storeu_ps(y.as_mut_ptr(), *sum) }
            put(token, first, &y[..count]);
        }
    }
}

/// The products of eight rows with each token.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn eight<F: Format, const ONE: bool>(
    rows: Blocks,
    row_bytes: usize,
    x: Input,
    tokens: usize,
) -> [__m256; TOKENS] {
    let mut sums = [_mm256_setzero_ps(); TOKENS];
    let tokens = if ONE { 1 } else { tokens };
    // What eight rows have for one group. The next eight lie behind these and are asked for meanwhile, in the order of
    // memory: eight rows at once are no stream that the processor foresees.
    let share = LANES * F::BYTES / (F::RUNS * F::GROUPS);
    let next = rows[0].wrapping_add(LANES * row_bytes);
    for block in 0..row_bytes / F::BYTES {
        // SAFETY: the caller vouches for the rows and for as many groups of `tokens` tokens; a prefetch never faults.
        unsafe {
            let blocks = rows.map(|row| row.add(block * F::BYTES));
            let head = F::head(blocks);
            // Written out: shifts by constants, and levels that stay in registers.
            macro_rules! group {
                ($bits:ident, $run:literal, $i:literal) => {{
                    let g = (block * F::RUNS + $run) * F::GROUPS + $i;
                    for line in 0..share.div_ceil(64) {
                        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(g * share + 64 * line).cast());
                    }
                    add::<F>(&F::group(&head, &$bits, $run, $i), g, x, tokens, &mut sums);
                }};
            }
            macro_rules! run {
                ($run:literal) => {{
                    let bits = F::run(blocks, $run);
                    group!(bits, $run, 0);
                    if F::GROUPS > 1 {
                        group!(bits, $run, 1);
                    }
                    if F::GROUPS > 2 {
                        group!(bits, $run, 2);
                        group!(bits, $run, 3);
                    }
                }};
            }
            run!(0);
            if F::RUNS > 1 {
                run!(1);
            }
            if F::RUNS > 2 {
                run!(2);
                run!(3);
            }
        }
    }
    sums
}

/// Adds the products with group `g` of `tokens` tokens to their sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add<F: Format>(w: &Group, g: usize, x: Input, tokens: usize, sums: &mut [__m256; TOKENS]) {
    for t in 0..tokens {
        // SAFETY: the caller vouches for the group of each token.
        unsafe {
            let q = x.q.add(t * x.stride + GROUP * g).cast::<i32>();
            let mut total = _mm256_setzero_si256();
            for chunk in 0..8 / F::QUADS {
                let mut part = _mm256_setzero_si256();
                for quad in chunk * F::QUADS..(chunk + 1) * F::QUADS {
                    let (w, v) = (w.levels[quad], _mm256_set1_epi32(q.add(quad).read_unaligned()));
                    let product = if F::QUADS == 1 {
                        // |w| · sign(w) v for signed bytes: a pair's sum is at most 128 · 127 · 2.
                        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(v, w))
                    } else {
                        _mm256_maddubs_epi16(w, v)
                    };
                    part = _mm256_add_epi16(part, product);
                }
                let factor = w.sub[chunk * F::QUADS / 4];
                total = _mm256_add_epi32(total, _mm256_madd_epi16(part, factor));
            }
            let group = t * (x.stride / GROUP) + g;
            let pair = &*x.pair.add(group);
            if F::HALVES {
                for h in 0..2 {
                    let half_sum = _mm256_broadcast_ss(&*x.half_sum.add(2 * group + h));
                    sums[t] = _mm256_fmadd_ps(w.min[h], half_sum, sums[t]);
                }
            } else if F::QUADS > 1 {
                sums[t] = _mm256_fmadd_ps(w.min[0], _mm256_broadcast_ss(&pair[1]), sums[t]);
            }
            let factor = _mm256_mul_ps(w.scale, _mm256_broadcast_ss(&pair[0]));
            sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), factor, sums[t]);
        }
    }
}
