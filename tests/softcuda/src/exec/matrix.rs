//! `mma.sync` (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k8", "… m16n8k16", "… m16n8k32").

use half::{bf16, f16};

use super::warp::{ALL, Runner};
use crate::arith::float::{BF16, F16, f32_bits};
use crate::arith::integer::signed;
use crate::ptx::code::{Element, Mma, Source};

/// Rows and columns of the result.
const M: usize = 16;
const N: usize = 8;
/// The longest inner dimension.
const K: usize = 32;

/// Where element `part` of `per` in register `r` of a lane lies in a, [16, k] by rows: row, column.
fn place_in_a(lane: usize, r: usize, part: usize, per: usize) -> (usize, usize) {
    (lane / 4 + 8 * (r % 2), lane % 4 * per + part + 4 * per * (r / 2))
}

/// The same in b, [k, 8]: row, column.
fn place_in_b(lane: usize, r: usize, part: usize, per: usize) -> (usize, usize) {
    (lane % 4 * per + part + 4 * per * r, lane / 4)
}

/// Where part of `per` in register `r` of a lane lies in c and d, [16, 8]: row, column.
fn place_in_c(lane: usize, r: usize, part: usize, per: usize) -> (usize, usize) {
    let at = r * per + part;
    (lane / 4 + 8 * (at / 2), lane % 4 * 2 + at % 2)
}

impl Runner<'_, '_> {
    /// d = a · b + c.
    pub fn mma(&mut self, mma: &Mma) {
        *self.counts.mma.entry(mma.shape).or_default() += 1;
        match mma.element {
            Element::Float(BF16) => {
                self.multiply_floats::<2>(mma, |bits| bf16::from_bits(bits as u16).to_f32());
            }
            Element::Float(_) => self.multiply_floats::<2>(mma, |bits| f16::from_bits(bits as u16).to_f32()),
            // The lower bits of a register are not looked at.
            Element::Tf32 => self.multiply_floats::<1>(mma, |bits| f32::from_bits(bits as u32 & !0x1fff)),
            Element::Bytes { a_signed, b_signed } => self.multiply_bytes(mma, a_signed, b_signed),
        }
    }

    /// Calls `each` with the row and column of every element of a fragment, `PER` a register, and the bits from
    /// the element on.
    fn spread<const PER: usize>(
        &self,
        sources: &[Source],
        place: impl Fn(usize, usize, usize, usize) -> (usize, usize),
        mut each: impl FnMut(usize, usize, u64),
    ) {
        for (r, source) in sources.iter().enumerate() {
            let values = self.row(*source);
            for (lane, value) in values.iter().enumerate() {
                for part in 0..PER {
                    let (row, column) = place(lane, r, part, PER);
                    each(row, column, value >> (32 / PER * part));
                }
            }
        }
    }

    /// Puts a result, whose elements are `PER` a register, into its registers.
    fn gather<const PER: usize>(&mut self, mma: &Mma, value: impl Fn(usize, usize) -> u64) {
        for (r, d) in mma.d.iter().enumerate() {
            let row = std::array::from_fn(|lane| {
                (0..PER).fold(0, |bits, part| {
                    let (row, column) = place_in_c(lane, r, part, PER);
                    bits | value(row, column) << (32 / PER * part)
                })
            });
            self.warp.put(*d, ALL, &row);
        }
    }

    /// Sums in f32 with k ascending, each of them rounded to nearest; cards round otherwise.
    fn multiply_floats<const PER: usize>(&mut self, mma: &Mma, widen: impl Fn(u64) -> f32) {
        let mut a = [[0f32; K]; M];
        let mut b = [[0f32; N]; K];
        let mut sums = [[0f32; N]; M];
        let depth = 2 * PER * mma.a.len();
        self.spread::<PER>(&mma.a, place_in_a, |row, column, bits| a[row][column] = widen(bits));
        self.spread::<PER>(&mma.b, place_in_b, |row, column, bits| b[row][column] = widen(bits));
        if mma.narrow {
            self.spread::<2>(&mma.c, place_in_c, |row, column, bits| sums[row][column] = widen(bits));
        } else {
            self.spread::<1>(&mma.c, place_in_c, |row, column, bits| {
                sums[row][column] = f32::from_bits(bits as u32);
            });
        }
        for (row, sums) in a.iter().zip(&mut sums) {
            let mut total = *sums;
            for (a, b) in row.iter().zip(&b).take(depth) {
                for (sum, b) in total.iter_mut().zip(b) {
                    // The product of two such floats is exact, so this rounds once.
                    *sum += a * b;
                }
            }
            *sums = total;
        }
        if mma.narrow {
            self.gather::<2>(mma, |row, column| {
                let sum = f16::from_f32(sums[row][column]);
                if sum.is_nan() { F16.nan() } else { sum.to_bits().into() }
            });
        } else {
            self.gather::<1>(mma, |row, column| f32_bits(sums[row][column]));
        }
    }

    /// Sums wrap.
    fn multiply_bytes(&mut self, mma: &Mma, a_signed: bool, b_signed: bool) {
        let mut a = [[0i32; K]; M];
        let mut b = [[0i32; N]; K];
        let mut sums = [[0i32; N]; M];
        let widen = |bits: u64, is_signed| {
            if is_signed { signed(bits, 8) as i32 } else { (bits & 0xff) as i32 }
        };
        self.spread::<4>(&mma.a, place_in_a, |row, column, bits| a[row][column] = widen(bits, a_signed));
        self.spread::<4>(&mma.b, place_in_b, |row, column, bits| b[row][column] = widen(bits, b_signed));
        self.spread::<1>(&mma.c, place_in_c, |row, column, bits| sums[row][column] = bits as i32);
        for (row, sums) in a.iter().zip(&mut sums) {
            for (a, b) in row.iter().zip(&b) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = sum.wrapping_add(a * b);
                }
            }
        }
        self.gather::<1>(mma, |row, column| (sums[row][column] as u32).into());
    }
}
