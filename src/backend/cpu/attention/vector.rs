//! The few vector operations that attention is made of, once per register width.
//!
//! The kernels are written over [`Vector`] and inlined into functions that enable the width's CPU features.

use half::bf16;

/// A register of f32.
///
/// # Safety
/// Every method must run on a CPU that has the features of the implementing type; pointers are valid for
/// [`Vector::LANES`] elements of any alignment.
pub(super) trait Vector: Copy {
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    unsafe fn min(self, b: Self) -> Self;
    /// A NaN in `self` stays.
    unsafe fn max(self, b: Self) -> Self;
    /// `self · b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// `2^self` for `self` below 100, 0 below the normal numbers, within two units in the last place.
    unsafe fn exp2(self) -> Self;
    /// `self` in the lanes where `first ≤ at ≤ last`, −∞ elsewhere.
    unsafe fn keep_within(self, at: Self, first: Self, last: Self) -> Self;
    /// The sum of the lanes of each.
    unsafe fn sums(of: [Self; 4]) -> [f32; 4];
    unsafe fn prefetch(at: *const u8);
}

/// Elements of a KV page.
pub(super) trait PageElement: Copy {
    /// # Safety
    /// As of [`Vector`].
    unsafe fn load<V: Vector>(from: *const Self) -> V;
    fn widen(self) -> f32;
}

impl PageElement for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl PageElement for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const bf16) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// `2^r` on [−½, ½]: a minimax polynomial, highest power first, the last coefficient being 1.
pub(super) const EXP2: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 0.240_226_48, std::f32::consts::LN_2];

/// tanh as a ratio of minimax polynomials in x², highest power first (the fit of Eigen's `ptanh`).
const TANH_NUMERATOR: [f32; 7] = [
    -2.760_768_5e-16,
    2.000_188e-13,
    -8.604_672e-11,
    5.122_297_3e-8,
    1.485_722_4e-5,
    6.372_619_5e-4,
    4.893_524_6e-3,
];
const TANH_DENOMINATOR: [f32; 4] = [1.198_258_4e-6, 1.185_347_1e-4, 2.268_434_6e-3, 4.893_525_4e-3];

/// `tanh(x)`, relative error below 4e-7.
///
/// # Safety
/// As of [`Vector`].
#[inline(always)]
pub(super) unsafe fn tanh<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        // Beyond, the ratio would leave [−1, 1].
        const END: f32 = 7.905_311;
        let x = x.min(V::splat(END)).max(V::splat(-END));
        let square = x.mul(x);
        let mut numerator = V::splat(TANH_NUMERATOR[0]);
        let mut i = 1;
        while i < TANH_NUMERATOR.len() {
            numerator = numerator.mul_add(square, V::splat(TANH_NUMERATOR[i]));
            i += 1;
        }
        let mut denominator = V::splat(TANH_DENOMINATOR[0]);
        let mut i = 1;
        while i < TANH_DENOMINATOR.len() {
            denominator = denominator.mul_add(square, V::splat(TANH_DENOMINATOR[i]));
            i += 1;
        }
        x.mul(numerator).div(denominator)
    }
}

