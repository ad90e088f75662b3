//! Initialisation, errors, devices, contexts, the profiler.

use std::ffi::{CStr, c_char, c_int, c_uint};

use crate::driver::handle::{Handle, Kind};
use crate::driver::machine::{DEVICES, Device};
use crate::driver::status::{Outcome, Status};
use crate::driver::{
    CONTEXTS, Entered, INITIALISED, answer, current_handle, enter, enter_any, enter_context, host, put,
    usable,
};
use std::sync::atomic::Ordering;

/// The CUDA version this driver belongs to.
pub const DRIVER_VERSION: c_int = 13000;

fn device(ordinal: c_int) -> Outcome<&'static Device> {
    usable()?;
    if (0..DEVICES as c_int).contains(&ordinal) {
        Ok(Device::of(ordinal as u8))
    } else {
        Err(Status::INVALID_DEVICE)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> Status {
    if flags != 0 {
        return Status::INVALID_VALUE;
    }
    INITIALISED.store(true, Ordering::Relaxed);
    Status::SUCCESS
}

/// # Safety
/// `version` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { put(version, DRIVER_VERSION) })
}

/// The name or the sentence of a code.
///
/// # Safety
/// `text` may be written.
unsafe fn describe(
    code: Status,
    text: *mut *const c_char,
    pick: fn((&'static CStr, &'static CStr)) -> &'static CStr,
) -> Status {
    answer(|| {
        let found = code.describe().map(pick);
        // SAFETY: forwarded.
        unsafe { put(text, found.map_or(std::ptr::null(), CStr::as_ptr)) }?;
        if found.is_some() { Ok(()) } else { Err(Status::INVALID_VALUE) }
    })
}

/// # Safety
/// `text` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: Status, text: *mut *const c_char) -> Status {
    // SAFETY: forwarded.
    unsafe { describe(code, text, |found| found.0) }
}

/// # Safety
/// `text` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: Status, text: *mut *const c_char) -> Status {
    // SAFETY: forwarded.
    unsafe { describe(code, text, |found| found.1) }
}

/// # Safety
/// `count` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    answer(|| {
        usable()?;
        // SAFETY: forwarded.
        unsafe { put(count, DEVICES as c_int) }
    })
}

/// # Safety
/// `found` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(found: *mut c_int, ordinal: c_int) -> Status {
    answer(|| {
        device(ordinal)?;
        // SAFETY: forwarded.
        unsafe { put(found, ordinal) }
    })
}

/// # Safety
/// `name` has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, ordinal: c_int) -> Status {
    answer(|| {
        let (major, minor) = device(ordinal)?.lock().limits.capability();
        if name.is_null() || len <= 0 {
            return Err(Status::INVALID_VALUE);
        }
        let text = format!("softcuda sm_{major}{minor}");
        let kept = text.len().min(len as usize - 1);
        // SAFETY: at most `len` bytes, the zero included.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), kept);
            name.add(kept).write(0);
        }
        Ok(())
    })
}

/// # Safety
/// `uuid` has room for 16 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid(uuid: *mut [u8; 16], ordinal: c_int) -> Status {
    answer(|| {
        let mut bytes = *b"softcuda device\0";
        bytes[15] = device(ordinal)?.ordinal;
        // SAFETY: forwarded.
        unsafe { put(uuid, bytes) }
    })
}

/// # Safety
/// `uuid` has room for 16 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], ordinal: c_int) -> Status {
    // SAFETY: forwarded.
    unsafe { cuDeviceGetUuid(uuid, ordinal) }
}

/// # Safety
/// `value` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, ordinal: c_int) -> Status {
    answer(|| {
        let found = device(ordinal)?.lock().limits.get(attribute)?;
        // SAFETY: forwarded.
        unsafe { put(value, found) }
    })
}

/// # Safety
/// `bytes` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, ordinal: c_int) -> Status {
    answer(|| {
        let total = device(ordinal)?.lock().total_memory;
        // SAFETY: forwarded.
        unsafe { put(bytes, total as usize) }
    })
}

/// Devices share nothing, so none can reach into another.
///
/// # Safety
/// `can` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut c_int, one: c_int, other: c_int) -> Status {
    answer(|| {
        device(one)?;
        device(other)?;
        // SAFETY: forwarded.
        unsafe { put(can, 0) }
    })
}

