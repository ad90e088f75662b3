//! The CUDA driver API over software devices: what `libcuda.so` exports (see [`abi`]) and the machine
//! behind it.
//!
//! `machine` one device · `queue` streams and their scheduler · `clock` what happens before what · `work`
//! operations and their execution · `capture` graphs · `host` page-locked memory · `limits` attributes,
//! launch limits, occupancy · `inject` faults on demand · `handle`, `status` the driver's own words.

pub mod abi;
mod capture;
mod clock;
mod handle;
mod host;
pub mod inject;
mod limits;
mod machine;
mod queue;
pub mod status;
mod work;

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use handle::{Handle, Kind};
use machine::{Device, Guard};
use status::{Outcome, Status};

static INITIALISED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The thread's stack of contexts: the last is current.
    static CONTEXTS: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// Runs a call: its outcome becomes a code, and a panic a code and a report, as nothing may unwind into C.
fn answer(call: impl FnOnce() -> Outcome) -> Status {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => Status::SUCCESS,
        Ok(Err(code)) => code,
        Err(panic) => {
            let message = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or(panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            if let Some((ordinal, _)) = current_handle().open(Kind::Context) {
                let message = format!("softcuda itself failed: {message}");
                Device::of(ordinal).lock().report(Status::UNKNOWN, false, message);
            }
            Status::UNKNOWN
        }
    }
}

/// Runs a function of the host that a stream calls; it may not call the driver.
fn inside_host_function(call: impl FnOnce()) {
    IN_HOST_FUNCTION.set(true);
    call();
    IN_HOST_FUNCTION.set(false);
}

fn current_handle() -> Handle {
    CONTEXTS.with_borrow(|stack| stack.last().copied().unwrap_or(Handle::NULL))
}

/// Refuses calls before `cuInit` and from host functions.
fn usable() -> Outcome {
    if IN_HOST_FUNCTION.get() {
        Err(Status::NOT_PERMITTED)
    } else if !INITIALISED.load(Ordering::Relaxed) {
        Err(Status::NOT_INITIALIZED)
    } else {
        Ok(())
    }
}

/// A device, locked for one call, and the context that the call is about.
pub(crate) struct Entered {
    device: &'static Device,
    machine: Guard<'static>,
    context: u64,
}

impl Entered {
    fn handle(&self, kind: Kind, serial: u64) -> Handle {
        Handle::new(kind, self.device.ordinal, serial)
    }

    /// The context's sticky error, if it has one.
    fn healthy(&self) -> Outcome {
        match self.machine.contexts.get(&self.context) {
            None => Err(Status::CONTEXT_IS_DESTROYED),
            Some(context) => context.poison.map_or(Ok(()), Err),
        }
    }
}

/// Enters a context by its handle, whether it is poisoned or not.
fn enter_context(handle: Handle) -> Outcome<Entered> {
    let (ordinal, context) = handle.open(Kind::Context).ok_or(Status::INVALID_CONTEXT)?;
    let device = Device::of(ordinal);
    let machine = device.lock();
    if !machine.contexts.contains_key(&context) {
        return Err(Status::CONTEXT_IS_DESTROYED);
    }
    Ok(Entered { device, machine, context })
}

/// Enters the thread's current context, whether it is poisoned or not.
fn enter_any() -> Outcome<Entered> {
    usable()?;
    enter_context(current_handle())
}

/// Enters the thread's current context; its sticky error is the call's.
fn enter() -> Outcome<Entered> {
    let entered = enter_any()?;
    entered.healthy()?;
    Ok(entered)
}

/// The device and serial number of an object of `kind`, entered with the context `context_of` finds.
fn enter_object(
    handle: Handle,
    kind: Kind,
    context_of: impl FnOnce(&machine::Machine, u64) -> Option<u64>,
) -> Outcome<(Entered, u64)> {
    usable()?;
    let (ordinal, serial) = handle.open(kind).ok_or(Status::INVALID_HANDLE)?;
    let device = Device::of(ordinal);
    let machine = device.lock();
    let context = context_of(&machine, serial).ok_or(Status::INVALID_HANDLE)?;
    Ok((Entered { device, machine, context }, serial))
}

/// A stream by its handle. 0 and 1 are the legacy default stream of the current context, 2 the calling
/// thread's own.
fn enter_stream(handle: Handle) -> Outcome<(Entered, u64)> {
    if handle.0 > 2 {
        return enter_object(handle, Kind::Stream, |machine, serial| {
            machine.streams.get(&serial).map(|stream| stream.context)
        });
    }
    let mut entered = enter_any()?;
    let context = entered.context;
    let thread = std::thread::current().id();
    let known = entered.machine.contexts.get(&context).and_then(|found| match handle.0 {
        2 => found.per_thread.get(&thread).copied(),
        _ => Some(found.null),
    });
    let serial = match known {
        Some(serial) => serial,
        None => {
            let serial = entered.machine.new_stream(context, true, 0, 0, true);
            if let Some(found) = entered.machine.contexts.get_mut(&context) {
                found.per_thread.insert(thread, serial);
            }
            serial
        }
    };
    Ok((entered, serial))
}

/// A stream for new work: the sticky error of its context is the call's.
fn enter_stream_to_work(handle: Handle) -> Outcome<(Entered, u64)> {
    let (entered, stream) = enter_stream(handle)?;
    entered.healthy()?;
    Ok((entered, stream))
}

fn enter_event(handle: Handle) -> Outcome<(Entered, u64)> {
    enter_object(handle, Kind::Event, |machine, serial| {
        machine.events.get(&serial).map(|event| event.context)
    })
}

/// Writes a result through a pointer of the caller.
///
/// # Safety
/// `at` is null (an error) or may be written.
unsafe fn put<T>(at: *mut T, value: T) -> Outcome {
    if at.is_null() {
        return Err(Status::INVALID_VALUE);
    }
    // SAFETY: as the caller promises; C gives no more alignment than the type has, so neither is assumed.
    unsafe { at.write_unaligned(value) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_code_and_a_report() {
        INITIALISED.store(true, Ordering::Relaxed);
        let device = Device::of(200);
        let context = Handle::new(Kind::Context, 200, device.lock().new_context(0));
        CONTEXTS.with_borrow_mut(|stack| stack.push(context));
        let code = answer(|| {
            let _held = enter()?;
            panic!("something {}", "unforeseen");
        });
        assert_eq!(code, Status::UNKNOWN);
        // The lock that was held when it happened is not lost.
        let report = device.lock().reports[0].clone();
        assert_eq!(report.message, "softcuda itself failed: something unforeseen");
        assert!(!report.sticky);
        assert_eq!(answer(|| enter().map(drop)), Status::SUCCESS);
    }
}
