//! `mma.sync` of 16-bit floats (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16 with floating point type").

use super::warp::{ALL, Runner};
use crate::arith::float::{F16, Rounding};
use crate::ptx::code::{LANES, Mma, MmaShape, Row};

/// Rows and columns of the result.
const M: usize = 16;
const N: usize = 8;

impl Runner<'_, '_> {
    /// d = a · b + c; sums in f32, k ascending.
    ///
    /// With g = lane / 4 and t = lane % 4, and the two halves of register r of a lane low half first:
    /// a (16 × k, by rows): rows g + 8·(r % 2), columns 2t, 2t + 1, + 8·(r / 2);
    /// b (k × 8): rows 2t, 2t + 1, + 8·r, column g;
    /// c and d (16 × 8): register i of four has row g + 8·(i / 2), column 2t + i % 2.
    pub fn mma(&mut self, mma: &Mma) {
        let depth = match mma.shape {
            MmaShape::M16n8k8 => 8,
            MmaShape::M16n8k16 => 16,
        };
        *self.counts.mma.entry(mma.shape.name()).or_default() += 1;
        let mut a = [[0f32; 16]; M];
        let mut b = [[0f32; N]; 16];
        let half = |row: &Row, lane: usize, upper: usize| {
            mma.format.widen(row[lane] >> (16 * upper) & 0xffff) as f32
        };
        for (r, source) in mma.a.iter().enumerate() {
            let row = self.row(*source);
            for lane in 0..LANES {
                for upper in 0..2 {
                    a[lane / 4 + 8 * (r % 2)][lane % 4 * 2 + upper + 8 * (r / 2)] = half(row, lane, upper);
                }
            }
        }
        for (r, source) in mma.b.iter().enumerate() {
            let row = self.row(*source);
            for lane in 0..LANES {
                for upper in 0..2 {
                    b[lane % 4 * 2 + upper + 8 * r][lane / 4] = half(row, lane, upper);
                }
            }
        }
        let mut sums = [[0f32; N]; M];
        for (i, source) in mma.c.iter().enumerate() {
            let row = self.row(*source);
            for lane in 0..LANES {
                if mma.narrow {
                    for upper in 0..2 {
                        let value = F16.widen(row[lane] >> (16 * upper) & 0xffff) as f32;
                        sums[lane / 4 + 8 * i][lane % 4 * 2 + upper] = value;
                    }
                } else {
                    sums[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2] = f32::from_bits(row[lane] as u32);
                }
            }
        }
        for (row, sums) in a.iter().zip(&mut sums) {
            for (a, b) in row.iter().zip(&b).take(depth) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    // The product of two 16-bit floats is exact, so this rounds once.
                    *sum += a * b;
                }
            }
        }
        for (i, d) in mma.d.iter().enumerate() {
            let row = std::array::from_fn(|lane| {
                if mma.narrow {
                    let value = |upper: usize| {
                        F16.round(sums[lane / 4 + 8 * i][lane % 4 * 2 + upper].into(), Rounding::Nearest)
                    };
                    value(0) | value(1) << 16
                } else {
                    crate::arith::float::f32_bits(sums[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2])
                }
            });
            self.warp.put(*d, ALL, &row);
        }
    }
}

impl MmaShape {
    fn name(self) -> &'static str {
        match self {
            MmaShape::M16n8k8 => "m16n8k8",
            MmaShape::M16n8k16 => "m16n8k16",
        }
    }
}
