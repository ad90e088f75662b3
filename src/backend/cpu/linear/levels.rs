//! One reading of all block formats: unsigned levels, and per group of them a factor and an offset.
//!
//! `w = scale · q + min` for every group of 32 elements, or `w = (scale · sub) · q + min` with an integer `sub` and a
//! `min` for every half group of 16. All integer kernels and the expansion to f32 start from here. The functions are
//! plain Rust marked `inline(always)`: compiled once per instruction set, the compiler vectorises them.

use crate::backend::DType;

/// Elements with one activation scale.
pub(super) const GROUP: usize = 32;
/// Longest piece of a row that is read at once; a multiple of every block length.
pub(super) const SLICE: usize = 512;

/// How large levels get: it decides how many products an i16 can sum up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// ≤ 15
    Four,
    /// ≤ 31
    Five,
    /// ≤ 63
    Six,
    /// ≤ 255, and `min = −128 · scale`: the level is a signed byte plus 128.
    Eight,
}

/// What of [`Levels`] a format uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub width: Width,
    /// Half groups with `sub` and a `min` each, instead of one `min` a group.
    pub halves: bool,
}

/// `None` for plain types.
pub(super) fn form(dtype: DType) -> Option<Form> {
    let (width, halves) = match dtype {
        DType::Q4_0 | DType::Q4_1 | DType::Q4K => (Width::Four, false),
        DType::Q5_0 | DType::Q5_1 | DType::Q5K => (Width::Five, false),
        DType::Q8_0 | DType::Iq4Nl => (Width::Eight, false),
        DType::Q2K | DType::Q3K => (Width::Four, true),
        DType::Q6K => (Width::Six, true),
        DType::F32 | DType::F16 | DType::Bf16 | DType::U32 => return None,
    };
    Some(Form { width, halves })
}

/// At most [`SLICE`] elements of one row.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct Levels {
    pub q: [u8; SLICE],
    pub scale: [f32; SLICE / GROUP],
    /// Per half group; unused without `halves`.
    pub sub: [i32; SLICE / 16],
    /// Per group, or per half group with `halves`.
    pub min: [f32; SLICE / 16],
}

impl Levels {
    pub const ZERO: Levels =
        Levels { q: [0; SLICE], scale: [0.0; SLICE / GROUP], sub: [0; SLICE / 16], min: [0.0; SLICE / 16] };
}

/// The code book of IQ4_NL, plus 128.
pub(super) const IQ4_NL: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// Half precision at `bytes[at..]` without a look at the processor's features, so that it vectorises.
#[inline(always)]
pub(super) fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

#[inline(always)]
pub(super) fn f16_to_f32(half: u16) -> f32 {
    let bits = u32::from(half & 0x7fff) << 13;
    // 2^112 moves the exponent's bias from 15 to 127, subnormals included.
    let finite = (f32::from_bits(bits) * f32::from_bits(0x7780_0000)).to_bits();
    let special = bits | 0x7f80_0000;
    let magnitude = if bits >= 0x0f80_0000 { special } else { finite };
    f32::from_bits(magnitude | (u32::from(half & 0x8000) << 16))
}

/// The eight 6-bit scales and mins of Q4_K and Q5_K.
#[inline(always)]
pub(super) fn scales_and_mins(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let word = |i: usize| {
        u32::from_le_bytes([packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]])
    };
    let (a, b, c) = (word(0), word(1), word(2));
    let scales = [a & 0x3f3f_3f3f, (c & 0x0f0f_0f0f) | ((a >> 2) & 0x3030_3030)];
    let mins = [b & 0x3f3f_3f3f, ((c >> 4) & 0x0f0f_0f0f) | ((b >> 2) & 0x3030_3030)];
    (bytes_of(scales), bytes_of(mins))
}

#[inline(always)]
fn bytes_of(words: [u32; 2]) -> [u8; 8] {
    (u64::from(words[0]) | (u64::from(words[1]) << 32)).to_le_bytes()
}

/// The sixteen 6-bit scales of Q3_K, still plus 32.
#[inline(always)]
pub(super) fn q3_scales(packed: &[u8]) -> [u8; 16] {
    let mut scales = [0; 16];
    for (i, scale) in scales.iter_mut().enumerate() {
        let low = (packed[i % 8] >> (4 * (i / 8))) & 0xf;
        let high = (packed[8 + i % 4] >> (2 * (i / 4))) & 3;
        *scale = low | (high << 4);
    }
    scales
}

