//! Random tensors and models in real shapes. The same seed gives the same numbers in every run.

#![allow(dead_code)] // No bench uses all of it.

pub mod pair;
pub mod step;

use c2c::{
    backend::{DType, Precision, Queue, Tensor},
    model::{Biases, Decoder, LayerWeights, ModelConfig, Rope, RopeScaling, Weights},
    ops::{Activation, Weight, WeightPart},
    pipeline::Lane,
    rng::{Purpose, Rng, Stream},
};
use half::{bf16, f16};
use std::sync::Arc;

/// Blocks after which a tensor's numbers repeat: prime, so that rows differ.
const PERIOD: usize = 65_521;

/// Makes one tensor after the other, each with numbers of its own.
pub struct Synthetic<'a> {
    queue: &'a Queue,
    made: u32,
}

impl Synthetic<'_> {
    pub fn new(queue: &Queue) -> Synthetic<'_> {
        Synthetic { queue, made: 0 }
    }

    /// Uniform in (0, 1).
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        self.made += 1;
        let mut numbers = vec![0.0; n];
        Rng::new(20_251_003, Stream::new(Purpose::Init, self.made), 0).fill_uniform(0, &mut numbers);
        numbers
    }

    /// Uniform in ±`bound`.
    pub fn numbers(&mut self, n: usize, bound: f32) -> Vec<f32> {
        self.uniform(n).into_iter().map(|u| (2.0 * u - 1.0) * bound).collect()
    }

    /// In the dtype that activations of this precision have on the device; uniform in ±1.
    pub fn activations(&mut self, precision: Precision, dims: &[usize]) -> Tensor {
        let dtype = self.queue.backend().activation_dtype(precision);
        self.tensor(dtype, dims, 1.0)
    }

    /// Any float or block dtype of [`decode_row`], uniform in about ±`bound`.
    pub fn tensor(&mut self, dtype: DType, dims: &[usize], bound: f32) -> Tensor {
        let blocks = dims.iter().product::<usize>() / dtype.block_len();
        let distinct = self.blocks(dtype, blocks.min(PERIOD), bound);
        let mut bytes = Vec::with_capacity(blocks * dtype.block_bytes());
        while bytes.len() < bytes.capacity() {
            let left = bytes.capacity() - bytes.len();
            bytes.extend_from_slice(&distinct[..left.min(distinct.len())]);
        }
        let backend = self.queue.backend();
        let tensor = backend.alloc(dtype, dims, "synthetic tensor").expect("memory for a synthetic tensor");
        backend.upload(self.queue.id(), &bytes, &tensor);
        self.queue.synchronize().expect("an upload");
        tensor
    }

    fn blocks(&mut self, dtype: DType, blocks: usize, bound: f32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(blocks * dtype.block_bytes());
        match dtype {
            DType::F32 => {
                self.numbers(blocks, bound).iter().for_each(|x| bytes.extend(x.to_le_bytes()));
            }
            DType::Bf16 => {
                let numbers = self.numbers(blocks, bound);
                numbers.iter().for_each(|&x| bytes.extend(bf16::from_f32(x).to_le_bytes()));
            }
            _ => {
                let (steps, least) = match dtype {
                    DType::Q8_0 => (127.0, None),
                    DType::Q4_0 => (8.0, None),
                    DType::Q4_1 => (7.5, Some(-7.5)),
                    other => panic!("no synthetic {other}"),
                };
                let scales = self.uniform(blocks);
                let quants = self.uniform(blocks * (dtype.block_bytes() - 2));
                for (scale, quants) in scales.iter().zip(quants.chunks_exact(dtype.block_bytes() - 2)) {
                    let scale = (0.5 + 0.5 * scale) * bound / steps;
                    bytes.extend(f16::from_f32(scale).to_le_bytes());
                    let start = bytes.len();
                    // -8 left out of Q4_0: its mean would outweigh all else in a product.
                    let nibbles = |u: f32| 17 + (u * 225.0) as u8 % 15 + (u * 15.0) as u8 * 16;
                    let quant = |u: f32| if dtype == DType::Q4_0 { nibbles(u) } else { (u * 256.0) as u8 };
                    bytes.extend(quants.iter().map(|&u| quant(u)));
                    if let Some(least) = least {
                        bytes[start..start + 2].copy_from_slice(&f16::from_f32(scale * least).to_le_bytes());
                    }
                }
            }
        }
        bytes
    }

    /// `[rows, cols]`, so that a product has about the size of its input.
    pub fn matrix(&mut self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        self.tensor(dtype, &[rows, cols], (3.0 / cols as f32).sqrt())
    }

    /// Around 1.
    fn norm(&mut self, width: usize) -> Tensor {
        let weights: Vec<f32> = self.numbers(width, 0.5).iter().map(|x| 1.0 + x).collect();
        self.queue.tensor(&weights, &[width], "norm").expect("memory for a norm")
    }

    /// A model with matrices of `dtype`; F32 ones are computed with in full.
    pub fn decoder(&mut self, config: &ModelConfig, dtype: DType) -> Arc<Decoder> {
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layers = (0..config.layers).map(|_| LayerWeights {
            attn_norm: self.norm(hidden),
            qkv: Weight {
                parts: [q, kv, kv]
                    .map(|rows| WeightPart {
                        matrix: self.matrix(dtype, rows, hidden),
                        bias: config.biases.qkv.then(|| self.tensor(DType::F32, &[rows], 0.1)),
                    })
                    .into(),
            },
            q_norm: config.qk_norm.then(|| self.norm(config.head_dim)),
            k_norm: config.qk_norm.then(|| self.norm(config.head_dim)),
            attn_out: Weight::new(self.matrix(dtype, hidden, q)),
            post_attn_norm: None,
            ffn_norm: self.norm(hidden),
            gate_up: Weight {
                parts: [ffn, ffn]
                    .map(|rows| WeightPart { matrix: self.matrix(dtype, rows, hidden), bias: None })
                    .into(),
            },
            down: Weight::new(self.matrix(dtype, hidden, ffn)),
            post_ffn_norm: None,
        });
        let layers = layers.collect();
        let embed = self.matrix(dtype, config.vocab, hidden);
        let weights = Weights {
            embed: embed.clone(),
            layers,
            final_norm: self.norm(hidden),
            lm_head: Weight::new(embed),
        };
        let precision = if dtype == DType::F32 { Precision::F32 } else { Precision::Fast };
        Arc::new(Decoder { config: config.clone(), weights, precision })
    }
}

