//! Dot products of one row of blocks with a few quantised tokens, on AVX2: formats of many bits a level, for which one
//! token takes longer by eight rows at once ([`lanes_avx2`](super::lanes_avx2)), whose memory arrives more slowly.

use super::{
    gemv_float::avx2::sum,
    levels::{GROUP, scales_and_mins},
    pack::Rows,
    quantize::Token,
};
use crate::backend::DType;
use std::{arch::x86_64::*, ops::Range};

/// How far ahead of the current block memory is asked for: what arrives while a loaded memory answers.
const PREFETCH: usize = 2048;

/// Calls `put(row, products)` for every row.
///
/// # Safety
/// AVX2, FMA, F16C; rows and tokens have the same number of columns.
pub(super) unsafe fn rows<const T: usize>(
    rows: Rows,
    range: Range<usize>,
    x: &[Token; T],
    put: impl Fn(usize, &[f32]),
) {
    // SAFETY: passed on.
    unsafe {
        match rows.dtype {
            DType::Q8_0 => groups::<T>(rows, range, x, put),
            DType::Q5K => supers::<Q5K, T>(rows, range, x, put),
            DType::Q6K => supers::<Q6K, T>(rows, range, x, put),
            dtype => unreachable!("{dtype} takes eight rows at once, or has no blocks"),
        }
    }
}

/// Groups whose factors are multiplied side by side.
const SIDE: usize = 8;

/// Factors of [`SIDE`] groups, to be spread from memory.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Factors([f32; SIDE]);

impl Factors {
    const ZERO: Factors = Factors([0.0; SIDE]);
}

/// Bytes of a block of Q8_0: a scale and 32 signed levels.
const Q8_0: usize = 34;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn groups<const T: usize>(
    rows: Rows,
    range: Range<usize>,
    x: &[Token; T],
    put: impl Fn(usize, &[f32]),
) {
    for row in range {
        let bytes = rows.row(row);
        let count = bytes.len() / Q8_0;
        let whole = count / SIDE * SIDE;
        let mut acc = [_mm256_setzero_ps(); T];
        // SAFETY: the groups are the row's, of which the tokens have as many.
        unsafe {
            for g in (0..whole).step_by(SIDE) {
                side::<T>(bytes.as_ptr(), g, SIDE, x, &mut acc);
            }
            if whole < count {
                side::<T>(bytes.as_ptr(), whole, count - whole, x, &mut acc);
            }
        }
        put(row, &acc.map(|acc| sum(acc)));
    }
}

/// Adds the products of groups `g` to `g + count`, at most [`SIDE`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn side<const T: usize>(
    row: *const u8,
    g: usize,
    count: usize,
    x: &[Token; T],
    acc: &mut [__m256; T],
) {
    let mut factors = [Factors::ZERO; T];
    // SAFETY: the caller vouches for the groups; a prefetch never faults.
    unsafe {
        let blocks = row.add(g * Q8_0);
        for line in 0..(SIDE * Q8_0).div_ceil(64) {
            _mm_prefetch::<_MM_HINT_T0>(blocks.wrapping_add(PREFETCH + 64 * line).cast());
        }
        let scales = halves(blocks, count);
        for t in 0..T {
            let scale = _mm256_mul_ps(scales, some(x[t].scale.as_ptr().add(g), count));
            _mm256_store_ps(factors[t].0.as_mut_ptr(), scale);
        }
        for i in 0..count {
            let levels = load(blocks.add(i * Q8_0 + 2));
            for t in 0..T {
                let v = load(x[t].q.as_ptr().add(GROUP * (g + i)).cast());
                let product = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(v, levels));
                let product = _mm256_cvtepi32_ps(_mm256_madd_epi16(product, _mm256_set1_epi16(1)));
                acc[t] = _mm256_fmadd_ps(product, _mm256_broadcast_ss(&factors[t].0[i]), acc[t]);
            }
        }
    }
}

/// `count` ≤ [`SIDE`] numbers, then zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn some(from: *const f32, count: usize) -> __m256 {
    // SAFETY: the caller vouches for `count` numbers; lanes that the mask leaves out are not read.
    unsafe {
        if count == SIDE {
            return _mm256_loadu_ps(from);
        }
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes))
    }
}

