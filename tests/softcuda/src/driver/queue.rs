//! Streams as real queues: a call only enqueues; a seeded scheduler runs operations when something waits
//! for them, and may run any lane ahead or hold it back as far as the dependencies allow.
//!
//! A lane is a stream, or a branch of an instantiated graph. An operation may start when it is the first of
//! its lane and the operations it depends on are over.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::clock::{Clock, Mark, Stamp};
use super::host;
use super::machine::{Device, Guard, Machine};
use super::work::Work;

pub struct Operation {
    /// The number by which device memory knows it.
    pub id: u32,
    pub stamp: Stamp,
    /// What must be over before it may start, besides its predecessors in the lane.
    pub needs: Vec<Mark>,
    pub context: u64,
    pub work: Work,
    /// What its page-locked source held when the call was made, if nothing but the host could change it
    /// before it runs; and the host must not.
    pub source: Option<u64>,
}

pub struct Lane {
    pub context: u64,
    queue: VecDeque<Operation>,
    enqueued: u32,
    over: u32,
    /// What the lane's next operation will know of other lanes.
    known: Clock,
    host_seen: Clock,
    /// Its first operation runs outside the device's lock.
    running: bool,
}

/// Pseudo-random numbers for the schedule (splitmix64).
pub struct Schedule {
    state: u64,
    /// Of 256 chances, how many that a call runs something that nothing waits for yet.
    eagerness: u64,
}

