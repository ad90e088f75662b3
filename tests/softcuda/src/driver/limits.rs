//! What the device says of itself, and what a launch may ask for.
//!
//! The numbers are those of an sm_80 card (CUDA C++ programming guide, "Technical Specifications per Compute
//! Capability") except for the multiprocessors: eight, so that grids sized from the device stay small.

use std::collections::BTreeMap;

use super::status::{Outcome, Status};

/// Attributes (`CUdevice_attribute`) that the driver itself reads.
pub const MAX_SHARED_PER_BLOCK: i32 = 8;
pub const MULTIPROCESSORS: i32 = 16;
pub const MAX_THREADS_PER_MULTIPROCESSOR: i32 = 39;
pub const CAPABILITY_MAJOR: i32 = 75;
pub const CAPABILITY_MINOR: i32 = 76;
pub const SHARED_PER_MULTIPROCESSOR: i32 = 81;
pub const MAX_SHARED_OPT_IN: i32 = 97;
pub const BLOCKS_PER_MULTIPROCESSOR: i32 = 106;
pub const SHARED_RESERVED_PER_BLOCK: i32 = 111;

const ATTRIBUTES: &[(i32, i32)] = &[
    (1, 1024), // threads per block
    (2, 1024), // block x, y, z
    (3, 1024),
    (4, 64),
    (5, 0x7fff_ffff), // grid x, y, z
    (6, 65535),
    (7, 65535),
    (MAX_SHARED_PER_BLOCK, 48 << 10),
    (9, 64 << 10),     // constant memory
    (10, 32),          // warp
    (11, 0x7fff_ffff), // pitch
    (12, 65536),       // registers per block
    (14, 512),         // texture alignment
    (15, 1),           // copies overlap kernels
    (MULTIPROCESSORS, 8),
    (31, 1),       // concurrent kernels
    (38, 4 << 20), // L2 bytes
    (MAX_THREADS_PER_MULTIPROCESSOR, 2048),
    (40, 2), // copy engines
    (41, 1), // unified addressing
    (CAPABILITY_MAJOR, 8),
    (CAPABILITY_MINOR, 0),
    (78, 1), // stream priorities
    (79, 1), // global loads through L1
    (80, 1), // local loads through L1
    (SHARED_PER_MULTIPROCESSOR, 164 << 10),
    (82, 65536), // registers per multiprocessor
    (90, 1),     // compute preemption
    (95, 1),     // cooperative launch
    (MAX_SHARED_OPT_IN, 163 << 10),
    (BLOCKS_PER_MULTIPROCESSOR, 32),
    (SHARED_RESERVED_PER_BLOCK, 1 << 10),
    (115, 1), // memory pools
];

/// One past the last `CUdevice_attribute` that any CUDA 13 header names.
const ATTRIBUTE_END: i32 = 150;

/// The device's attributes. What is not listed (textures, managed memory, mapped host memory, clocks) is 0:
/// not there.
pub struct Limits(BTreeMap<i32, i32>);

impl Default for Limits {
    fn default() -> Limits {
        Limits(ATTRIBUTES.iter().copied().collect())
    }
}

/// What a launch asks for.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub dynamic_shared: u32,
}

/// What a kernel was compiled for, and what its attributes were set to.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Bytes of `.shared` in the kernel.
    pub static_shared: u32,
    /// `.maxntid`, `.reqntid`.
    pub max_block: Option<[u32; 3]>,
    pub required_block: Option<[u32; 3]>,
    /// `MAX_DYNAMIC_SHARED_SIZE_BYTES`, where it was set.
    pub dynamic_shared_limit: Option<u32>,
}

fn count(dims: [u32; 3]) -> u64 {
    dims.iter().map(|&n| u64::from(n)).product()
}

impl Limits {
    pub fn get(&self, attribute: i32) -> Outcome<i32> {
        match self.0.get(&attribute) {
            Some(&value) => Ok(value),
            None if (1..ATTRIBUTE_END).contains(&attribute) => Ok(0),
            None => Err(Status::INVALID_VALUE),
        }
    }

    pub fn set(&mut self, attribute: i32, value: i32) {
        self.0.insert(attribute, value);
    }

