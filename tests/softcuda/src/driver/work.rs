//! What a stream can be told to do, and the doing of it.

use std::ffi::c_void;
use std::sync::Arc;

use super::clock::{Clock, Mark, Stamp};
use super::host::{self, Pinned};
use super::inject::Kind;
use super::limits::Shape;
use super::machine::{Allocation, Device, Function, Guard, Machine};
use super::queue::{Operation, Reached};
use super::status::{Outcome, Status};
use crate::exec::{self, Fault, Launch, Problem};
use crate::memory::{self, DeviceMemory};

/// A function of the host that a stream calls (`CUhostFn`).
pub type HostFunction = unsafe extern "C" fn(*mut c_void);

/// One end of a copy.
#[derive(Clone)]
pub enum Place {
    Device(u64),
    /// Bytes taken from pageable memory when the call was made.
    Staged(Arc<[u8]>),
    /// Page-locked memory: read or written when the operation runs.
    Pinned {
        buffer: Arc<Pinned>,
        offset: usize,
    },
    /// Pageable memory that the caller, who waits, owns meanwhile.
    Pageable(usize),
    /// Memory of another device.
    Peer {
        ordinal: u8,
        address: u64,
    },
}

pub struct KernelCall {
    pub function: Arc<Function>,
    pub shape: Shape,
    pub parameters: Vec<u8>,
}

impl KernelCall {
    fn launch(&self, seed: u64) -> Launch<'_> {
        Launch {
            module: &self.function.ptx,
            kernel: &self.function.name,
            globals: &self.function.globals,
            grid: self.shape.grid,
            block: self.shape.block,
            dynamic_shared: self.shape.dynamic_shared,
            params: &self.parameters,
            seed,
            budget: exec::BUDGET,
        }
    }
}

#[derive(Clone)]
pub enum Work {
    /// A point that others wait for.
    Nothing,
    Reach(Reached),
    Kernel(Arc<KernelCall>),
    Copy {
        to: Place,
        from: Place,
        bytes: usize,
    },
    /// `count` times the `width` low bytes of `value`.
    Fill {
        at: u64,
        value: u32,
        width: usize,
        count: usize,
    },
    Free(u64),
    Host {
        function: HostFunction,
        argument: usize,
    },
}

impl Work {
    pub fn name(&self) -> &str {
        match self {
            Work::Nothing | Work::Reach(_) => "event",
            Work::Kernel(call) => &call.function.name,
            Work::Copy { to: Place::Device(_), from: Place::Device(_), .. } => "copy device to device",
            Work::Copy { to: Place::Device(_), from: Place::Peer { .. }, .. } => "copy from another device",
            Work::Copy { to: Place::Peer { .. }, .. } => "copy to another device",
            Work::Copy { to: Place::Device(_), .. } => "copy host to device",
            Work::Copy { .. } => "copy device to host",
            Work::Fill { .. } => "memset",
            Work::Free(_) => "free",
            Work::Host { .. } => "host function",
        }
    }

    /// Whether it runs outside the device's lock: host code, and copies that lock two devices.
    pub fn leaves_the_device(&self) -> bool {
        let peer = |place: &Place| matches!(place, Place::Peer { .. });
        match self {
            Work::Host { .. } => true,
            Work::Copy { to, from, .. } => peer(to) || peer(from),
            _ => false,
        }
    }

