//! Instructions by which the lanes of a warp exchange values (PTX ISA 9.0: `shfl.sync`, `vote.sync`,
//! `match.sync`, `redux.sync`).

use super::Problem;
use super::warp::{Next, Outcome, Runner, each};
use crate::arith::integer;
use crate::ptx::code::{LANES, Predicate, ReduceOp, Register, ShuffleMode, Source, VoteMode};

impl Runner<'_, '_> {
    /// Whether every lane that a member mask names, and that has not ended, is in the group.
    ///
    /// # Errors
    /// A lane that runs the instruction with a mask that leaves it out.
    pub fn members_are_here(&self, members: Source, lanes: u32) -> Outcome<bool> {
        let masks = self.row(members);
        let mut named = 0;
        for lane in each(lanes) {
            let mask = masks[lane] as u32;
            if mask >> lane & 1 == 0 {
                return Err((
                    Problem::Trap { what: "a lane runs a .sync instruction whose member mask leaves it out" },
                    lane,
                ));
            }
            named |= mask;
        }
        Ok(named & self.live(lanes) & !lanes == 0)
    }

    pub fn shuffle(
        &mut self,
        mode: ShuffleMode,
        (d, valid): (Register, Option<Register>),
        [a, b, c]: [Source; 3],
        members: Source,
        lanes: u32,
    ) -> Outcome<Next> {
        if !self.members_are_here(members, lanes)? {
            return Ok(Next::Wait("shfl.sync"));
        }
        let (a, b, c) = (self.row(a), self.row(b), self.row(c));
        let mut row = [0; LANES];
        let mut in_range = 0;
        for lane in each(lanes) {
            let by = (b[lane] & 31) as usize;
            let clamp = (c[lane] & 31) as usize;
            let segment = (c[lane] >> 8 & 31) as usize;
            let low = lane & segment;
            let high = lane & segment | clamp & !segment;
            let (from, ok) = match mode {
                ShuffleMode::Up => (lane.wrapping_sub(by), lane as isize - by as isize >= high as isize),
                ShuffleMode::Down => (lane + by, lane + by <= high),
                ShuffleMode::Butterfly => (lane ^ by, lane ^ by <= high),
                ShuffleMode::Index => (low | by & !segment, low | by & !segment <= high),
            };
            let from = if ok { from } else { lane };
            in_range |= u32::from(ok) << lane;
            if lanes >> from & 1 == 0 {
                return Err((Problem::Trap { what: "shfl.sync reads a lane that does not take part" }, lane));
            }
            row[lane] = a[from] & integer::mask(32);
        }
        self.warp.put(d, lanes, &row);
        if let Some(valid) = valid {
            self.warp.put_predicate(valid, lanes, in_range);
        }
        Ok(Next::Step)
    }

    pub fn vote(
        &mut self,
        mode: VoteMode,
        d: Register,
        p: Predicate,
        members: Source,
        lanes: u32,
    ) -> Outcome<Next> {
        if !self.members_are_here(members, lanes)? {
            return Ok(Next::Wait("vote.sync"));
        }
        let holds = self.warp.holds(p) & lanes;
        let masks = *self.row(members);
        let of = |lane: usize| masks[lane] as u32 & lanes;
        if mode == VoteMode::Ballot {
            let row = std::array::from_fn(|lane| (holds & of(lane)).into());
            self.warp.put(d, lanes, &row);
            return Ok(Next::Step);
        }
        let mut result = 0;
        for lane in each(lanes) {
            let (all, yes) = (of(lane), holds & of(lane));
            let vote = match mode {
                VoteMode::All => yes == all,
                VoteMode::Any => yes != 0,
                VoteMode::Uniform | VoteMode::Ballot => yes == all || yes == 0,
            };
            result |= u32::from(vote) << lane;
        }
        self.warp.put_predicate(d, lanes, result);
        Ok(Next::Step)
    }

    pub fn match_lanes(
        &mut self,
        (d, agree): (Register, Option<Register>),
        all: bool,
        a: Source,
        bits: u32,
        members: Source,
        lanes: u32,
    ) -> Outcome<Next> {
        if !self.members_are_here(members, lanes)? {
            return Ok(Next::Wait("match.sync"));
        }
        let (values, masks) = (*self.row(a), *self.row(members));
        let mask = integer::mask(bits);
        let mut row = [0; LANES];
        let mut agreeing = 0;
        for lane in each(lanes) {
            let of = masks[lane] as u32 & lanes;
            let same = each(of).filter(|&other| values[other] & mask == values[lane] & mask);
            let same = same.fold(0u32, |same, other| same | 1 << other);
            agreeing |= u32::from(same == of) << lane;
            row[lane] = if all && same != of { 0 } else { same.into() };
        }
        self.warp.put(d, lanes, &row);
        if let Some(agree) = agree {
            self.warp.put_predicate(agree, lanes, agreeing);
        }
        Ok(Next::Step)
    }

    pub fn reduce(
        &mut self,
        op: ReduceOp,
        signed: bool,
        d: Register,
        a: Source,
        members: Source,
        lanes: u32,
    ) -> Outcome<Next> {
        if !self.members_are_here(members, lanes)? {
            return Ok(Next::Wait("redux.sync"));
        }
        let (values, masks) = (*self.row(a), *self.row(members));
        let combine = |a: u32, b: u32| match op {
            ReduceOp::Add => a.wrapping_add(b),
            ReduceOp::Min if signed => (a as i32).min(b as i32) as u32,
            ReduceOp::Max if signed => (a as i32).max(b as i32) as u32,
            ReduceOp::Min => a.min(b),
            ReduceOp::Max => a.max(b),
            ReduceOp::And => a & b,
            ReduceOp::Or => a | b,
            ReduceOp::Xor => a ^ b,
        };
        let mut row = [0; LANES];
        for lane in each(lanes) {
            let values = each(masks[lane] as u32 & lanes).map(|other| values[other] as u32);
            row[lane] = values.reduce(combine).unwrap_or(0).into();
        }
        self.warp.put(d, lanes, &row);
        Ok(Next::Step)
    }
}
