//! Cases of the ops of training.

use super::{AttentionShape, Data, Error, FuseCase, Op};
use crate::{
    backend::{DType, Precision},
    ops::*,
};
use std::sync::Arc;

/// Operands of one op of training in one size.
#[derive(Clone, Debug)]
pub enum TrainingCase {
    RmsNorm {
        rows: usize,
        cols: usize,
        weight: DType,
        output: NormOutput,
        /// Whether the weight learns.
        learns: bool,
    },
    Glu {
        tokens: usize,
        width: usize,
        activation: Activation,
    },
    GluBackward {
        tokens: usize,
        width: usize,
        activation: Activation,
    },
    Embed {
        vocab: usize,
        hidden: usize,
        tokens: usize,
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
    Attention(AttentionShape),
    /// Both backward products of a stack of `parts`.
    Linear {
        /// Dtype and rows of each part.
        parts: Vec<(DType, usize)>,
        cols: usize,
        tokens: usize,
    },
    /// Forward with a gate per token and head, then backward.
    Fuse(FuseCase),
    CrossEntropy {
        rows: usize,
        vocab: usize,
        soft_cap: f32,
    },
    Adamw {
        len: usize,
    },
    SumOfSquares {
        len: usize,
    },
    Dropout {
        rows: usize,
        cols: usize,
        accumulate: bool,
    },
}

impl TrainingCase {
    /// The function in `ops`.
    pub fn op(&self) -> &'static str {
        match self {
            TrainingCase::RmsNorm { .. } => "rms_norm_backward",
            TrainingCase::Glu { .. } => "glu",
            TrainingCase::GluBackward { .. } => "glu_backward",
            TrainingCase::Embed { .. } => "embed_backward",
            TrainingCase::Rope { .. } => "rope_backward",
            TrainingCase::Attention(_) => "attention_backward",
            TrainingCase::Linear { .. } => "linear_backward",
            TrainingCase::Fuse(_) => "fuse_backward",
            TrainingCase::CrossEntropy { .. } => "cross_entropy",
            TrainingCase::Adamw { .. } => "adamw",
            TrainingCase::SumOfSquares { .. } => "sum_of_squares",
            TrainingCase::Dropout { .. } => "dropout",
        }
    }

