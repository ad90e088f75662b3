//! Streams, their capture, and functions of the host in them.

use std::ffi::{c_int, c_uint, c_void};

use crate::driver::clock::Mark;
use crate::driver::handle::{Handle, Kind};
use crate::driver::inject::Kind as Call;
use crate::driver::machine::Recorded;
use crate::driver::status::{Outcome, Status};
use crate::driver::work::{HostFunction, Work};
use crate::driver::{Entered, answer, enter, enter_event, enter_stream, enter_stream_to_work, host, put};

/// Priorities run from 0 (least) to this.
pub const GREATEST_PRIORITY: c_int = -5;

const NON_BLOCKING: c_uint = 1;

/// Runs what `goal` needs, then says what the context says by then. Waiting may fail on demand, as a card
/// does when a kernel failed unseen.
pub(crate) fn wait_for(mut entered: Entered, goal: &[Mark]) -> Outcome<Entered> {
    entered.machine.no_capture_forbids("waiting")?;
    if let Err(code) = entered.machine.injector.call(Call::Synchronize) {
        let context = entered.context;
        entered.machine.poison(context, code, "fault injection: Synchronize fails".into());
        return Err(code);
    }
    entered.machine = entered.device.finish(entered.machine, goal);
    entered.healthy()?;
    Ok(entered)
}

pub(crate) fn synchronize_context(entered: Entered) -> Outcome {
    let pending = entered.machine.pending(entered.context);
    let past = entered.machine.past_of_context(entered.context);
    let entered = wait_for(entered, &pending)?;
    host::learn(entered.device.ordinal, &past);
    Ok(())
}

/// Waits for all that is on the stream by now.
pub(crate) fn synchronize(mut entered: Entered, stream: u64) -> Outcome<Entered> {
    entered.machine.not_capturing(stream)?;
    let lane = entered.machine.streams[&stream].lane;
    let (goal, past) = (entered.machine.last(lane), entered.machine.past(lane));
    let entered = wait_for(entered, &[goal])?;
    host::learn(entered.device.ordinal, &past);
    Ok(entered)
}

/// # Safety
/// `stream` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut Handle, flags: c_uint) -> Status {
    // SAFETY: forwarded.
    unsafe { cuStreamCreateWithPriority(stream, flags, 0) }
}

/// # Safety
/// `stream` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut Handle,
    flags: c_uint,
    priority: c_int,
) -> Status {
    answer(|| {
        let mut entered = enter()?;
        if flags > NON_BLOCKING {
            return Err(Status::INVALID_VALUE);
        }
        entered.machine.inject(Call::StreamCreate)?;
        let (context, priority) = (entered.context, priority.clamp(GREATEST_PRIORITY, 0));
        let serial = entered.machine.new_stream(context, flags != NON_BLOCKING, priority, flags, false);
        // SAFETY: forwarded.
        unsafe { put(stream, entered.handle(Kind::Stream, serial)) }
    })
}

/// Work that is still on the stream is done all the same.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: Handle) -> Status {
    answer(|| {
        if stream.0 <= 2 {
            return Err(Status::INVALID_HANDLE);
        }
        let (mut entered, serial) = enter_stream(stream)?;
        if entered.machine.capture_status(serial) != 0 {
            // The capture can only be lost now.
            let _: Outcome = entered.machine.break_capture(
                serial,
                Status::STREAM_CAPTURE_UNSUPPORTED,
                "a stream was destroyed while it captured",
            );
        }
        entered.machine.streams.remove(&serial);
        entered.healthy()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: Handle) -> Status {
    answer(|| {
        let (entered, serial) = enter_stream_to_work(stream)?;
        synchronize(entered, serial).map(drop)
    })
}

/// Asking lets the device get on a little, so a program that polls gets there.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_stream_to_work(stream)?;
        entered.machine.not_capturing(serial)?;
        let lane = entered.machine.streams[&serial].lane;
        let (goal, past) = (entered.machine.last(lane), entered.machine.past(lane));
        let entered = poll(entered, goal)?;
        host::learn(entered.device.ordinal, &past);
        Ok(())
    })
}

