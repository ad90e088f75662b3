//! The ops of training on a GPU against plain f64 arithmetic.

mod device;

use c2c::{
    backend::{Backend, DType, Precision, Queue, Tensor, Training, cuda::Cuda},
    ops::{
        self, Activation, AdamwParams, AttentionGrads, AttentionOperands, AttentionParams,
        CrossEntropyParams, EmbedParams, KvPages, LinearBackwardParams, NormOutput, RmsNormParams, Weight,
        WeightPart,
    },
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

#[test]
fn rms_norm_backward() {
    let Some(gpu) = Gpu::open() else { return };
    let (eps, offset) = (1e-6f32, 1.0f32);
    for (rows, cols, weight, output, in_place) in [
        (1, 1, DType::F32, NormOutput::Assign, false),
        (19, 97, DType::Bf16, NormOutput::Add, false),
        (8, 300, DType::F32, NormOutput::Assign, true),
    ] {
        let (x, x_values) = gpu.random(DType::F32, &[rows, cols]);
        let (weight, w) = gpu.random(weight, &[cols]);
        let (dy, dy_values) = gpu.random(DType::F32, &[rows, cols]);
        let (dx, dx_values) =
            if in_place { (dy.clone(), vec![]) } else { gpu.random(DType::F32, &[rows, cols]) };
        let (dweight, dw_values) = gpu.random(DType::F32, &[cols]);
        let (mut dx_expected, mut dw) = (vec![], wide(&dw_values));
        for (x, dy) in x_values.chunks(cols).zip(dy_values.chunks(cols)) {
            let (x, dy) = (wide(x), wide(dy));
            let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / cols as f64 + f64::from(eps)).sqrt();
            let g: Vec<f64> = dy.iter().zip(&w).map(|(dy, &w)| dy * f64::from(offset + w)).collect();
            let mean = g.iter().zip(&x).map(|(g, x)| g * x).sum::<f64>() / cols as f64;
            for i in 0..cols {
                dx_expected.push(scale * g[i] - x[i] * scale.powi(3) * mean);
                dw[i] += dy[i] * x[i] * scale;
            }
        }
        if output == NormOutput::Add {
            dx_expected.iter_mut().zip(&dx_values).for_each(|(d, &b)| *d += f64::from(b));
        }
        let p = RmsNormParams { rows: rows as u32, cols: cols as u32, eps, offset, output };
        gpu.cuda.rms_norm_backward(gpu.queue.id(), p, &x, &weight, &dy, &dx, Some(&dweight));
        gpu.expect("dx", &dx, &dx_expected, EXACT);
        gpu.expect("dweight", &dweight, &dw, EXACT);
    }
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        // The integral of the normal density, by Simpson's rule.
        Activation::GeluErf => {
            let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
            let h = x / 200.0;
            let sum: f64 = (0..200).map(|i| if i % 2 == 0 { 2.0 } else { 4.0 } * density(i as f64 * h)).sum();
            x * (0.5 + h / 3.0 * (sum - density(0.0) + density(x)))
        }
    }
}

#[test]
fn glu() {
    let Some(gpu) = Gpu::open() else { return };
    let (tokens, width) = (7, 53);
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        for dtype in [DType::F32, DType::Bf16] {
            let values = gpu.numbers(tokens * 2 * width).into_iter().map(|x| 4.0 * x).collect();
            let (gate_up, values) = gpu.cast(dtype, values, &[tokens, 2 * width]);
            let out = gpu.unwritten(dtype, &[tokens, width]);
            let dgate_up = gpu.unwritten(DType::F32, &[tokens, 2 * width]);
            let (dout, dout_values) = gpu.random(DType::F32, &[tokens, width]);
            gpu.cuda.glu(gpu.queue.id(), activation, &gate_up, &out);
            gpu.cuda.glu_backward(gpu.queue.id(), activation, &gate_up, &dout, &dgate_up);
            let (mut y, mut d) = (vec![], vec![0.0; 2 * tokens * width]);
            for t in 0..tokens {
                for i in 0..width {
                    let (at, up) = (2 * t * width + i, 2 * t * width + width + i);
                    let (g, u) = (f64::from(values[at]), f64::from(values[up]));
                    let dout = f64::from(dout_values[t * width + i]);
                    let h = 1e-5;
                    let slope = (activate(activation, g + h) - activate(activation, g - h)) / (2.0 * h);
                    y.push(activate(activation, g) * u);
                    d[at] = dout * u * slope;
                    d[up] = dout * activate(activation, g);
                }
            }
            let tolerance = if dtype == DType::F32 { EXACT } else { BF16 };
            gpu.expect("out", &out, &y, tolerance);
            gpu.expect("dgate_up", &dgate_up, &d, EXACT);
        }
    }
}

