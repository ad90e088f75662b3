//! The parameters of one projector by their published names (spec 2.1, 2.2): what there must be, how it starts, and
//! how it becomes operands of [`crate::ops::fuse`].

use super::{
    FuserError, all_in_one,
    config::{FuserConfig, Kind},
    state::StateDict,
};
use crate::{
    backend::{self, Backend, DType, Tensor},
    ops::{AllInOne, Ffn, LinearMap, Projector, SourceStage, Weight},
    rng::{Purpose, Rng, Stream},
};
use half::{bf16, f16};
use std::{collections::BTreeMap, sync::Arc};

// The scalars that a projector with gates has besides its tensors.
pub(super) const KEY_GATE: &str = "key_gate_logit";
pub(super) const VALUE_GATE: &str = "value_gate_logit";
pub(super) const TEMPERATURE: &str = "gate_temperature";

/// What the parameters that keys and values share begin with, in the place of `key` and `value`.
const SHARED: &str = "latent";

/// One tensor of a projector.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Parameter {
    /// `key_in.weight`, …
    pub name: String,
    pub shape: Vec<usize>,
    pub start: Start,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Start {
    /// U(±1/√fan_in), PyTorch's default of linear layers, weights and biases alike.
    Uniform {
        fan_in: usize,
    },
    /// Norm weights.
    Ones,
    Zeros,
}

/// Every tensor of a projector, keys before values.
pub(super) fn parameters(config: &FuserConfig) -> Vec<Parameter> {
    if config.kind == Kind::AllInOne {
        return all_in_one::parameters(config);
    }
    let (hidden, inner) = (config.hidden, config.intermediate);
    let (source, target) = (config.sharer.width(), config.receiver.width());
    let mut all = Vec::new();
    if config.kind == Kind::Ridge {
        let start = Start::Uniform { fan_in: source };
        for half in ["key", "value"] {
            all.push(Parameter { name: format!("{half}_map.weight"), shape: vec![target, source], start });
            all.push(Parameter { name: format!("{half}_map.bias"), shape: vec![target], start });
        }
        return all;
    }
    if config.kind.is_joint() {
        let cols = 2 * (source + target);
        let mut push = |name: &str, shape: &[usize], start| {
            all.push(Parameter { name: format!("{SHARED}_{name}"), shape: shape.to_vec(), start });
        };
        push("in.weight", &[hidden, cols], Start::Uniform { fan_in: cols });
        push("in.bias", &[hidden], Start::Uniform { fan_in: cols });
        push("mlp1.blocks.0.norm.weight", &[hidden], Start::Ones);
        push("mlp1.blocks.0.w1.weight", &[inner, hidden], Start::Uniform { fan_in: hidden });
        push("mlp1.blocks.0.w2.weight", &[hidden, inner], Start::Uniform { fan_in: inner });
    }
    for half in ["key", "value"] {
        let mut push = |name: String, shape: &[usize], start| {
            all.push(Parameter { name: format!("{half}_{name}"), shape: shape.to_vec(), start });
        };
        let mut linear = |name: &str, rows: usize, cols: usize| {
            let start = Start::Uniform { fan_in: cols };
            push(format!("{name}.weight"), &[rows, cols], start);
            push(format!("{name}.bias"), &[rows], start);
        };
        let mut staged = source;
        if config.kind.has_source_stage() {
            linear("source_in", hidden, source);
            linear("source_out", target, hidden);
            staged = target;
        }
        if !config.kind.is_joint() {
            linear("in", hidden, staged + if config.kind.has_target() { target } else { 0 });
        }
        if config.kind.has_scalar() {
            linear("scalar_head", config.receiver.kv_heads, hidden);
        }
        linear("proj_out", target, hidden);
        let mut ffn = |name: String, inner: usize| {
            push(format!("{name}.norm.weight"), &[hidden], Start::Ones);
            push(format!("{name}.w1.weight"), &[inner, hidden], Start::Uniform { fan_in: hidden });
            push(format!("{name}.w2.weight"), &[hidden, inner], Start::Uniform { fan_in: inner });
        };
        if config.kind.has_source_stage() {
            ffn("source_mlp.blocks.0".into(), inner);
        }
        if !config.kind.is_joint() {
            ffn("mlp1.blocks.0".into(), inner);
        }
        if config.kind.has_scalar() {
            ffn("scalar_mlp2.blocks.0".into(), hidden);
        }
        for block in 0..config.num_layers - 2 {
            ffn(format!("proj_mlp2.blocks.{block}"), inner);
        }
    }
    all
}

