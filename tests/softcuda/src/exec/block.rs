//! A block: its shared memory, its barriers, and whose turn it is.

use super::warp::{Pause, Runner, Warp};
use super::{Fault, Grid, Problem};
use crate::counters::Counts;
use crate::memory::DeviceMemory;
use crate::memory::shadow::{Sets, Shadow};
use crate::ptx::code::{BarrierReduction, LANES};

const BARRIERS: usize = 16;
/// Instructions a warp may run before another has its turn, so that a warp that spins does not do so forever.
const TURN: u64 = 1 << 16;

#[derive(Default)]
struct Barrier {
    /// Warps that wait.
    waiting: u32,
    /// Threads that arrived, waiting or not.
    threads: u32,
    /// How many threads it takes; none: all that still run.
    needed: Option<u32>,
    /// Times seen by those who arrived.
    seen: Vec<u32>,
    /// Threads whose predicate holds, of `bar.red`.
    holds: u32,
}

/// What the warps of a block share.
pub struct Shared {
    pub bytes: Vec<u8>,
    pub shadow: Shadow,
    pub sets: Sets,
    /// Goes up with each arrival at a barrier.
    pub time: u32,
    barriers: [Barrier; BARRIERS],
}

/// Buffers that the blocks of a launch use in turn.
pub struct State {
    pub shared: Shared,
    pub warps: Vec<Warp>,
}

impl State {
    pub fn new(grid: &Grid) -> State {
        let threads: u32 = grid.launch.block.iter().product();
        let bytes = grid.shared_bytes as usize;
        let warps = threads.div_ceil(LANES as u32);
        State {
            shared: Shared {
                bytes: vec![0; bytes],
                shadow: Shadow::new(bytes),
                sets: Sets::default(),
                time: 0,
                barriers: Default::default(),
            },
            warps: (0..warps).map(|number| Warp::new(grid, number, threads)).collect(),
        }
    }
}

/// A step of a generator of pseudorandom numbers (SplitMix64).
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Runs block `number` to its end.
pub fn run(
    grid: &Grid,
    state: &mut State,
    number: u32,
    memory: &mut DeviceMemory,
    counts: &mut Counts,
) -> Result<(), Fault> {
    let State { shared, warps } = state;
    shared.shadow.clear();
    shared.time = 1;
    shared.barriers = Default::default();
    warps.iter_mut().for_each(|warp| warp.reset(warps_of(grid)));
    let mut random = grid.launch.seed ^ u64::from(number);
    let mut budget = grid.launch.budget;
    let mut ready: Vec<usize> = (0..warps.len()).collect();
    while !ready.is_empty() {
        let turn = ready.swap_remove(next_random(&mut random) as usize % ready.len());
        let limit = TURN.min(budget);
        let mut runner = Runner { grid, block: number, shared, memory, counts, warp: &mut warps[turn] };
        let (pause, used) = runner.run(limit)?;
        budget -= used;
        match pause {
            Pause::Turn if budget == 0 => {
                let what = format!("the block ran {} warp instructions without ending", grid.launch.budget);
                let at = Some(warps[turn].place(number));
                return Err(grid.fault(Problem::Deadlock { what }, at));
            }
            Pause::Turn => ready.push(turn),
            Pause::Barrier | Pause::Done => {}
        }
        release(shared, warps, &mut ready);
    }
    if let Some(waiting) = warps.iter().find(|warp| warp.waits.is_some()) {
        let threads: u32 =
            warps.iter().filter(|warp| warp.waits == waiting.waits).map(|warp| warp.threads).sum();
        let barrier = waiting.waits.unwrap_or(0);
        let needed = shared.barriers[barrier].needed;
        let of = needed.map_or("all".to_owned(), |needed| needed.to_string());
        let what =
            format!("{threads} threads wait at barrier {barrier} for {of}, and no other thread can run");
        return Err(grid.fault(Problem::Deadlock { what }, Some(waiting.place(number))));
    }
    Ok(())
}

fn warps_of(grid: &Grid) -> usize {
    grid.launch.block.iter().product::<u32>().div_ceil(LANES as u32) as usize
}

/// Lets go of the warps whose barrier is complete.
fn release(shared: &mut Shared, warps: &mut [Warp], ready: &mut Vec<usize>) {
    for number in 0..BARRIERS {
        let barrier = &shared.barriers[number];
        if barrier.waiting == 0 {
            continue;
        }
        let complete = match barrier.needed {
            Some(needed) => barrier.threads >= needed,
            None => {
                warps.iter().enumerate().all(|(at, warp)| warp.is_done() || barrier.waiting >> at & 1 == 1)
            }
        };
        if !complete {
            continue;
        }
        let mut barrier = std::mem::take(&mut shared.barriers[number]);
        // Those who waited did nothing meanwhile: what they did lies before now, the same for all of them.
        shared.time += 1;
        for (at, seen) in barrier.seen.iter_mut().enumerate() {
            if barrier.waiting >> at & 1 == 1 {
                *seen = shared.time;
            }
        }
        for (at, warp) in warps.iter_mut().enumerate() {
            if barrier.waiting >> at & 1 == 0 {
                continue;
            }
            for (own, seen) in warp.seen.iter_mut().zip(&barrier.seen) {
                *own = (*own).max(*seen);
            }
            if let Some(reduction) = warp.reduction.take() {
                match reduction {
                    BarrierReduction::Count(d) => warp.registers[d as usize] = [barrier.holds.into(); LANES],
                    BarrierReduction::And(d) => {
                        warp.predicates[d as usize] =
                            if barrier.holds == barrier.threads { u32::MAX } else { 0 };
                    }
                    BarrierReduction::Or(d) => {
                        warp.predicates[d as usize] = if barrier.holds > 0 { u32::MAX } else { 0 };
                    }
                }
            }
            warp.waits = None;
            ready.push(at);
        }
    }
}

/// A warp at a barrier.
pub struct Arrival<'w> {
    pub barrier: usize,
    pub warp: u32,
    pub threads: u32,
    /// Whether it waits.
    pub waits: bool,
    pub needed: Option<u32>,
    pub seen: &'w mut [u32],
    /// Its threads whose predicate holds.
    pub holds: u32,
}

impl Shared {
    /// # Errors
    /// Arrivals that want different numbers of threads.
    pub fn arrive(&mut self, arrival: Arrival) -> Result<(), Problem> {
        let Arrival { barrier: number, warp, threads, waits, needed, seen, holds } = arrival;
        let Some(barrier) = self.barriers.get_mut(number) else {
            return Err(Problem::Trap { what: "a barrier number above 15" });
        };
        if barrier.threads > 0 && barrier.needed != needed {
            let what = "arrivals at one barrier want different numbers of threads".to_owned();
            return Err(Problem::Deadlock { what });
        }
        self.time += 1;
        seen[warp as usize] = self.time;
        barrier.needed = needed;
        barrier.threads += threads;
        barrier.holds += holds;
        barrier.waiting |= u32::from(waits) << warp;
        barrier.seen.resize(seen.len(), 0);
        for (all, own) in barrier.seen.iter_mut().zip(seen.iter()) {
            *all = (*all).max(*own);
        }
        Ok(())
    }
}
