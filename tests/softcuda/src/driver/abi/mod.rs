//! The exported C functions, grouped as NVIDIA's reference groups them. Each enters a device, does one
//! thing, and answers with a code; what they promise is in the CUDA driver API reference, and only where
//! softcuda differs does a comment say so.

#![allow(non_snake_case)]

pub mod absent;
pub mod context;
pub mod control;
pub mod event;
pub mod graph;
pub mod launch;
pub mod memory;
pub mod module;
pub mod pool;
pub mod stream;
