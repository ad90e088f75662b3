//! Statements as instructions: names looked up, calls inlined, opcodes bound to what runs them.

mod arithmetic;
mod carry;
pub(crate) use arithmetic::format_of;
mod compare;
mod memory;
mod names;
mod warp;

use std::cell::Cell;
use std::collections::HashMap;

use super::Error;
use super::code::{
    Address, Code, FALSE, Instruction, Op, Predicate, Register, Row, Source, Special, Symbol, map1,
};
use super::syntax::{Declaration, Item, Literal, Operand, Routine, Statement};
use super::types::{Class, Type};

/// An opcode taken apart.
pub struct Opcode<'a> {
    pub name: &'a str,
    /// What is neither the name nor a type.
    pub modifiers: Vec<&'a str>,
    pub types: Vec<Type>,
    /// The modifiers that something asked for, a bit each: the others are not understood.
    understood: Cell<u32>,
}

impl<'a> Opcode<'a> {
    fn new(text: &'a str) -> Opcode<'a> {
        let mut parts = text.split('.');
        let name = parts.next().unwrap_or_default();
        let (mut modifiers, mut types) = (Vec::new(), Vec::new());
        for part in parts {
            match Type::of(part) {
                Some(ty) => types.push(ty),
                None => modifiers.push(part.strip_suffix("::cta").unwrap_or(part)),
            }
        }
        Opcode { name, modifiers, types, understood: Cell::new(0) }
    }

    pub fn has(&self, modifier: &str) -> bool {
        let places = self.modifiers.iter().enumerate().filter(|(_, known)| **known == modifier);
        let mask = places.fold(0, |mask, (place, _)| mask | 1 << place);
        self.understood.set(self.understood.get() | mask);
        mask != 0
    }

    /// Takes note of modifiers that may stand there and change nothing.
    pub fn accept(&self, modifiers: &[&str]) {
        for modifier in modifiers {
            self.has(modifier);
        }
    }

    fn is_understood(&self) -> bool {
        self.understood.get() == (1 << self.modifiers.len()) - 1
    }
}

/// Where a variable lies.
#[derive(Clone, Copy, Debug)]
enum Place {
    Shared(u32),
    DynamicShared,
    Local(u32),
    /// A kernel's parameter: its offset among them.
    Param(u32),
    /// A parameter or result of an inlined call: its offset in local memory.
    CallParam(u32),
}

/// Parameters of inlined calls have addresses from here on in the parameter space.
pub const CALL_PARAMS: u64 = 1 << 31;
/// Generic addresses of the windows that are not global memory.
pub const SHARED_WINDOW: u64 = 1 << 60;
pub const LOCAL_WINDOW: u64 = 2 << 60;
pub const PARAM_WINDOW: u64 = 3 << 60;
/// Bytes of each window.
pub const WINDOW: u64 = 1 << 32;

#[derive(Clone, Copy)]
struct Named {
    register: Register,
    ty: Type,
    count: Option<u32>,
}

#[derive(Default)]
struct Scope<'a> {
    registers: HashMap<&'a str, Named>,
    /// Predicate registers: the first, and how many.
    predicates: HashMap<&'a str, (Register, Option<u32>)>,
    variables: HashMap<&'a str, Place>,
    targets: HashMap<&'a str, Vec<&'a str>>,
}

/// One routine being decoded: the kernel, or an inlined call.
struct Frame<'a> {
    labels: HashMap<&'a str, u32>,
    /// Branches to patch: instruction, which target, label.
    jumps: Vec<(usize, usize, &'a str, u32)>,
    returns: Vec<usize>,
    entry: bool,
}

pub struct Program<'p, 'a> {
    pub routines: &'p HashMap<&'a str, &'p Routine<'a>>,
    pub variables: &'p HashMap<&'a str, &'p Declaration<'a>>,
}

pub struct Decoder<'p, 'a> {
    program: Program<'p, 'a>,
    code: Code,
    shared_bytes: u32,
    scopes: Vec<Scope<'a>>,
    frames: Vec<Frame<'a>>,
    calls: Vec<&'a str>,
    constants: HashMap<u64, u32>,
    symbols: HashMap<String, u32>,
    /// The predicate register that stands for the condition code.
    condition: Option<Register>,
    /// `.shared` variables of the module that were placed.
    shared: HashMap<&'a str, u32>,
    line: u32,
    source: (u32, u32),
}

pub struct Decoded {
    pub code: Code,
    pub shared_bytes: u32,
}

/// The parameters' offsets, sizes, alignments and their bytes in all.
pub fn layout(params: &[Declaration]) -> (Vec<(u32, u32, u32)>, u32) {
    let mut end = 0;
    let places = params
        .iter()
        .map(|param| {
            let size = bytes_of(param);
            let offset = align_up(end, param.align as u32);
            end = offset + size;
            (offset, size, param.align as u32)
        })
        .collect();
    (places, end)
}

