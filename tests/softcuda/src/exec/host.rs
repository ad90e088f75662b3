//! What a kernel says to the host: `printf` and failed assertions (CUDA C++ Programming Guide, "Formatted
//! Output", "Assertion").

use std::fmt::Write;

use super::Problem;
use super::warp::Runner;
use crate::ptx::code::{LANES, Space};

/// Longest text that is read from a kernel's memory, bytes.
const LONGEST: u64 = 4096;

/// One conversion of a format: `%-8.3lld`.
#[derive(Default)]
struct Conversion {
    left: bool,
    zeros: bool,
    plus: bool,
    blank: bool,
    prefix: bool,
    width: usize,
    precision: Option<usize>,
    /// A 64-bit integer.
    long: bool,
    kind: char,
}

/// The arguments of one lane, in its local memory: each at a multiple of its size.
struct Arguments {
    at: u64,
}

impl Arguments {
    fn next(&mut self, bytes: u64) -> u64 {
        let at = self.at.next_multiple_of(bytes);
        self.at = at + bytes;
        at
    }
}

impl Runner<'_, '_> {
    fn word(&mut self, address: u64, bytes: usize, lane: usize) -> Result<u64, Problem> {
        let mut value = [0; 8];
        self.fetch(Space::Generic, address, u32::MAX, lane, &mut value[..bytes])?;
        Ok(u64::from_le_bytes(value))
    }

