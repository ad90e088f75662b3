//! The AVX-512 instructions of our kernels in plain Rust, lane by lane: lets machines without them run the kernels'
//! own source in tests.
//!
//! Names, arguments and alignment are those of `std::arch`, which gives everything else; the arithmetic follows the
//! pseudo-code of Intel's Software Developer's Manual, volume 2. Rounding is to nearest even and subnormal numbers are
//! kept, as everywhere in Rust, except where an instruction does otherwise by itself. Which bits a NaN has beside being
//! quiet is left open. Marked as needing AVX2 and FMA so that `f32::mul_add` is an instruction, not a library call, and
//! so that a caller must vouch for a feature as with the real ones.

#![allow(non_camel_case_types, reason = "the names of std::arch")]

#[cfg(test)]
mod tests;

pub(super) use std::arch::x86_64::*;
use std::array::from_fn;

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct __m512(pub [f32; 16]);

/// Sixteen integers of 32 bits, or 64 bytes of them in memory's order.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct __m512i(pub [i32; 16]);

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct __m512bh(pub [u16; 32]);

/// Instructions that treat every lane `i` alike.
macro_rules! lanes {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ident { |$i:ident| $lane:expr })*) => {
        $(#[inline]
        #[target_feature(enable = "avx2,fma")]
        pub(super) fn $name($($arg: $type),*) -> $result {
            $result(from_fn(|$i| $lane))
        })*
    };
}

lanes! {
    fn _mm512_setzero_ps() -> __m512 { |_i| 0.0 }
    fn _mm512_setzero_si512() -> __m512i { |_i| 0 }
    fn _mm512_set1_ps(a: f32) -> __m512 { |_i| a }
    fn _mm512_set1_epi32(a: i32) -> __m512i { |_i| a }
    fn _mm512_set1_epi8(a: i8) -> __m512i { |_i| i32::from_ne_bytes([a.cast_unsigned(); 4]) }

    fn _mm512_add_ps(a: __m512, b: __m512) -> __m512 { |i| a.0[i] + b.0[i] }
    fn _mm512_sub_ps(a: __m512, b: __m512) -> __m512 { |i| a.0[i] - b.0[i] }
    fn _mm512_mul_ps(a: __m512, b: __m512) -> __m512 { |i| a.0[i] * b.0[i] }
    fn _mm512_div_ps(a: __m512, b: __m512) -> __m512 { |i| a.0[i] / b.0[i] }
    fn _mm512_fmadd_ps(a: __m512, b: __m512, c: __m512) -> __m512 { |i| a.0[i].mul_add(b.0[i], c.0[i]) }
    // The second operand if either is NaN, or both are zeros.
    fn _mm512_min_ps(a: __m512, b: __m512) -> __m512 { |i| if a.0[i] < b.0[i] { a.0[i] } else { b.0[i] } }
    fn _mm512_max_ps(a: __m512, b: __m512) -> __m512 { |i| if a.0[i] > b.0[i] { a.0[i] } else { b.0[i] } }

    fn _mm512_add_epi32(a: __m512i, b: __m512i) -> __m512i { |i| a.0[i].wrapping_add(b.0[i]) }
    fn _mm512_mullo_epi32(a: __m512i, b: __m512i) -> __m512i { |i| a.0[i].wrapping_mul(b.0[i]) }

    fn _mm512_castsi512_ps(a: __m512i) -> __m512 { |i| f32::from_bits(a.0[i].cast_unsigned()) }
    fn _mm512_cvtepi32_ps(a: __m512i) -> __m512 { |i| a.0[i] as f32 }

    fn _mm512_mask_blend_ps(k: __mmask16, a: __m512, b: __m512) -> __m512 {
        |i| if (k >> i) & 1 == 1 { b.0[i] } else { a.0[i] }
    }
    fn _mm512_maskz_scalef_ps(k: __mmask16, a: __m512, b: __m512) -> __m512 {
        |i| if (k >> i) & 1 == 1 { scale(a.0[i], b.0[i]) } else { 0.0 }
    }
    // The upper half comes from the first operand.
    fn _mm512_cvtne2ps_pbh(a: __m512, b: __m512) -> __m512bh {
        |i| if i < 16 { to_bf16(b.0[i]) } else { to_bf16(a.0[i - 16]) }
    }
    // The odd elements first, then the even ones.
    fn _mm512_dpbf16_ps(src: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        |i| add_bf16(add_bf16(src.0[i], a.0[2 * i + 1], b.0[2 * i + 1]), a.0[2 * i], b.0[2 * i])
    }
    // Unsigned bytes of `a` by signed ones of `b`; the sum wraps.
    fn _mm512_dpbusd_epi32(src: __m512i, a: __m512i, b: __m512i) -> __m512i {
        |i| {
            let (a, b) = (a.0[i].to_ne_bytes(), b.0[i].to_ne_bytes().map(u8::cast_signed));
            a.iter().zip(b).fold(src.0[i], |sum, (&a, b)| sum.wrapping_add(i32::from(a) * i32::from(b)))
        }
    }
}

/// # Safety
/// Sixteen readable numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn _mm512_loadu_ps(mem_addr: *const f32) -> __m512 {
    // SAFETY: says the caller.
    __m512(unsafe { mem_addr.cast::<[f32; 16]>().read_unaligned() })
}

