//! The fuser: what turns a sharer's KV-cache columns into an addition to the receiver's.
//!
//! One projector per receiver layer, for keys and values separately, reads the aligned columns of both caches; its
//! output is scaled per head and passed by a gate. Formulae in docs/math.md ("The fuser"), the op itself in
//! [`crate::ops::fuse`]. This module knows kinds of fusers, their checkpoints, gates and which layer reads which; it
//! does not know which device runs them.

mod all_in_one;
mod checkpoint;
mod config;
mod contract;
mod error;
mod fusion_mode;
mod gates;
mod parameters;
mod pickle;
mod published;
mod ridge;
mod state;

pub use all_in_one::{AllInOneConfig, FactorConfig};
pub use config::{FuserConfig, Kind, Mapping, Rotations, Route, Training};
pub use contract::{ContractError, ContractItem, Digest, Party, check_contract, require_contract};
pub use error::FuserError;
pub use fusion_mode::FusionMode;
pub use gates::{GateOverride, Gates, LayerGates};
pub use parameters::{Body, LayerProjector};
pub use pickle::PickleError;
pub use ridge::RidgeFit;

use crate::{
    align::Fraction,
    backend::{Backend, DType, Precision, Queue, Tensor},
    cache::KeyForm,
    ops::{
        self, Baseline, BaselineLayer, BaselineOperands, FuseExtent, FuseLayer, FuseOperands, FuseParams,
        KvPages, Scratch, ShapeError,
    },
};
use sha2::{Digest as _, Sha256};
use std::{path::Path, sync::Arc};

/// A fuser between one sharer and one receiver, ready to run.
#[derive(Clone)]
pub struct Fuser {
    config: FuserConfig,
    projectors: Arc<[LayerProjector]>,
    /// By receiver layer.
    routes: Vec<Option<Route>>,
}

/// A layer of a [`FuseCall`], see [`FuseLayer`].
#[derive(Clone, Copy)]
pub struct LayerCall<'a> {
    /// Of the receiver.
    pub layer: usize,
    /// Of keys and values.
    pub gates: [f32; 2],
    pub source: &'a KvPages,
    pub target: &'a KvPages,
    pub base: &'a KvPages,
    pub out: &'a KvPages,
}

/// Operands of [`Fuser::issue`], see [`FuseOperands`].
#[derive(Clone, Copy)]
pub struct FuseCall<'a> {
    pub layers: &'a [LayerCall<'a>],
    pub source_slots: &'a Tensor,
    pub target_slots: &'a Tensor,
    pub base_slots: &'a Tensor,
    pub out_slots: &'a Tensor,
    /// F32, at least [`Fuser::scratch_len`] elements.
    pub scratch: &'a Tensor,
    pub precision: Precision,
}

impl Fuser {
    /// Reads a checkpoint: a folder or file in this program's format, or in the published layout.
    ///
    /// Weights stay in the mapped file where the device can read them there.
    ///
    /// # Errors
    /// Also if the device does not run fusers of this kind.
    pub fn load(path: &Path, backend: &Arc<dyn Backend>) -> Result<Fuser, FuserError> {
        let fuser = match (published::find(path), checkpoint::find(path)) {
            (Some(folder), _) => published::load(&folder, backend)?,
            (None, Some(weights)) => checkpoint::load(&weights, backend)?,
            (None, None) => return Err(FuserError::NoFuser(path.into())),
        };
        require_device(fuser.config.kind, backend)?;
        Ok(fuser)
    }

    /// An untrained fuser: weights by PyTorch's default for linear layers, gates closed, so that it changes nothing
    /// until trained or until its gates are opened by hand. Same seed, same numbers, on every device.
    pub fn init(config: FuserConfig, seed: u64, backend: &Arc<dyn Backend>) -> Result<Fuser, FuserError> {
        config.validate()?;
        require_device(config.kind, backend)?;
        let queue = Queue::new(backend)?;
        let mut projectors = Vec::new();
        for index in 0..config.projectors() {
            let upload = |name: &str, shape: &[usize], bytes: &[u8]| {
                let tensor = backend.alloc(config.dtype, shape, name)?;
                backend.upload(queue.id(), bytes, &tensor);
                queue.synchronize()?;
                Ok(tensor)
            };
            projectors.push(parameters::initial(&config, index, seed, upload)?);
        }
        Ok(Fuser::assemble(config, projectors))
    }

