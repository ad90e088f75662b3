//! How the blocks of eight rows are taken apart, see [`levels`](super::super::levels) for one.

use super::{super::levels::IQ4_NL, Blocks, Format, Group};
use std::arch::x86_64::*;

/// 16 bytes of each row, turned: four neighbouring bytes of every row are one vector.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn turn(blocks: Blocks, at: usize) -> [__m256i; 4] {
    let both = |i: usize| {
        // SAFETY: the caller vouches for 16 bytes of each row.
        let (a, b) = unsafe {
            (_mm_loadu_si128(blocks[i].add(at).cast()), _mm_loadu_si128(blocks[4 + i].add(at).cast()))
        };
        _mm256_set_m128i(b, a)
    };
    let (a, b, c, d) = (both(0), both(1), both(2), both(3));
    let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (next_low, next_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(low, next_low),
        _mm256_unpackhi_epi64(low, next_low),
        _mm256_unpacklo_epi64(high, next_high),
        _mm256_unpackhi_epi64(high, next_high),
    ]
}

/// 32 bytes of each row, turned.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn turn_32(blocks: Blocks, at: usize) -> [__m256i; 8] {
    // SAFETY: the caller vouches for 32 bytes of each row.
    let ([a, b, c, d], [e, f, g, h]) = unsafe { (turn(blocks, at), turn(blocks, at + 16)) };
    [a, b, c, d, e, f, g, h]
}

/// 4 bytes of each row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn word(blocks: Blocks, at: usize) -> __m256i {
    // SAFETY: the caller vouches for 4 bytes of each row.
    let w = |i: usize| unsafe { blocks[i].add(at).cast::<i32>().read_unaligned() };
    _mm256_setr_epi32(w(0), w(1), w(2), w(3), w(4), w(5), w(6), w(7))
}

/// A half-precision number of each row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half(blocks: Blocks, at: usize) -> __m256 {
    // SAFETY: the caller vouches for 2 bytes of each row.
    let h = |i: usize| unsafe { blocks[i].add(at).cast::<i16>().read_unaligned() };
    _mm256_cvtph_ps(_mm_setr_epi16(h(0), h(1), h(2), h(3), h(4), h(5), h(6), h(7)))
}

/// The two half-precision numbers of each lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn two_halves(words: __m256i) -> [__m256; 2] {
    let sorted = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    let sorted = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(sorted));
    let sorted = _mm256_permute4x64_epi64::<0b11_01_10_00>(sorted);
    [_mm256_cvtph_ps(_mm256_castsi256_si128(sorted)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(sorted))]
}

/// Of each byte the bits `from..`, moved to `to..`, where `mask` has them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bits(v: __m256i, from: usize, to: usize, mask: i8) -> __m256i {
    let shift = _mm_cvtsi32_si128(from.abs_diff(to) as i32);
    let moved = if from < to { _mm256_sll_epi16(v, shift) } else { _mm256_srl_epi16(v, shift) };
    _mm256_and_si256(moved, _mm256_set1_epi8(mask))
}

/// The eight vectors of a group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn each(quad: impl Fn(usize) -> __m256i) -> [__m256i; 8] {
    [quad(0), quad(1), quad(2), quad(3), quad(4), quad(5), quad(6), quad(7)]
}

/// 16 bytes: low nibbles, then high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn nibbles(blocks: Blocks, at: usize) -> [__m256i; 8] {
    // SAFETY: passed on.
    let both = unsafe { turn(blocks, at) };
    each(|quad| bits(both[quad % 4], quad / 4 * 4, 0, 15))
}