/// `NOT_READY` until the operation is over; now and then lets the device get on.
pub(crate) fn poll(mut entered: Entered, goal: Mark) -> Outcome<Entered> {
    entered.machine.no_capture_forbids("asking")?;
    let over = entered.machine.all_over(&[goal]);
    if !over {
        // Half the time only something, somewhere; else what was asked for, one step at least.
        if entered.machine.schedule.below(2) == 1 || !entered.machine.step_any() {
            entered.machine = entered.device.step_towards(entered.machine, goal);
        }
    }
    entered.healthy()?;
    if entered.machine.all_over(&[goal]) { Ok(entered) } else { Err(Status::NOT_READY) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) -> Status {
    answer(|| {
        if flags > 1 {
            return Err(Status::INVALID_VALUE);
        }
        // The event first, and its device let go: it may be another one.
        let (of_event, serial) = enter_event(event)?;
        let recorded = of_event.machine.events[&serial].recorded.clone();
        let same_device = of_event.device.ordinal;
        drop(of_event);
        let (mut entered, stream) = enter_stream_to_work(stream)?;
        match recorded {
            Recorded::Never => Ok(()),
            Recorded::Captured { capture, after } => {
                if same_device != entered.device.ordinal {
                    return Err(Status::NOT_SUPPORTED);
                }
                entered.machine.wait_captured(stream, capture, &after)
            }
            Recorded::At { mark, past, .. } => {
                if entered.machine.capture_status(stream) != 0 {
                    return entered.machine.break_capture(
                        stream,
                        Status::STREAM_CAPTURE_ISOLATION,
                        "a capturing stream waits for an event recorded outside the capture",
                    );
                }
                entered.machine.enqueue_after(stream, vec![mark], &past, Work::Nothing)?;
                entered.machine.progress();
                Ok(())
            }
        }
    })
}

/// # Safety
/// `priority` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) -> Status {
    answer(|| {
        let (entered, serial) = enter_stream_to_work(stream)?;
        // SAFETY: forwarded.
        unsafe { put(priority, entered.machine.streams[&serial].priority) }
    })
}

/// # Safety
/// `flags` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) -> Status {
    answer(|| {
        let (entered, serial) = enter_stream_to_work(stream)?;
        // SAFETY: forwarded.
        unsafe { put(flags, entered.machine.streams[&serial].flags) }
    })
}

/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCtx(stream: Handle, context: *mut Handle) -> Status {
    answer(|| {
        let (entered, _) = enter_stream_to_work(stream)?;
        // SAFETY: forwarded.
        unsafe { put(context, entered.handle(Kind::Context, entered.context)) }
    })
}

/// # Safety
/// `function` may be called once with `argument`, from any thread that waits for the stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: Handle,
    function: Option<HostFunction>,
    argument: *mut c_void,
) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_stream_to_work(stream)?;
        let function = function.ok_or(Status::INVALID_VALUE)?;
        entered.machine.enqueue(serial, Work::Host { function, argument: argument as usize })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_stream_to_work(stream)?;
        entered.machine.begin_capture(serial, mode)
    })
}

/// # Safety
/// `graph` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_stream_to_work(stream)?;
        // SAFETY: forwarded: a null graph on failure, as the driver does.
        unsafe { put(graph, Handle::NULL) }?;
        let made = entered.machine.end_capture(serial)?;
        // SAFETY: forwarded.
        unsafe { put(graph, entered.handle(Kind::Graph, made)) }
    })
}

/// # Safety
/// `status` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_stream_to_work(stream)?;
        // SAFETY: forwarded.
        unsafe { put(status, entered.machine.capture_status(serial)) }
    })
}
