//! Who wrote and who read each byte last, and whether it was written at all.
//!
//! As in FastTrack (Flanagan and Freund, 2009) one last write and one last read are kept where accesses are
//! ordered; reads that are not ordered are kept as a set of warps, a mark for several blocks, or a set of
//! operations.

use std::cell::Cell;
use std::collections::HashMap;

use super::Op;
use super::handover::Taken;
use crate::exec::{Access, Problem};

/// Bytes of a chunk: one cell until an access needs finer ones.
const CHUNK: usize = 4096;
/// Of the largest cells that an access makes: 16 bytes, the most that a thread moves at a time.
const COARSE: u32 = 4;

const NOBODY: u32 = u32::MAX;
/// How many answers of `happens_before` are remembered.
const KNOWN: usize = 8;
/// Of `Reading::op`: the rest is the number of a set.
const SET: u32 = 1 << 31;
const SEVERAL_BLOCKS: u32 = u32::MAX;
const SEVERAL_THREADS: u16 = u16::MAX;

/// A thread that accesses memory.
#[derive(Clone, Copy)]
pub struct Thread<'a> {
    /// Number of its block in the grid.
    pub block: u32,
    /// Number in the block.
    pub number: u16,
    /// The block's time: it goes up with each arrival at a barrier.
    pub time: u32,
    /// By warp: the time before which this thread's warp has seen its accesses.
    pub seen: &'a [u32],
    /// What its block took over from other blocks; none where other blocks cannot come.
    pub taken: Option<&'a Taken>,
}

impl Thread<'_> {
    /// Whether what another block did at `time` is ordered before this thread's accesses.
    fn took_over(&self, block: u32, time: u32) -> bool {
        let Some(taken) = self.taken else { return false };
        match block {
            // Blocks run in order, so these are all that there were.
            SEVERAL_BLOCKS => taken.len() == self.block as usize,
            _ => taken.get(&block).is_some_and(|&until| time < until),
        }
    }
}

/// The operation that accesses memory, and what comes before it.
pub struct Order<'a> {
    pub op: &'a Op<'a>,
    /// The last answers of `happens_before`, by the operation's number modulo their count.
    known: [Cell<(u32, bool)>; KNOWN],
}

impl<'a> Order<'a> {
    pub fn new(op: &'a Op<'a>) -> Order<'a> {
        Order { op, known: [const { Cell::new((NOBODY, true)) }; KNOWN] }
    }

    fn after(&self, other: u32) -> bool {
        let known = &self.known[other as usize % KNOWN];
        let (op, answer) = known.get();
        if op == other {
            return answer;
        }
        let answer = (self.op.happens_before)(other);
        known.set((other, answer));
        answer
    }

    /// Whether the other is already known to come before. `false` says nothing.
    #[inline(always)]
    fn surely_after(&self, other: u32) -> bool {
        self.known[other as usize % KNOWN].get() == (other, true)
    }
}

#[derive(Clone, Copy)]
pub struct Accessor<'a> {
    pub order: &'a Order<'a>,
    /// None: a copy, not a kernel.
    pub thread: Option<Thread<'a>>,
}

#[derive(Clone, Copy)]
struct Writing {
    op: u32,
    block: u32,
    time: u32,
    thread: u16,
    atomic: bool,
}

#[derive(Clone, Copy)]
struct Reading {
    op: u32,
    block: u32,
    time: u32,
    warps: u32,
    thread: u16,
}

#[derive(Clone, Copy)]
struct State {
    writing: Writing,
    reading: Reading,
    written: bool,
    /// A `cp.async` is under way.
    pending: bool,
}

const FRESH: State = State {
    writing: Writing { op: NOBODY, block: 0, time: 0, thread: 0, atomic: false },
    reading: Reading { op: NOBODY, block: 0, time: 0, warps: 0, thread: 0 },
    written: false,
    pending: false,
};

#[derive(Clone)]
struct Chunk {
    /// A cell has 2^grain bytes.
    grain: u32,
    cells: Vec<State>,
}

/// The shadow of one range of memory.
#[derive(Clone)]
pub struct Shadow {
    chunks: Vec<Chunk>,
}

/// Sets of operations that read without being ordered.
#[derive(Default)]
pub struct Sets {
    sets: Vec<Vec<u32>>,
    numbers: HashMap<Vec<u32>, u32>,
}

impl Sets {
    fn members(&self, op: u32) -> Vec<u32> {
        if op & SET == 0 { vec![op] } else { self.sets[(op & !SET) as usize].clone() }
    }

    /// The readers so far, less those before the new one, and the new one.
    fn join(&mut self, op: u32, order: &Order) -> u32 {
        let mut members = self.members(op);
        members.retain(|&member| member != order.op.id && !order.after(member));
        if members.is_empty() {
            return order.op.id;
        }
        members.push(order.op.id);
        members.sort_unstable();
        let next = self.sets.len() as u32;
        let number = *self.numbers.entry(members.clone()).or_insert(next);
        if number == next {
            self.sets.push(members);
        }
        SET | number
    }
}