/// `levels`, plus 16 where the group's bit is set: bit `i` of a lane is column `i` of its row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_fifth(word: __m256i, levels: [__m256i; 8]) -> [__m256i; 8] {
    // The lower half of each byte's bits in place of the upper one.
    let halves = [_mm256_slli_epi16::<4>(word), word];
    let first = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0c0c_0c0c));
    each(|quad| {
        let spread = _mm256_add_epi8(first, _mm256_set1_epi8((quad / 2) as i8));
        let spread = _mm256_shuffle_epi8(halves[quad % 2], spread);
        let own = _mm256_and_si256(spread, _mm256_set1_epi32(0x8040_2010_u32 as i32));
        _mm256_or_si256(levels[quad], _mm256_min_epu8(own, _mm256_set1_epi8(16)))
    })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn times(v: __m256, factor: f32) -> __m256 {
    _mm256_mul_ps(v, _mm256_set1_ps(factor))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn group(levels: [__m256i; 8], [scale, min]: [__m256; 2]) -> Group {
    Group { levels, scale, sub: [_mm256_set1_epi16(1); 2], min: [min; 2] }
}

/// Offsets of minus `centre` levels.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn centred(scale: __m256, centre: f32) -> [__m256; 2] {
    [scale, times(scale, -centre)]
}

/// A format of 32 elements a block.
macro_rules! group_format {
    ($name:ident, $bytes:literal, quads $quads:literal, |$blocks:ident| $levels:expr, $factors:expr) => {
        pub(super) struct $name;
        impl Format for $name {
            const BYTES: usize = $bytes;
            const RUNS: usize = 1;
            const GROUPS: usize = 1;
            const QUADS: usize = $quads;
            const HALVES: bool = false;
            type Head = ();
            type Run = Blocks;
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn head(_: Blocks) {}
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn run(blocks: Blocks, _: usize) -> Blocks {
                blocks
            }
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn group(_: &(), &$blocks: &Blocks, _: usize, _: usize) -> Group {
                // SAFETY: the caller vouches for a block of each row.
                unsafe { group($levels, $factors) }
            }
        }
    };
}

group_format!(Q4_0, 18, quads 8, |b| nibbles(b, 2), centred(half(b, 0), 8.0));
group_format!(Q4_1, 20, quads 8, |b| nibbles(b, 4), two_halves(word(b, 0)));
group_format!(Q5_0, 22, quads 4, |b| with_fifth(word(b, 2), nibbles(b, 6)), centred(half(b, 0), 16.0));
group_format!(Q5_1, 24, quads 4, |b| with_fifth(word(b, 4), nibbles(b, 8)), two_halves(word(b, 0)));
group_format!(Iq4Nl, 18, quads 1, |b| {
    let book = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_NL.as_ptr().cast()));
    let book = _mm256_xor_si256(book, _mm256_set1_epi8(-128));
    nibbles(b, 2).map(|levels| _mm256_shuffle_epi8(book, levels))
}, centred(half(b, 0), 0.0));

/// Of a block of 256 elements: eight groups' integer scales and mins, a byte each, by four in a lane.
pub(super) struct Scales {
    scale: __m256,
    min: __m256,
    scales: [__m256i; 2],
    mins: [__m256i; 2],
}

/// Header of Q4_K.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn header_k(blocks: Blocks) -> Scales {
    // SAFETY: the caller vouches for a block of each row.
    let [factors, a, b, c] = unsafe { turn(blocks, 0) };
    let [scale, min] = two_halves(factors);
    Scales {
        scale,
        min: times(min, -1.0),
        scales: [bits(a, 0, 0, 63), _mm256_or_si256(bits(c, 0, 0, 15), bits(a, 6, 4, 0x30))],
        mins: [bits(b, 0, 0, 63), _mm256_or_si256(bits(c, 4, 0, 15), bits(b, 6, 4, 0x30))],
    }
}

impl Scales {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn group(&self, i: usize, levels: [__m256i; 8]) -> Group {
        let byte = |v: [__m256i; 2]| {
            let shifted = _mm256_srl_epi32(v[i / 4], _mm_cvtsi32_si128(8 * (i as i32 % 4)));
            _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(255)))
        };
        let (scale, min) = (byte(self.scales), byte(self.mins));
        group(levels, [_mm256_mul_ps(self.scale, scale), _mm256_mul_ps(self.min, min)])
    }
}

/// The same of sixteen half groups; the bytes are signed.
pub(super) struct HalfScales {
    scale: __m256,
    min: __m256,
    scales: [__m256i; 4],
    mins: [__m256i; 4],
}

