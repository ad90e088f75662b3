//! Portable reading of every weight format: the reference that the vector kernels are tested against.
//!
//! The block layouts and the order of the f32 operations are those of ggml's `dequantize_row_*`, so values are equal
//! bit for bit.

use crate::backend::{DType, Tensor};
use half::{bf16, f16};

/// Row `row` of a matrix of any dtype as f32.
pub(super) fn row_to_f32(matrix: &Tensor, row: usize, out: &mut [f32]) {
    let (dtype, len) = (matrix.dtype(), out.len());
    match dtype {
        DType::F32 => out.copy_from_slice(&matrix.host::<f32>()[row * len..][..len]),
        DType::Bf16 => {
            out.iter_mut().zip(&matrix.host::<bf16>()[row * len..][..len]).for_each(|(y, x)| *y = x.to_f32())
        }
        DType::F16 => {
            out.iter_mut().zip(&matrix.host::<f16>()[row * len..][..len]).for_each(|(y, x)| *y = x.to_f32())
        }
        _ => {
            let (values, bytes) = (dtype.block_len(), dtype.block_bytes());
            assert!(
                len.is_multiple_of(values),
                "{dtype} rows are whole blocks of {values}, not {len} elements"
            );
            let row_bytes = len / values * bytes;
            let blocks = matrix.host_bytes()[row * row_bytes..][..row_bytes].chunks_exact(bytes);
            for (y, block) in out.chunks_exact_mut(values).zip(blocks) {
                block_to_f32(dtype, block, y);
            }
        }
    }
}

/// One block of a quantised format as f32: `block` is [`DType::block_bytes`] long, `out` [`DType::block_len`].
///
/// # Panics
/// If the lengths are not those, or `dtype` is not a block format.
pub(super) fn block_to_f32(dtype: DType, block: &[u8], out: &mut [f32]) {
    assert_eq!((block.len(), out.len()), (dtype.block_bytes(), dtype.block_len()), "not one {dtype} block");
    match dtype {
        DType::Q4_0 => q4_0(block, out),
        DType::Q4_1 => q4_1(block, out),
        DType::Q5_0 => q5_0(block, out),
        DType::Q5_1 => q5_1(block, out),
        DType::Q8_0 => q8_0(block, out),
        DType::Q2K => q2_k(block, out),
        DType::Q3K => q3_k(block, out),
        DType::Q4K => q4_k(block, out),
        DType::Q5K => q5_k(block, out),
        DType::Q6K => q6_k(block, out),
        DType::Iq4Nl => iq4_nl(block, out),
        DType::F32 | DType::F16 | DType::Bf16 | DType::U32 => panic!("{dtype} is not a block format"),
    }
}

/// The f16 at byte `at`.
fn scale(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `16 low nibbles, 16 high nibbles` of 16 bytes, as all 32-element formats order them.
fn nibbles(quants: &[u8]) -> impl Iterator<Item = u8> + '_ {
    quants.iter().map(|q| q & 0xF).chain(quants.iter().map(|q| q >> 4))
}

/// Bit `i` of the four bytes of fifth bits, moved to place 4.
fn fifth_bit(bits: &[u8], i: usize) -> u8 {
    (bits[i / 8] >> (i % 8) & 1) << 4
}

/// `d f16 | 16 × two 4-bit`: `d · (q − 8)`
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    out.iter_mut().zip(nibbles(&block[2..])).for_each(|(y, q)| *y = d * (f32::from(q) - 8.0));
}

/// `d f16 | m f16 | 16 × two 4-bit`: `d · q + m`
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    out.iter_mut().zip(nibbles(&block[4..])).for_each(|(y, q)| *y = d * f32::from(q) + m);
}

/// `d f16 | 32 fifth bits | 16 × two 4-bit`: `d · (q − 16)`
fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, bits) = (scale(block, 0), &block[2..6]);
    for (i, (y, q)) in out.iter_mut().zip(nibbles(&block[6..])).enumerate() {
        *y = d * (f32::from(q | fifth_bit(bits, i)) - 16.0);
    }
}

