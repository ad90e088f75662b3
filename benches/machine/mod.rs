//! The device that benches run on, and what it can do at best, measured in the same run.
//!
//! `C2C_BENCH_DEVICE` names it as `--device` does; the CPU where it is not set. A device that is not there is no error: the bench
//! says what it needs and does nothing.

mod card;

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

/// Operations or bytes a second; `None` where unknown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    f32: Option<f64>,
    bf16: Option<f64>,
    int8: Option<f64>,
    read: Option<f64>,
}

pub struct Machine {
    pub device: Arc<dyn Backend>,
    /// `None` in a smoke test, where nothing is timed.
    rates: Option<Rates>,
}

impl Machine {
    /// `None`, with the reason printed, if the device is not there.
    pub fn open() -> Option<Machine> {
        let given = |option: &str| std::env::args().any(|argument| argument == option);
        // As criterion decides: `cargo bench -- --test`, or `cargo test` with the benches.
        let smoke = given("--test") || !given("--bench");
        let named = std::env::var("C2C_BENCH_DEVICE").unwrap_or_else(|_| "cpu".into());
        let opened = named.parse().and_then(|choice: DeviceChoice| Ok((choice, open(choice, 0)?)));
        let (choice, device) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                println!("skipped: {error}");
                return None;
            }
        };
        let rates = (!smoke).then(|| match device.device() {
            "cuda" => {
                let ordinal = if let DeviceChoice::Cuda(ordinal) = choice { ordinal } else { 0 };
                card::measure(ordinal).unwrap_or_else(|error| {
                    println!("the card's limits could not be measured: {error}");
                    Rates::default()
                })
            }
            _ => {
                let limits = Limits::measure(device.threads());
                let [f32, bf16, int8] = [limits.f32_flops, limits.bf16_flops, limits.int8_ops].map(Some);
                Rates { f32, bf16, int8, read: Some(limits.read_bytes) }
            }
        });
        if let Some(rates) = &rates {
            let giga = |rate: Option<f64>| rate.map_or("unknown".into(), |rate| format!("{:.1}", rate / 1e9));
            let [f32, bf16, int8, read] = [rates.f32, rates.bf16, rates.int8, rates.read].map(giga);
            println!(
                "{}: f32 {f32} GFLOP/s, bf16 {bf16} GFLOP/s, int8 {int8} GOP/s, memory {read} GB/s\n",
                device.description()
            );
        }
        Some(Machine { device, rates })
    }

    /// Nothing is timed: small shapes stand for those that the names of the benches give.
    pub fn smoke(&self) -> bool {
        self.rates.is_none()
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
        times.sort();
        let median = *times.get(times.len() / 2)?;
        self.share(id, work, median).map(|()| median)
    }

    /// Prints what `work` done in `time` is of the limit; `None` in a smoke test.
    pub fn share(&self, id: &str, work: Work, time: Duration) -> Option<()> {
        let rates = self.rates.as_ref()?;
        let (amount, limit, unit, of) = match work {
            Work::F32(amount) => (amount, rates.f32, "GFLOP/s", "f32 multiply-add rate"),
            Work::Bf16(amount) => (amount, rates.bf16, "GFLOP/s", "bf16 multiply-add rate"),
            Work::Int8(amount) => (amount, rates.int8, "GOP/s", "int8 multiply-add rate"),
            Work::Read(amount) => (amount, rates.read, "GB/s", "memory bandwidth"),
        };
        let rate = amount / time.as_secs_f64();
        let share =
            limit.map_or(String::new(), |limit| format!(" = {:.0} % of the {of}", 100.0 * rate / limit));
        println!("{id}: {:.1} {unit}{share}\n", rate / 1e9);
        Some(())
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
