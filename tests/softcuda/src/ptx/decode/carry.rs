//! Sums that pass a carry on: `add.cc`, `addc`, `sub.cc`, `subc`, `mad.cc`, `madc` (PTX ISA 9.0,
//! "Extended-Precision Integer Arithmetic Instructions").

use super::{Decoder, Opcode};
use crate::arith::integer;
use crate::ptx::Error;
use crate::ptx::code::{Op, Register, Source, map1, map4};
use crate::ptx::parse::Statement;

/// What is added up, before it is cut to the instruction's width: beyond that width is the carry.
fn whole(name: &str, high: bool) -> Option<fn(u64, u64, u64, Width) -> i128> {
    Some(match name {
        "add" | "addc" => |a, b, _, w| w.unsigned(a) + w.unsigned(b),
        "sub" | "subc" => |a, b, _, w| w.unsigned(a) - w.unsigned(b),
        "mad" | "madc" if high => |a, b, c, w| {
            w.unsigned((integer::product(a, b, w.bits, w.is_signed) >> w.bits) as u64) + w.unsigned(c)
        },
        "mad" | "madc" => {
            |a, b, c, w| w.unsigned(integer::product(a, b, w.bits, w.is_signed) as u64) + w.unsigned(c)
        }
        _ => return None,
    })
}

#[derive(Clone, Copy)]
struct Width {
    bits: u32,
    is_signed: bool,
}

impl Width {
    fn unsigned(self, value: u64) -> i128 {
        (value & integer::mask(self.bits)).into()
    }
}

impl<'p, 'a> Decoder<'p, 'a> {
    /// The register whose 1 or 0 is the condition code's carry.
    fn carry_register(&mut self) -> Register {
        if let Some(register) = self.carry {
            return register;
        }
        let register = self.fresh();
        self.carry = Some(register);
        register
    }

    pub(super) fn carries(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let takes = matches!(op.name, "addc" | "subc" | "madc");
        if !takes && !(matches!(op.name, "add" | "sub" | "mad") && op.has("cc")) {
            return Ok(false);
        }
        let [ty] = op.types[..] else { return Ok(false) };
        let width = Width { bits: ty.bits, is_signed: ty.is_signed() };
        let Some(whole) = whole(op.name, op.has("hi")) else { return Ok(false) };
        let (d, a, b, c) = match &statement.operands[..] {
            [d, a, b] => (d, a, b, None),
            [d, a, b, c] => (d, a, b, Some(c)),
            _ => return self.fail(format!("{} with a wrong number of operands", statement.opcode)),
        };
        let (d, _) = self.target(d)?;
        let (a, b) = (self.value(a, Some(ty))?, self.value(b, Some(ty))?);
        let c = match c {
            Some(c) => self.value(c, Some(ty))?,
            None => self.constant(0),
        };
        let carry = self.carry_register();
        let taken = if takes { Source::Register(carry) } else { self.constant(0) };
        let borrows = matches!(op.name, "sub" | "subc");
        let sum = move |a, b, c, carry: u64| {
            let carry = i128::from(carry);
            whole(a, b, c, width) + if borrows { -carry } else { carry }
        };
        // The carry first, into a register of its own: d may be one of the sources.
        let new = self.fresh();
        if op.has("cc") {
            let beyond = map4(move |a, b, c, carry| u64::from(sum(a, b, c, carry) >> width.bits != 0));
            self.push(Op::Map4(beyond, new, [a, b, c, taken]));
        }
        let mask = ty.mask();
        self.push(Op::Map4(
            map4(move |a, b, c, carry| sum(a, b, c, carry) as u64 & mask),
            d,
            [a, b, c, taken],
        ));
        if op.has("cc") {
            self.push(Op::Map1(map1(|a| a), carry, Source::Register(new)));
        }
        Ok(true)
    }
}