#[test]
fn embed_backward() {
    let Some(gpu) = Gpu::open() else { return };
    let (vocab, hidden, scale) = (13, 1030, 1.5f32);
    let ids: Vec<u32> = (0..300).map(|i| (i * i + 3) as u32 % 11).collect();
    let (dtable, mut expected) = {
        let (dtable, values) = gpu.random(DType::F32, &[vocab, hidden]);
        (dtable, wide(&values))
    };
    let (dout, dout_values) = gpu.random(DType::F32, &[ids.len(), hidden]);
    for (&id, dout) in ids.iter().zip(dout_values.chunks(hidden)) {
        let row = &mut expected[id as usize * hidden..][..hidden];
        row.iter_mut().zip(dout).for_each(|(r, &d)| *r += f64::from(scale * d));
    }
    let p = EmbedParams { tokens: ids.len() as u32, hidden: hidden as u32, scale };
    gpu.cuda.embed_backward(gpu.queue.id(), p, &gpu.indices(&ids), &dout, &dtable);
    gpu.expect("dtable", &dtable, &expected, EXACT);
}

#[test]
fn cross_entropy() {
    let Some(gpu) = Gpu::open() else { return };
    let (rows, vocab, scale) = (3, 1337, 0.25f32);
    for soft_cap in [0.0f32, 20.0] {
        let values: Vec<f32> = gpu.numbers(rows * vocab).into_iter().map(|x| 19.0 * x).collect();
        let logits = gpu.put(&values, &[rows, vocab]);
        let labels = [7, ops::IGNORED, 1336];
        let loss = gpu.unwritten(DType::F32, &[rows]);
        let p = CrossEntropyParams { rows: rows as u32, vocab: vocab as u32, scale, soft_cap };
        gpu.cuda.cross_entropy(gpu.queue.id(), p, &logits, &gpu.indices(&labels), &loss);
        let (mut losses, mut gradients) = (vec![], vec![]);
        for (row, label) in values.chunks(vocab).zip(labels) {
            let row = wide(row);
            let total: f64 = row.iter().map(|x| x.exp()).sum();
            let known = label != ops::IGNORED;
            losses.push(if known { total.ln() - row[label as usize] } else { 0.0 });
            gradients.extend(row.iter().enumerate().map(|(i, x)| {
                let d = x.exp() / total - f64::from(u8::from(i == label as usize));
                let bend = if soft_cap > 0.0 { 1.0 - (x / f64::from(soft_cap)).powi(2) } else { 1.0 };
                if known { f64::from(scale) * d * bend } else { 0.0 }
            }));
        }
        gpu.expect("loss", &loss, &losses, EXACT);
        gpu.expect("gradient", &logits, &gradients, EXACT);
    }
}

