//! A warp: 32 lanes, in groups that are at the same instruction.
//!
//! The group with the lowest instruction runs, so lanes that parted meet again where their paths do. A group
//! at an instruction that needs lanes of another group waits for them.

use super::block::{Arrival, Shared};
use super::{Fault, Grid, Problem};
use crate::counters::Counts;
use crate::memory::DeviceMemory;
use crate::ptx::code::{
    BarrierKind, BarrierReduction, Instruction, LANES, Logic, Op, Predicate, Register, Row, Source, Special,
};

pub const ALL: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Group {
    at: u32,
    lanes: u32,
    /// Waits for other lanes to come to its instruction.
    blocked: bool,
}

/// A `cp.async` of one lane that has not been waited for.
pub struct Copy {
    pub lane: usize,
    pub to: usize,
    pub bytes: usize,
    pub data: [u8; 16],
    /// Number of its group among the lane's; none: not committed.
    pub group: Option<u32>,
}

pub struct Warp {
    pub number: u32,
    /// Lanes that exist.
    pub lanes: u32,
    pub threads: u32,
    pub registers: Vec<Row>,
    /// By predicate register: a bit for each lane.
    pub predicates: Vec<u32>,
    /// Local memory, lane after lane.
    pub local: Vec<u8>,
    pub copies: Vec<Copy>,
    /// By lane: groups of copies that were committed.
    pub committed: [u32; LANES],
    /// By warp of the block: the time before which its accesses are ordered before this warp's.
    pub seen: Vec<u32>,
    /// The barrier it waits at.
    pub waits: Option<usize>,
    pub reduction: Option<BarrierReduction>,
    groups: Vec<Group>,
}

/// Why a warp stops running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    Turn,
    Barrier,
    Done,
}

/// What becomes of a group after an instruction.
pub enum Next {
    Step,
    /// Lanes that go elsewhere, and where to.
    Jump(u32, u32),
    /// Lanes that end.
    Exit(u32),
    /// Lanes that go each their way.
    Scatter(Vec<(u32, u32)>),
    /// The instruction needs lanes of other groups.
    Wait(&'static str),
    Barrier,
}

impl Warp {
    pub fn new(grid: &Grid, number: u32, threads: u32) -> Warp {
        let code = &grid.kernel.code;
        let own = (threads - number * LANES as u32).min(LANES as u32);
        Warp {
            number,
            lanes: if own == 32 { ALL } else { (1 << own) - 1 },
            threads: own,
            registers: vec![[0; LANES]; code.registers as usize],
            predicates: vec![0; code.predicates as usize],
            local: vec![0; code.local_bytes as usize * LANES],
            copies: Vec::new(),
            committed: [0; LANES],
            seen: Vec::new(),
            waits: None,
            reduction: None,
            groups: Vec::new(),
        }
    }

    /// As at the start of a block of so many warps.
    pub fn reset(&mut self, warps: usize) {
        self.copies.clear();
        self.committed = [0; LANES];
        self.seen.clear();
        self.seen.resize(warps, 0);
        self.waits = None;
        self.groups = vec![Group { at: 0, lanes: self.lanes, blocked: false }];
    }

    pub fn is_done(&self) -> bool {
        self.groups.is_empty()
    }

    /// Lanes that have not ended and are not in the running group.
    fn waiting(&self) -> u32 {
        self.groups.iter().fold(0, |all, group| all | group.lanes)
    }

    /// Instruction, block, thread: where its first group is.
    pub fn place(&self, block: u32) -> (usize, u32, u32) {
        let group = self.groups.first();
        let lane = group.map_or(0, |group| group.lanes.trailing_zeros());
        (group.map_or(0, |group| group.at as usize), block, self.number * LANES as u32 + lane)
    }

    pub fn put(&mut self, d: Register, lanes: u32, row: &Row) {
        let to = &mut self.registers[d as usize];
        if lanes == ALL {
            *to = *row;
            return;
        }
        for lane in 0..LANES {
            if lanes >> lane & 1 == 1 {
                to[lane] = row[lane];
            }
        }
    }

    pub fn put_predicate(&mut self, d: Register, lanes: u32, mask: u32) {
        let to = &mut self.predicates[d as usize];
        *to = *to & !lanes | mask & lanes;
    }

    pub fn holds(&self, predicate: Predicate) -> u32 {
        let mask = self.predicates[predicate.register as usize];
        if predicate.negated { !mask } else { mask }
    }

    /// Takes the group that runs next: of those not blocked the one with the lowest instruction, joined with
    /// all that are there.
    fn next_group(&mut self) -> Option<Group> {
        let lowest = self.groups.iter().filter(|group| !group.blocked).map(|group| group.at).min()?;
        let mut lanes = 0;
        self.groups.retain(|group| {
            let here = group.at == lowest;
            if here {
                lanes |= group.lanes;
            }
            !here
        });
        Some(Group { at: lowest, lanes, blocked: false })
    }

