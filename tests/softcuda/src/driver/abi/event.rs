//! Events.

use std::ffi::c_uint;

use crate::driver::handle::{Handle, Kind};
use crate::driver::inject::Kind as Call;
use crate::driver::machine::{Event, Recorded};
use crate::driver::queue::Reached;
use crate::driver::status::{Outcome, Status};
use crate::driver::work::Work;
use crate::driver::{Entered, answer, enter, enter_event, enter_stream_to_work, host, put};

const DISABLE_TIMING: c_uint = 2;
const INTERPROCESS: c_uint = 4;

/// # Safety
/// `event` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Handle, flags: c_uint) -> Status {
    answer(|| {
        let mut entered = enter()?;
        if flags >= 8 || flags & INTERPROCESS != 0 {
            return entered.machine.refuse(Status::INVALID_VALUE, "softcuda has no events between processes");
        }
        entered.machine.inject(Call::EventCreate)?;
        let (serial, context) = (entered.machine.new_serial(), entered.context);
        let made = Event { context, timed: flags & DISABLE_TIMING == 0, recorded: Recorded::Never };
        entered.machine.events.insert(serial, made);
        // SAFETY: forwarded.
        unsafe { put(event, entered.handle(Kind::Event, serial)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_event(event)?;
        entered.machine.events.remove(&serial);
        entered.healthy()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Status {
    answer(|| {
        let (mut entered, stream) = enter_stream_to_work(stream)?;
        let (ordinal, serial) = event.open(Kind::Event).ok_or(Status::INVALID_HANDLE)?;
        let known = entered.machine.events.get(&serial).map(|event| event.context);
        if ordinal != entered.device.ordinal || known != Some(entered.context) {
            return entered.machine.refuse(
                Status::INVALID_HANDLE,
                "the event is gone, or belongs to another context than the stream",
            );
        }
        let recorded = match entered.machine.record_captured(stream)? {
            Some(captured) => captured,
            None => {
                let reached = Reached::default();
                let work = Work::Reach(reached.clone());
                let stamp = entered.machine.enqueue_after(stream, Vec::new(), &Default::default(), work)?;
                Recorded::At { mark: stamp.mark, past: stamp.past(), reached }
            }
        };
        if let Some(event) = entered.machine.events.get_mut(&serial) {
            event.recorded = recorded;
        }
        entered.machine.progress();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) -> Status {
    if flags != 0 {
        return Status::NOT_SUPPORTED;
    }
    cuEventRecord(event, stream)
}

/// What the event recorded, for a call that waits for it or asks about it.
fn recorded(event: Handle) -> Outcome<(Entered, Recorded)> {
    let (mut entered, serial) = enter_event(event)?;
    entered.healthy()?;
    let recorded = entered.machine.events[&serial].recorded.clone();
    if let Recorded::Captured { capture, .. } = recorded {
        if let Some(capture) = entered.machine.captures.get_mut(&capture) {
            capture.broken = true;
        }
        return entered.machine.refuse(
            Status::CAPTURED_EVENT,
            "an event last recorded in a capture cannot be waited for or asked",
        );
    }
    Ok((entered, recorded))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Handle) -> Status {
    answer(|| {
        let (entered, recorded) = recorded(event)?;
        if let Recorded::At { mark, past, .. } = recorded {
            let entered = super::stream::wait_for(entered, &[mark])?;
            host::learn(entered.device.ordinal, &past);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Handle) -> Status {
    answer(|| {
        let (entered, recorded) = recorded(event)?;
        if let Recorded::At { mark, past, .. } = recorded {
            let entered = super::stream::poll(entered, mark)?;
            host::learn(entered.device.ordinal, &past);
        }
        Ok(())
    })
}

/// The host's time between the two: how long softcuda took, which says nothing of a card.
///
/// # Safety
/// `milliseconds` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) -> Status {
    answer(|| {
        let mut at = Vec::new();
        for event in [start, end] {
            let (entered, serial) = enter_event(event)?;
            entered.healthy()?;
            let event = &entered.machine.events[&serial];
            let Recorded::At { reached, .. } = &event.recorded else {
                return Err(Status::INVALID_HANDLE);
            };
            if !event.timed {
                return Err(Status::INVALID_HANDLE);
            }
            at.push(reached.at());
        }
        let (Some(start), Some(end)) = (at[0], at[1]) else {
            return Err(Status::NOT_READY);
        };
        let elapsed = if end >= start { (end - start).as_secs_f32() } else { -(start - end).as_secs_f32() };
        // SAFETY: forwarded.
        unsafe { put(milliseconds, elapsed * 1e3) }
    })
}

/// # Safety
/// `milliseconds` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) -> Status {
    // SAFETY: forwarded.
    unsafe { cuEventElapsedTime(milliseconds, start, end) }
}
