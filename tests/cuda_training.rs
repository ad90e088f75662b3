//! Ops of training on a GPU that the table of cases does not have: linear maps in every format and rope's `q_out` against plain f64
//! arithmetic, the fuser against the CPU.

mod device;

use c2c::{
    backend::{Backend, DType, Precision, Queue, Tensor, Training, cuda::Cuda},
    ops::{self, KvPages, LinearBackwardParams, Weight, WeightPart},
    rng::{Purpose, Rng, Stream},
};
use half::{bf16, f16};
use std::{cell::Cell, sync::Arc};

/// A device and numbers for it.
struct Gpu {
    cuda: Arc<Cuda>,
    queue: Queue,
    soft: softcuda::Device,
    made: Cell<u32>,
}

impl Gpu {
    fn open() -> Option<Gpu> {
        let soft = device::soft()?;
        let cuda = Cuda::open(soft.ordinal).unwrap();
        let backend: Arc<dyn Backend> = cuda.clone();
        let queue = Queue::new(&backend).unwrap();
        Some(Gpu { cuda, queue, soft, made: Cell::new(0) })
    }

    /// Uniform in ±1.
    fn numbers(&self, n: usize) -> Vec<f32> {
        self.made.set(self.made.get() + 1);
        let mut x = vec![0.0; n];
        Rng::new(1, Stream::new(Purpose::Init, self.made.get()), 0).fill_uniform(0, &mut x);
        x.into_iter().map(|u| 2.0 * u - 1.0).collect()
    }

    fn put(&self, values: &[f32], dims: &[usize]) -> Tensor {
        self.queue.tensor(values, dims, "a test").unwrap()
    }

    fn indices(&self, values: &[u32]) -> Tensor {
        self.queue.tensor(values, &[values.len()], "a test").unwrap()
    }

    /// A tensor of this type, and what it holds as f32.
    fn random(&self, dtype: DType, dims: &[usize]) -> (Tensor, Vec<f32>) {
        let values = self.numbers(dims.iter().product());
        self.cast(dtype, values, dims)
    }

    fn cast(&self, dtype: DType, values: Vec<f32>, dims: &[usize]) -> (Tensor, Vec<f32>) {
        if dtype == DType::F32 {
            return (self.put(&values, dims), values);
        }
        let halves: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        let bytes: Vec<u8> = halves.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = self.cuda.alloc(dtype, dims, "a test").unwrap();
        self.cuda.upload(self.queue.id(), &bytes, &tensor);
        (tensor, halves.into_iter().map(bf16::to_f32).collect())
    }

    /// A weight, of a block format with random bytes and small scales.
    fn matrix(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let tensor = self.unwritten(dtype, &[rows, cols]);
        let numbers = self.numbers(tensor.bytes());
        let bytes: Vec<u8> = match dtype {
            DType::F32 => numbers[..rows * cols].iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::Bf16 => {
                numbers[..rows * cols].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
            }
            DType::F16 => {
                numbers[..rows * cols].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()
            }
            _ => {
                let mut bytes: Vec<u8> = numbers.iter().map(|x| (x * 127.0) as i8 as u8).collect();
                // The upper bytes of all factors that a format may have: numbers below one.
                for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                    let places: &[usize] = match dtype {
                        DType::Q2K => &[81, 83],
                        DType::Q3K => &[109],
                        DType::Q6K => &[209],
                        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[1, 3],
                        _ => &[1],
                    };
                    places.iter().for_each(|&at| block[at] = 0x20 | block[at] & 0x83);
                }
                bytes
            }
        };
        self.cuda.upload(self.queue.id(), &bytes, &tensor);
        tensor
    }

    /// What a weight holds: looking every row up expands it.
    fn expand(&self, weight: &Tensor) -> Vec<f32> {
        let ids: Vec<u32> = (0..weight.rows() as u32).collect();
        let out = self.unwritten(DType::F32, weight.shape());
        ops::embed(&self.queue, &self.indices(&ids), weight, 1.0, &out).unwrap();
        self.queue.download_f32(&out).unwrap()
    }

    fn unwritten(&self, dtype: DType, dims: &[usize]) -> Tensor {
        self.cuda.alloc(dtype, dims, "a test").unwrap()
    }

    /// Compares what `tensor` holds, to within `tolerance` of the largest expected number.
    #[track_caller]
    fn expect(&self, what: &str, tensor: &Tensor, expected: &[f64], tolerance: f64) {
        let found = match self.queue.download_f32(tensor) {
            Ok(found) => found,
            Err(error) => {
                panic!("{what}: {error}: {:?}", self.soft.first_fault().map(|report| report.message))
            }
        };
        assert_eq!(found.len(), expected.len(), "{what}");
        let size = expected.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let off = (f64::from(found) - expected).abs();
            assert!(
                off <= tolerance * size,
                "{what}: element {i} is {found}, expected {expected} (most {size})"
            );
        }
    }
}

