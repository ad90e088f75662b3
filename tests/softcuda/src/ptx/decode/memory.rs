//! Loads, stores, atomics, asynchronous copies and conversions of addresses.

use super::{Decoder, LOCAL_WINDOW, Opcode, PARAM_WINDOW, SHARED_WINDOW};
use crate::ptx::Error;
use crate::ptx::code::{AtomicOp, Op, Source, Space, map1, test};
use crate::ptx::syntax::{Literal, Operand, Statement};

fn space_of(op: &Opcode) -> Space {
    let named = |modifier: &&str| match *modifier {
        "global" => Some(Space::Global),
        "const" => Some(Space::Const),
        "shared" => Some(Space::Shared),
        "local" => Some(Space::Local),
        "param" | "param::entry" | "param::func" => Some(Space::Param),
        _ => None,
    };
    op.modifiers.iter().find_map(named).unwrap_or(Space::Generic)
}

/// Where a space begins among the generic addresses.
fn window(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        Space::Generic | Space::Global | Space::Const => 0,
    }
}

/// Modifiers of loads and stores: spaces, vectors, cache hints and orders that change nothing here.
fn is_access_modifier(modifier: &str) -> bool {
    matches!(
        modifier,
        "global"
            | "const"
            | "shared"
            | "local"
            | "param"
            | "param::entry"
            | "param::func"
            | "v2"
            | "v4"
            | "nc"
            | "ca"
            | "cg"
            | "cs"
            | "lu"
            | "cv"
            | "wb"
            | "wt"
            | "weak"
            | "volatile"
            | "relaxed"
            | "acquire"
            | "release"
            | "acq_rel"
            | "cta"
            | "gpu"
            | "sys"
            | "noftz"
    ) || modifier.starts_with("L1::")
        || modifier.starts_with("L2::")
}

fn atomic_op(op: &Opcode) -> Option<AtomicOp> {
    op.modifiers.iter().find_map(|modifier| {
        Some(match *modifier {
            "add" => AtomicOp::Add,
            "min" => AtomicOp::Min,
            "max" => AtomicOp::Max,
            "and" => AtomicOp::And,
            "or" => AtomicOp::Or,
            "xor" => AtomicOp::Xor,
            "exch" => AtomicOp::Exchange,
            "cas" => AtomicOp::CompareAndSwap,
            "inc" => AtomicOp::Increment,
            "dec" => AtomicOp::Decrement,
            _ => return None,
        })
    })
}