pub fn bytes_of(variable: &Declaration) -> u32 {
    (super::types::bytes_of(variable.kind).unwrap_or(0) * variable.count) as u32
}

fn align_up(at: u32, align: u32) -> u32 {
    at.next_multiple_of(align.max(1))
}

/// Splits `%r12` into `%r` and 12.
fn split_number(name: &str) -> Option<(&str, u32)> {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name[stem.len()..].parse().ok()?;
    Some((stem, number))
}

impl<'p, 'a> Decoder<'p, 'a> {
    pub fn decode(program: Program<'p, 'a>, kernel: &'p Routine<'a>) -> Result<Decoded, Error> {
        let mut decoder = Decoder {
            program,
            code: Code { predicates: 1, ..Code::default() },
            shared_bytes: 0,
            scopes: vec![Scope::default()],
            frames: Vec::new(),
            calls: Vec::new(),
            constants: HashMap::new(),
            symbols: HashMap::new(),
            condition: None,
            shared: HashMap::new(),
            line: kernel.line,
            source: (0, 0),
        };
        let (places, _) = layout(&kernel.params);
        for (param, (offset, ..)) in kernel.params.iter().zip(places) {
            decoder.scopes[0].variables.insert(param.name, Place::Param(offset));
        }
        decoder.routine(kernel)?;
        Ok(Decoded { code: decoder.code, shared_bytes: decoder.shared_bytes })
    }

    fn routine(&mut self, routine: &'p Routine<'a>) -> Result<(), Error> {
        let Some(body) = &routine.body else {
            return Err(Error::syntax(routine.line, format!("{} has no body", routine.name)));
        };
        self.frames.push(Frame {
            labels: HashMap::new(),
            jumps: Vec::new(),
            returns: Vec::new(),
            entry: routine.entry,
        });
        let depth = self.scopes.len();
        self.scopes.push(Scope::default());
        for item in body {
            self.item(item)?;
        }
        self.scopes.truncate(depth);
        let end = self.code.instructions.len() as u32;
        let Some(frame) = self.frames.pop() else { unreachable!("pushed above") };
        for (at, which, label, line) in frame.jumps {
            let Some(&target) = frame.labels.get(label) else {
                return Err(Error::syntax(line, format!("no label `{label}`")));
            };
            match &mut self.code.instructions[at].op {
                Op::Branch(to) => *to = target,
                Op::BranchIndex { targets, .. } => targets[which] = target,
                _ => unreachable!("only branches jump"),
            }
        }
        for at in frame.returns {
            self.code.instructions[at].op = Op::Branch(end);
        }
        if routine.entry {
            // Running off the end is a return.
            self.push(Op::Exit);
        }
        Ok(())
    }

    fn item(&mut self, item: &'p Item<'a>) -> Result<(), Error> {
        match item {
            Item::Label(name) => {
                let at = self.code.instructions.len() as u32;
                self.frame().labels.insert(name, at);
            }
            Item::Registers(kind, name, count) => self.declare_registers(kind, name, *count)?,
            Item::Variable(variable) => {
                let place = self.place(variable)?;
                self.scope().variables.insert(variable.name, place);
            }
            Item::Open => self.scopes.push(Scope::default()),
            Item::Close => drop(self.scopes.pop()),
            Item::Targets(name, targets) => {
                self.scope().targets.insert(name, targets.clone());
            }
            Item::Statement(statement) => self.statement(statement)?,
        }
        Ok(())
    }

