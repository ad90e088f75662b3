//! A training step of the fuser (256 tokens, 64 of them the answer) in BF16, its phases, and the ops that dominate or could:
//! AdamW against the memory bandwidth, attention's backward and the cross-entropy of a large vocabulary. Of both models only 4 layers
//! with their fuser: they are all alike. The whole size, with the time of the authors' script: scripts/compare_train.py.

mod machine;
mod synthetic;

use c2c::{
    backend::{
        Backend, DType, Precision, Queue,
        cpu::{Cpu, Schedule, Simd},
    },
    ops::{self, AttentionGrads, AttentionOperands, AttentionParams, KvPages, Pass, Scratch},
    train::{Kept, Phases},
};
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use machine::{Machine, Work, assert_close};
use std::{sync::Arc, time::Duration};
use synthetic::{
    Synthetic, receiver, sharer, small,
    step::{Shape, Step},
};

const BLOCK: usize = 16;

fn train(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "train");
    let shape = match machine.smoke() {
        true => tiny(),
        false => Shape { receiver: receiver(4), sharer: sharer(4), hidden: 1024, tokens: 256, answer: 64 },
    };
    check(&machine, &Shape { tokens: 24, answer: 8, ..shape.clone() });

    let mut step = Step::new(&machine.device, shape, DType::Bf16, Precision::Fast);
    let flops = step.flops();
    let mut phases: Vec<Phases> = Vec::new();
    let id = "forward and backward of 256 tokens, 64 learned from (4 layers)";
    machine.bench(&mut group, id, Work::Bf16(flops.sum()), || phases.push(step.learn().phases));
    for (name, flops, of) in [
        ("sharer", flops.sharer, (|p: &Phases| p.sharer) as fn(&Phases) -> Duration),
        ("receiver forward", flops.receiver, |p| p.receiver),
        ("fuse", flops.fuse, |p| p.fuse),
        ("loss and its gradient", flops.loss, |p| p.loss),
        ("receiver backward", flops.backward, |p| p.backward),
        ("fuser backward", flops.fuse_backward, |p| p.fuse_backward),
    ] {
        let mut times: Vec<Duration> = phases.iter().map(of).collect();
        times.sort();
        if let Some(&median) = times.get(times.len() / 2) {
            machine.share(
                &format!("  {name}, {:.1} ms", 1e3 * median.as_secs_f64()),
                Work::Bf16(flops),
                median,
            );
        }
    }
    // Four numbers are read, and written again; the norm before it reads one.
    let parameters = step.trainer.fusers[0].parameters.count();
    // What is read; as much but for the norm is written, which goes the other way at the same time.
    machine.bench(&mut group, "norm and AdamW", Work::Read(20.0 * parameters as f64), || step.update());
    drop(step);
    adamw(&machine, &mut group);
    cross_entropy(&machine, &mut group);
    attention(&machine, &mut group);
    group.finish();
}

fn tiny() -> Shape {
    Shape { receiver: small(receiver(2)), sharer: small(sharer(2)), hidden: 32, tokens: 24, answer: 8 }
}

/// Loss and gradients of a short sample against those in f32 with plain Rust.
fn check(machine: &Machine, shape: &Shape) {
    let portable: Arc<dyn Backend> = Cpu::with(0, Simd::Portable, Schedule::Steady);
    let mut expected = Step::new(&portable, shape.clone(), DType::Bf16, Precision::F32);
    let expected_loss = expected.learn().loss;
    // Single numbers of a gradient, in parts of their root mean square; bf16 rounds in every layer there and back.
    for (precision, of_loss, of_gradient) in [(Precision::F32, 1e-4, 1e-2), (Precision::Fast, 2e-2, 0.5)] {
        let mut found = Step::new(&machine.device, shape.clone(), DType::Bf16, precision);
        let loss = found.learn().loss;
        assert!((loss - expected_loss).abs() <= of_loss * expected_loss, "loss {loss}, not {expected_loss}");
        let gradient = |step: &Step, index: usize| {
            let tensor = step.trainer.fusers[0].parameters.view(Kept::Grad, index);
            step.trainer.queue.download_f32(&tensor).expect("a download")
        };
        let entries = expected.trainer.fusers[0].parameters.entries();
        for (index, entry) in entries.iter().enumerate() {
            let wide: Vec<f64> = gradient(&expected, index).into_iter().map(f64::from).collect();
            let what = format!("gradient of {} in {precision:?}", entry.name);
            assert_close(&what, &gradient(&found, index), &wide, of_gradient);
        }
    }
}

