//! The fuser of one receiver layer (Qwen2.5-0.5B → Qwen3-0.6B shapes, hidden 1024) against the bf16 multiply-add rate.
//! Half of the gates closed is half of the work.

mod machine;
mod synthetic;

use c2c::{
    backend::{DType, Precision, Queue, Tensor},
    fuser::{FuseCall, Fuser, FuserConfig, Kind, LayerCall, Mapping, Party},
    ops::{Ffn, KvPages, Projector, Weight},
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work};
use synthetic::{Synthetic, decode_row};

const BLOCK: usize = 16;

fn fuse(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "fuse");
    let queue = Queue::new(&machine.device).expect("a queue");
    let hidden = if machine.smoke() { 64 } else { 1024 };
    let (receiver, sharer) = (Party::new(1, 8, 128), Party::new(1, 2, 64));
    let mut config =
        FuserConfig::new(Kind::C2c, hidden, hidden, Mapping::LastAligned, &[0], receiver, sharer);
    config.dtype = DType::Bf16;
    let fuser = Fuser::init(config, 1, &machine.device).expect("a fuser");
    for (tokens, gates, which) in [
        (256usize, [1.0; 2], "keys and values"),
        (1024, [1.0; 2], "keys and values"),
        (1024, [1.0, 0.0], "keys only"),
    ] {
        let id = format!("BF16 {tokens} tokens, {which}");
        let tokens = if machine.smoke() { 40 } else { tokens };
        let mut synthetic = Synthetic::new(&queue);
        let mut pages = |heads: usize, dim: usize| {
            let mut one = || synthetic.tensor(DType::Bf16, &[tokens.div_ceil(BLOCK), heads, BLOCK, dim], 1.0);
            KvPages { keys: one(), values: one() }
        };
        let (source, target, out) = (pages(2, 64), pages(8, 128), pages(8, 128));
        let slots = |slot: fn(usize, usize) -> usize| {
            let slots: Vec<u32> = (0..tokens).map(|t| slot(t, tokens) as u32).collect();
            queue.tensor(&slots, &[tokens], "slots").expect("memory")
        };
        // The sharer's columns in another order.
        let (forward, backward) = (slots(|t, _| t), slots(|t, n| n - 1 - t));
        let scratch = fuser.scratch_len(machine.device.as_ref(), 1, tokens);
        let scratch = machine.device.alloc(DType::F32, &[scratch], "scratch").expect("memory");
        let run = || {
            let (layer, base) = (0, &target);
            let layer = LayerCall { layer, gates, source: &source, target: &target, base, out: &out };
            let call = FuseCall {
                layers: &[layer],
                source_slots: &backward,
                target_slots: &forward,
                base_slots: &forward,
                out_slots: &forward,
                scratch: &scratch,
                precision: Precision::Fast,
            };
            fuser.issue(&queue, call).expect("shapes that fit");
            queue.synchronize().expect("a fused layer");
        };

        run();
        let [keys, values] = fuser.projectors()[0].halves().expect("a fuser with two");
        for token in [0, tokens / 2 - 1, tokens - 1] {
            let halves = [
                ("key", keys, [&source.keys, &target.keys, &out.keys], gates[0]),
                ("value", values, [&source.values, &target.values, &out.values], gates[1]),
            ];
            for (half, projector, [source, target, out], gate) in halves {
                let base = column(&queue, target, token);
                let added = project(&queue, projector, column(&queue, source, tokens - 1 - token), &base, 8);
                let size = (added.iter().map(|x| x * x).sum::<f64>() / added.len() as f64).sqrt();
                for (i, found) in column(&queue, out, token).into_iter().enumerate() {
                    let expected = base[i] + f64::from(gate) * added[i];
                    // Twice what inputs rounded to bf16 cost at most, and the rounding of the page.
                    let tolerance = if gate == 0.0 { 0.0 } else { 0.015 * size + expected.abs() / 256.0 };
                    assert!(
                        (found - expected).abs() <= tolerance,
                        "{id}: {half} {i} of token {token} is {found}, expected {expected} (added rms {size})"
                    );
                }
            }
        }

        let matrices = fuser.projectors()[0].tensors().values().filter(|tensor| tensor.shape().len() == 2);
        let weights: usize = matrices.map(Tensor::elements).sum();
        let open = f64::from(gates[0] + gates[1]) / 2.0;
        machine.bench(&mut group, &id, Work::Bf16(2.0 * (tokens * weights) as f64 * open), run);
    }
    group.finish();
}

/// A token's column, head after head.
fn column(queue: &Queue, pages: &Tensor, token: usize) -> Vec<f64> {
    let dim = pages.row_len();
    let block = pages.narrow(token / BLOCK, 1).expect("a block");
    let block = queue.download_f32(&block).expect("a download");
    let rows = block.chunks_exact(dim).skip(token % BLOCK).step_by(BLOCK);
    rows.flatten().copied().map(f64::from).collect()
}

/// `w · p` of docs/math.md in f64.
fn project(queue: &Queue, p: &Projector, source: Vec<f64>, target: &[f64], heads: usize) -> Vec<f64> {
    let joined = [&source, target].concat();
    let z = ffn(queue, &p.mlp1, linear(queue, &p.input, &joined));
    let (block, head) = p.scalar.as_ref().expect("C2C weighs its heads");
    let weights = linear(queue, head, &ffn(queue, block, z.clone()));
    let projected = linear(queue, &p.output, &p.blocks.iter().fold(z, |x, block| ffn(queue, block, x)));
    let dim = projected.len() / heads;
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    projected.iter().enumerate().map(|(i, p)| sigmoid(weights[i / dim]) * p).collect()
}

fn linear(queue: &Queue, weight: &Weight, x: &[f64]) -> Vec<f64> {
    let part = &weight.parts[0];
    let bias = part.bias.as_ref().map(|bias| queue.download_f32(bias).expect("a download"));
    let matrix = &part.matrix;
    let dot = |row| decode_row(queue, matrix, row).iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    (0..matrix.rows()).map(|row| dot(row) + bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]))).collect()
}

fn ffn(queue: &Queue, block: &Ffn, x: Vec<f64>) -> Vec<f64> {
    let norm = queue.download_f32(&block.norm).expect("a download");
    let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt();
    let normed: Vec<f64> = x.iter().zip(norm).map(|(x, w)| x * scale * f64::from(w)).collect();
    let inner: Vec<f64> = linear(queue, &block.w1, &normed).into_iter().map(gelu).collect();
    linear(queue, &block.w2, &inner).iter().zip(x).map(|(y, x)| x + y).collect()
}

/// `x · Φ(x)`; Φ by integrating the normal density from 0 with Simpson's rule.
fn gelu(x: f64) -> f64 {
    let density = |t: f64| (-t * t / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let (steps, width) = (64, x / 64.0);
    let weight = |i: i32| if i == 0 || i == steps { 1.0 } else { f64::from(2 + 2 * (i % 2)) };
    let integral = (0..=steps).map(|i| weight(i) * density(f64::from(i) * width)).sum::<f64>() * width / 3.0;
    x * (0.5 + integral)
}

criterion_group!(benches, fuse);
criterion_main!(benches);
