//! The one table of cases of every op: odd sizes, ratios of heads, edges of windows and pages, sequences of different lengths.
//!
//! Tests run each on two devices and compare; `benches/ops.rs` takes the same builders in the sizes of a real model. Inputs are a
//! function of the case alone; every operand lies between slack full of NaN, and outputs are NaN before they are written.

mod data;
mod judge;
mod table;
mod training;
mod work;

pub use data::Made;
pub use judge::judge;
pub use table::{table, timed};
pub use training::TrainingCase;
pub use work::Work;

use super::*;
use crate::backend::{self, Precision, Queue};
use data::Data;
use std::sync::Arc;

/// Operands of one op in one size.
#[derive(Clone, Debug)]
pub enum Case {
    Embed {
        dtype: DType,
        vocab: usize,
        hidden: usize,
        tokens: usize,
    },
    RmsNorm {
        rows: usize,
        cols: usize,
        weight: DType,
        output: NormOutput,
    },
    Linear {
        pass: Pass,
        /// Dtype and rows of each part.
        parts: Vec<(DType, usize)>,
        cols: usize,
        tokens: usize,
        bias: Option<DType>,
        accumulate: bool,
    },
    LinearGlu {
        pass: Pass,
        dtype: DType,
        width: usize,
        cols: usize,
        tokens: usize,
        bias: Option<DType>,
        activation: Activation,
    },
    Rope {
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        tokens: usize,
        block_size: usize,
        norm: Option<DType>,
        interleaved: bool,
    },
    Attention {
        pass: Pass,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        /// New tokens and keys of each sequence.
        sequences: Vec<(usize, usize)>,
        block_size: usize,
        window: usize,
        soft_cap: f32,
    },
    GatherRows {
        rows: usize,
        cols: usize,
        taken: usize,
    },
    CopySlots {
        kv_heads: usize,
        head_dim: usize,
        block_sizes: [usize; 2],
        tokens: usize,
    },
    SoftCap {
        elements: usize,
    },
    Fuse(FuseCase),
    Training(TrainingCase),
}

/// Heads and sequences of attention.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// New tokens and keys of each sequence.
    pub sequences: Vec<(usize, usize)>,
    pub block_size: usize,
    pub window: usize,
    pub soft_cap: f32,
}

/// A fuser of some layers.
#[derive(Clone, Debug)]
pub struct FuseCase {
    pub layers: usize,
    pub tokens: usize,
    /// Heads and head_dim.
    pub source: (usize, usize),
    pub target: (usize, usize),
    pub hidden: usize,
    pub inner: usize,
    pub blocks: usize,
    pub weights: DType,
    pub scalar: bool,
    pub use_target: bool,
    /// Hidden width of C2C-C's stage, 0 without.
    pub stage: usize,
    pub gates: [f32; 2],
    /// `base` and `out` in pages of their own.
    pub apart: bool,
}

/// How a case is run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub precision: Precision,
    /// Inputs, weights and pages are rounded to bf16: what a plain implementation in that precision would be given.
    pub rounded: bool,
}

impl Run {
    pub const F32: Run = Run { precision: Precision::F32, rounded: false };
    pub const FAST: Run = Run { precision: Precision::Fast, rounded: false };
    /// What a plain implementation in bf16 computes: inputs, weights and outputs rounded, everything between in f32.
    pub const PLAIN: Run = Run { precision: Precision::F32, rounded: true };
}

/// What went wrong in a case.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Shape(#[from] ShapeError),
    #[error(transparent)]
    Backend(#[from] backend::Error),
    #[error("{0} was written outside its bounds")]
    Slack(String),
}

