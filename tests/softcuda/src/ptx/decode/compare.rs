//! Predicates: `setp`, `set`, `selp`, logic, and moves of packed values (PTX ISA 9.0, "Comparison and
//! Selection Instructions").

use super::arithmetic::format_of;
use super::{Decoder, Opcode};
use crate::arith::float::{BF16, F16, F32, F64, Format};
use crate::arith::integer;
use crate::ptx::Error;
use crate::ptx::code::{FALSE, Logic, Op, Predicate, Source, Test, map1, map2, test};
use crate::ptx::syntax::{Operand, Statement};
use crate::ptx::types::{Class, Type};

const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
    "num", "nan",
];

/// Whether an ordering satisfies a comparison; none: a NaN is compared.
fn holds(comparison: &str, order: Option<std::cmp::Ordering>) -> bool {
    let Some(order) = order else {
        return matches!(comparison, "equ" | "neu" | "ltu" | "leu" | "gtu" | "geu" | "nan");
    };
    match comparison {
        "eq" | "equ" => order.is_eq(),
        "ne" | "neu" => order.is_ne(),
        "lt" | "lo" | "ltu" => order.is_lt(),
        "le" | "ls" | "leu" => order.is_le(),
        "gt" | "hi" | "gtu" => order.is_gt(),
        "ge" | "hs" | "geu" => order.is_ge(),
        "num" => true,
        _ => false,
    }
}

/// Single comparisons of floats of the format.
fn float_test(
    comparison: &'static str,
    format: Format,
    flush: bool,
) -> impl Fn(u64, u64) -> bool + Send + Sync + Copy {
    let mask = integer::mask(format.bits());
    move |a, b| {
        let wide = |bits: u64| {
            let bits = bits & mask;
            format.widen(if flush { format.flushed(bits) } else { bits })
        };
        holds(comparison, wide(a).partial_cmp(&wide(b)))
    }
}

fn integer_test(comparison: &'static str, ty: Type) -> Test {
    let (bits, mask) = (ty.bits, ty.mask());
    if ty.is_signed() {
        let key = move |a: u64| integer::signed(a, bits);
        return match comparison {
            "eq" => test(move |a, b| key(a) == key(b)),
            "ne" => test(move |a, b| key(a) != key(b)),
            "lt" => test(move |a, b| key(a) < key(b)),
            "le" => test(move |a, b| key(a) <= key(b)),
            "gt" => test(move |a, b| key(a) > key(b)),
            _ => test(move |a, b| key(a) >= key(b)),
        };
    }
    match comparison {
        "eq" => test(move |a, b| a & mask == b & mask),
        "ne" => test(move |a, b| a & mask != b & mask),
        "lt" | "lo" => test(move |a, b| a & mask < b & mask),
        "le" | "ls" => test(move |a, b| a & mask <= b & mask),
        "gt" | "hi" => test(move |a, b| a & mask > b & mask),
        _ => test(move |a, b| a & mask >= b & mask),
    }
}

fn single_test(comparison: &'static str, ty: Type, flush: bool) -> Option<Test> {
    Some(match (ty.class, ty.bits) {
        (Class::Bf16, _) => test(float_test(comparison, BF16, flush)),
        (Class::Float, 16) => test(float_test(comparison, F16, flush)),
        (Class::Float, 32) if !ty.pair => test(float_test(comparison, F32, flush)),
        (Class::Float, 64) => test(float_test(comparison, F64, flush)),
        (Class::Float, _) => return None,
        _ => integer_test(comparison, ty),
    })
}

fn logic_of(op: &Opcode) -> Option<Logic> {
    [("and", Logic::And), ("or", Logic::Or), ("xor", Logic::Xor)]
        .into_iter()
        .find_map(|(name, logic)| op.has(name).then_some(logic))
}

