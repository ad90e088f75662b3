//! A GPU in software: it runs the PTX that `nvcc` writes, thread by thread, and checks each memory access.

mod arith;
pub mod counters;
pub mod exec;
pub mod harness;
pub mod memory;
pub mod ptx;
