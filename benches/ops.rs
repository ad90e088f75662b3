//! Every op in the sizes of a real model, from the table of cases that the tests run (`ops::cases`), against the multiply-add rate
//! or the memory bandwidth: on a CPU in f32, on a GPU in bf16.

mod machine;

use c2c::{
    backend::{
        Backend, Precision, Queue,
        cpu::{Cpu, Schedule, Simd},
    },
    ops::cases::{Case, Run, judge, table, timed},
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work};
use std::sync::Arc;

fn ops(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "ops");
    let queue = Queue::new(&machine.device).expect("a queue");
    let portable: Arc<dyn Backend> = Cpu::with(0, Simd::Portable, Schedule::Steady);
    let portable = Queue::new(&portable).expect("a queue");
    let (how, plain) = match machine.device.device() {
        "cuda" => (Run::FAST, Run::PLAIN),
        _ => (Run::F32, Run::F32),
    };
    let small = table();
    for case in timed() {
        let id = name(&case);
        // The table's first of the op stands for it.
        let case = match machine.smoke() {
            true => {
                small.iter().find(|small| small.op() == case.op()).expect("the table has every op").clone()
            }
            false => case,
        };
        let reference = case.run(&portable, Run::F32).expect("f32 arithmetic");
        let rounded = case.run(&portable, plain).expect("rounded arithmetic");
        let ours = case.run(&queue, how).unwrap_or_else(|error| panic!("{id}: {error}"));
        judge(&case, &reference, &rounded, &ours).unwrap_or_else(|wrong| panic!("{wrong}"));

        let work = case.work(&queue, how);
        let work = match (work.multiplies, how.precision) {
            (false, _) => Work::Read(work.bytes as f64),
            (true, Precision::F32) => Work::F32(work.flops as f64),
            (true, Precision::Fast) => Work::Bf16(work.flops as f64),
        };
        let mut prepared = case.prepare(&queue, how).expect("memory");
        machine.bench(&mut group, &id, work, || {
            prepared.issue().expect("shapes that fit");
            queue.synchronize().expect("an op");
        });
    }
    group.finish();
}

/// The op, and what tells its cases apart.
fn name(case: &Case) -> String {
    let op = case.op();
    match case {
        Case::Linear { pass, parts, .. } => format!("{op}, {pass:?}, {}", parts[0].0),
        Case::LinearGlu { pass, dtype, .. } => format!("{op}, {pass:?}, {dtype}"),
        Case::Attention { pass, .. } => format!("{op}, {pass:?}"),
        _ => op.to_string(),
    }
}

criterion_group!(benches, ops);
criterion_main!(benches);