    /// The instruction before which the group at `at` must look for others.
    fn horizon(&self, at: u32) -> u32 {
        self.groups
            .iter()
            .filter(|group| !group.blocked || group.at > at)
            .map(|group| group.at)
            .min()
            .unwrap_or(ALL)
    }
}

pub struct Runner<'r, 'g> {
    pub grid: &'r Grid<'g>,
    pub block: u32,
    pub shared: &'r mut Shared,
    pub memory: &'r mut DeviceMemory,
    pub counts: &'r mut Counts,
    pub warp: &'r mut Warp,
}

/// A problem and the lane that has it.
pub type Outcome<T> = Result<T, (Problem, usize)>;

impl<'r, 'g> Runner<'r, 'g> {
    /// Runs until a barrier, the end, or `limit` instructions; also how many it ran.
    pub fn run(&mut self, limit: u64) -> Result<(Pause, u64), Fault> {
        let grid = self.grid;
        let code = &grid.kernel.code.instructions[..];
        let mut left = limit;
        let mut lanes_run = 0;
        let mut missing = "";
        let mut pause = Pause::Done;
        'groups: while let Some(mut group) = self.warp.next_group() {
            let mut horizon = self.warp.horizon(group.at);
            loop {
                if left == 0 {
                    self.warp.groups.push(group);
                    pause = Pause::Turn;
                    break 'groups;
                }
                let instruction = &code[group.at as usize];
                let lanes = match instruction.guard {
                    None => group.lanes,
                    Some(guard) => group.lanes & self.warp.holds(guard),
                };
                left -= 1;
                lanes_run += u64::from(lanes.count_ones());
                let next = self.step(instruction, group, lanes);
                let next = next.map_err(|(problem, lane)| {
                    let thread = self.warp.number * LANES as u32 + lane as u32;
                    grid.fault(problem, Some((group.at as usize, self.block, thread)))
                })?;
                match next {
                    Next::Step => group.at += 1,
                    Next::Jump(lanes, target) if lanes == group.lanes => group.at = target,
                    Next::Jump(0, _) => group.at += 1,
                    Next::Jump(lanes, target) => {
                        self.warp.groups.push(Group { at: target, lanes, blocked: false });
                        self.warp.groups.push(Group {
                            at: group.at + 1,
                            lanes: group.lanes & !lanes,
                            blocked: false,
                        });
                        break;
                    }
                    Next::Exit(lanes) => {
                        // Nobody waits for lanes that ended.
                        self.warp.groups.iter_mut().for_each(|group| group.blocked = false);
                        let lanes = group.lanes & !lanes;
                        if lanes != 0 {
                            self.warp.groups.push(Group { at: group.at + 1, lanes, blocked: false });
                        }
                        break;
                    }
                    Next::Scatter(parts) => {
                        let parts = parts.into_iter();
                        self.warp.groups.extend(parts.map(|(lanes, at)| Group { at, lanes, blocked: false }));
                        break;
                    }
                    Next::Wait(what) => {
                        missing = what;
                        left += 1;
                        lanes_run -= u64::from(lanes.count_ones());
                        self.warp.groups.push(Group { blocked: true, ..group });
                        break;
                    }
                    Next::Barrier => {
                        self.warp.groups.push(Group { at: group.at + 1, ..group });
                        pause = Pause::Barrier;
                        break 'groups;
                    }
                }
                if group.at >= horizon {
                    if self.warp.groups.iter().any(|other| other.at == group.at || !other.blocked) {
                        self.warp.groups.push(group);
                        break;
                    }
                    horizon = self.warp.horizon(group.at);
                }
            }
        }
        self.counts.warp_instructions += limit - left;
        self.counts.lane_instructions += lanes_run;
        if pause == Pause::Done && !self.warp.is_done() {
            let place = self.warp.place(self.block);
            let arrived = self.warp.groups[0].lanes;
            let problem =
                Problem::DivergentBarrier { what: missing, arrived, missing: self.warp.waiting() & !arrived };
            return Err(grid.fault(problem, Some(place)));
        }
        Ok((pause, limit - left))
    }

    pub fn row(&self, source: Source) -> &Row {
        match source {
            Source::Register(register) => &self.warp.registers[register as usize],
            Source::Constant(index) => &self.grid.kernel.code.constants[index as usize],
            Source::Symbol(index) => &self.grid.symbols[index as usize],
        }
    }

    /// Whether all 32 lanes are in the group; if not, others may still come.
    ///
    /// # Errors
    /// Lanes that ended, or never were.
    fn all_lanes(&self, lanes: u32, what: &'static str) -> Outcome<bool> {
        let live = self.live(lanes);
        if live != ALL {
            let problem = Problem::DivergentBarrier { what, arrived: lanes, missing: !lanes };
            return Err((problem, lanes.trailing_zeros() as usize));
        }
        Ok(lanes == ALL)
    }

