//! Complex numbers, as far as formulae are evaluated with them.

use std::ops::{Add, Div, Mul, Neg, Sub};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Complex {
    pub re: f64,
    pub im: f64,
}

impl Complex {
    pub const I: Complex = Complex { re: 0.0, im: 1.0 };

    pub const fn real(re: f64) -> Complex {
        Complex { re, im: 0.0 }
    }

    pub fn abs(self) -> f64 {
        self.re.hypot(self.im)
    }

    pub fn exp(self) -> Complex {
        let (sin, cos) = self.im.sin_cos();
        Complex { re: cos, im: sin } * Complex::real(self.re.exp())
    }

    pub fn ln(self) -> Complex {
        Complex { re: self.abs().ln(), im: self.im.atan2(self.re) }
    }

    pub fn pow(self, power: Complex) -> Complex {
        let whole = power.re as i32;
        if power.im == 0.0 && f64::from(whole) == power.re && whole.unsigned_abs() < 64 {
            // Exactly, and without the logarithm's branch.
            let product = (0..whole.unsigned_abs()).fold(Complex::real(1.0), |product, _| product * self);
            return if whole < 0 { Complex::real(1.0) / product } else { product };
        }
        if self.abs() == 0.0 { Complex::real(0.0) } else { (self.ln() * power).exp() }
    }

    pub fn is_finite(self) -> bool {
        self.re.is_finite() && self.im.is_finite()
    }
}

impl Add for Complex {
    type Output = Complex;
    fn add(self, other: Complex) -> Complex {
        Complex { re: self.re + other.re, im: self.im + other.im }
    }
}

impl Sub for Complex {
    type Output = Complex;
    fn sub(self, other: Complex) -> Complex {
        self + -other
    }
}

impl Neg for Complex {
    type Output = Complex;
    fn neg(self) -> Complex {
        Complex { re: -self.re, im: -self.im }
    }
}

impl Mul for Complex {
    type Output = Complex;
    fn mul(self, other: Complex) -> Complex {
        Complex { re: self.re * other.re - self.im * other.im, im: self.re * other.im + self.im * other.re }
    }
}

impl Div for Complex {
    type Output = Complex;
    fn div(self, other: Complex) -> Complex {
        let norm = other.re * other.re + other.im * other.im;
        let top = self * Complex { re: other.re, im: -other.im };
        Complex { re: top.re / norm, im: top.im / norm }
    }
}
