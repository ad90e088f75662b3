//! Times two models and their fuser on random weights in the shapes that the authors' program is timed on (see
//! benches/synthetic/pair.rs): each prefill alone, both with the fuse, and a few decoded tokens after it.
//! `cargo run --release --example pair -- --tokens 256,1024 --dtype bf16`

#[path = "../benches/synthetic/mod.rs"]
mod synthetic;

use c2c::{
    backend::{self, Backend, DType, DeviceChoice, cpu::Limits},
    model::{Decoder, Goal},
    pipeline::{Lane, Overlap, WantedLogits, peak_rss_bytes},
};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};
use synthetic::pair::Pair;

/// Time both prefills, the fuse and decoding on the shapes of the published pair, with random weights
#[derive(Parser)]
struct Args {
    /// Lengths of the prompt
    #[arg(long, value_delimiter = ',', default_value = "256", value_parser = clap::value_parser!(u16).range(2..=8192))]
    tokens: Vec<u16>,
    /// Weights, caches and arithmetic
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// Timed runs after one that warms up; medians are reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// CPU threads; 0 = all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
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

/// Greedy tokens after each overlapped prefill, each followed by a pass, as the authors' program does.
const DECODED: usize = 16;

/// All runs of one thing, warm-up first.
struct Phase {
    name: &'static str,
    tokens: usize,
    /// Multiplications and additions.
    flops: f64,
    seconds: Vec<f64>,
}

impl Phase {
    fn new(name: &'static str, tokens: usize, flops: f64) -> Phase {
        Phase { name, tokens, flops, seconds: Vec::new() }
    }

    fn time<T>(&mut self, run: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = run();
        self.seconds.push(start.elapsed().as_secs_f64());
        result
    }

    /// Of the runs after the first.
    fn median(&self) -> f64 {
        let mut timed = self.seconds[1..].to_vec();
        timed.sort_by(f64::total_cmp);
        let middle = timed.len() / 2;
        if timed.len() % 2 == 1 { timed[middle] } else { (timed[middle - 1] + timed[middle]) / 2.0 }
    }