    /// Why a graph cannot hold it, if it cannot.
    pub fn not_for_graphs(&self) -> Option<&'static str> {
        match self {
            Work::Copy { to, from, .. } => [to, from].into_iter().find_map(|place| match place {
                Place::Staged(_) | Place::Pageable(_) => {
                    Some("a copy with pageable host memory cannot be repeated by a graph")
                }
                Place::Peer { .. } => Some("softcuda does not capture copies between devices"),
                _ => None,
            }),
            Work::Free(_) => Some("softcuda does not capture frees"),
            _ => None,
        }
    }

    /// Tells page-locked buffers who uses them.
    pub fn note_use(&self, stamp: &Stamp) {
        if let Work::Copy { to, from, .. } = self {
            if let Place::Pinned { buffer, .. } = from {
                buffer.note_read(stamp);
            }
            if let Place::Pinned { buffer, .. } = to {
                buffer.note_write(stamp);
            }
        }
    }

    /// The fingerprint of the page-locked source, if no operation that the host has not waited for writes it.
    pub fn settled_source(&self) -> Option<u64> {
        match self {
            Work::Copy { from: Place::Pinned { buffer, offset }, bytes, .. } if buffer.is_settled() => {
                Some(buffer.fingerprint(*offset, *bytes))
            }
            _ => None,
        }
    }
}

/// Why an operation failed: the code the driver gives for it, and the report.
struct Failure(Status, String);

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure(status_of(&fault.problem), fault.to_string())
    }
}

/// What a card says of a fault. Where a card would say nothing (a race, a read of what nobody wrote), the
/// context ends as by a failed kernel.
fn status_of(problem: &Problem) -> Status {
    match problem {
        Problem::OutOfBounds { .. } | Problem::UseAfterFree { .. } => Status::ILLEGAL_ADDRESS,
        Problem::Misaligned { .. } => Status::MISALIGNED_ADDRESS,
        Problem::Deadlock { .. } => Status::LAUNCH_TIMEOUT,
        Problem::Assertion { .. } => Status::ASSERT,
        Problem::Uninitialised { .. }
        | Problem::Race { .. }
        | Problem::DivergentBarrier { .. }
        | Problem::Trap { .. }
        | Problem::Launch { .. } => Status::LAUNCH_FAILED,
    }
}

const CHANGED: &str = "the host changed the page-locked source of a copy that it had not waited for";
const FREED: &str = "the page-locked buffer was freed before the copy ran";

impl Place {
    /// Reads host bytes.
    fn host_bytes(&self, bytes: usize) -> Result<Vec<u8>, Failure> {
        match self {
            Place::Staged(data) => Ok(data.to_vec()),
            Place::Pinned { buffer, .. } if buffer.is_freed() => {
                Err(Failure(Status::ILLEGAL_ADDRESS, FREED.into()))
            }
            Place::Pinned { buffer, offset } => {
                let mut data = vec![0; bytes];
                // SAFETY: the copy was checked to lie in the buffer, which `buffer` keeps alive. A host
                // thread that writes it meanwhile is the very bug this reads through.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        (buffer.address + offset) as *const u8,
                        data.as_mut_ptr(),
                        bytes,
                    );
                }
                Ok(data)
            }
            Place::Pageable(address) => {
                let mut data = vec![0; bytes];
                // SAFETY: the caller of the driver vouches for the memory, and waits for this.
                unsafe { std::ptr::copy_nonoverlapping(*address as *const u8, data.as_mut_ptr(), bytes) }
                Ok(data)
            }
            Place::Device(_) | Place::Peer { .. } => unreachable!("not host memory"),
        }
    }

    /// Writes host bytes.
    fn put_host_bytes(&self, data: &[u8]) -> Result<(), Failure> {
        let address = match self {
            Place::Pinned { buffer, .. } if buffer.is_freed() => {
                return Err(Failure(Status::ILLEGAL_ADDRESS, FREED.into()));
            }
            Place::Pinned { buffer, offset } => buffer.address + offset,
            Place::Pageable(address) => *address,
            _ => unreachable!("not host memory that can be written"),
        };
        // SAFETY: as for reading: in a live page-locked buffer, or memory of a caller who waits.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), address as *mut u8, data.len()) }
        Ok(())
    }
}