impl<'p, 'a> Decoder<'p, 'a> {
    pub(super) fn compare(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        match op.name {
            "setp" => self.setp(op, statement),
            "set" => self.set(op, statement),
            "testp" => self.testp(op, statement),
            "selp" => {
                let [d, a, b, p] = self.operands(statement)?;
                let ty = op.types.first().copied();
                let op = Op::Select {
                    d: self.target(d)?.0,
                    a: self.value(a, ty)?,
                    b: self.value(b, ty)?,
                    p: self.predicate(p)?,
                };
                self.push(op);
                Ok(true)
            }
            "and" | "or" | "xor" if op.has("pred") => {
                let [d, a, b] = self.operands(statement)?;
                let logic = match op.name {
                    "and" => Logic::And,
                    "or" => Logic::Or,
                    _ => Logic::Xor,
                };
                let both = [self.predicate(a)?, self.predicate(b)?];
                let op = Op::Logic(logic, self.target_predicate(d)?, both);
                self.push(op);
                Ok(true)
            }
            "mov" | "not" if op.has("pred") => {
                let [d, a] = self.operands(statement)?;
                let a = self.predicate(a)?;
                let a = Predicate { negated: a.negated ^ (op.name == "not"), ..a };
                let op = Op::Logic(Logic::Or, self.target_predicate(d)?, [a, FALSE]);
                self.push(op);
                Ok(true)
            }
            "mov" => self.packed_move(op, statement),
            _ => Ok(false),
        }
    }

    fn setp(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let Some(comparison) = COMPARISONS.into_iter().find(|name| op.has(name)) else { return Ok(false) };
        let Some(&ty) = op.types.first() else { return Ok(false) };
        let [d, a, b, rest @ ..] = &statement.operands[..] else { return self.fail("setp without operands") };
        let a = self.value(a, Some(ty))?;
        let b = self.value(b, Some(ty))?;
        let with = match (logic_of(op), rest) {
            (Some(logic), [p]) => Some((logic, self.predicate(p)?)),
            (None, []) => None,
            _ => return self.fail("setp with a wrong number of operands"),
        };
        if ty.pair {
            return self.setp_halves(comparison, ty, op.has("ftz"), d, [a, b], with);
        }
        let Some(test) = single_test(comparison, ty, op.has("ftz")) else { return Ok(false) };
        let (holds, fails) = match d {
            Operand::Pair(pair) if pair.0 == Operand::Name("_") => {
                (None, Some(self.target_predicate(&pair.1)?))
            }
            Operand::Pair(pair) => {
                (Some(self.target_predicate(&pair.0)?), Some(self.target_predicate(&pair.1)?))
            }
            _ => (Some(self.target_predicate(d)?), None),
        };
        let holds = holds.unwrap_or_else(|| self.fresh_predicate());
        self.push(Op::Compare { test, holds, fails, with, ab: [a, b] });
        Ok(true)
    }

    pub(super) fn fresh_predicate(&mut self) -> u32 {
        self.code.predicates += 1;
        self.code.predicates - 1
    }

    /// Packed halves: the pair of predicates is the low and the high comparison.
    fn setp_halves(
        &mut self,
        comparison: &'static str,
        ty: Type,
        flush: bool,
        d: &Operand<'a>,
        ab: [Source; 2],
        with: Option<(Logic, Predicate)>,
    ) -> Result<bool, Error> {
        let Operand::Pair(pair) = d else { return self.fail("two predicates expected") };
        let each = float_test(comparison, format_of(ty), flush);
        let (low, high) = (self.target_predicate(&pair.0)?, self.target_predicate(&pair.1)?);
        self.push(Op::Compare { test: test(each), holds: low, fails: None, with, ab });
        let upper = test(move |a, b| each(a >> 16, b >> 16));
        self.push(Op::Compare { test: upper, holds: high, fails: None, with, ab });
        Ok(true)
    }

