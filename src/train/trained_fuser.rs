//! A fuser in training: its weights as [`Parameters`], its gates on the host.

use super::{
    Adamw, Error, InputMap, Inputs, Kept, Parameters, config::Decay, trained_all_in_one::AllInOneColumns,
};
use crate::{
    backend::{DType, Precision, Queue, Tensor},
    fuser::{FuseCall, Fuser, FuserError, Kind, LayerCall, Positions, Training},
    ops::{
        self, FuseGrads, FuseLayer, FuseOperands, FuseParams, FuseTape, FuseTrainingParams, KvPages,
        Projector, Scratch,
    },
    rng::{Purpose, Rng, Stream},
};
use std::sync::Arc;

/// A gate's logit with its gradient and moments.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gate {
    pub logit: f32,
    pub grad: f32,
    pub m: f32,
    pub v: f32,
}

/// Where the uniform numbers of the gates' noise come from.
pub trait GateNoise {
    /// Fills `out`, `[tokens, kv_heads]`, for the keys (0) or values (1) of a receiver layer.
    fn fill(&self, layer: usize, half: usize, out: &mut [f32]);
}

/// The generator's own, of one pass.
#[derive(Clone, Copy, Debug)]
pub struct DrawnNoise {
    pub seed: u64,
    pub step: u32,
    /// Of the sharer: noise of two sharers is not the same.
    pub sharer: u32,
}

impl GateNoise for DrawnNoise {
    fn fill(&self, layer: usize, half: usize, out: &mut [f32]) {
        let part = self.sharer << 24 | (layer as u32) << 1 | half as u32;
        Rng::new(self.seed, Stream::new(Purpose::Gate, part), self.step).fill_uniform(0, out);
    }
}

/// A fuser whose weights are learned.
pub struct TrainedFuser {
    /// F32, views of the parameters. Its gates are not kept up to date: see [`TrainedFuser::snapshot`].
    pub fuser: Fuser,
    pub(super) grads: Fuser,
    pub parameters: Parameters,
    /// By projector, of keys and values.
    pub gates: Vec<[Gate; 2]>,
    pub temperature: f32,
    /// Maps that are updated in standardised coordinates.
    standard: Vec<InputMap>,
}

/// Where the columns of a forward pass lie, and what it leaves for the backward pass.
pub struct FusedColumns {
    source_slots: Tensor,
    target_slots: Tensor,
    params: FuseTrainingParams,
    layers: Vec<FusedLayer>,
    scratch: Tensor,
    /// Of a fuser of that kind, in the layers' place.
    all_in_one: Option<AllInOneColumns>,
}

struct FusedLayer {
    layer: usize,
    operands: FuseLayer,
    tape: FuseTape,
    dgates: Tensor,
    /// `∂gate/∂logit` of each token and head, `[2, tokens, kv_heads]`.
    slopes: Vec<f32>,
}

/// What the columns are.
pub struct FuseRequest<'a> {
    pub layers: &'a [LayerCall<'a>],
    pub source_slots: Tensor,
    pub target_slots: Tensor,
    pub precision: Precision,
    pub dropout: f32,
    pub seed: u64,
    pub step: u32,
    pub noise: &'a dyn GateNoise,
}

impl TrainedFuser {
    /// Copies `fuser`, of any dtype, into trainable memory.
    pub fn new(fuser: &Fuser, queue: &Queue, decay: Decay) -> Result<TrainedFuser, Error> {
        let mut tensors = Vec::new();
        for (index, projector) in fuser.projectors().iter().enumerate() {
            for (name, tensor) in projector.tensors() {
                tensors.push((format!("projector_{index}.{name}"), tensor.shape().to_vec()));
            }
        }
        let parameters = Parameters::new(queue, tensors, decay)?;
        let mut number = 0..;
        for tensor in fuser.projectors().iter().flat_map(|projector| projector.tensors().values()) {
            parameters.set(queue, number.next().unwrap_or_default(), tensor)?;
        }
        let view = |kept: Kept| {
            let mut number = 0..;
            fuser.map(|_, _, _| Ok::<_, FuserError>(parameters.view(kept, number.next().unwrap_or_default())))
        };
        let (weights, grads) = (view(Kept::Weights)?, view(Kept::Grad)?);
        let logits = fuser.projectors().iter().map(|projector| projector.gate_logits);
        let gates = logits.map(|logits| logits.map(|logit| Gate { logit, ..Gate::default() })).collect();
        let temperature = fuser.config().training.initial_temperature as f32;
        let standard = Vec::new();
        Ok(TrainedFuser { fuser: weights, grads, parameters, gates, temperature, standard })
    }