/// Gives each method of an implementation its body: one expression of intrinsics.
macro_rules! methods {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty { $($body:tt)* })*) => {
        $(#[inline(always)]
        unsafe fn $name($($arg: $type),*) -> $result {
            // SAFETY: the trait's contract: the CPU has the features, pointers are valid for all lanes.
            unsafe { $($body)* }
        })*
    };
}
pub(super) use methods;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{EXP2, Vector};
    use half::bf16;
    use std::arch::x86_64::*;

    /// Eight lanes; needs AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(pub(in super::super) __m256);

    impl Vector for Avx2 {
        const LANES: usize = 8;

        methods! {
            fn splat(x: f32) -> Self { Avx2(_mm256_set1_ps(x)) }
            fn load(from: *const f32) -> Self { Avx2(_mm256_loadu_ps(from)) }
            fn load_bf16(from: *const bf16) -> Self {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves)))
            }
            fn store(self: Self, to: *mut f32) -> () { _mm256_storeu_ps(to, self.0) }
            fn add(self: Self, b: Self) -> Self { Avx2(_mm256_add_ps(self.0, b.0)) }
            fn mul(self: Self, b: Self) -> Self { Avx2(_mm256_mul_ps(self.0, b.0)) }
            fn div(self: Self, b: Self) -> Self { Avx2(_mm256_div_ps(self.0, b.0)) }
            fn min(self: Self, b: Self) -> Self { Avx2(_mm256_min_ps(b.0, self.0)) }
            // The instruction returns its second operand if either is NaN.
            fn max(self: Self, b: Self) -> Self { Avx2(_mm256_max_ps(b.0, self.0)) }
            fn mul_add(self: Self, b: Self, c: Self) -> Self { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0)) }
            fn exp2(self: Self) -> Self {
                let lowest = _mm256_set1_ps(-126.0);
                let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(self.0, lowest);
                let x = _mm256_max_ps(lowest, self.0);
                // Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits of the significand.
                let magic = _mm256_set1_ps(12_582_912.0);
                let shifted = _mm256_add_ps(x, magic);
                let r = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
                let mut poly = _mm256_set1_ps(EXP2[0]);
                poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(EXP2[1]));
                poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(EXP2[2]));
                poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(EXP2[3]));
                poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(EXP2[4]));
                poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(EXP2[5]));
                poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(1.0));
                let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
                let value = _mm256_add_epi32(_mm256_castps_si256(poly), exponent);
                Avx2(_mm256_and_ps(_mm256_castsi256_ps(value), normal))
            }
            fn keep_within(self: Self, at: Self, first: Self, last: Self) -> Self {
                let from = _mm256_cmp_ps::<_CMP_GE_OQ>(at.0, first.0);
                let to = _mm256_cmp_ps::<_CMP_LE_OQ>(at.0, last.0);
                let outside = _mm256_set1_ps(f32::NEG_INFINITY);
                Avx2(_mm256_blendv_ps(outside, self.0, _mm256_and_ps(from, to)))
            }
            fn sums(of: [Self; 4]) -> [f32; 4] {
                let [a, b, c, d] = of;
                let low = _mm256_add_ps(_mm256_unpacklo_ps(a.0, b.0), _mm256_unpackhi_ps(a.0, b.0));
                let high = _mm256_add_ps(_mm256_unpacklo_ps(c.0, d.0), _mm256_unpackhi_ps(c.0, d.0));
                let all = _mm256_add_ps(
                    _mm256_shuffle_ps::<0b01_00_01_00>(low, high),
                    _mm256_shuffle_ps::<0b11_10_11_10>(low, high),
                );
                let all = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
                std::mem::transmute::<__m128, [f32; 4]>(all)
            }
            fn prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::{
        super::{avx512, soft512},
        *,
    };
    use crate::backend::cpu::Simd;

    /// The last lane of `2^x` and of `tanh(x)`.
    #[inline(always)]
    unsafe fn both<V: Vector>(x: f32) -> (f32, f32) {
        let (mut power, mut tangent) = ([0.0; 16], [0.0; 16]);
        // SAFETY: the caller's promise; both arrays hold a register of any width.
        unsafe {
            V::splat(x).exp2().store(power.as_mut_ptr());
            tanh(V::splat(x)).store(tangent.as_mut_ptr());
        }
        (power[V::LANES - 1], tangent[V::LANES - 1])
    }

    #[target_feature(enable = "avx2,fma")]
    fn avx2(x: f32) -> (f32, f32) {
        // SAFETY: the features are enabled here.
        unsafe { both::<Avx2>(x) }
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512dq")]
    fn avx512(x: f32) -> (f32, f32) {
        // SAFETY: the features are enabled here.
        unsafe { both::<avx512::vector::Avx512>(x) }
    }

    #[target_feature(enable = "avx2,fma")]
    fn soft512(x: f32) -> (f32, f32) {
        // SAFETY: the features are enabled here.
        unsafe { both::<soft512::vector::Avx512>(x) }
    }

    fn keeps_its_digits(both: impl Fn(f32) -> (f32, f32)) {
        for i in 0..200_000 {
            let x = -125.9 * i as f32 / 200_000.0;
            let exact = f64::from(x).exp2();
            assert!((f64::from(both(x).0) - exact).abs() <= 1.5e-7 * exact, "exp2({x})");
            let x = 12.0 * (i as f32 / 200_000.0).powi(3);
            let exact = f64::from(x).tanh();
            assert!((f64::from(both(x).1) - exact).abs() <= 4e-7 * exact, "tanh({x})");
            assert_eq!(both(-x).1, -both(x).1, "tanh is odd");
        }
        assert_eq!(both(0.0).0, 1.0);
        for tiny in [-127.0, -149.0, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(both(tiny).0, 0.0, "exp2({tiny})");
        }
        assert!(both(f32::NAN).0.is_nan() && both(f32::NAN).1.is_nan());
    }

    #[test]
    fn exp2_and_tanh_keep_their_digits() {
        for simd in Simd::testable() {
            match simd {
                Simd::Portable => {}
                // SAFETY: this CPU has the level.
                Simd::Avx2 => keeps_its_digits(|x| unsafe { avx2(x) }),
                // SAFETY: as above.
                Simd::Avx512 | Simd::Avx512Bf16 => keeps_its_digits(|x| unsafe { avx512(x) }),
                // SAFETY: as above; it needs AVX2.
                Simd::Soft512 => keeps_its_digits(|x| unsafe { soft512(x) }),
            }
        }
    }
}
