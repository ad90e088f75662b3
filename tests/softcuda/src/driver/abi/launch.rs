//! Kernel launches, attributes of functions, occupancy.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

use crate::driver::handle::{Handle, Kind};
use crate::driver::inject::Kind as Call;
use crate::driver::limits::{MULTIPROCESSORS, Needs, Shape};
use crate::driver::machine::Function;
use crate::driver::status::{Outcome, Status};
use crate::driver::work::{KernelCall, Work};
use crate::driver::{answer, enter_stream_to_work, put};

use super::module::enter_function;

/// `extra` of `cuLaunchKernel`: end, the packed parameters, their size.
const EXTRA_END: usize = 0;
const EXTRA_BUFFER: usize = 1;
const EXTRA_SIZE: usize = 2;

/// The kernel's parameters, packed as the PTX lays them out.
///
/// # Safety
/// `parameters` holds a pointer to each parameter, or `extra` names a buffer of them, or the kernel has none.
unsafe fn pack(
    function: &Function,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Outcome<Vec<u8>> {
    let kernel = function.ptx.kernel(&function.name).ok_or(Status::INVALID_HANDLE)?;
    let mut packed = vec![0; kernel.param_bytes as usize];
    if kernel.params.is_empty() {
        return Ok(packed);
    }
    if !parameters.is_null() {
        for (number, parameter) in kernel.params.iter().enumerate() {
            // SAFETY: as the caller promises, one pointer for each parameter, to as many bytes as it has.
            unsafe {
                let from = *parameters.add(number);
                if from.is_null() {
                    return Err(Status::INVALID_VALUE);
                }
                let to = &mut packed[parameter.offset as usize..][..parameter.size as usize];
                std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.as_mut_ptr(), to.len());
            }
        }
        return Ok(packed);
    }
    if extra.is_null() {
        return Err(Status::INVALID_VALUE);
    }
    let (mut buffer, mut size) = (std::ptr::null::<u8>(), 0);
    for pair in 0.. {
        // SAFETY: as the caller promises, pairs of a name and a pointer, up to the end.
        unsafe {
            let name = *extra.add(2 * pair) as usize;
            if name == EXTRA_END {
                break;
            }
            let value = *extra.add(2 * pair + 1);
            match name {
                EXTRA_BUFFER => buffer = value.cast(),
                EXTRA_SIZE => size = *value.cast::<usize>(),
                _ => return Err(Status::INVALID_VALUE),
            }
        }
    }
    if buffer.is_null() || size < packed.len() {
        return Err(Status::INVALID_VALUE);
    }
    // SAFETY: the caller says that the buffer has `size` bytes.
    unsafe { std::ptr::copy_nonoverlapping(buffer, packed.as_mut_ptr(), packed.len()) };
    Ok(packed)
}

/// # Safety
/// As for [`pack`].
unsafe fn launch(
    function: Handle,
    shape: Shape,
    stream: Handle,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
    cooperative: bool,
) -> Outcome {
    let (mut entered, stream) = enter_stream_to_work(stream)?;
    let (ordinal, serial) = function.open(Kind::Function).ok_or(Status::INVALID_HANDLE)?;
    let found = entered.machine.functions.get(&serial).cloned();
    let Some(function) =
        found.filter(|found| ordinal == entered.device.ordinal && found.context == entered.context)
    else {
        return entered.machine.refuse(
            Status::INVALID_HANDLE,
            "the function is gone, or belongs to another context than the stream",
        );
    };
    entered.machine.inject(Call::Launch)?;
    if let Some(why) = entered.machine.limits.refuse(&shape, &function.needs) {
        return entered.machine.refuse(Status::INVALID_VALUE, format!("{}: {why}", function.name));
    }
    let limits = &entered.machine.limits;
    if cooperative {
        let threads: u32 = shape.block.iter().product();
        let resident =
            u64::from(limits.resident_blocks(&function.needs, threads, shape.dynamic_shared.into()))
                * limits.get(MULTIPROCESSORS)? as u64;
        let blocks: u64 = shape.grid.iter().map(|&n| u64::from(n)).product();
        if blocks > resident {
            return entered.machine.refuse(
                Status::COOPERATIVE_LAUNCH_TOO_LARGE,
                format!("{}: {blocks} blocks, and {resident} can be resident at once", function.name),
            );
        }
    }
    // SAFETY: forwarded.
    let parameters = match unsafe { pack(&function, parameters, extra) } {
        Ok(parameters) => parameters,
        Err(code) => {
            return entered.machine.refuse(code, format!("{}: parameters missing", function.name));
        }
    };
    let call = KernelCall { function, shape, parameters };
    entered.machine.enqueue(stream, Work::Kernel(Arc::new(call)))?;
    entered.machine.progress();
    Ok(())
}