impl Case {
    /// The function in `ops`.
    pub fn op(&self) -> &'static str {
        match self {
            Case::Embed { .. } => "embed",
            Case::RmsNorm { .. } => "rms_norm",
            Case::Linear { .. } => "linear",
            Case::LinearGlu { .. } => "linear_glu",
            Case::Rope { .. } => "rope_kv_write",
            Case::Attention { .. } => "paged_attention",
            Case::GatherRows { .. } => "gather_rows",
            Case::CopySlots { .. } => "copy_slots",
            Case::SoftCap { .. } => "soft_cap",
            Case::Fuse(_) => "fuse",
            Case::Training(case) => case.op(),
        }
    }

    /// Bytes that must move and operations that must be done, as docs/KERNELS.md says.
    pub fn work(&self, queue: &Queue, run: Run) -> Work {
        Work::of(self, queue.backend().activation_dtype(run.precision))
    }

    /// Whether only a device that trains has the op.
    pub fn trains(&self) -> bool {
        matches!(self, Case::Training(_))
    }

    /// Runs the op on `queue` and returns every output as f32.
    pub fn run(&self, queue: &Queue, run: Run) -> Result<Vec<Made>, Error> {
        let mut prepared = self.prepare(queue, run)?;
        prepared.issue()?;
        queue.synchronize()?;
        prepared.data.outputs()
    }

    /// Places the operands on the device.
    pub fn prepare(&self, queue: &Queue, run: Run) -> Result<Prepared, Error> {
        let mut data = Data::new(queue, run);
        let op = self.op_on(&mut data, run.precision)?;
        Ok(Prepared { data, op })
    }

    fn op_on(&self, data: &mut Data, precision: Precision) -> Result<Op, Error> {
        let queue = data.queue.clone();
        Ok(match *self {
            Case::Embed { dtype, vocab, hidden, tokens } => {
                let table = data.matrix(dtype, vocab, hidden)?;
                let ids: Vec<u32> = (0..tokens).map(|t| (t * 31 + vocab - 1) as u32 % vocab as u32).collect();
                let (ids, out) = (data.indices(&ids)?, data.output("out", false, &[tokens, hidden])?);
                Box::new(move || embed(&queue, &ids, &table, 1.5, &out))
            }
            Case::RmsNorm { rows, cols, weight, output } => {
                let (x, weight) = (data.float(&[rows, cols])?, data.vector(weight, cols)?);
                let out = match output {
                    NormOutput::Assign => data.output("out", true, &[rows, cols])?,
                    NormOutput::Add => data.accumulator("out", &[rows, cols])?,
                };
                Box::new(move || rms_norm(&queue, &x, &weight, 1e-6, 1.0, output, &out))
            }
            Case::Linear { pass, ref parts, cols, tokens, bias, accumulate } => {
                let weight = data.weight(parts, cols, bias)?;
                let x = data.activations(&[tokens, cols])?;
                let out = match accumulate {
                    true => data.accumulator("out", &[tokens, weight.rows()])?,
                    false => data.output("out", true, &[tokens, weight.rows()])?,
                };
                Box::new(move || linear(&queue, pass, &x, &weight, precision, accumulate, &out))
            }
            Case::LinearGlu { pass, dtype, width, cols, tokens, bias, activation } => {
                let weight = data.weight(&[(dtype, width), (dtype, width)], cols, bias)?;
                let x = data.activations(&[tokens, cols])?;
                let scratch = data.scratch(Scratch::LinearGlu { tokens, width })?;
                let out = data.output("out", true, &[tokens, width])?;
                Box::new(move || linear_glu(&queue, pass, &x, &weight, precision, activation, &scratch, &out))
            }
            Case::Rope { heads, kv_heads, head_dim, tokens, block_size, norm, interleaved } => {
                let width = (heads + 2 * kv_heads) * head_dim;
                let slots = data.slots(tokens, block_size);
                let operands = RopeOperands {
                    qkv: data.in_place("qkv", &[tokens, width], heads * head_dim)?,
                    q_out: None,
                    q_norm: norm.map(|dtype| data.vector(dtype, head_dim)).transpose()?,
                    k_norm: norm.map(|dtype| data.vector(dtype, head_dim)).transpose()?,
                    cos_sin: data.angles(tokens, head_dim)?,
                    slots: data.indices(&slots)?,
                    pages: data.pages_out("pages", &slots, kv_heads, head_dim, block_size)?,
                };
                let p = RopeParams {
                    tokens: tokens as u32,
                    heads: heads as u32,
                    kv_heads: kv_heads as u32,
                    head_dim: head_dim as u32,
                    norm_eps: 1e-6,
                    norm_offset: 0.0,
                    interleaved: interleaved.into(),
                };
                Box::new(move || rope_kv_write(&queue, p, &operands))
            }
            Case::Attention {
                pass,
                heads,
                kv_heads,
                head_dim,
                ref sequences,
                block_size,
                window,
                soft_cap,
            } => {
                let sequences = sequences.clone();
                let shape =
                    AttentionShape { heads, kv_heads, head_dim, sequences, block_size, window, soft_cap };
                let (p, operands, _) = shape.operands(data, pass)?;
                Box::new(move || paged_attention(&queue, p, &operands))
            }
            Case::GatherRows { rows, cols, taken } => {
                let x = data.float(&[rows, cols])?;
                let index: Vec<u32> = (0..taken).map(|i| ((i * 7 + rows - 1) % rows) as u32).collect();
                let (index, out) = (data.indices(&index)?, data.output("out", false, &[taken, cols])?);
                Box::new(move || gather_rows(&queue, &x, &index, &out))
            }
            Case::CopySlots { kv_heads, head_dim, block_sizes, tokens } => {
                let [from_slots, to_slots] = block_sizes.map(|size| data.slots(tokens, size));
                let from = data.pages(&from_slots, kv_heads, head_dim, block_sizes[0])?;
                let to = data.pages_out("to", &to_slots, kv_heads, head_dim, block_sizes[1])?;
                let (from_slots, to_slots) = (data.indices(&from_slots)?, data.indices(&to_slots)?);
                Box::new(move || copy_slots(&queue, &from, &from_slots, &to, &to_slots))
            }
            Case::SoftCap { elements } => {
                let x = data.accumulator("x", &[elements])?;
                Box::new(move || soft_cap(&queue, 30.0, &x))
            }
            Case::Fuse(ref case) => {
                let p = FuseParams { tokens: case.tokens as u32, precision, use_target: case.use_target };
                let (operands, _) = case.operands(data)?;
                Box::new(move || fuse(&queue, p, &operands))
            }
            Case::Training(ref case) => case.op_on(data, precision)?,
        })
    }
}