impl<'p, 'a> Decoder<'p, 'a> {
    pub(super) fn memory(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        match op.name {
            "ld" | "ldu" => self.load(op, statement),
            "st" => self.store(op, statement),
            "atom" | "red" => self.atomic(op, statement),
            "cp" if op.has("async") => self.copy_async(op, statement),
            "ldmatrix" => self.load_matrix(op, statement),
            "cvta" => self.convert_address(op, statement),
            "isspacep" => {
                op.accept(&["global", "const", "shared", "local", "param", "param::entry"]);
                let [p, a] = self.operands(statement)?;
                let space = space_of(op);
                let a = self.value(a, None)?;
                let holds = self.target_predicate(p)?;
                let base = window(space) >> 60;
                let test = test(move |a, _| a >> 60 == base);
                self.push(Op::Compare { test, holds, fails: None, with: None, ab: [a, a] });
                Ok(true)
            }
            "membar" | "fence" => {
                op.accept(&op.modifiers);
                // Within a block barriers make the order; between blocks, fences and atomics.
                self.push(if op.has("cta") { Op::Nothing } else { Op::Fence });
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn load(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let [ty] = op.types[..] else { return Ok(false) };
        if ty.bits > 64 || !op.modifiers.iter().all(|modifier| is_access_modifier(modifier)) {
            return Ok(false);
        }
        op.accept(&op.modifiers);
        let [d, address] = self.operands(statement)?;
        let parts = if let Operand::Vector(parts) = d { &parts[..] } else { std::slice::from_ref(d) };
        let mut to = Vec::new();
        for part in parts {
            to.push(self.target_or_sink(part)?.map(|(register, ty)| (register, ty.bits)));
        }
        let address = self.address(address)?;
        let used = statement.used_bytes.unwrap_or(u32::MAX);
        self.push(Op::Load { space: space_of(op), to, ty, address, used });
        Ok(true)
    }

    fn store(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let [ty] = op.types[..] else { return Ok(false) };
        if ty.bits > 64 || !op.modifiers.iter().all(|modifier| is_access_modifier(modifier)) {
            return Ok(false);
        }
        op.accept(&op.modifiers);
        let [address, source] = self.operands(statement)?;
        let parts =
            if let Operand::Vector(parts) = source { &parts[..] } else { std::slice::from_ref(source) };
        let mut from = Vec::new();
        for part in parts {
            from.push(self.value(part, Some(ty))?);
        }
        let address = self.address(address)?;
        self.push(Op::Store { space: space_of(op), from, ty, address });
        Ok(true)
    }

    fn atomic(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let ([ty], Some(kind)) = (&op.types[..], atomic_op(op)) else { return Ok(false) };
        op.accept(&["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]);
        let ty = *ty;
        if ty.bits > 64 {
            return Ok(false);
        }
        // The operation was found; spaces, scopes and orders change nothing here.
        let plain = |modifier: &&&str| is_access_modifier(modifier) && !modifier.starts_with('v');
        op.modifiers.iter().filter(plain).for_each(|modifier| op.accept(&[modifier]));
        let (d, rest) = if op.name == "red" {
            (None, &statement.operands[..])
        } else {
            let Some((d, rest)) = statement.operands.split_first() else { return self.fail("no operands") };
            (self.target_or_sink(d)?.map(|(register, _)| register), rest)
        };
        let (address, b, c) = match rest {
            [address, b] => (address, b, b),
            [address, b, c] => (address, b, c),
            _ => return self.fail("an atomic with a wrong number of operands"),
        };
        let (b, c) = (self.value(b, Some(ty))?, self.value(c, Some(ty))?);
        let address = self.address(address)?;
        if (op.has("release") || op.has("acq_rel")) && !op.has("cta") {
            self.push(Op::Fence);
        }
        self.push(Op::Atomic { space: space_of(op), op: kind, ty, d, address, b, c });
        Ok(true)
    }

    fn copy_async(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        op.accept(&op.modifiers);
        if op.has("commit_group") {
            self.push(Op::CommitCopies);
            return Ok(true);
        }
        if op.has("wait_all") {
            self.push(Op::WaitAllCopies);
            return Ok(true);
        }
        if op.has("wait_group") {
            let [Operand::Number(Literal::Int(groups))] = statement.operands[..] else {
                return self.fail("a number of groups expected");
            };
            self.push(Op::WaitCopies(groups as u32));
            return Ok(true);
        }
        let hints = |modifier: &&str| {
            matches!(*modifier, "async" | "ca" | "cg" | "shared" | "global") || modifier.starts_with("L2::")
        };
        if !op.modifiers.iter().all(hints) || !op.types.is_empty() {
            return Ok(false);
        }
        let [to, from, Operand::Number(Literal::Int(bytes)), rest @ ..] = &statement.operands[..] else {
            return self.fail("two addresses and a size expected");
        };
        let bytes = *bytes as u32;
        if !matches!(bytes, 4 | 8 | 16) || (op.has("cg") && bytes != 16) {
            return self.fail(format!("cp.async of {bytes} bytes"));
        }
        let source_bytes = match rest {
            [] => None,
            [size] => Some(self.value(size, None)?),
            _ => return Ok(false),
        };
        let (to, from) = (self.address(to)?, self.address(from)?);
        self.push(Op::CopyAsync { to, from, bytes, source_bytes });
        Ok(true)
    }

    fn load_matrix(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        if !op.has("m8n8") || op.types.first().is_none_or(|ty| ty.bits != 16) {
            return Ok(false);
        }
        op.accept(&["sync", "aligned", "shared"]);
        let [d, address] = self.operands(statement)?;
        let parts = if let Operand::Vector(parts) = d { &parts[..] } else { std::slice::from_ref(d) };
        let count =
            [("x1", 1), ("x2", 2), ("x4", 4)].into_iter().find_map(|(name, n)| op.has(name).then_some(n));
        if count != Some(parts.len()) {
            return self.fail("ldmatrix with a wrong number of registers");
        }
        let mut to = Vec::new();
        for part in parts {
            to.push(self.target(part)?.0);
        }
        let address = self.address(address)?;
        self.push(Op::LoadMatrix { to, transposed: op.has("trans"), address });
        Ok(true)
    }

    fn convert_address(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        op.accept(&["global", "const", "shared", "local", "param", "param::entry"]);
        let [d, a] = self.operands(statement)?;
        let (d, ty) = self.target(d)?;
        let a: Source = match a {
            Operand::Name(_) | Operand::Number(_) | Operand::Sum(..) => self.value(a, None)?,
            _ => return self.fail("a value expected"),
        };
        let base = window(space_of(op));
        let mask = ty.mask();
        let map = if op.has("to") {
            map1(move |a| a.wrapping_sub(base) & mask)
        } else {
            map1(move |a| a.wrapping_add(base) & mask)
        };
        self.push(Op::Map1(map, d, a));
        Ok(true)
    }
}