/// What an access found, before it is told where.
#[derive(Debug, PartialEq, Eq)]
pub enum Finding {
    Uninitialised,
    Race { other: Other },
}

/// The other party of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    /// An operation that is not ordered before this one.
    Operation {
        id: u32,
        wrote: bool,
    },
    Block {
        number: u32,
        wrote: bool,
    },
    SeveralBlocks,
    Thread {
        number: u16,
        wrote: bool,
    },
    SeveralThreads,
    Copy,
}

impl Other {
    /// In words; `name` names operations.
    pub fn describe(self, name: impl Fn(u32) -> String) -> String {
        let did = |wrote| if wrote { "write" } else { "read" };
        match self {
            Other::Operation { id, wrote } => {
                format!("the {} of {}, which is not ordered with it", did(wrote), name(id))
            }
            Other::Block { number, wrote } => format!("the {} of block number {number}", did(wrote)),
            Other::SeveralBlocks => "reads of several blocks".to_owned(),
            Other::Thread { number, wrote } => {
                format!("the {} of thread number {number} of the block, with no barrier between", did(wrote))
            }
            Other::SeveralThreads => {
                "reads of several threads of the block, with no barrier between".to_owned()
            }
            Other::Copy => "a cp.async that was not waited for".to_owned(),
        }
    }
}

impl Accessor<'_> {
    fn check_write(&self, writing: &Writing, atomic: bool) -> Result<(), Finding> {
        if writing.op == NOBODY {
            return Ok(());
        }
        let op = self.order.op.id;
        if writing.op != op {
            let other = Other::Operation { id: writing.op, wrote: true };
            return if self.order.after(writing.op) { Ok(()) } else { Err(Finding::Race { other }) };
        }
        let Some(thread) = &self.thread else { return Ok(()) };
        if atomic && writing.atomic {
            return Ok(());
        }
        if writing.block != thread.block {
            if thread.took_over(writing.block, writing.time) {
                return Ok(());
            }
            let other = Other::Block { number: writing.block, wrote: true };
            return Err(Finding::Race { other });
        }
        if writing.thread == thread.number || writing.time < thread.seen[usize::from(writing.thread / 32)] {
            return Ok(());
        }
        Err(Finding::Race { other: Other::Thread { number: writing.thread, wrote: true } })
    }

    fn check_read(&self, reading: &Reading, sets: &Sets) -> Result<(), Finding> {
        if reading.op == NOBODY {
            return Ok(());
        }
        let op = self.order.op.id;
        if reading.op != op {
            let race = |id| Err(Finding::Race { other: Other::Operation { id, wrote: false } });
            if reading.op & SET == 0 {
                return if self.order.after(reading.op) { Ok(()) } else { race(reading.op) };
            }
            return match sets.members(reading.op).into_iter().find(|&id| id == op || !self.order.after(id)) {
                Some(id) => race(id),
                None => Ok(()),
            };
        }
        let Some(thread) = &self.thread else { return Ok(()) };
        if reading.block != thread.block {
            if thread.took_over(reading.block, reading.time) {
                return Ok(());
            }
            let other = match reading.block {
                SEVERAL_BLOCKS => Other::SeveralBlocks,
                number => Other::Block { number, wrote: false },
            };
            return Err(Finding::Race { other });
        }
        if reading.thread == thread.number {
            return Ok(());
        }
        let mut warps = reading.warps;
        while warps != 0 {
            let warp = warps.trailing_zeros() as usize;
            warps &= warps - 1;
            if reading.time >= thread.seen[warp] {
                let other = match reading.thread {
                    SEVERAL_THREADS => Other::SeveralThreads,
                    number => Other::Thread { number, wrote: false },
                };
                return Err(Finding::Race { other });
            }
        }
        Ok(())
    }

    fn note_read(&self, reading: &mut Reading, sets: &mut Sets) {
        let op = self.order.op.id;
        let (block, number, time) =
            self.thread.map_or((0, 0, 0), |thread| (thread.block, thread.number, thread.time));
        let warp = 1 << (number / 32);
        let new = Reading { op, block, time, warps: warp, thread: number };
        if reading.op == op {
            if reading.block != block {
                reading.block = SEVERAL_BLOCKS;
            } else if reading.thread != number {
                let seen = self.thread.is_some_and(|thread| {
                    let mut warps = reading.warps;
                    while warps != 0 && reading.time < thread.seen[warps.trailing_zeros() as usize] {
                        warps &= warps - 1;
                    }
                    warps == 0
                });
                if seen {
                    *reading = new;
                } else {
                    *reading = Reading { thread: SEVERAL_THREADS, warps: reading.warps | warp, ..new };
                }
            } else {
                reading.time = time;
            }
        } else if reading.op == NOBODY || reading.op & SET == 0 && self.order.after(reading.op) {
            *reading = new;
        } else {
            *reading = Reading { op: sets.join(reading.op, self.order), ..new };
        }
    }

    /// Whether the write is known at a glance to come before. `false` says nothing.
    #[inline(always)]
    fn surely_after(&self, writing: &Writing) -> bool {
        if writing.op != self.order.op.id {
            return self.order.surely_after(writing.op);
        }
        self.thread.is_some_and(|thread| {
            writing.block == thread.block
                && (writing.thread == thread.number
                    || writing.time < thread.seen[usize::from(writing.thread / 32)])
        })
    }

    /// Reads in the case that is by far the most frequent. `false`: nothing was done.
    #[inline(always)]
    fn read_quickly(&self, cell: &mut State) -> bool {
        let Some(thread) = &self.thread else { return false };
        if cell.pending || !cell.written || !self.surely_after(&cell.writing) {
            return false;
        }
        let reading = &mut cell.reading;
        let warp = 1 << (thread.number / 32);
        let is_first = reading.op == NOBODY
            || reading.op != self.order.op.id && reading.op & SET == 0 && self.order.surely_after(reading.op);
        if is_first {
            let (op, block, time, number) = (self.order.op.id, thread.block, thread.time, thread.number);
            *reading = Reading { op, block, time, warps: warp, thread: number };
            return true;
        }
        if reading.op != self.order.op.id || reading.block != thread.block {
            // More blocks than several are several.
            return reading.op == self.order.op.id && reading.block == SEVERAL_BLOCKS;
        }
        if reading.thread == thread.number {
            reading.time = thread.time;
            return true;
        }
        reading.thread == SEVERAL_THREADS && reading.time == thread.time && reading.warps & warp != 0
    }

    /// Writes in the most frequent case, over what the same thread or an operation before had written and
    /// nobody else read since. `false`: nothing was done.
    #[inline(always)]
    fn write_quickly(&self, cell: &mut State) -> bool {
        let Some(thread) = &self.thread else { return false };
        let Reading { op, block, time, warps, .. } = cell.reading;
        let read_before = match op {
            NOBODY => true,
            _ if op == self.order.op.id => {
                block == thread.block
                    && warps.is_power_of_two()
                    && (cell.reading.thread == thread.number
                        || time < thread.seen[warps.trailing_zeros() as usize])
            }
            _ => op & SET == 0 && self.order.surely_after(op),
        };
        let written_before = cell.writing.op == NOBODY || self.surely_after(&cell.writing);
        if cell.pending || !read_before || !written_before {
            return false;
        }
        cell.writing = self.writing(false);
        cell.reading = FRESH.reading;
        cell.written = true;
        true
    }

    #[inline(always)]
    fn writing(&self, atomic: bool) -> Writing {
        let (block, thread, time) =
            self.thread.map_or((0, 0, 0), |thread| (thread.block, thread.number, thread.time));
        Writing { op: self.order.op.id, block, time, thread, atomic }
    }
}