/// A case whose operands are on a device.
pub struct Prepared {
    data: Data,
    op: Op,
}

/// Issues a case's op.
type Op = Box<dyn Fn() -> Result<(), ShapeError>>;

impl Prepared {
    /// Issues the op on its queue. What it changes in place it changes each time.
    pub fn issue(&mut self) -> Result<(), ShapeError> {
        (self.op)()
    }
}

impl AttentionShape {
    /// And the slots of all keys.
    fn operands(
        &self,
        data: &mut Data,
        pass: Pass,
    ) -> Result<(AttentionParams, AttentionOperands, Vec<u32>), Error> {
        let &AttentionShape { heads, kv_heads, head_dim, ref sequences, block_size, window, soft_cap } = self;
        let tokens: usize = sequences.iter().map(|s| s.0).sum();
        let q_stride = (heads + 2 * kv_heads) * head_dim;
        let (tables, max_blocks, slots) = data.tables(sequences, block_size);
        let mut cu_q = vec![0u32];
        for &(new, _) in sequences {
            cu_q.push(cu_q[cu_q.len() - 1] + new as u32);
        }
        let context: Vec<u32> = sequences.iter().map(|s| s.1 as u32).collect();
        let n = sequences.len();
        let need = Scratch::Attention { sequences: n, heads, head_dim, context: max_blocks * block_size };
        let q = data.activations(&[tokens, q_stride])?;
        let operands = AttentionOperands {
            out: data.output("out", true, &[tokens, heads * head_dim])?,
            q,
            pages: data.pages(&slots, kv_heads, head_dim, block_size)?,
            cu_q: data.indices(&cu_q)?,
            context: data.indices(&context)?,
            block_tables: data.indices(&tables)?.reshape(&[n, max_blocks]).expect("tables of rows"),
            scratch: data.scratch(need)?,
        };
        let p = AttentionParams {
            pass,
            tokens: tokens as u32,
            sequences: n as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            q_stride: q_stride as u32,
            max_blocks: max_blocks as u32,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap,
            window: window as u32,
        };
        Ok((p, operands, slots))
    }
}

impl FuseCase {
    /// One small layer of the published kind.
    pub const C2C: FuseCase = FuseCase {
        layers: 1,
        tokens: 7,
        source: (2, 32),
        target: (4, 16),
        hidden: 64,
        inner: 96,
        blocks: 1,
        weights: DType::Bf16,
        scalar: true,
        use_target: true,
        stage: 0,
        gates: [1.0, 1.0],
        apart: false,
    };