/// # Safety
/// `parameters` holds a pointer to each parameter, or `extra` names a buffer of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    dynamic_shared: c_uint,
    stream: Handle,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Status {
    let shape = Shape { grid: [grid_x, grid_y, grid_z], block: [block_x, block_y, block_z], dynamic_shared };
    // SAFETY: forwarded.
    answer(|| unsafe { launch(function, shape, stream, parameters, extra, false) })
}

/// # Safety
/// `parameters` holds a pointer to each parameter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchCooperativeKernel(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    dynamic_shared: c_uint,
    stream: Handle,
    parameters: *mut *mut c_void,
) -> Status {
    let shape = Shape { grid: [grid_x, grid_y, grid_z], block: [block_x, block_y, block_z], dynamic_shared };
    // SAFETY: forwarded.
    answer(|| unsafe { launch(function, shape, stream, parameters, std::ptr::null_mut(), true) })
}

/// `CUfunction_attribute`.
const MAX_THREADS_PER_BLOCK: c_uint = 0;
const SHARED_SIZE: c_uint = 1;
const PTX_VERSION: c_uint = 5;
const BINARY_VERSION: c_uint = 6;
const CACHE_MODE_CA: c_uint = 7;
const MAX_DYNAMIC_SHARED: c_uint = 8;
const CARVEOUT: c_uint = 9;

/// Registers, local and constant bytes are what a card's compiler decides: not known here.
///
/// # Safety
/// `value` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: c_uint,
    function: Handle,
) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_function(function)?;
        let function = entered.machine.functions[&serial].clone();
        let limits = &entered.machine.limits;
        let (major, minor) = limits.capability();
        let found = match attribute {
            MAX_THREADS_PER_BLOCK => limits.max_threads(&function.needs) as c_int,
            SHARED_SIZE => function.needs.static_shared as c_int,
            PTX_VERSION => function.ptx.target as c_int,
            BINARY_VERSION => major * 10 + minor,
            CACHE_MODE_CA => 0,
            MAX_DYNAMIC_SHARED => limits.max_dynamic_shared(&function.needs) as c_int,
            CARVEOUT => -1,
            _ => {
                return entered.machine.refuse(
                    Status::NOT_SUPPORTED,
                    format!("function attribute {attribute}: only a card's compiler knows"),
                );
            }
        };
        // SAFETY: forwarded.
        unsafe { put(value, found) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: Handle, attribute: c_uint, value: c_int) -> Status {
    answer(|| {
        let (mut entered, serial) = enter_function(function)?;
        match attribute {
            MAX_DYNAMIC_SHARED => {
                let needs = entered.machine.functions[&serial].needs.clone();
                let bytes = u32::try_from(value).map_err(|_| Status::INVALID_VALUE)?;
                if !entered.machine.limits.allows_dynamic_shared(&needs, bytes) {
                    return entered.machine.refuse(
                        Status::INVALID_VALUE,
                        format!("{bytes} bytes of dynamic shared memory are more than a block can be given"),
                    );
                }
                entered.machine.change_needs(serial, |needs| needs.dynamic_shared_limit = Some(bytes));
                Ok(())
            }
            // A hint on how to split L1 and shared memory.
            CARVEOUT if (-1..=100).contains(&value) => Ok(()),
            _ => Err(Status::INVALID_VALUE),
        }
    })
}

