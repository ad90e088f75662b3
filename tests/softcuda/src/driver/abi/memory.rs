//! Memory: allocation, page-locked buffers, copies and fills.
//!
//! What copies promise is in "API synchronization behavior" of the driver API reference. Taken strictly: a
//! copy *from* page-locked memory reads it when it runs; one from pageable memory takes the bytes during the
//! call, and the call returns before they are on the device; one *to* pageable memory returns when it is done.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use crate::driver::clock::Clock;
use crate::driver::handle::{Handle, Kind};
use crate::driver::host::{self, Pinned};
use crate::driver::inject::Kind as Call;
use crate::driver::machine::{Device, Machine};
use crate::driver::queue::beginning_of;
use crate::driver::status::{Outcome, Status};
use crate::driver::work::{Place, Work};
use crate::driver::{Entered, answer, enter, enter_any, enter_stream_to_work, put, usable};

use super::stream;

/// Device memory for the program; if there is too little, what queued frees give back is waited for.
fn allocate(mut entered: Entered, bytes: usize, stream: Option<u64>) -> Outcome<(Entered, u64)> {
    if bytes == 0 {
        return entered.machine.refuse(Status::INVALID_VALUE, "an allocation of 0 bytes");
    }
    if stream.is_none() {
        entered.machine.no_capture_forbids("cuMemAlloc")?;
    }
    entered.machine.inject(Call::Alloc)?;
    if !entered.machine.has_room(bytes as u64) {
        let pending = entered.machine.pending(entered.context);
        entered.machine = entered.device.finish(entered.machine, &pending);
        entered.healthy()?;
    }
    let context = entered.context;
    let address = entered.machine.allocate(bytes as u64, context)?;
    Ok((entered, address))
}

/// # Safety
/// `address` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    answer(|| {
        let (_entered, found) = allocate(enter()?, bytes, None)?;
        // SAFETY: forwarded.
        unsafe { put(address, found) }
    })
}

/// The memory is there from the call on; that its uses come after the call in the stream's order is the
/// program's duty.
///
/// # Safety
/// `address` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: Handle) -> Status {
    answer(|| {
        let (mut entered, stream) = enter_stream_to_work(stream)?;
        if entered.machine.capture_status(stream) != 0 {
            return entered.machine.break_capture(
                stream,
                Status::STREAM_CAPTURE_UNSUPPORTED,
                "softcuda does not capture allocations",
            );
        }
        let (_entered, found) = allocate(entered, bytes, Some(stream))?;
        // SAFETY: forwarded.
        unsafe { put(address, found) }
    })
}

/// Waits for the context's work, as a card does in practice. That is promised nowhere, so the host is not
/// taken to have waited.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> Status {
    answer(|| {
        if address == 0 {
            return Ok(());
        }
        let mut entered = enter_any()?;
        entered.machine.no_capture_forbids("cuMemFree")?;
        if entered.machine.allocations.get(&address).is_none_or(|memory| memory.variable) {
            return entered.machine.refuse(
                Status::INVALID_VALUE,
                format!("cuMemFree of {address:#x}, which no allocation begins at"),
            );
        }
        let pending = entered.machine.pending(entered.context);
        entered.machine = entered.device.finish(entered.machine, &pending);
        entered.machine.release_memory(address);
        entered.healthy()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, stream: Handle) -> Status {
    answer(|| {
        if address == 0 {
            return Ok(());
        }
        let (mut entered, stream) = crate::driver::enter_stream(stream)?;
        if entered.machine.allocations.get(&address).is_none_or(|memory| memory.variable) {
            return entered.machine.refuse(
                Status::INVALID_VALUE,
                format!("cuMemFreeAsync of {address:#x}, which no allocation begins at"),
            );
        }
        entered.machine.enqueue(stream, Work::Free(address))?;
        entered.machine.progress();
        entered.healthy()
    })
}

/// # Safety
/// `free` and `total` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    answer(|| {
        let machine = enter()?.machine;
        // SAFETY: forwarded.
        unsafe {
            put(free, machine.total_memory.saturating_sub(machine.used_memory) as usize)?;
            put(total, machine.total_memory as usize)
        }
    })
}

/// # Safety
/// `base` and `bytes` are null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, address: u64) -> Status {
    answer(|| {
        let machine = enter()?.machine;
        let (start, found) = machine.allocation_around(address).ok_or(Status::NOT_FOUND)?;
        if !base.is_null() {
            // SAFETY: forwarded.
            unsafe { put(base, start) }?;
        }
        if !bytes.is_null() {
            // SAFETY: forwarded.
            unsafe { put(bytes, found.bytes as usize) }?;
        }
        Ok(())
    })
}

/// Page-locked, and not mapped into the device: kernels cannot touch it.
///
/// # Safety
/// `address` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint) -> Status {
    answer(|| {
        let mut entered = enter()?;
        if flags >= 8 || bytes == 0 {
            return entered.machine.refuse(Status::INVALID_VALUE, "unknown flags, or 0 bytes");
        }
        entered.machine.no_capture_forbids("cuMemHostAlloc")?;
        entered.machine.inject(Call::HostAlloc)?;
        let buffer = Pinned::allocate(bytes, entered.device.ordinal, entered.context);
        let buffer = buffer.ok_or(Status::OUT_OF_MEMORY)?;
        // SAFETY: forwarded.
        unsafe { put(address, buffer.address as *mut c_void) }
    })
}