    /// Updates from now on as if the columns were standardised ([`InputMap`]). `fresh`: the weights are drawn for such columns, nothing
    /// has been learned yet.
    pub fn standardize(&mut self, queue: &Queue, inputs: &[Inputs], fresh: bool) -> Result<(), Error> {
        self.standard = InputMap::all(self.fuser.config(), &self.parameters, inputs)?;
        if fresh {
            self.standard.iter().try_for_each(|map| map.leave(queue))?;
        }
        Ok(())
    }

    /// Brings gradients, once they are complete, into the coordinates of the update.
    pub fn standardize_gradients(&self, queue: &Queue) -> Result<(), Error> {
        self.standard.iter().try_for_each(|map| map.gradients(queue))
    }

    /// The fuser as it is now, sharing the parameters' memory.
    pub fn snapshot(&self, training: Training) -> Fuser {
        let logits: Vec<[f32; 2]> = self.gates.iter().map(|gates| gates.map(|gate| gate.logit)).collect();
        self.fuser.with_gates(&logits, self.temperature, training)
    }

    /// Fuses the columns of all layers of `request` in training's way.
    pub fn forward(&self, queue: &Queue, request: FuseRequest) -> Result<FusedColumns, Error> {
        let tokens = request.target_slots.elements();
        let backend = queue.backend();
        let kind = self.fuser.config().kind;
        let kv_heads = self.fuser.config().receiver.kv_heads;
        let per_half = tokens * kv_heads;
        let one = self.fuser.extent(1, tokens);
        let params = FuseTrainingParams {
            fuse: FuseParams {
                tokens: tokens as u32,
                precision: request.precision,
                use_target: kind.has_target(),
            },
            dropout: request.dropout,
            seed: request.seed,
            step: request.step,
        };
        let all_in_one = match kind {
            Kind::AllInOne => Some(self.forward_all_in_one(queue, &request)?),
            _ => None,
        };
        let mut layers = Vec::new();
        for call in request.layers.iter().filter(|_| all_in_one.is_none()) {
            let Some(route) = self.fuser.route(call.layer) else { continue };
            let (mut factors, mut slopes) = (vec![1.0f32; 2 * per_half], vec![0.0f32; 2 * per_half]);
            if kind.has_gates() {
                for half in 0..2 {
                    let part = half * per_half..(half + 1) * per_half;
                    let (factors, slopes) = (&mut factors[part.clone()], &mut slopes[part]);
                    request.noise.fill(call.layer, half, factors);
                    let logit = self.gates[route.projector][half].logit;
                    for (u, slope) in factors.iter_mut().zip(slopes) {
                        (*u, *slope) = soft_gate(logit, *u, self.temperature);
                    }
                }
            }
            let gates = queue.tensor(&factors, &[2, tokens, kv_heads], "gates")?;
            let saved = backend.scratch_len(Scratch::FuseSaved(one));
            let [keys, values] = halves(&self.fuser, route.projector)?;
            layers.push(FusedLayer {
                layer: call.layer,
                operands: FuseLayer {
                    keys: keys.clone(),
                    values: values.clone(),
                    gates: [1.0; 2],
                    source: call.source.clone(),
                    target: call.target.clone(),
                    base: call.base.clone(),
                    out: call.out.clone(),
                },
                tape: FuseTape {
                    layer: call.layer as u32,
                    gates,
                    saved: backend.alloc(DType::F32, &[saved], "activations of the fuser")?,
                },
                dgates: backend.alloc(DType::F32, &[2, tokens, kv_heads], "gradients of gates")?,
                slopes,
            });
        }
        let all = self.fuser.extent(layers.len(), tokens);
        let need = [Scratch::Fuse(all), Scratch::FuseBackward(all)].map(|need| backend.scratch_len(need));
        let scratch = backend.alloc(DType::F32, &[need[0].max(need[1]).max(1)], "scratch of the fuser")?;
        let columns = FusedColumns {
            source_slots: request.source_slots,
            target_slots: request.target_slots,
            params,
            layers,
            scratch,
            all_in_one,
        };
        let every: Vec<&FusedLayer> = columns.layers.iter().collect();
        let tapes: Vec<FuseTape> = every.iter().map(|layer| layer.tape.clone()).collect();
        ops::fuse_forward(queue, params, &columns.operands(&every), &tapes)?;
        Ok(columns)
    }