impl HalfScales {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn group(&self, i: usize, levels: [__m256i; 8]) -> Group {
        // One byte of each lane as both of its 16-bit numbers.
        let byte = |v: [__m256i; 4], h: usize| {
            let own = _mm_setr_epi32(0x0080_0080, 0x0480_0480, 0x0880_0880, 0x0c80_0c80);
            let at = _mm256_set1_epi32(0x0100_0100 * (2 * (i % 2) + h) as i32);
            let own = _mm256_add_epi32(_mm256_broadcastsi128_si256(own), at);
            _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(v[i / 2], own))
        };
        let min = |h: usize| {
            let min = _mm256_srai_epi32::<16>(byte(self.mins, h));
            _mm256_mul_ps(self.min, _mm256_cvtepi32_ps(min))
        };
        let sub = [byte(self.scales, 0), byte(self.scales, 1)];
        Group { levels, scale: self.scale, sub, min: [min(0), min(1)] }
    }
}

/// A format of 256 elements a block: `head` is read once, `run` bits for every run of groups.
macro_rules! super_format {
    (
        $name:ident, $bytes:literal, $runs:literal runs of $groups:literal, quads $quads:literal, halves $halves:literal,
        $head:ty: |$b:ident| $read:expr, |$blocks:ident, $r:ident| $bits:expr,
        |$h:ident, $v:ident, $run:ident, $i:ident, $quad:ident| $levels:expr
    ) => {
        pub(super) struct $name;
        impl Format for $name {
            const BYTES: usize = $bytes;
            const RUNS: usize = $runs;
            const GROUPS: usize = $groups;
            const QUADS: usize = $quads;
            const HALVES: bool = $halves;
            type Head = $head;
            type Run = [__m256i; 8];
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn head($b: Blocks) -> $head {
                // SAFETY: the caller vouches for a block of each row.
                unsafe { $read }
            }
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn run($blocks: Blocks, $r: usize) -> [__m256i; 8] {
                // SAFETY: as above.
                unsafe { $bits }
            }
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn group($h: &$head, $v: &[__m256i; 8], $run: usize, $i: usize) -> Group {
                $h.0.group($groups * $run + $i, each(|$quad| $levels))
            }
        }
    };
}

super_format!(
    Q4K, 144, 4 runs of 2, quads 8, halves false,
    (Scales,): |b| (header_k(b),), |b, run| turn_32(b, 16 + 32 * run),
    |h, v, run, i, quad| bits(v[quad], 4 * i, 0, 15)
);

super_format!(
    Q2K, 84, 2 runs of 4, quads 4, halves true,
    (HalfScales,): |b| {
        let ([scale, min], packed) = (two_halves(word(b, 80)), turn(b, 0));
        let (scales, mins) = (packed.map(|v| bits(v, 0, 0, 15)), packed.map(|v| bits(v, 4, 0, 15)));
        (HalfScales { scale, min: times(min, -1.0), scales, mins },)
    }, |b, run| turn_32(b, 16 + 32 * run),
    |h, v, run, i, quad| bits(v[quad], 2 * i, 0, 3)
);

super_format!(
    Q3K, 110, 2 runs of 4, quads 4, halves true,
    (HalfScales, [__m256i; 8]): |b| {
        let (scale, packed) = (half(b, 108), [word(b, 96), word(b, 100)]);
        let high = word(b, 104);
        let scales = std::array::from_fn(|i| {
            let scale = _mm256_or_si256(bits(packed[i % 2], i / 2 * 4, 0, 15), bits(high, 2 * i, 4, 0x30));
            _mm256_sub_epi8(scale, _mm256_set1_epi8(32))
        });
        (HalfScales { scale, min: times(scale, -4.0), scales, mins: scales }, turn_32(b, 0))
    }, |b, run| turn_32(b, 32 + 32 * run),
    |h, v, run, i, quad| {
        _mm256_or_si256(bits(v[quad], 2 * i, 0, 3), bits(h.1[quad], 4 * run + i, 2, 4))
    }
);