    fn json(&self) -> Value {
        json!({
            "phase": self.name,
            "tokens": self.tokens,
            "gflop": self.flops / 1e9,
            "median_s": self.median(),
            "runs_s": self.seconds[1..],
        })
    }
}

/// All phases of one prompt length, and the most memory in use by C2C prefill and decode.
struct Measured {
    prompt_tokens: usize,
    phases: Vec<Phase>,
    peak_rss_bytes: u64,
}

fn main() {
    let args = Args::parse();
    let device = backend::open(DeviceChoice::Cpu, args.threads).expect("every machine has a CPU");
    let limits = Limits::measure(device.threads());
    let (dtype, limit) = match args.dtype {
        DtypeArg::F32 => (DType::F32, limits.f32_flops),
        DtypeArg::Bf16 => (DType::Bf16, limits.bf16_flops),
    };
    let pair = Pair::new(&device, dtype, args.tiny);
    let measured: Vec<Measured> =
        args.tokens.iter().map(|&tokens| measure(&pair, tokens.into(), args.runs.into())).collect();
    if args.json {
        println!("{}", json(&device, dtype, &limits, &measured));
        return;
    }
    println!("{}, {dtype}: {:.0} GFLOP/s at best", device.description(), limit / 1e9);
    for Measured { prompt_tokens, phases, peak_rss_bytes } in measured {
        println!("\n{prompt_tokens} tokens, at most {} MiB in use", peak_rss_bytes >> 20);
        for phase in phases {
            let (name, seconds) = (phase.name, phase.median());
            let (rate, flops) = (phase.tokens as f64 / seconds, phase.flops / seconds);
            println!(
                "{name:<24}{seconds:>9.4} s{rate:>9.1} tok/s{:>8.1} GFLOP/s = {:>3.0} %",
                flops / 1e9,
                100.0 * flops / limit
            );
        }
    }
}

fn json(device: &Arc<dyn Backend>, dtype: DType, limits: &Limits, measured: &[Measured]) -> Value {
    let lengths = measured.iter().map(|m| {
        json!({
            "prompt_tokens": m.prompt_tokens,
            "peak_rss_bytes": m.peak_rss_bytes,
            "phases": m.phases.iter().map(Phase::json).collect::<Vec<Value>>(),
        })
    });
    json!({
        "device": device.description(),
        "threads": device.threads(),
        "dtype": dtype.to_string(),
        "limits": {
            "f32_flops": limits.f32_flops,
            "bf16_flops": limits.bf16_flops,
            "read_bytes": limits.read_bytes,
        },
        "lengths": lengths.collect::<Vec<Value>>(),
    })
}

/// Rounds of everything, so that a slow moment of the machine falls on all phases.
fn measure(pair: &Pair, tokens: usize, runs: usize) -> Measured {
    let mut link = pair.link(tokens + DECODED);
    pair.check(&mut link, tokens);

    let fused = tokens - 1;
    let [receiver, sharer, fuse, whole] = [
        pair.receiver_flops(tokens),
        pair.sharer_flops(tokens),
        pair.fuse_flops(tokens),
        pair.c2c_flops(tokens),
    ];
    let mut receiver_alone = Phase::new("receiver_prefill", tokens, receiver);
    let mut sharer_alone = Phase::new("sharer_prefill", tokens, sharer);
    let mut serial = Phase::new("c2c_prefill_serial", tokens, whole);
    let mut overlapped = Phase::new("c2c_prefill_overlapped", tokens, whole);
    let mut sharer_inside = Phase::new("c2c_sharer", tokens, sharer);
    let mut receiver_inside = Phase::new("c2c_receiver", tokens, whole - sharer - fuse - pair.logit_flops());
    let mut fuse_inside = Phase::new("c2c_fuse", fused, fuse);
    let mut decode = Phase::new("c2c_decode", DECODED, DECODED as f64 * receiver_step_flops(pair, tokens));

    let mut peak = 0;
    for run in 0..=runs as u32 {
        // The check had the prompts that begin with 1 and 2; each prefill has its own, so that nothing is reused.
        let first = |nth: u32| 3 + (2 * run + nth) % 200;
        let alone = |decoder: &Arc<Decoder>, goal: Goal, phase: &mut Phase| {
            let mut lane = pair.lane(decoder, tokens);
            let ids = Pair::ids(&decoder.config, tokens, first(0));
            phase.time(|| read(&mut lane, &ids, goal));
        };
        alone(&pair.receiver, Goal::Hidden, &mut receiver_alone);
        alone(&pair.sharer, Goal::Cache, &mut sharer_alone);

        reset_peak_rss();
        link.overlap = Overlap::Off;
        let prompt = pair.prompt(tokens, first(0));
        let (_, report) = serial.time(|| link.prefill(&prompt, WantedLogits::Last)).expect("a prefill");
        sharer_inside.seconds.push(report.sharers[0].as_secs_f64());
        receiver_inside.seconds.push(report.receiver.as_secs_f64());
        fuse_inside.seconds.push(report.fuse.as_secs_f64());

        link.overlap = Overlap::Layers;
        let prompt = pair.prompt(tokens, first(1));
        let (mut logits, _) =
            overlapped.time(|| link.prefill(&prompt, WantedLogits::Last)).expect("a prefill");
        decode.time(|| {
            for _ in 0..DECODED {
                logits = link.receiver.step(most_probable(&logits)).expect("a decode step");
            }
        });
        assert!(logits.iter().all(|logit| logit.is_finite()), "a logit is no number");
        peak = peak_rss_bytes().max(peak);
    }
    Measured {
        prompt_tokens: tokens,
        phases: vec![
            receiver_alone,
            sharer_alone,
            serial,
            sharer_inside,
            receiver_inside,
            fuse_inside,
            overlapped,
            decode,
        ],
        peak_rss_bytes: peak,
    }
}

fn receiver_step_flops(pair: &Pair, tokens: usize) -> f64 {
    pair.receiver_flops(tokens + 1) - pair.receiver_flops(tokens) + pair.logit_flops()
}

/// From an empty cache; with [`Goal::Hidden`], up to the logits after the last token.
fn read(lane: &mut Lane, ids: &[u32], goal: Goal) {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    lane.append(ids, &positions, goal, |_, _| {}).expect("a prefill");
    match goal {
        Goal::Cache => lane.queue.synchronize().expect("a prefill"),
        Goal::Hidden => assert!(lane.logits().expect("logits").iter().all(|logit| logit.is_finite())),
    }
}

fn most_probable(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a vocabulary") as u32
}

/// From here on the peak counts anew (Linux; elsewhere it is that of the whole run).
fn reset_peak_rss() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