impl Shadow {
    pub fn new(bytes: usize) -> Shadow {
        Shadow {
            chunks: vec![Chunk { grain: CHUNK.trailing_zeros(), cells: vec![FRESH] }; bytes.div_ceil(CHUNK)],
        }
    }

    /// The memory comes to be by an operation: all accesses must come after it, though it wrote nothing.
    pub fn begin(&mut self, by: &Accessor) {
        for cell in self.chunks.iter_mut().flat_map(|chunk| &mut chunk.cells) {
            cell.writing = by.writing(false);
        }
    }

    /// Forgets everything but how fine the cells are.
    pub fn clear(&mut self) {
        for chunk in &mut self.chunks {
            chunk.cells.fill(FRESH);
        }
    }

    /// The cells of an access that lies in one chunk and covers whole cells of it.
    #[inline(always)]
    fn cells(&mut self, from: usize, bytes: usize) -> Option<&mut [State]> {
        let chunk = self.chunks.get_mut(from / CHUNK)?;
        let (start, end) = (from % CHUNK, from % CHUNK + bytes);
        let whole = (start | end).trailing_zeros() >= chunk.grain && end <= CHUNK;
        if whole { chunk.cells.get_mut(start >> chunk.grain..end >> chunk.grain) } else { None }
    }

    /// Calls `each` with the cells of a range and the offset of their first byte.
    fn visit<E>(
        &mut self,
        from: usize,
        bytes: usize,
        mut each: impl FnMut(&mut State, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut at, end) = (from, from + bytes);
        while at < end {
            let chunk = &mut self.chunks[at / CHUNK];
            let (start, stop) = (at % CHUNK, (end - at + at % CHUNK).min(CHUNK));
            let fine = ((start | stop) as u32 | 1 << 12).trailing_zeros();
            if fine < chunk.grain {
                chunk.split(fine.min(COARSE));
            }
            let grain = chunk.grain;
            let base = at - start;
            for (index, cell) in chunk.cells[start >> grain..stop >> grain].iter_mut().enumerate() {
                each(cell, base + (((start >> grain) + index) << grain), 1 << grain)?;
            }
            at = base + stop;
        }
        Ok(())
    }

