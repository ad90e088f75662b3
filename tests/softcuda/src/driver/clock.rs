//! What happens before what: a vector clock over lanes (streams and branches of graphs).
//!
//! Every order that CUDA promises is known when a call is made (stream order, event record → wait, a
//! synchronisation that returned, an edge of a graph), so clocks are made at the call and never depend on
//! the schedule: a missing event is found whichever way the scheduler went.

use std::sync::Arc;

/// The n-th operation (counted from 1) of a lane; lanes are numbered over all devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    pub lane: u32,
    pub seq: u32,
}

/// For each lane, how many of its operations are known to be over: (lane, count), ascending by lane.
#[derive(Clone, Default, Debug)]
pub struct Clock(Arc<Vec<(u32, u32)>>);

impl Clock {
    fn get(&self, lane: u32) -> u32 {
        self.0.binary_search_by_key(&lane, |entry| entry.0).map_or(0, |at| self.0[at].1)
    }

    /// Whether the two are one and the same, not merely equal: cheap, and enough to skip a merge.
    pub fn same(&self, other: &Clock) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn knows(&self, mark: Mark) -> bool {
        self.get(mark.lane) >= mark.seq
    }

    pub fn add(&mut self, mark: Mark) {
        match self.0.binary_search_by_key(&mark.lane, |entry| entry.0) {
            Ok(at) if self.0[at].1 >= mark.seq => {}
            Ok(at) => Arc::make_mut(&mut self.0)[at].1 = mark.seq,
            Err(at) => Arc::make_mut(&mut self.0).insert(at, (mark.lane, mark.seq)),
        }
    }

    pub fn merge(&mut self, other: &Clock) {
        if self.same(other) || other.0.is_empty() {
            return;
        }
        if self.0.is_empty() {
            *self = other.clone();
            return;
        }
        let mut merged = Vec::with_capacity(self.0.len().max(other.0.len()));
        let (mut ours, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(&&(lane, seq)), Some(&&(other_lane, other_seq))) = (ours.peek(), theirs.peek()) {
            let last = lane.min(other_lane);
            let seq = if lane == last { seq } else { 0 }.max(if other_lane == last { other_seq } else { 0 });
            merged.push((last, seq));
            ours.next_if(|entry| entry.0 == last);
            theirs.next_if(|entry| entry.0 == last);
        }
        merged.extend(ours.chain(theirs));
        self.0 = Arc::new(merged);
    }

    /// The lanes of it, each with its last operation known to be over.
    pub fn marks(&self) -> impl Iterator<Item = Mark> + '_ {
        self.0.iter().map(|&(lane, seq)| Mark { lane, seq })
    }
}

/// An operation's place in time: itself, and all that is over before it starts.
#[derive(Clone, Debug)]
pub struct Stamp {
    pub mark: Mark,
    pub before: Clock,
}

impl Stamp {
    /// Whether `earlier` is over, in every legal schedule, when this operation starts.
    pub fn after(&self, earlier: Mark) -> bool {
        if earlier.lane == self.mark.lane { earlier.seq < self.mark.seq } else { self.before.knows(earlier) }
    }

    /// What is known once this operation is over.
    pub fn past(&self) -> Clock {
        let mut clock = self.before.clone();
        clock.add(self.mark);
        clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(entries: &[(u32, u32)]) -> Clock {
        let mut clock = Clock::default();
        for &(lane, seq) in entries {
            clock.add(Mark { lane, seq });
        }
        clock
    }

    fn entries(clock: &Clock) -> Vec<(u32, u32)> {
        clock.marks().map(|mark| (mark.lane, mark.seq)).collect()
    }

    #[test]
    fn a_merge_knows_what_either_knew() {
        let mut one = clock(&[(5, 2), (1, 4), (9, 9)]);
        let two = clock(&[(2, 7), (5, 3), (1, 1), (12, 0)]);
        one.merge(&two);
        assert_eq!(entries(&one), [(1, 4), (2, 7), (5, 3), (9, 9), (12, 0)]);
        assert!(one.knows(Mark { lane: 5, seq: 3 }) && !one.knows(Mark { lane: 5, seq: 4 }));
        assert!(one.knows(Mark { lane: 77, seq: 0 }) && !one.knows(Mark { lane: 77, seq: 1 }));
        // The other one is as it was, and an older mark changes nothing.
        assert_eq!(entries(&two), [(1, 1), (2, 7), (5, 3), (12, 0)]);
        one.add(Mark { lane: 9, seq: 3 });
        assert_eq!(entries(&one)[3], (9, 9));
    }

    #[test]
    fn an_operation_comes_after_its_lane_and_what_it_knows() {
        let stamp = Stamp { mark: Mark { lane: 1, seq: 3 }, before: clock(&[(2, 5)]) };
        let after = |lane, seq| stamp.after(Mark { lane, seq });
        assert!(after(1, 2) && !after(1, 3) && after(2, 5) && !after(2, 6) && !after(3, 1));
        assert_eq!(entries(&stamp.past()), [(1, 3), (2, 5)]);
    }
}