/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, ordinal: c_int) -> Status {
    answer(|| {
        let device = device(ordinal)?;
        let mut machine = device.lock();
        let serial = match machine.primary {
            Some((serial, retained)) => {
                machine.primary = Some((serial, retained + 1));
                serial
            }
            None => {
                let flags = machine.primary_flags;
                let serial = machine.new_context(flags);
                machine.primary = Some((serial, 1));
                serial
            }
        };
        // SAFETY: forwarded.
        unsafe { put(context, Handle::new(Kind::Context, device.ordinal, serial)) }
    })
}

/// Finishes the context's work and takes it down.
fn end(mut entered: Entered) {
    let pending = entered.machine.pending(entered.context);
    entered.machine = entered.device.finish(entered.machine, &pending);
    let context = entered.context;
    host::learn(entered.device.ordinal, &entered.machine.past_of_context(context));
    entered.machine.end_context(context);
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(ordinal: c_int) -> Status {
    answer(|| {
        let device = device(ordinal)?;
        let mut machine = device.lock();
        match machine.primary {
            None => Err(Status::INVALID_CONTEXT),
            Some((serial, 1)) => {
                machine.primary = None;
                end(Entered { device, machine, context: serial });
                Ok(())
            }
            Some((serial, retained)) => {
                machine.primary = Some((serial, retained - 1));
                Ok(())
            }
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxReset_v2(ordinal: c_int) -> Status {
    answer(|| {
        let device = device(ordinal)?;
        let mut machine = device.lock();
        if let Some((serial, _)) = machine.primary.take() {
            end(Entered { device, machine, context: serial });
        }
        Ok(())
    })
}

/// # Safety
/// `flags` and `active` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxGetState(
    ordinal: c_int,
    flags: *mut c_uint,
    active: *mut c_int,
) -> Status {
    answer(|| {
        let machine = device(ordinal)?.lock();
        // SAFETY: forwarded.
        unsafe {
            put(flags, machine.primary_flags)?;
            put(active, machine.primary.is_some().into())
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxSetFlags_v2(ordinal: c_int, flags: c_uint) -> Status {
    answer(|| {
        device(ordinal)?.lock().primary_flags = flags;
        Ok(())
    })
}

/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v2(context: *mut Handle, flags: c_uint, ordinal: c_int) -> Status {
    answer(|| {
        let device = device(ordinal)?;
        let serial = device.lock().new_context(flags);
        let handle = Handle::new(Kind::Context, device.ordinal, serial);
        CONTEXTS.with_borrow_mut(|stack| stack.push(handle));
        // SAFETY: forwarded.
        unsafe { put(context, handle) }
    })
}

/// Execution affinity is not there.
///
/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v3(
    context: *mut Handle,
    affinity: *mut std::ffi::c_void,
    affinities: c_int,
    flags: c_uint,
    ordinal: c_int,
) -> Status {
    if !affinity.is_null() || affinities != 0 {
        return Status::NOT_SUPPORTED;
    }
    // SAFETY: forwarded.
    unsafe { cuCtxCreate_v2(context, flags, ordinal) }
}

/// Parameters are not there.
///
/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v4(
    context: *mut Handle,
    parameters: *mut std::ffi::c_void,
    flags: c_uint,
    ordinal: c_int,
) -> Status {
    if !parameters.is_null() {
        return Status::NOT_SUPPORTED;
    }
    // SAFETY: forwarded.
    unsafe { cuCtxCreate_v2(context, flags, ordinal) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(context: Handle) -> Status {
    answer(|| {
        usable()?;
        let entered = enter_context(context)?;
        if entered.machine.primary.is_some_and(|(serial, _)| serial == entered.context) {
            return Err(Status::INVALID_CONTEXT);
        }
        end(entered);
        CONTEXTS.with_borrow_mut(|stack| {
            if stack.last() == Some(&context) {
                stack.pop();
            }
        });
        Ok(())
    })
}

/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> Status {
    answer(|| {
        usable()?;
        // SAFETY: forwarded.
        unsafe { put(context, current_handle()) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: Handle) -> Status {
    answer(|| {
        usable()?;
        if context != Handle::NULL {
            drop(enter_context(context)?);
        }
        CONTEXTS.with_borrow_mut(|stack| {
            stack.pop();
            if context != Handle::NULL {
                stack.push(context);
            }
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> Status {
    answer(|| {
        usable()?;
        drop(enter_context(context)?);
        CONTEXTS.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

/// # Safety
/// `context` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut Handle) -> Status {
    answer(|| {
        usable()?;
        let popped = CONTEXTS.with_borrow_mut(Vec::pop).ok_or(Status::INVALID_CONTEXT)?;
        if context.is_null() {
            return Ok(());
        }
        // SAFETY: forwarded.
        unsafe { put(context, popped) }
    })
}

/// # Safety
/// `ordinal` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(ordinal: *mut c_int) -> Status {
    answer(|| {
        let entered = enter_any()?;
        // SAFETY: forwarded.
        unsafe { put(ordinal, entered.device.ordinal.into()) }
    })
}

/// # Safety
/// `version` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetApiVersion(context: Handle, version: *mut c_uint) -> Status {
    answer(|| {
        usable()?;
        drop(if context == Handle::NULL { enter_any()? } else { enter_context(context)? });
        // SAFETY: forwarded.
        unsafe { put(version, 3020) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Status {
    answer(|| super::stream::synchronize_context(enter()?))
}

/// # Safety
/// `value` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetLimit(value: *mut usize, limit: c_uint) -> Status {
    answer(|| {
        let entered = enter()?;
        let usual = usual_limit(limit)?;
        let set = entered.machine.contexts[&entered.context].limits.get(&limit).copied();
        // SAFETY: forwarded.
        unsafe { put(value, set.unwrap_or(usual)) }
    })
}

/// `CUlimit`: what a context starts with. Nothing here depends on them.
fn usual_limit(limit: c_uint) -> Outcome<usize> {
    match limit {
        0 => Ok(1 << 10), // stack per thread
        1 => Ok(1 << 20), // printf buffer
        2 => Ok(8 << 20), // device heap
        5 => Ok(64),      // L2 fetch
        3 | 4 | 6 => Err(Status::UNSUPPORTED_LIMIT),
        _ => Err(Status::INVALID_VALUE),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetLimit(limit: c_uint, value: usize) -> Status {
    answer(|| {
        let mut entered = enter()?;
        usual_limit(limit)?;
        let serial = entered.context;
        if let Some(context) = entered.machine.contexts.get_mut(&serial) {
            context.limits.insert(limit, value);
        }
        Ok(())
    })
}

/// # Safety
/// `config` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCacheConfig(config: *mut c_uint) -> Status {
    answer(|| {
        let entered = enter()?;
        // SAFETY: forwarded.
        unsafe { put(config, entered.machine.contexts[&entered.context].cache_config) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCacheConfig(config: c_uint) -> Status {
    answer(|| {
        let mut entered = enter()?;
        let serial = entered.context;
        match entered.machine.contexts.get_mut(&serial) {
            Some(context) if config <= 3 => context.cache_config = config,
            _ => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    })
}

/// # Safety
/// `flags` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetFlags(flags: *mut c_uint) -> Status {
    answer(|| {
        let entered = enter_any()?;
        // SAFETY: forwarded.
        unsafe { put(flags, entered.machine.contexts[&entered.context].flags) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetFlags(flags: c_uint) -> Status {
    answer(|| {
        let mut entered = enter_any()?;
        let serial = entered.context;
        if let Some(context) = entered.machine.contexts.get_mut(&serial) {
            context.flags = flags;
        }
        Ok(())
    })
}

/// # Safety
/// The pointers are null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> Status {
    answer(|| {
        drop(enter()?);
        for (at, value) in [(least, 0), (greatest, super::stream::GREATEST_PRIORITY)] {
            if !at.is_null() {
                // SAFETY: forwarded.
                unsafe { put(at, value) }?;
            }
        }
        Ok(())
    })
}

/// There is no profiler to start.
#[unsafe(no_mangle)]
pub extern "C" fn cuProfilerStart() -> Status {
    answer(|| enter().map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuProfilerStop() -> Status {
    answer(|| enter().map(drop))
}