const EXACT: f64 = 3e-6;
const BF16: f64 = 5e-3;

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Where element `i` of `slot`'s column of `head` is.
fn page_at(dims: [usize; 4], slot: usize, head: usize, i: usize) -> usize {
    ((slot / dims[2] * dims[1] + head) * dims[2] + slot % dims[2]) * dims[3] + i
}

#[test]
fn rope() {
    let Some(gpu) = Gpu::open() else { return };
    for (heads, kv_heads, dim, tokens, norms, interleaved, dtype) in [
        (1, 1, 8, 1, false, false, DType::F32),
        (9, 3, 64, 37, true, false, DType::F32),
        (3, 2, 54, 18, true, true, DType::F32),
        (4, 1, 256, 5, true, true, DType::Bf16),
        (4, 2, 96, 5, false, true, DType::Bf16),
    ] {
        let (half, width) = (dim / 2, (heads + 2 * kv_heads) * dim);
        let (qkv, x) = gpu.random(dtype, &[tokens, width]);
        let [q_norm, k_norm] = [0; 2].map(|_| norms.then(|| gpu.random(DType::F32, &[dim])));
        let angles: Vec<f32> = gpu.numbers(tokens * half).into_iter().map(|x| 4.0 * x).collect();
        let table: Vec<f32> = angles
            .chunks(half)
            .flat_map(|a| a.iter().map(|a| a.cos()).chain(a.iter().map(|a| a.sin())).collect::<Vec<_>>())
            .collect();
        let cos_sin = gpu.put(&table, &[tokens, dim]);
        let slots: Vec<u32> = (0..tokens as u32).rev().collect();
        let pages = [tokens.div_ceil(4), kv_heads, 4, dim];
        let page = || gpu.random(DType::F32, &pages);
        let (dkeys, dk) = page();
        let (dvalues, dv) = page();
        let (dq_tensor, dq) = gpu.random(DType::F32, &[tokens, heads * dim]);
        let [dq_norm, dk_norm] = [0; 2].map(|_| norms.then(|| gpu.random(DType::F32, &[dim])));
        let p = ops::RopeParams {
            tokens: tokens as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: dim as u32,
            norm_eps: 1e-6,
            norm_offset: 0.5,
            interleaved: interleaved.into(),
        };
        let dqkv = gpu.unwritten(DType::F32, &[tokens, width]);
        let tensor = |made: &Option<(Tensor, Vec<f32>)>| made.as_ref().map(|made| made.0.clone());
        let slots_tensor = gpu.indices(&slots);
        let backward = ops::RopeBackwardOperands {
            qkv: qkv.clone(),
            q_norm: tensor(&q_norm),
            k_norm: tensor(&k_norm),
            cos_sin: cos_sin.clone(),
            slots: slots_tensor.clone(),
            dq: dq_tensor,
            dkv: KvPages { keys: dkeys, values: dvalues },
            dqkv: dqkv.clone(),
            dq_norm: tensor(&dq_norm),
            dk_norm: tensor(&dk_norm),
        };
        gpu.cuda.rope_backward(gpu.queue.id(), p, &backward);

        let (q_out, keys, values) = (
            gpu.unwritten(dtype, &[tokens, heads * dim]),
            gpu.unwritten(DType::F32, &pages),
            gpu.unwritten(DType::F32, &pages),
        );
        let forward = ops::RopeOperands {
            qkv: qkv.clone(),
            q_out: Some(q_out.clone()),
            q_norm: tensor(&q_norm),
            k_norm: tensor(&k_norm),
            cos_sin,
            slots: slots_tensor,
            pages: KvPages { keys, values },
        };
        gpu.cuda.rope_kv_write(gpu.queue.id(), p, &forward);

        let sums =
            |grad: &Option<(Tensor, Vec<f32>)>| grad.as_ref().map_or(vec![0.0; dim], |grad| wide(&grad.1));
        let mut norm_sums = [sums(&dq_norm), sums(&dk_norm)];
        let (mut expected, mut q_expected) = (vec![0.0; tokens * width], vec![0.0; tokens * heads * dim]);
        for t in 0..tokens {
            for head in 0..heads + kv_heads {
                let at = t * width + head * dim;
                // Pair i.
                let order = |i: usize| if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let is_k = head >= heads;
                let weight = if is_k { &k_norm } else { &q_norm };
                let weight: Vec<f64> = match weight {
                    Some((_, w)) => w.iter().map(|&w| 0.5 + f64::from(w)).collect(),
                    None => vec![1.0; dim],
                };
                let row = wide(&x[at..at + dim]);
                let scale =
                    1.0 / (row.iter().map(|x| x * x).sum::<f64>() / dim as f64 + f64::from(1e-6f32)).sqrt();
                let scale = if norms { scale } else { 1.0 };
                let mut d = vec![0.0; dim];
                for i in 0..half {
                    let (sin, cos) = (f64::from(table[t * dim + half + i]), f64::from(table[t * dim + i]));
                    let (low, high) = if is_k {
                        let at = |i| f64::from(dk[page_at(pages, slots[t] as usize, head - heads, i)]);
                        (at(i), at(i + half))
                    } else {
                        let at = |i| f64::from(dq[(t * heads + head) * dim + i]);
                        (at(i), at(i + half))
                    };
                    let (a, b) = order(i);
                    (d[a], d[b]) = (low * cos + high * sin, high * cos - low * sin);
                    let normed = |i: usize| row[i] * scale * weight[i];
                    if !is_k {
                        let to = (t * heads + head) * dim + i;
                        q_expected[to] = normed(a) * cos - normed(b) * sin;
                        q_expected[to + half] = normed(b) * cos + normed(a) * sin;
                    }
                }
                let mean = (0..dim).map(|i| d[i] * weight[i] * row[i]).sum::<f64>() / dim as f64;
                for i in 0..dim {
                    expected[at + i] = d[i];
                    if norms {
                        expected[at + i] = scale * d[i] * weight[i] - row[i] * scale.powi(3) * mean;
                        norm_sums[usize::from(is_k)][i] += d[i] * row[i] * scale;
                    }
                }
            }
            for head in 0..kv_heads {
                for i in 0..dim {
                    let to = t * width + (heads + kv_heads + head) * dim + i;
                    expected[to] = f64::from(dv[page_at(pages, slots[t] as usize, head, i)]);
                }
            }
        }
        gpu.expect("dqkv", &dqkv, &expected, EXACT);
        for (grad, sums) in [&dq_norm, &dk_norm].into_iter().zip(&norm_sums) {
            if let Some((grad, _)) = grad {
                gpu.expect("gradient of a norm", grad, sums, EXACT);
            }
        }
        gpu.expect("q_out", &q_out, &q_expected, if dtype == DType::F32 { EXACT } else { BF16 });
        gpu.expect("qkv is left", &qkv, &wide(&x), 0.0);
    }
}

