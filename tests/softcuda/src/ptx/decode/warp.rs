//! What lanes and warps do together: shuffles, votes, barriers, matrix products.

use super::arithmetic::format_of;
use super::{Decoder, Opcode};
use crate::arith::float::F16;
use crate::ptx::Error;
use crate::ptx::code::{
    BarrierKind, BarrierReduction, Element, Mma, Op, ReduceOp, Register, ShuffleMode, Source, VoteMode,
};
use crate::ptx::syntax::{Operand, Statement};
use crate::ptx::types::{Class, Type};

impl<'p, 'a> Decoder<'p, 'a> {
    pub(super) fn warp(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        if matches!(op.name, "shfl" | "vote" | "match" | "redux" | "bar" | "barrier" | "mma") {
            op.accept(&["sync", "aligned", "cta", "pred"]);
        }
        match op.name {
            "shfl" if op.has("sync") => self.shuffle(op, statement),
            "vote" if op.has("sync") => self.vote(op, statement),
            "match" if op.has("sync") => self.match_lanes(op, statement),
            "redux" if op.has("sync") => self.reduce(op, statement),
            "activemask" => {
                let [d] = self.operands(statement)?;
                let (d, _) = self.target(d)?;
                self.push(Op::ActiveMask(d));
                Ok(true)
            }
            "bar" | "barrier" if op.has("warp") => {
                let [members] = self.operands(statement)?;
                let members = self.value(members, None)?;
                self.push(Op::WarpBarrier { members });
                Ok(true)
            }
            "bar" | "barrier" => self.barrier(op, statement),
            "mma" if op.has("sync") => self.mma(op, statement),
            _ => Ok(false),
        }
    }

    /// A target and, after `|`, a predicate.
    fn pair(&self, operand: &Operand<'a>) -> Result<(Register, Option<Register>), Error> {
        match operand {
            Operand::Pair(pair) => Ok((self.target(&pair.0)?.0, Some(self.target_predicate(&pair.1)?))),
            single => Ok((self.target(single)?.0, None)),
        }
    }

    fn shuffle(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let mode = match () {
            () if op.has("up") => ShuffleMode::Up,
            () if op.has("down") => ShuffleMode::Down,
            () if op.has("bfly") => ShuffleMode::Butterfly,
            () if op.has("idx") => ShuffleMode::Index,
            () => return Ok(false),
        };
        let [d, a, b, c, members] = self.operands(statement)?;
        let (d, valid) = self.pair(d)?;
        let [a, b] = [self.value(a, None)?, self.value(b, None)?];
        let [c, members] = [self.value(c, None)?, self.value(members, None)?];
        self.push(Op::Shuffle { mode, d, valid, a, b, c, members });
        Ok(true)
    }

    fn vote(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let [d, p, members] = self.operands(statement)?;
        let p = self.predicate(p)?;
        let members = self.value(members, None)?;
        let (mode, d) = match () {
            () if op.has("ballot") => (VoteMode::Ballot, self.target(d)?.0),
            () if op.has("all") => (VoteMode::All, self.target_predicate(d)?),
            () if op.has("any") => (VoteMode::Any, self.target_predicate(d)?),
            () if op.has("uni") => (VoteMode::Uniform, self.target_predicate(d)?),
            () => return Ok(false),
        };
        self.push(Op::Vote { mode, d, p, members });
        Ok(true)
    }

    fn match_lanes(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let Some(&Type { bits, .. }) = op.types.first() else { return Ok(false) };
        op.accept(&["any"]);
        let [d, a, members] = self.operands(statement)?;
        let (d, agree) = self.pair(d)?;
        let [a, members] = [self.value(a, None)?, self.value(members, None)?];
        self.push(Op::Match { d, all: op.has("all"), agree, a, bits, members });
        Ok(true)
    }

    fn reduce(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let Some(&ty) = op.types.first() else { return Ok(false) };
        let kind = match () {
            () if ty.is_float() => return Ok(false),
            () if op.has("add") => ReduceOp::Add,
            () if op.has("min") => ReduceOp::Min,
            () if op.has("max") => ReduceOp::Max,
            () if op.has("and") => ReduceOp::And,
            () if op.has("or") => ReduceOp::Or,
            () if op.has("xor") => ReduceOp::Xor,
            () => return Ok(false),
        };
        let [d, a, members] = self.operands(statement)?;
        let (d, _) = self.target(d)?;
        let [a, members] = [self.value(a, None)?, self.value(members, None)?];
        self.push(Op::Reduce { op: kind, signed: ty.is_signed(), d, a, members });
        Ok(true)
    }

