//! `cvt` (PTX ISA 9.0, "Data Movement and Conversion Instructions: cvt").

use super::float::{BF16, F32, F64, Format, Rounding};
use super::integer::{mask, signed};

/// A rounding to whole numbers.
fn whole(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => value.round_ties_even(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
        Rounding::Away => value.round(),
    }
}

/// Between integers; `saturate` clamps to what the target can hold.
pub fn integer(value: u64, from: (u32, bool), to: (u32, bool), saturate: bool) -> u64 {
    let wide: i128 = if from.1 { signed(value, from.0).into() } else { (value & mask(from.0)).into() };
    let wide = if saturate { clamp(wide, to) } else { wide };
    wide as u64 & mask(to.0)
}

fn clamp(value: i128, (bits, is_signed): (u32, bool)) -> i128 {
    if is_signed {
        value.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        value.clamp(0, (1 << bits) - 1)
    }
}

pub fn integer_to_float(value: u64, from: (u32, bool), to: Format, rounding: Rounding) -> u64 {
    let wide: i128 = if from.1 { signed(value, from.0).into() } else { (value & mask(from.0)).into() };
    to.assemble(wide < 0, wide.unsigned_abs(), 0, rounding)
}

/// Values beyond the target's are clamped, NaN is 0.
pub fn float_to_integer(value: u64, from: Format, to: (u32, bool), rounding: Rounding, flush: bool) -> u64 {
    let value = if flush { from.flushed(value) } else { value };
    let value = whole(from.widen(value), rounding);
    if value.is_nan() {
        return 0;
    }
    // The cast clamps to i128, far beyond any target.
    clamp(value as i128, to) as u64 & mask(to.0)
}

/// How a float becomes another.
#[derive(Clone, Copy, Debug)]
pub struct FloatToFloat {
    pub from: Format,
    pub to: Format,
    pub rounding: Rounding,
    /// `.rni` and the like: to a whole number.
    pub whole: bool,
    pub flush: bool,
    pub saturate: bool,
    pub relu: bool,
    /// `.satfinite`: the largest number for what is beyond it.
    pub finite: bool,
}

/// To nearest, ties to even; the carry out of the mantissa goes into the exponent.
fn narrow_to_bf16(bits: u32) -> u64 {
    if f32::from_bits(bits).is_nan() {
        return BF16.nan();
    }
    u64::from((bits + 0x7fff + (bits >> 16 & 1)) >> 16)
}

impl FloatToFloat {
    /// The one conversion that kernels do all the time.
    fn is_plain_narrowing_to_bf16(&self) -> bool {
        let plain = !(self.whole || self.flush || self.saturate || self.relu || self.finite);
        self.from == F32 && self.to == BF16 && self.rounding == Rounding::Nearest && plain
    }

    pub fn apply(&self, value: u64) -> u64 {
        let FloatToFloat { from, to, .. } = *self;
        let value = value & mask(from.bits());
        if self.is_plain_narrowing_to_bf16() {
            return narrow_to_bf16(value as u32);
        }
        let value = if self.flush && from == F32 { from.flushed(value) } else { value };
        let wide = from.widen(value);
        let wide = if self.whole { whole(wide, self.rounding) } else { wide };
        // Same width and nothing to round: NaNs keep their payload.
        let mut bits = if from == to && !self.whole {
            value
        } else if from == F32 && to == F64 && !wide.is_nan() {
            wide.to_bits()
        } else {
            to.round(wide, if self.whole { Rounding::Nearest } else { self.rounding })
        };
        if self.flush && to == F32 {
            bits = to.flushed(bits);
        }
        let negative = bits & to.sign() != 0;
        if self.saturate {
            let one = to.round(1.0, Rounding::Nearest);
            bits = if to.is_nan(bits) || negative { 0 } else { bits.min(one) };
        }
        if self.relu && negative && !to.is_nan(bits) {
            bits = 0;
        }
        if self.finite && bits & !to.sign() == to.infinity() {
            bits -= 1;
        }
        bits
    }
}
