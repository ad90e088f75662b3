//! Low-rank adapters in training (LoRA, arXiv 2106.09685): `y = W·x + (alpha / rank) · B·A·dropout(x)` beside a frozen W of any
//! format. docs/math.md, "Low-rank adapters".
//!
//! Matrices that share their input (q, k, v; gate, up) have their adapters side by side: the A of `k` of them are stacked to
//! `[k·rank, inputs]`, their B, scaled, are blocks of one `[outputs, k·rank]` that is 0 elsewhere. So forward and backward are linear
//! maps, on every device. The trained B are PEFT's own, `[outputs, rank]`; they are laid out before a pass and their gradients
//! picked from the blocks behind it.

use super::{Error, Kept, Parameters, config::LoraSettings};
use crate::{
    backend::{DType, Precision, Queue, Tensor},
    model::{Adapter, Factors, LoraTarget, ModelConfig},
    ops::{self, DropoutParams, Pass, Weight, WeightPart},
    rng::{Purpose, Rng, Stream},
};

/// The adapters of a decoder. Their weights are [`Parameters`], which this has views of.
pub struct Lora {
    settings: LoraSettings,
    seed: u64,
    /// One of each of a layer's linear maps (qkv, attn_out, gate_up, down), where it has adapters.
    layers: Vec<[Option<Stack>; 4]>,
    /// `0, 1, 2, …` and F32 of as many rows of B.
    rows: Tensor,
    picked: Tensor,
    room: Option<Room>,
}

/// The adapters of matrices that share their input.
struct Stack {
    /// The trained A, and their gradients: parts `[rank, inputs]`.
    a: Weight,
    a_grad: Weight,
    /// For each of the model's parts `[outputs, k·rank]`, F32.
    b: Weight,
    b_grad: Weight,
    blocks: Vec<Block>,
}

/// Where a trained B lies in the applied one.
struct Block {
    /// F32`[outputs, rank]`
    trained: Tensor,
    grad: Tensor,
    /// F32`[outputs · k, rank]`: the part as pieces of rows.
    applied: Tensor,
    applied_grad: Tensor,
    /// U32`[outputs]`: this adapter's pieces.
    pieces: Tensor,
}

/// Memory of a pass, F32.
struct Room {
    tokens: usize,
    /// `[tokens · inputs]`
    dropped: Tensor,
    /// `[tokens · k·rank]`: A·x, and its gradient.
    low: Tensor,
    dlow: Tensor,
}

/// The first `rows · width` elements of `memory` as `[rows, width]`.
fn carve(memory: &Tensor, rows: usize, width: usize) -> Tensor {
    let flat = memory.narrow(0, rows * width).expect("room was made for the pass");
    flat.reshape(&[rows, width]).expect("as many elements")
}

impl Lora {
    /// Untrained: A uniform in ±1/√inputs as in PEFT, B 0, so that nothing changes yet.
    pub fn new(
        queue: &Queue,
        config: &ModelConfig,
        settings: &LoraSettings,
        seed: u64,
        decay: super::config::Decay,
    ) -> Result<(Parameters, Lora), Error> {
        let rank = settings.rank;
        let targets = LoraTarget::ALL.into_iter().filter(|target| settings.targets.contains(target));
        let targets: Vec<LoraTarget> = targets.collect();
        let mut tensors = Vec::new();
        for layer in 0..config.layers {
            for target in &targets {
                let [outputs, inputs] = target.shape(config);
                tensors.push((target.factor_name(layer, 'A'), vec![rank, inputs]));
                tensors.push((target.factor_name(layer, 'B'), vec![outputs, rank]));
            }
        }
        let parameters = Parameters::new(queue, tensors, decay)?;
        for index in (0..parameters.entries().len()).step_by(2) {
            let view = parameters.view(Kept::Weights, index);
            let mut values = vec![0.0; view.elements()];
            Rng::new(seed, Stream::new(Purpose::Init, index as u32), 0).fill_uniform(0, &mut values);
            let bound = (view.row_len() as f32).sqrt().recip();
            values.iter_mut().for_each(|u| *u = (2.0 * *u - 1.0) * bound);
            queue.upload(&values, &view);
        }
        let most = targets.iter().map(|target| target.shape(config)[0]).max().unwrap_or(0);
        let rows: Vec<u32> = (0..most as u32).collect();
        let mut lora = Lora {
            settings: settings.clone(),
            seed,
            layers: Vec::new(),
            rows: queue.tensor(&rows, &[most], "row numbers")?,
            picked: queue.backend().alloc(DType::F32, &[most, rank], "gradients of adapters")?,
            room: None,
        };
        for layer in 0..config.layers {
            let first = 2 * layer * targets.len();
            let mut stacks = [const { None }; 4];
            for (number, stack) in stacks.iter_mut().enumerate() {
                let own = targets.iter().enumerate().filter(|(_, target)| target.place().0 == number);
                let own: Vec<(usize, LoraTarget)> =
                    own.map(|(index, target)| (first + 2 * index, *target)).collect();
                if !own.is_empty() {
                    *stack = Some(Stack::new(queue, config, &parameters, rank, number, &own)?);
                }
            }
            lora.layers.push(stacks);
        }
        Ok((parameters, lora))
    }