    /// `config` was validated, `projectors` made by it.
    fn assemble(config: FuserConfig, projectors: Vec<LayerProjector>) -> Fuser {
        let routed = config.routes.iter().map(|route| route.receiver + 1).max().unwrap_or(0);
        let mut routes = vec![None; routed.max(config.receiver.layers.unwrap_or(0).min(1 << 16))];
        for route in &config.routes {
            routes[route.receiver] = Some(*route);
        }
        Fuser { config, projectors: projectors.into(), routes }
    }

    /// Saves into the folder `path` as `fuser.safetensors` and `fuser.json`. A crash at any point leaves the old
    /// checkpoint or the new one.
    pub fn save(&self, path: &Path, queue: &Queue) -> Result<(), FuserError> {
        checkpoint::save(self, path, queue)
    }

    /// Saves into the folder `path` in the published layout, with safetensors for pickles.
    pub fn save_published(&self, path: &Path, queue: &Queue) -> Result<(), FuserError> {
        published::save(self, path, queue)
    }

    /// A copy in memory of its own with weights in `dtype` (F32, BF16 or F16).
    pub fn to_dtype(&self, dtype: DType, backend: &Arc<dyn Backend>) -> Result<Fuser, FuserError> {
        let config = FuserConfig { dtype, ..self.config.clone() };
        config.validate()?;
        let queue = Queue::new(backend)?;
        let copy = |name: &str, tensor: &Tensor| {
            let mut bytes = Vec::new();
            parameters::from_f32(&queue.download_f32(tensor)?, dtype, &mut bytes);
            let tensor = backend.alloc(dtype, tensor.shape(), name)?;
            backend.upload(queue.id(), &bytes, &tensor);
            queue.synchronize()?;
            Ok(tensor)
        };
        let projectors = self.projectors.iter().map(|projector| projector.map(&config, copy));
        let projectors = projectors.collect::<Result<_, FuserError>>()?;
        Ok(Fuser::assemble(config, projectors))
    }

    /// The same fuser with each tensor (of projector number, name) replaced by what `change` makes of it: F32.
    pub(crate) fn map(
        &self,
        mut change: impl FnMut(usize, &str, &Tensor) -> Result<Tensor, FuserError>,
    ) -> Result<Fuser, FuserError> {
        let config = FuserConfig { dtype: DType::F32, ..self.config.clone() };
        let projectors = (self.projectors.iter().enumerate())
            .map(|(index, p)| p.map(&config, |name, tensor| change(index, name, tensor)));
        let projectors = projectors.collect::<Result<_, FuserError>>()?;
        Ok(Fuser::assemble(config, projectors))
    }

    /// The same tensors with other gates: logits of [keys, values] by projector, and the temperature of training.
    pub(crate) fn with_gates(&self, logits: &[[f32; 2]], temperature: f32, training: Training) -> Fuser {
        let config = FuserConfig { training, ..self.config.clone() };
        let projectors = self.projectors.iter().zip(logits).map(|(projector, &gate_logits)| {
            let mut projector = projector.clone();
            projector.gate_logits = gate_logits;
            projector.temperature = temperature;
            projector
        });
        Fuser::assemble(config, projectors.collect())
    }

    /// The same fuser for another part of the prompt.
    pub fn with_fraction(self, fraction: Option<Fraction>) -> Fuser {
        Fuser { config: FuserConfig { fraction, ..self.config }, ..self }
    }

    /// The projector of receiver layer `layer`, if it has one.
    pub fn route(&self, layer: usize) -> Option<Route> {
        *self.routes.get(layer)?
    }

    /// What scratch and memory of `layers` layers of `tokens` tokens depend on.
    pub fn extent(&self, layers: usize, tokens: usize) -> FuseExtent {
        let (source, target) = (self.config.sharer.width(), self.config.receiver.width());
        let halves = self.projectors.first().and_then(LayerProjector::halves);
        halves.map_or_else(FuseExtent::default, |[keys, _]| FuseExtent {
            layers,
            tokens,
            ..FuseExtent::new(keys, source, target, self.config.receiver.kv_heads)
        })
    }

    pub fn config(&self) -> &FuserConfig {
        &self.config
    }

    /// By number, as [`Route::projector`] names them.
    pub fn projectors(&self) -> &[LayerProjector] {
        &self.projectors
    }

    /// Receiver layers.
    pub fn layers(&self) -> usize {
        self.routes.len()
    }

    /// The sharer layer that receiver layer `layer` reads; `None`: it stays as it is.
    pub fn sharer_layer(&self, layer: usize) -> Option<usize> {
        Some(self.routes.get(layer)?.as_ref()?.sharer)
    }

