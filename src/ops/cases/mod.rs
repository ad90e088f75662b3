//! The one table of cases of every op: odd sizes, ratios of heads, edges of windows and pages, sequences of different lengths.
//!
//! Tests run each on two devices and compare; benches take the same builders in real sizes. Inputs are a function of the case
//! alone; every operand lies between slack full of NaN, and outputs are NaN before they are written.

mod data;
mod table;
mod training;

pub use data::Made;
pub use table::table;
pub use training::TrainingCase;

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

    /// Whether only a device that trains has the op.
    pub fn trains(&self) -> bool {
        matches!(self, Case::Training(_))
    }

    /// Runs the op on `queue` and returns every output as f32.
    pub fn run(&self, queue: &Queue, run: Run) -> Result<Vec<Made>, Error> {
        let mut data = Data::new(queue, run);
        self.issue(&mut data, run.precision)?;
        queue.synchronize()?;
        data.outputs()
    }

    fn issue(&self, data: &mut Data, precision: Precision) -> Result<(), Error> {
        let queue = data.queue.clone();
        match *self {
            Case::Embed { dtype, vocab, hidden, tokens } => {
                let table = data.matrix(dtype, vocab, hidden)?;
                let ids: Vec<u32> = (0..tokens).map(|t| (t * 31 + vocab - 1) as u32 % vocab as u32).collect();
                let (ids, out) = (data.indices(&ids)?, data.output("out", false, &[tokens, hidden])?);
                embed(&queue, &ids, &table, 1.5, &out)?;
            }
            Case::RmsNorm { rows, cols, weight, output } => {
                let (x, weight) = (data.float(&[rows, cols])?, data.vector(weight, cols)?);
                let out = match output {
                    NormOutput::Assign => data.output("out", true, &[rows, cols])?,
                    NormOutput::Add => data.accumulator("out", &[rows, cols])?,
                };
                rms_norm(&queue, &x, &weight, 1e-6, 1.0, output, &out)?;
            }
            Case::Linear { pass, ref parts, cols, tokens, bias, accumulate } => {
                let weight = data.weight(parts, cols, bias)?;
                let x = data.activations(&[tokens, cols])?;
                let out = match accumulate {
                    true => data.accumulator("out", &[tokens, weight.rows()])?,
                    false => data.output("out", true, &[tokens, weight.rows()])?,
                };
                linear(&queue, pass, &x, &weight, precision, accumulate, &out)?;
            }
            Case::LinearGlu { pass, dtype, width, cols, tokens, bias, activation } => {
                let weight = data.weight(&[(dtype, width), (dtype, width)], cols, bias)?;
                let x = data.activations(&[tokens, cols])?;
                let scratch = data.scratch(Scratch::LinearGlu { tokens, width })?;
                let out = data.output("out", true, &[tokens, width])?;
                linear_glu(&queue, pass, &x, &weight, precision, activation, &scratch, &out)?;
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
                rope_kv_write(&queue, p, &operands)?;
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
                paged_attention(&queue, p, &operands)?;
            }
            Case::GatherRows { rows, cols, taken } => {
                let x = data.float(&[rows, cols])?;
                let index: Vec<u32> = (0..taken).map(|i| ((i * 7 + rows - 1) % rows) as u32).collect();
                let (index, out) = (data.indices(&index)?, data.output("out", false, &[taken, cols])?);
                gather_rows(&queue, &x, &index, &out)?;
            }
            Case::CopySlots { kv_heads, head_dim, block_sizes, tokens } => {
                let [from_slots, to_slots] = block_sizes.map(|size| data.slots(tokens, size));
                let from = data.pages(&from_slots, kv_heads, head_dim, block_sizes[0])?;
                let to = data.pages_out("to", &to_slots, kv_heads, head_dim, block_sizes[1])?;
                let (from_slots, to_slots) = (data.indices(&from_slots)?, data.indices(&to_slots)?);
                copy_slots(&queue, &from, &from_slots, &to, &to_slots)?;
            }
            Case::SoftCap { elements } => {
                let x = data.accumulator("x", &[elements])?;
                soft_cap(&queue, 30.0, &x)?;
            }
            Case::Fuse(ref case) => {
                let p = FuseParams { tokens: case.tokens as u32, precision, use_target: case.use_target };
                fuse(&queue, p, &case.operands(data)?)?;
            }
            Case::Training(ref case) => case.issue(data)?,
        }
        Ok(())
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

    fn operands(&self, data: &mut Data) -> Result<FuseOperands, Error> {
        const BLOCK: usize = 16;
        let (source_width, target_width) = (self.source.0 * self.source.1, self.target.0 * self.target.1);
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
                keys: Arc::new(self.projector(data, source_width, target_width)?),
                values: Arc::new(self.projector(data, source_width, target_width)?),
                gates: self.gates,
                source,
                base: target.clone(),
                target,
                out,
            });
        }
        let first = &layers[0].keys;
        let extent = FuseExtent::new(first, source_width, target_width, self.target.0);
        let extent = FuseExtent { layers: self.layers, tokens: self.tokens, ..extent };
        Ok(FuseOperands {
            layers,
            source_slots: data.indices(&source_slots)?,
            base_slots: data.indices(&target_slots)?,
            target_slots: data.indices(&target_slots)?,
            out_slots: data.indices(&out_slots)?,
            scratch: data.scratch(Scratch::Fuse(extent))?,
        })
    }

    fn projector(&self, data: &mut Data, source: usize, target: usize) -> Result<Projector, Error> {
        let (hidden, dtype) = (self.hidden, self.weights);
        let mut linear =
            |rows: usize, cols: usize, bias: bool| data.weight(&[(dtype, rows)], cols, bias.then_some(dtype));
        let source_stage = match self.stage {
            0 => None,
            stage => {
                let (input, output) = (linear(stage, source, true)?, linear(target, stage, true)?);
                let (w1, w2) = (linear(self.inner, stage, false)?, linear(stage, self.inner, false)?);
                let norm = data.vector(dtype, stage)?;
                Some(SourceStage { input, ffn: Ffn { norm, w1, w2 }, output })
            }
        };
        let mut ffn = |inner: usize| -> Result<Ffn, Error> {
            let (w1, w2) = (
                data.weight(&[(dtype, inner)], hidden, None)?,
                data.weight(&[(dtype, hidden)], inner, None)?,
            );
            Ok(Ffn { norm: data.vector(dtype, hidden)?, w1, w2 })
        };
        let mlp1 = ffn(self.inner)?;
        let blocks = (0..self.blocks).map(|_| ffn(self.inner)).collect::<Result<_, _>>()?;
        let scalar = self.scalar.then(|| ffn(hidden)).transpose()?;
        let staged = if self.stage > 0 { target } else { source };
        let input = staged + if self.use_target { target } else { 0 };
        let scalar = match scalar {
            Some(ffn) => Some((ffn, data.weight(&[(dtype, self.target.0)], hidden, Some(dtype))?)),
            None => None,
        };
        Ok(Projector {
            source_stage,
            input: data.weight(&[(dtype, hidden)], input, Some(dtype))?,
            mlp1,
            scalar,
            blocks,
            output: data.weight(&[(dtype, target)], hidden, Some(dtype))?,
        })
    }
}
