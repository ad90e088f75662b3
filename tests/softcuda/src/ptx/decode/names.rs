//! Operands looked up: registers, constants, variables, addresses.

use super::*;

impl<'a> Decoder<'_, 'a> {
    pub(super) fn register_named(&self, name: &str) -> Option<(Register, Type)> {
        let split = split_number(name);
        self.scopes.iter().rev().find_map(|scope| {
            if let Some(named) = scope.registers.get(name)
                && named.count.is_none()
            {
                return Some((named.register, named.ty));
            }
            let (stem, number) = split?;
            let named = scope.registers.get(stem)?;
            (number < named.count?).then_some((named.register + number, named.ty))
        })
    }

    pub(super) fn predicate_named(&self, name: &str) -> Option<Register> {
        let split = split_number(name);
        self.scopes.iter().rev().find_map(|scope| {
            if let Some(&(register, None)) = scope.predicates.get(name) {
                return Some(register);
            }
            let (stem, number) = split?;
            let &(first, count) = scope.predicates.get(stem)?;
            (number < count?).then_some(first + number)
        })
    }

    /// A register that is written.
    pub(super) fn target(&self, operand: &Operand) -> Result<(Register, Type), Error> {
        let Operand::Name(name) = operand else { return self.fail("a register expected") };
        match self.register_named(name) {
            Some(found) => Ok(found),
            None => self.fail(format!("no register `{name}`")),
        }
    }

    /// A register that is written, or `_`.
    pub(super) fn target_or_sink(&self, operand: &Operand) -> Result<Option<(Register, Type)>, Error> {
        if *operand == Operand::Name("_") { Ok(None) } else { self.target(operand).map(Some) }
    }

    pub(super) fn target_predicate(&self, operand: &Operand) -> Result<Register, Error> {
        let Operand::Name(name) = operand else { return self.fail("a predicate expected") };
        match self.predicate_named(name) {
            Some(found) => Ok(found),
            None => self.fail(format!("no predicate `{name}`")),
        }
    }

    /// A predicate that is read.
    pub(super) fn predicate(&self, operand: &Operand) -> Result<Predicate, Error> {
        let (name, negated) = match operand {
            Operand::Name(name) => (name, false),
            Operand::Not(name) => (name, true),
            Operand::Number(Literal::Int(value)) => return Ok(Predicate { negated: *value != 0, ..FALSE }),
            _ => return self.fail("a predicate expected"),
        };
        match self.predicate_named(name) {
            Some(register) => Ok(Predicate { register, negated }),
            None => self.fail(format!("no predicate `{name}`")),
        }
    }

    pub(super) fn constant(&mut self, value: u64) -> Source {
        let next = self.constants.len() as u32;
        let index = *self.constants.entry(value).or_insert(next);
        if index == next {
            let row: Row = [value; 32];
            self.code.constants.push(row);
        }
        Source::Constant(index)
    }

    pub(super) fn symbol(&mut self, symbol: Symbol) -> Source {
        let key = match &symbol {
            Symbol::Variable(name) => name.clone(),
            Symbol::DynamicShared => String::new(),
        };
        let next = self.symbols.len() as u32;
        let index = *self.symbols.entry(key).or_insert(next);
        if index == next {
            self.code.symbols.push(symbol);
        }
        Source::Symbol(index)
    }

    /// The address of a variable within its space.
    pub(super) fn variable(&mut self, name: &'a str) -> Result<Source, Error> {
        let place = self.scopes.iter().rev().find_map(|scope| scope.variables.get(name).copied());
        let place = match place {
            Some(place) => place,
            None => match self.program.variables.get(name) {
                Some(variable) if variable.space == ".shared" => match self.shared.get(name) {
                    Some(&at) => Place::Shared(at),
                    None => {
                        let place = self.place(variable)?;
                        if let Place::Shared(at) = place {
                            self.shared.insert(name, at);
                        }
                        place
                    }
                },
                Some(_) => return Ok(self.symbol(Symbol::Variable(name.to_owned()))),
                None => return self.fail(format!("nothing is named `{name}`")),
            },
        };
        Ok(match place {
            Place::Shared(at) | Place::Local(at) | Place::Param(at) => self.constant(at.into()),
            Place::CallParam(at) => self.constant(CALL_PARAMS + u64::from(at)),
            Place::DynamicShared => self.symbol(Symbol::DynamicShared),
        })
    }

    /// A value that is read; `ty` gives a decimal number its format.
    pub(super) fn value(&mut self, operand: &Operand<'a>, ty: Option<Type>) -> Result<Source, Error> {
        match operand {
            Operand::Number(literal) => {
                let bits = self.literal(*literal, ty)?;
                Ok(self.constant(bits))
            }
            Operand::Name(name) => {
                if let Some((register, _)) = self.register_named(name) {
                    return Ok(Source::Register(register));
                }
                if let Some(special) = special(name) {
                    let d = self.fresh();
                    self.push(Op::Special(d, special));
                    return Ok(Source::Register(d));
                }
                if *name == "WARP_SZ" {
                    return Ok(self.constant(32));
                }
                self.variable(name)
            }
            Operand::Sum(name, offset) => {
                let base = self.variable(name)?;
                let d = self.fresh();
                let offset = *offset as u64;
                self.push(Op::Map1(map1(move |a| a.wrapping_add(offset)), d, base));
                Ok(Source::Register(d))
            }
            _ => self.fail("a value expected"),
        }
    }

    pub(super) fn literal(&self, literal: Literal, ty: Option<Type>) -> Result<u64, Error> {
        Ok(match (literal, ty) {
            (Literal::Int(value), _) => value,
            (Literal::F32(bits), Some(Type { class: Class::Float, bits: 64, .. })) => {
                f64::from(f32::from_bits(bits)).to_bits()
            }
            (Literal::F32(bits), _) => bits.into(),
            (Literal::F64(bits), Some(ty)) if ty.is_float() && ty.bits < 64 => {
                let format = arithmetic::format_of(ty);
                format.round(f64::from_bits(bits), crate::arith::float::Rounding::Nearest)
            }
            (Literal::F64(bits), _) => bits,
        })
    }

    pub(super) fn address(&mut self, operand: &Operand<'a>) -> Result<Address, Error> {
        let Operand::Address(base, offset) = operand else { return self.fail("an address expected") };
        let Some(name) = base else {
            let base = self.constant(0);
            return Ok(Address { base, offset: *offset, narrow: false });
        };
        if let Some((register, ty)) = self.register_named(name) {
            return Ok(Address { base: Source::Register(register), offset: *offset, narrow: ty.bits <= 32 });
        }
        let base = self.variable(name)?;
        Ok(Address { base, offset: *offset, narrow: false })
    }
}