/// Reads `blocks` (at most [`SLICE`] elements) of a block format.
#[inline(always)]
pub(super) fn unpack(dtype: DType, blocks: &[u8], out: &mut Levels) {
    let blocks = blocks.chunks_exact(dtype.block_bytes());
    match dtype {
        DType::Q4_0 => blocks.enumerate().for_each(|(g, b)| {
            nibbles(b, 2, group(out, g));
            set(out, g, f16_at(b, 0), -8.0 * f16_at(b, 0));
        }),
        DType::Q4_1 => blocks.enumerate().for_each(|(g, b)| {
            nibbles(b, 4, group(out, g));
            set(out, g, f16_at(b, 0), f16_at(b, 2));
        }),
        DType::Q5_0 => blocks.enumerate().for_each(|(g, b)| {
            nibbles(b, 6, group(out, g));
            fifth_bits(b, 2, group(out, g));
            set(out, g, f16_at(b, 0), -16.0 * f16_at(b, 0));
        }),
        DType::Q5_1 => blocks.enumerate().for_each(|(g, b)| {
            nibbles(b, 8, group(out, g));
            fifth_bits(b, 4, group(out, g));
            set(out, g, f16_at(b, 0), f16_at(b, 2));
        }),
        DType::Q8_0 => blocks.enumerate().for_each(|(g, b)| {
            group(out, g).iter_mut().zip(array::<32>(b, 2)).for_each(|(q, &w)| *q = w ^ 0x80);
            set(out, g, f16_at(b, 0), -128.0 * f16_at(b, 0));
        }),
        DType::Iq4Nl => blocks.enumerate().for_each(|(g, b)| {
            let q = group(out, g);
            nibbles(b, 2, q);
            q.iter_mut().for_each(|q| *q = IQ4_NL[usize::from(*q & 15)]);
            set(out, g, f16_at(b, 0), -128.0 * f16_at(b, 0));
        }),
        DType::Q4K => blocks.enumerate().for_each(|(s, b)| {
            set_k(out, s, f16_at(b, 0), f16_at(b, 2), &b[4..16]);
            let q = super_group(out, s);
            for (pair, [low, high]) in q.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let qs: &[u8; 32] = array(b, 16 + 32 * pair);
                for i in 0..32 {
                    (low[i], high[i]) = (qs[i] & 15, qs[i] >> 4);
                }
            }
        }),
        DType::Q5K => blocks.enumerate().for_each(|(s, b)| {
            set_k(out, s, f16_at(b, 0), f16_at(b, 2), &b[4..16]);
            let (q, fifth): (_, &[u8; 32]) = (super_group(out, s), array(b, 16));
            for (pair, [low, high]) in q.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let qs: &[u8; 32] = array(b, 48 + 32 * pair);
                for i in 0..32 {
                    let bits = fifth[i] >> (2 * pair);
                    low[i] = (qs[i] & 15) | ((bits & 1) << 4);
                    high[i] = (qs[i] >> 4) | ((bits & 2) << 3);
                }
            }
        }),
        DType::Q6K => blocks.enumerate().for_each(|(s, b)| {
            let q = super_group(out, s);
            for (half, [q0, q1, q2, q3]) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let (low, next): (&[u8; 32], &[u8; 32]) = (array(b, 64 * half), array(b, 64 * half + 32));
                let high: &[u8; 32] = array(b, 128 + 32 * half);
                for i in 0..32 {
                    q0[i] = (low[i] & 15) | ((high[i] & 3) << 4);
                    q1[i] = (next[i] & 15) | ((high[i] & 0x0c) << 2);
                    q2[i] = (low[i] >> 4) | (high[i] & 0x30);
                    q3[i] = (next[i] >> 4) | ((high[i] & 0xc0) >> 2);
                }
            }
            let d = f16_at(b, 208);
            set_halves(out, s, d, |i| (i32::from(b[192 + i] as i8), -32.0 * d * f32::from(b[192 + i] as i8)));
        }),
        DType::Q2K => blocks.enumerate().for_each(|(s, b)| {
            for (part, q) in super_group(out, s).iter_mut().enumerate() {
                let qs: &[u8; 32] = array(b, 16 + 32 * (part / 4));
                q.iter_mut().zip(qs).for_each(|(q, bits)| *q = (bits >> (2 * (part % 4))) & 3);
            }
            let (d, min) = (f16_at(b, 80), f16_at(b, 82));
            set_halves(out, s, d, |i| (i32::from(b[i] & 15), -min * f32::from(b[i] >> 4)));
        }),
        DType::Q3K => blocks.enumerate().for_each(|(s, b)| {
            for (part, q) in super_group(out, s).iter_mut().enumerate() {
                let (high, qs): (&[u8; 32], &[u8; 32]) = (array(b, 0), array(b, 32 + 32 * (part / 4)));
                for i in 0..32 {
                    q[i] = ((qs[i] >> (2 * (part % 4))) & 3) | (((high[i] >> part) & 1) << 2);
                }
            }
            let (d, scales) = (f16_at(b, 108), q3_scales(&b[96..108]));
            set_halves(out, s, d, |i| {
                let sub = i32::from(scales[i]) - 32;
                (sub, -4.0 * d * sub as f32)
            });
        }),
        DType::F32 | DType::F16 | DType::Bf16 | DType::U32 => unreachable!("{dtype} has no blocks"),
    }
}

