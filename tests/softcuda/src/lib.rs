//! A GPU in software: it runs the PTX that `nvcc` writes, thread by thread, and checks each memory access.

pub mod ptx;