/// The same model in f32 arithmetic for a CPU: its own weights, or where they lie on another device the same numbers made again.
pub fn exact_on_cpu(decoder: &Decoder, dtype: DType, made_on: &Queue, cpu: &Queue) -> Arc<Decoder> {
    let weights = match made_on.backend().device() == cpu.backend().device() {
        true => decoder.weights.clone(),
        false => Synthetic::new(cpu).decoder(&decoder.config, dtype).weights.clone(),
    };
    Arc::new(Decoder { config: decoder.config.clone(), weights, precision: Precision::F32 })
}

/// How far numbers of a whole model may be from f32 arithmetic, in parts of their root mean square: twice what the plain
/// computation in that precision is off by. Rounding of every layer adds up: 0.02 where only the cache is in bf16,
/// 0.042 where the products are too (AVX512-BF16), 0.1 with int8 activations; something wrong is off by 1.
pub fn tolerance(dtype: DType) -> f64 {
    if dtype.is_quantized() { 0.15 } else { 0.085 }
}

/// A lane of `decoder` for `tokens` tokens, with a cache as exact as the decoder: F32 or BF16.
pub fn lane(decoder: &Arc<Decoder>, queue: &Queue, tokens: usize) -> Lane {
    let dtype = if decoder.precision == Precision::F32 { DType::F32 } else { DType::Bf16 };
    let kv = decoder.config.paged_kv(queue.backend(), tokens.div_ceil(16), 16, dtype);
    Lane::new(decoder.clone(), queue.clone(), kv.expect("memory for a cache"), tokens).expect("a lane")
}