/// The scales of `count` ≤ [`SIDE`] blocks of Q8_0, then zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(blocks: *const u8, count: usize) -> __m256 {
    let half = |i: usize| match i < count {
        // SAFETY: the caller vouches for `count` blocks.
        true => unsafe { blocks.add(i * Q8_0).cast::<i16>().read_unaligned() },
        false => 0,
    };
    let all = _mm_setr_epi16(half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7));
    _mm256_cvtph_ps(all)
}

/// A format of 256 elements a block, in eight groups with integer scales.
trait Super: Sized {
    const BYTES: usize;
    /// Half groups: sixteen scales and offsets.
    const HALVES: bool;
    /// Reads scales and offsets.
    unsafe fn read(block: *const u8) -> Self;
    /// Levels of group `i`.
    unsafe fn levels(&self, block: *const u8, i: usize) -> __m256i;
    /// Sixteen scales as bytes: one of each half group.
    fn scales(&self) -> __m128i;
    fn scale(&self) -> f32;
    /// Offset of groups 0–7, or of half groups 0–7 and 8–15.
    fn offsets(&self) -> [__m256; 2];
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn supers<S: Super, const T: usize>(
    rows: Rows,
    range: Range<usize>,
    x: &[Token; T],
    put: impl Fn(usize, &[f32]),
) {
    for row in range {
        let bytes = rows.row(row);
        let mut acc = [_mm256_setzero_ps(); T];
        for s in 0..bytes.len() / S::BYTES {
            // SAFETY: `s` counts the row's blocks, of which the tokens have as many; a prefetch never faults.
            unsafe {
                let block = bytes.as_ptr().add(s * S::BYTES);
                for line in 0..S::BYTES.div_ceil(64) {
                    _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(PREFETCH + 64 * line).cast());
                }
                let read = S::read(block);
                // The scales of two neighbouring half groups as 16-bit numbers, one in each half of the vector: a
                // shuffle then spreads them.
                let scales = _mm256_cvtepi8_epi16(read.scales());
                let (low, high) = (
                    _mm256_permute4x64_epi64::<0b01_00_01_00>(scales),
                    _mm256_permute4x64_epi64::<0b11_10_11_10>(scales),
                );
                let (scale, offsets) = (_mm256_set1_ps(read.scale()), read.offsets());
                let mut factors = [Factors::ZERO; T];
                for t in 0..T {
                    let scale = _mm256_mul_ps(scale, some(x[t].scale.as_ptr().add(SIDE * s), SIDE));
                    _mm256_store_ps(factors[t].0.as_mut_ptr(), scale);
                    if S::HALVES {
                        let at = x[t].half_sum.as_ptr().add(16 * s);
                        acc[t] = _mm256_fmadd_ps(offsets[0], _mm256_loadu_ps(at), acc[t]);
                        acc[t] = _mm256_fmadd_ps(offsets[1], _mm256_loadu_ps(at.add(8)), acc[t]);
                    } else {
                        let at = x[t].sum.as_ptr().add(SIDE * s);
                        acc[t] = _mm256_fmadd_ps(offsets[0], _mm256_loadu_ps(at), acc[t]);
                    }
                }
                for i in 0..SIDE {
                    let levels = read.levels(block, i);
                    let spread = _mm256_set_m128i(
                        _mm_set1_epi16((0x0302 + 0x0404 * (i % 4)) as i16),
                        _mm_set1_epi16((0x0100 + 0x0404 * (i % 4)) as i16),
                    );
                    let scale = _mm256_shuffle_epi8(if i < 4 { low } else { high }, spread);
                    for t in 0..T {
                        let v = load(x[t].q.as_ptr().add(256 * s + GROUP * i).cast());
                        let product = _mm256_madd_epi16(_mm256_maddubs_epi16(levels, v), scale);
                        let factor = _mm256_broadcast_ss(&factors[t].0[i]);
                        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), factor, acc[t]);
                    }
                }
            }
        }
        put(row, &acc.map(|acc| sum(acc)));
    }
}

