//! One software device: its memory, contexts, lanes and objects, under one lock. Devices share nothing, so
//! tests of one process run side by side on different ones.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use super::capture::{Capture, Exec, Graph};
use super::clock::{Clock, Mark};
use super::host::{self, Pinned};
use super::inject::{Injector, Kind};
use super::limits::{Limits, Needs};
use super::queue::{Lane, Reached, Schedule};
use super::status::{Outcome, Status};
use crate::counters::Counts;
use crate::memory::DeviceMemory;
use crate::ptx::Module as Ptx;

/// How many devices there are.
pub const DEVICES: usize = 256;

const GIB: u64 = 1 << 30;

/// Addresses of different devices differ above this bit, and stay below those of the host.
const ADDRESS_BITS: u32 = 38;

pub type Guard<'a> = MutexGuard<'a, Machine>;

/// A device: the machine and its lock.
pub struct Device {
    pub ordinal: u8,
    state: Mutex<Machine>,
    changed: Condvar,
}

static TABLE: LazyLock<Vec<Device>> = LazyLock::new(|| {
    let device =
        |ordinal| Device { ordinal, state: Mutex::new(Machine::new(ordinal)), changed: Condvar::new() };
    (0..DEVICES).map(|ordinal| device(ordinal as u8)).collect()
});

impl Device {
    pub fn of(ordinal: u8) -> &'static Device {
        &TABLE[ordinal as usize]
    }

    /// A panic inside a call is reported by that call; the state behind it stays usable.
    pub fn lock(&self) -> Guard<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wait<'a>(&'a self, machine: Guard<'a>) -> Guard<'a> {
        self.changed.wait(machine).unwrap_or_else(PoisonError::into_inner)
    }

    pub fn changed(&self) {
        self.changed.notify_all();
    }
}

/// Why a call was refused, or a context is of no use any more: what a test reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub code: Status,
    /// Whether the context is of no use from then on: a kernel or a copy went wrong.
    pub sticky: bool,
    pub message: String,
}

/// How many refusals a device keeps; the first are the ones that matter.
const REPORTS: usize = 1000;

pub struct Context {
    /// The sticky error: once set, every call that needs the context returns it.
    pub poison: Option<Status>,
    /// The legacy default stream.
    pub null: u64,
    /// The default streams of threads that asked for one of their own.
    pub per_thread: HashMap<ThreadId, u64>,
    pub limits: BTreeMap<u32, usize>,
    pub cache_config: u32,
    pub flags: u32,
}

pub struct Stream {
    pub context: u64,
    pub lane: usize,
    /// Whether it orders itself with the legacy default stream.
    pub blocking: bool,
    pub priority: i32,
    pub flags: u32,
    pub capture: Option<u64>,
    /// Made by the driver itself, not by `cuStreamCreate`.
    pub implicit: bool,
}

/// What `cuEventRecord` saw.
#[derive(Clone)]
pub enum Recorded {
    Never,
    At { mark: Mark, past: Clock, reached: Reached },
    Captured { capture: u64, after: Vec<usize> },
}

pub struct Event {
    pub context: u64,
    pub timed: bool,
    pub recorded: Recorded,
}

pub struct Module {
    pub context: u64,
    pub ptx: Arc<Ptx>,
    /// Where its `.global` and `.const` variables lie: name → (address, bytes).
    pub globals: Arc<BTreeMap<String, (u64, u64)>>,
    pub functions: BTreeMap<String, u64>,
}

#[derive(Clone)]
pub struct Function {
    pub context: u64,
    pub module: u64,
    pub ptx: Arc<Ptx>,
    pub globals: Arc<BTreeMap<String, (u64, u64)>>,
    pub name: String,
    pub needs: Needs,
}

pub struct Allocation {
    pub context: u64,
    pub bytes: u64,
    /// A variable of a module, not memory that a program asked for.
    pub variable: bool,
}

#[derive(Default)]
pub struct Pool {
    pub attributes: BTreeMap<u32, u64>,
}

/// What was not given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leak {
    pub what: &'static str,
    /// What it is: an address and a size, or a handle.
    pub detail: String,
}