/// A hint.
#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetCacheConfig(function: Handle, config: c_uint) -> Status {
    answer(|| {
        drop(enter_function(function)?);
        if config <= 3 { Ok(()) } else { Err(Status::INVALID_VALUE) }
    })
}

/// # Safety
/// `blocks` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    function: Handle,
    threads: c_int,
    dynamic_shared: usize,
) -> Status {
    // SAFETY: forwarded.
    unsafe {
        cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, dynamic_shared, 0)
    }
}

/// # Safety
/// `blocks` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    blocks: *mut c_int,
    function: Handle,
    threads: c_int,
    dynamic_shared: usize,
    flags: c_uint,
) -> Status {
    answer(|| {
        let (entered, serial) = enter_function(function)?;
        if threads <= 0 || flags > 1 {
            return Err(Status::INVALID_VALUE);
        }
        let needs = &entered.machine.functions[&serial].needs;
        let fit = entered.machine.limits.resident_blocks(needs, threads as u32, dynamic_shared as u64);
        // SAFETY: forwarded.
        unsafe { put(blocks, fit as c_int) }
    })
}

/// Dynamic shared memory a block of so many threads takes.
type BlockToShared = unsafe extern "C" fn(c_int) -> usize;

/// # Safety
/// The pointers may be written, and `shared_of` called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSize(
    least_grid: *mut c_int,
    block: *mut c_int,
    function: Handle,
    shared_of: Option<BlockToShared>,
    dynamic_shared: usize,
    limit: c_int,
) -> Status {
    // SAFETY: forwarded.
    unsafe {
        cuOccupancyMaxPotentialBlockSizeWithFlags(
            least_grid,
            block,
            function,
            shared_of,
            dynamic_shared,
            limit,
            0,
        )
    }
}

/// The largest block among those with the most resident threads.
///
/// # Safety
/// The pointers may be written, and `shared_of` called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSizeWithFlags(
    least_grid: *mut c_int,
    block: *mut c_int,
    function: Handle,
    shared_of: Option<BlockToShared>,
    dynamic_shared: usize,
    limit: c_int,
    flags: c_uint,
) -> Status {
    answer(|| {
        let (entered, serial) = enter_function(function)?;
        if flags > 1 || limit < 0 {
            return Err(Status::INVALID_VALUE);
        }
        let machine = &entered.machine;
        let needs = &machine.functions[&serial].needs;
        let most = machine.limits.max_threads(needs);
        let most = if limit == 0 { most } else { most.min(limit as u32) };
        let mut best = (0, 0, 0);
        for threads in (1..=most).rev().filter(|threads| threads % 32 == 0 || *threads == most) {
            // SAFETY: forwarded.
            let shared = shared_of.map_or(dynamic_shared, |shared_of| unsafe { shared_of(threads as c_int) });
            let blocks = machine.limits.resident_blocks(needs, threads, shared as u64);
            if blocks * threads > best.0 {
                best = (blocks * threads, threads, blocks);
            }
        }
        let multiprocessors = machine.limits.get(MULTIPROCESSORS)?;
        // SAFETY: forwarded.
        unsafe {
            put(block, best.1 as c_int)?;
            put(least_grid, best.2 as c_int * multiprocessors)
        }
    })
}

/// # Safety
/// `bytes` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyAvailableDynamicSMemPerBlock(
    bytes: *mut usize,
    function: Handle,
    blocks: c_int,
    threads: c_int,
) -> Status {
    answer(|| {
        let (entered, serial) = enter_function(function)?;
        if blocks <= 0 || threads <= 0 {
            return Err(Status::INVALID_VALUE);
        }
        let needs: &Needs = &entered.machine.functions[&serial].needs;
        let fit = entered.machine.limits.shared_for(needs, blocks as u32);
        // SAFETY: forwarded.
        unsafe { put(bytes, fit as usize) }
    })
}
