//! Integers of more than one register: `add.cc`, `addc`, `sub.cc`, `subc`, `mad.cc`, `madc` (PTX ISA 9.0,
//! "Extended-Precision Integer Arithmetic Instructions").

use super::{Decoder, Opcode};
use crate::arith::integer;
use crate::ptx::Error;
use crate::ptx::code::{Op, Source, map2};
use crate::ptx::syntax::Statement;

impl<'p, 'a> Decoder<'p, 'a> {
    pub(super) fn carry(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let reads = matches!(op.name, "addc" | "subc" | "madc");
        let stem = if reads { &op.name[..3] } else { op.name };
        if !matches!(stem, "add" | "sub" | "mad") || !reads && !op.has("cc") {
            return Ok(false);
        }
        let [ty] = op.types[..] else { return Ok(false) };
        if ty.is_float() || ty.bits < 32 {
            return Ok(false);
        }
        let condition = match self.condition {
            Some(register) => register,
            None => self.fresh_predicate(),
        };
        self.condition = Some(condition);
        let (d, a, b) = if stem == "mad" {
            let [d, a, b, c] = self.operands(statement)?;
            let high = op.has("hi");
            if !high && !op.has("lo") {
                return Ok(false);
            }
            let down = if high { ty.bits } else { 0 };
            let (bits, is_signed, mask) = (ty.bits, ty.is_signed(), ty.mask());
            let map = map2(move |a, b| (integer::product(a, b, bits, is_signed) >> down) as u64 & mask);
            let (a, b, c) = (self.value(a, None)?, self.value(b, None)?, self.value(c, None)?);
            let product = self.fresh();
            self.push(Op::Map2(map, product, [a, b]));
            (self.target(d)?.0, Source::Register(product), c)
        } else {
            let [d, a, b] = self.operands(statement)?;
            (self.target(d)?.0, self.value(a, None)?, self.value(b, None)?)
        };
        self.push(Op::Carry {
            d,
            ab: [a, b],
            subtract: stem == "sub",
            bits: ty.bits,
            reads: reads.then_some(condition),
            writes: op.has("cc").then_some(condition),
        });
        Ok(true)
    }
}