pub struct Machine {
    pub ordinal: u8,
    pub seed: u64,
    pub schedule: Schedule,
    pub limits: Limits,
    pub total_memory: u64,
    /// The newest PTX ISA version it takes: (major, minor).
    pub newest_ptx: (u32, u32),
    pub injector: Injector,
    pub memory: DeviceMemory,
    pub allocations: BTreeMap<u64, Allocation>,
    pub used_memory: u64,
    pub most_used: u64,
    pub contexts: BTreeMap<u64, Context>,
    /// The primary context, and how many times it is retained.
    pub primary: Option<(u64, usize)>,
    pub primary_flags: u32,
    pub lanes: Vec<Lane>,
    /// Functions of the host that wait in lanes.
    pub host_functions: usize,
    /// The operation of each number that device memory knows.
    pub marks: Vec<Mark>,
    /// What other devices are known to have finished.
    pub foreign: Clock,
    pub streams: BTreeMap<u64, Stream>,
    pub events: BTreeMap<u64, Event>,
    pub modules: BTreeMap<u64, Module>,
    pub functions: BTreeMap<u64, Arc<Function>>,
    pub captures: BTreeMap<u64, Capture>,
    pub graphs: BTreeMap<u64, Graph>,
    pub execs: BTreeMap<u64, Exec>,
    pub pools: BTreeMap<u64, Pool>,
    pub current_pool: Option<u64>,
    serial: u64,
    pub reports: Vec<Report>,
    /// What contexts that are gone left behind.
    pub leaks: Vec<Leak>,
    /// By kernel name: launches that ran, and what they counted.
    pub counts: BTreeMap<String, (u64, Counts)>,
}

