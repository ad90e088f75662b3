//! A device's memory, and the watch over it: bounds, lifetime, initialisation, order.

pub(crate) mod shadow;

use std::collections::{BTreeMap, HashMap};

use crate::exec::{Access, Fault, Problem};
use shadow::{Accessor, Order, Sets, Shadow};

/// One piece of work of a device, as memory sees it.
pub struct Op<'a> {
    pub id: u32,
    /// Whether an earlier operation is ordered before this one.
    pub happens_before: &'a dyn Fn(u32) -> bool,
    pub name: &'a str,
}

/// Allocations begin at multiples of this, bytes.
const ALIGN: u64 = 256;
/// Bytes between allocations that belong to none.
const RED_ZONE: u64 = 256;
const FIRST: u64 = 0x7_0000_0000;
/// Cards move memory in sectors of so many bytes.
pub(crate) const SECTOR: u64 = 32;

pub(crate) struct Allocation {
    base: u64,
    size: u64,
    bytes: Vec<u8>,
    shadow: Shadow,
    /// By sector: the operation (plus one) that loaded, and stored, it last.
    sectors: Vec<[u32; 2]>,
    freed_by: Option<String>,
}

/// Addresses are never given twice, so a pointer to freed memory stays recognisable.
#[derive(Default)]
pub struct DeviceMemory {
    allocations: Vec<Allocation>,
    by_base: BTreeMap<u64, usize>,
    /// The allocation found last.
    last: usize,
    end: u64,
    sets: Sets,
    names: HashMap<u32, String>,
}

impl DeviceMemory {
    /// Memory whose addresses begin at `first`: that of several devices has none in common.
    pub fn starting_at(first: u64) -> DeviceMemory {
        DeviceMemory { end: first, ..DeviceMemory::default() }
    }

    /// The address of `bytes` bytes that nobody wrote yet.
    pub fn alloc(&mut self, bytes: u64) -> u64 {
        let base = self.end.max(FIRST);
        self.end = (base + bytes + RED_ZONE).next_multiple_of(ALIGN);
        self.by_base.insert(base, self.allocations.len());
        self.allocations.push(Allocation {
            base,
            size: bytes,
            bytes: vec![0; bytes as usize],
            shadow: Shadow::new(bytes as usize),
            sectors: vec![[0; 2]; bytes.div_ceil(SECTOR) as usize],
            freed_by: None,
        });
        base
    }

    /// Addresses and sizes of what is allocated.
    pub fn live(&self) -> impl Iterator<Item = (u64, u64)> {
        self.allocations.iter().filter(|found| found.freed_by.is_none()).map(|found| (found.base, found.size))
    }

    /// # Errors
    /// An address that is no allocation's first; operations that use the memory and are not ordered before.
    pub fn free(&mut self, address: u64, op: &Op) -> Result<(), Fault> {
        self.note(op);
        let index = self.find(address, 0, Access::Free).map_err(|problem| fault(problem, op))?;
        let names = &self.names;
        let allocation = &mut self.allocations[index];
        if allocation.base != address {
            let nearest = format!("inside an allocation that begins at {:#x}", allocation.base);
            let problem =
                Problem::OutOfBounds { access: Access::Free, space: "global", address, bytes: 0, nearest };
            return Err(fault(problem, op));
        }
        let order = Order::new(op);
        let by = Accessor { order: &order, thread: None };
        let checked = allocation.shadow.check_all(allocation.size as usize, &by, &self.sets);
        allocation.freed_by = Some(op.name.to_owned());
        allocation.bytes = Vec::new();
        allocation.shadow = Shadow::new(0);
        allocation.sectors = Vec::new();
        checked.map_err(|(at, finding)| {
            let name = |id| name_of(names, id);
            fault(finding.into_problem(Access::Free, "global", address + at as u64, name), op)
        })
    }

    /// Copies from the device.
    ///
    /// # Errors
    /// Bytes outside an allocation, not written, or written by an operation that is not ordered before.
    pub fn read(&mut self, address: u64, to: &mut [u8], op: &Op) -> Result<(), Fault> {
        self.note(op);
        let order = Order::new(op);
        let by = Accessor { order: &order, thread: None };
        let from =
            self.check_read(address, to.len() as u64, u32::MAX, &by).map_err(|problem| fault(problem, op))?;
        to.copy_from_slice(from);
        Ok(())
    }

    /// Copies to the device.
    ///
    /// # Errors
    /// Bytes outside an allocation, or used by an operation that is not ordered before.
    pub fn write(&mut self, address: u64, from: &[u8], op: &Op) -> Result<(), Fault> {
        self.note(op);
        let order = Order::new(op);
        let by = Accessor { order: &order, thread: None };
        let bytes = from.len() as u64;
        let to = self.check_write(address, bytes, false, &by).map_err(|problem| fault(problem, op))?;
        to.copy_from_slice(from);
        Ok(())
    }

    /// Writes `count` times the bytes of `value`.
    ///
    /// # Errors
    /// As for [`DeviceMemory::write`].
    pub fn set(&mut self, address: u64, value: &[u8], count: u64, op: &Op) -> Result<(), Fault> {
        self.note(op);
        let order = Order::new(op);
        let by = Accessor { order: &order, thread: None };
        let bytes = value.len() as u64 * count;
        let to = self.check_write(address, bytes, false, &by).map_err(|problem| fault(problem, op))?;
        // A byte at a time would take seconds for what a device zeroes at its start.
        let block = value.repeat((4096 / value.len()).max(1));
        to.chunks_mut(block.len()).for_each(|chunk| chunk.copy_from_slice(&block[..chunk.len()]));
        Ok(())
    }