/// # Safety
/// `address` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(address: *mut *mut c_void, bytes: usize) -> Status {
    // SAFETY: forwarded.
    unsafe { cuMemHostAlloc(address, bytes, 0) }
}

/// A buffer that work may still use must not be freed: nothing promises that this call waits.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: *mut c_void) -> Status {
    answer(|| {
        let mut entered = enter_any()?;
        entered.machine.no_capture_forbids("cuMemFreeHost")?;
        let Some((buffer, idle)) = Pinned::free(address as usize) else {
            return entered.machine.refuse(
                Status::INVALID_VALUE,
                format!("cuMemFreeHost of {address:p}, which no page-locked buffer begins at"),
            );
        };
        if !idle && entered.healthy().is_ok() {
            let context = entered.context;
            let message = format!(
                "page-locked buffer of {} bytes freed while a copy that the host has not waited for uses it",
                buffer.bytes
            );
            entered.machine.poison(context, Status::ILLEGAL_ADDRESS, message);
        }
        entered.healthy()
    })
}

/// Which side of the bus an address is on, for a copy of `bytes` that `role` names.
fn device_place(machine: &mut Machine, address: u64, bytes: usize, role: &str) -> Outcome<Place> {
    if machine.is_allocated(address, bytes as u64) {
        return Ok(Place::Device(address));
    }
    machine.refuse(
        Status::INVALID_VALUE,
        format!("{role}: {bytes} bytes at {address:#x} are not all in one live allocation"),
    )
}

fn pinned_place(address: usize, bytes: usize) -> Option<Place> {
    let buffer = Pinned::around(address, bytes)?;
    let offset = address - buffer.address;
    Some(Place::Pinned { buffer, offset })
}

/// Host to device. `waits`: the call's name has no "Async".
///
/// # Safety
/// `from` may be read for `bytes` bytes, until the copy is over if it is page-locked.
unsafe fn upload(to: u64, from: *const c_void, bytes: usize, stream: Handle, waits: bool) -> Outcome {
    let (mut entered, stream) = enter_stream_to_work(stream)?;
    if waits {
        entered.machine.no_capture_forbids("a synchronous copy")?;
    }
    entered.machine.inject(Call::Copy)?;
    if bytes == 0 {
        return Ok(());
    }
    let to = device_place(&mut entered.machine, to, bytes, "copy host to device")?;
    let pinned = pinned_place(from as usize, bytes);
    let is_pinned = pinned.is_some();
    if waits && !is_pinned {
        entered = stream::synchronize(entered, stream)?;
    }
    let from = pinned.unwrap_or_else(|| {
        // SAFETY: as the caller promises.
        Place::Staged(Arc::from(unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) }))
    });
    entered.machine.enqueue(stream, Work::Copy { to, from, bytes })?;
    if waits && is_pinned {
        return stream::synchronize(entered, stream).map(drop);
    }
    entered.machine.progress();
    Ok(())
}

/// Device to host.
///
/// # Safety
/// `to` may be written for `bytes` bytes, until the copy is over if it is page-locked.
unsafe fn download(to: *mut c_void, from: u64, bytes: usize, stream: Handle, waits: bool) -> Outcome {
    let (mut entered, stream) = enter_stream_to_work(stream)?;
    if waits {
        entered.machine.no_capture_forbids("a synchronous copy")?;
    }
    entered.machine.inject(Call::Copy)?;
    if bytes == 0 {
        return Ok(());
    }
    let from = device_place(&mut entered.machine, from, bytes, "copy device to host")?;
    let pinned = pinned_place(to as usize, bytes);
    let waits = waits || pinned.is_none();
    let to = pinned.unwrap_or(Place::Pageable(to as usize));
    entered.machine.enqueue(stream, Work::Copy { to, from, bytes })?;
    if waits {
        return stream::synchronize(entered, stream).map(drop);
    }
    entered.machine.progress();
    Ok(())
}

/// Device to device.
fn copy(to: u64, from: u64, bytes: usize, stream: Handle) -> Outcome {
    let (mut entered, stream) = enter_stream_to_work(stream)?;
    entered.machine.inject(Call::Copy)?;
    if bytes == 0 {
        return Ok(());
    }
    let to = device_place(&mut entered.machine, to, bytes, "copy device to device, target")?;
    let from = device_place(&mut entered.machine, from, bytes, "copy device to device, source")?;
    entered.machine.enqueue(stream, Work::Copy { to, from, bytes })?;
    entered.machine.progress();
    Ok(())
}

/// # Safety
/// `from` may be read for `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { upload(to, from, bytes, Handle::NULL, true) })
}

