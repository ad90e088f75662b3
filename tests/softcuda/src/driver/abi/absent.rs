//! What these devices do not have, and whose attributes say so: managed memory, memory of graphics libraries,
//! clusters of blocks. A program that asks all the same is told, not stopped by a missing symbol.

use std::ffi::{c_int, c_uint, c_void};

use crate::driver::handle::Handle;
use crate::driver::status::Status;

/// `CUmemLocation`.
#[repr(C)]
pub struct Location {
    kind: c_uint,
    id: c_int,
}

macro_rules! absent {
    ($($name:ident($($argument:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($(_: $argument),*) -> Status {
            Status::NOT_SUPPORTED
        }
    )*};
}

absent! {
    cuMemAllocManaged(*mut u64, usize, c_uint);
    cuMemAdvise_v2(u64, usize, c_uint, Location);
    cuMemPrefetchAsync_v2(u64, usize, Location, c_uint, Handle);
    cuStreamAttachMemAsync(Handle, u64, usize, c_uint);
    cuImportExternalMemory(*mut c_void, *const c_void);
    cuExternalMemoryGetMappedBuffer(*mut u64, *mut c_void, *const c_void);
    cuDestroyExternalMemory(*mut c_void);
    cuOccupancyMaxActiveClusters(*mut c_int, Handle, *const c_void);
    cuOccupancyMaxPotentialClusterSize(*mut c_int, Handle, *const c_void);
    cuMemHostGetDevicePointer_v2(*mut u64, *mut c_void, c_uint);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
}