/// What a projector computes with.
#[derive(Clone)]
pub enum Body {
    Halves { keys: Arc<Projector>, values: Arc<Projector> },
    AllInOne(Arc<AllInOne>),
    Linear(Arc<LinearMap>),
}

/// The projector of one receiver layer.
#[derive(Clone)]
pub struct LayerProjector {
    pub body: Body,
    /// Of keys and values; a gate is open where it is positive. Positive too where the kind has no gates.
    pub gate_logits: [f32; 2],
    /// Of the gates in training.
    pub temperature: f32,
    tensors: BTreeMap<String, Tensor>,
}

impl LayerProjector {
    /// Projectors of keys and values where they are two.
    pub fn halves(&self) -> Option<[&Arc<Projector>; 2]> {
        match &self.body {
            Body::Halves { keys, values } => Some([keys, values]),
            _ => None,
        }
    }

    /// Every tensor by its published name. They share their memory with the body.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    fn new(config: &FuserConfig, tensors: BTreeMap<String, Tensor>, scalars: [f32; 3]) -> LayerProjector {
        let kind = config.kind;
        let body = match kind {
            Kind::AllInOne => Body::AllInOne(all_in_one::assemble(config, &tensors)),
            Kind::Ridge => {
                let map = |half: &str| {
                    let tensor = |what: &str| tensors[&format!("{half}_map.{what}")].clone();
                    Weight::with_bias(tensor("weight"), tensor("bias"))
                };
                Body::Linear(Arc::new(LinearMap { keys: map("key"), values: map("value") }))
            }
            _ => Body::Halves {
                keys: assemble(kind, "key", &tensors).into(),
                values: assemble(kind, "value", &tensors).into(),
            },
        };
        LayerProjector { body, gate_logits: [scalars[0], scalars[1]], temperature: scalars[2], tensors }
    }

    /// The same with each tensor replaced by what `change` makes of it.
    pub(super) fn map(
        &self,
        config: &FuserConfig,
        mut change: impl FnMut(&str, &Tensor) -> Result<Tensor, FuserError>,
    ) -> Result<LayerProjector, FuserError> {
        let tensors = self.tensors.iter().map(|(name, tensor)| Ok((name.clone(), change(name, tensor)?)));
        let tensors = tensors.collect::<Result<_, FuserError>>()?;
        let [key, value] = self.gate_logits;
        Ok(LayerProjector::new(config, tensors, [key, value, self.temperature]))
    }
}

/// Operands of the op from tensors that [`parameters`] says are there.
fn assemble(kind: Kind, half: &str, tensors: &BTreeMap<String, Tensor>) -> Projector {
    let shared = |name: &str| kind.is_joint() && (name.starts_with("in.") || name.starts_with("mlp1."));
    let tensor = |name: String| {
        let half = if shared(&name) { SHARED } else { half };
        tensors[&format!("{half}_{name}")].clone()
    };
    let linear =
        |name: &str| Weight::with_bias(tensor(format!("{name}.weight")), tensor(format!("{name}.bias")));
    let ffn = |name: String| Ffn {
        norm: tensor(format!("{name}.norm.weight")),
        w1: Weight::new(tensor(format!("{name}.w1.weight"))),
        w2: Weight::new(tensor(format!("{name}.w2.weight"))),
    };
    let block = |block: usize| format!("proj_mlp2.blocks.{block}");
    let there = |name: &String| tensors.contains_key(&format!("{half}_{name}.norm.weight"));
    Projector {
        source_stage: kind.has_source_stage().then(|| SourceStage {
            input: linear("source_in"),
            ffn: ffn("source_mlp.blocks.0".into()),
            output: linear("source_out"),
        }),
        input: linear("in"),
        mlp1: ffn("mlp1.blocks.0".into()),
        scalar: kind.has_scalar().then(|| (ffn("scalar_mlp2.blocks.0".into()), linear("scalar_head"))),
        blocks: (0..).map(block).take_while(there).map(ffn).collect(),
        output: linear("proj_out"),
    }
}

