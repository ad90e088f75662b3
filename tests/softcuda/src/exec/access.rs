//! Loads, stores and asynchronous copies: where an address lies, and what a warp's accesses cost.

use super::Grid;
use super::block::Shared;
use super::fault::{Access, Problem};
use super::warp::{Copy, Outcome, Runner, Warp, each};
use crate::arith::integer::{mask, signed};
use crate::counters::Traffic;
use crate::memory::SECTOR;
use crate::memory::shadow::{Accessor, Thread};
use crate::ptx::code::{Address, LANES, Register, Row, Source, Space};
use crate::ptx::decode::{CALL_PARAMS, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW};
use crate::ptx::types::Type;

/// Bytes of the widest access.
const WIDEST: usize = 32;

/// Where a generic address lies, and its offset there.
pub fn resolve(space: Space, address: u64) -> (Space, u64) {
    if space != Space::Generic {
        return (space, address);
    }
    match address & !(WINDOW - 1) {
        SHARED_WINDOW => (Space::Shared, address - SHARED_WINDOW),
        LOCAL_WINDOW => (Space::Local, address - LOCAL_WINDOW),
        PARAM_WINDOW => (Space::Param, address - PARAM_WINDOW),
        _ => (Space::Global, address),
    }
}

/// A lane as the one who accesses memory. Not a method, so that it leaves the memory free to be changed.
fn accessor<'a>(grid: &'a Grid, block: u32, time: u32, warp: &'a Warp, lane: usize) -> Accessor<'a> {
    let number = (warp.number as usize * LANES + lane) as u16;
    Accessor {
        order: &grid.order,
        thread: Some(Thread { block, number, time, seen: &warp.seen, taken: None }),
    }
}

/// The same for global memory, which other blocks access too.
fn accessor_of_global<'a>(
    grid: &'a Grid,
    block: u32,
    shared: &'a Shared,
    warp: &'a Warp,
    lane: usize,
) -> Accessor<'a> {
    let mut accessor = accessor(grid, block, shared.time, warp, lane);
    if let Some(thread) = &mut accessor.thread {
        thread.taken = Some(&shared.handover.taken);
    }
    accessor
}

impl Runner<'_, '_> {
    pub fn addresses(&self, address: &Address) -> Row {
        let base = self.row(address.base);
        let mask = mask(if address.narrow { 32 } else { 64 });
        base.map(|base| base.wrapping_add(address.offset as u64) & mask)
    }

    fn name_of_none(_: u32) -> String {
        "this kernel".to_owned()
    }

    /// The bytes of a range of shared memory as an offset, or why they are not there.
    pub fn shared_range(&self, address: u64, bytes: usize, access: Access) -> Result<usize, Problem> {
        let size = self.shared.bytes.len();
        if address.checked_add(bytes as u64).is_none_or(|end| end > size as u64) {
            let nearest = format!("the block has {size} bytes");
            return Err(Problem::OutOfBounds {
                access,
                space: "shared",
                address,
                bytes: bytes as u64,
                nearest,
            });
        }
        Ok(address as usize)
    }

    pub fn read_shared(
        &mut self,
        address: u64,
        used: u32,
        lane: usize,
        to: &mut [u8],
    ) -> Result<(), Problem> {
        let at = self.shared_range(address, to.len(), Access::Read)?;
        let by = accessor(self.grid, self.block, self.shared.time, self.warp, lane);
        let shared = &mut *self.shared;
        let checked = shared.shadow.read(at, to.len(), used, &by, &mut shared.sets);
        checked.map_err(|(at, finding)| {
            finding.into_problem(Access::Read, "shared", at as u64, Self::name_of_none)
        })?;
        to.copy_from_slice(&shared.bytes[at..at + to.len()]);
        Ok(())
    }