/// AdamW alone, of 64 M parameters: beyond any cache.
fn adamw(machine: &Machine, group: &mut BenchmarkGroup<WallTime>) {
    let queue = Queue::new(&machine.device).expect("a queue");
    let len = if machine.smoke() { 1000 } else { 64 << 20 };
    let mut synthetic = Synthetic::new(&queue);
    let [weights, grad, m] = [0, 1, 2].map(|_| synthetic.tensor(DType::F32, &[len], 1.0));
    let v = queue.tensor(&vec![0.5f32; len], &[len], "second moments").expect("memory");
    let p = ops::AdamwParams {
        len: len as u32,
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        correction1: 0.271,
        correction2: 0.002_997,
        grad_scale: 0.5,
    };
    let first = |tensor| f64::from(queue.download_f32(tensor).expect("a download")[0]);
    let [w, g, m0] = [&weights, &grad, &m].map(first);
    let run = || {
        ops::adamw(&queue, p, &weights, &grad, &m, &v).expect("shapes that fit");
        queue.synchronize().expect("an update");
    };
    run();
    let (g, m1) = (0.5 * g, 0.9 * m0 + 0.1 * 0.5 * g);
    let v1 = 0.999 * 0.5 + 0.001 * g * g;
    let expected = w - 1e-4 * w - 1e-2 * (m1 / 0.271) / ((v1 / 0.002_997f64).sqrt() + 1e-8);
    assert_close("AdamW", &[first(&weights) as f32], &[expected], 1e-4);
    machine.bench(group, "AdamW of 64 M parameters", Work::Read(16.0 * len as f64), run);
}

/// Each logit is read and its gradient written in its place.
fn cross_entropy(machine: &Machine, group: &mut BenchmarkGroup<WallTime>) {
    let queue = Queue::new(&machine.device).expect("a queue");
    let (rows, vocab) = if machine.smoke() { (3, 500) } else { (128, 151_936) };
    let mut synthetic = Synthetic::new(&queue);
    let given = synthetic.tensor(DType::F32, &[rows, vocab], 4.0);
    let logits = machine.device.alloc(DType::F32, &[rows, vocab], "logits").expect("memory");
    let ids: Vec<u32> = (0..rows as u32).collect();
    let index = queue.tensor(&ids, &[rows], "labels").expect("memory");
    let loss = machine.device.alloc(DType::F32, &[rows], "losses").expect("memory");
    let run = || {
        ops::cross_entropy(&queue, &logits, &index, 1.0, 0.0, &loss).expect("shapes that fit");
        queue.synchronize().expect("a loss");
    };
    ops::gather_rows(&queue, &given, &index, &logits).expect("shapes that fit");
    let last = |tensor: &c2c::backend::Tensor| {
        queue.download_f32(&tensor.narrow(rows - 1, 1).expect("a row")).expect("a download")
    };
    let plain: Vec<f64> = last(&logits).into_iter().map(f64::from).collect();
    run();
    let sum: f64 = plain.iter().map(|x| x.exp()).sum();
    let gradient = plain.iter().enumerate().map(|(i, x)| x.exp() / sum - f64::from(i == rows - 1));
    assert_close("gradient of logits", &last(&logits), &gradient.collect::<Vec<_>>(), 1e-3);
    // Its own result is as good an input as any.
    let id = "cross-entropy of 128 rows of 151,936";
    machine.bench(group, id, Work::Read(8.0 * (rows * vocab) as f64), run);
}