/// Takes the parameters of projector `index` out of `state`, where their names start with `prefix`.
pub(super) fn take(
    config: &FuserConfig,
    state: &mut StateDict,
    prefix: &str,
    backend: &Arc<dyn Backend>,
) -> Result<LayerProjector, FuserError> {
    let path = state.path.clone();
    let mut entry = |name: &str, shape: &[usize]| {
        let name = format!("{prefix}{name}");
        let path = path.clone();
        let Some(entry) = state.entries.remove(&name) else {
            return Err(FuserError::MissingParameter { path, name });
        };
        if entry.shape != shape {
            let (found, expected) = (entry.shape, shape.to_vec());
            return Err(FuserError::ParameterShape { path, name, found, expected });
        }
        if entry.dtype != config.dtype {
            let (found, expected) = (entry.dtype.to_string(), config.dtype.to_string());
            return Err(FuserError::ParameterType { path, name, found, expected });
        }
        Ok(entry)
    };
    let mut tensors = BTreeMap::new();
    for Parameter { name, shape, .. } in parameters(config) {
        let entry = entry(&name, &shape)?;
        let tensor = backend.map(&entry.file, entry.offset, entry.dtype, &shape, &name)?;
        tensors.insert(name, tensor);
    }
    let mut scalars = ALWAYS_OPEN;
    if config.kind.has_gates() {
        for (scalar, name) in scalars.iter_mut().zip([KEY_GATE, VALUE_GATE, TEMPERATURE]) {
            *scalar = to_f32(entry(name, &[])?.bytes(), config.dtype);
        }
    }
    if config.kind == Kind::AllInOne {
        scalars[2] = to_f32(entry(TEMPERATURE, &[])?.bytes(), config.dtype);
    }
    Ok(LayerProjector::new(config, tensors, scalars))
}

/// Gate logits and temperature of a kind without gates.
const ALWAYS_OPEN: [f32; 3] = [1.0, 1.0, 1.0];

/// An untrained projector: numbers keyed by (seed, projector, tensor, index), gates closed.
pub(super) fn initial(
    config: &FuserConfig,
    projector: usize,
    seed: u64,
    mut upload: impl FnMut(&str, &[usize], &[u8]) -> Result<Tensor, FuserError>,
) -> Result<LayerProjector, FuserError> {
    let mut tensors = BTreeMap::new();
    let mut numbers = Vec::new();
    let mut bytes = Vec::new();
    for (number, Parameter { name, shape, start }) in parameters(config).into_iter().enumerate() {
        let len: usize = shape.iter().product();
        let too_big = || backend::Error::OutOfMemory {
            device: "cpu",
            requested: len.saturating_mul(4),
            what: format!("initial values of `{name}`"),
        };
        numbers.clear();
        bytes.clear();
        if u32::try_from(len).is_err()
            || numbers.try_reserve_exact(len).is_err()
            || bytes.try_reserve_exact(len * config.dtype.block_bytes()).is_err()
        {
            return Err(too_big().into());
        }
        numbers.resize(len, 1.0f32);
        if start == Start::Zeros {
            numbers.fill(0.0);
        }
        if let Start::Uniform { fan_in } = start {
            let part = (projector as u32) << 16 | number as u32;
            Rng::new(seed, Stream::new(Purpose::Init, part), 0).fill_uniform(0, &mut numbers);
            let bound = 1.0 / (fan_in as f32).sqrt();
            numbers.iter_mut().for_each(|u| *u = (2.0 * *u - 1.0) * bound);
        }
        from_f32(&numbers, config.dtype, &mut bytes);
        let tensor = upload(&name, &shape, &bytes)?;
        tensors.insert(name, tensor);
    }
    let temperature = config.training.initial_temperature as f32;
    let scalars = if config.kind.has_gates() { [0.0, 0.0, temperature] } else { ALWAYS_OPEN };
    Ok(LayerProjector::new(config, tensors, scalars))
}

/// The first element of `bytes`. The dtype is one of the three that a configuration may have.
fn to_f32(bytes: &[u8], dtype: DType) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        DType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        _ => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    }
}

/// Appends `numbers` as `dtype`, one of the three that a configuration may have.
pub(super) fn from_f32(numbers: &[f32], dtype: DType, bytes: &mut Vec<u8>) {
    match dtype {
        DType::Bf16 => bytes.extend(numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
        DType::F16 => bytes.extend(numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
        _ => bytes.extend_from_slice(bytemuck::cast_slice(numbers)),
    }
}