/// # Safety
/// `from` may be read for `bytes` bytes, until the copy is over if it is page-locked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: Handle,
) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { upload(to, from, bytes, stream, false) })
}

/// # Safety
/// `to` may be written for `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { download(to, from, bytes, Handle::NULL, true) })
}

/// # Safety
/// `to` may be written for `bytes` bytes, until the copy is over if it is page-locked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    stream: Handle,
) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { download(to, from, bytes, stream, false) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> Status {
    answer(|| copy(to, from, bytes, Handle::NULL))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> Status {
    answer(|| copy(to, from, bytes, stream))
}

/// Sorts a copy by where its addresses lie.
///
/// # Safety
/// As for the copy in question.
unsafe fn copy_any(to: u64, from: u64, bytes: usize, stream: Handle, waits: bool) -> Outcome {
    let machine = enter()?.machine;
    let (to_device, from_device) = (machine.is_allocated(to, 1), machine.is_allocated(from, 1));
    drop(machine);
    // SAFETY: forwarded.
    unsafe {
        match (to_device, from_device) {
            (true, true) => copy(to, from, bytes, stream),
            (true, false) => upload(to, from as *const c_void, bytes, stream, waits),
            (false, true) => download(to as *mut c_void, from, bytes, stream, waits),
            (false, false) => Err(Status::NOT_SUPPORTED),
        }
    }
}

/// # Safety
/// Host addresses may be read or written for `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy(to: u64, from: u64, bytes: usize) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { copy_any(to, from, bytes, Handle::NULL, true) })
}

/// # Safety
/// Host addresses may be read or written for `bytes` bytes, until the copy is over if they are page-locked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) -> Status {
    // SAFETY: forwarded.
    answer(|| unsafe { copy_any(to, from, bytes, stream, false) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    to_context: Handle,
    from: u64,
    from_context: Handle,
    bytes: usize,
    stream: Handle,
) -> Status {
    answer(|| {
        let (to_device, _) = to_context.open(Kind::Context).ok_or(Status::INVALID_CONTEXT)?;
        let (from_device, _) = from_context.open(Kind::Context).ok_or(Status::INVALID_CONTEXT)?;
        if to_device == from_device {
            return copy(to, from, bytes, stream);
        }
        usable()?;
        let mut places = Vec::new();
        for (ordinal, address) in [(to_device, to), (from_device, from)] {
            let mut machine = Device::of(ordinal).lock();
            device_place(&mut machine, address, bytes, "copy between devices")?;
            places.push((ordinal, address));
        }
        let (mut entered, stream) = enter_stream_to_work(stream)?;
        entered.machine.inject(Call::Copy)?;
        let here = entered.device.ordinal;
        let place = |(ordinal, address): (u8, u64)| {
            if ordinal == here { Place::Device(address) } else { Place::Peer { ordinal, address } }
        };
        let work = Work::Copy { to: place(places[0]), from: place(places[1]), bytes };
        // What the host has seen end on the other devices is over for this copy too.
        let mut learned = Clock::default();
        for (ordinal, _) in places.into_iter().filter(|&(ordinal, _)| ordinal != here) {
            learned.merge(&host::known(ordinal));
            learned.add(beginning_of(ordinal));
        }
        if entered.machine.captured(stream, &work)? {
            return Ok(());
        }
        entered.machine.enqueue_after(stream, Vec::new(), &learned, work)?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeer(
    to: u64,
    to_context: Handle,
    from: u64,
    from_context: Handle,
    bytes: usize,
) -> Status {
    cuMemcpyPeerAsync(to, to_context, from, from_context, bytes, Handle::NULL)
}

/// `count` values of `width` bytes. The call never waits: its target is never host memory.
fn fill(at: u64, value: u32, width: usize, count: usize, stream: Handle) -> Outcome {
    let (mut entered, stream) = enter_stream_to_work(stream)?;
    entered.machine.inject(Call::Copy)?;
    if count == 0 {
        return Ok(());
    }
    if !at.is_multiple_of(width as u64) {
        return entered
            .machine
            .refuse(Status::INVALID_VALUE, format!("memset at {at:#x}: not aligned to {width}"));
    }
    let bytes = count.checked_mul(width).ok_or(Status::INVALID_VALUE)?;
    device_place(&mut entered.machine, at, bytes, "memset")?;
    entered.machine.enqueue(stream, Work::Fill { at, value, width, count })?;
    entered.machine.progress();
    Ok(())
}

macro_rules! fills {
    ($($name:ident, $asynchronous:ident, $value:ty, $width:literal;)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(at: u64, value: $value, count: usize) -> Status {
            answer(|| fill(at, value.into(), $width, count, Handle::NULL))
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $asynchronous(at: u64, value: $value, count: usize, stream: Handle) -> Status {
            answer(|| fill(at, value.into(), $width, count, stream))
        }
    )*};
}

fills! {
    cuMemsetD8_v2, cuMemsetD8Async, u8, 1;
    cuMemsetD16_v2, cuMemsetD16Async, u16, 2;
    cuMemsetD32_v2, cuMemsetD32Async, u32, 4;
}
