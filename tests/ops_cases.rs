//! Every case of the one table, on every level of the CPU and on a GPU, against plain f32 arithmetic.

mod device;

use c2c::{
    backend::{
        Backend, Queue,
        cpu::{Cpu, Schedule, Simd},
    },
    ops::cases::{Case, Made, Run, judge, table},
};
use std::sync::Arc;

fn run(case: &Case, backend: &Arc<dyn Backend>, how: Run) -> Result<Vec<Made>, String> {
    let queue = Queue::new(backend).map_err(|error| error.to_string())?;
    case.run(&queue, how).map_err(|error| format!("{case:?}: {error}"))
}

fn plain_cpu() -> Arc<dyn Backend> {
    Cpu::with(1, Simd::Portable, Schedule::Steady)
}

#[test]
fn every_level_of_the_cpu_agrees_in_f32() {
    let plain = plain_cpu();
    for simd in [Simd::Avx2, Simd::Avx512Bf16] {
        let level: Arc<dyn Backend> = Cpu::with(2, simd, Schedule::Steady);
        for case in table() {
            let reference = run(&case, &plain, Run::F32).unwrap();
            let ours = run(&case, &level, Run::F32).unwrap();
            judge(&case, &reference, &reference, &ours).unwrap();
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
        let reference = run(&case, &plain, Run::F32).unwrap();
        let rounded = run(&case, &plain, plain_run).unwrap();
        match run(&case, &gpu.backend, how) {
            Ok(ours) => failures.extend(judge(&case, &reference, &rounded, &ours).err()),
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
    on_a_gpu(Run::F32, Run::F32);
}

#[test]
fn a_gpu_agrees_in_bf16() {
    on_a_gpu(Run::FAST, Run::PLAIN);
}
