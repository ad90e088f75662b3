//! How a kernel is launched. The numbers come from a pure function per op, so that a test can go through all of them
//! without a card.

use super::module::Kernels;
use cudarc::driver::{CudaStream, DriverError, result, sys};
use std::{ffi::c_void, fmt};

/// Shared memory that a block gets without asking.
const DEFAULT_SHARED: u32 = 48 << 10;

/// One launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    pub kernel: &'static str,
    /// Blocks.
    pub grid: (u32, u32, u32),
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// The one argument of a kernel: a `#[repr(C)]` struct of device addresses and scalars, whose twin stands in the kernel's `.cu`.
///
/// # Safety
/// Layout and meaning are those of the struct that the kernel takes.
pub(super) unsafe trait KernelArgs: Copy {}

impl Launch {
    /// A launch of no blocks is nothing to do, which the driver would refuse.
    pub fn is_empty(&self) -> bool {
        self.grid.0 == 0 || self.grid.1 == 0 || self.grid.2 == 0
    }

    pub(super) fn run<A: KernelArgs>(
        &self,
        kernels: &Kernels,
        stream: &CudaStream,
        args: &A,
    ) -> Result<(), DriverError> {
        let function = kernels.get(self.kernel);
        if self.shared > DEFAULT_SHARED {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, self.shared as i32)?;
        }
        stream.context().bind_to_thread()?;
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the arguments before it returns. They are those of this kernel (`KernelArgs`), their
        // addresses lie in tensors whose shapes `ops` checked, and memory that a tensor lets go of is not used again
        // before this stream has done what was issued on it until then.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                self.grid,
                (self.block, 1, 1),
                self.shared,
                stream.cu_stream(),
                &mut params,
            )
        }
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (x, y, z) = self.grid;
        write!(f, "{x}×{y}×{z} blocks of {} threads with {} bytes", self.block, self.shared)
    }
}