impl Machine {
    /// Enqueues on the stream, or adds to the capture it is in.
    pub fn enqueue(&mut self, stream: u64, work: Work) -> Outcome {
        if self.captured(stream, &work)? {
            return Ok(());
        }
        self.enqueue_after(stream, Vec::new(), &Clock::default(), work)?;
        Ok(())
    }

    /// Enqueues on a stream that does not capture, after its predecessors and `needs`, and by the rules of
    /// the legacy default stream: that one waits for the blocking streams, and they for it.
    pub fn enqueue_after(
        &mut self,
        stream: u64,
        mut needs: Vec<Mark>,
        learned: &Clock,
        work: Work,
    ) -> Outcome<Stamp> {
        let target = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        let (lane, blocking, context) = (target.lane, target.blocking, target.context);
        let null = self.contexts.get(&context).ok_or(Status::CONTEXT_IS_DESTROYED)?.null;
        let mut learned = learned.clone();
        if blocking {
            let others: Vec<(u64, usize)> = self
                .streams
                .iter()
                .filter(|(serial, other)| {
                    other.context == context
                        && other.blocking
                        && **serial != stream
                        && (stream == null || **serial == null)
                })
                .map(|(serial, other)| (*serial, other.lane))
                .collect();
            for (serial, other) in others {
                if stream == null && self.streams[&serial].capture.is_some() {
                    return self.break_capture(
                        serial,
                        Status::STREAM_CAPTURE_IMPLICIT,
                        "work on the legacy default stream would wait for a blocking stream that captures",
                    );
                }
                needs.push(self.last(other));
                learned.merge(&self.past(other));
            }
        }
        Ok(self.push(lane, needs, &learned, work))
    }

    /// Whether all of `[address, address + bytes)` lies in one allocation.
    pub fn is_allocated(&self, address: u64, bytes: u64) -> bool {
        self.allocation_around(address).is_some_and(|(base, found)| {
            address.checked_add(bytes).is_some_and(|end| end <= base + found.bytes)
        })
    }

    pub fn allocation_around(&self, address: u64) -> Option<(u64, &Allocation)> {
        let (&base, found) = self.allocations.range(..=address).next_back()?;
        (address < base + found.bytes).then_some((base, found))
    }

    /// Runs the operation; a failure poisons its context, and work of a poisoned context is dropped.
    pub fn execute(&mut self, operation: &Operation) {
        let context = operation.context;
        if self.contexts.get(&context).is_none_or(|context| context.poison.is_some()) {
            if let Work::Free(address) = operation.work {
                self.release_memory(address);
            }
            return;
        }
        if let Err(Failure(code, message)) = self.perform(operation) {
            self.poison(context, code, message);
        }
    }

    fn perform(&mut self, operation: &Operation) -> Result<(), Failure> {
        let marks = &self.marks;
        let happens_before = |id: u32| operation.stamp.after(marks[id as usize]);
        let op =
            memory::Op { id: operation.id, happens_before: &happens_before, name: operation.work.name() };
        match &operation.work {
            Work::Nothing => {}
            Work::Reach(reached) => reached.now(),
            Work::Copy { to: Place::Device(to), from: Place::Device(from), bytes } => {
                self.memory.copy(*to, *from, *bytes as u64, &op)?;
            }
            Work::Copy { to: Place::Device(to), from, bytes } => {
                let data = from.host_bytes(*bytes)?;
                if operation.source.is_some_and(|expected| expected != host::fingerprint(&data)) {
                    return Err(Failure(Status::LAUNCH_FAILED, CHANGED.into()));
                }
                self.memory.write(*to, &data, &op)?;
            }
            Work::Copy { to, from: Place::Device(from), bytes } => {
                let mut data = vec![0; *bytes];
                self.memory.read(*from, &mut data, &op)?;
                to.put_host_bytes(&data)?;
            }
            Work::Copy { to, from, bytes } => to.put_host_bytes(&from.host_bytes(*bytes)?)?,
            Work::Fill { at, value, width, count } => {
                self.memory.set(*at, &value.to_le_bytes()[..*width], *count as u64, &op)?;
            }
            Work::Free(address) => {
                self.memory.free(*address, &op)?;
                self.forget_memory(*address);
            }
            Work::Kernel(call) => {
                if let Err(code) = self.injector.call(Kind::Kernel) {
                    return Err(Failure(code, format!("fault injection: {} fails", call.function.name)));
                }
                let counted = exec::launch(&call.launch(self.seed), &mut self.memory, &op)?;
                let total = self.counts.entry(call.function.name.clone()).or_default();
                total.0 += 1;
                total.1 += counted;
            }
            Work::Host { .. } => unreachable!("runs outside the device"),
        }
        Ok(())
    }
}

