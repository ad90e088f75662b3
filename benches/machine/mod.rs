//! The device that benches run on, and what it can do at best, measured in the same run.

use c2c::backend::{Backend, DeviceChoice, cpu::Limits, open};
use criterion::{BenchmarkGroup, Criterion, SamplingMode, measurement::WallTime};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// What one run does, for its share of the limit that bounds it.
#[allow(dead_code)] // No bench has all kinds of work.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Multiplications and additions with f32, bf16 or int8 operands.
    F32(f64),
    Bf16(f64),
    Int8(f64),
    /// Bytes from memory.
    Read(f64),
}

pub struct Machine {
    pub device: Arc<dyn Backend>,
    /// `None` in a smoke test, where nothing is timed.
    limits: Option<Limits>,
}

impl Machine {
    pub fn open() -> Machine {
        let given = |option: &str| std::env::args().any(|argument| argument == option);
        // As criterion decides: `cargo bench -- --test`, or `cargo test` with the benches.
        let smoke = given("--test") || !given("--bench");
        let device = open(DeviceChoice::Cpu, 0).expect("every machine has a CPU");
        let limits = (!smoke).then(|| Limits::measure(device.threads()));
        if let Some(limits) = &limits {
            let [f32, bf16, int8] = [limits.f32_flops, limits.bf16_flops, limits.int8_ops].map(|x| x / 1e9);
            let read = limits.read_bytes / 1e9;
            println!(
                "{}: f32 {f32:.0} GFLOP/s, bf16 {bf16:.0} GFLOP/s, int8 {int8:.0} GOP/s, read {read:.1} GB/s\n",
                device.description()
            );
        }
        Machine { device, limits }
    }

    /// Nothing is timed: small shapes stand for those that the names of the benches give.
    pub fn smoke(&self) -> bool {
        self.limits.is_none()
    }

    /// Ten samples of at least one run each.
    pub fn group<'c>(&self, criterion: &'c mut Criterion, topic: &str) -> BenchmarkGroup<'c, WallTime> {
        let mut group = criterion.benchmark_group(topic);
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
        group
    }

    /// Times `run`, which does `work` and waits for it, and prints its share of the limit. Returns the median time,
    /// if it was timed: neither in a smoke test nor when the command line chose other benches.
    pub fn bench(
        &self,
        group: &mut BenchmarkGroup<WallTime>,
        id: &str,
        work: Work,
        mut run: impl FnMut(),
    ) -> Option<Duration> {
        let mut times: Vec<Duration> = Vec::new();
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|runs| {
                let before = times.len();
                for _ in 0..runs {
                    let start = Instant::now();
                    run();
                    times.push(start.elapsed());
                }
                times[before..].iter().sum()
            })
        });
        let limits = self.limits.as_ref()?;
        times.sort();
        let median = *times.get(times.len() / 2)?;
        let (amount, limit, unit, of) = match work {
            Work::F32(amount) => (amount, limits.f32_flops, "GFLOP/s", "f32 multiply-add rate"),
            Work::Bf16(amount) => (amount, limits.bf16_flops, "GFLOP/s", "bf16 multiply-add rate"),
            Work::Int8(amount) => (amount, limits.int8_ops, "GOP/s", "int8 multiply-add rate"),
            Work::Read(amount) => (amount, limits.read_bytes, "GB/s", "read bandwidth"),
        };
        let rate = amount / median.as_secs_f64();
        println!("{id}: {:.1} {unit} = {:.0} % of the {of}\n", rate / 1e9, 100.0 * rate / limit);
        Some(median)
    }
}

/// # Panics
/// If `found` is farther from `expected` than `tolerance` times the root mean square of `expected`, anywhere.
#[allow(dead_code)] // Whole pipelines are compared bit for bit instead.
pub fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let rms = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    for (index, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let off = (f64::from(found) - expected).abs();
        assert!(
            off <= tolerance * rms,
            "{what}: element {index} is {found}, expected {expected} (rms {rms})"
        );
    }
}