    /// Backward of the fusion of receiver layers `of`, whose K and V have gradients in `dkv(layer)`: adds to the gradients of
    /// all parameters. With `through`, the gradients of the columns that the projector read are added to the same pages.
    pub fn backward(
        &self,
        queue: &Queue,
        columns: &FusedColumns,
        of: &[usize],
        dkv: impl Fn(usize) -> KvPages,
        through: bool,
    ) -> Result<(), Error> {
        if let Some(own) = &columns.all_in_one {
            return self.backward_all_in_one(queue, columns, own, of, dkv, through);
        }
        let layers: Vec<&FusedLayer> = columns.layers.iter().filter(|l| of.contains(&l.layer)).collect();
        let tapes: Vec<FuseTape> = layers.iter().map(|layer| layer.tape.clone()).collect();
        let mut grads = Vec::new();
        for layer in &layers {
            let Some(route) = self.grads.route(layer.layer) else { continue };
            let [keys, values] = halves(&self.grads, route.projector)?;
            let pages = dkv(layer.layer);
            grads.push(FuseGrads {
                keys: keys.clone(),
                values: values.clone(),
                dtarget: through.then(|| pages.clone()),
                dout: pages,
                dgates: layer.dgates.clone(),
            });
        }
        Ok(ops::fuse_backward(queue, columns.params, &columns.operands(&layers), &tapes, &grads)?)
    }

    /// Adds the gradients of the gates' logits, once the backward pass of all layers is issued.
    pub fn gates_backward(&mut self, queue: &Queue, columns: &FusedColumns) -> Result<(), Error> {
        if let Some(own) = &columns.all_in_one {
            return self.gates_backward_all_in_one(queue, own);
        }
        if !self.fuser.config().kind.has_gates() {
            return Ok(());
        }
        for layer in &columns.layers {
            let Some(route) = self.fuser.route(layer.layer) else { continue };
            let dgates = queue.download_f32(&layer.dgates)?;
            let half = dgates.len() / 2;
            let products = dgates.chunks(half).zip(layer.slopes.chunks(half));
            for ((dgates, slopes), gate) in products.zip(&mut self.gates[route.projector]) {
                let sum: f64 = dgates.iter().zip(slopes).map(|(d, s)| f64::from(*d) * f64::from(*s)).sum();
                gate.grad += sum as f32;
            }
        }
        Ok(())
    }

    /// By projector: 1 where the logit is positive, as at inference. A kind without gates has positive ones.
    pub fn hard_gates(&self) -> Vec<[f32; 2]> {
        let hard = |gate: Gate| if gate.logit > 0.0 { 1.0 } else { 0.0 };
        self.gates.iter().map(|gates| gates.map(hard)).collect()
    }

    /// Fuses as at inference.
    pub fn measure(
        &self,
        queue: &Queue,
        layers: &[LayerCall],
        source_slots: &Tensor,
        target_slots: &Tensor,
        positions: Positions,
        precision: Precision,
    ) -> Result<(), Error> {
        let backend = queue.backend();
        let need = self.fuser.scratch_len(backend.as_ref(), layers.len(), target_slots.elements());
        let scratch = backend.alloc(DType::F32, &[need], "scratch of the fuser")?;
        let call = FuseCall {
            layers,
            source_slots,
            target_slots,
            base_slots: target_slots,
            out_slots: target_slots,
            scratch: &scratch,
            precision,
        };
        Ok(self.fuser.issue_at(queue, call, positions)?)
    }

