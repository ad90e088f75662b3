//! A GPU in software: it runs the PTX that `nvcc` writes, thread by thread, and checks each memory access.

mod arith;
mod control;
pub mod counters;
pub mod driver;
pub mod exec;
pub mod harness;
pub mod memory;
pub mod ptx;

pub use control::{Device, InstallError, KernelCounts, Kind, Report, SoftCuda, Status, install, try_install};
