//! Multiply-adds as fast as they go.

use super::{super::LANES, isa::*};
use std::hint::black_box;

/// # Safety
/// AVX-512 F.
#[inline(always)]
pub unsafe fn f32(steps: usize) -> [__m512; LANES] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        let mut sums = [_mm512_set1_ps(1.0); LANES];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        sums
    }
}

/// # Safety
/// AVX-512 F and BF16.
#[inline(always)]
pub unsafe fn bf16(steps: usize) -> [__m512; LANES] {
    // SAFETY: the caller's promise.
    unsafe {
        let a = _mm512_set1_ps(black_box(0.5));
        let pairs = _mm512_cvtne2ps_pbh(a, a);
        let mut sums = [_mm512_set1_ps(1.0); LANES];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, pairs, pairs);
            }
        }
        sums
    }
}

/// # Safety
/// AVX-512 F and VNNI.
#[inline(always)]
pub unsafe fn int8(steps: usize) -> [__m512i; LANES] {
    // SAFETY: the caller's promise.
    unsafe {
        let a = _mm512_set1_epi8(black_box(3));
        let mut sums = [_mm512_set1_epi32(1); LANES];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, a);
            }
        }
        sums
    }
}