impl Machine {
    pub fn new(ordinal: u8) -> Machine {
        Machine {
            ordinal,
            seed: 0,
            schedule: Schedule::new(0),
            limits: Limits::default(),
            total_memory: 4 * GIB,
            newest_ptx: (9, 0),
            injector: Injector::default(),
            memory: DeviceMemory::starting_at(u64::from(ordinal) << ADDRESS_BITS),
            allocations: BTreeMap::new(),
            used_memory: 0,
            most_used: 0,
            contexts: BTreeMap::new(),
            primary: None,
            primary_flags: 0,
            lanes: Vec::new(),
            host_functions: 0,
            marks: Vec::new(),
            foreign: Clock::default(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            captures: BTreeMap::new(),
            graphs: BTreeMap::new(),
            execs: BTreeMap::new(),
            pools: BTreeMap::new(),
            current_pool: None,
            serial: 0,
            reports: Vec::new(),
            leaks: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    /// A number for a new object: no two objects of a device ever have the same.
    pub fn new_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// The error `code`, with the reason kept for the test to read.
    pub fn refuse<T>(&mut self, code: Status, message: impl Into<String>) -> Outcome<T> {
        self.report(code, false, message.into());
        Err(code)
    }

    pub fn report(&mut self, code: Status, sticky: bool, message: String) {
        if sticky || self.reports.len() < REPORTS {
            self.reports.push(Report { code, sticky, message });
        }
    }

    /// Counts a call of that kind; fails if it is the one that shall.
    pub fn inject(&mut self, kind: Kind) -> Outcome {
        match self.injector.call(kind) {
            Ok(()) => Ok(()),
            Err(code) => self.refuse(code, format!("fault injection: {kind:?} fails")),
        }
    }

    /// A sticky error: the context is of no use from now on.
    pub fn poison(&mut self, context: u64, code: Status, message: String) {
        self.report(code, true, message);
        if let Some(context) = self.contexts.get_mut(&context) {
            context.poison.get_or_insert(code);
        }
    }

    pub fn new_context(&mut self, flags: u32) -> u64 {
        let serial = self.new_serial();
        let null = self.new_stream(serial, true, 0, 0, true);
        let context = Context {
            poison: None,
            null,
            per_thread: HashMap::new(),
            limits: BTreeMap::new(),
            cache_config: 0,
            flags,
        };
        self.contexts.insert(serial, context);
        serial
    }

    pub fn new_stream(
        &mut self,
        context: u64,
        blocking: bool,
        priority: i32,
        flags: u32,
        implicit: bool,
    ) -> u64 {
        let (serial, lane) = (self.new_serial(), self.new_lane(context));
        let stream = Stream { context, lane, blocking, priority, flags, capture: None, implicit };
        self.streams.insert(serial, stream);
        serial
    }

    /// Back to the first state. Lanes and numbers go on, as other devices may remember them.
    pub fn restart(&mut self) {
        let fresh = Machine::new(self.ordinal);
        let old = std::mem::replace(self, fresh);
        self.lanes = old.lanes;
        self.marks = old.marks;
        self.foreign = old.foreign;
        self.serial = old.serial;
    }

    pub fn has_room(&self, bytes: u64) -> bool {
        bytes <= self.total_memory.saturating_sub(self.used_memory)
    }

    pub fn require_room(&mut self, bytes: u64) -> Outcome {
        if self.has_room(bytes) {
            return Ok(());
        }
        let free = self.total_memory.saturating_sub(self.used_memory);
        self.refuse(Status::OUT_OF_MEMORY, format!("{bytes} bytes asked for, {free} free"))
    }

    /// Device memory of `bytes` > 0 for the program.
    pub fn allocate(&mut self, bytes: u64, context: u64) -> Outcome<u64> {
        self.require_room(bytes)?;
        let address = self.memory.alloc(bytes);
        self.book(address, Allocation { context, bytes, variable: false });
        Ok(address)
    }

    /// Enters an allocation into the books.
    pub fn book(&mut self, address: u64, memory: Allocation) {
        self.used_memory += memory.bytes;
        self.most_used = self.most_used.max(self.used_memory);
        self.allocations.insert(address, memory);
    }

    /// Strikes the allocation from the books.
    pub fn forget_memory(&mut self, address: u64) {
        if let Some(memory) = self.allocations.remove(&address) {
            self.used_memory -= memory.bytes;
        }
    }

    /// Changes what a kernel may be launched with.
    pub fn change_needs(&mut self, function: u64, change: impl FnOnce(&mut Needs)) {
        if let Some(function) = self.functions.get_mut(&function) {
            let mut changed = Function::clone(function);
            change(&mut changed.needs);
            *function = Arc::new(changed);
        }
    }

    /// What the context holds that was not given back.
    pub fn held(&self, context: u64) -> Vec<Leak> {
        let mut held = Vec::new();
        let mut add = |what, detail| held.push(Leak { what, detail });
        for (address, memory) in &self.allocations {
            if memory.context == context && !memory.variable {
                add("device memory", format!("{} bytes at {address:#x}", memory.bytes));
            }
        }
        for buffer in Pinned::of_context(self.ordinal, context) {
            add("page-locked memory", format!("{} bytes at {:#x}", buffer.bytes, buffer.address));
        }
        for (serial, stream) in &self.streams {
            if stream.context == context && !stream.implicit {
                add("stream", format!("number {serial}"));
            }
        }
        for serial in self.events.iter().filter(|entry| entry.1.context == context).map(|entry| entry.0) {
            add("event", format!("number {serial}"));
        }
        for (serial, module) in self.modules.iter().filter(|entry| entry.1.context == context) {
            let names: Vec<&str> = module.functions.keys().map(String::as_str).collect();
            add("module", format!("number {serial} ({})", names.join(", ")));
        }
        for serial in self.graphs.iter().filter(|entry| entry.1.context == context).map(|entry| entry.0) {
            add("graph", format!("number {serial}"));
        }
        for serial in self.execs.iter().filter(|entry| entry.1.context == context).map(|entry| entry.0) {
            add("instantiated graph", format!("number {serial}"));
        }
        held
    }

    /// Takes the context down; its work must be over. What it still holds is noted as leaked.
    pub fn end_context(&mut self, context: u64) {
        let held = self.held(context);
        self.leaks.extend(held);
        self.contexts.remove(&context);
        let addresses: Vec<u64> = self
            .allocations
            .iter()
            .filter(|entry| entry.1.context == context)
            .map(|entry| *entry.0)
            .collect();
        for address in addresses {
            self.release_memory(address);
        }
        for buffer in Pinned::of_context(self.ordinal, context) {
            host::Pinned::free(buffer.address);
        }
        self.streams.retain(|_, stream| stream.context != context);
        self.events.retain(|_, event| event.context != context);
        self.modules.retain(|_, module| module.context != context);
        self.functions.retain(|_, function| function.context != context);
        self.captures.retain(|_, capture| capture.context != context);
        self.graphs.retain(|_, graph| graph.context != context);
        self.execs.retain(|_, exec| exec.context != context);
    }
}
