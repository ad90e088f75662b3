//! A prompt through a few layers of a model (they are all alike) and the logits after its last token, against the
//! multiply-add rate of the weights' format.

mod machine;
mod synthetic;

use c2c::{
    backend::{
        DType, Precision, Queue,
        cpu::{Cpu, Schedule, Simd},
    },
    model::{Decoder, Goal, ModelConfig},
    pipeline::Lane,
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work, assert_close};
use std::sync::Arc;
use synthetic::{Synthetic, exact_on_cpu, ids, lane, pass_flops, receiver, sharer, small, tolerance};

/// Tokens whose cache is compared with the portable reference.
const CHECKED: usize = 16;

fn prefill(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "prefill");
    let queue = Queue::new(&machine.device).expect("a queue");
    let receiver = ("receiver", receiver(4), "4 of 28 layers");
    let sharer = ("sharer", sharer(4), "4 of 24 layers");
    let cases = [
        (&receiver, DType::Bf16, 256),
        (&receiver, DType::Bf16, 1024),
        (&receiver, DType::Bf16, 2048),
        (&sharer, DType::Bf16, 256),
        (&sharer, DType::Q8_0, 512),
        (&sharer, DType::Q4_0, 512),
    ];
    for ((model, config, layers), dtype, tokens) in cases {
        let id = format!("{model} {dtype} {tokens} tokens ({layers})");
        let (config, tokens) =
            if machine.smoke() { (small(config.clone()), 40) } else { (config.clone(), tokens) };
        let decoder = Synthetic::new(&queue).decoder(&config, dtype);
        let mut lane = lane(&decoder, &queue, tokens);
        let ids = ids(&config, tokens);
        let mut logits = read(&mut lane, &ids);
        check(&id, &decoder, dtype, &mut lane, &ids, &logits);

        let flops = pass_flops(&config, 0, tokens, true) + head_flops(&config);
        let work = if dtype.is_quantized() { Work::Int8(flops) } else { Work::Bf16(flops) };
        machine.bench(&mut group, &id, work, || logits = read(&mut lane, &ids));
    }
    group.finish();
}

fn head_flops(config: &ModelConfig) -> f64 {
    2.0 * (config.vocab * config.hidden) as f64
}

/// The logits after `ids`, from an empty cache.
fn read(lane: &mut Lane, ids: &[u32]) -> Vec<f32> {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    lane.truncate(0, 0);
    lane.append(ids, &positions, Goal::Hidden, |_, _| {}).expect("a prefill");
    lane.logits().expect("logits")
}

/// Against f32 arithmetic: the logits with this device's kernels, the last layer's first columns with plain Rust.
fn check(id: &str, decoder: &Decoder, dtype: DType, found: &mut Lane, ids: &[u32], logits: &[f32]) {
    let tolerance = tolerance(dtype);
    let exact = Arc::new(Decoder {
        config: decoder.config.clone(),
        weights: decoder.weights.clone(),
        precision: Precision::F32,
    });
    let wide = |numbers: Vec<f32>| -> Vec<f64> { numbers.into_iter().map(f64::from).collect() };
    let queue = Queue::new(found.queue.backend()).expect("a queue");
    let expected = read(&mut lane(&exact, &queue, ids.len()), ids);
    assert_close(&format!("{id}: logits"), logits, &wide(expected), tolerance);

    let portable: Arc<dyn c2c::backend::Backend> = Cpu::with(0, Simd::Portable, Schedule::Steady);
    let portable = Queue::new(&portable).expect("a queue");
    let mut plain = lane(&exact_on_cpu(decoder, dtype, &queue, &portable), &portable, CHECKED);
    read(&mut plain, &ids[..CHECKED]);
    let last = decoder.config.layers - 1;
    let found = found.read(last, 0, CHECKED).expect("columns");
    let expected = plain.read(last, 0, CHECKED).expect("columns");
    assert_close(&format!("{id}: keys"), &found.keys, &wide(expected.keys), tolerance);
    assert_close(&format!("{id}: values"), &found.values, &wide(expected.values), tolerance);
}

criterion_group!(benches, prefill);
criterion_main!(benches);
