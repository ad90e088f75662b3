//! `mma.sync` (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k8", "… m16n8k16", "… m16n8k32").

use super::warp::{ALL, Runner};
use crate::arith::float::{F16, Rounding, TF32, f32_bits};
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
            Element::Float(format) => {
                self.multiply_floats(mma, 2, |bits| format.widen(bits & 0xffff) as f32);
            }
            // The lower bits of a register are not looked at.
            Element::Tf32 => self.multiply_floats(mma, 1, |bits| TF32.widen(bits >> 13) as f32),
            Element::Bytes { a_signed, b_signed } => self.multiply_bytes(mma, a_signed, b_signed),
        }
    }

    /// Calls `each` with row, column and the bits from the element on of every element of a fragment.
    fn spread(
        &self,
        sources: &[Source],
        per: usize,
        place: fn(usize, usize, usize, usize) -> (usize, usize),
        mut each: impl FnMut(usize, usize, u64),
    ) {
        for (r, source) in sources.iter().enumerate() {
            let values = self.row(*source);
            for (lane, value) in values.iter().enumerate() {
                for part in 0..per {
                    let (row, column) = place(lane, r, part, per);
                    each(row, column, value >> (32 / per * part));
                }
            }
        }
    }

    /// Puts a result, whose elements are `per` a register, into its registers.
    fn gather(&mut self, mma: &Mma, per: usize, value: impl Fn(usize, usize) -> u64) {
        for (r, d) in mma.d.iter().enumerate() {
            let row = std::array::from_fn(|lane| {
                (0..per).fold(0, |bits, part| {
                    let (row, column) = place_in_c(lane, r, part, per);
                    bits | value(row, column) << (32 / per * part)
                })
            });
            self.warp.put(*d, ALL, &row);
        }
    }

    /// Sums in f32 with k ascending, each of them rounded to nearest; cards round otherwise.
    fn multiply_floats(&mut self, mma: &Mma, per: usize, widen: impl Fn(u64) -> f32) {
        let mut a = [[0f32; K]; M];
        let mut b = [[0f32; N]; K];
        let mut sums = [[0f32; N]; M];
        let depth = 2 * per * mma.a.len();
        self.spread(&mma.a, per, place_in_a, |row, column, bits| a[row][column] = widen(bits));
        self.spread(&mma.b, per, place_in_b, |row, column, bits| b[row][column] = widen(bits));
        let sums_per = if mma.narrow { 2 } else { 1 };
        self.spread(&mma.c, sums_per, place_in_c, |row, column, bits| {
            sums[row][column] =
                if mma.narrow { F16.widen(bits & 0xffff) as f32 } else { f32::from_bits(bits as u32) };
        });
        for (row, sums) in a.iter().zip(&mut sums) {
            for (a, b) in row.iter().zip(&b).take(depth) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    // The product of two such floats is exact, so this rounds once.
                    *sum += a * b;
                }
            }
        }
        self.gather(mma, sums_per, |row, column| {
            let sum = sums[row][column];
            if mma.narrow { F16.round(sum.into(), Rounding::Nearest) } else { f32_bits(sum) }
        });
    }

    /// Sums wrap.
    fn multiply_bytes(&mut self, mma: &Mma, a_signed: bool, b_signed: bool) {
        let mut a = [[0i32; K]; M];
        let mut b = [[0i32; N]; K];
        let mut sums = [[0i32; N]; M];
        let widen = |bits: u64, is_signed| {
            if is_signed { signed(bits, 8) as i32 } else { (bits & 0xff) as i32 }
        };
        self.spread(&mma.a, 4, place_in_a, |row, column, bits| a[row][column] = widen(bits, a_signed));
        self.spread(&mma.b, 4, place_in_b, |row, column, bits| b[row][column] = widen(bits, b_signed));
        self.spread(&mma.c, 1, place_in_c, |row, column, bits| sums[row][column] = bits as i32);
        for (row, sums) in a.iter().zip(&mut sums) {
            for (a, b) in row.iter().zip(&b) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = sum.wrapping_add(a * b);
                }
            }
        }
        self.gather(mma, 1, |row, column| (sums[row][column] as u32).into());
    }
}