/// `d f16 | m f16 | 32 fifth bits | 16 × two 4-bit`: `d · q + m`
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, bits) = (scale(block, 0), scale(block, 2), &block[4..8]);
    for (i, (y, q)) in out.iter_mut().zip(nibbles(&block[8..])).enumerate() {
        *y = d * f32::from(q | fifth_bit(bits, i)) + m;
    }
}

/// `d f16 | 32 × i8`: `d · q`
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(y, &q)| *y = d * f32::from(q as i8));
}

/// The values that IQ4_NL's four bits stand for.
pub(super) const IQ4_NL_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `d f16 | 16 × two 4-bit`: `d · table[q]`
fn iq4_nl(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 0);
    let values = nibbles(&block[2..]).map(|q| f32::from(IQ4_NL_VALUES[q as usize]));
    out.iter_mut().zip(values).for_each(|(y, q)| *y = d * q);
}

/// The order of Q2_K's and Q3_K's 2-bit quants: two halves of 128 elements, each 32 bytes read at four shifts; every
/// 16 elements have a scale of their own. Calls `each(group, shift, bytes of the group's quants, elements)`.
fn two_bit_groups(quants: &[u8], out: &mut [f32], mut each: impl FnMut(usize, usize, &[u8], &mut [f32])) {
    for (group, y) in out.chunks_exact_mut(16).enumerate() {
        let (half, shift, side) = (group / 8, group % 8 / 2, group % 2);
        each(group, 2 * shift, &quants[32 * half + 16 * side..][..16], y);
    }
}

/// `16 × (4-bit scale, 4-bit minimum) | 64 × four 2-bit | d f16 | dmin f16`: `d · scale · q − dmin · minimum`
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (d, dmin) = (scale(block, 80), scale(block, 82));
    two_bit_groups(quants, out, |group, shift, quants, y| {
        let (d, m) = (d * f32::from(scales[group] & 0xF), dmin * f32::from(scales[group] >> 4));
        y.iter_mut().zip(quants).for_each(|(y, q)| *y = d * f32::from(q >> shift & 3) - m);
    });
}

/// `32 × eight third bits (clear: −4) | 64 × four 2-bit | 16 six-bit scales | d f16`: `d · (scale − 32) · q`
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, quants, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = scale(block, 108);
    two_bit_groups(quants, out, |group, shift, quants, y| {
        let low = scales[group % 8] >> (group / 8 * 4) & 0xF;
        let top = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        let d = d * (f32::from(low | top << 4) - 32.0);
        let high = &high[group % 2 * 16..][..16];
        for ((y, q), h) in y.iter_mut().zip(quants).zip(high) {
            let minus = if h >> (group / 2) & 1 == 1 { 0.0 } else { 4.0 };
            *y = d * (f32::from(q >> shift & 3) - minus);
        }
    });
}

/// Scale and minimum `j` of the eight 6-bit pairs that Q4_K and Q5_K pack into 12 bytes.
pub(super) fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let low = packed[j + 4];
        (low & 0xF | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4)
    }
}

/// `d f16 | dmin f16 | 8 six-bit scales and minima | 128 × two 4-bit`: `d · scale · q − dmin · minimum`
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, scales) = (scale(block, 0), scale(block, 2), &block[4..16]);
    for (group, y) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_min(scales, group);
        let (d, m) = (d * f32::from(s), dmin * f32::from(m));
        let quants = &block[16 + group / 2 * 32..][..32];
        let shift = group % 2 * 4;
        y.iter_mut().zip(quants).for_each(|(y, q)| *y = d * f32::from(q >> shift & 0xF) - m);
    }
}

