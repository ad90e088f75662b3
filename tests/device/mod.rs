//! The GPU of the tests: softcuda, or a real card where `C2C_TEST_DEVICE=cuda` says so.

use c2c::backend::{Backend, cuda};
use std::sync::Arc;

/// A device of one's own; `None`, visibly, where c2c was built without nvcc.
pub fn cuda() -> Option<Arc<dyn Backend>> {
    if cuda::MODULES.is_empty() {
        println!("skipped: built without nvcc, there are no CUDA kernels (scripts/nvcc.sh)");
        return None;
    }
    Some(cuda::Cuda::open(0).unwrap())
}