    /// `used`: a bit for each byte of the access that matters; `u32::MAX`: all.
    pub fn read(
        &mut self,
        from: usize,
        bytes: usize,
        used: u32,
        by: &Accessor,
        sets: &mut Sets,
    ) -> Result<(), (usize, Finding)> {
        if used == u32::MAX
            && let Some(cells) = self.cells(from, bytes)
            && cells.iter_mut().all(|cell| by.read_quickly(cell))
        {
            return Ok(());
        }
        self.visit(from, bytes, |cell, at, size| {
            if used != u32::MAX && size < 32 && used >> (at - from) & ((1 << size) - 1) == 0 {
                return Ok(());
            }
            if cell.pending {
                return Err((at, Finding::Race { other: Other::Copy }));
            }
            by.check_write(&cell.writing, false).map_err(|finding| (at, finding))?;
            if !cell.written {
                return Err((at, Finding::Uninitialised));
            }
            by.note_read(&mut cell.reading, sets);
            Ok(())
        })
    }

    pub fn write(
        &mut self,
        from: usize,
        bytes: usize,
        atomic: bool,
        by: &Accessor,
        sets: &Sets,
    ) -> Result<(), (usize, Finding)> {
        if !atomic
            && let Some(cells) = self.cells(from, bytes)
            && cells.iter_mut().all(|cell| by.write_quickly(cell))
        {
            return Ok(());
        }
        self.visit(from, bytes, |cell, at, _| {
            if cell.pending {
                return Err((at, Finding::Race { other: Other::Copy }));
            }
            by.check_write(&cell.writing, atomic).map_err(|finding| (at, finding))?;
            by.check_read(&cell.reading, sets).map_err(|finding| (at, finding))?;
            if atomic && !cell.written {
                return Err((at, Finding::Uninitialised));
            }
            cell.writing = by.writing(atomic);
            cell.reading = FRESH.reading;
            cell.written = true;
            Ok(())
        })
    }

    /// Checks for a race without being an access: what frees memory must come after all who used it.
    pub fn check_all(&mut self, bytes: usize, by: &Accessor, sets: &Sets) -> Result<(), (usize, Finding)> {
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            for (index, cell) in chunk.cells.iter_mut().enumerate() {
                let at = number * CHUNK + (index << chunk.grain);
                if at < bytes {
                    by.check_write(&cell.writing, false).map_err(|finding| (at, finding))?;
                    by.check_read(&cell.reading, sets).map_err(|finding| (at, finding))?;
                }
            }
        }
        Ok(())
    }

    /// Marks bytes that a `cp.async` will write.
    pub fn begin_copy(
        &mut self,
        from: usize,
        bytes: usize,
        by: &Accessor,
        sets: &Sets,
    ) -> Result<(), (usize, Finding)> {
        self.write(from, bytes, false, by, sets)?;
        self.mark(from, bytes, |cell| cell.pending = true);
        Ok(())
    }

    /// The bytes are there, for the thread that waited.
    pub fn end_copy(&mut self, from: usize, bytes: usize, by: &Accessor) {
        self.mark(from, bytes, |cell| {
            cell.pending = false;
            cell.writing = by.writing(false);
        });
    }

    fn mark(&mut self, from: usize, bytes: usize, mut change: impl FnMut(&mut State)) {
        if let Some(cells) = self.cells(from, bytes) {
            return cells.iter_mut().for_each(change);
        }
        let done: Result<(), std::convert::Infallible> = self.visit(from, bytes, |cell, _, _| {
            change(cell);
            Ok(())
        });
        let Ok(()) = done;
    }
}

impl Chunk {
    fn split(&mut self, grain: u32) {
        let each = 1 << (self.grain - grain);
        let mut cells = Vec::with_capacity(self.cells.len() * each);
        self.cells.iter().for_each(|&cell| cells.extend(std::iter::repeat_n(cell, each)));
        self.cells = cells;
        self.grain = grain;
    }
}

impl Finding {
    /// The finding with what a report needs.
    pub fn into_problem(
        self,
        access: Access,
        space: &'static str,
        address: u64,
        name: impl Fn(u32) -> String,
    ) -> Problem {
        match self {
            Finding::Uninitialised => Problem::Uninitialised { space, address },
            Finding::Race { other } => Problem::Race { access, space, address, other: other.describe(name) },
        }
    }
}