/// As Q4_K with `32 × eight fifth bits` before the quants.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, scales, high) = (scale(block, 0), scale(block, 2), &block[4..16], &block[16..48]);
    for (group, y) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_min(scales, group);
        let (d, m) = (d * f32::from(s), dmin * f32::from(m));
        let quants = &block[48 + group / 2 * 32..][..32];
        let shift = group % 2 * 4;
        for ((y, q), h) in y.iter_mut().zip(quants).zip(high) {
            *y = d * f32::from(q >> shift & 0xF | (h >> group & 1) << 4) - m;
        }
    }
}

/// `128 × two 4-bit | 64 × four top 2-bit | 16 × i8 scale | d f16`: `d · scale · (q − 32)`
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = scale(block, 208);
    // Groups of 16: two halves of 128 elements; within a half, 64 bytes of low nibbles then their high nibbles.
    for (group, y) in out.chunks_exact_mut(16).enumerate() {
        let (half, at) = (group / 8, group % 8 * 16);
        let low = &low[64 * half + at % 64..][..16];
        let high = &high[32 * half + at % 32..][..16];
        let (nibble, pair) = (at / 64 * 4, at / 32 * 2);
        let d = d * f32::from(scales[group] as i8);
        for ((y, l), h) in y.iter_mut().zip(low).zip(high) {
            *y = d * (f32::from(l >> nibble & 0xF | (h >> pair & 3) << 4) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Shape, Storage, cpu::Memory};
    use safetensors::SafeTensors;

    fn formats() -> impl Iterator<Item = DType> {
        DType::ALL.into_iter().filter(|dtype| dtype.block_len() > 1)
    }

    /// Values of the `gguf` Python package for random blocks and edge-case scales; made by
    /// scripts/make_block_fixture.py.
    fn fixture() -> Vec<u8> {
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/blocks.safetensors")).unwrap()
    }

    #[test]
    fn every_block_format_reads_as_the_gguf_package_reads_it() {
        let file = fixture();
        let file = SafeTensors::deserialize(&file).unwrap();
        for dtype in formats() {
            let blocks = file.tensor(&format!("{dtype}.blocks")).unwrap().data().to_vec();
            let values = file.tensor(&format!("{dtype}.values")).unwrap().data().to_vec();
            let mut out = vec![0.0; dtype.block_len()];
            let pairs = blocks.chunks_exact(dtype.block_bytes()).zip(values.chunks_exact(4 * out.len()));
            assert!(pairs.len() >= 24, "{dtype}: only {} blocks in the fixture", pairs.len());
            for (n, (block, expected)) in pairs.enumerate() {
                block_to_f32(dtype, block, &mut out);
                for (i, (&y, e)) in out.iter().zip(expected.chunks_exact(4)).enumerate() {
                    let e = f32::from_le_bytes([e[0], e[1], e[2], e[3]]);
                    let same = y.to_bits() == e.to_bits() || (y.is_nan() && e.is_nan());
                    assert!(same, "{dtype} block {n} element {i}: {y:e}, expected {e:e}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_its_blocks() {
        let file = fixture();
        let file = SafeTensors::deserialize(&file).unwrap();
        for dtype in formats() {
            let blocks = file.tensor(&format!("{dtype}.blocks")).unwrap().data().to_vec();
            let (rows, cols) = (3, 4 * dtype.block_len());
            let bytes = &blocks[..rows * dtype.row_bytes(cols).unwrap()];
            let memory = Memory::zeroed(bytes.len()).unwrap();
            let matrix = Tensor::from_storage(Storage::Cpu(memory), dtype, Shape::new(&[rows, cols]), 0);
            matrix.host_bytes_mut().copy_from_slice(bytes);
            for row in 0..rows {
                let (mut whole, mut one) = (vec![0.0; cols], vec![0.0; dtype.block_len()]);
                row_to_f32(&matrix, row, &mut whole);
                for (n, y) in whole.chunks_exact(dtype.block_len()).enumerate() {
                    let at = (4 * row + n) * dtype.block_bytes();
                    block_to_f32(dtype, &bytes[at..at + dtype.block_bytes()], &mut one);
                    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(y), bits(&one), "{dtype} row {row} block {n}");
                }
            }
        }
    }
}