/// Stacks of parts: dtype, rows and whether there is a bias.
#[test]
fn linear_backward() {
    let Some(gpu) = Gpu::open() else { return };
    let one = |dtype, rows| vec![(dtype, rows, false)];
    let mut cases = vec![
        (one(DType::F32, 1), 1, 1),
        (one(DType::Bf16, 70), 97, 65),
        (one(DType::F32, 130), 200, 70),
        (
            vec![
                (DType::Bf16, 40, true),
                (DType::Q8_0, 24, false),
                (DType::F16, 9, true),
                (DType::F32, 33, true),
            ],
            96,
            20,
        ),
    ];
    let formats = DType::ALL.into_iter().filter(|dtype| dtype.is_quantized());
    cases.extend(formats.map(|dtype| (one(dtype, 35), dtype.block_len() * 2, 3)));
    for (parts, cols, tokens) in cases {
        for precision in [Precision::F32, Precision::Fast] {
            let total: usize = parts.iter().map(|part| part.1).sum();
            let (mut weights, mut grads) = (vec![], vec![]);
            let (mut w, mut dw, mut db): (Vec<f64>, Vec<Vec<f64>>, Vec<Vec<f64>>) = (vec![], vec![], vec![]);
            for &(dtype, rows, bias) in &parts {
                let matrix = gpu.matrix(dtype, rows, cols);
                w.extend(wide(&gpu.expand(&matrix)));
                weights.push(WeightPart { matrix, bias: None });
                let (matrix, values) = gpu.random(DType::F32, &[rows, cols]);
                dw.push(wide(&values));
                let bias = bias.then(|| gpu.random(DType::F32, &[rows]));
                db.push(bias.as_ref().map_or(vec![0.0; rows], |bias| wide(&bias.1)));
                grads.push(WeightPart { matrix, bias: bias.map(|bias| bias.0) });
            }
            let (dy, dy_values) = gpu.random(DType::F32, &[tokens, total]);
            let (x, x_values) = gpu
                .random(if precision == Precision::Fast { DType::Bf16 } else { DType::F32 }, &[tokens, cols]);
            let (weights, grads) = (Weight { parts: weights }, Weight { parts: grads });
            let [added, assigned] = [true, false].map(|accumulate| {
                let (dx, expected) = match accumulate {
                    true => gpu.random(DType::F32, &[tokens, cols]),
                    false => (gpu.unwritten(DType::F32, &[tokens, cols]), vec![0.0; tokens * cols]),
                };
                let p = LinearBackwardParams { tokens: tokens as u32, precision, accumulate };
                gpu.cuda.linear_backward_input(gpu.queue.id(), p, &dy, &weights, &dx);
                (dx, expected.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>())
            });
            let tolerance = if precision == Precision::Fast { BF16 } else { EXACT };
            for (dx, mut expected) in [added, assigned] {
                for (dx, dy) in expected.chunks_mut(cols).zip(dy_values.chunks(total)) {
                    for (w, &dy) in w.chunks(cols).zip(dy) {
                        dx.iter_mut().zip(w).for_each(|(dx, w)| *dx += f64::from(dy) * w);
                    }
                }
                gpu.expect(&format!("dx of {parts:?} {precision:?}"), &dx, &expected, tolerance);
            }
            let p = LinearBackwardParams { tokens: tokens as u32, precision, accumulate: true };
            gpu.cuda.linear_backward_weight(gpu.queue.id(), p, &dy, &x, &grads);
            let mut first = 0;
            for ((part, mut dw), mut db) in grads.parts.iter().zip(dw).zip(db) {
                for (row, (dw, db)) in dw.chunks_mut(cols).zip(&mut db).enumerate() {
                    for (dy, x) in dy_values.chunks(total).zip(x_values.chunks(cols)) {
                        let dy = f64::from(dy[first + row]);
                        *db += dy;
                        dw.iter_mut().zip(x).for_each(|(dw, &x)| *dw += dy * f64::from(x));
                    }
                }
                gpu.expect(&format!("dW of {parts:?} {precision:?}"), &part.matrix, &dw, tolerance);
                if let Some(bias) = &part.bias {
                    gpu.expect("db", bias, &db, EXACT);
                }
                first += db.len();
            }
        }
    }
}