    /// The learned gates, hard as at inference: open (1) where the logit is positive.
    pub fn gates(&self) -> Gates {
        let hard = |logit: f32| if logit > 0.0 { 1.0 } else { 0.0 };
        let gate = |route: &Option<Route>| {
            route.map_or([0.0; 2], |route| self.projectors[route.projector].gate_logits.map(hard))
        };
        self.routes.iter().map(gate).collect()
    }

    /// The gates to run with under `--gates`. Layers without a projector stay closed.
    pub fn gates_with(&self, given: &GateOverride) -> Result<Gates, FuserError> {
        let routed: Vec<bool> = self.routes.iter().map(Option::is_some).collect();
        given.apply(self.gates(), &routed)
    }

    /// Elements of F32 scratch that [`Fuser::issue`] needs for `layers` layers of `tokens` tokens.
    pub fn scratch_len(&self, backend: &dyn Backend, layers: usize, tokens: usize) -> usize {
        backend.scratch_len(Scratch::Fuse(self.extent(layers, tokens))).max(1)
    }

    /// Columns of a section that one call may leave for the next: a gate or weight of an AllInOneProjector may depend on all of
    /// them.
    pub fn most_tokens(&self, most: usize) -> usize {
        if self.config.kind == Kind::AllInOne { usize::MAX } else { most }
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> usize {
        self.projectors.iter().flat_map(|projector| projector.tensors().values()).map(Tensor::bytes).sum()
    }

    /// SHA-256 of everything that decides what this fuser computes: a fused cache is known by it. Reads all weights.
    pub fn fingerprint(&self, queue: &Queue) -> Result<Digest, FuserError> {
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&self.config).map_err(FuserError::json(Path::new("fuser.json")))?);
        for tensor in checkpoint::outgoing(self, queue) {
            hash.update(tensor.name.as_bytes());
            hash.update((tensor.bytes)()?);
        }
        Ok(Digest(hash.finalize().into()))
    }

    /// Issues the fusion of the columns of some receiver layers on `queue`.
    ///
    /// Runs as soon as the queue comes to it: make the queue wait for the sharer's and the receiver's layers first. A
    /// layer without projector is a closed one: `base` goes to `out`.
    ///
    /// # Errors
    /// Operands of other shapes, or a fuser that needs to know positions ([`Fuser::issue_at`]).
    pub fn issue(&self, queue: &Queue, call: FuseCall) -> Result<(), ShapeError> {
        self.issue_at(queue, call, Positions::default())
    }

    /// The same, with the rotary positions of the columns, which a ridge map reads.
    pub fn issue_at(&self, queue: &Queue, call: FuseCall, positions: Positions) -> Result<(), ShapeError> {
        let routes: Vec<Option<Route>> = (call.layers.iter())
            .map(|of| {
                self.routes.get(of.layer).copied().ok_or_else(|| ShapeError {
                    op: "fuse",
                    operand: "layer",
                    found: of.layer.to_string(),
                    expected: format!("less than {}", self.routes.len()),
                })
            })
            .collect::<Result<_, ShapeError>>()?;
        // A closed gate reads no weights, so any projector will do as its operand.
        let of = |call: &LayerCall, route: Option<Route>| match route {
            Some(route) => (&self.projectors[route.projector], call.gates),
            None => (&self.projectors[0], [0.0; 2]),
        };
        let calls = call.layers.iter().zip(routes);
        if self.config.kind.is_baseline() {
            return self.issue_baseline(
                queue,
                call,
                positions,
                calls.map(|(call, route)| (call, of(call, route))),
            );
        }
        let layers = calls.filter_map(|(call, route)| {
            let (projector, gates) = of(call, route);
            let [keys, values] = projector.halves()?;
            Some(FuseLayer {
                keys: keys.clone(),
                values: values.clone(),
                gates,
                source: call.source.clone(),
                target: call.target.clone(),
                base: call.base.clone(),
                out: call.out.clone(),
            })
        });
        let operands = FuseOperands {
            layers: layers.collect(),
            source_slots: call.source_slots.clone(),
            target_slots: call.target_slots.clone(),
            base_slots: call.base_slots.clone(),
            out_slots: call.out_slots.clone(),
            scratch: call.scratch.clone(),
        };
        let params = FuseParams {
            tokens: call.target_slots.elements() as u32,
            precision: call.precision,
            use_target: self.config.kind.has_target(),
        };
        ops::fuse(queue, params, &operands)
    }

    fn issue_baseline<'a>(
        &self,
        queue: &Queue,
        call: FuseCall,
        positions: Positions,
        layers: impl Iterator<Item = (&'a LayerCall<'a>, (&'a LayerProjector, [f32; 2]))>,
    ) -> Result<(), ShapeError> {
        let tokens = call.target_slots.elements();
        let mut angles = Angles { queue, tokens, made: Vec::new() };
        let mut all = Vec::new();
        for (call, (projector, gates)) in layers {
            let projector = match (&projector.body, &self.config.rotations) {
                (Body::AllInOne(p), _) => Baseline::AllInOne(p.clone()),
                (Body::Linear(map), Some(rotations)) => {
                    let source = self.sharer_layer(call.layer).unwrap_or(0);
                    let angles = [
                        angles.of(
                            &rotations.sharer,
                            source,
                            positions.source,
                            self.config.sharer.head_dim,
                        )?,
                        angles.of(
                            &rotations.receiver,
                            call.layer,
                            positions.target,
                            self.config.receiver.head_dim,
                        )?,
                    ];
                    Baseline::Linear(map.clone(), angles)
                }
                _ => continue,
            };
            all.push(BaselineLayer {
                projector,
                gates,
                source: call.source.clone(),
                target: call.target.clone(),
                base: call.base.clone(),
                out: call.out.clone(),
            });
        }
        let operands = BaselineOperands {
            layers: all,
            source_slots: call.source_slots.clone(),
            target_slots: call.target_slots.clone(),
            base_slots: call.base_slots.clone(),
            out_slots: call.out_slots.clone(),
        };
        ops::fuse_baseline(queue, tokens, call.precision, &operands)
    }
}

