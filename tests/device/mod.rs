//! The GPU of the tests: softcuda, or a real card where `C2C_TEST_DEVICE=cuda` says so.

#![allow(dead_code)] // Each test file uses a part.

pub mod forgetful;

use c2c::backend::{Backend, cuda};
use std::sync::Arc;

/// An opened device.
pub struct Gpu {
    pub backend: Arc<dyn Backend>,
    /// What steers and watches a software device; `None` on a real card. Dropped last.
    pub soft: Option<softcuda::Device>,
}

/// Whether there are kernels to run; says so if not.
pub fn kernels() -> bool {
    if cuda::MODULES.is_empty() {
        println!("skipped: built without nvcc, there are no CUDA kernels (scripts/nvcc.sh)");
    }
    !cuda::MODULES.is_empty()
}

fn real() -> bool {
    std::env::var("C2C_TEST_DEVICE").is_ok_and(|device| device == "cuda")
}

/// A software device of one's own, not opened yet; `None`, visibly, where there are no kernels or a real card is tested.
pub fn soft() -> Option<softcuda::Device> {
    if real() {
        println!("skipped: this needs a software device, and C2C_TEST_DEVICE=cuda asks for a real one");
        return None;
    }
    kernels().then(|| softcuda::install().fresh_device())
}

/// A GPU, software or real; `None`, visibly, where c2c was built without nvcc.
pub fn gpu() -> Option<Gpu> {
    if real() {
        let backend = cuda::Cuda::open(0).unwrap_or_else(|error| panic!("C2C_TEST_DEVICE=cuda: {error}"));
        return Some(Gpu { backend, soft: None });
    }
    let soft = soft()?;
    Some(Gpu { backend: cuda::Cuda::open(soft.ordinal).unwrap(), soft: Some(soft) })
}

impl Gpu {
    /// What the sanitizer found, if anything.
    pub fn fault(&self) -> Option<String> {
        self.soft.as_ref()?.first_fault().map(|report| report.message)
    }
}
