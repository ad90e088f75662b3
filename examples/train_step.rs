//! Times one optimiser step of the fuser on the shapes that the authors' training script is timed on (see
//! benches/synthetic/step.rs): `cargo run --release --example train_step -- --dtype bf16`

#[path = "../benches/synthetic/mod.rs"]
mod synthetic;

use c2c::{
    backend::{self, DType, DeviceChoice, Precision, cpu::Limits},
    pipeline::peak_rss_bytes,
};
use clap::{Parser, ValueEnum};
use serde_json::json;
use std::time::Instant;
use synthetic::{
    receiver, sharer, small,
    step::{Shape, Step},
};

/// Time an optimiser step on the shapes of the published pair, with random weights
#[derive(Parser)]
struct Args {
    /// Models, caches and arithmetic; the fuser is f32 always
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// Timed steps after one that warms up; medians are reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// CPU threads; 0 = all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Of each model; all of them by default
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    layers: Option<u16>,
    /// Tiny models: shows in a second that everything works
    #[arg(long)]
    tiny: bool,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeArg {
    F32,
    Bf16,
}

/// Names of the times of a step, in the order of [`main`]'s.
const NAMES: [&str; 8] = [
    "sharer",
    "receiver_forward",
    "fuse",
    "loss",
    "receiver_backward",
    "fuser_backward",
    "norm_and_adamw",
    "step",
];

fn main() {
    let args = Args::parse();
    let device = backend::open(DeviceChoice::Cpu, args.threads).expect("every machine has a CPU");
    let limits = Limits::measure(device.threads());
    let (dtype, precision, limit) = match args.dtype {
        DtypeArg::F32 => (DType::F32, Precision::F32, limits.f32_flops),
        DtypeArg::Bf16 => (DType::Bf16, Precision::Fast, limits.bf16_flops),
    };
    let layers = |all: usize| args.layers.map_or(all, usize::from);
    let shape = match args.tiny {
        true => Shape {
            receiver: small(receiver(2)),
            sharer: small(sharer(2)),
            hidden: 32,
            tokens: 64,
            answer: 16,
        },
        false => {
            let (receiver, sharer) = (receiver(layers(28)), sharer(layers(24)));
            Shape { receiver, sharer, hidden: 1024, tokens: 256, answer: 64 }
        }
    };
    let tokens = shape.tokens;
    let mut step = Step::new(&device, shape, dtype, precision);
    let mut times: Vec<[f64; 8]> = Vec::new();
    for _ in 0..=args.runs {
        let start = Instant::now();
        let report = step.learn();
        let learned = start.elapsed();
        step.update();
        let whole = start.elapsed();
        let p = report.phases;
        let all = [p.sharer, p.receiver, p.fuse, p.loss, p.backward, p.fuse_backward, whole - learned, whole];
        times.push(all.map(|time| time.as_secs_f64()));
        assert!(report.loss.is_finite(), "the loss is no number");
    }
    let timed = &times[1..];
    let median = |of: usize| {
        let mut all: Vec<f64> = timed.iter().map(|times| times[of]).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let f = step.flops();
    let parameters = step.trainer.fusers[0].parameters.count();
    let flops = [f.sharer, f.receiver, f.fuse, f.loss, f.backward, f.fuse_backward, 0.0, f.sum()];
    let phases: Vec<(&str, f64, f64)> =
        NAMES.iter().enumerate().map(|(i, name)| (*name, flops[i], median(i))).collect();
    if args.json {
        let phases = phases.iter().map(
            |(name, flops, seconds)| json!({ "phase": name, "gflop": flops / 1e9, "median_s": seconds }),
        );
        let result = json!({
            "device": device.description(),
            "threads": device.threads(),
            "dtype": dtype.to_string(),
            "tokens": tokens,
            "parameters": parameters,
            "limits": { "f32_flops": limits.f32_flops, "bf16_flops": limits.bf16_flops, "read_bytes": limits.read_bytes },
            "phases": phases.collect::<Vec<_>>(),
            "peak_rss_bytes": peak_rss_bytes(),
        });
        println!("{result}");
        return;
    }
    println!("{}, {dtype}: {:.0} GFLOP/s at best", device.description(), limit / 1e9);
    println!("{tokens} tokens, {parameters} parameters, at most {} MiB in use", peak_rss_bytes() >> 20);
    for (name, flops, seconds) in phases {
        let rate = match name {
            "norm_and_adamw" => {
                let bytes = 36.0 * parameters as f64 / seconds;
                format!("{:>8.1} GB/s = {:>3.0} %", bytes / 1e9, 100.0 * bytes / limits.read_bytes)
            }
            _ => {
                format!("{:>8.1} GFLOP/s = {:>3.0} %", flops / seconds / 1e9, 100.0 * flops / seconds / limit)
            }
        };
        println!("{name:<20}{seconds:>9.4} s {rate}");
    }
}
