//! The other side of [`crate::control`]: what a test tells a device, and asks it, beside the driver API.
//!
//! A test links one copy of this crate and opens another (the `.so`); only the latter has the devices, so
//! these are C functions too.

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use crate::counters::Counts;
use crate::driver::inject::Kind;
use crate::driver::machine::{DEVICES, Device, Leak, Machine};
use crate::driver::queue::Schedule;
use crate::driver::status::Status;

/// One entry of an answer. The text is only there during the call.
#[repr(C)]
pub struct Record {
    pub text: *const u8,
    pub len: usize,
    pub number: u64,
    pub counts: *const Counts,
}

/// Takes the entries of an answer, one by one.
pub type Sink = extern "C" fn(*mut c_void, *const Record);

fn give(sink: Sink, to: *mut c_void, text: &str, number: u64, counts: Option<&Counts>) {
    let counts = counts.map_or(std::ptr::null(), |counts| counts as *const Counts);
    sink(to, &Record { text: text.as_ptr(), len: text.len(), number, counts });
}

/// Devices that no test has. Number 0 is never lent: it is the one that programs take by default.
static FREE: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static NEXT: Mutex<usize> = Mutex::new(1);

fn free_devices() -> std::sync::MutexGuard<'static, Vec<u8>> {
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of a device in its first state, or -1: all are taken.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_fresh_device() -> c_int {
    if let Some(ordinal) = free_devices().pop() {
        return ordinal.into();
    }
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    if *next == DEVICES {
        return -1;
    }
    *next += 1;
    (*next - 1) as c_int
}

/// Puts the device back into its first state and lends it again, unless a context still lives on it.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_give_back(ordinal: u8) {
    let mut machine = Device::of(ordinal).lock();
    if machine.contexts.is_empty() {
        machine.restart();
        drop(machine);
        free_devices().push(ordinal);
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_seed(ordinal: u8, seed: u64) {
    let mut machine = Device::of(ordinal).lock();
    machine.seed = seed;
    machine.schedule = Schedule::new(seed);
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_memory(ordinal: u8, bytes: u64) {
    Device::of(ordinal).lock().total_memory = bytes;
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_attribute(ordinal: u8, attribute: c_int, value: c_int) {
    Device::of(ordinal).lock().limits.set(attribute, value);
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_set_newest_ptx(ordinal: u8, major: u32, minor: u32) {
    Device::of(ordinal).lock().newest_ptx = (major, minor);
}

/// The kind of call by its number; a number that is none does nothing.
fn kind(number: u32) -> Option<Kind> {
    Kind::ALL.get(number as usize).copied()
}

/// `code` 0: the usual one.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_fail(ordinal: u8, number: u32, n: u64, code: u32) {
    if let Some(kind) = kind(number) {
        Device::of(ordinal).lock().injector.fail(kind, n, (code != 0).then_some(Status(code)));
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_calls(ordinal: u8, number: u32) -> u64 {
    kind(number).map_or(0, |kind| Device::of(ordinal).lock().injector.calls(kind))
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_reset_faults(ordinal: u8) {
    Device::of(ordinal).lock().injector.reset();
}

/// By kernel: its name, how many launches ran, what they counted.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_counts(ordinal: u8, sink: Sink, to: *mut c_void) {
    for (name, (launches, counts)) in &Device::of(ordinal).lock().counts {
        give(sink, to, name, *launches, Some(counts));
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_reset_counts(ordinal: u8) {
    Device::of(ordinal).lock().counts.clear();
}

/// The bit of a report's number that says it is sticky; below it stands the code.
pub const STICKY: u64 = 1 << 32;

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_reports(ordinal: u8, sink: Sink, to: *mut c_void) {
    for report in &Device::of(ordinal).lock().reports {
        let number = u64::from(report.code.0) | if report.sticky { STICKY } else { 0 };
        give(sink, to, &report.message, number, None);
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn softcuda_clear_reports(ordinal: u8) {
    Device::of(ordinal).lock().reports.clear();
}

/// What ended contexts left behind, and what living ones hold.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_leaks(ordinal: u8, sink: Sink, to: *mut c_void) {
    let machine: &Machine = &Device::of(ordinal).lock();
    let held = machine.contexts.keys().flat_map(|&context| machine.held(context));
    for Leak { what, detail } in machine.leaks.iter().cloned().chain(held) {
        give(sink, to, &format!("{what}: {detail}"), 0, None);
    }
}

/// Bytes of device memory in use, and the most there ever were.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_memory(ordinal: u8, most: bool) -> u64 {
    let machine = Device::of(ordinal).lock();
    if most { machine.most_used } else { machine.used_memory }
}
