//! Floats as PTX has them (PTX ISA 9.0, "Floating Point Instructions", "Half Precision …").
//!
//! Arithmetic that rounds other than to nearest, or to 16 bits, goes through [`Exact`]: the result in f64
//! rounded to odd, which a second rounding to f32 or less cannot tell from the exact one (Boldo and
//! Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).

/// IEEE rounding directions, and ties away from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    Nearest,
    Zero,
    Down,
    Up,
    Away,
}

/// A binary format of a sign, `exponent` and `mantissa` bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    pub exponent: u32,
    pub mantissa: u32,
}

pub const F16: Format = Format { exponent: 5, mantissa: 10 };
pub const BF16: Format = Format { exponent: 8, mantissa: 7 };
/// Kept in the upper bits of 32, the rest zeros.
pub const TF32: Format = Format { exponent: 8, mantissa: 10 };
pub const F32: Format = Format { exponent: 8, mantissa: 23 };
pub const F64: Format = Format { exponent: 11, mantissa: 52 };

impl Format {
    pub fn bits(self) -> u32 {
        1 + self.exponent + self.mantissa
    }

    fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }

    pub fn infinity(self) -> u64 {
        ((1 << self.exponent) - 1) << self.mantissa
    }

    /// The NaN that PTX arithmetic gives: all ones but the sign, and for f64 the usual quiet one.
    pub fn nan(self) -> u64 {
        if self == F64 { f64::NAN.to_bits() } else { (1 << (self.bits() - 1)) - 1 }
    }

    pub fn sign(self) -> u64 {
        1 << (self.bits() - 1)
    }

    pub fn largest(self) -> u64 {
        self.infinity() - 1
    }

    pub fn is_nan(self, bits: u64) -> bool {
        bits & !self.sign() > self.infinity()
    }

    /// Subnormal numbers as zero of their sign.
    pub fn flushed(self, bits: u64) -> u64 {
        let magnitude = bits & !self.sign();
        if magnitude >> self.mantissa == 0 { bits & self.sign() } else { bits }
    }

    /// Exact, but for f64's NaN.
    pub fn widen(self, bits: u64) -> f64 {
        if self == F64 {
            return f64::from_bits(bits);
        }
        if self == F32 {
            return f64::from(f32::from_bits(bits as u32));
        }
        if self == BF16 {
            return f64::from(f32::from_bits((bits as u32) << 16));
        }
        let magnitude = bits & !self.sign();
        let value = if magnitude > self.infinity() {
            f64::NAN
        } else if magnitude == self.infinity() {
            f64::INFINITY
        } else {
            let exponent = (magnitude >> self.mantissa) as i32;
            let fraction = magnitude & ((1 << self.mantissa) - 1);
            let (significand, exponent) =
                if exponent == 0 { (fraction, 1) } else { (fraction | 1 << self.mantissa, exponent) };
            significand as f64 * power_of_two(exponent - self.bias() - self.mantissa as i32)
        };
        if bits & self.sign() != 0 { -value } else { value }
    }

    /// `value` in this format; NaN becomes [`Format::nan`].
    pub fn round(self, value: f64, rounding: Rounding) -> u64 {
        if value.is_nan() {
            return self.nan();
        }
        // The host rounds so itself, and faster.
        if self == F32 && rounding == Rounding::Nearest {
            return (value as f32).to_bits().into();
        }
        let bits = value.to_bits();
        let sign = if value.is_sign_negative() { self.sign() } else { 0 };
        if value.is_infinite() {
            return sign | self.infinity();
        }
        let exponent = (bits >> 52 & 0x7ff) as i32;
        let fraction = bits & ((1 << 52) - 1);
        let (significand, exponent) =
            if exponent == 0 { (fraction, 1) } else { (fraction | 1 << 52, exponent) };
        self.assemble(value.is_sign_negative(), significand.into(), exponent - 1075, rounding)
    }

    /// ±`significand` · 2^`exponent` in this format.
    pub fn assemble(self, negative: bool, significand: u128, exponent: i32, rounding: Rounding) -> u64 {
        let sign = if negative { self.sign() } else { 0 };
        if significand == 0 {
            return sign;
        }
        // Drop the bits below the last place of a number of this size, or of the subnormal ones.
        let top = 127 - significand.leading_zeros() as i32;
        let least = 1 - self.bias() - self.mantissa as i32;
        let place = (top + exponent - self.mantissa as i32).max(least);
        let shift = place - exponent;
        let kept = if shift <= 0 {
            significand << -shift
        } else {
            let (kept, rest, half) = match shift {
                1..=127 => (significand >> shift, significand & ((1 << shift) - 1), 1u128 << (shift - 1)),
                _ => (0, 1, 2),
            };
            let up = match rounding {
                Rounding::Nearest => rest > half || rest == half && kept & 1 == 1,
                Rounding::Away => rest >= half,
                Rounding::Zero => false,
                Rounding::Down => negative && rest != 0,
                Rounding::Up => !negative && rest != 0,
            };
            kept + u128::from(up)
        };
        // `kept` has at most mantissa + 2 bits; as a sum the carry moves into the exponent by itself.
        let biased = (place - least) as u64;
        let hidden = 1u64 << self.mantissa;
        let magnitude =
            if kept as u64 >= hidden { (biased << self.mantissa) + kept as u64 } else { kept as u64 };
        if magnitude >= self.infinity() {
            let to_infinity = match rounding {
                Rounding::Nearest | Rounding::Away => true,
                Rounding::Zero => false,
                Rounding::Down => negative,
                Rounding::Up => !negative,
            };
            return sign | if to_infinity { self.infinity() } else { self.largest() };
        }
        sign | magnitude
    }
}

fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// An f64 whose exact value lies in the direction of `error`, rounded to odd.
fn to_odd(value: f64, error: f64) -> f64 {
    if error == 0.0 || !value.is_finite() || !error.is_finite() || value.to_bits() & 1 == 1 {
        return value;
    }
    let bits = value.to_bits();
    let away = (error > 0.0) == (value > 0.0);
    if value == 0.0 {
        return error;
    }
    f64::from_bits(if away { bits + 1 } else { bits - 1 })
}

/// Sums, quotients and roots of numbers of at most 24 bits, as f64 rounded to odd.
pub mod exact {
    use super::to_odd;

    pub fn add(a: f64, b: f64) -> f64 {
        let sum = a + b;
        let part = sum - a;
        let error = (a - (sum - part)) + (b - part);
        to_odd(sum, error)
    }

    pub fn divide(a: f64, b: f64) -> f64 {
        let quotient = a / b;
        if !quotient.is_finite() || b.is_infinite() || quotient == 0.0 {
            return quotient;
        }
        let rest = (-quotient).mul_add(b, a);
        to_odd(quotient, if b < 0.0 { -rest } else { rest })
    }

    pub fn root(a: f64) -> f64 {
        let root = a.sqrt();
        if !root.is_finite() || root == 0.0 { root } else { to_odd(root, (-root).mul_add(root, a)) }
    }
}

/// What an instruction does beside its arithmetic.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    pub format: Format,
    pub rounding: Rounding,
    /// `.ftz`: subnormal inputs and results are zero.
    pub flush: bool,
    /// `.sat`: results lie in [0, 1], NaN is 0.
    pub saturate: bool,
    /// `.relu`: negative results are 0, NaN stays.
    pub relu: bool,
}

impl Mode {
    pub fn of(format: Format) -> Mode {
        Mode { format, rounding: Rounding::Nearest, flush: false, saturate: false, relu: false }
    }

    pub fn input(self, bits: u64) -> f64 {
        self.format.widen(self.operand(bits))
    }

    /// The input's bits.
    pub fn operand(self, bits: u64) -> u64 {
        let bits = if self.format == F64 { bits } else { bits & ((1 << self.format.bits()) - 1) };
        if self.flush { self.format.flushed(bits) } else { bits }
    }

    /// The bits of a sum. What cancels is +0, and −0 where rounding goes down.
    pub fn sum(self, a: f64, b: f64) -> u64 {
        let sum = exact::add(a, b);
        let cancels = sum == 0.0 && a.is_sign_negative() != b.is_sign_negative();
        self.output(if cancels && self.rounding == Rounding::Down { -0.0 } else { sum })
    }

    /// The result's bits, from a value that was rounded to odd.
    pub fn output(self, value: f64) -> u64 {
        self.finish(self.format.round(value, self.rounding))
    }

    pub fn finish(self, bits: u64) -> u64 {
        let format = self.format;
        let bits = if format.is_nan(bits) { format.nan() } else { bits };
        let bits = if self.flush { format.flushed(bits) } else { bits };
        if self.saturate {
            let one = (format.bias() as u64) << format.mantissa;
            return if format.is_nan(bits) || bits & format.sign() != 0 { 0 } else { bits.min(one) };
        }
        if self.relu && bits & format.sign() != 0 && !format.is_nan(bits) {
            return 0;
        }
        bits
    }

    /// Whether Rust's own f32 arithmetic does all of it.
    pub fn is_plain_f32(self) -> bool {
        self.format == F32
            && self.rounding == Rounding::Nearest
            && !self.flush
            && !self.saturate
            && !self.relu
    }
}

/// The smaller or the larger: −0 is below +0, and a NaN yields to a number unless `propagate` (`.NaN`).
pub fn extreme(mode: Mode, a: u64, b: u64, larger: bool, propagate: bool) -> u64 {
    let format = mode.format;
    let (a, b) = (mode.operand(a), mode.operand(b));
    let result = match (format.is_nan(a), format.is_nan(b)) {
        (true, true) => format.nan(),
        (true, false) if !propagate => b,
        (false, true) if !propagate => a,
        (true, false) | (false, true) => format.nan(),
        (false, false) => {
            if (order(format, a) > order(format, b)) == larger {
                a
            } else {
                b
            }
        }
    };
    mode.finish(result)
}

/// A key that sorts numbers of the format as they are, −0 below +0.
fn order(format: Format, bits: u64) -> i64 {
    let magnitude = (bits & !format.sign()) as i64;
    if bits & format.sign() != 0 { -1 - magnitude } else { magnitude }
}

/// `div.approx.f32`: 0 where the divisor is above 2^126, whose reciprocal is subnormal.
pub fn divide_approx(a: f64, b: f64) -> f64 {
    let large = b.is_finite() && b.abs() > power_of_two(126);
    match (large, a.is_infinite()) {
        (true, true) => f64::NAN,
        (true, false) if !a.is_nan() => 0.0_f64.copysign(a * b.signum()),
        _ => a / b,
    }
}

pub fn f32_bits(value: f32) -> u64 {
    if value.is_nan() { F32.nan() } else { value.to_bits().into() }
}

pub fn f32_of(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

pub fn f64_of(bits: u64) -> f64 {
    f64::from_bits(bits)
}
