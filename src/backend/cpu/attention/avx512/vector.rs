//! Registers of AVX-512.

use super::{
    super::vector::{Avx2, EXP2, Vector, methods},
    isa::*,
};
use half::bf16;

/// Sixteen lanes; needs AVX-512 F and DQ beside AVX2.
#[derive(Clone, Copy)]
pub struct Avx512(__m512);

impl Vector for Avx512 {
    const LANES: usize = 16;

    methods! {
        fn splat(x: f32) -> Self { Avx512(_mm512_set1_ps(x)) }
        fn load(from: *const f32) -> Self { Avx512(_mm512_loadu_ps(from)) }
        fn load_bf16(from: *const bf16) -> Self {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
        }
        fn store(self: Self, to: *mut f32) -> () { _mm512_storeu_ps(to, self.0) }
        fn add(self: Self, b: Self) -> Self { Avx512(_mm512_add_ps(self.0, b.0)) }
        fn mul(self: Self, b: Self) -> Self { Avx512(_mm512_mul_ps(self.0, b.0)) }
        fn div(self: Self, b: Self) -> Self { Avx512(_mm512_div_ps(self.0, b.0)) }
        fn min(self: Self, b: Self) -> Self { Avx512(_mm512_min_ps(b.0, self.0)) }
        fn max(self: Self, b: Self) -> Self { Avx512(_mm512_max_ps(b.0, self.0)) }
        fn mul_add(self: Self, b: Self, c: Self) -> Self { Avx512(_mm512_fmadd_ps(self.0, b.0, c.0)) }
        fn exp2(self: Self) -> Self {
            let lowest = _mm512_set1_ps(-126.0);
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, lowest);
            let x = _mm512_max_ps(lowest, self.0);
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            let r = _mm512_sub_ps(x, n);
            let mut poly = _mm512_set1_ps(EXP2[0]);
            poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(EXP2[1]));
            poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(EXP2[2]));
            poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(EXP2[3]));
            poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(EXP2[4]));
            poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(EXP2[5]));
            poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(1.0));
            Avx512(_mm512_maskz_scalef_ps(normal, poly, n))
        }
        fn keep_within(self: Self, at: Self, first: Self, last: Self) -> Self {
            let from = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(at.0, first.0);
            let both = _mm512_mask_cmp_ps_mask::<_CMP_LE_OQ>(from, at.0, last.0);
            Avx512(_mm512_mask_blend_ps(both, _mm512_set1_ps(f32::NEG_INFINITY), self.0))
        }
        fn sums(of: [Self; 4]) -> [f32; 4] {
            let [a, b, c, d] = of;
            Avx2::sums([fold(a), fold(b), fold(c), fold(d)])
        }
        fn prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// Adds the upper half to the lower.
#[inline(always)]
unsafe fn fold(x: Avx512) -> Avx2 {
    // SAFETY: as of `Vector`, which only `Avx512::sums` calls this under.
    unsafe { Avx2(_mm256_add_ps(_mm512_castps512_ps256(x.0), _mm512_extractf32x8_ps::<1>(x.0))) }
}
