//! Memory pools. They are names only: all of a device's pools take from its one memory, and keep nothing back.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};

use crate::driver::handle::{Handle, Kind};
use crate::driver::machine::{Device, Machine, Pool};
use crate::driver::status::{Outcome, Status};
use crate::driver::{Entered, answer, put, usable};

fn enter_pool(pool: Handle) -> Outcome<(Entered, u64)> {
    usable()?;
    let (ordinal, serial) = pool.open(Kind::Pool).ok_or(Status::INVALID_HANDLE)?;
    let device = Device::of(ordinal);
    let machine = device.lock();
    if !machine.pools.contains_key(&serial) {
        return Err(Status::INVALID_HANDLE);
    }
    Ok((Entered { device, machine, context: 0 }, serial))
}

/// The pool number 0 is the device's own.
const DEFAULT_POOL: u64 = 0;

fn device_pool(ordinal: c_int, pick: impl FnOnce(&Machine) -> u64) -> Outcome<Handle> {
    usable()?;
    let ordinal = u8::try_from(ordinal).map_err(|_| Status::INVALID_DEVICE)?;
    let mut machine = Device::of(ordinal).lock();
    machine.pools.entry(DEFAULT_POOL).or_default();
    Ok(Handle::new(Kind::Pool, ordinal, pick(&machine)))
}

/// # Safety
/// `pool` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut Handle, ordinal: c_int) -> Status {
    answer(|| {
        let found = device_pool(ordinal, |_| DEFAULT_POOL)?;
        // SAFETY: forwarded.
        unsafe { put(pool, found) }
    })
}

/// # Safety
/// `pool` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetMemPool(pool: *mut Handle, ordinal: c_int) -> Status {
    answer(|| {
        let found = device_pool(ordinal, |machine| machine.current_pool.unwrap_or(DEFAULT_POOL))?;
        // SAFETY: forwarded.
        unsafe { put(pool, found) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceSetMemPool(ordinal: c_int, pool: Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_pool(pool)?;
        if c_int::from(entered.device.ordinal) != ordinal {
            return Err(Status::INVALID_VALUE);
        }
        entered.machine.current_pool = Some(serial);
        Ok(())
    })
}

/// `CUmemPoolProps`, as far as it is read: pinned device memory of one device.
#[repr(C)]
pub struct PoolProperties {
    allocation: c_uint,
    handle_types: c_uint,
    location: c_uint,
    device: c_int,
}

/// # Safety
/// `pool` may be written, `properties` read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolCreate(pool: *mut Handle, properties: *const PoolProperties) -> Status {
    answer(|| {
        usable()?;
        // SAFETY: forwarded.
        let properties = unsafe { properties.as_ref() }.ok_or(Status::INVALID_VALUE)?;
        let ordinal = u8::try_from(properties.device).map_err(|_| Status::INVALID_DEVICE)?;
        if (properties.allocation, properties.handle_types, properties.location) != (1, 0, 1) {
            return Err(Status::NOT_SUPPORTED);
        }
        let mut machine = Device::of(ordinal).lock();
        let serial = machine.new_serial();
        machine.pools.insert(serial, Pool::default());
        // SAFETY: forwarded.
        unsafe { put(pool, Handle::new(Kind::Pool, ordinal, serial)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolDestroy(pool: Handle) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_pool(pool)?;
        if serial == DEFAULT_POOL {
            return Err(Status::INVALID_VALUE);
        }
        entered.machine.pools.remove(&serial);
        if entered.machine.current_pool == Some(serial) {
            entered.machine.current_pool = None;
        }
        Ok(())
    })
}

/// Pools keep nothing back, so there is nothing to trim.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(pool: Handle, _keep: usize) -> Status {
    answer(|| enter_pool(pool).map(drop))
}

/// `CUmemPool_attribute`: three switches (`int`), the release threshold and four amounts (`cuuint64_t`).
const LAST_SWITCH: c_uint = 3;
const RELEASE_THRESHOLD: c_uint = 4;
const LAST_AMOUNT: c_uint = 8;

/// The amounts are the device's: all pools take from one memory, and none holds more than is in use.
///
/// # Safety
/// `value` may be written as the attribute's type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolGetAttribute(
    pool: Handle,
    attribute: c_uint,
    value: *mut c_void,
) -> Status {
    answer(|| {
        let (entered, serial) = enter_pool(pool)?;
        let set = entered.machine.pools[&serial].attributes.get(&attribute).copied();
        // SAFETY: forwarded.
        unsafe {
            match attribute {
                1..=LAST_SWITCH => put(value.cast::<c_int>(), set.unwrap_or(1) as c_int),
                RELEASE_THRESHOLD => put(value.cast::<c_ulonglong>(), set.unwrap_or(0)),
                ..=LAST_AMOUNT => {
                    let high = attribute.is_multiple_of(2);
                    let machine = &entered.machine;
                    put(
                        value.cast::<c_ulonglong>(),
                        if high { machine.most_used } else { machine.used_memory },
                    )
                }
                _ => Err(Status::INVALID_VALUE),
            }
        }
    })
}

/// # Safety
/// `value` may be read as the attribute's type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolSetAttribute(
    pool: Handle,
    attribute: c_uint,
    value: *mut c_void,
) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_pool(pool)?;
        if value.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: forwarded.
        let value = unsafe {
            match attribute {
                1..=LAST_SWITCH => *value.cast::<c_int>() as u64,
                ..=LAST_AMOUNT => *value.cast::<c_ulonglong>(),
                _ => return Err(Status::INVALID_VALUE),
            }
        };
        if attribute > RELEASE_THRESHOLD {
            // The high-water marks can only be set back.
            if value != 0 {
                return Err(Status::INVALID_VALUE);
            }
            entered.machine.most_used = entered.machine.used_memory;
        } else if let Some(pool) = entered.machine.pools.get_mut(&serial) {
            pool.attributes.insert(attribute, value);
        }
        Ok(())
    })
}

/// # Safety
/// `address` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocFromPoolAsync(
    address: *mut u64,
    bytes: usize,
    pool: Handle,
    stream: Handle,
) -> Status {
    match answer(|| enter_pool(pool).map(drop)) {
        // SAFETY: forwarded.
        Status::SUCCESS => unsafe { super::memory::cuMemAllocAsync(address, bytes, stream) },
        code => code,
    }
}
