//! Attention over BF16 pages: a prompt against the f32 multiply-add rate (causal work only), one new token of many long
//! sequences against the read bandwidth.

mod machine;
mod synthetic;

use c2c::{
    backend::{DType, Precision, Queue},
    ops::{self, AttentionOperands, AttentionParams, KvPages, Pass, Scratch},
};
use criterion::{Criterion, criterion_group, criterion_main};
use machine::{Machine, Work, assert_close};
use synthetic::Synthetic;

const BLOCK: usize = 16;

struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    sequences: usize,
    /// New tokens of each sequence.
    new: usize,
    context: usize,
}

fn attention(criterion: &mut Criterion) {
    let Some(machine) = Machine::open() else { return };
    let mut group = machine.group(criterion, "attention");
    let queue = Queue::new(&machine.device).expect("a queue");
    let receiver = Case { heads: 16, kv_heads: 8, head_dim: 128, sequences: 1, new: 0, context: 0 };
    let sharer = Case { heads: 14, kv_heads: 2, head_dim: 64, ..receiver };
    let cases = [
        Case { new: 512, context: 512, ..receiver },
        Case { new: 2048, context: 2048, ..receiver },
        Case { new: 2048, context: 2048, ..sharer },
        // 256 MiB of cache each.
        Case { sequences: 16, new: 1, context: 4096, ..receiver },
        Case { sequences: 64, new: 1, context: 8192, ..sharer },
    ];
    for case in cases {
        let Case { heads, kv_heads, head_dim, sequences, new, context } = case;
        let id = format!("{heads}/{kv_heads} heads x {head_dim}, {sequences} x {new} new of {context}");
        let case = if machine.smoke() {
            Case { sequences: case.sequences.min(3), new: case.new.min(70), context: 70, ..case }
        } else {
            case
        };
        bench(&machine, &mut group, &queue, &id, &case);
    }
    group.finish();
}

fn bench(
    machine: &Machine,
    group: &mut criterion::BenchmarkGroup<criterion::measurement::WallTime>,
    queue: &Queue,
    id: &str,
    case: &Case,
) {
    let &Case { heads, kv_heads, head_dim, sequences, new, context } = case;
    let (tokens, width) = (sequences * new, heads * head_dim);
    let max_blocks = context.div_ceil(BLOCK);
    let blocks = sequences * max_blocks;
    let mut synthetic = Synthetic::new(queue);
    let mut pages = || synthetic.tensor(DType::Bf16, &[blocks, kv_heads, BLOCK, head_dim], 1.0);
    let pages = KvPages { keys: pages(), values: pages() };
    let numbers = |numbers: &[u32], dims: &[usize]| queue.tensor(numbers, dims, "numbers").expect("memory");
    // The sequences' blocks lie scattered, last first.
    let table: Vec<u32> = (0..blocks).map(|i| (blocks - 1 - i) as u32).collect();
    let cu_q: Vec<u32> = (0..=sequences).map(|s| (s * new) as u32).collect();
    let scratch = Scratch::Attention { sequences, heads, head_dim, context: max_blocks * BLOCK };
    let scratch = machine.device.scratch_len(scratch);
    let operands = AttentionOperands {
        q: synthetic.activations(Precision::Fast, &[tokens, width]),
        pages,
        cu_q: numbers(&cu_q, &[sequences + 1]),
        context: numbers(&vec![context as u32; sequences], &[sequences]),
        block_tables: numbers(&table, &[sequences, max_blocks]),
        out: synthetic.activations(Precision::Fast, &[tokens, width]),
        scratch: machine.device.alloc(DType::F32, &[scratch], "scratch").expect("memory"),
    };
    let p = AttentionParams {
        pass: if tokens == sequences { Pass::Decode } else { Pass::Prefill },
        tokens: tokens as u32,
        sequences: sequences as u32,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: head_dim as u32,
        q_stride: width as u32,
        max_blocks: max_blocks as u32,
        scale: 1.0 / (head_dim as f32).sqrt(),
        soft_cap: 0.0,
        window: 0,
    };
    let run = || {
        ops::paged_attention(queue, p, &operands).expect("shapes that fit");
        queue.synchronize().expect("attention");
    };

    run();
    let q = queue.download_f32(&operands.q).expect("a download");
    let out = queue.download_f32(&operands.out).expect("a download");
    // bf16 results are rounded, as are the weights of the values before.
    let tolerance = if operands.out.dtype() == DType::Bf16 { 2e-2 } else { 1e-3 };
    for sample in 0..8 {
        // First and last token among them.
        let (token, head) = (sample * (tokens - 1) / 7, sample * 5 % heads);
        let at = token * width + head * head_dim;
        let (sequence, keys) = (token / new, context - new + token % new + 1);
        let blocks = &table[sequence * max_blocks..][..max_blocks];
        let columns = |pages| head_columns(queue, pages, blocks, head / (heads / kv_heads), keys);
        let expected =
            reference(&q[at..][..head_dim], &columns(&operands.pages.keys), &columns(&operands.pages.values));
        assert_close(
            &format!("{id}: token {token}, head {head}"),
            &out[at..][..head_dim],
            &expected,
            tolerance,
        );
    }

    let pairs: usize = sequences * (context - new + 1..=context).sum::<usize>();
    let work = match new {
        1 => Work::Read((2 * sequences * context * kv_heads * head_dim * 2) as f64),
        _ => Work::F32((4 * pairs * width) as f64),
    };
    machine.bench(group, id, work, run);
}

/// One head's columns of the first `keys` tokens in `blocks`.
fn head_columns(
    queue: &Queue,
    pages: &c2c::backend::Tensor,
    blocks: &[u32],
    head: usize,
    keys: usize,
) -> Vec<Vec<f32>> {
    let head_dim = pages.row_len();
    let mut columns = Vec::new();
    for &block in &blocks[..keys.div_ceil(BLOCK)] {
        let block =
            queue.download_f32(&pages.narrow(block as usize, 1).expect("a block")).expect("a download");
        let head = &block[head * BLOCK * head_dim..][..BLOCK * head_dim];
        columns.extend(head.chunks_exact(head_dim).map(<[f32]>::to_vec));
    }
    columns.truncate(keys);
    columns
}

/// softmax(q · Kᵀ / √d) · V in f64.
fn reference(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f64> {
    let dot = |key: &Vec<f32>| q.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>();
    let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (q.len() as f64).sqrt()).collect();
    let most = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..q.len())
        .map(|i| weights.iter().zip(values).map(|(w, value)| w * f64::from(value[i])).sum::<f64>() / sum)
        .collect()
}

criterion_group!(benches, attention);
criterion_main!(benches);