    /// `set.cmp.dtype.stype d, a, b`: all ones, or 1.0 for float results, where it holds.
    fn set(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let Some(comparison) = COMPARISONS.into_iter().find(|name| op.has(name)) else { return Ok(false) };
        let [to, from] = op.types[..] else { return Ok(false) };
        if logic_of(op).is_some() {
            return Ok(false);
        }
        let [d, a, b] = self.operands(statement)?;
        let (d, _) = self.target(d)?;
        let (a, b) = (self.value(a, Some(from))?, self.value(b, Some(from))?);
        let one = if to.is_float() {
            format_of(to).round(1.0, crate::arith::float::Rounding::Nearest)
        } else {
            to.mask()
        };
        let flush = op.has("ftz");
        if from.pair {
            let each = float_test(comparison, format_of(from), flush);
            let one = if to.pair { one } else { 0xffff };
            let map = map2(move |a, b| {
                let low = if each(a, b) { one } else { 0 };
                let high = if each(a >> 16, b >> 16) { one } else { 0 };
                low | high << 16
            });
            self.push(Op::Map2(map, d, [a, b]));
            return Ok(true);
        }
        let map = if from.is_float() {
            let each = float_test(comparison, format_of(from), flush);
            map2(move |a, b| if each(a, b) { one } else { 0 })
        } else {
            let whole = integer_test(comparison, from);
            map2(move |a, b| if whole(&[a; 32], &[b; 32]) & 1 == 1 { one } else { 0 })
        };
        self.push(Op::Map2(map, d, [a, b]));
        Ok(true)
    }

    fn testp(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let Some(&ty) = op.types.first() else { return Ok(false) };
        op.accept(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"]);
        let [d, a] = self.operands(statement)?;
        let format = format_of(ty);
        let magnitude = move |a: u64| a & integer::mask(format.bits()) & !format.sign();
        let infinity = format.infinity();
        let normal = 1u64 << format.mantissa;
        let test = match op.modifiers.first() {
            Some(&"finite") => test(move |a, _| magnitude(a) < infinity),
            Some(&"infinite") => test(move |a, _| magnitude(a) == infinity),
            Some(&"number") => test(move |a, _| magnitude(a) <= infinity),
            Some(&"notanumber") => test(move |a, _| magnitude(a) > infinity),
            Some(&"normal") => test(move |a, _| (normal..infinity).contains(&magnitude(a))),
            Some(&"subnormal") => test(move |a, _| (1..normal).contains(&magnitude(a))),
            _ => return Ok(false),
        };
        let holds = self.target_predicate(d)?;
        let a = self.value(a, Some(ty))?;
        self.push(Op::Compare { test, holds, fails: None, with: None, ab: [a, a] });
        Ok(true)
    }

    /// `mov` between a register and the parts of a vector; others are plain arithmetic.
    fn packed_move(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let Some(&ty) = op.types.first() else { return Ok(false) };
        let [d, a] = self.operands(statement)?;
        match (d, a) {
            (Operand::Vector(parts), a) if !matches!(a, Operand::Vector(_)) => {
                let a = self.value(a, None)?;
                let bits = ty.bits / parts.len() as u32;
                let parts = parts
                    .iter()
                    .map(|part| Ok(self.target_or_sink(part)?.map(|(register, _)| register)))
                    .collect::<Result<_, Error>>()?;
                self.push(Op::Unpack { parts, a, bits });
                Ok(true)
            }
            (d, Operand::Vector(parts)) => {
                let (d, _) = self.target(d)?;
                let bits = ty.bits / parts.len() as u32;
                let parts = parts.iter().map(|part| self.value(part, None)).collect::<Result<_, Error>>()?;
                self.push(Op::Pack { d, parts, bits });
                Ok(true)
            }
            _ => {
                let Ok((d, _)) = self.target(d) else { return Ok(false) };
                let a = self.value(a, Some(ty))?;
                let mask = ty.mask();
                self.push(Op::Map1(map1(move |a| a & mask), d, a));
                Ok(true)
            }
        }
    }
}