    const BLOCK: usize = 16;

    fn extent(&self, first: &Projector) -> FuseExtent {
        let [source, target] = [self.source, self.target].map(|(heads, dim)| heads * dim);
        let extent = FuseExtent::new(first, source, target, self.target.0);
        FuseExtent { layers: self.layers, tokens: self.tokens, ..extent }
    }

    /// And the slots of the target's and of the fused columns.
    fn operands(&self, data: &mut Data) -> Result<(FuseOperands, [Vec<u32>; 2]), Error> {
        const BLOCK: usize = FuseCase::BLOCK;
        let [source_slots, target_slots] = [0, 1].map(|_| data.slots(self.tokens, BLOCK));
        let out_slots = if self.apart { data.slots(self.tokens, BLOCK) } else { target_slots.clone() };
        let mut layers = Vec::new();
        for layer in 0..self.layers {
            let (source, target) = (self.source, self.target);
            let source = data.pages(&source_slots, source.0, source.1, BLOCK)?;
            let name = format!("layer {layer}");
            let (target, out) = if self.apart {
                let out = data.pages_out(&name, &out_slots, target.0, target.1, BLOCK)?;
                (data.pages(&target_slots, target.0, target.1, BLOCK)?, out)
            } else {
                let both = data.pages_in_out(&name, &target_slots, target.0, target.1, BLOCK)?;
                (both.clone(), both)
            };
            layers.push(FuseLayer {
                keys: Arc::new(self.projector(data, false)?),
                values: Arc::new(self.projector(data, false)?),
                gates: self.gates,
                source,
                base: target.clone(),
                target,
                out,
            });
        }
        let extent = self.extent(&layers[0].keys);
        let operands = FuseOperands {
            layers,
            source_slots: data.indices(&source_slots)?,
            base_slots: data.indices(&target_slots)?,
            target_slots: data.indices(&target_slots)?,
            out_slots: data.indices(&out_slots)?,
            scratch: data.scratch(Scratch::Fuse(extent))?,
        };
        Ok((operands, [target_slots, out_slots]))
    }

    /// Weights, or F32 gradients of them that are added to.
    fn projector(&self, data: &mut Data, grads: bool) -> Result<Projector, Error> {
        let (source, target) = (self.source.0 * self.source.1, self.target.0 * self.target.1);
        let (hidden, dtype, inner) = (self.hidden, self.weights, self.inner);
        let linear = |data: &mut Data, rows: usize, cols: usize, bias: bool| -> Result<Weight, Error> {
            if !grads {
                return data.weight(&[(dtype, rows)], cols, bias.then_some(dtype));
            }
            let matrix = data.accumulator("gradient", &[rows, cols])?;
            let bias = bias.then(|| data.accumulator("gradient", &[rows])).transpose()?;
            Ok(Weight { parts: vec![WeightPart { matrix, bias }] })
        };
        let ffn = |data: &mut Data, width: usize, inner: usize| -> Result<Ffn, Error> {
            let (w1, w2) = (linear(data, inner, width, false)?, linear(data, width, inner, false)?);
            let norm = match grads {
                true => data.accumulator("gradient", &[width])?,
                false => data.vector(dtype, width)?,
            };
            Ok(Ffn { norm, w1, w2 })
        };
        let source_stage = match self.stage {
            0 => None,
            stage => {
                let (input, output) =
                    (linear(data, stage, source, true)?, linear(data, target, stage, true)?);
                Some(SourceStage { input, ffn: ffn(data, stage, inner)?, output })
            }
        };
        let mlp1 = ffn(data, hidden, inner)?;
        let blocks = (0..self.blocks).map(|_| ffn(data, hidden, inner)).collect::<Result<_, _>>()?;
        let scalar = match self.scalar {
            true => Some((ffn(data, hidden, hidden)?, linear(data, self.target.0, hidden, true)?)),
            false => None,
        };
        let staged = if self.stage > 0 { target } else { source };
        let input = staged + if self.use_target { target } else { 0 };
        Ok(Projector {
            source_stage,
            input: linear(data, hidden, input, true)?,
            mlp1,
            scalar,
            blocks,
            output: linear(data, target, hidden, true)?,
        })
    }
}