    /// Lanes that have not ended, those of the running group among them.
    pub fn live(&self, group: u32) -> u32 {
        self.warp.waiting() | group
    }

    fn step(&mut self, instruction: &'r Instruction, group: Group, lanes: u32) -> Outcome<Next> {
        if lanes == 0 {
            return Ok(Next::Step);
        }
        match &instruction.op {
            Op::Nothing | Op::Fence => {}
            Op::Map1(f, d, a) => {
                let row = f(self.row(*a));
                self.warp.put(*d, lanes, &row);
            }
            Op::Map2(f, d, [a, b]) => {
                let row = f(self.row(*a), self.row(*b));
                self.warp.put(*d, lanes, &row);
            }
            Op::Map3(f, d, [a, b, c]) => {
                let row = f(self.row(*a), self.row(*b), self.row(*c));
                self.warp.put(*d, lanes, &row);
            }
            Op::Map4(f, d, [a, b, c, e]) => {
                let row = f(self.row(*a), self.row(*b), self.row(*c), self.row(*e));
                self.warp.put(*d, lanes, &row);
            }
            Op::Compare { test, holds, fails, with, ab: [a, b] } => {
                let result = test(self.row(*a), self.row(*b));
                let combine = |result: u32| match with {
                    None => result,
                    Some((logic, p)) => combined(*logic, result, self.warp.holds(*p)),
                };
                let (holding, failing) = (combine(result), combine(!result));
                self.warp.put_predicate(*holds, lanes, holding);
                if let Some(fails) = fails {
                    self.warp.put_predicate(*fails, lanes, failing);
                }
            }
            Op::Select { d, a, b, p } => {
                let mask = self.warp.holds(*p);
                let (a, b) = (self.row(*a), self.row(*b));
                let row = std::array::from_fn(|lane| if mask >> lane & 1 == 1 { a[lane] } else { b[lane] });
                self.warp.put(*d, lanes, &row);
            }
            Op::Logic(logic, d, [a, b]) => {
                let mask = combined(*logic, self.warp.holds(*a), self.warp.holds(*b));
                self.warp.put_predicate(*d, lanes, mask);
            }
            Op::Special(d, special) => {
                let row = self.special(*special);
                self.warp.put(*d, lanes, &row);
            }
            Op::Pack { d, parts, bits } => {
                let mask = crate::arith::integer::mask(*bits);
                let mut row = [0; LANES];
                for (place, part) in parts.iter().enumerate() {
                    let part = self.row(*part);
                    for lane in 0..LANES {
                        row[lane] |= (part[lane] & mask) << (place as u32 * bits);
                    }
                }
                self.warp.put(*d, lanes, &row);
            }
            Op::Unpack { parts, a, bits } => {
                let mask = crate::arith::integer::mask(*bits);
                let a = *self.row(*a);
                for (place, part) in parts.iter().enumerate() {
                    if let Some(d) = part {
                        let row = a.map(|a| a >> (place as u32 * bits) & mask);
                        self.warp.put(*d, lanes, &row);
                    }
                }
            }
            Op::Load { space, to, ty, address, used } => self.load(*space, to, *ty, address, *used, lanes)?,
            Op::Store { space, from, ty, address } => self.store(*space, from, *ty, address, lanes)?,
            Op::Atomic { space, op, ty, d, address, b, c } => {
                self.atomic(*space, *op, *ty, *d, address, [*b, *c], lanes)?;
            }
            Op::CopyAsync { to, from, bytes, source_bytes } => {
                self.copy_async(to, from, *bytes, *source_bytes, lanes)?;
            }
            Op::CommitCopies => self.commit_copies(lanes),
            Op::WaitCopies(newest) => self.finish_copies(lanes, Some(*newest)),
            Op::WaitAllCopies => self.finish_copies(lanes, None),
            Op::LoadMatrix { to, transposed, address } => {
                if !self.all_lanes(lanes, "ldmatrix")? {
                    return Ok(Next::Wait("ldmatrix"));
                }
                self.load_matrix(to, *transposed, address, lanes)?;
            }
            Op::Mma(mma) => {
                if !self.all_lanes(lanes, "mma")? {
                    return Ok(Next::Wait("mma"));
                }
                self.mma(mma);
            }
            Op::Shuffle { mode, d, valid, a, b, c, members } => {
                return self.shuffle(*mode, (*d, *valid), [*a, *b, *c], *members, lanes);
            }
            Op::Vote { mode, d, p, members } => return self.vote(*mode, *d, *p, *members, lanes),
            Op::Match { d, all, agree, a, bits, members } => {
                return self.match_lanes((*d, *agree), *all, *a, *bits, *members, lanes);
            }
            Op::Reduce { op, signed, d, a, members } => {
                return self.reduce(*op, *signed, *d, *a, *members, lanes);
            }
            Op::ActiveMask(d) => self.warp.put(*d, lanes, &[lanes.into(); LANES]),
            Op::Barrier { kind, id, threads, reduce } => {
                if self.live(group.lanes) != lanes {
                    return Ok(Next::Wait("barrier"));
                }
                let lane = lanes.trailing_zeros() as usize;
                let barrier = self.row(*id)[lane] as usize;
                let needed = threads.map(|threads| self.row(threads)[lane] as u32);
                let holds = reduce.map_or(0, |(_, p)| (self.warp.holds(p) & lanes).count_ones());
                let waits = *kind == BarrierKind::Sync;
                self.counts.barriers += 1;
                let arrival = Arrival {
                    barrier,
                    warp: self.warp.number,
                    // Barriers count whole warps (PTX ISA, "bar"); a reduction counts threads.
                    threads: if needed.is_some() { LANES as u32 } else { self.warp.threads },
                    waits,
                    needed,
                    seen: &mut self.warp.seen,
                    holds,
                };
                self.shared.arrive(arrival).map_err(|problem| (problem, lane))?;
                if waits {
                    self.warp.waits = Some(barrier);
                    self.warp.reduction = reduce.map(|(reduction, _)| reduction);
                    return Ok(Next::Barrier);
                }
            }
            Op::WarpBarrier { members } => {
                if !self.members_are_here(*members, lanes)? {
                    return Ok(Next::Wait("bar.warp.sync"));
                }
                self.shared.time += 1;
                self.warp.seen[self.warp.number as usize] = self.shared.time;
            }
            Op::Branch(target) => return Ok(Next::Jump(lanes, *target)),
            Op::BranchIndex { a, targets } => {
                let a = *self.row(*a);
                let mut parts: Vec<(u32, u32)> = Vec::new();
                if group.lanes & !lanes != 0 {
                    parts.push((group.lanes & !lanes, group.at + 1));
                }
                for lane in each(lanes) {
                    let Some(&target) = targets.get(a[lane] as usize) else {
                        return Err((Problem::Trap { what: "brx.idx beyond its list" }, lane));
                    };
                    match parts.iter_mut().find(|part| part.1 == target) {
                        Some(part) => part.0 |= 1 << lane,
                        None => parts.push((1 << lane, target)),
                    }
                }
                return Ok(Next::Scatter(parts));
            }
            Op::Exit => return Ok(Next::Exit(lanes)),
            Op::Print { params, result } => self.print(*params, *result, lanes)?,
            Op::Assertion(params) => {
                let lane = lanes.trailing_zeros() as usize;
                return Err((self.failed_assertion(*params, lane), lane));
            }
            Op::Trap(what) => return Err((Problem::Trap { what }, lanes.trailing_zeros() as usize)),
        }
        Ok(Next::Step)
    }

