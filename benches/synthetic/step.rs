//! A training step as the authors' script is timed with it: one sample of 256 tokens, the last 64 of which are learned and those
//! before them fused but one; frozen models, the published fuser in f32, soft gates and dropout.

use super::{Synthetic, ids, pair, pass_flops};
use c2c::{
    align::Section,
    backend::{Backend, DType, Precision, Queue},
    fuser::FusionMode,
    model::{Decoder, ModelConfig},
    ops::IGNORED,
    pipeline::{Prompt, SharerPrompt},
    train::{
        Adamw, BatchReport, DrawnNoise, PairTrainer, Recompute, Run, Sample, TrainedFuser, config::Decay,
    },
};
use std::sync::Arc;

/// A step's shapes.
#[derive(Clone)]
pub struct Shape {
    pub receiver: ModelConfig,
    pub sharer: ModelConfig,
    /// Width of the fuser.
    pub hidden: usize,
    pub tokens: usize,
    /// The last ones, which are learned.
    pub answer: usize,
}

pub struct Step {
    pub shape: Shape,
    pub trainer: PairTrainer,
    sample: Sample,
    updates: u64,
}

const ADAMW: Adamw = Adamw { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 };

/// Multiplications and additions of each phase.
pub struct Flops {
    pub sharer: f64,
    pub receiver: f64,
    pub fuse: f64,
    pub loss: f64,
    pub backward: f64,
    pub fuse_backward: f64,
}

impl Flops {
    pub fn sum(&self) -> f64 {
        self.sharer + self.receiver + self.fuse + self.loss + self.backward + self.fuse_backward
    }
}

impl Step {
    /// Models in `dtype`. `precision` is the arithmetic's, whatever the models are kept in.
    pub fn new(device: &Arc<dyn Backend>, shape: Shape, dtype: DType, precision: Precision) -> Step {
        let queue = Queue::new(device).expect("a queue");
        let mut synthetic = Synthetic::new(&queue);
        let [receiver, sharer] = [&shape.receiver, &shape.sharer].map(|config| {
            let made = synthetic.decoder(config, dtype);
            Arc::new(Decoder { config: config.clone(), weights: made.weights.clone(), precision })
        });
        let fuser = pair::fuser(device, &shape.receiver, &shape.sharer, DType::F32, shape.hidden);
        let mut fuser = TrainedFuser::new(&fuser, &queue, Decay::All).expect("memory for a fuser");
        // Open gates and closed ones.
        for (number, gate) in fuser.gates.iter_mut().flatten().enumerate() {
            gate.logit = (number % 3) as f32 - 0.5;
        }
        let kv = if precision == Precision::F32 { DType::F32 } else { DType::Bf16 };
        let mode = FusionMode::default();
        let trainer =
            PairTrainer::new(queue, receiver, vec![sharer], vec![fuser], mode, kv, Recompute::None, 0.1, 7);
        let sample = sample(&shape);
        Step { shape, trainer: trainer.expect("memory for a step"), sample, updates: 0 }
    }

    /// Forward and backward; the same noise every time.
    pub fn learn(&mut self) -> BatchReport {
        let noise = DrawnNoise { seed: 7, step: 1, sharer: 0 };
        let run = Run::Learn { noise: &[&noise], step: 1, scale: 1.0 };
        self.trainer.run(&[&self.sample], run).expect("a step")
    }

    /// Clipping and AdamW.
    pub fn update(&mut self) {
        self.updates += 1;
        let queue = self.trainer.queue.clone();
        let fuser = &mut self.trainer.fusers[0];
        let norm = fuser.grad_norm(&queue).expect("a norm");
        fuser
            .update(&queue, &ADAMW, self.updates, 1e-5, (1.0 / (norm + 1e-6)).min(1.0) as f32)
            .expect("an update");
        queue.synchronize().expect("an update");
    }

    pub fn flops(&self) -> Flops {
        let Shape { receiver, sharer, tokens, answer, .. } = &self.shape;
        let fused = tokens - answer - 1;
        let projectors = || self.trainer.fusers[0].fuser.projectors().iter().flat_map(|p| p.tensors());
        let weights = |first: bool| -> f64 {
            let matrices = projectors().filter(|(name, tensor)| {
                tensor.shape().len() == 2 && (!first || name.ends_with("_in.weight"))
            });
            matrices.map(|(_, tensor)| tensor.elements() as f64).sum()
        };
        let answered = pass_flops(receiver, fused, *tokens, true);
        let q = receiver.heads * receiver.head_dim;
        // Scores and weighted values of every pair of an answer's token and what it sees.
        let pairs: usize = (fused..*tokens).map(|token| token + 1).sum();
        let attention = (4 * receiver.layers * pairs * q) as f64;
        Flops {
            sharer: pass_flops(sharer, 0, fused, false),
            receiver: pass_flops(receiver, 0, fused, false) + answered,
            fuse: 2.0 * fused as f64 * weights(false),
            // Logits and the gradient of what they were made of.
            loss: (4 * answer * receiver.vocab * receiver.hidden) as f64,
            // Attention's backward has five products for its forward's two.
            backward: answered + 1.5 * attention,
            // Nobody asks for the gradient of the columns that go in.
            fuse_backward: fused as f64 * (4.0 * weights(false) - 2.0 * weights(true)),
        }
    }
}

fn sample(shape: &Shape) -> Sample {
    let Shape { receiver, sharer, tokens, answer, .. } = shape;
    let fused = tokens - answer - 1;
    let positions = |n: usize| (0..n as u32).collect::<Vec<u32>>();
    let own = ids(receiver, *tokens);
    let label = |t: usize| if t < fused || t + 1 == *tokens { IGNORED } else { own[t + 1] };
    let labels = (0..*tokens).map(label).collect();
    let columns = (0..*tokens).map(|t| (t < fused).then_some(t as u32)).collect();
    let theirs = SharerPrompt { ids: ids(sharer, fused), positions: positions(fused), columns };
    let rest = tokens - fused;
    let sections = vec![Section { len: fused, sharer_mask: 1 }, Section { len: rest, sharer_mask: 0 }];
    let prompt = Prompt { positions: positions(*tokens), ids: own, sharers: vec![theirs], sections };
    Sample { prompt, labels, origin: "synthetic".into() }
}