impl Machine {
    /// Touches this device's memory on behalf of another device's operation.
    fn touch<T>(
        &mut self,
        operation: &Operation,
        call: impl FnOnce(&mut DeviceMemory, &memory::Op) -> Result<T, Fault>,
    ) -> Result<T, Failure> {
        let id = self.marks.len() as u32;
        self.marks.push(operation.stamp.mark);
        let marks = &self.marks;
        let happens_before = |id: u32| operation.stamp.after(marks[id as usize]);
        let op = memory::Op { id, happens_before: &happens_before, name: operation.work.name() };
        Ok(call(&mut self.memory, &op)?)
    }

    /// What the host does with memory between operations: all that was enqueued is over, or has nothing to
    /// do with it, and what is enqueued later comes after.
    pub fn as_host<T>(&mut self, name: &str, call: impl FnOnce(&mut DeviceMemory, &memory::Op) -> T) -> T {
        let id = self.marks.len() as u32;
        // The operation before the first of a lane: all lanes know that one to be over.
        self.marks.push(Mark { lane: 0, seq: 0 });
        call(&mut self.memory, &memory::Op { id, happens_before: &|_| true, name })
    }

    /// Frees memory, where nothing uses it any more.
    pub fn release_memory(&mut self, address: u64) {
        // An address that is not allocated was refused before, so there is nothing to report.
        let _ = self.as_host("free", |memory, op| memory.free(address, op));
        self.forget_memory(address);
    }
}

impl Device {
    /// Runs an operation that leaves the device: its lock is open meanwhile.
    pub fn execute_outside<'a>(&'a self, machine: Guard<'a>, operation: &Operation) -> Guard<'a> {
        let dropped = machine.contexts.get(&operation.context).is_none_or(|context| context.poison.is_some());
        if dropped {
            return machine;
        }
        drop(machine);
        let result = match &operation.work {
            Work::Host { function, argument } => {
                super::inside_host_function(|| {
                    // SAFETY: the program gave the function and its argument for this one call.
                    unsafe { function(*argument as *mut c_void) }
                });
                Ok(())
            }
            Work::Copy { to, from, bytes } => self.copy_between(operation, to, from, *bytes),
            _ => unreachable!("stays on the device"),
        };
        let mut machine = self.lock();
        if let Err(Failure(code, message)) = result {
            machine.poison(operation.context, code, message);
        }
        machine
    }

    /// One device is locked at a time, so two that copy to each other cannot block each other.
    fn copy_between(
        &self,
        operation: &Operation,
        to: &Place,
        from: &Place,
        bytes: usize,
    ) -> Result<(), Failure> {
        let end = |place: &Place| match place {
            Place::Peer { ordinal, address } => (Device::of(*ordinal), *address),
            Place::Device(address) => (Device::of(self.ordinal), *address),
            _ => unreachable!("a copy between devices has no host end"),
        };
        let ((source, from), (target, to)) = (end(from), end(to));
        let mut data = vec![0; bytes];
        source.lock().touch(operation, |memory, op| memory.read(from, &mut data, op))?;
        target.lock().touch(operation, |memory, op| memory.write(to, &data, op))?;
        Ok(())
    }
}