impl Schedule {
    /// Seed 0 runs only what is waited for. Other seeds draw how eager the device is, too.
    pub fn new(seed: u64) -> Schedule {
        let mut schedule = Schedule { state: seed, eagerness: 0 };
        if seed != 0 {
            schedule.eagerness = [0, 32, 128, 256][schedule.below(4)];
        }
        schedule
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// What to do next towards a goal.
enum Step {
    Run(usize),
    /// Another device's operation stands in the way.
    Foreign(Mark),
    /// Another thread is running what stands in the way.
    Wait,
}

const LANE_BITS: u32 = 24;

/// The device a lane belongs to.
pub fn device_of(mark: Mark) -> u8 {
    (mark.lane >> LANE_BITS) as u8
}

/// Before all operations of the device: knowing it says only that one has to do with the device.
pub fn beginning_of(ordinal: u8) -> Mark {
    Mark { lane: u32::from(ordinal) << LANE_BITS, seq: 0 }
}

fn lane_of(mark: Mark) -> usize {
    (mark.lane & ((1 << LANE_BITS) - 1)) as usize
}

impl Machine {
    pub fn new_lane(&mut self, context: u64) -> usize {
        self.lanes.push(Lane {
            context,
            queue: VecDeque::new(),
            enqueued: 0,
            over: 0,
            known: Clock::default(),
            host_seen: Clock::default(),
            running: false,
        });
        self.lanes.len() - 1
    }

    fn lane_number(&self, lane: usize) -> u32 {
        u32::from(self.ordinal) << LANE_BITS | lane as u32
    }

    /// The last operation enqueued on the lane.
    pub fn last(&self, lane: usize) -> Mark {
        Mark { lane: self.lane_number(lane), seq: self.lanes[lane].enqueued }
    }

    /// What is known once all that is on the lane is over.
    pub fn past(&self, lane: usize) -> Clock {
        let mut clock = self.lanes[lane].known.clone();
        clock.add(self.last(lane));
        clock
    }

    /// Appends to the lane an operation that starts after `needs`, and knows `learned`.
    pub fn push(&mut self, lane: usize, needs: Vec<Mark>, learned: &Clock, work: Work) -> Stamp {
        let seq = self.lanes[lane].enqueued + 1;
        let mark = Mark { lane: self.lane_number(lane), seq };
        let known_by_host = host::known(self.ordinal);
        let target = &mut self.lanes[lane];
        target.enqueued = seq;
        if !target.host_seen.same(&known_by_host) {
            target.known.merge(&known_by_host);
            target.host_seen = known_by_host;
        }
        target.known.merge(learned);
        let stamp = Stamp { mark, before: target.known.clone() };
        let source = if self.host_functions == 0 { work.settled_source() } else { None };
        self.host_functions += usize::from(matches!(work, Work::Host { .. }));
        work.note_use(&stamp);
        let id = self.marks.len() as u32;
        self.marks.push(mark);
        let context = self.lanes[lane].context;
        self.lanes[lane].queue.push_back(Operation {
            id,
            stamp: stamp.clone(),
            needs,
            context,
            work,
            source,
        });
        stamp
    }

    /// Whether the operation is over; of another device's, as far as this device has heard.
    fn is_over(&self, mark: Mark) -> bool {
        if device_of(mark) == self.ordinal {
            self.lanes[lane_of(mark)].over >= mark.seq
        } else {
            self.foreign.knows(mark)
        }
    }

    pub fn all_over(&self, goal: &[Mark]) -> bool {
        goal.iter().all(|&mark| self.is_over(mark))
    }

    fn ready(&self, lane: usize) -> bool {
        let lane = &self.lanes[lane];
        !lane.running && lane.queue.front().is_some_and(|first| self.all_over(&first.needs))
    }

    /// The lanes whose first operation must run, and may, before the goal is reached.
    fn wanted(&self, goal: &[Mark]) -> (Vec<usize>, Option<Step>) {
        let (mut ready, mut obstacle, mut seen) = (Vec::new(), None, Vec::new());
        let mut open: Vec<Mark> = goal.iter().copied().filter(|&mark| !self.is_over(mark)).collect();
        while let Some(mark) = open.pop() {
            if device_of(mark) != self.ordinal {
                obstacle = Some(Step::Foreign(mark));
                continue;
            }
            let at = lane_of(mark);
            if seen.contains(&at) {
                continue;
            }
            seen.push(at);
            if self.lanes[at].running {
                obstacle = obstacle.or(Some(Step::Wait));
            } else if let Some(first) = self.lanes[at].queue.front() {
                let before = open.len();
                open.extend(first.needs.iter().filter(|&&need| !self.is_over(need)));
                if open.len() == before {
                    ready.push(at);
                }
            }
        }
        (ready, obstacle)
    }

    fn choose(&mut self, goal: &[Mark], run_ahead: usize) -> Step {
        if run_ahead > 0 && self.schedule.below(256) < run_ahead {
            let all: Vec<usize> = (0..self.lanes.len()).filter(|&lane| self.ready(lane)).collect();
            if !all.is_empty() {
                return Step::Run(all[self.schedule.below(all.len())]);
            }
        }
        match self.wanted(goal) {
            (ready, None) | (ready, Some(Step::Wait)) if !ready.is_empty() => {
                Step::Run(ready[self.schedule.below(ready.len())])
            }
            (ready, Some(Step::Foreign(mark))) => {
                if !ready.is_empty() && self.schedule.below(2) == 0 {
                    Step::Run(ready[self.schedule.below(ready.len())])
                } else {
                    Step::Foreign(mark)
                }
            }
            _ => Step::Wait,
        }
    }

    /// After a call: a device as eager as the seed says may start at once.
    pub fn progress(&mut self) {
        while self.schedule.eagerness > 0
            && (self.schedule.below(256) as u64) < self.schedule.eagerness
            && self.step_any()
        {}
    }

    /// Runs one operation that may run now, if there is one that needs no other device and no host code.
    pub fn step_any(&mut self) -> bool {
        let all: Vec<usize> = (0..self.lanes.len())
            .filter(|&lane| self.ready(lane) && !self.lanes[lane].queue[0].work.leaves_the_device())
            .collect();
        if all.is_empty() {
            return false;
        }
        let lane = all[self.schedule.below(all.len())];
        let operation = self.lanes[lane].queue.pop_front().expect("a ready lane has an operation");
        self.execute(&operation);
        self.lanes[lane].over += 1;
        true
    }

    /// The unfinished lanes of a context: for each, its last operation.
    pub fn pending(&self, context: u64) -> Vec<Mark> {
        (0..self.lanes.len())
            .filter(|&lane| self.lanes[lane].context == context)
            .map(|lane| self.last(lane))
            .filter(|&mark| !self.is_over(mark))
            .collect()
    }

    /// The lanes of a context, finished or not: for each, what its end knows.
    pub fn past_of_context(&self, context: u64) -> Clock {
        let mut clock = Clock::default();
        for lane in (0..self.lanes.len()).filter(|&lane| self.lanes[lane].context == context) {
            clock.merge(&self.past(lane));
        }
        clock
    }
}

impl Device {
    /// Runs operations until those of `goal` are over.
    pub fn finish<'a>(&'a self, mut machine: Guard<'a>, goal: &[Mark]) -> Guard<'a> {
        // How far the other lanes run ahead meanwhile: not at all, at random, or nearly as far as they can.
        let run_ahead = if machine.seed == 0 { 0 } else { [0, 128, 240][machine.schedule.below(3)] };
        while !machine.all_over(goal) {
            match machine.choose(goal, run_ahead) {
                Step::Run(lane) => machine = self.run_first(machine, lane),
                Step::Foreign(mark) => machine = self.finish_elsewhere(machine, mark),
                Step::Wait => machine = self.wait(machine),
            }
        }
        machine
    }

    /// One step towards the end of `goal`.
    pub fn step_towards<'a>(&'a self, mut machine: Guard<'a>, goal: Mark) -> Guard<'a> {
        match machine.choose(&[goal], 0) {
            Step::Run(lane) => self.run_first(machine, lane),
            Step::Foreign(mark) => self.finish_elsewhere(machine, mark),
            Step::Wait => machine,
        }
    }

    /// Lets another device finish `mark`; this one is open meanwhile.
    fn finish_elsewhere<'a>(&'a self, machine: Guard<'a>, mark: Mark) -> Guard<'a> {
        drop(machine);
        let other = Device::of(device_of(mark));
        drop(other.finish(other.lock(), &[mark]));
        let mut machine = self.lock();
        machine.foreign.add(mark);
        machine
    }

    fn run_first<'a>(&'a self, mut machine: Guard<'a>, lane: usize) -> Guard<'a> {
        let operation = machine.lanes[lane].queue.pop_front().expect("a ready lane has an operation");
        if operation.work.leaves_the_device() {
            machine.lanes[lane].running = true;
            machine = self.execute_outside(machine, &operation);
            machine.host_functions -= usize::from(matches!(operation.work, Work::Host { .. }));
            machine.lanes[lane].running = false;
        } else {
            machine.execute(&operation);
        }
        machine.lanes[lane].over += 1;
        self.changed();
        machine
    }
}

/// When an event was reached: the host's clock, as nothing here has a clock of its own.
#[derive(Clone, Default)]
pub struct Reached(Arc<std::sync::OnceLock<Instant>>);

impl Reached {
    pub fn now(&self) {
        // A second setting cannot happen: each record makes a new one.
        let _ = self.0.set(Instant::now());
    }

    pub fn at(&self) -> Option<Instant> {
        self.0.get().copied()
    }
}
