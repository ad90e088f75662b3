//! Few tokens by float rows, or by rows expanded to f32: bound by reading the weights, each read once for all tokens.

use super::{
    super::Simd,
    gemm::Output,
    pack::{Rows, to_f32},
};
use crate::backend::DType;
use std::{cell::RefCell, ops::Range};

/// Tokens that one pass over a row serves.
pub(super) const TOKENS: usize = 4;

/// `y[tokens, rows] = x · Wᵀ` in f32, from weights of any format; `x` is `[tokens, cols]`.
///
/// # Safety
/// The processor has `simd`; nobody else has these rows of `output`.
pub(super) unsafe fn gemv_float(
    simd: Simd,
    rows: Rows,
    range: Range<usize>,
    x: &[f32],
    cols: usize,
    output: Output,
) {
    thread_local!(static EXPANDED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    let tokens = x.len() / cols.max(1);
    // The portable reference knows f32 only.
    let direct = !rows.dtype.is_quantized() && (simd != Simd::Portable || rows.dtype == DType::F32);
    EXPANDED.with_borrow_mut(|expanded| {
        for row in range {
            let mut bytes = rows.row(row);
            let mut dtype = rows.dtype;
            if !direct {
                expanded.resize(cols, 0.0);
                to_f32(simd, dtype, bytes, expanded);
                (bytes, dtype) = (bytemuck::cast_slice(expanded), DType::F32);
            }
            for token in (0..tokens).step_by(TOKENS) {
                let count = TOKENS.min(tokens - token);
                let mut y = [0.0; TOKENS];
                dots(simd, dtype, bytes, cols, &x[token * cols..][..count * cols], &mut y[..count]);
                for (i, &y) in y[..count].iter().enumerate() {
                    // SAFETY: a row and a token in range, ours alone says the caller.
                    unsafe { output.put(token + i, row, &[y]) }
                }
            }
        }
    })
}

/// One row by `y.len()` ≤ [`TOKENS`] tokens.
fn dots(simd: Simd, dtype: DType, row: &[u8], cols: usize, x: &[f32], y: &mut [f32]) {
    assert!(x.len() == y.len() * cols && row.len() == cols * dtype.block_bytes());
    #[cfg(target_arch = "x86_64")]
    if simd != Simd::Portable {
        // SAFETY: the level says that the processor has AVX2, FMA and F16C; the sizes were just checked.
        unsafe {
            match dtype {
                DType::F32 => avx2::dots::<avx2::F32>(row, cols, x, y),
                DType::F16 => avx2::dots::<avx2::F16>(row, cols, x, y),
                _ => avx2::dots::<avx2::Bf16>(row, cols, x, y),
            }
        }
        return;
    }
    for (x, y) in x.chunks_exact(cols).zip(y) {
        let mut lanes = [0.0f32; 8];
        for (i, (w, v)) in row.as_chunks::<4>().0.iter().zip(x).enumerate() {
            lanes[i % 8] += f32::from_le_bytes(*w) * v;
        }
        *y = lanes.iter().sum();
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    use half::{bf16, f16};
    use std::arch::x86_64::*;

    /// A plain float format.
    pub trait Float {
        const BYTES: usize;
        /// # Safety
        /// AVX2 and F16C, eight readable elements.
        unsafe fn eight(from: *const u8) -> __m256;
        /// # Safety
        /// One readable element.
        unsafe fn one(from: *const u8) -> f32;
    }

    pub struct F32;
    pub struct F16;
    pub struct Bf16;

    impl Float for F32 {
        const BYTES: usize = 4;
        #[inline(always)]
        unsafe fn eight(from: *const u8) -> __m256 {
            // SAFETY: as the trait says.
            unsafe { _mm256_loadu_ps(from.cast()) }
        }
        #[inline(always)]
        unsafe fn one(from: *const u8) -> f32 {
            // SAFETY: as the trait says.
            unsafe { from.cast::<f32>().read_unaligned() }
        }
    }

    impl Float for F16 {
        const BYTES: usize = 2;
        #[inline(always)]
        unsafe fn eight(from: *const u8) -> __m256 {
            // SAFETY: as the trait says.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }
        #[inline(always)]
        unsafe fn one(from: *const u8) -> f32 {
            // SAFETY: as the trait says.
            f16::from_bits(unsafe { from.cast::<u16>().read_unaligned() }).to_f32()
        }
    }

    impl Float for Bf16 {
        const BYTES: usize = 2;
        #[inline(always)]
        unsafe fn eight(from: *const u8) -> __m256 {
            // SAFETY: as the trait says.
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn one(from: *const u8) -> f32 {
            // SAFETY: as the trait says.
            bf16::from_bits(unsafe { from.cast::<u16>().read_unaligned() }).to_f32()
        }
    }

    /// The eight lanes, added in a fixed order.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn sum(v: __m256) -> f32 {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }

    /// # Safety
    /// The row has `cols` elements, `x` `y.len()` rows of `cols`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn dots<F: Float>(row: &[u8], cols: usize, x: &[f32], y: &mut [f32]) {
        let (row, x) = (row.as_ptr(), x.as_ptr());
        // SAFETY: passed on.
        unsafe {
            match y.len() {
                1 => y.copy_from_slice(&dots_of::<F, 1>(row, cols, x)),
                2 => y.copy_from_slice(&dots_of::<F, 2>(row, cols, x)),
                3 => y.copy_from_slice(&dots_of::<F, 3>(row, cols, x)),
                _ => y.copy_from_slice(&dots_of::<F, 4>(row, cols, x)),
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dots_of<F: Float, const T: usize>(row: *const u8, cols: usize, x: *const f32) -> [f32; T] {
        // Chains for the latency of FMA; always four, so that a token's sum doesn't depend on its company.
        let mut acc = [[_mm256_setzero_ps(); 4]; T];
        let mut y = [0.0; T];
        let whole = cols / 32 * 32;
        // SAFETY: the caller vouches for `cols` elements of the row and of each x.
        unsafe {
            for k in (0..whole).step_by(32) {
                for j in 0..4 {
                    let w = F::eight(row.add((k + 8 * j) * F::BYTES));
                    for t in 0..T {
                        let v = _mm256_loadu_ps(x.add(t * cols + k + 8 * j));
                        acc[t][j] = _mm256_fmadd_ps(w, v, acc[t][j]);
                    }
                }
            }
            for (t, y) in y.iter_mut().enumerate() {
                let a = &acc[t];
                *y = sum(_mm256_add_ps(_mm256_add_ps(a[0], a[1]), _mm256_add_ps(a[2], a[3])));
                for k in whole..cols {
                    *y = F::one(row.add(k * F::BYTES)).mul_add(*x.add(t * cols + k), *y);
                }
            }
        }
        y
    }
}