    /// Norm of all gradients.
    pub fn grad_norm(&self, queue: &Queue) -> Result<f64, Error> {
        let gates: f64 = self.gates.iter().flatten().map(|gate| f64::from(gate.grad).powi(2)).sum();
        Ok((self.parameters.grad_squares(queue)? + gates).sqrt())
    }

    /// One update of everything, after which gradients are 0.
    pub fn update(
        &mut self,
        queue: &Queue,
        adamw: &Adamw,
        step: u64,
        lr: f32,
        scale: f32,
    ) -> Result<(), Error> {
        self.standard.iter().try_for_each(|map| map.enter(queue))?;
        self.parameters.update(queue, adamw, step, lr, scale)?;
        self.standard.iter().try_for_each(|map| map.leave(queue))?;
        let p = adamw.at(step, lr, scale, 1);
        for gate in self.gates.iter_mut().flatten() {
            let grad = gate.grad * p.grad_scale;
            gate.m = p.beta1 * gate.m + (1.0 - p.beta1) * grad;
            gate.v = p.beta2 * gate.v + (1.0 - p.beta2) * grad * grad;
            gate.logit -= lr * p.weight_decay * gate.logit;
            gate.logit -= lr * (gate.m / p.correction1) / ((gate.v / p.correction2).sqrt() + p.eps);
            gate.grad = 0.0;
        }
        Ok(())
    }
}

/// The projectors of keys and values that the backward pass goes through.
fn halves(fuser: &Fuser, projector: usize) -> Result<[&Arc<Projector>; 2], Error> {
    let halves = fuser.projectors()[projector].halves();
    halves.ok_or_else(|| FuserError::Untrainable { kind: fuser.config().kind }.into())
}

impl FusedColumns {
    /// Whether columns of this receiver layer were fused.
    pub fn has(&self, layer: usize) -> bool {
        let own = self.all_in_one.as_ref().is_some_and(|own| own.has(layer));
        own || self.layers.iter().any(|fused| fused.layer == layer)
    }

    /// Of the sharer's columns and the receiver's.
    pub(super) fn slots(&self) -> (&Tensor, &Tensor) {
        (&self.source_slots, &self.target_slots)
    }

    fn operands(&self, layers: &[&FusedLayer]) -> FuseOperands {
        FuseOperands {
            layers: layers.iter().map(|layer| layer.operands.clone()).collect(),
            source_slots: self.source_slots.clone(),
            target_slots: self.target_slots.clone(),
            base_slots: self.target_slots.clone(),
            out_slots: self.target_slots.clone(),
            scratch: self.scratch.clone(),
        }
    }
}

/// The gate `σ((logit + g) / temperature)` with Gumbel noise `g = −ln(−ln u)`, and its slope by the logit.
pub(super) fn soft_gate(logit: f32, u: f32, temperature: f32) -> (f32, f32) {
    const TINY: f32 = 1e-20;
    let noise = -((-(u + TINY).ln()) + TINY).ln();
    let x = (logit + noise) / temperature;
    let gate = if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) };
    (gate, gate * (1.0 - gate) / temperature)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_is_open_with_the_probability_of_its_logit_at_low_temperature() {
        let mut u = vec![0.0; 4096];
        DrawnNoise { seed: 3, step: 5, sharer: 0 }.fill(2, 1, &mut u);
        let open =
            |logit: f32| u.iter().filter(|&&u| soft_gate(logit, u, 0.001).0 > 0.5).count() as f32 / 4096.0;
        // P(logit − ln(−ln u) > 0) = 1 − exp(−e^logit)
        for logit in [-1.0f32, 0.0, 1.0] {
            let expected = 1.0 - (-logit.exp()).exp();
            assert!((open(logit) - expected).abs() < 0.03, "{logit}: {} {expected}", open(logit));
        }
    }

    #[test]
    fn the_slope_is_the_derivative() {
        for (logit, u, t) in [(0.3f32, 0.7f32, 1.0f32), (-0.2, 0.1, 0.25), (0.0, 0.5, 0.5)] {
            let step = 1e-2;
            let up = soft_gate(logit + step, u, t).0 - soft_gate(logit - step, u, t).0;
            let slope = soft_gate(logit, u, t).1;
            assert!((up / (2.0 * step) - slope).abs() < 2e-3 * slope.max(0.1), "{logit} {u} {t}");
        }
    }
}