/// `N` bytes of a block: a fixed length spares the checks that keep loops from vectorising.
#[inline(always)]
fn array<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("the offsets lie inside a block")
}

#[inline(always)]
fn group(out: &mut Levels, g: usize) -> &mut [u8; GROUP] {
    &mut out.q.as_chunks_mut().0[g]
}

/// The eight groups of super block `s`.
#[inline(always)]
fn super_group(out: &mut Levels, s: usize) -> &mut [[u8; GROUP]; 8] {
    &mut out.q.as_chunks_mut().0.as_chunks_mut().0[s]
}

#[inline(always)]
fn nibbles(block: &[u8], at: usize, q: &mut [u8; GROUP]) {
    let bytes: &[u8; 16] = array(block, at);
    for i in 0..16 {
        (q[i], q[16 + i]) = (bytes[i] & 15, bytes[i] >> 4);
    }
}

/// Adds 16 where the group's bit is set.
#[inline(always)]
fn fifth_bits(block: &[u8], at: usize, q: &mut [u8; GROUP]) {
    let bytes: &[u8; 4] = array(block, at);
    for (q, &byte) in q.as_chunks_mut::<8>().0.iter_mut().zip(bytes) {
        // Each of eight bytes keeps its own bit, which a carry then moves to the top.
        let own = (u64::from(byte) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
        let top = (((own & 0x7f7f_7f7f_7f7f_7f7f) + 0x7f7f_7f7f_7f7f_7f7f) | own) & 0x8080_8080_8080_8080;
        *q = (u64::from_le_bytes(*q) | (top >> 3)).to_le_bytes();
    }
}

#[inline(always)]
fn set(out: &mut Levels, g: usize, scale: f32, min: f32) {
    (out.scale[g], out.min[g]) = (scale, min);
}

#[inline(always)]
fn set_k(out: &mut Levels, s: usize, d: f32, min: f32, packed: &[u8]) {
    let (scales, mins) = scales_and_mins(packed);
    for i in 0..8 {
        set(out, 8 * s + i, d * f32::from(scales[i]), -min * f32::from(mins[i]));
    }
}

#[inline(always)]
fn set_halves(out: &mut Levels, s: usize, d: f32, sub_and_min: impl Fn(usize) -> (i32, f32)) {
    out.scale[8 * s..][..8].fill(d);
    for i in 0..16 {
        (out.sub[16 * s + i], out.min[16 * s + i]) = sub_and_min(i);
    }
}

/// The elements themselves. Exact up to one rounding: `scale · sub · q` has at most 24 significant bits.
#[inline(always)]
pub(super) fn expand(levels: &Levels, halves: bool, out: &mut [f32]) {
    if halves {
        for (h, out) in out.chunks_exact_mut(16).enumerate() {
            let (scale, min) = (levels.scale[h / 2] * levels.sub[h] as f32, levels.min[h]);
            out.iter_mut().zip(&levels.q[16 * h..]).for_each(|(w, &q)| *w = scale * f32::from(q) + min);
        }
    } else {
        for (g, out) in out.chunks_exact_mut(GROUP).enumerate() {
            let (scale, min) = (levels.scale[g], levels.min[g]);
            out.iter_mut().zip(&levels.q[GROUP * g..]).for_each(|(w, &q)| *w = scale * f32::from(q) + min);
        }
    }
}
