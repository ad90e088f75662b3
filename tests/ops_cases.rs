//! Every case of the one table, on every level of the CPU and on a GPU, against plain f32 arithmetic.

mod device;

use c2c::{
    backend::{
        Backend, Precision, Queue,
        cpu::{Cpu, Schedule, Simd},
    },
    ops::cases::{Case, Made, Run, table},
};
use std::sync::Arc;

const F32: Run = Run { precision: Precision::F32, rounded: false };
/// What a plain implementation in bf16 computes: inputs, weights and outputs rounded, everything between in f32.
const PLAIN: Run = Run { precision: Precision::F32, rounded: true };
const FAST: Run = Run { precision: Precision::Fast, rounded: false };

fn run(case: &Case, backend: &Arc<dyn Backend>, how: Run) -> Result<Vec<Made>, String> {
    let queue = Queue::new(backend).map_err(|error| error.to_string())?;
    case.run(&queue, how).map_err(|error| format!("{case:?}: {error}"))
}

fn plain_cpu() -> Arc<dyn Backend> {
    Cpu::with(1, Simd::Portable, Schedule::Steady)
}

/// The largest difference, and the root mean square of `b`.
fn difference(a: &[f32], b: &[f32]) -> (f64, f64) {
    assert_eq!(a.len(), b.len());
    let pairs = || a.iter().zip(b).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let most =
        pairs().map(|(a, b)| if a.is_finite() { (a - b).abs() } else { f64::INFINITY }).fold(0.0, f64::max);
    let size = (pairs().map(|(_, b)| b * b).sum::<f64>() / a.len().max(1) as f64).sqrt();
    (most, size)
}

/// |ours − f32| ≤ 2 (in training 3) · |the same op in that precision by plain arithmetic − f32|, and an allowance of `floor` of the
/// output's size.
fn judge(case: &Case, reference: &[Made], plain: &[Made], ours: &[Made], floor: f64) -> Result<(), String> {
    assert!(!reference.is_empty() && reference.len() == ours.len(), "{case:?}: outputs");
    for ((reference, plain), ours) in reference.iter().zip(plain).zip(ours) {
        let name = &ours.name;
        assert!(reference.values.iter().all(|x| x.is_finite()), "{case:?}: {name} of the reference");
        let (allowed, _) = difference(&plain.values, &reference.values);
        let (found, size) = difference(&ours.values, &reference.values);
        // A plain fuser in bf16 would round the rows between its products too, which this one in f32 does not.
        let times = if case.op() == "fuse" {
            4.0
        } else if case.trains() {
            3.0
        } else {
            2.0
        };
        // Of a few numbers the plain ones may all be exact by luck.
        let luck = if allowed > 0.0 && ours.values.len() < 32 { size / 256.0 } else { 0.0 };
        let limit = times * allowed + floor * size + luck;
        if found > limit {
            return Err(format!(
                "{case:?}: {name} is off by {found:.3e}, allowed are {limit:.3e} (rms {size:.3e})"
            ));
        }
    }
    Ok(())
}

/// Rounding of f32 sums in another order.
const ORDER: f64 = 5e-5;

#[test]
fn every_level_of_the_cpu_agrees_in_f32() {
    let plain = plain_cpu();
    for simd in [Simd::Avx2, Simd::Avx512Bf16] {
        let level: Arc<dyn Backend> = Cpu::with(2, simd, Schedule::Steady);
        for case in table() {
            let reference = run(&case, &plain, F32).unwrap();
            let ours = run(&case, &level, F32).unwrap();
            judge(&case, &reference, &reference, &ours, ORDER).unwrap();
        }
    }
}

/// Every case on a GPU; all that fail are told at once.
fn on_a_gpu(how: Run, plain_run: Run) {
    let Some(mut gpu) = device::gpu() else { return };
    let plain = plain_cpu();
    let mut failures = Vec::new();
    let trains = gpu.backend.training().is_some();
    if !trains {
        eprintln!("skipped: ops of training, which {} lacks", gpu.backend.description());
    }
    for case in table().into_iter().filter(|case| trains || !case.trains()) {
        let reference = run(&case, &plain, F32).unwrap();
        let rounded = run(&case, &plain, plain_run).unwrap();
        match run(&case, &gpu.backend, how) {
            Ok(ours) => failures.extend(judge(&case, &reference, &rounded, &ours, ORDER).err()),
            Err(error) => {
                failures.push(format!("{error}\n  {}", gpu.fault().unwrap_or_default()));
                // A fault makes a device useless.
                gpu = device::gpu().expect("there was one");
            }
        }
    }
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn a_gpu_agrees_in_f32() {
    on_a_gpu(F32, F32);
}

#[test]
fn a_gpu_agrees_in_bf16() {
    on_a_gpu(FAST, PLAIN);
}