    /// # Errors
    /// As for [`DeviceMemory::read`] and [`DeviceMemory::write`].
    pub fn copy(&mut self, to: u64, from: u64, bytes: u64, op: &Op) -> Result<(), Fault> {
        let mut data = vec![0; bytes as usize];
        self.read(from, &mut data, op)?;
        self.write(to, &data, op)
    }

    /// Remembers the operation's name for reports about later ones.
    pub(crate) fn note(&mut self, op: &Op) {
        if !self.names.contains_key(&op.id) {
            self.names.insert(op.id, op.name.to_owned());
        }
    }

    /// The allocation that has all of the bytes.
    fn find(&mut self, address: u64, bytes: u64, access: Access) -> Result<usize, Problem> {
        let holds = |found: &Allocation| {
            address >= found.base
                && address.checked_add(bytes).is_some_and(|end| end <= found.base + found.size)
                && found.freed_by.is_none()
        };
        if self.allocations.get(self.last).is_some_and(holds) {
            return Ok(self.last);
        }
        let before = self.by_base.range(..=address).next_back().map(|(_, &index)| index);
        if let Some(index) = before
            && holds(&self.allocations[index])
        {
            self.last = index;
            return Ok(index);
        }
        Err(self.not_there(address, bytes, access, before))
    }

    fn not_there(&self, address: u64, bytes: u64, access: Access, before: Option<usize>) -> Problem {
        let before = before.map(|index| &self.allocations[index]);
        if let Some(found) = before
            && let Some(freed_by) = &found.freed_by
            && address < found.base + found.size.max(1)
        {
            return Problem::UseAfterFree { access, address, bytes, freed_by: freed_by.clone() };
        }
        let after = self.by_base.range(address..).next().map(|(_, &index)| &self.allocations[index]);
        let mut nearest = Vec::new();
        if let Some(found) = before {
            let past = (address + bytes) as i128 - (found.base + found.size) as i128;
            nearest
                .push(format!("ends {past} bytes past the end of {} bytes at {:#x}", found.size, found.base));
        }
        if let Some(found) = after
            && found.base - address <= RED_ZONE
        {
            let ahead = found.base - address;
            nearest.push(format!("{ahead} bytes before {} bytes at {:#x}", found.size, found.base));
        }
        if nearest.is_empty() {
            nearest.push("no allocation is near".to_owned());
        }
        Problem::OutOfBounds { access, space: "global", address, bytes, nearest: nearest.join(", ") }
    }

    /// The bytes, if the access is in order; it is noted.
    pub(crate) fn check_read(
        &mut self,
        address: u64,
        bytes: u64,
        used: u32,
        by: &Accessor,
    ) -> Result<&[u8], Problem> {
        let index = self.find(address, bytes, Access::Read)?;
        let allocation = &mut self.allocations[index];
        let at = (address - allocation.base) as usize;
        match allocation.shadow.read(at, bytes as usize, used, by, &mut self.sets) {
            Ok(()) => Ok(&allocation.bytes[at..at + bytes as usize]),
            Err((at, finding)) => {
                let address = allocation.base + at as u64;
                Err(finding.into_problem(Access::Read, "global", address, |id| name_of(&self.names, id)))
            }
        }
    }

    /// The bytes, unchecked but for bounds.
    pub(crate) fn peek(&mut self, address: u64, bytes: u64) -> Result<&[u8], Problem> {
        let index = self.find(address, bytes, Access::Atomic)?;
        let allocation = &self.allocations[index];
        let at = (address - allocation.base) as usize;
        Ok(&allocation.bytes[at..at + bytes as usize])
    }

    /// The bytes to write, if the access is in order; it is noted.
    pub(crate) fn check_write(
        &mut self,
        address: u64,
        bytes: u64,
        atomic: bool,
        by: &Accessor,
    ) -> Result<&mut [u8], Problem> {
        let access = if atomic { Access::Atomic } else { Access::Write };
        let index = self.find(address, bytes, access)?;
        let allocation = &mut self.allocations[index];
        let at = (address - allocation.base) as usize;
        match allocation.shadow.write(at, bytes as usize, atomic, by, &self.sets) {
            Ok(()) => Ok(&mut allocation.bytes[at..at + bytes as usize]),
            Err((at, finding)) => {
                let address = allocation.base + at as u64;
                Err(finding.into_problem(access, "global", address, |id| name_of(&self.names, id)))
            }
        }
    }

    /// Marks the sector of an address that was accessed; whether the operation had not touched it yet.
    pub(crate) fn first_touch(&mut self, address: u64, store: bool, op: u32) -> bool {
        let Ok(index) = self.find(address, 1, Access::Read) else { return false };
        let allocation = &mut self.allocations[index];
        let last =
            &mut allocation.sectors[((address - allocation.base) / SECTOR) as usize][usize::from(store)];
        let first = *last != op.wrapping_add(1);
        *last = op.wrapping_add(1);
        first
    }
}

fn name_of(names: &HashMap<u32, String>, id: u32) -> String {
    names.get(&id).cloned().unwrap_or_else(|| format!("operation {id}"))
}

fn fault(problem: Problem, op: &Op) -> Fault {
    Fault { problem, operation: op.name.to_owned(), place: None }
}
