//! Opcodes that compute each lane by itself, as functions of rows.

use super::Opcode;
use crate::arith::float::{self, BF16, F16, F32, F64, Format, Mode, Rounding, TF32, exact};
use crate::arith::{convert, integer};
use crate::ptx::code::{Map1, Map2, Map3, Map4, map1, map2, map3, map4};
use crate::ptx::types::{Class, Type};

pub enum Function {
    One(Map1),
    Two(Map2),
    Three(Map3),
    Four(Map4),
}

use Function::{Four, One, Three, Two};

pub fn format_of(ty: Type) -> Format {
    match (ty.class, ty.bits, ty.pair) {
        (Class::Bf16, ..) => BF16,
        (_, 16, _) | (_, _, true) => F16,
        (_, 32, _) => F32,
        _ => F64,
    }
}

/// The function of an opcode; none: not an opcode of this kind, or with modifiers that are not run.
pub fn function(op: &Opcode) -> Option<Function> {
    if op.name == "cvt" {
        return conversion(op);
    }
    let ty = op.types.first().copied()?;
    if ty.bits > 64 {
        return None;
    }
    if ty.is_float() {
        return floats(op, ty);
    }
    integers(op, ty)
}

fn integers(op: &Opcode, ty: Type) -> Option<Function> {
    let bits = ty.bits;
    let mask = integer::mask(bits);
    let is_signed = ty.is_signed();
    let saturate = op.has("sat");
    let may_saturate = matches!(op.name, "add" | "sub") || matches!(op.name, "mad" | "mad24") && op.has("hi");
    if saturate && !(may_saturate && is_signed && bits == 32) {
        return None;
    }
    let clamp = |value: i64| value.clamp(i32::MIN.into(), i32::MAX.into()) as u32 as u64;
    Some(match op.name {
        "add" if saturate => Two(map2(move |a, b| clamp(integer::signed(a, 32) + integer::signed(b, 32)))),
        "sub" if saturate => Two(map2(move |a, b| clamp(integer::signed(a, 32) - integer::signed(b, 32)))),
        "add" => Two(map2(move |a, b| a.wrapping_add(b) & mask)),
        "sub" => Two(map2(move |a, b| a.wrapping_sub(b) & mask)),
        "mul24" | "mad24" => product_of_24_bits(op, is_signed),
        "mul" if op.has("wide") => {
            let out = integer::mask(2 * bits);
            Two(map2(move |a, b| integer::product(a, b, bits, is_signed) as u64 & out))
        }
        "mul" if op.has("hi") => {
            Two(map2(move |a, b| (integer::product(a, b, bits, is_signed) >> bits) as u64 & mask))
        }
        "mul" if op.has("lo") => Two(map2(move |a, b| a.wrapping_mul(b) & mask)),
        "mad" if op.has("wide") => {
            let out = integer::mask(2 * bits);
            Three(map3(move |a, b, c| (integer::product(a, b, bits, is_signed) as u64).wrapping_add(c) & out))
        }
        "mad" if saturate => Three(map3(move |a, b, c| {
            clamp((integer::product(a, b, 32, true) >> 32) as i64 + integer::signed(c, 32))
        })),
        "mad" if op.has("hi") => Three(map3(move |a, b, c| {
            ((integer::product(a, b, bits, is_signed) >> bits) as u64).wrapping_add(c) & mask
        })),
        "mad" if op.has("lo") => Three(map3(move |a, b, c| a.wrapping_mul(b).wrapping_add(c) & mask)),
        "div" => Two(map2(move |a, b| integer::divide(a, b, bits, is_signed))),
        "rem" => Two(map2(move |a, b| integer::remainder(a, b, bits, is_signed))),
        "abs" => One(map1(move |a| integer::signed(a, bits).wrapping_abs() as u64 & mask)),
        "neg" => One(map1(move |a| a.wrapping_neg() & mask)),
        "min" | "max" if !ty.pair => {
            let larger = op.name == "max";
            if is_signed {
                Two(map2(move |a, b| {
                    let (a, b) = (integer::signed(a, bits), integer::signed(b, bits));
                    (if larger { a.max(b) } else { a.min(b) }) as u64 & mask
                }))
            } else {
                Two(map2(move |a, b| {
                    let (a, b) = (a & mask, b & mask);
                    if larger { a.max(b) } else { a.min(b) }
                }))
            }
        }
        "sad" => Three(map3(move |a, b, c| {
            let apart = if is_signed {
                integer::signed(a, bits).abs_diff(integer::signed(b, bits))
            } else {
                (a & mask).abs_diff(b & mask)
            };
            c.wrapping_add(apart) & mask
        })),
        "mov" => One(map1(move |a| a & mask)),
        "and" => Two(map2(move |a, b| a & b & mask)),
        "or" => Two(map2(move |a, b| (a | b) & mask)),
        "xor" => Two(map2(move |a, b| (a ^ b) & mask)),
        "not" => One(map1(move |a| !a & mask)),
        "cnot" => One(map1(move |a| u64::from(a & mask == 0))),
        "shl" => Two(map2(move |a, b| integer::shift_left(a & mask, b, bits))),
        "shr" => Two(map2(move |a, b| integer::shift_right(a, b, bits, is_signed))),
        "shf" => {
            let (left, wrap) = (op.has("l"), op.has("wrap"));
            Three(map3(move |a, b, c| integer::funnel(a, b, c, left, wrap)))
        }
        "bfe" => Three(map3(move |a, b, c| integer::extract(a, b, c, bits, is_signed))),
        "bfi" => Four(map4(move |a, b, c, d| integer::insert(a, b, c, d, bits))),
        "bfind" => {
            let shift = op.has("shiftamt");
            One(map1(move |a| integer::find_top(a, bits, is_signed, shift)))
        }
        "bmsk" => {
            let clamp = op.has("clamp");
            Two(map2(move |a, b| {
                let (start, length) =
                    if clamp { (a as u32, (b as u32).min(32)) } else { (a as u32 & 31, b as u32 & 31) };
                if start >= 32 { 0 } else { integer::mask(length) << start & mask }
            }))
        }
        "brev" => One(map1(move |a| (a & mask).reverse_bits() >> (64 - bits))),
        "clz" => One(map1(move |a| u64::from((a & mask).leading_zeros() - (64 - bits)))),
        "popc" => One(map1(move |a| u64::from((a & mask).count_ones()))),
        "prmt" => match op.modifiers.first() {
            Some(mode) => {
                integer::permute_selector(mode, 0)?;
                let mode = (*mode).to_owned();
                Three(map3(move |a, b, c| {
                    integer::permute(a, b, integer::permute_selector(&mode, c).unwrap_or(0))
                }))
            }
            None => Three(map3(integer::permute)),
        },
        "lop3" => Four(map4(integer::lookup)),
        "dp4a" => {
            let (a_signed, b_signed) = (is_signed, op.types.get(1)?.is_signed());
            Three(map3(move |a, b, c| integer::dot_bytes(a, b, c, a_signed, b_signed)))
        }
        "dp2a" => {
            let (a_signed, b_signed) = (is_signed, op.types.get(1)?.is_signed());
            let high = op.has("hi");
            Three(map3(move |a, b, c| integer::dot_halves(a, b, c, a_signed, b_signed, high)))
        }
        "slct" => slct(op)?,
        _ => return None,
    })
}