    fn special(&self, special: Special) -> Row {
        let launch = self.grid.launch;
        let first = self.warp.number * LANES as u32;
        let uniform = |value: u32| [value.into(); LANES];
        let each = |f: fn(u32) -> u32| std::array::from_fn(|lane| f(lane as u32).into());
        match special {
            Special::Tid(axis) => {
                std::array::from_fn(|lane| super::split(first + lane as u32, launch.block)[axis].into())
            }
            Special::Ntid(axis) => uniform(launch.block[axis]),
            Special::Ctaid(axis) => uniform(super::split(self.block, launch.grid)[axis]),
            Special::Nctaid(axis) => uniform(launch.grid[axis]),
            Special::Lane => each(|lane| lane),
            Special::Warp => uniform(self.warp.number),
            Special::Warps => uniform(self.warp.seen.len() as u32),
            Special::LanesEqual => each(|lane| 1 << lane),
            Special::LanesBelow => each(|lane| (1 << lane) - 1),
            Special::LanesUpTo => each(|lane| u32::MAX >> (31 - lane)),
            Special::LanesAbove => each(|lane| !(u32::MAX >> (31 - lane))),
            Special::LanesFrom => each(|lane| u32::MAX << lane),
            Special::Clock => [self.counts.warp_instructions; LANES],
            Special::SharedBytes => uniform(self.grid.shared_bytes),
            Special::DynamicSharedBytes => uniform(launch.dynamic_shared),
            Special::Zero => uniform(0),
            Special::One => uniform(1),
        }
    }
}

fn combined(logic: Logic, a: u32, b: u32) -> u32 {
    match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    }
}

/// The lanes of a mask, in order.
pub fn each(mut lanes: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (lanes != 0).then(|| {
            let lane = lanes.trailing_zeros() as usize;
            lanes &= lanes - 1;
            lane
        })
    })
}