    pub fn write_shared(
        &mut self,
        address: u64,
        from: &[u8],
        lane: usize,
        atomic: bool,
    ) -> Result<(), Problem> {
        let access = if atomic { Access::Atomic } else { Access::Write };
        let at = self.shared_range(address, from.len(), access)?;
        let by = accessor(self.grid, self.block, self.shared.time, self.warp, lane);
        let shared = &mut *self.shared;
        let checked = shared.shadow.write(at, from.len(), atomic, &by, &shared.sets);
        checked
            .map_err(|(at, finding)| finding.into_problem(access, "shared", at as u64, Self::name_of_none))?;
        shared.bytes[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn local_range(&self, offset: u64, bytes: usize, lane: usize, access: Access) -> Result<usize, Problem> {
        let size = self.grid.kernel.code.local_bytes as usize;
        if offset.checked_add(bytes as u64).is_none_or(|end| end > size as u64) {
            let nearest = format!("the thread has {size} bytes");
            return Err(Problem::OutOfBounds {
                access,
                space: "local",
                address: offset,
                bytes: bytes as u64,
                nearest,
            });
        }
        Ok(lane * size + offset as usize)
    }

    /// Reads for one lane.
    pub fn fetch(
        &mut self,
        space: Space,
        address: u64,
        used: u32,
        lane: usize,
        to: &mut [u8],
    ) -> Result<(), Problem> {
        let bytes = to.len() as u64;
        let (space, address) = resolve(space, address);
        aligned(space, address, bytes, Access::Read)?;
        match space {
            Space::Shared => self.read_shared(address, used, lane, to),
            Space::Local => {
                let at = self.local_range(address, to.len(), lane, Access::Read)?;
                to.copy_from_slice(&self.warp.local[at..at + to.len()]);
                Ok(())
            }
            Space::Param if address >= CALL_PARAMS => {
                let at = self.local_range(address - CALL_PARAMS, to.len(), lane, Access::Read)?;
                to.copy_from_slice(&self.warp.local[at..at + to.len()]);
                Ok(())
            }
            Space::Param => {
                let params = self.grid.launch.params;
                let found = params.get(address as usize..).and_then(|rest| rest.get(..to.len()));
                let Some(found) = found else {
                    let nearest = format!("the kernel has {} bytes", params.len());
                    let access = Access::Read;
                    return Err(Problem::OutOfBounds { access, space: "parameter", address, bytes, nearest });
                };
                to.copy_from_slice(found);
                Ok(())
            }
            Space::Generic | Space::Global | Space::Const => {
                let by = accessor_of_global(self.grid, self.block, self.shared, self.warp, lane);
                to.copy_from_slice(self.memory.check_read(address, bytes, used, &by)?);
                Ok(())
            }
        }
    }

    /// Writes for one lane.
    pub fn put_bytes(
        &mut self,
        space: Space,
        address: u64,
        from: &[u8],
        lane: usize,
        atomic: bool,
    ) -> Result<(), Problem> {
        let bytes = from.len() as u64;
        let access = if atomic { Access::Atomic } else { Access::Write };
        let (space, address) = resolve(space, address);
        aligned(space, address, bytes, access)?;
        match space {
            Space::Shared => self.write_shared(address, from, lane, atomic),
            Space::Local | Space::Param => {
                let offset = if space == Space::Param {
                    address
                        .checked_sub(CALL_PARAMS)
                        .ok_or(Problem::Trap { what: "a store to the parameters" })?
                } else {
                    address
                };
                let at = self.local_range(offset, from.len(), lane, access)?;
                self.warp.local[at..at + from.len()].copy_from_slice(from);
                Ok(())
            }
            Space::Const => Err(Problem::Trap { what: "a store to constant memory" }),
            Space::Generic | Space::Global => {
                let by = accessor_of_global(self.grid, self.block, self.shared, self.warp, lane);
                self.memory.check_write(address, bytes, atomic, &by)?.copy_from_slice(from);
                Ok(())
            }
        }
    }

    /// Reads without being an access: the check is that of the write that follows.
    pub fn peek(&mut self, space: Space, address: u64, lane: usize, to: &mut [u8]) -> Result<(), Problem> {
        match resolve(space, address) {
            (Space::Shared, at) => {
                let at = self.shared_range(at, to.len(), Access::Atomic)?;
                to.copy_from_slice(&self.shared.bytes[at..at + to.len()]);
                Ok(())
            }
            (Space::Global, at) => {
                to.copy_from_slice(self.memory.peek(at, to.len() as u64)?);
                Ok(())
            }
            _ => self.fetch(space, address, u32::MAX, lane, to),
        }
    }

    pub fn load(
        &mut self,
        space: Space,
        to: &[Option<(Register, u32)>],
        ty: Type,
        address: &Address,
        used: u32,
        lanes: u32,
    ) -> Outcome<()> {
        let addresses = self.addresses(address);
        let each_bytes = ty.bytes() as usize;
        let bytes = each_bytes * to.len();
        let mut rows = [[0; LANES]; 4];
        for lane in each(lanes) {
            let mut data = [0; WIDEST];
            let data = &mut data[..bytes];
            self.fetch(space, addresses[lane], used, lane, data).map_err(|problem| (problem, lane))?;
            for (row, part) in rows.iter_mut().zip(data.chunks_exact(each_bytes)) {
                row[lane] = match *part {
                    [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
                    [a, b] => u16::from_le_bytes([a, b]).into(),
                    [a] => a.into(),
                    _ => {
                        let mut value = [0; 8];
                        value[..each_bytes].copy_from_slice(part);
                        u64::from_le_bytes(value)
                    }
                };
            }
        }
        for (row, target) in rows.iter_mut().zip(to) {
            let Some((d, width)) = *target else { continue };
            if ty.is_signed() && ty.bits < width {
                for value in row.iter_mut() {
                    *value = signed(*value, ty.bits) as u64 & mask(width);
                }
            }
            self.warp.put(d, lanes, row);
        }
        self.count(space, &addresses, bytes, lanes, false);
        Ok(())
    }

    pub fn store(
        &mut self,
        space: Space,
        from: &[Source],
        ty: Type,
        address: &Address,
        lanes: u32,
    ) -> Outcome<()> {
        let addresses = self.addresses(address);
        let each_bytes = ty.bytes() as usize;
        let bytes = each_bytes * from.len();
        for lane in each(lanes) {
            let mut data = [0; WIDEST];
            for (part, source) in data.chunks_exact_mut(each_bytes).zip(from) {
                part.copy_from_slice(&self.row(*source)[lane].to_le_bytes()[..each_bytes]);
            }
            self.put_bytes(space, addresses[lane], &data[..bytes], lane, false)
                .map_err(|problem| (problem, lane))?;
        }
        self.count(space, &addresses, bytes, lanes, true);
        Ok(())
    }

    /// Counts what the accesses of a warp cost.
    fn count(&mut self, space: Space, addresses: &Row, bytes: usize, lanes: u32, store: bool) {
        let first = addresses[lanes.trailing_zeros() as usize];
        match resolve(space, first).0 {
            Space::Global => self.count_global(addresses, bytes as u64, lanes, store),
            Space::Shared => {
                let conflicts = bank_conflicts(addresses, bytes as u64, lanes);
                let traffic =
                    if store { &mut self.counts.shared_stores } else { &mut self.counts.shared_loads };
                traffic.instructions += 1;
                traffic.conflicts += conflicts;
            }
            _ => {}
        }
    }

    fn count_global(&mut self, addresses: &Row, bytes: u64, lanes: u32, store: bool) {
        let mut sectors = [0; 2 * LANES];
        let mut found = 0;
        for lane in each(lanes) {
            let (first, last) = (addresses[lane] / SECTOR, (addresses[lane] + bytes - 1) / SECTOR);
            for sector in first..=last {
                if found == 0 || sectors[found - 1] != sector {
                    sectors[found] = sector;
                    found += 1;
                }
            }
        }
        let sectors = &mut sectors[..found];
        sectors.sort_unstable();
        let mut traffic =
            Traffic { instructions: 1, bytes: bytes * u64::from(lanes.count_ones()), ..Traffic::default() };
        let mut before = None;
        for &sector in sectors.iter() {
            if before != Some(sector) {
                traffic.sectors += 1;
                let first = self.memory.first_touch(sector * SECTOR, store, self.grid.op.id);
                traffic.distinct_sectors += u64::from(first);
            }
            before = Some(sector);
        }
        *(if store { &mut self.counts.global_stores } else { &mut self.counts.global_loads }) += traffic;
    }

    pub fn copy_async(
        &mut self,
        to: &Address,
        from: &Address,
        bytes: u32,
        source_bytes: Option<Source>,
        lanes: u32,
    ) -> Outcome<()> {
        let (to, from) = (self.addresses(to), self.addresses(from));
        let whole = u64::from(bytes);
        let sizes =
            source_bytes.map_or([whole; LANES], |source| self.row(source).map(|size| size & mask(32)));
        let mut readers = 0;
        for lane in each(lanes) {
            let at = |problem| (problem, lane);
            let read = sizes[lane].min(whole) as usize;
            let mut data = [0; 16];
            aligned(Space::Shared, to[lane], whole, Access::Write).map_err(at)?;
            if read > 0 {
                readers |= 1 << lane;
                aligned(Space::Global, from[lane], whole, Access::Read).map_err(at)?;
                let by = accessor_of_global(self.grid, self.block, self.shared, self.warp, lane);
                let found = self.memory.check_read(from[lane], read as u64, u32::MAX, &by).map_err(at)?;
                data[..read].copy_from_slice(found);
            }
            let offset = self.shared_range(to[lane], bytes as usize, Access::Write).map_err(at)?;
            let by = accessor(self.grid, self.block, self.shared.time, self.warp, lane);
            let shared = &mut *self.shared;
            let begun = shared.shadow.begin_copy(offset, bytes as usize, &by, &shared.sets);
            begun.map_err(|(at, finding)| {
                (finding.into_problem(Access::Write, "shared", at as u64, Self::name_of_none), lane)
            })?;
            self.warp.copies.push(Copy { lane, to: offset, bytes: bytes as usize, data, group: None });
        }
        if readers != 0 {
            self.count_global(&from, whole, readers, false);
        }
        self.counts.shared_stores.instructions += 1;
        self.counts.shared_stores.conflicts += bank_conflicts(&to, whole, lanes);
        Ok(())
    }

    pub fn commit_copies(&mut self, lanes: u32) {
        for copy in &mut self.warp.copies {
            if lanes >> copy.lane & 1 == 1 && copy.group.is_none() {
                copy.group = Some(self.warp.committed[copy.lane]);
            }
        }
        for lane in each(lanes) {
            self.warp.committed[lane] += 1;
        }
    }

    /// Puts the bytes of copies in place: all but the `newest` groups, or all, committed or not.
    pub fn finish_copies(&mut self, lanes: u32, newest: Option<u32>) {
        let mut copies = std::mem::take(&mut self.warp.copies);
        copies.retain(|copy| {
            let done = match (newest, copy.group) {
                (None, _) => true,
                (Some(newest), Some(group)) => group.saturating_add(newest) < self.warp.committed[copy.lane],
                (Some(_), None) => false,
            };
            if lanes >> copy.lane & 1 == 0 || !done {
                return true;
            }
            let by = accessor(self.grid, self.block, self.shared.time, self.warp, copy.lane);
            self.shared.shadow.end_copy(copy.to, copy.bytes, &by);
            self.shared.bytes[copy.to..copy.to + copy.bytes].copy_from_slice(&copy.data[..copy.bytes]);
            false
        });
        self.warp.copies = copies;
    }

    pub fn load_matrix(
        &mut self,
        to: &[Register],
        transposed: bool,
        address: &Address,
        lanes: u32,
    ) -> Outcome<()> {
        let addresses = self.addresses(address);
        let mut matrices = [[0u16; 64]; 4];
        for (number, matrix) in matrices.iter_mut().enumerate().take(to.len()) {
            for (row, values) in matrix.chunks_exact_mut(8).enumerate() {
                // Lane 8·number + row has the address of the row.
                let lane = number * 8 + row;
                let at = |problem| (problem, lane);
                let (space, address) = resolve(Space::Shared, addresses[lane]);
                aligned(space, address, 16, Access::Read).map_err(at)?;
                let mut data = [0; 16];
                self.read_shared(address, u32::MAX, lane, &mut data).map_err(at)?;
                for (value, bytes) in values.iter_mut().zip(data.chunks_exact(2)) {
                    *value = u16::from_le_bytes([bytes[0], bytes[1]]);
                }
            }
            let group = 0xff << (8 * number);
            self.counts.shared_loads.conflicts += bank_conflicts(&addresses, 16, group);
        }
        self.counts.shared_loads.instructions += 1;
        for (d, matrix) in to.iter().zip(&matrices) {
            // Lane l has elements 2·(l % 4) and +1 of row l / 4.
            let row = std::array::from_fn(|lane| {
                let (row, column) = (lane / 4, lane % 4 * 2);
                let element = |row: usize, column: usize| {
                    u64::from(if transposed { matrix[column * 8 + row] } else { matrix[row * 8 + column] })
                };
                element(row, column) | element(row, column + 1) << 16
            });
            self.warp.put(*d, lanes, &row);
        }
        Ok(())
    }
}

/// # Errors
/// An address that is not a multiple of the access's size.
pub fn aligned(space: Space, address: u64, bytes: u64, access: Access) -> Result<(), Problem> {
    if address & (bytes - 1) == 0 {
        return Ok(());
    }
    Err(Problem::Misaligned { access, space: name(space), address, bytes })
}

fn name(space: Space) -> &'static str {
    match space {
        Space::Generic | Space::Global => "global",
        Space::Const => "constant",
        Space::Shared => "shared",
        Space::Local => "local",
        Space::Param => "parameter",
    }
}

/// Passes that an access of shared memory takes beyond the fewest. 32 banks of 4 bytes; accesses of 8 and 16
/// bytes go by half and quarter warps; lanes that want the same word share it.
fn bank_conflicts(addresses: &Row, bytes: u64, lanes: u32) -> u64 {
    let words = bytes.div_ceil(4);
    let together = (LANES as u64 / words) as usize;
    let phases =
        (0..LANES / together).map(|phase| lanes & (mask(together as u32) as u32) << (phase * together));
    // Most often no bank is asked for two words.
    let alone = phases.clone().all(|lanes| {
        let mut by_banks = [u64::MAX; LANES];
        each(lanes).all(|lane| {
            let place = addresses[lane] / (4 * words);
            let wanted = &mut by_banks[place as usize % together];
            let same = *wanted == u64::MAX || *wanted == place;
            *wanted = place;
            same
        })
    });
    if alone {
        return 0;
    }
    let mut extra = 0;
    for lanes in phases {
        let mut wanted = [0u64; LANES];
        let mut found = 0;
        for lane in each(lanes) {
            for word in 0..words {
                wanted[found] = addresses[lane] / 4 + word;
                found += 1;
            }
        }
        let wanted = &mut wanted[..found];
        wanted.sort_unstable();
        let mut by_bank = [0u64; 32];
        let mut before = None;
        for &word in wanted.iter() {
            if before != Some(word) {
                by_bank[(word % 32) as usize] += 1;
            }
            before = Some(word);
        }
        extra += by_bank.into_iter().max().unwrap_or(0).saturating_sub(1);
    }
    extra
}