/// `mul24` and `mad24`: the low or the high 32 bits of the product's 48, for `mad24` plus c.
fn product_of_24_bits(op: &Opcode, is_signed: bool) -> Function {
    let high = op.has("hi");
    let product = move |a: u64, b: u64| {
        let product = integer::product(a, b, 24, is_signed);
        (if high { product >> 16 } else { product }) as u32
    };
    if op.name == "mul24" {
        return Two(map2(move |a, b| product(a, b).into()));
    }
    if op.has("sat") {
        return Three(map3(move |a, b, c| (product(a, b) as i32).saturating_add(c as i32) as u32 as u64));
    }
    Three(map3(move |a, b, c| product(a, b).wrapping_add(c as u32).into()))
}

/// `slct.type.s32|f32 d, a, b, c`: a where c ≥ 0, else b (also for NaN).
fn slct(op: &Opcode) -> Option<Function> {
    let mask = op.types[0].mask();
    let flush = op.has("ftz");
    Some(match op.types.get(1)?.class {
        Class::Float => Three(map3(move |a, b, c| {
            let c = if flush { F32.flushed(c) } else { c };
            (if float::f32_of(c) >= 0.0 { a } else { b }) & mask
        })),
        _ => Three(map3(move |a, b, c| (if c as i32 >= 0 { a } else { b }) & mask)),
    })
}

fn rounding(op: &Opcode) -> Rounding {
    match () {
        () if op.has("rz") => Rounding::Zero,
        () if op.has("rm") => Rounding::Down,
        () if op.has("rp") => Rounding::Up,
        () => Rounding::Nearest,
    }
}