    /// `bar.sync a{, b}`, `bar.arrive a, b`, `bar.red.op d, a{, b}, p`, and the same of `barrier`.
    fn barrier(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let mut operands = &statement.operands[..];
        let mut reduce = None;
        let kind = match () {
            () if op.has("sync") => BarrierKind::Sync,
            () if op.has("arrive") => BarrierKind::Arrive,
            () if op.has("red") => {
                let [d, rest @ .., p] = operands else { return self.fail("bar.red without operands") };
                operands = rest;
                let result = match () {
                    () if op.has("popc") => BarrierReduction::Count(self.target(d)?.0),
                    () if op.has("and") => BarrierReduction::And(self.target_predicate(d)?),
                    () if op.has("or") => BarrierReduction::Or(self.target_predicate(d)?),
                    () => return Ok(false),
                };
                reduce = Some((result, self.predicate(p)?));
                BarrierKind::Sync
            }
            () => return Ok(false),
        };
        let (id, threads) = match operands {
            [id] => (self.value(id, None)?, None),
            [id, threads] => (self.value(id, None)?, Some(self.value(threads, None)?)),
            _ => return self.fail("a barrier with a wrong number of operands"),
        };
        if kind == BarrierKind::Arrive && threads.is_none() {
            return self.fail("bar.arrive without a number of threads");
        }
        self.push(Op::Barrier { kind, id, threads, reduce });
        Ok(true)
    }

    fn mma(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let shapes = [("m16n8k4", 4), ("m16n8k8", 8), ("m16n8k16", 16), ("m16n8k32", 32)];
        let Some((shape, depth)) = shapes.into_iter().find(|(name, _)| op.has(name)) else {
            return Ok(false);
        };
        // The 19-bit floats are no type of registers.
        let (sums, element) = match op.types[..] {
            [d, c] if d == c && op.has("tf32") => (d, Element::Tf32),
            [d, a, b, c] if d == c && a.bits == 8 && b.bits == 8 => {
                (d, Element::Bytes { a_signed: a.is_signed(), b_signed: b.is_signed() })
            }
            [d, a, b, c] if d == c && a == b && a.bits == 16 && a.is_float() => {
                (d, Element::Float(format_of(a)))
            }
            _ => return Ok(false),
        };
        let per = element.per_register();
        let narrow = sums.bits == 16;
        let fits = match element {
            Element::Float(format) => {
                sums.class == Class::Float && (sums.bits == 32 || narrow && format == F16)
            }
            Element::Tf32 => sums.class == Class::Float && sums.bits == 32,
            Element::Bytes { .. } => sums.is_signed() && sums.bits == 32,
        };
        // A lane has a quarter of each row; a has two halves of rows.
        let k = depth / (4 * per);
        if !fits || !(1..=2).contains(&k) || !op.has("row") || !op.has("col") {
            return Ok(false);
        }
        let [d, a, b, c] = self.operands(statement)?;
        let parts = |operand: &'p Operand<'a>| match operand {
            Operand::Vector(parts) => &parts[..],
            single => std::slice::from_ref(single),
        };
        let results = if narrow { 2 } else { 4 };
        let counts = [parts(d).len(), parts(a).len(), parts(b).len(), parts(c).len()];
        if counts != [results, 2 * k, k, results] {
            return self.fail("mma with a wrong number of registers");
        }
        let mut targets = Vec::new();
        for part in parts(d) {
            targets.push(self.target(part)?.0);
        }
        let mut values = |operand: &'p Operand<'a>| {
            let values = parts(operand).iter().map(|part| self.value(part, Some(sums)));
            values.collect::<Result<Vec<Source>, Error>>()
        };
        let (a, b, c) = (values(a)?, values(b)?, values(c)?);
        self.push(Op::Mma(Box::new(Mma { shape, element, narrow, d: targets, a, b, c })));
        Ok(true)
    }
}
