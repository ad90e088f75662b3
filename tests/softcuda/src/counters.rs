//! What a launch did, counted.

use std::collections::BTreeMap;
use std::ops::AddAssign;

/// Accesses of global memory in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Warp instructions.
    pub instructions: u64,
    /// Bytes that lanes asked for.
    pub bytes: u64,
    /// 32-byte sectors, counted once for each warp instruction.
    pub sectors: u64,
    /// 32-byte sectors, counted once for each launch.
    pub distinct_sectors: u64,
}

/// Accesses of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedTraffic {
    /// Warp instructions.
    pub instructions: u64,
    /// Passes beyond the fewest possible, because lanes wanted different words of one bank.
    pub conflicts: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub warp_instructions: u64,
    /// Instructions times active lanes.
    pub lane_instructions: u64,
    /// `mma.sync` by shape, such as `m16n8k16`.
    pub mma: BTreeMap<&'static str, u64>,
    pub global_loads: Traffic,
    pub global_stores: Traffic,
    pub shared_loads: SharedTraffic,
    pub shared_stores: SharedTraffic,
    /// Arrivals of warps at barriers of their block.
    pub barriers: u64,
    /// Warp instructions.
    pub atomics: u64,
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        self.instructions += other.instructions;
        self.bytes += other.bytes;
        self.sectors += other.sectors;
        self.distinct_sectors += other.distinct_sectors;
    }
}

impl AddAssign for SharedTraffic {
    fn add_assign(&mut self, other: SharedTraffic) {
        self.instructions += other.instructions;
        self.conflicts += other.conflicts;
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.warp_instructions += other.warp_instructions;
        self.lane_instructions += other.lane_instructions;
        for (shape, count) in other.mma {
            *self.mma.entry(shape).or_default() += count;
        }
        self.global_loads += other.global_loads;
        self.global_stores += other.global_stores;
        self.shared_loads += other.shared_loads;
        self.shared_stores += other.shared_stores;
        self.barriers += other.barriers;
        self.atomics += other.atomics;
    }
}
