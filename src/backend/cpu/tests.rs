//! Whole ops through the backend on every level, AVX-512 in software among them.

use super::{
    Cpu, Schedule, Simd, blocks,
    linear::tests::{Random, random_matrix},
    pointwise,
    team::Team,
};
use crate::{
    backend::{Backend, DType, Precision, Queue, Tensor},
    ops::{
        self, Activation, Ffn, FuseExtent, FuseLayer, FuseOperands, FuseParams, KvPages, NormOutput,
        Projector, Scratch, Weight,
    },
};
use std::sync::Arc;

fn queue(simd: Simd) -> Queue {
    let backend: Arc<dyn Backend> = Cpu::with(2, simd, Schedule::Steady);
    Queue::new(&backend).expect("a queue")
}

const HEADS: usize = 3;
const HEAD_DIM: usize = 8;
const BLOCK: usize = 16;
/// Columns of the sharer; its one head is as wide.
const SOURCE: usize = 10;
const TARGET: usize = HEADS * HEAD_DIM;
const HIDDEN: usize = 33;
const INNER: usize = 47;

struct Fuse {
    projector: Arc<Projector>,
    precision: Precision,
    tokens: usize,
    /// `[tokens, SOURCE]` and `[tokens, TARGET]`, for keys and values alike.
    source: Vec<f32>,
    target: Vec<f32>,
}

impl Fuse {
    fn new(dtype: DType, precision: Precision, tokens: usize) -> Fuse {
        let random = &mut Random(tokens as u64 + 1);
        let mut weight = |rows: usize, cols: usize, bias: bool| {
            let matrix = random_matrix(random, dtype, rows, cols);
            let mut bias_of =
                || random_matrix(random, dtype, 1, rows).reshape(&[rows]).expect("same elements");
            if bias { Weight::with_bias(matrix, bias_of()) } else { Weight::new(matrix) }
        };
        let norm =
            || random_matrix(&mut Random(99), dtype, 1, HIDDEN).reshape(&[HIDDEN]).expect("same elements");
        let input = weight(HIDDEN, SOURCE + TARGET, true);
        let mut ffn =
            || Ffn { norm: norm(), w1: weight(INNER, HIDDEN, false), w2: weight(HIDDEN, INNER, false) };
        let (mlp1, scalar, blocks) = (ffn(), ffn(), vec![ffn(), ffn()]);
        let scalar = Some((scalar, weight(HEADS, HIDDEN, true)));
        let output = weight(TARGET, HIDDEN, true);
        let projector = Projector { source_stage: None, input, mlp1, scalar, blocks, output };
        let mut noise = |len: usize| {
            let mut x: Vec<f32> = (0..len).map(|_| random.float()).collect();
            // Some values far out, as caches have them.
            x.iter_mut().skip(5).step_by(97).for_each(|x| *x *= 60.0);
            x
        };
        let (source, target) = (noise(tokens * SOURCE), noise(tokens * TARGET));
        Fuse { projector: Arc::new(projector), precision, tokens, source, target }
    }

    /// The fused keys, `[tokens, TARGET]`.
    fn on(&self, simd: Simd) -> Vec<f32> {
        let queue = queue(simd);
        let pages = |data: &[f32], heads: usize| {
            let (dim, blocks) = (data.len() / self.tokens / heads, self.tokens.div_ceil(BLOCK));
            let mut page = vec![f32::NAN; blocks * heads * BLOCK * dim];
            for (i, part) in data.chunks_exact(dim).enumerate() {
                let (token, head) = (i / heads, i % heads);
                let at = ((token / BLOCK * heads + head) * BLOCK + token % BLOCK) * dim;
                page[at..at + dim].copy_from_slice(part);
            }
            let tensor = || queue.tensor(&page, &[blocks, heads, BLOCK, dim], "pages").expect("memory");
            KvPages { keys: tensor(), values: tensor() }
        };
        let slots: Vec<u32> = (0..self.tokens as u32).collect();
        let slots = queue.tensor(&slots, &[self.tokens], "slots").expect("memory");
        let extent = FuseExtent::new(&self.projector, SOURCE, TARGET, HEADS);
        let extent = FuseExtent { layers: 1, tokens: self.tokens, ..extent };
        let scratch = queue.backend().scratch_len(Scratch::Fuse(extent));
        let target = pages(&self.target, HEADS);
        let layer = FuseLayer {
            keys: self.projector.clone(),
            values: self.projector.clone(),
            gates: [1.0, 0.0],
            source: pages(&self.source, 1),
            target: target.clone(),
            base: target.clone(),
            out: target.clone(),
        };
        let operands = FuseOperands {
            layers: vec![layer],
            source_slots: slots.clone(),
            target_slots: slots.clone(),
            base_slots: slots.clone(),
            out_slots: slots,
            scratch: queue.tensor(&vec![f32::NAN; scratch], &[scratch], "scratch").expect("memory"),
        };
        let p = FuseParams { tokens: self.tokens as u32, precision: self.precision, use_target: true };
        ops::fuse(&queue, p, &operands).expect("shapes that fit");
        let page = queue.download_f32(&target.keys).expect("a download");
        let part = |i: usize| {
            let (token, head) = (i / HEADS, i % HEADS);
            &page[((token / BLOCK * HEADS + head) * BLOCK + token % BLOCK) * HEAD_DIM..][..HEAD_DIM]
        };
        (0..self.tokens * HEADS).flat_map(part).copied().collect()
    }