/// The first `layers` layers of a model shaped like Qwen3-0.6B, with a vocabulary of 32,000.
pub fn receiver(layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: "qwen3".into(),
        vocab: 32_000,
        hidden: 1024,
        layers,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        ffn: 3072,
        norm_eps: 1e-6,
        norm_offset: 0.0,
        activation: Activation::Silu,
        embed_scale: 1.0,
        attention_scale: 1.0 / 128f32.sqrt(),
        attention_soft_cap: 0.0,
        final_soft_cap: 0.0,
        biases: Biases::default(),
        qk_norm: true,
        post_norms: false,
        tied: true,
        rope: Rope { theta: 1e6, scaling: RopeScaling::None },
        rope_local: None,
        interleaved_rope: false,
        windows: vec![0; layers],
        local: vec![false; layers],
        context_length: 32_768,
        eos: Vec::new(),
        bos: None,
    }
}

/// The first `layers` layers of a model shaped like Qwen2.5-0.5B, with a vocabulary of 32,000.
pub fn sharer(layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: "qwen2".into(),
        hidden: 896,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        ffn: 4864,
        attention_scale: 1.0 / 8.0,
        biases: Biases { qkv: true, ..Biases::default() },
        qk_norm: false,
        ..receiver(layers)
    }
}

/// The same family, small enough for a smoke test.
pub fn small(config: ModelConfig) -> ModelConfig {
    ModelConfig {
        vocab: 256,
        hidden: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        ffn: 192,
        windows: vec![0; 2],
        local: vec![false; 2],
        ..config
    }
}

/// Multiplications and additions of a pass over tokens `start..end`, without the logits. A pass that only fills the
/// cache ends with the last layer's keys and values.
pub fn pass_flops(config: &ModelConfig, start: usize, end: usize, hidden_wanted: bool) -> f64 {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let qkv = config.hidden * (q + 2 * kv);
    let rest = config.hidden * (q + 3 * config.ffn);
    let keys: usize = (start..end).map(|token| token + 1).sum();
    let whole_layers = config.layers - usize::from(!hidden_wanted);
    let tokens = end - start;
    2.0 * (config.layers * tokens * qkv + whole_layers * (tokens * rest + 2 * q * keys)) as f64
}

/// Token ids that repeat nothing soon.
pub fn ids(config: &ModelConfig, n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * 7919 % config.vocab) as u32).collect()
}

/// Row `row` of a matrix, block formats expanded by their definition in GGUF.
pub fn decode_row(queue: &Queue, matrix: &Tensor, row: usize) -> Vec<f64> {
    let row = matrix.narrow(row, 1).expect("a row of the matrix");
    let dtype = row.dtype();
    if !dtype.is_quantized() {
        return queue.download_f32(&row).expect("a download").into_iter().map(f64::from).collect();
    }
    let bytes = queue.download(&row).expect("a download");
    let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f64();
    let nibbles = |bytes: &[u8]| -> Vec<f64> {
        bytes.iter().map(|b| b & 15).chain(bytes.iter().map(|b| b >> 4)).map(f64::from).collect()
    };
    let block = |block: &[u8]| -> Vec<f64> {
        let scale = half(block);
        match dtype {
            DType::Q8_0 => block[2..].iter().map(|&q| scale * f64::from(q as i8)).collect(),
            DType::Q4_0 => nibbles(&block[2..]).iter().map(|q| scale * (q - 8.0)).collect(),
            DType::Q4_1 => nibbles(&block[4..]).iter().map(|q| scale * q + half(&block[2..])).collect(),
            other => panic!("no reference for {other}"),
        }
    };
    bytes.chunks_exact(dtype.block_bytes()).flat_map(block).collect()
}