/// Applies a function of single values to each half of packed values.
fn halves1(pair: bool, f: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Function {
    if !pair {
        return One(map1(f));
    }
    One(map1(move |a| f(a & 0xffff) | f(a >> 16 & 0xffff) << 16))
}

fn halves2(pair: bool, f: impl Fn(u64, u64) -> u64 + Send + Sync + 'static) -> Function {
    if !pair {
        return Two(map2(f));
    }
    Two(map2(move |a, b| f(a & 0xffff, b & 0xffff) | f(a >> 16 & 0xffff, b >> 16 & 0xffff) << 16))
}

fn halves3(pair: bool, f: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static) -> Function {
    if !pair {
        return Three(map3(f));
    }
    Three(map3(move |a, b, c| {
        f(a & 0xffff, b & 0xffff, c & 0xffff) | f(a >> 16 & 0xffff, b >> 16 & 0xffff, c >> 16 & 0xffff) << 16
    }))
}

fn floats(op: &Opcode, ty: Type) -> Option<Function> {
    let format = format_of(ty);
    let mode = Mode {
        format,
        rounding: rounding(op),
        flush: op.has("ftz"),
        saturate: op.has("sat"),
        relu: op.has("relu"),
    };
    if format == F64 {
        return doubles(op, mode);
    }
    if mode.is_plain_f32()
        && let Some(function) = plain_f32(op)
    {
        return Some(function);
    }
    let pair = ty.pair;
    let mask = ty.mask();
    let approx = op.has("approx");
    let of = move |f: fn(f64) -> f64| halves1(pair, move |a| mode.output(f(mode.input(a))));
    Some(match op.name {
        "mov" => One(map1(move |a| a & mask)),
        "add" => halves2(pair, move |a, b| mode.output(mode.sum(mode.input(a), mode.input(b)))),
        "sub" => halves2(pair, move |a, b| mode.output(mode.sum(mode.input(a), -mode.input(b)))),
        "mul" => halves2(pair, move |a, b| mode.output(mode.input(a) * mode.input(b))),
        "fma" | "mad" => {
            // The product of two numbers of at most 24 bits is exact.
            halves3(pair, move |a, b, c| mode.output(mode.sum(mode.input(a) * mode.input(b), mode.input(c))))
        }
        "div" if approx => {
            halves2(pair, move |a, b| mode.output(float::divide_approx(mode.input(a), mode.input(b))))
        }
        "div" => halves2(pair, move |a, b| mode.output(exact::divide(mode.input(a), mode.input(b)))),
        "rcp" => of(|a| exact::divide(1.0, a)),
        "sqrt" => of(exact::root),
        "rsqrt" if approx => of(|a| 1.0 / a.sqrt()),
        "ex2" if approx => of(f64::exp2),
        "lg2" if approx => of(f64::log2),
        "sin" if approx => of(f64::sin),
        "cos" if approx => of(f64::cos),
        "tanh" if approx => of(f64::tanh),
        "neg" => halves1(pair, move |a| mode.operand(a) ^ format.sign()),
        "abs" => halves1(pair, move |a| mode.operand(a) & !format.sign()),
        "min" | "max" => {
            if op.has("xorsign") {
                return None;
            }
            let (larger, propagate) = (op.name == "max", op.has("NaN"));
            halves2(pair, move |a, b| float::extreme(mode, a, b, larger, propagate))
        }
        // The sign of a, the rest of b.
        "copysign" => Two(map2(move |a, b| a & format.sign() | b & !format.sign() & mask)),
        "slct" => slct(op)?,
        _ => return None,
    })
}

/// The common cases of f32, which the host computes as PTX does but for the NaN.
fn plain_f32(op: &Opcode) -> Option<Function> {
    use float::{f32_bits, f32_of};
    Some(match op.name {
        "add" => Two(map2(|a, b| f32_bits(f32_of(a) + f32_of(b)))),
        "sub" => Two(map2(|a, b| f32_bits(f32_of(a) - f32_of(b)))),
        "mul" => Two(map2(|a, b| f32_bits(f32_of(a) * f32_of(b)))),
        "div" if !op.has("approx") => Two(map2(|a, b| f32_bits(f32_of(a) / f32_of(b)))),
        "fma" | "mad" => Three(map3(|a, b, c| f32_bits(f32_of(a).mul_add(f32_of(b), f32_of(c))))),
        _ => return None,
    })
}

fn doubles(op: &Opcode, mode: Mode) -> Option<Function> {
    use float::f64_of;
    if mode.rounding != Rounding::Nearest || mode.saturate {
        return None;
    }
    let sign = F64.sign();
    Some(match op.name {
        "mov" => One(map1(|a| a)),
        "add" => Two(map2(|a, b| (f64_of(a) + f64_of(b)).to_bits())),
        "sub" => Two(map2(|a, b| (f64_of(a) - f64_of(b)).to_bits())),
        "mul" => Two(map2(|a, b| (f64_of(a) * f64_of(b)).to_bits())),
        "fma" | "mad" => Three(map3(|a, b, c| f64_of(a).mul_add(f64_of(b), f64_of(c)).to_bits())),
        "div" => Two(map2(|a, b| (f64_of(a) / f64_of(b)).to_bits())),
        "rcp" if !op.has("approx") => One(map1(|a| (1.0 / f64_of(a)).to_bits())),
        "sqrt" => One(map1(|a| f64_of(a).sqrt().to_bits())),
        // The seed of a Newton iteration: the low half is zero.
        "rcp" => One(map1(|a| (1.0 / f64_of(a)).to_bits() & !0xffff_ffff)),
        "rsqrt" => One(map1(|a| (1.0 / f64_of(a).sqrt()).to_bits() & !0xffff_ffff)),
        "neg" => One(map1(move |a| a ^ sign)),
        "abs" => One(map1(move |a| a & !sign)),
        "min" | "max" => {
            let larger = op.name == "max";
            Two(map2(move |a, b| float::extreme(mode, a, b, larger, false)))
        }
        "copysign" => Two(map2(move |a, b| a & sign | b & !sign)),
        "slct" => slct(op)?,
        _ => return None,
    })
}

/// `cvt.pack.sat.d.s32[.b32]`: a above b, and c's low bits above both.
fn packed_conversion(op: &Opcode) -> Option<Function> {
    let [to, from, ..] = op.types[..] else { return None };
    if from.bits != 32 || !from.is_signed() || to.is_float() || !op.has("sat") {
        return None;
    }
    let each = move |a: u64| convert::integer(a, (32, true), (to.bits, to.is_signed()), true);
    let two = move |a, b| each(a) << to.bits | each(b);
    match (op.types.len(), to.bits) {
        (2, 16) => Some(Two(map2(two))),
        (3, 2..16) => Some(Three(map3(move |a, b, c| (two(a, b) | c << (2 * to.bits)) & integer::mask(32)))),
        _ => None,
    }
}

fn conversion(op: &Opcode) -> Option<Function> {
    if op.has("pack") {
        return packed_conversion(op);
    }
    let (to, from) = match op.types[..] {
        [to, from] => (to, from),
        // `tf32` is no type of registers.
        [from] if op.has("tf32") && from.is_float() && from.bits == 32 => (from, from),
        _ => return None,
    };
    let whole = ["rni", "rzi", "rmi", "rpi"].into_iter().find(|mode| op.has(mode));
    let rounding = match whole.or(["rz", "rm", "rp", "rna"].into_iter().find(|mode| op.has(mode))) {
        None | Some("rni") => Rounding::Nearest,
        Some("rzi" | "rz") => Rounding::Zero,
        Some("rmi" | "rm") => Rounding::Down,
        Some("rna") => Rounding::Away,
        Some(_) => Rounding::Up,
    };
    let (flush, saturate) = (op.has("ftz"), op.has("sat"));
    let integer_of = |ty: Type| (ty.bits, ty.is_signed());
    if !to.is_float() && !from.is_float() {
        let (from, to) = (integer_of(from), integer_of(to));
        return Some(One(map1(move |a| convert::integer(a, from, to, saturate))));
    }
    if !to.is_float() {
        let (from, to) = (format_of(from), integer_of(to));
        return Some(One(map1(move |a| convert::float_to_integer(a, from, to, rounding, flush))));
    }
    if !from.is_float() {
        let mode = Mode { rounding, flush, saturate, ..Mode::of(format_of(to)) };
        let from = integer_of(from);
        return Some(One(map1(move |a| {
            mode.finish(convert::integer_to_float(a, from, mode.format, mode.rounding))
        })));
    }
    let each = convert::FloatToFloat {
        from: format_of(from),
        to: if op.has("tf32") { TF32 } else { format_of(to) },
        rounding,
        whole: whole.is_some(),
        flush,
        saturate,
        relu: op.has("relu"),
        finite: op.has("satfinite"),
    };
    if op.has("tf32") {
        // The upper bits of a register.
        return Some(One(map1(move |a| each.apply(a) << 13)));
    }
    if to.pair && !from.pair {
        // The first source becomes the upper half.
        return Some(Two(map2(move |a, b| each.apply(a) << 16 | each.apply(b))));
    }
    Some(One(map1(move |a| each.apply(a))))
}