/// A fuser of some layers in training.
#[derive(Clone, Copy, Debug)]
struct Fuser {
    layers: usize,
    tokens: usize,
    source: (usize, usize),
    target: (usize, usize),
    hidden: usize,
    inner: usize,
    blocks: usize,
    stage: usize,
    scalar: bool,
    use_target: bool,
    /// Gradients of what the projector read go to the pages of the others.
    through: bool,
    dropout: f32,
    /// All layers have one projector.
    shared: bool,
}

/// Operands of one device: the same numbers on every one.
struct Maker<'q> {
    queue: &'q Queue,
    made: u32,
}

impl Maker<'_> {
    fn tensor(&mut self, dims: &[usize], size: f32) -> Tensor {
        self.made += 1;
        let mut x = vec![0.0; dims.iter().product()];
        Rng::new(2, Stream::new(Purpose::Init, self.made), 0).fill_uniform(0, &mut x);
        x.iter_mut().for_each(|x| *x = size * (2.0 * *x - 1.0));
        self.queue.tensor(&x, dims, "a test").unwrap()
    }

    fn linear(&mut self, rows: usize, cols: usize, bias: bool) -> Weight {
        let matrix = self.tensor(&[rows, cols], (3.0 / cols as f32).sqrt());
        Weight { parts: vec![WeightPart { matrix, bias: bias.then(|| self.tensor(&[rows], 1.0)) }] }
    }

    fn ffn(&mut self, hidden: usize, inner: usize) -> ops::Ffn {
        ops::Ffn {
            norm: self.tensor(&[hidden], 1.0),
            w1: self.linear(inner, hidden, false),
            w2: self.linear(hidden, inner, false),
        }
    }

    fn pages(&mut self, (heads, dim): (usize, usize), tokens: usize) -> KvPages {
        let dims = [tokens.div_ceil(8) + 1, heads, 8, dim];
        KvPages { keys: self.tensor(&dims, 1.0), values: self.tensor(&dims, 1.0) }
    }

    fn projector(&mut self, f: Fuser) -> Arc<ops::Projector> {
        let (source, target) = (f.source.0 * f.source.1, f.target.0 * f.target.1);
        let staged = if f.stage > 0 { target } else { source };
        Arc::new(ops::Projector {
            source_stage: (f.stage > 0).then(|| ops::SourceStage {
                input: self.linear(f.stage, source, true),
                ffn: self.ffn(f.stage, f.inner),
                output: self.linear(target, f.stage, true),
            }),
            input: self.linear(f.hidden, staged + if f.use_target { target } else { 0 }, true),
            mlp1: self.ffn(f.hidden, f.inner),
            scalar: f.scalar.then(|| (self.ffn(f.hidden, f.hidden), self.linear(f.target.0, f.hidden, true))),
            blocks: (0..f.blocks).map(|_| self.ffn(f.hidden, f.inner)).collect(),
            output: self.linear(target, f.hidden, true),
        })
    }
}