/// # Safety
/// Sixteen readable numbers.
///
/// # Panics
/// If they do not begin a multiple of 64 bytes into memory, where the instruction faults.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn _mm512_load_ps(mem_addr: *const f32) -> __m512 {
    assert!(mem_addr.addr().is_multiple_of(64), "an aligned load from {mem_addr:?}");
    // SAFETY: says the caller.
    unsafe { _mm512_loadu_ps(mem_addr) }
}

/// # Safety
/// As [`_mm512_load_ps`].
///
/// # Panics
/// As [`_mm512_load_ps`].
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn _mm512_load_si512(mem_addr: *const __m512i) -> __m512i {
    assert!(mem_addr.addr().is_multiple_of(64), "an aligned load from {mem_addr:?}");
    // SAFETY: says the caller; aligned as the type.
    unsafe { mem_addr.read() }
}

/// # Safety
/// Sixteen writable numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn _mm512_storeu_ps(mem_addr: *mut f32, a: __m512) {
    // SAFETY: says the caller.
    unsafe { mem_addr.cast::<[f32; 16]>().write_unaligned(a.0) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn _mm512_castps512_ps256(a: __m512) -> __m256 {
    half(a, 0)
}

/// Half `IMM8` & 1.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn _mm512_extractf32x8_ps<const IMM8: i32>(a: __m512) -> __m256 {
    half(a, IMM8 as usize & 1)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn half(a: __m512, which: usize) -> __m256 {
    // SAFETY: eight of sixteen numbers.
    unsafe { _mm256_loadu_ps(a.0.as_ptr().add(8 * which)) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn _mm512_cvtepu16_epi32(a: __m256i) -> __m512i {
    let mut halves = [0u16; 16];
    // SAFETY: as large as the register.
    unsafe { _mm256_storeu_si256(halves.as_mut_ptr().cast(), a) }
    __m512i(halves.map(i32::from))
}

/// Zero for counts above 31.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn _mm512_slli_epi32<const IMM8: u32>(a: __m512i) -> __m512i {
    __m512i(a.0.map(|lane| lane.unbounded_shl(IMM8 & 0xff)))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn _mm512_cmp_ps_mask<const IMM8: i32>(a: __m512, b: __m512) -> __mmask16 {
    (0..16).fold(0, |mask, i| mask | (u16::from(compare(IMM8, a.0[i], b.0[i])) << i))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn _mm512_mask_cmp_ps_mask<const IMM8: i32>(k1: __mmask16, a: __m512, b: __m512) -> __mmask16 {
    k1 & _mm512_cmp_ps_mask::<IMM8>(a, b)
}

/// Rounds to multiples of 2^−M, M the upper four bits of `IMM8`.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn _mm512_roundscale_ps<const IMM8: i32>(a: __m512) -> __m512 {
    let unit = f64::from(1 << ((IMM8 >> 4) & 15));
    // Exact: f64 has room for the factor.
    __m512(a.0.map(|x| {
        let x = f64::from(x) * unit;
        let whole = match IMM8 & 7 {
            1 => x.floor(),
            2 => x.ceil(),
            3 => x.trunc(),
            // The mode of the control register, which is the default one.
            _ => x.round_ties_even(),
        };
        (whole / unit) as f32
    }))
}

/// The sixteen predicates; bit 4 only says which NaNs raise a flag.
#[inline(always)]
fn compare(predicate: i32, a: f32, b: f32) -> bool {
    let unordered = a.is_nan() || b.is_nan();
    match predicate & 15 {
        0 => a == b,
        1 => a < b,
        2 => a <= b,
        3 => unordered,
        4 => a != b,
        5 => unordered || a >= b,
        6 => unordered || a > b,
        7 => !unordered,
        8 => unordered || a == b,
        9 => unordered || a < b,
        10 => unordered || a <= b,
        11 => false,
        12 => !unordered && a != b,
        13 => a >= b,
        14 => a > b,
        _ => true,
    }
}

/// `a · 2^⌊b⌋`, rounded once.
#[inline(always)]
fn scale(a: f32, b: f32) -> f32 {
    let quiet = |x: f32| x.to_bits() & 0x40_0000 != 0;
    match (a, b) {
        (a, f32::INFINITY) if a.is_nan() && quiet(a) => f32::INFINITY,
        (a, f32::NEG_INFINITY) if a.is_nan() && quiet(a) => 0.0,
        (a, b) if a.is_nan() || b.is_nan() => f32::NAN,
        (0.0, f32::INFINITY) => f32::NAN,
        (a, f32::NEG_INFINITY) if a.is_infinite() => f32::NAN,
        (a, f32::INFINITY) => f32::INFINITY.copysign(a),
        (a, f32::NEG_INFINITY) => 0f32.copysign(a),
        (a, b) => {
            let exponent = b.floor().clamp(-900.0, 900.0) as i64 + 1023;
            // In f64 the product is exact unless it is far outside of f32.
            (f64::from(a) * f64::from_bits(exponent.cast_unsigned() << 52)) as f32
        }
    }
}

/// A subnormal number as zero.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// To nearest even, subnormal numbers as zero.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = flush(x).to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// `sum + a · b` of bf16, rounded once; subnormal numbers are zero, coming and going.
#[inline(always)]
fn add_bf16(sum: f32, a: u16, b: u16) -> f32 {
    let widen = |x: u16| flush(f32::from_bits(u32::from(x) << 16));
    flush(widen(a).mul_add(widen(b), flush(sum)))
}