#[test]
fn adamw_and_sum_of_squares() {
    let Some(gpu) = Gpu::open() else { return };
    let len = 1001;
    let [w, g, m, v] = [0; 4].map(|_| gpu.random(DType::F32, &[len]));
    let v_values: Vec<f32> = v.1.iter().map(|v| v.abs()).collect();
    let v = gpu.put(&v_values, &[len]);
    let out = gpu.unwritten(DType::F32, &[1]);
    gpu.cuda.sum_of_squares(gpu.queue.id(), &g.0, &out);
    let squares: f64 = wide(&g.1).iter().map(|g| g * g).sum();
    gpu.expect("squares", &out, &[squares], EXACT);
    let p = AdamwParams {
        len: len as u32,
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-3,
        weight_decay: 0.2,
        correction1: 0.3,
        correction2: 0.4,
        grad_scale: 0.5,
    };
    gpu.cuda.adamw(gpu.queue.id(), p, &w.0, &g.0, &m.0, &v);
    let (mut ws, mut ms, mut vs) = (vec![], vec![], vec![]);
    for i in 0..len {
        let grad = 0.5 * f64::from(g.1[i]);
        let m = 0.9 * f64::from(m.1[i]) + 0.1 * grad;
        let v = 0.99 * f64::from(v_values[i]) + 0.01 * grad * grad;
        let w = f64::from(w.1[i]) * (1.0 - 0.1 * 0.2);
        ws.push(w - 0.1 * (m / 0.3) / ((v / 0.4).sqrt() + 1e-3));
        ms.push(m);
        vs.push(v);
    }
    gpu.expect("weights", &w.0, &ws, EXACT);
    gpu.expect("m", &m.0, &ms, EXACT);
    gpu.expect("v", &v, &vs, EXACT);
    gpu.expect("grad", &g.0, &vec![0.0; len], EXACT);
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

#[test]
fn attention_backward() {
    let Some(gpu) = Gpu::open() else { return };
    // `sequences`: new tokens and keys of each.
    for (heads, kv_heads, dim, sequences, window, soft_cap, dtype) in [
        (1, 1, 8, vec![(1usize, 1usize)], 0, 0.0, DType::F32),
        (4, 2, 54, vec![(7, 7), (2, 20), (33, 70)], 0, 0.0, DType::F32),
        (3, 1, 96, vec![(20, 90)], 24, 2.0, DType::F32),
        (2, 1, 256, vec![(5, 9)], 0, 0.0, DType::F32),
        (4, 2, 64, vec![(40, 70), (3, 3)], 0, 0.0, DType::Bf16),
        (4, 4, 128, vec![(70, 80)], 20, 3.0, DType::Bf16),
        (1, 1, 256, vec![(9, 9)], 0, 0.0, DType::Bf16),
    ] {
        let block_size = 16;
        let tokens: usize = sequences.iter().map(|s| s.0).sum();
        let (stride, width) = ((heads + 2 * kv_heads) * dim, heads * dim);
        let max_blocks = sequences.iter().map(|s| s.1.div_ceil(block_size)).max().unwrap() + 1;
        let (mut tables, mut cu_q, mut blocks) = (vec![], vec![0u32], 1);
        for &(new, context) in &sequences {
            let used = context.div_ceil(block_size);
            // From the last to the first.
            tables.extend((0..used).rev().map(|block| (blocks + block) as u32));
            tables.resize(cu_q.len() * max_blocks, u32::MAX);
            cu_q.push(cu_q[cu_q.len() - 1] + new as u32);
            blocks += used;
        }
        let pages = [blocks, kv_heads, block_size, dim];
        let (q, q_values) = gpu.random(dtype, &[tokens, stride]);
        // Slots that nobody uses hold anything.
        let used = |mut values: Vec<f32>| {
            let mut owned = vec![false; values.len()];
            for (s, &(_, context)) in sequences.iter().enumerate() {
                for key in 0..context {
                    let slot =
                        tables[s * max_blocks + key / block_size] as usize * block_size + key % block_size;
                    for head in 0..kv_heads {
                        owned[page_at(pages, slot, head, 0)..][..dim].fill(true);
                    }
                }
            }
            values.iter_mut().zip(owned).filter(|(_, owned)| !owned).for_each(|(x, _)| *x = f32::NAN);
            values
        };
        let page = || gpu.cast(dtype, used(gpu.numbers(pages.iter().product())), &pages);
        let ((keys, k), (values, v)) = (page(), page());
        let (dkeys, dk) = gpu.random(DType::F32, &pages);
        let (dvalues, dv) = gpu.random(DType::F32, &pages);
        let (dout, dout_values) = gpu.random(DType::F32, &[tokens, width]);
        let (mut dq, mut dk, mut dv) = (vec![0.0; tokens * width], wide(&dk), wide(&dv));
        let mut out = vec![0.0f32; tokens * width];
        let scale = 1.0 / (dim as f32).sqrt();
        for (s, &(new, context)) in sequences.iter().enumerate() {
            for t in 0..new {
                let (at, token) = (context - new + t, cu_q[s] as usize + t);
                let first = if window > 0 { (at + 1).saturating_sub(window) } else { 0 };
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let q = &q_values[token * stride + head * dim..][..dim];
                    let at_key = |key: usize| {
                        let slot = tables[s * max_blocks + key / block_size] as usize * block_size
                            + key % block_size;
                        page_at(pages, slot, kv_head, 0)
                    };
                    let dot = |x: &[f32], y: &[f32]| -> f64 {
                        x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
                    };
                    let cap = f64::from(soft_cap);
                    let scores: Vec<f64> =
                        (first..=at).map(|key| f64::from(scale) * dot(q, &k[at_key(key)..][..dim])).collect();
                    let capped = |s: f64| if cap > 0.0 { cap * (s / cap).tanh() } else { s };
                    let total: f64 = scores.iter().map(|&s| capped(s).exp()).sum();
                    let p: Vec<f64> = scores.iter().map(|&s| capped(s).exp() / total).collect();
                    let row = token * width + head * dim;
                    let d = &dout_values[row..][..dim];
                    for i in 0..dim {
                        let y: f64 =
                            (first..=at).zip(&p).map(|(key, p)| p * f64::from(v[at_key(key) + i])).sum();
                        out[row + i] = y as f32;
                    }
                    let delta = dot(d, &out[row..][..dim]);
                    for ((key, &p), &score) in (first..=at).zip(&p).zip(&scores) {
                        let from = at_key(key);
                        let bend = if cap > 0.0 { 1.0 - (score / cap).tanh().powi(2) } else { 1.0 };
                        let ds = p * (dot(d, &v[from..][..dim]) - delta) * bend * f64::from(scale);
                        for i in 0..dim {
                            dq[row + i] += ds * f64::from(k[from + i]);
                            dk[from + i] += ds * f64::from(q[i]);
                            dv[from + i] += p * f64::from(d[i]);
                        }
                    }
                }
            }
        }
        let (out, _) = gpu.cast(dtype, out, &[tokens, width]);
        let need = ops::Scratch::AttentionBackward {
            tokens,
            sequences: sequences.len(),
            heads,
            head_dim: dim,
            context: max_blocks * block_size,
        };
        let context: Vec<u32> = sequences.iter().map(|s| s.1 as u32).collect();
        let forward = AttentionOperands {
            q,
            pages: KvPages { keys, values },
            cu_q: gpu.indices(&cu_q),
            context: gpu.indices(&context),
            block_tables: gpu.indices(&tables),
            out,
            scratch: gpu.unwritten(DType::F32, &[1]),
        };
        let grads = AttentionGrads {
            dout,
            dq: gpu.unwritten(DType::F32, &[tokens, width]),
            dkv: KvPages { keys: dkeys, values: dvalues },
            scratch: gpu.unwritten(DType::F32, &[gpu.cuda.scratch_len(need)]),
        };
        let p = AttentionParams {
            pass: ops::Pass::Prefill,
            tokens: tokens as u32,
            sequences: sequences.len() as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: dim as u32,
            q_stride: stride as u32,
            max_blocks: max_blocks as u32,
            scale,
            soft_cap,
            window: window as u32,
        };
        gpu.cuda.attention_backward(gpu.queue.id(), p, &forward, &grads);
        let tolerance = if dtype == DType::F32 { 2e-5 } else { 1e-2 };
        let name = |what: &str| format!("{what} of {heads}/{kv_heads} heads of {dim}");
        gpu.expect(&name("dq"), &grads.dq, &dq, tolerance);
        gpu.expect(&name("dk"), &grads.dkv.keys, &dk, tolerance);
        gpu.expect(&name("dv"), &grads.dkv.values, &dv, tolerance);
    }
}

/// A fuser of some layers in training.
#[derive(Clone, Copy)]
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
        for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::Fast, 2e-2)] {
            let found = train_fuser(&gpu.queue, f, precision);
            assert_eq!(found.len(), expected.len());
            for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                let size = (wide(expected).iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
                let most =
                    wide(found).iter().zip(wide(expected)).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                assert!(found.iter().all(|x| x.is_finite()), "{name}");
                assert!(
                    most <= 4.0 * tolerance * size,
                    "{precision:?} {name}: off by {most:.3e}, rms {size:.3e}"
                );
            }
        }
    }
    assert_eq!(gpu.soft.first_fault().map(|report| report.message), None);
}