    fn of(&self, attribute: i32) -> u64 {
        self.0.get(&attribute).map_or(0, |&value| value.max(0) as u64)
    }

    pub fn capability(&self) -> (i32, i32) {
        (self.of(CAPABILITY_MAJOR) as i32, self.of(CAPABILITY_MINOR) as i32)
    }

    /// Threads a block of the kernel may have.
    pub fn max_threads(&self, kernel: &Needs) -> u32 {
        let stated = kernel.required_block.or(kernel.max_block).map_or(u64::MAX, count);
        stated.min(self.of(1)) as u32
    }

    /// Dynamic shared memory the kernel may be launched with, bytes.
    pub fn max_dynamic_shared(&self, kernel: &Needs) -> u32 {
        let usual = self.of(MAX_SHARED_PER_BLOCK).saturating_sub(kernel.static_shared.into());
        kernel.dynamic_shared_limit.map_or(usual, u64::from) as u32
    }

    /// Whether `bytes` may be set as the kernel's `MAX_DYNAMIC_SHARED_SIZE_BYTES`.
    pub fn allows_dynamic_shared(&self, kernel: &Needs, bytes: u32) -> bool {
        u64::from(kernel.static_shared) + u64::from(bytes) <= self.of(MAX_SHARED_OPT_IN)
    }

    /// Why a launch of this shape is refused, if it is.
    pub fn refuse(&self, shape: &Shape, kernel: &Needs) -> Option<String> {
        let Shape { grid, block, dynamic_shared } = *shape;
        let over = |dims: [u32; 3], first: i32| {
            (0..3).any(|axis| dims[axis] == 0 || u64::from(dims[axis]) > self.of(first + axis as i32))
        };
        if over(grid, 5) {
            return Some(format!("grid {grid:?} is empty or above the device's limit"));
        }
        if over(block, 2) || count(block) > self.of(1) {
            return Some(format!("block {block:?} is empty or above the device's limit"));
        }
        if let Some(required) = kernel.required_block
            && required != block
        {
            return Some(format!("block {block:?}, but the kernel has .reqntid {required:?}"));
        }
        if count(block) > u64::from(self.max_threads(kernel)) {
            return Some(format!("block {block:?} is above the kernel's .maxntid {:?}", kernel.max_block));
        }
        let most = self.max_dynamic_shared(kernel);
        if dynamic_shared > most {
            return Some(format!(
                "{dynamic_shared} bytes of dynamic shared memory, but this kernel may have {most} \
                 (MAX_DYNAMIC_SHARED_SIZE_BYTES raises that)"
            ));
        }
        None
    }

    /// Blocks that fit a multiprocessor at once, by threads, block slots and shared memory. Registers are
    /// not counted: PTX does not say how many the card's compiler will take, so this is an upper bound.
    pub fn resident_blocks(&self, kernel: &Needs, threads: u32, dynamic_shared: u64) -> u32 {
        let warps = u64::from(threads).div_ceil(32).max(1);
        let by_threads = self.of(MAX_THREADS_PER_MULTIPROCESSOR) / (warps * 32);
        let shared = u64::from(kernel.static_shared) + dynamic_shared + self.of(SHARED_RESERVED_PER_BLOCK);
        let by_shared = self.of(SHARED_PER_MULTIPROCESSOR) / shared.max(1);
        if threads == 0 || threads > self.max_threads(kernel) {
            return 0;
        }
        by_threads.min(by_shared).min(self.of(BLOCKS_PER_MULTIPROCESSOR)) as u32
    }

    /// Dynamic shared memory each of `blocks` blocks can have when they share a multiprocessor, bytes.
    pub fn shared_for(&self, kernel: &Needs, blocks: u32) -> u64 {
        let each = self.of(SHARED_PER_MULTIPROCESSOR) / u64::from(blocks.max(1));
        let most = self.of(MAX_SHARED_OPT_IN).saturating_sub(kernel.static_shared.into());
        each.saturating_sub(self.of(SHARED_RESERVED_PER_BLOCK) + u64::from(kernel.static_shared)).min(most)
    }
}