    pub(super) fn op_on(&self, data: &mut Data, precision: Precision) -> Result<Op, Error> {
        let queue = data.queue.clone();
        Ok(match *self {
            TrainingCase::RmsNorm { rows, cols, weight, output, learns } => {
                let (x, weight) = (data.float(&[rows, cols])?, data.vector(weight, cols)?);
                let dy = data.float(&[rows, cols])?;
                let dx = match output {
                    NormOutput::Assign => data.output("dx", false, &[rows, cols])?,
                    NormOutput::Add => data.accumulator("dx", &[rows, cols])?,
                };
                let dweight = learns.then(|| data.accumulator("dweight", &[cols])).transpose()?;
                Box::new(move || {
                    rms_norm_backward(&queue, &x, &weight, 1e-6, 1.0, &dy, output, &dx, dweight.as_ref())
                })
            }
            TrainingCase::Glu { tokens, width, activation } => {
                let gate_up = data.activations(&[tokens, 2 * width])?;
                let out = data.output("out", true, &[tokens, width])?;
                Box::new(move || glu(&queue, &gate_up, activation, &out))
            }
            TrainingCase::GluBackward { tokens, width, activation } => {
                let (gate_up, dout) =
                    (data.activations(&[tokens, 2 * width])?, data.float(&[tokens, width])?);
                let dgate_up = data.output("dgate_up", false, &[tokens, 2 * width])?;
                Box::new(move || glu_backward(&queue, &gate_up, activation, &dout, &dgate_up))
            }
            TrainingCase::Embed { vocab, hidden, tokens } => {
                // Fewer words than tokens: some come twice.
                let ids: Vec<u32> = (0..tokens).map(|t| (t * t + vocab - 1) as u32 % vocab as u32).collect();
                let (ids, dout) = (data.indices(&ids)?, data.float(&[tokens, hidden])?);
                let dtable = data.accumulator("dtable", &[vocab, hidden])?;
                Box::new(move || embed_backward(&queue, &ids, 1.5, &dout, &dtable))
            }
            TrainingCase::Rope { heads, kv_heads, head_dim, tokens, block_size, norm, interleaved } => {
                let width = (heads + 2 * kv_heads) * head_dim;
                let slots = data.slots(tokens, block_size);
                let mut weight = || norm.map(|dtype| data.vector(dtype, head_dim)).transpose();
                let (q_norm, k_norm) = (weight()?, weight()?);
                let mut grad = |name: &str| norm.map(|_| data.accumulator(name, &[head_dim])).transpose();
                let (dq_norm, dk_norm) = (grad("dq_norm")?, grad("dk_norm")?);
                let operands = RopeBackwardOperands {
                    qkv: data.activations(&[tokens, width])?,
                    q_norm,
                    k_norm,
                    cos_sin: data.angles(tokens, head_dim)?,
                    slots: data.indices(&slots)?,
                    dq: data.float(&[tokens, heads * head_dim])?,
                    dkv: data.float_pages(&slots, kv_heads, head_dim, block_size)?,
                    dqkv: data.output("dqkv", false, &[tokens, width])?,
                    dq_norm,
                    dk_norm,
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
                Box::new(move || rope_backward(&queue, p, &operands))
            }
            TrainingCase::Attention(ref shape) => {
                let (p, forward, slots) = shape.operands(data, Pass::Prefill)?;
                paged_attention(&queue, p, &forward)?;
                let &AttentionShape { heads, kv_heads, head_dim, block_size, .. } = shape;
                let (tokens, sequences) = (p.tokens as usize, p.sequences as usize);
                let context = p.max_blocks as usize * block_size;
                let grads = AttentionGrads {
                    dout: data.gradient(&[tokens, heads * head_dim])?,
                    dq: data.output("dq", false, &[tokens, heads * head_dim])?,
                    dkv: data.float_pages_in_out("dkv", &slots, kv_heads, head_dim, block_size)?,
                    scratch: data.scratch(Scratch::AttentionBackward {
                        tokens,
                        sequences,
                        heads,
                        head_dim,
                        context,
                    })?,
                };
                Box::new(move || attention_backward(&queue, p, &forward, &grads))
            }
            TrainingCase::Linear { ref parts, cols, tokens } => {
                let weight = data.weight(parts, cols, None)?;
                let (x, dy) = (data.activations(&[tokens, cols])?, data.gradient(&[tokens, weight.rows()])?);
                let dx = data.output("dx", false, &[tokens, cols])?;
                let grad = |&(_, rows): &(DType, usize)| {
                    let matrix = data.accumulator("gradient", &[rows, cols])?;
                    Ok(WeightPart { matrix, bias: None })
                };
                let grads = Weight { parts: parts.iter().map(grad).collect::<Result<_, Error>>()? };
                Box::new(move || {
                    linear_backward_input(&queue, &dy, &weight, precision, false, &dx)?;
                    linear_backward_weight(&queue, &dy, &x, precision, &grads)
                })
            }
            TrainingCase::Fuse(ref case) => case.training(data, precision)?,
            TrainingCase::CrossEntropy { rows, vocab, soft_cap } => {
                let logits = data.accumulator("logits", &[rows, vocab])?;
                let label = |row: usize| if row % 4 == 2 { IGNORED } else { (row * 31 % vocab) as u32 };
                let labels = data.indices(&(0..rows).map(label).collect::<Vec<u32>>())?;
                let loss = data.output("loss", false, &[rows])?;
                Box::new(move || cross_entropy(&queue, &logits, &labels, 0.25, soft_cap, &loss))
            }
            TrainingCase::Adamw { len } => {
                let p = AdamwParams {
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
                let [weights, grad, m] = ["weights", "grad", "m"].map(|name| data.accumulator(name, &[len]));
                let v = data.squares("v", len)?;
                let (weights, grad, m) = (weights?, grad?, m?);
                Box::new(move || adamw(&queue, p, &weights, &grad, &m, &v))
            }
            TrainingCase::SumOfSquares { len } => {
                let x = data.float(&[len])?;
                let sum = data.output("sum", false, &[1])?;
                Box::new(move || sum_of_squares(&queue, &x, &sum))
            }
            TrainingCase::Dropout { rows, cols, accumulate } => {
                let x = data.float(&[rows, cols])?;
                let out = match accumulate {
                    true => data.accumulator("out", &[rows, cols])?,
                    false => data.output("out", false, &[rows, cols])?,
                };
                let p = DropoutParams { probability: 0.3, seed: 5 << 33 | 7, part: 9, step: 4, accumulate };
                Box::new(move || dropout(&queue, p, &x, &out))
            }
        })
    }
}

impl FuseCase {
    fn training(&self, data: &mut Data, precision: Precision) -> Result<Op, Error> {
        let queue = data.queue.clone();
        let (forward, [target_slots, out_slots]) = self.operands(data)?;
        let extent = self.extent(&forward.layers[0].keys);
        let (tokens, (kv_heads, head_dim), block) = (self.tokens, self.target, FuseCase::BLOCK);
        let mut tapes = Vec::new();
        let mut grads = Vec::new();
        for layer in 0..self.layers {
            tapes.push(FuseTape {
                layer: layer as u32,
                gates: data.float(&[2, tokens, kv_heads])?,
                saved: data.scratch(Scratch::FuseSaved(FuseExtent { layers: 1, ..extent }))?,
            });
            grads.push(FuseGrads {
                keys: Arc::new(self.projector(data, true)?),
                values: Arc::new(self.projector(data, true)?),
                dout: data.float_pages(&out_slots, kv_heads, head_dim, block)?,
                dtarget: Some(data.float_pages_in_out(
                    "dtarget",
                    &target_slots,
                    kv_heads,
                    head_dim,
                    block,
                )?),
                dgates: data.output("dgates", false, &[2, tokens, kv_heads])?,
            });
        }
        let scratch = data.scratch(Scratch::FuseBackward(extent))?;
        let backward = FuseOperands { scratch, ..forward.clone() };
        let fuse = FuseParams { tokens: tokens as u32, precision, use_target: self.use_target };
        let p = FuseTrainingParams { fuse, dropout: 0.1, seed: 3, step: 2 };
        Ok(Box::new(move || {
            fuse_forward(&queue, p, &forward, &tapes)?;
            fuse_backward(&queue, p, &backward, &tapes, &grads)
        }))
    }
}