/// Eight bytes as f32, times `factor`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled(bytes: __m128i, factor: f32) -> __m256 {
    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_set1_ps(factor))
}

/// Sixteen bytes as f32, times `factor`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled_halves(bytes: __m128i, factor: f32) -> [__m256; 2] {
    [scaled(bytes, factor), scaled(_mm_unpackhi_epi64(bytes, bytes), factor)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn f16(from: *const u8) -> f32 {
    // SAFETY: the caller vouches for 2 bytes.
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(unsafe { i32::from(from.cast::<u16>().read_unaligned()) })))
}

struct Scales {
    scales: __m128i,
    scale: f32,
    offsets: [__m256; 2],
}

/// Header of Q5_K.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn header_k(block: *const u8) -> Scales {
    // SAFETY: the caller vouches for a block.
    let (packed, d, min) =
        unsafe { (std::slice::from_raw_parts(block.add(4), 12), f16(block), f16(block.add(2))) };
    let (scales, mins) = scales_and_mins(packed);
    let scales = _mm_cvtsi64_si128(i64::from_le_bytes(scales));
    let mins = _mm_cvtsi64_si128(i64::from_le_bytes(mins));
    // A group's scale serves both of its halves.
    let scales = _mm_unpacklo_epi8(scales, scales);
    Scales { scales, scale: d, offsets: [scaled(mins, -min), _mm256_setzero_ps()] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(from: *const u8) -> __m256i {
    // SAFETY: the caller vouches for 32 bytes.
    unsafe { _mm256_loadu_si256(from.cast()) }
}

/// `(v >> shift) & mask`, bytewise.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bits(v: __m256i, shift: usize, mask: i8) -> __m256i {
    let shifted = _mm256_srl_epi16(v, _mm_cvtsi32_si128(shift as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
}

/// As [`bits`], to the left.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bits_up(v: __m256i, shift: usize, mask: i8) -> __m256i {
    let shifted = _mm256_sll_epi16(v, _mm_cvtsi32_si128(shift as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
}

macro_rules! super_format {
    ($name:ident, $bytes:literal, halves $halves:literal, |$b:ident| $read:expr, |$block:ident, $i:ident| $levels:expr) => {
        struct $name(Scales);
        impl Super for $name {
            const BYTES: usize = $bytes;
            const HALVES: bool = $halves;
            #[inline(always)]
            unsafe fn read($b: *const u8) -> Self {
                // SAFETY: one block is readable, and the caller has AVX2.
                $name(unsafe { $read })
            }
            #[inline(always)]
            unsafe fn levels(&self, $block: *const u8, $i: usize) -> __m256i {
                // SAFETY: as above.
                unsafe { $levels }
            }
            #[inline(always)]
            fn scales(&self) -> __m128i {
                self.0.scales
            }
            #[inline(always)]
            fn scale(&self) -> f32 {
                self.0.scale
            }
            #[inline(always)]
            fn offsets(&self) -> [__m256; 2] {
                self.0.offsets
            }
        }
    };
}

super_format!(Q5K, 176, halves false, |b| header_k(b), |b, i| {
    let high = load(b.add(16));
    let fifth = if i < 4 { bits_up(high, 4 - i, 16) } else { bits(high, i - 4, 16) };
    _mm256_or_si256(bits(load(b.add(48 + 32 * (i / 2))), 4 * (i % 2), 15), fifth)
});

super_format!(Q6K, 210, halves true, |b| {
    let (d, scales) = (f16(b.add(208)), _mm_loadu_si128(b.add(192).cast()));
    Scales { scales, scale: d, offsets: scaled_halves(scales, -32.0 * d) }
}, |b, i| {
    let (half, part) = (i / 4, i % 4);
    let high = load(b.add(128 + 32 * half));
    let high = if part < 2 { bits_up(high, 4 - 2 * part, 0x30) } else { bits(high, 2 * part - 4, 0x30) };
    _mm256_or_si256(bits(load(b.add(64 * half + 32 * (part % 2))), 4 * (part / 2), 15), high)
});