    /// The same in f64; `round` is what a linear map does to its input.
    fn reference(&self, round: fn(f64) -> f64) -> Vec<f64> {
        let linear = |weight: &Weight, x: &[f64]| -> Vec<f64> {
            let part = &weight.parts[0];
            let bias = part.bias.as_ref().map(pointwise::vector);
            let mut row = vec![0.0; x.len()];
            let dot = |i: usize| {
                blocks::row_to_f32(&part.matrix, i, &mut row);
                let dot: f64 = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * round(x)).sum();
                dot + f64::from(bias.as_ref().map_or(0.0, |bias| bias[i]))
            };
            (0..part.matrix.rows()).map(dot).collect()
        };
        let ffn = |ffn: &Ffn, x: &[f64]| -> Vec<f64> {
            let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt();
            let norm = pointwise::vector(&ffn.norm);
            let normed: Vec<f64> = x.iter().zip(norm).map(|(x, w)| x * scale * f64::from(w)).collect();
            // Accurate to 1.2e-7, as the op's own.
            let gelu = |x: f64| 0.5 * x * (1.0 + f64::from(pointwise::erf((x / 2f64.sqrt()) as f32)));
            let inner: Vec<f64> = linear(&ffn.w1, &normed).into_iter().map(gelu).collect();
            x.iter().zip(linear(&ffn.w2, &inner)).map(|(x, y)| x + y).collect()
        };
        let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<f64>>();
        let p = &self.projector;
        let columns = self.source.chunks_exact(SOURCE).zip(self.target.chunks_exact(TARGET));
        let fused = columns.flat_map(|(source, target)| {
            let z = ffn(&p.mlp1, &linear(&p.input, &wide(&[source, target].concat())));
            let (block, head) = p.scalar.as_ref().expect("made with one");
            let weights = linear(head, &ffn(block, &z));
            let z = p.blocks.iter().fold(z, |z, block| ffn(block, &z));
            let projected = linear(&p.output, &z).into_iter().enumerate();
            let added = projected.map(|(i, p)| p / (1.0 + (-weights[i / HEAD_DIM]).exp()));
            added.zip(wide(target)).map(|(p, t)| t + p).collect::<Vec<f64>>()
        });
        fused.collect()
    }
}

fn to_bf16(x: f64) -> f64 {
    half::bf16::from_f32(x as f32).to_f64()
}

/// Largest and root mean square.
fn errors(found: impl IntoIterator<Item = f64>, exact: &[f64]) -> (f64, f64) {
    let differences: Vec<f64> = found.into_iter().zip(exact).map(|(a, b)| (a - b).abs()).collect();
    let largest =
        differences.iter().fold(0.0, |a: f64, &b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
    (largest, (differences.iter().map(|d| d * d).sum::<f64>() / exact.len() as f64).sqrt())
}

/// At most twice as far from exact arithmetic as the plain op in the same precision.
#[test]
fn fusing_is_as_exact_as_its_precision() {
    for (dtype, precision) in [(DType::F32, Precision::F32), (DType::Bf16, Precision::Fast)] {
        for tokens in [1, 7, 54, 97] {
            let fuse = Fuse::new(dtype, precision, tokens);
            let exact = fuse.reference(|x| x);
            let wide = |x: Vec<f32>| x.into_iter().map(f64::from);
            for simd in Simd::testable() {
                let plain = if precision == Precision::Fast && simd >= Simd::Avx512Bf16 {
                    errors(fuse.reference(to_bf16), &exact)
                } else {
                    errors(wide(fuse.on(Simd::Portable)), &exact)
                };
                let found = errors(wide(fuse.on(simd)), &exact);
                assert!(
                    found.0 <= 2.0 * plain.0 && found.1 <= 2.0 * plain.1,
                    "{dtype} weights, {tokens} tokens on {simd}: largest error {:e}, mean {:e}; plain {plain:?}",
                    found.0,
                    found.1,
                );
            }
        }
    }
}

/// What is plain Rust on every level gives the same bits on every level.
#[test]
fn row_wise_ops_know_no_level() {
    let mut random = Random(5);
    let cols = 131;
    let x: Vec<f32> = (0..7 * 2 * cols).map(|_| 20.0 * random.float()).collect();
    let on = |simd: Simd| {
        let queue = queue(simd);
        let tensor = |data: &[f32], cols: usize| -> Tensor {
            queue.tensor(data, &[data.len() / cols, cols], "rows").expect("memory")
        };
        let (wide, norm) =
            (tensor(&x, 2 * cols), queue.tensor(&x[..2 * cols], &[2 * cols], "norm").expect("memory"));
        let normed = tensor(&vec![f32::NAN; x.len()], 2 * cols);
        ops::rms_norm(&queue, &wide, &norm, 1e-6, 1.0, NormOutput::Assign, &normed).expect("shapes that fit");
        let mut results = vec![queue.download(&normed).expect("a download")];
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
            let out = tensor(&vec![f32::NAN; x.len() / 2], cols);
            queue.synchronize().expect("an upload");
            pointwise::glu(&mut Team::new(2), simd, activation, &x, &out);
            results.push(queue.download(&out).expect("a download"));
        }
        results
    };
    let portable = on(Simd::Portable);
    for simd in Simd::testable() {
        assert!(on(simd) == portable, "{simd} differs from plain Rust");
    }
}

#[test]
fn a_level_beyond_the_processor_is_lowered() {
    let level = |simd: Simd| Cpu::with(1, simd, Schedule::Steady).simd;
    for simd in [Simd::Portable, Simd::Avx2, Simd::Avx512, Simd::Avx512Bf16] {
        assert_eq!(level(simd), simd.min(Simd::detect()));
    }
    assert!(Simd::detect() <= Simd::Avx512Bf16);
}