    /// A parameter of a call, at its offset in the lane's local memory.
    fn call_param(&self, offset: u32, bytes: usize, lane: usize) -> u64 {
        let from = lane * self.grid.kernel.code.local_bytes as usize + offset as usize;
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&self.warp.local[from..from + bytes]);
        u64::from_le_bytes(value)
    }

    /// Text that ends with a zero.
    fn text(&mut self, address: u64, lane: usize) -> Result<String, Problem> {
        let mut bytes = Vec::new();
        for at in address..address + LONGEST {
            match self.word(at, 1, lane)? as u8 {
                0 => break,
                byte => bytes.push(byte),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// `vprintf(format, arguments)`: lanes print in their order; the result is the number of arguments.
    pub fn print(
        &mut self,
        [format, arguments]: [u32; 2],
        result: Option<u32>,
        lanes: u32,
    ) -> Result<(), (Problem, usize)> {
        for lane in (0..LANES).filter(|lane| lanes >> lane & 1 == 1) {
            let format = self.call_param(format, 8, lane);
            let at = self.call_param(arguments, 8, lane);
            let (text, count) = self.formatted(format, at, lane).map_err(|problem| (problem, lane))?;
            print!("{text}");
            if let Some(result) = result {
                let to = lane * self.grid.kernel.code.local_bytes as usize + result as usize;
                self.warp.local[to..to + 4].copy_from_slice(&u32::to_le_bytes(count));
            }
        }
        Ok(())
    }

    /// `__assertfail(message, file, line, function, character size)`.
    pub fn failed_assertion(&mut self, params: [u32; 4], lane: usize) -> Problem {
        let [message, file, line, function] = params;
        let text = |runner: &mut Self, param| {
            let address = runner.call_param(param, 8, lane);
            runner.text(address, lane)
        };
        let texts = [message, file, function].map(|param| text(self, param));
        let line = self.call_param(line, 4, lane);
        match texts {
            [Ok(message), Ok(file), Ok(function)] => {
                Problem::Assertion { what: format!("{file}:{line}: {function}: `{message}` failed") }
            }
            [Err(problem), ..] | [_, Err(problem), _] | [.., Err(problem)] => problem,
        }
    }

    fn formatted(&mut self, format: u64, arguments: u64, lane: usize) -> Result<(String, u32), Problem> {
        let format = self.text(format, lane)?;
        let mut arguments = Arguments { at: arguments };
        let (mut text, mut count) = (String::new(), 0);
        let mut rest = format.chars();
        while let Some(character) = rest.next() {
            if character != '%' {
                text.push(character);
                continue;
            }
            let mut conversion = Conversion::default();
            let mut number = None;
            for next in rest.by_ref() {
                match next {
                    '-' => conversion.left = true,
                    '0' if number.is_none() => conversion.zeros = true,
                    '+' => conversion.plus = true,
                    ' ' => conversion.blank = true,
                    '#' => conversion.prefix = true,
                    '0'..='9' => {
                        number = Some(number.unwrap_or(0) * 10 + next as usize - '0' as usize);
                    }
                    '*' => {
                        let value = self.word(arguments.next(4), 4, lane)? as i32;
                        count += 1;
                        conversion.left |= value < 0;
                        number = Some(value.unsigned_abs() as usize);
                    }
                    '.' => {
                        conversion.width = number.unwrap_or(0);
                        // What follows is the precision: a width that was given is done.
                        conversion.precision = Some(0);
                        number = Some(0);
                    }
                    'h' => {}
                    'l' | 'z' | 'j' | 't' => conversion.long = true,
                    kind => {
                        conversion.kind = kind;
                        break;
                    }
                }
            }
            match conversion.precision {
                Some(_) => conversion.precision = number,
                None => conversion.width = number.unwrap_or(0),
            }
            if conversion.kind == '%' {
                text.push('%');
                continue;
            }
            let bytes = match conversion.kind {
                'd' | 'i' | 'u' | 'x' | 'X' | 'o' if !conversion.long => 4,
                'c' => 4,
                _ => 8,
            };
            let value = self.word(arguments.next(bytes), bytes as usize, lane)?;
            count += 1;
            let shown = if conversion.kind == 's' {
                let whole = self.text(value, lane)?;
                whole.chars().take(conversion.precision.unwrap_or(usize::MAX)).collect()
            } else {
                conversion.show(value)
            };
            conversion.pad(&shown, &mut text);
        }
        Ok((text, count))
    }
}

impl Conversion {
    fn show(&self, value: u64) -> String {
        let signed = if self.long { value as i64 } else { i64::from(value as i32) };
        let sign = |negative: bool| match () {
            () if negative => "-",
            () if self.plus => "+",
            () if self.blank => " ",
            () => "",
        };
        let digits = |text: String| format!("{text:0>width$}", width = self.precision.unwrap_or(1));
        match self.kind {
            'd' | 'i' => format!("{}{}", sign(signed < 0), digits(signed.unsigned_abs().to_string())),
            'u' => digits(value.to_string()),
            'x' => format!("{}{}", if self.prefix { "0x" } else { "" }, digits(format!("{value:x}"))),
            'X' => format!("{}{}", if self.prefix { "0X" } else { "" }, digits(format!("{value:X}"))),
            'o' => digits(format!("{value:o}")),
            'p' => format!("{value:#x}"),
            'c' => char::from(value as u8).to_string(),
            _ => self.float(f64::from_bits(value), sign),
        }
    }

    fn float(&self, value: f64, sign: impl Fn(bool) -> &'static str) -> String {
        let (sign, size) = (sign(value.is_sign_negative()), value.abs());
        if !size.is_finite() {
            let name = if size.is_nan() { "nan" } else { "inf" };
            let upper = self.kind.is_ascii_uppercase();
            return format!("{sign}{}", if upper { name.to_ascii_uppercase() } else { name.to_owned() });
        }
        let places = self.precision.unwrap_or(6);
        let scientific = |places: usize| {
            let text = format!("{size:.places$e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let exponent: i32 = exponent.parse().unwrap_or(0);
            let mark = if exponent < 0 { '-' } else { '+' };
            (format!("{digits}e{mark}{:02}", exponent.abs()), exponent)
        };
        let trimmed = |text: String| match text.split_once('e') {
            Some((digits, exponent)) if digits.contains('.') => {
                format!("{}e{exponent}", digits.trim_end_matches('0').trim_end_matches('.'))
            }
            None if text.contains('.') => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
            _ => text,
        };
        let shown = match self.kind {
            'e' | 'E' => scientific(places).0,
            'g' | 'G' => {
                // The shorter form with `places` significant digits.
                let places = places.max(1) as i32;
                let (text, exponent) = scientific(places as usize - 1);
                if (-4..places).contains(&exponent) {
                    trimmed(format!("{size:.*}", (places - 1 - exponent) as usize))
                } else {
                    trimmed(text)
                }
            }
            _ => format!("{size:.places$}"),
        };
        let shown = if self.kind.is_ascii_uppercase() { shown.to_ascii_uppercase() } else { shown };
        format!("{sign}{shown}")
    }

    /// Fills up to the width.
    fn pad(&self, shown: &str, text: &mut String) {
        let missing = self.width.saturating_sub(shown.chars().count());
        let number = !matches!(self.kind, 's' | 'c' | 'p');
        if self.left {
            let _ = write!(text, "{shown}{}", " ".repeat(missing));
        } else if self.zeros && number {
            let at = shown.len() - shown.trim_start_matches(['-', '+', ' ']).len();
            let _ = write!(text, "{}{}{}", &shown[..at], "0".repeat(missing), &shown[at..]);
        } else {
            let _ = write!(text, "{}{shown}", " ".repeat(missing));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(conversion: Conversion, value: u64) -> String {
        let mut text = String::new();
        conversion.pad(&conversion.show(value), &mut text);
        text
    }

    /// Against what C's printf gives.
    #[test]
    fn conversions() {
        let of = |kind| Conversion { kind, ..Conversion::default() };
        assert_eq!(shown(of('d'), -5i32 as u32 as u64), "-5");
        assert_eq!(shown(Conversion { long: true, ..of('d') }, -5i64 as u64), "-5");
        assert_eq!(shown(of('u'), 0xffff_ffff), "4294967295");
        assert_eq!(shown(Conversion { width: 6, zeros: true, ..of('d') }, -5i32 as u32 as u64), "-00005");
        assert_eq!(shown(Conversion { width: 6, left: true, ..of('x') }, 255), "ff    ");
        assert_eq!(shown(Conversion { prefix: true, ..of('x') }, 255), "0xff");
        assert_eq!(shown(Conversion { precision: Some(4), plus: true, ..of('i') }, 7), "+0007");
        assert_eq!(shown(of('f'), 1.5f64.to_bits()), "1.500000");
        assert_eq!(shown(Conversion { precision: Some(0), ..of('f') }, 2.5f64.to_bits()), "2");
        assert_eq!(
            shown(Conversion { precision: Some(2), width: 8, ..of('f') }, (-1.005f64).to_bits()),
            "   -1.00"
        );
        assert_eq!(shown(of('e'), 12345.678f64.to_bits()), "1.234568e+04");
        assert_eq!(shown(of('g'), 0.0001f64.to_bits()), "0.0001");
        assert_eq!(shown(of('g'), 1e-5f64.to_bits()), "1e-05");
        assert_eq!(shown(of('g'), 1234567.0f64.to_bits()), "1.23457e+06");
        assert_eq!(shown(of('g'), 100000.0f64.to_bits()), "100000");
        assert_eq!(shown(of('G'), f64::INFINITY.to_bits()), "INF");
        assert_eq!(shown(of('c'), 97), "a");
    }
}