/// Every tensor of a projector, named.
fn tensors(p: &ops::Projector) -> Vec<(String, Tensor)> {
    fn linear(name: &str, weight: &Weight, all: &mut Vec<(String, Tensor)>) {
        all.push((name.into(), weight.parts[0].matrix.clone()));
        all.extend(weight.parts[0].bias.iter().map(|bias| (format!("{name} bias"), bias.clone())));
    }
    fn ffn(name: &str, ffn: &ops::Ffn, all: &mut Vec<(String, Tensor)>) {
        all.push((format!("{name} norm"), ffn.norm.clone()));
        linear(&format!("{name} w1"), &ffn.w1, all);
        linear(&format!("{name} w2"), &ffn.w2, all);
    }
    let mut all = vec![];
    if let Some(stage) = &p.source_stage {
        linear("stage input", &stage.input, &mut all);
        ffn("stage", &stage.ffn, &mut all);
        linear("stage output", &stage.output, &mut all);
    }
    linear("input", &p.input, &mut all);
    ffn("mlp1", &p.mlp1, &mut all);
    if let Some((block, head)) = &p.scalar {
        ffn("scalar", block, &mut all);
        linear("head", head, &mut all);
    }
    p.blocks.iter().for_each(|block| ffn("block", block, &mut all));
    linear("output", &p.output, &mut all);
    all
}