    pub fn settings(&self) -> &LoraSettings {
        &self.settings
    }

    fn scale(&self) -> f32 {
        (self.settings.alpha / self.settings.rank as f64) as f32
    }

    fn stacks(&self) -> impl Iterator<Item = &Stack> {
        self.layers.iter().flatten().flatten()
    }

    /// Makes room for a pass and lays the trained B out.
    pub fn begin(&mut self, queue: &Queue, tokens: usize) -> Result<(), Error> {
        if self.room.as_ref().is_none_or(|room| room.tokens < tokens) {
            let widest = |of: fn(&Stack) -> usize| self.stacks().map(of).max().unwrap_or(0);
            let (inputs, rank) = (widest(|stack| stack.a.cols()), widest(|stack| stack.a.rows()));
            let alloc =
                |width: usize| queue.backend().alloc(DType::F32, &[tokens * width], "adapters' activations");
            self.room = Some(Room { tokens, dropped: alloc(inputs)?, low: alloc(rank)?, dlow: alloc(rank)? });
        }
        for stack in self.stacks() {
            for part in &stack.b.parts {
                ops::zero(queue, &part.matrix)?;
            }
            for block in &stack.blocks {
                // Adding rows to rows at other places is what backward of an embedding does.
                ops::embed_backward(queue, &block.pieces, self.scale(), &block.trained, &block.applied)?;
            }
        }
        Ok(())
    }

    /// Brings the gradients of the applied B, which have grown in a backward pass, to the trained ones.
    pub fn finish(&self, queue: &Queue) -> Result<(), Error> {
        for stack in self.stacks() {
            for block in &stack.blocks {
                let outputs = block.grad.rows();
                let first = |tensor: &Tensor| tensor.narrow(0, outputs).expect("as many as the most outputs");
                let picked = first(&self.picked);
                ops::gather_rows(queue, &block.applied_grad, &block.pieces, &picked)?;
                ops::embed_backward(queue, &first(&self.rows), self.scale(), &picked, &block.grad)?;
            }
            for part in &stack.b_grad.parts {
                ops::zero(queue, &part.matrix)?;
            }
        }
        Ok(())
    }

    /// What the adapters of linear map `number` of a layer read, `x` F32`[tokens, inputs]` with the elements of this update dropped.
    fn input(
        &self,
        queue: &Queue,
        layer: usize,
        number: usize,
        x: &Tensor,
        update: Option<u32>,
    ) -> Result<Tensor, Error> {
        let Some(p) = self.dropout(layer, number, update, false) else { return Ok(x.clone()) };
        let dropped = carve(&self.room().dropped, x.rows(), x.row_len());
        ops::dropout(queue, p, x, &dropped)?;
        Ok(dropped)
    }

    fn dropout(
        &self,
        layer: usize,
        number: usize,
        update: Option<u32>,
        accumulate: bool,
    ) -> Option<DropoutParams> {
        let (probability, part) = (self.settings.dropout as f32, (4 * layer + number) as u32);
        let step = update.filter(|_| probability > 0.0)?;
        Some(DropoutParams { probability, seed: self.seed, part, step, accumulate })
    }

    fn room(&self) -> &Room {
        self.room.as_ref().expect("`begin` comes before a pass")
    }

