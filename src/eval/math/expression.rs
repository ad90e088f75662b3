//! Formulae, and their values at a point.

use super::complex::Complex;

#[derive(Clone, Debug, PartialEq)]
pub enum Expression {
    Number(f64),
    /// Half a dozen names have a value; all others are unknowns.
    Name(String),
    Infinity,
    Negative(Box<Expression>),
    Sum(Box<Expression>, Box<Expression>),
    Product(Box<Expression>, Box<Expression>),
    Quotient(Box<Expression>, Box<Expression>),
    Power(Box<Expression>, Box<Expression>),
    /// `sqrt`, `sin`, `cos`, `tan`, `ln`, `log` (of base 10), `exp`, `abs`, `factorial`.
    Function(&'static str, Box<Expression>),
    /// A hundredth of it; answers may leave the sign out.
    Percent(Box<Expression>),
}

impl Expression {
    /// The value where unknowns have the values of point `point`; not finite where there is none.
    pub fn at(&self, point: u32) -> Complex {
        use Expression as E;
        match self {
            E::Number(number) => Complex::real(*number),
            E::Name(name) => match name.as_str() {
                "pi" => Complex::real(std::f64::consts::PI),
                "e" => Complex::real(std::f64::consts::E),
                "i" => Complex::I,
                name => unknown(name, point),
            },
            E::Infinity => Complex::real(f64::INFINITY),
            E::Negative(of) => -of.at(point),
            E::Sum(a, b) => a.at(point) + b.at(point),
            E::Product(a, b) => a.at(point) * b.at(point),
            E::Quotient(a, b) => a.at(point) / b.at(point),
            E::Power(a, b) => a.at(point).pow(b.at(point)),
            E::Percent(of) => of.at(point) * Complex::real(0.01),
            E::Function(name, of) => function(name, of.at(point)),
        }
    }

    /// The same without a percent sign around it.
    pub fn without_percent(&self) -> &Expression {
        match self {
            Expression::Percent(of) => of,
            other => other,
        }
    }

    pub fn equals(&self, other: &Expression) -> bool {
        if let (Some(a), Some(b)) = (self.infinite(), other.infinite()) {
            return a == b;
        }
        let spellings = |of: &Expression| [of.clone(), of.without_percent().clone()];
        spellings(self).iter().any(|a| spellings(other).iter().any(|b| same_everywhere(a, b)))
    }

    /// The sign of an infinity.
    fn infinite(&self) -> Option<f64> {
        match self {
            Expression::Infinity => Some(1.0),
            Expression::Negative(of) => of.infinite().map(|sign| -sign),
            _ => None,
        }
    }
}

/// Points at which two formulae are compared.
const POINTS: u32 = 4;

fn same_everywhere(a: &Expression, b: &Expression) -> bool {
    (0..POINTS).all(|point| {
        let (a, b) = (a.at(point), b.at(point));
        a.is_finite() && b.is_finite() && (a - b).abs() <= 1e-6 * b.abs().max(1.0)
    })
}

/// Positive, different for every name and point, and no round number.
fn unknown(name: &str, point: u32) -> Complex {
    let hash = name.bytes().fold(u64::from(point) + 1, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    });
    Complex::real(0.3 + (hash >> 11) as f64 / (1u64 << 53) as f64 * 2.1)
}

fn function(name: &str, of: Complex) -> Complex {
    let i = Complex::I;
    let half = Complex::real(0.5);
    let (up, down) = ((i * of).exp(), (-(i * of)).exp());
    let (sin, cos) = ((up - down) / (i + i), (up + down) * half);
    match name {
        // Exact for squares.
        "sqrt" if of.im == 0.0 && of.re >= 0.0 => Complex::real(of.re.sqrt()),
        "sqrt" => of.pow(half),
        "sin" => sin,
        "cos" => cos,
        "tan" => sin / cos,
        "ln" => of.ln(),
        "log" => of.ln() / Complex::real(std::f64::consts::LN_10),
        "exp" => of.exp(),
        "abs" => Complex::real(of.abs()),
        "factorial" if of.im == 0.0 && of.re >= 0.0 && of.re.fract() == 0.0 && of.re <= 170.0 => {
            Complex::real((1..=of.re as u32).map(f64::from).product())
        }
        _ => Complex::real(f64::NAN),
    }
}