/// Forward and backward on one device: all that they write.
fn train_fuser(queue: &Queue, f: Fuser, precision: Precision) -> Vec<(String, Vec<f32>)> {
    let mut maker = Maker { queue, made: 0 };
    let slots = |start: u32| {
        let slots: Vec<u32> = (0..f.tokens as u32).map(|t| start + t).collect();
        queue.tensor(&slots, &[f.tokens], "a test").unwrap()
    };
    let (mut layers, mut tapes, mut grads) = (vec![], vec![], vec![]);
    let shared = [0; 4].map(|_| maker.projector(f));
    let (source_width, target_width) = (f.source.0 * f.source.1, f.target.0 * f.target.1);
    let extent = ops::FuseExtent::new(&shared[0], source_width, target_width, f.target.0);
    let extent = ops::FuseExtent { layers: f.layers, tokens: f.tokens, ..extent };
    let scratch = |need| {
        let len = queue.backend().scratch_len(need);
        queue.backend().alloc(DType::F32, &[len.max(1)], "a test").unwrap()
    };
    for layer in 0..f.layers {
        let [keys, values, dkeys, dvalues] =
            if f.shared { shared.clone() } else { [0; 4].map(|_| maker.projector(f)) };
        let target = maker.pages(f.target, f.tokens);
        layers.push(ops::FuseLayer {
            keys,
            values,
            gates: [1.0; 2],
            source: maker.pages(f.source, f.tokens),
            base: target.clone(),
            target,
            out: maker.pages(f.target, f.tokens),
        });
        let gates = maker.tensor(&[2, f.tokens, f.target.0], 1.0);
        let one = ops::FuseExtent { layers: 1, ..extent };
        tapes.push(ops::FuseTape {
            layer: 3 + layer as u32,
            gates,
            saved: scratch(ops::Scratch::FuseSaved(one)),
        });
        let dout = maker.pages(f.target, f.tokens);
        grads.push(ops::FuseGrads {
            keys: dkeys,
            values: dvalues,
            dtarget: f.through.then(|| dout.clone()),
            dout,
            dgates: maker.tensor(&[2, f.tokens, f.target.0], 1.0),
        });
    }
    let operands = ops::FuseOperands {
        layers,
        source_slots: slots(1),
        target_slots: slots(3),
        base_slots: slots(3),
        out_slots: slots(3),
        scratch: scratch(ops::Scratch::Fuse(extent)),
    };
    let fuse = ops::FuseParams { tokens: f.tokens as u32, precision, use_target: f.use_target };
    let p = ops::FuseTrainingParams { fuse, dropout: f.dropout, seed: 0x1234_5678_9abc_def0, step: 5 };
    ops::fuse_forward(queue, p, &operands, &tapes).unwrap();
    let backward =
        ops::FuseOperands { scratch: scratch(ops::Scratch::FuseBackward(extent)), ..operands.clone() };
    ops::fuse_backward(queue, p, &backward, &tapes, &grads).unwrap();
    let mut made = vec![];
    let mut keep = |name: String, tensor: &Tensor| made.push((name, queue.download_f32(tensor)));
    for (layer, (operands, grads)) in operands.layers.iter().zip(&grads).enumerate() {
        let name = |what: &str| format!("layer {layer}: {what}");
        keep(name("fused keys"), &operands.out.keys);
        keep(name("fused values"), &operands.out.values);
        keep(name("dgates"), &grads.dgates);
        keep(name("dkeys"), &grads.dout.keys);
        keep(name("dvalues"), &grads.dout.values);
        for (half, projector) in [("keys", &grads.keys), ("values", &grads.values)] {
            for (what, tensor) in tensors(projector) {
                keep(name(&format!("{half} {what}")), &tensor);
            }
        }
    }
    made.into_iter().map(|(name, values)| (name, values.unwrap())).collect()
}

#[test]
fn fuser() {
    let Some(gpu) = Gpu::open() else { return };
    const C2C: Fuser = Fuser {
        layers: 1,
        tokens: 7,
        source: (2, 32),
        target: (4, 16),
        hidden: 64,
        inner: 96,
        blocks: 1,
        stage: 0,
        scalar: true,
        use_target: true,
        through: true,
        dropout: 0.0,
        shared: false,
    };
    let cpu: Arc<dyn Backend> = c2c::backend::cpu::Cpu::with(
        1,
        c2c::backend::cpu::Simd::Portable,
        c2c::backend::cpu::Schedule::Steady,
    );
    let cpu = Queue::new(&cpu).unwrap();
    for f in [
        Fuser { tokens: 1, ..C2C },
        Fuser { layers: 3, tokens: 70, dropout: 0.3, blocks: 2, ..C2C },
        Fuser { layers: 2, shared: true, tokens: 9, through: false, ..C2C },
        Fuser { scalar: false, use_target: false, tokens: 33, dropout: 0.1, ..C2C },
        Fuser { stage: 48, source: (1, 48), tokens: 20, dropout: 0.5, ..C2C },
        Fuser { hidden: 61, inner: 53, source: (3, 10), target: (3, 6), tokens: 18, dropout: 0.2, ..C2C },
    ] {
        let expected = train_fuser(&cpu, f, Precision::F32);
        for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::Fast, 3e-2)] {
            let found = train_fuser(&gpu.queue, f, precision);
            assert_eq!(found.len(), expected.len());
            for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                let size = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                let off = found.iter().zip(expected).map(|(x, y)| (x - y).abs());
                let most =
                    off.fold(0.0, |most: f32, x| if x.is_finite() { most.max(x) } else { f32::INFINITY });
                assert!(
                    most <= tolerance * size,
                    "{f:?} {precision:?} {name}: off by {most:.3e}, the largest is {size:.3e}"
                );
            }
        }
    }
    assert_eq!(gpu.soft.first_fault().map(|report| report.message), None);
}
