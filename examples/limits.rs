//! Prints what this machine can do at best: `cargo run --release --example limits [threads]`.

use c2c::backend::cpu::{Limits, Simd};

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok());
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let limits = Limits::measure(threads);
    println!("{} on {threads} threads", Simd::detect());
    println!("f32 multiply-add   {:8.1} GFLOP/s", limits.f32_flops / 1e9);
    println!("bf16 dot product   {:8.1} GFLOP/s", limits.bf16_flops / 1e9);
    println!("int8 dot product   {:8.1} GOP/s", limits.int8_ops / 1e9);
    println!("memory read        {:8.1} GB/s", limits.read_bytes / 1e9);
}