/// Rotary positions of a call's columns.
#[derive(Clone, Copy, Default)]
pub struct Positions<'a> {
    pub source: &'a [u32],
    pub target: &'a [u32],
}

/// Tables of angles, each made once a call.
struct Angles<'a> {
    queue: &'a Queue,
    tokens: usize,
    made: Vec<(Vec<f32>, Tensor)>,
}

impl Angles<'_> {
    /// Cosines and sines of layer `layer` at `positions`, `[tokens, dim]`.
    fn of(
        &mut self,
        form: &KeyForm,
        layer: usize,
        positions: &[u32],
        dim: usize,
    ) -> Result<Tensor, ShapeError> {
        let bad = |found: String, expected: &str| ShapeError {
            op: "fuse",
            operand: "positions",
            found,
            expected: expected.into(),
        };
        if positions.len() != self.tokens {
            return Err(bad(positions.len().to_string(), "one a column: a ridge map reads them"));
        }
        let table: Vec<f32> = match form.rotation(layer) {
            Some(rotation) => positions.iter().flat_map(|&position| rotation.angles(position)).collect(),
            None => {
                positions.iter().flat_map(|_| (0..dim).map(|i| if i < dim / 2 { 1.0 } else { 0.0 })).collect()
            }
        };
        if let Some((_, made)) = self.made.iter().find(|(made, _)| *made == table) {
            return Ok(made.clone());
        }
        let tensor = self.queue.tensor(&table, &[self.tokens, dim], "angles");
        let tensor = tensor.map_err(|error| bad(error.to_string(), "memory for their angles"))?;
        self.made.push((table, tensor.clone()));
        Ok(tensor)
    }
}

fn require_device(kind: Kind, backend: &Arc<dyn Backend>) -> Result<(), FuserError> {
    let lacks =
        kind.is_joint() && !backend.fuses_jointly() || kind.is_baseline() && backend.baselines().is_none();
    match lacks {
        true => Err(FuserError::Unsupported { kind, device: backend.device().into() }),
        false => Ok(()),
    }
}

/// The part of the prompt that these fusers, which are used together, were trained to fuse.
///
/// # Errors
/// If they do not agree.
pub fn trained_fraction<'a>(
    configs: impl IntoIterator<Item = &'a FuserConfig>,
) -> Result<Option<Fraction>, FuserError> {
    let mut fractions = configs.into_iter().map(|config| config.fraction);
    let first = fractions.next().flatten();
    match fractions.find(|other| *other != first) {
        None => Ok(first),
        Some(other) => {
            let text = |fraction: Option<Fraction>| fraction.map_or("all".into(), |part| part.to_string());
            Err(FuserError::Fractions { first: text(first), other: text(other) })
        }
    }
}
