//! The fuser: what turns a sharer's KV-cache columns into an addition to the receiver's.
//!
//! One projector per receiver layer, for keys and values separately, reads the aligned columns of both caches; its
//! output is scaled per head and passed by a gate. Formulae in docs/math.md ("The fuser"), the op itself in
//! [`crate::ops::fuse`]. This module knows kinds of fusers, their checkpoints, gates and which layer reads which; it
//! does not know which device runs them.

mod checkpoint;
mod config;
mod contract;
mod error;
mod fusion_mode;
mod gates;
mod parameters;
mod pickle;
mod published;
mod state;

pub use config::{FuserConfig, Kind, Mapping, Route, Training};
pub use contract::{ContractError, ContractItem, Digest, Party, check_contract, require_contract};
pub use error::FuserError;
pub use fusion_mode::FusionMode;
pub use gates::{GateOverride, Gates, LayerGates};
pub use parameters::LayerProjector;
pub use pickle::PickleError;

use crate::{
    backend::{Backend, DType, Precision, Queue, Tensor},
    ops::{self, FuseExtent, FuseLayer, FuseOperands, FuseParams, KvPages, Scratch, ShapeError},
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
    pub fn load(path: &Path, backend: &Arc<dyn Backend>) -> Result<Fuser, FuserError> {
        if let Some(folder) = published::find(path) {
            return published::load(&folder, backend);
        }
        match checkpoint::find(path) {
            Some(weights) => checkpoint::load(&weights, backend),
            None => Err(FuserError::NoFuser(path.into())),
        }
    }

    /// An untrained fuser: weights by PyTorch's default for linear layers, gates closed, so that it changes nothing
    /// until trained or until its gates are opened by hand. Same seed, same numbers, on every device.
    pub fn init(config: FuserConfig, seed: u64, backend: &Arc<dyn Backend>) -> Result<Fuser, FuserError> {
        config.validate()?;
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
        let projectors = self.projectors.iter().map(|projector| projector.map(config.kind, copy));
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
            .map(|(index, p)| p.map(config.kind, |name, tensor| change(index, name, tensor)));
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

    /// The projector of receiver layer `layer`, if it has one.
    pub fn route(&self, layer: usize) -> Option<Route> {
        *self.routes.get(layer)?
    }

    /// What scratch and memory of `layers` layers of `tokens` tokens depend on.
    pub fn extent(&self, layers: usize, tokens: usize) -> FuseExtent {
        let (source, target) = (self.config.sharer.width(), self.config.receiver.width());
        self.projectors.first().map_or_else(FuseExtent::default, |projector| FuseExtent {
            layers,
            tokens,
            ..FuseExtent::new(&projector.keys, source, target, self.config.receiver.kv_heads)
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
        backend.scratch_len(Scratch::Fuse(self.extent(layers, tokens)))
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
    pub fn issue(&self, queue: &Queue, call: FuseCall) -> Result<(), ShapeError> {
        let layers = call.layers.iter().map(|of| {
            let route = self.routes.get(of.layer).ok_or_else(|| ShapeError {
                op: "fuse",
                operand: "layer",
                found: of.layer.to_string(),
                expected: format!("less than {}", self.routes.len()),
            })?;
            // A closed gate reads no weights, so any projector will do as its operand.
            let (projector, gates) = match route {
                Some(route) => (&self.projectors[route.projector], of.gates),
                None => (&self.projectors[0], [0.0; 2]),
            };
            Ok(FuseLayer {
                keys: projector.keys.clone(),
                values: projector.values.clone(),
                gates,
                source: of.source.clone(),
                target: of.target.clone(),
                base: of.base.clone(),
                out: of.out.clone(),
            })
        });
        let operands = FuseOperands {
            layers: layers.collect::<Result<_, ShapeError>>()?,
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
}
