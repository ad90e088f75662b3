//! One token through a whole model, logits included, against the read bandwidth: every weight is read once, and the
//! cache of what came before.

mod machine;
mod synthetic;

use c2c::{
    backend::{
        Backend, DType, Queue,
        cpu::{Cpu, Schedule, Simd},
    },
    model::{Decoder, Goal},
    pipeline::Lane,
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work, assert_close};
use std::sync::Arc;
use synthetic::{Synthetic, exact_on_cpu, ids, lane, receiver, sharer, small, tolerance};

/// Tokens before the one that is compared with the portable reference.
const CHECKED: usize = 3;

fn decode(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "decode");
    let queue = Queue::new(&machine.device).expect("a queue");
    let receiver = ("receiver", receiver(28));
    let sharer = ("sharer", sharer(24));
    let cases = [
        (&receiver, DType::Bf16, 64),
        (&receiver, DType::Bf16, 2048),
        (&sharer, DType::Q8_0, 64),
        (&sharer, DType::Q4_0, 64),
    ];
    for ((model, config), dtype, context) in cases {
        let id = format!("{model} {dtype}, {context} tokens before");
        let (config, context) =
            if machine.smoke() { (small(config.clone()), 20) } else { (config.clone(), context) };
        let decoder = Synthetic::new(&queue).decoder(&config, dtype);
        let mut lane = lane(&decoder, &queue, context + 1);
        check(&id, &decoder, dtype, &mut lane);

        read(&mut lane, &ids(&config, context));
        let cache = config.layers * 2 * (context + 1) * config.kv_heads * config.head_dim * 2;
        let work = Work::Read((weight_bytes(&decoder) + cache) as f64);
        let mut logits = Vec::new();
        machine.bench(&mut group, &id, work, || {
            lane.truncate(context, context as u32);
            logits = lane.step(1).expect("a decode step");
        });
    }
    group.finish();
}

/// Of everything a token is multiplied with. Norms and biases don't count.
fn weight_bytes(decoder: &Decoder) -> usize {
    let weights = &decoder.weights;
    let layers = weights.layers.iter();
    let layers = layers.map(|l| [&l.qkv, &l.attn_out, &l.gate_up, &l.down].map(|w| w.bytes()));
    weights.lm_head.bytes() + layers.flatten().sum::<usize>()
}

fn read(lane: &mut Lane, ids: &[u32]) {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    lane.truncate(0, 0);
    lane.append(ids, &positions, Goal::Hidden, |_, _| {}).expect("a prefill");
    lane.queue.synchronize().expect("a prefill");
}

/// A step's logits against those of plain Rust in f32.
fn check(id: &str, decoder: &Decoder, dtype: DType, found: &mut Lane) {
    let portable: Arc<dyn Backend> = Cpu::with(0, Simd::Portable, Schedule::Steady);
    let portable = Queue::new(&portable).expect("a queue");
    let mut plain = lane(&exact_on_cpu(decoder, dtype, &found.queue, &portable), &portable, CHECKED + 1);
    let ids = ids(&decoder.config, CHECKED);
    let [found, expected] = [found, &mut plain].map(|lane| {
        read(lane, &ids);
        lane.step(1).expect("a decode step")
    });
    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
    assert_close(&format!("{id}: logits"), &found, &expected, tolerance(dtype));
}

criterion_group!(benches, decode);
criterion_main!(benches);