    fn frame(&mut self) -> &mut Frame<'a> {
        self.frames.last_mut().expect("a routine is being decoded")
    }

    fn scope(&mut self) -> &mut Scope<'a> {
        self.scopes.last_mut().expect("the kernel's scope stays")
    }

    fn place(&mut self, variable: &Declaration<'a>) -> Result<Place, Error> {
        let (bytes, align) = (bytes_of(variable), variable.align as u32);
        match variable.space {
            ".shared" if variable.count == 0 => Ok(Place::DynamicShared),
            ".shared" => {
                let at = align_up(self.shared_bytes, align);
                self.shared_bytes = at + bytes;
                Ok(Place::Shared(at))
            }
            ".local" => Ok(Place::Local(self.local(bytes, align))),
            ".param" => Ok(Place::CallParam(self.local(bytes, align))),
            space => Err(Error::syntax(variable.line, format!("{space} variable inside a routine"))),
        }
    }

    fn local(&mut self, bytes: u32, align: u32) -> u32 {
        let at = align_up(self.code.local_bytes, align);
        self.code.local_bytes = at + bytes;
        at
    }

    fn declare_registers(&mut self, kind: &str, name: &'a str, count: Option<u32>) -> Result<(), Error> {
        let needed = count.unwrap_or(1);
        if kind == "pred" {
            let first = self.code.predicates;
            self.code.predicates += needed;
            self.scope().predicates.insert(name, (first, count));
            return Ok(());
        }
        let ty = Type::of(kind).filter(|ty| ty.bits <= 64);
        let ty = ty.ok_or_else(|| Error::syntax(self.line, format!("registers of type {kind}")))?;
        let register = self.code.registers;
        self.code.registers += needed;
        self.scope().registers.insert(name, Named { register, ty, count });
        Ok(())
    }

    fn push(&mut self, op: Op) -> usize {
        let instruction = Instruction { op, guard: None, line: self.line, source: self.source };
        self.code.instructions.push(instruction);
        self.code.instructions.len() - 1
    }

    fn fresh(&mut self) -> Register {
        self.code.registers += 1;
        self.code.registers - 1
    }

    fn fail<T>(&self, what: impl Into<String>) -> Result<T, Error> {
        Err(Error::syntax(self.line, what))
    }

    fn statement(&mut self, statement: &'p Statement<'a>) -> Result<(), Error> {
        (self.line, self.source) = (statement.line, statement.source);
        let guard = match statement.guard {
            Some((name, negated)) => {
                let operand = if negated { Operand::Not(name) } else { Operand::Name(name) };
                Some(self.predicate(&operand)?)
            }
            None => None,
        };
        let from = self.code.instructions.len();
        let op = Opcode::new(statement.opcode);
        let known = self.control(&op, statement)?
            || self.compare(&op, statement)?
            || self.memory(&op, statement)?
            || self.warp(&op, statement)?
            || self.carry(&op, statement)?
            || self.compute(&op, statement)?;
        if !known || !op.is_understood() {
            return Err(Error::Unsupported {
                line: statement.line,
                instruction: statement.opcode.to_owned(),
            });
        }
        if let Some(guard) = guard {
            for instruction in &mut self.code.instructions[from..] {
                instruction.guard = Some(guard);
            }
        }
        Ok(())
    }

    fn operands<'s, const N: usize>(
        &self,
        statement: &'s Statement<'a>,
    ) -> Result<&'s [Operand<'a>; N], Error> {
        match <&[Operand; N]>::try_from(&statement.operands[..]) {
            Ok(operands) => Ok(operands),
            Err(_) => {
                self.fail(format!("{} has {} operands, not {N}", statement.opcode, statement.operands.len()))
            }
        }
    }

    fn control(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        let line = self.line;
        match op.name {
            "bra" | "brx" | "ret" | "call" => op.accept(&["uni", "idx"]),
            _ => {}
        }
        match op.name {
            "bra" => {
                let [Operand::Name(label)] = statement.operands[..] else {
                    return self.fail("a label expected");
                };
                let at = self.push(Op::Branch(0));
                self.frame().jumps.push((at, 0, label, line));
            }
            "brx" => {
                let [index, Operand::Name(list)] = self.operands(statement)? else {
                    return self.fail("a list of labels expected");
                };
                let a = self.value(index, None)?;
                let found = self.scopes.iter().rev().find_map(|scope| scope.targets.get(list).cloned());
                let Some(labels) = found else { return self.fail(format!("no list of labels `{list}`")) };
                let at = self.push(Op::BranchIndex { a, targets: vec![0; labels.len()] });
                let jumps = labels.iter().enumerate().map(|(which, label)| (at, which, *label, line));
                let jumps: Vec<_> = jumps.collect();
                self.frame().jumps.extend(jumps);
            }
            "ret" if self.frame().entry => drop(self.push(Op::Exit)),
            "ret" => {
                let at = self.push(Op::Branch(0));
                self.frame().returns.push(at);
            }
            "exit" => drop(self.push(Op::Exit)),
            "trap" => drop(self.push(Op::Trap("trap"))),
            "brkpt" => drop(self.push(Op::Trap("brkpt"))),
            "call" => self.call(statement)?,
            "nanosleep" | "pmevent" | "prefetch" | "prefetchu" | "discard" | "applypriority" => {
                op.accept(&op.modifiers);
                self.push(Op::Nothing);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Inlines the called routine: its parameters are the caller's variables, by another name.
    fn call(&mut self, statement: &'p Statement<'a>) -> Result<(), Error> {
        let mut lists = Vec::new();
        let mut callee = None;
        for operand in &statement.operands {
            match operand {
                Operand::List(list) => lists.push(list),
                Operand::Name(name) if callee.is_none() => callee = Some(*name),
                _ => {}
            }
        }
        let Some(&routine) = callee.and_then(|name| self.program.routines.get(name)) else {
            return self.fail("calls through pointers are not run");
        };
        if routine.body.is_none() {
            let mut places = Vec::new();
            for actual in lists.into_iter().flatten() {
                let Operand::Name(name) = actual else { return self.fail("a parameter expected") };
                let place = self.scopes.iter().rev().find_map(|scope| scope.variables.get(name).copied());
                let Some(Place::CallParam(at)) = place else {
                    return self.fail(format!("no parameter `{name}`"));
                };
                places.push(at);
            }
            let op = match (routine.name, &places[..]) {
                ("vprintf", &[result, format, list]) => {
                    Op::Print { params: [format, list], result: Some(result) }
                }
                ("vprintf", &[format, list]) => Op::Print { params: [format, list], result: None },
                ("__assertfail", &[message, file, line, function, _]) => {
                    Op::Assertion([message, file, line, function])
                }
                _ => return self.fail(format!("{} is not defined here", routine.name)),
            };
            self.push(op);
            return Ok(());
        }
        if self.calls.contains(&routine.name) {
            return self.fail(format!("{} calls itself, which is not run", routine.name));
        }
        if statement.guard.is_some() {
            return self.fail("a call under a predicate is not run");
        }
        let mut formal = routine.results.iter().chain(&routine.params);
        let mut bound = Scope::default();
        for actual in lists.into_iter().flatten() {
            let (Some(formal), Operand::Name(name)) = (formal.next(), actual) else {
                return self.fail("the call's parameters are not the routine's");
            };
            let place = self.scopes.iter().rev().find_map(|scope| scope.variables.get(name).copied());
            let Some(place) = place else { return self.fail(format!("no parameter `{name}`")) };
            bound.variables.insert(formal.name, place);
        }
        // The routine sees its own names and the module's only.
        let outer = std::mem::replace(&mut self.scopes, vec![bound]);
        self.calls.push(routine.name);
        self.routine(routine)?;
        self.calls.pop();
        self.scopes = outer;
        Ok(())
    }

    fn compute(&mut self, op: &Opcode, statement: &'p Statement<'a>) -> Result<bool, Error> {
        use arithmetic::Function;
        let Some(function) = arithmetic::function(op) else { return Ok(false) };
        let ty = op.types.first().copied();
        let Some((d, sources)) = statement.operands.split_first() else { return self.fail("no operands") };
        let (d, width) = self.target(d)?;
        let mut values = Vec::new();
        for source in sources {
            values.push(self.value(source, ty)?);
        }
        let instruction = match (function, &values[..]) {
            (Function::One(f), &[a]) => Op::Map1(f, d, a),
            (Function::Two(f), &[a, b]) => Op::Map2(f, d, [a, b]),
            (Function::Three(f), &[a, b, c]) => Op::Map3(f, d, [a, b, c]),
            (Function::Four(f), &[a, b, c, e]) => Op::Map4(f, d, [a, b, c, e]),
            _ => return self.fail(format!("{} with {} sources", statement.opcode, values.len())),
        };
        self.push(instruction);
        // A conversion to less than its register is extended by its own type.
        if op.name == "cvt"
            && let Some(to) = ty
            && to.is_signed()
            && to.bits < width.bits
        {
            let mask = width.mask();
            let extend = map1(move |a| crate::arith::integer::signed(a, to.bits) as u64 & mask);
            self.push(Op::Map1(extend, d, Source::Register(d)));
        }
        Ok(true)
    }
}

fn special(name: &str) -> Option<Special> {
    let axis = |axis: &str| ["x", "y", "z"].iter().position(|name| *name == axis);
    if let Some((stem, of)) = name.split_once('.') {
        let axis = axis(of)?;
        return match stem {
            "%tid" => Some(Special::Tid(axis)),
            "%ntid" => Some(Special::Ntid(axis)),
            "%ctaid" => Some(Special::Ctaid(axis)),
            "%nctaid" => Some(Special::Nctaid(axis)),
            "%clusterid" | "%cluster_ctaid" => Some(Special::Zero),
            "%nclusterid" | "%cluster_nctaid" => Some(Special::One),
            _ => None,
        };
    }
    Some(match name {
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%nwarpid" => Special::Warps,
        "%lanemask_eq" => Special::LanesEqual,
        "%lanemask_lt" => Special::LanesBelow,
        "%lanemask_le" => Special::LanesUpTo,
        "%lanemask_gt" => Special::LanesAbove,
        "%lanemask_ge" => Special::LanesFrom,
        "%clock" | "%clock64" | "%clock_hi" | "%globaltimer" | "%globaltimer_lo" => Special::Clock,
        "%smid" | "%gridid" | "%cluster_ctarank" => Special::Zero,
        "%nsmid" | "%cluster_nctarank" => Special::One,
        "%total_smem_size" => Special::SharedBytes,
        "%dynamic_smem_size" => Special::DynamicSharedBytes,
        _ => return None,
    })
}