/// Against the f32 rate: five products of the causal pairs.
fn attention(machine: &Machine, group: &mut BenchmarkGroup<WallTime>) {
    let queue = Queue::new(&machine.device).expect("a queue");
    let (heads, kv_heads, head_dim) = if machine.smoke() { (4, 2, 32) } else { (16, 8, 128) };
    for (new, context) in [(512usize, 512usize), (64, 256)] {
        let id = format!("attention backward, 16/8 heads x 128, {new} new of {context}");
        let (new, context) = if machine.smoke() { (new.min(20), 40.min(context)) } else { (new, context) };
        let (width, blocks) = (heads * head_dim, context.div_ceil(BLOCK));
        let mut synthetic = Synthetic::new(&queue);
        let mut pages = |dtype| {
            let mut one = || synthetic.tensor(dtype, &[blocks, kv_heads, BLOCK, head_dim], 1.0);
            KvPages { keys: one(), values: one() }
        };
        let (kv, dkv) = (pages(DType::Bf16), pages(DType::F32));
        let numbers = |all: &[u32], dims: &[usize]| queue.tensor(all, dims, "numbers").expect("memory");
        let f32s = |dims: &[usize], what: &str| machine.device.alloc(DType::F32, dims, what).expect("memory");
        let need = Scratch::AttentionBackward {
            tokens: new,
            sequences: 1,
            heads,
            head_dim,
            context: blocks * BLOCK,
        };
        let scratch = f32s(&[machine.device.scratch_len(need)], "scratch");
        let forward = AttentionOperands {
            q: synthetic.activations(Precision::Fast, &[new, width]),
            pages: kv,
            cu_q: numbers(&[0, new as u32], &[2]),
            context: numbers(&[context as u32], &[1]),
            block_tables: numbers(&(0..blocks as u32).collect::<Vec<_>>(), &[1, blocks]),
            out: synthetic.activations(Precision::Fast, &[new, width]),
            scratch: scratch.clone(),
        };
        let dout = synthetic.tensor(DType::F32, &[new, width], 1.0);
        let dq = f32s(&[new, width], "gradient of q");
        let grads = AttentionGrads { dout, dq, dkv, scratch };
        let p = AttentionParams {
            pass: Pass::Prefill,
            tokens: new as u32,
            sequences: 1,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            q_stride: width as u32,
            max_blocks: blocks as u32,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap: 0.0,
            window: 0,
        };
        ops::paged_attention(&queue, p, &forward).expect("shapes that fit");
        let run = || {
            ops::attention_backward(&queue, p, &forward, &grads).expect("shapes that fit");
            queue.synchronize().expect("a backward pass");
        };
        run();
        check_dq(&queue, &id, &forward, &grads, context);
        let pairs: usize = (context - new + 1..=context).sum();
        machine.bench(group, &id, Work::F32((10 * pairs * width) as f64), run);
    }
}

/// The gradient of the last token's first head of q, in f64.
fn check_dq(queue: &Queue, id: &str, forward: &AttentionOperands, grads: &AttentionGrads, context: usize) {
    let head_dim = forward.pages.head_dim();
    let wide = |tensor: &c2c::backend::Tensor| -> Vec<f64> {
        queue.download_f32(tensor).expect("a download").into_iter().map(f64::from).collect()
    };
    let kv_heads = forward.pages.kv_heads();
    let columns = |all: Vec<f64>| -> Vec<Vec<f64>> {
        let at = |key: usize| ((key / BLOCK * kv_heads) * BLOCK + key % BLOCK) * head_dim;
        (0..context).map(|key| all[at(key)..][..head_dim].to_vec()).collect()
    };
    let (keys, values) = (columns(wide(&forward.pages.keys)), columns(wide(&forward.pages.values)));
    let row = |tensor| {
        let all = wide(tensor);
        let width = forward.q.row_len();
        all[all.len() - width..][..head_dim].to_vec()
    };
    let (q, dout) = (row(&forward.q), row(&grads.dout));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let scale = 1.0 / (head_dim as f64).sqrt();
    let weights: Vec<f64> = keys.iter().map(|key| (scale * dot(&q, key)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let slopes: Vec<f64> = values.iter().map(|value| dot(&dout, value)).collect();
    let mean = weights.iter().zip(&slopes).map(|(w, s)| w / sum * s).sum::<f64>();
    let expected: Vec<f64> = (0..head_dim)
        .map(|i| {
            let of = |key: usize| weights[key] / sum * (slopes[key] - mean) * scale * keys[key][i];
            (0..context).map(of).sum()
        })
        .collect();
    let found: Vec<f32> = row(&grads.dq).into_iter().map(|x| x as f32).collect();
    assert_close(&format!("{id}: dq"), &found, &expected, 5e-2);
}

criterion_group!(benches, train);
criterion_main!(benches);