    /// Adds to `out`, F32`[tokens, outputs]`, what the adapters of linear map `number` of a layer make of `x`, F32`[tokens, inputs]`.
    /// `update` keys the dropped elements; `None`: nothing is dropped.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        queue: &Queue,
        precision: Precision,
        layer: usize,
        number: usize,
        x: &Tensor,
        out: &Tensor,
        update: Option<u32>,
    ) -> Result<(), Error> {
        let Some(stack) = &self.layers[layer][number] else { return Ok(()) };
        let x = self.input(queue, layer, number, x, update)?;
        let low = carve(&self.room().low, x.rows(), stack.a.rows());
        ops::linear(queue, Pass::Prefill, &x, &stack.a, precision, false, &low)?;
        ops::linear(queue, Pass::Prefill, &low, &stack.b, precision, true, out)?;
        Ok(())
    }

    /// Backward of [`Lora::forward`], given `dy`, the gradient of `out`: gradients of A and B grow, that of `x` is added to `dx`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        queue: &Queue,
        precision: Precision,
        layer: usize,
        number: usize,
        x: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        update: Option<u32>,
    ) -> Result<(), Error> {
        let Some(stack) = &self.layers[layer][number] else { return Ok(()) };
        let input = self.input(queue, layer, number, x, update)?;
        let room = self.room();
        let [low, dlow] = [&room.low, &room.dlow].map(|memory| carve(memory, x.rows(), stack.a.rows()));
        // Cheaper computed again than kept.
        ops::linear(queue, Pass::Prefill, &input, &stack.a, precision, false, &low)?;
        ops::linear_backward_weight(queue, dy, &low, precision, &stack.b_grad)?;
        ops::linear_backward_input(queue, dy, &stack.b, precision, false, &dlow)?;
        ops::linear_backward_weight(queue, &dlow, &input, precision, &stack.a_grad)?;
        match self.dropout(layer, number, update, true) {
            None => ops::linear_backward_input(queue, &dlow, &stack.a, precision, true, dx)?,
            Some(p) => {
                // The dropped input is read no more.
                ops::linear_backward_input(queue, &dlow, &stack.a, precision, false, &input)?;
                ops::dropout(queue, p, &input, dx)?;
            }
        }
        Ok(())
    }

    /// The adapters as they are, for files and for [`Adapter::merge`].
    pub fn snapshot(
        &self,
        queue: &Queue,
        parameters: &Parameters,
        config: &ModelConfig,
        base: &str,
    ) -> Result<Adapter, Error> {
        let targets = LoraTarget::ALL.into_iter().filter(|target| self.settings.targets.contains(target));
        let targets: Vec<LoraTarget> = targets.collect();
        let mut factors = Vec::new();
        for layer in 0..config.layers {
            for (number, &target) in targets.iter().enumerate() {
                let index = 2 * (layer * targets.len() + number);
                let values = |index: usize| queue.download_f32(&parameters.view(Kept::Weights, index));
                let b = target.from_pairs(config, &values(index + 1)?);
                factors.push(Factors { layer, target, a: values(index)?, b });
            }
        }
        let LoraSettings { rank, alpha, dropout, .. } = self.settings;
        Ok(Adapter { base: base.into(), rank, alpha, dropout, factors })
    }

    /// Bytes that [`Lora::begin`] makes room for, and the applied B with their gradients, for the plan.
    pub fn bytes(&self, tokens: usize) -> usize {
        let applied: usize = self.stacks().map(|stack| 2 * stack.b.bytes()).sum();
        let widest = |of: fn(&Stack) -> usize| self.stacks().map(of).max().unwrap_or(0);
        applied + 4 * tokens * (widest(|stack| stack.a.cols()) + 2 * widest(|stack| stack.a.rows()))
    }
}

impl Stack {
    /// Of linear map `number`; `own`: the adapted matrices and where their A lies among the parameters, B behind it.
    fn new(
        queue: &Queue,
        config: &ModelConfig,
        parameters: &Parameters,
        rank: usize,
        number: usize,
        own: &[(usize, LoraTarget)],
    ) -> Result<Stack, Error> {
        let width = own.len() * rank;
        let factors = |kept: Kept, second: usize| {
            let view = move |&(index, _): &(usize, LoraTarget)| parameters.view(kept, index + second);
            own.iter().map(view).collect::<Vec<Tensor>>()
        };
        let stacked = |tensors: Vec<Tensor>| Weight {
            parts: tensors.into_iter().map(|matrix| WeightPart { matrix, bias: None }).collect(),
        };
        let parts = LoraTarget::ALL.into_iter().filter(|target| target.place().0 == number);
        let parts: Vec<LoraTarget> = parts.collect();
        let applied = |what: &str| -> Result<Vec<Tensor>, Error> {
            let alloc = |target: &LoraTarget| {
                let tensor = queue.backend().alloc(DType::F32, &[target.shape(config)[0], width], what)?;
                ops::zero(queue, &tensor)?;
                Ok(tensor)
            };
            parts.iter().map(alloc).collect()
        };
        let (b, b_grad) = (applied("adapters as applied")?, applied("gradients of adapters")?);
        let mut blocks = Vec::new();
        let trained = factors(Kept::Weights, 1).into_iter().zip(factors(Kept::Grad, 1));
        for (place, ((_, target), (trained, grad))) in own.iter().zip(trained).enumerate() {
            let outputs = trained.rows();
            let pieces: Vec<u32> = (0..outputs).map(|row| (row * own.len() + place) as u32).collect();
            let as_pieces = |all: &[Tensor]| {
                all[target.place().1].reshape(&[outputs * own.len(), rank]).expect("rows of whole pieces")
            };
            blocks.push(Block {
                trained,
                grad,
                applied: as_pieces(&b),
                applied_grad: as_pieces(&b_grad),
                pieces: queue.tensor(&pieces, &[outputs], "row numbers")?,
            });
        }
        let (a, a_grad) = (stacked(factors(Kept::Weights, 0)), stacked(factors(Kept::Grad, 0)));
        Ok(Stack { a, a_grad, b: stacked(b), b_grad: stacked(b_grad), blocks })
    }
}
