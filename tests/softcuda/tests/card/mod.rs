//! A software card of a test's own, opened through cudarc.
#![allow(dead_code)] // Each test file uses a part.

use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use softcuda::Device;

pub struct Card {
    // First, so that the context is gone when the device is given back.
    pub context: Arc<CudaContext>,
    pub device: Device,
}

impl Card {
    /// cudarc's event tracking is off: what orders streams is what the test writes.
    pub fn new() -> Card {
        let card = Card::tracked();
        // SAFETY: the tests order their streams themselves, or mean not to.
        unsafe { card.context.disable_event_tracking() };
        card
    }

    pub fn tracked() -> Card {
        let device = softcuda::install().fresh_device();
        let context = CudaContext::new(device.ordinal).unwrap();
        Card { context, device }
    }

    pub fn module(&self) -> Arc<CudaModule> {
        self.context.load_module(Ptx::from_src(KERNELS)).unwrap()
    }

    pub fn kernel(&self, name: &str) -> CudaFunction {
        self.module().load_function(name).unwrap()
    }

    pub fn stream(&self) -> Arc<CudaStream> {
        self.context.new_stream().unwrap()
    }
}

/// Made from driver.cu.
pub const KERNELS: &str = include_str!("../ptx/driver.ptx");

pub fn grid(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// Enough threads for `n` elements, one each, in blocks of 64.
pub fn each(n: usize) -> LaunchConfig {
    grid((n as u32).div_ceil(64), 64)
}

/// Launches `fill_u32` over the whole of `x`.
pub fn fill(
    stream: &CudaStream,
    kernel: &CudaFunction,
    x: &CudaSlice<u32>,
    value: u32,
) -> Result<(), DriverError> {
    let n = x.len() as i32;
    // SAFETY: the kernel writes n elements of x.
    unsafe { stream.launch_builder(kernel).arg(x).arg(&value).arg(&n).launch(each(x.len())) }.map(drop)
}

/// The code of a call that had to fail.
#[track_caller]
pub fn code<T>(result: Result<T, DriverError>) -> CUresult {
    match result {
        Ok(_) => panic!("the call succeeded"),
        Err(DriverError(code)) => code,
    }
}
