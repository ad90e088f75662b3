//! The AllInOneProjector, which came before C2C: what it is, and its parameters by their published names (spec 2.3).

use super::{
    FuserConfig, FuserError, Training,
    parameters::{Parameter, Start},
};
use crate::{
    backend::Tensor,
    ops::{AllInOne, Factor, Features, Granularity, Mlp, MlpLayer, Nonlinearity, SelfTerm, Weight},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};

/// What an AllInOneProjector is besides its sizes. [`FuserConfig::hidden`] is the width of its projections and
/// [`FuserConfig::intermediate`] of the network behind its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllInOneConfig {
    pub activation: Nonlinearity,
    pub layer_norm: bool,
    pub swiglu: bool,
    /// Adds the sharer's column where it is as wide as the receiver's.
    pub residual: bool,
    /// Whether the projection is joined with the receiver's column and mapped once more.
    pub concat: bool,
    pub gate: FactorConfig,
    pub weight: FactorConfig,
    /// Whether the receiver's own column is kept.
    pub add_self: bool,
    /// Whether it is weighed with what the projection's weight leaves of 1.
    pub preserve_target_weight: bool,
    pub scalar_temperature: f64,
    /// Rows of tables of gates and weights.
    pub max_sequence_length: usize,
}

/// Gates or weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FactorConfig {
    pub granularity: Granularity,
    /// What a network computes them from; `None`: they are parameters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Features>,
}

impl AllInOneConfig {
    /// As the published recipes have it.
    pub fn recipe() -> AllInOneConfig {
        AllInOneConfig {
            activation: Nonlinearity::Gelu,
            layer_norm: true,
            swiglu: true,
            residual: true,
            concat: true,
            gate: FactorConfig { granularity: Granularity::Scalar, features: None },
            weight: FactorConfig {
                granularity: Granularity::HeadMerged,
                features: Some(Features::TargetProjectedKey),
            },
            add_self: true,
            preserve_target_weight: false,
            scalar_temperature: 1.0,
            max_sequence_length: default_rows(),
        }
    }

    /// Whether its gate is one number a layer.
    pub fn is_trainable(&self) -> bool {
        self.gate == FactorConfig { granularity: Granularity::Scalar, features: None }
    }

    pub(super) fn validate(&self) -> Result<(), FuserError> {
        let refuse = |problem: &str| Err(FuserError::Config { field: "all_in_one", problem: problem.into() });
        for factor in [self.gate, self.weight] {
            // The published program fails on both.
            if factor.features.is_none() && factor.granularity == Granularity::HeadMerged {
                return refuse(
                    "has a table of granularity head_merged: that is for computed gates and weights, tables have head",
                );
            }
        }
        if self.gate.features.is_some() && self.gate.granularity == Granularity::Token {
            return refuse(
                "has a computed gate of granularity token, which the published program fails on: use head_merged",
            );
        }
        let positive = self.scalar_temperature > 0.0;
        if !positive || !(1..=1 << 20).contains(&self.max_sequence_length) {
            return refuse("needs scalar_temperature above 0 and max_sequence_length of 1 to 1048576");
        }
        Ok(())
    }
}

/// What lies between the published names of a network's layers.
struct Names {
    prefix: String,
    next: usize,
}

impl Names {
    fn new(prefix: impl Into<String>) -> Names {
        Names { prefix: prefix.into(), next: 0 }
    }

    /// Of the next module, with parameters or without.
    fn take(&mut self) -> String {
        self.next += 1;
        format!("{}.layers.{}", self.prefix, self.next - 1)
    }
}

/// The shape of a network.
struct MlpShape {
    cols: usize,
    width: usize,
    rows: usize,
    hidden: usize,
    swiglu: bool,
    layer_norm: bool,
    nonlinearity: Nonlinearity,
    dropout: bool,
    residual: bool,
}

/// Visits the parameters of a network: `linear(name, rows, cols)`, `norm(name, width)`.
enum Module<'a> {
    Linear(&'a str, usize, usize),
    Norm(&'a str, usize),
}

impl MlpShape {
    /// Calls `visit` with each module; the names of each hidden layer (linear, up projection, norm), then the output's.
    fn walk(&self, prefix: &str, visit: &mut dyn FnMut(Module)) -> (Vec<[Option<String>; 3]>, String) {
        let mut names = Names::new(prefix);
        let mut layers = Vec::new();
        let mut cols = self.cols;
        for _ in 0..self.hidden {
            let name = names.take();
            let (linear, up) = match self.swiglu {
                true => (format!("{name}.gate_proj"), Some(format!("{name}.up_proj"))),
                false => (name, None),
            };
            for name in [Some(&linear), up.as_ref()].into_iter().flatten() {
                visit(Module::Linear(name, self.width, cols));
            }
            let norm = self.layer_norm.then(|| names.take());
            if let Some(norm) = &norm {
                visit(Module::Norm(norm, self.width));
            }
            if !self.swiglu {
                names.take();
            }
            if self.dropout {
                names.take();
            }
            layers.push([Some(linear), up, norm]);
            cols = self.width;
        }
        let output = names.take();
        visit(Module::Linear(&output, self.rows, cols));
        (layers, output)
    }

    fn assemble(&self, prefix: &str, tensors: &BTreeMap<String, Tensor>) -> Mlp {
        let (layers, output) = self.walk(prefix, &mut |_| {});
        let tensor = |name: &str, what: &str| tensors[&format!("{name}.{what}")].clone();
        let linear = |name: &str| Weight::with_bias(tensor(name, "weight"), tensor(name, "bias"));
        let hidden = layers.into_iter().map(|[name, up, norm]| {
            let mut weight = linear(&name.unwrap_or_default());
            if let Some(up) = &up {
                weight.parts.extend(linear(up).parts);
            }
            MlpLayer {
                linear: weight,
                norm: norm.map(|norm| [tensor(&norm, "weight"), tensor(&norm, "bias")]),
                nonlinearity: up.is_none().then_some(self.nonlinearity),
            }
        });
        Mlp { hidden: hidden.collect(), output: linear(&output), residual: self.residual }
    }
}

fn config(config: &FuserConfig) -> &AllInOneConfig {
    config.all_in_one.as_ref().expect("a fuser of this kind was validated to have it")
}

fn projection(c: &FuserConfig) -> MlpShape {
    let a = config(c);
    let (cols, rows) = (c.sharer.width(), c.receiver.width());
    MlpShape {
        cols,
        width: c.hidden,
        rows,
        hidden: c.num_layers - 1,
        swiglu: a.swiglu,
        layer_norm: a.layer_norm,
        nonlinearity: a.activation,
        dropout: c.training.dropout > 0.0,
        residual: a.residual && cols == rows,
    }
}

/// The network of gates or weights: its input and, of a gate, its output.
fn generator(
    c: &FuserConfig,
    factor: FactorConfig,
    features: Features,
    width: usize,
    rows: Option<usize>,
) -> MlpShape {
    let column = features.count() * c.receiver.head_dim;
    let merged = matches!(factor.granularity, Granularity::Token | Granularity::HeadMerged);
    MlpShape {
        cols: if merged { c.receiver.kv_heads * column } else { column },
        width,
        rows: rows.unwrap_or(width),
        hidden: 1,
        swiglu: false,
        layer_norm: true,
        nonlinearity: Nonlinearity::Gelu,
        dropout: true,
        residual: false,
    }
}

/// Numbers that a network gives for one of its rows.
fn outputs(c: &FuserConfig, granularity: Granularity) -> usize {
    match granularity {
        Granularity::HeadMerged => c.receiver.kv_heads,
        Granularity::Value => c.receiver.head_dim,
        _ => 1,
    }
}

fn table(c: &FuserConfig, granularity: Granularity) -> Vec<usize> {
    let (rows, heads, dim) = (config(c).max_sequence_length, c.receiver.kv_heads, c.receiver.head_dim);
    match granularity {
        Granularity::Scalar => vec![],
        Granularity::Token => vec![rows],
        Granularity::Head | Granularity::HeadMerged => vec![rows, heads],
        Granularity::Value => vec![rows, heads, dim],
    }
}

pub(super) fn parameters(c: &FuserConfig) -> Vec<Parameter> {
    let a = config(c);
    let mut all = Vec::new();
    let mut push = |name: String, shape: Vec<usize>, start| all.push(Parameter { name, shape, start });
    let mut module = |module: Module| match module {
        Module::Linear(name, rows, cols) => {
            let start = Start::Uniform { fan_in: cols };
            push(format!("{name}.weight"), vec![rows, cols], start);
            push(format!("{name}.bias"), vec![rows], start);
        }
        Module::Norm(name, width) => {
            push(format!("{name}.weight"), vec![width], Start::Ones);
            push(format!("{name}.bias"), vec![width], Start::Zeros);
        }
    };
    let width = c.receiver.width();
    for half in ["key", "value"] {
        projection(c).walk(&format!("{half}_projection"), &mut module);
        if a.concat {
            module(Module::Linear(&format!("{half}_combiner"), width, 2 * width));
        }
    }
    if let Some(features) = a.gate.features {
        let rows = Some(outputs(c, a.gate.granularity));
        generator(c, a.gate, features, c.hidden, rows).walk("gate_generator", &mut module);
    }
    if let Some(features) = a.weight.features {
        generator(c, a.weight, features, c.intermediate, None).walk("weight_hidden", &mut module);
        for half in ["key", "value"] {
            let rows = outputs(c, a.weight.granularity);
            module(Module::Linear(&format!("{half}_weight_head"), rows, c.intermediate));
        }
    } else {
        for half in ["key", "value"] {
            push(format!("{half}_weight"), table(c, a.weight.granularity), Start::Zeros);
        }
    }
    if a.gate.features.is_none() {
        push("gate_logit".into(), table(c, a.gate.granularity), Start::Zeros);
    }
    all
}

/// Operands of the op from tensors that [`parameters`] says are there.
pub(super) fn assemble(c: &FuserConfig, tensors: &BTreeMap<String, Tensor>) -> Arc<AllInOne> {
    let a = config(c);
    let linear = |name: &str| {
        let tensor = |what: &str| tensors[&format!("{name}.{what}")].clone();
        Weight::with_bias(tensor("weight"), tensor("bias"))
    };
    let gate = match a.gate.features {
        None => Factor::Table(tensors["gate_logit"].clone(), a.gate.granularity),
        Some(features) => {
            let rows = Some(outputs(c, a.gate.granularity));
            let shape = generator(c, a.gate, features, c.hidden, rows);
            let mlp = shape.assemble("gate_generator", tensors);
            Factor::Network { mlp, head: None, granularity: a.gate.granularity, features }
        }
    };
    let weights = ["key", "value"].map(|half| match a.weight.features {
        None => Factor::Table(tensors[&format!("{half}_weight")].clone(), a.weight.granularity),
        Some(features) => {
            let shape = generator(c, a.weight, features, c.intermediate, None);
            let mlp = shape.assemble("weight_hidden", tensors);
            let head = Some(linear(&format!("{half}_weight_head")));
            Factor::Network { mlp, head, granularity: a.weight.granularity, features }
        }
    });
    Arc::new(AllInOne {
        projections: ["key", "value"]
            .map(|half| projection(c).assemble(&format!("{half}_projection"), tensors)),
        combiners: a.concat.then(|| ["key", "value"].map(|half| linear(&format!("{half}_combiner")))),
        gate,
        weights,
        temperature: a.scalar_temperature as f32,
        self_term: match (a.add_self, a.preserve_target_weight) {
            (false, _) => SelfTerm::Dropped,
            (true, true) => SelfTerm::Remainder,
            (true, false) => SelfTerm::Kept,
        },
    })
}

/// What the published class was called with; what is absent has the class's default.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InitArgs {
    pub source_dim: usize,
    pub target_dim: usize,
    #[serde(default = "one")]
    pub source_num_heads: usize,
    #[serde(default = "one")]
    pub target_num_heads: usize,
    #[serde(default = "default_width")]
    hidden_dim: usize,
    #[serde(default = "default_layers")]
    num_layers: usize,
    #[serde(default = "default_dropout")]
    dropout: f64,
    #[serde(default = "gelu")]
    activation: Nonlinearity,
    #[serde(default = "yes")]
    use_layer_norm: bool,
    /// Not known what its default is: asked for where it matters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    use_residual: Option<bool>,
    #[serde(default)]
    use_swiglu: bool,
    #[serde(default)]
    use_concat: bool,
    #[serde(default = "scalar")]
    gate_granularity: Granularity,
    #[serde(default)]
    gate_depends_on_input: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gate_input_features: Option<Features>,
    #[serde(default = "scalar")]
    weight_granularity: Granularity,
    #[serde(default)]
    weight_depends_on_input: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight_input_features: Option<Features>,
    #[serde(default = "default_width")]
    weight_hidden_dim: usize,
    #[serde(default = "default_rows")]
    max_sequence_length: usize,
    #[serde(default = "yes")]
    preserve_target_weight: bool,
    #[serde(default = "yes")]
    add_self: bool,
    #[serde(default = "default_temperature")]
    scalar_temperature: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    initial_temperature: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    final_temperature: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    anneal_steps: Option<u64>,
    // How parameters began, the tensors' dtype, and what the class accepts and does not use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight_init_value: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gate_init_value: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pos_emb: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_pos: Option<serde_json::Value>,
}

fn one() -> usize {
    1
}
fn yes() -> bool {
    true
}
fn gelu() -> Nonlinearity {
    Nonlinearity::Gelu
}
fn scalar() -> Granularity {
    Granularity::Scalar
}
fn default_width() -> usize {
    1024
}
fn default_layers() -> usize {
    3
}
fn default_dropout() -> f64 {
    0.1
}
fn default_rows() -> usize {
    8192
}
fn default_temperature() -> f64 {
    0.005
}

impl InitArgs {
    /// Hidden width, width behind the weights, layers, training, and the rest.
    pub fn config(&self) -> Result<(usize, usize, usize, Training, AllInOneConfig), String> {
        let factor = |name: &str, granularity, depends: bool, features: Option<Features>| {
            if depends && features.is_none() {
                return Err(format!("depend on input, but `{name}_input_features` does not say on which"));
            }
            Ok(FactorConfig { granularity, features: features.filter(|_| depends) })
        };
        let square = self.source_dim * self.source_num_heads == self.target_dim * self.target_num_heads;
        if square && self.use_residual.is_none() {
            return Err("do not say `use_residual`, which counts where both caches are equally wide".into());
        }
        let defaults = Training { final_temperature: 0.01, anneal_steps: 1360, ..Training::default() };
        let training = Training {
            dropout: self.dropout,
            initial_temperature: self.initial_temperature.unwrap_or(defaults.initial_temperature),
            final_temperature: self.final_temperature.unwrap_or(defaults.final_temperature),
            anneal_steps: self.anneal_steps.unwrap_or(defaults.anneal_steps),
        };
        let config = AllInOneConfig {
            activation: self.activation,
            layer_norm: self.use_layer_norm,
            swiglu: self.use_swiglu,
            residual: self.use_residual.unwrap_or(false),
            concat: self.use_concat,
            gate: factor(
                "gate",
                self.gate_granularity,
                self.gate_depends_on_input,
                self.gate_input_features,
            )?,
            weight: factor(
                "weight",
                self.weight_granularity,
                self.weight_depends_on_input,
                self.weight_input_features,
            )?,
            add_self: self.add_self,
            preserve_target_weight: self.preserve_target_weight,
            scalar_temperature: self.scalar_temperature,
            max_sequence_length: self.max_sequence_length,
        };
        Ok((self.hidden_dim, self.weight_hidden_dim, self.num_layers, training, config))
    }

    /// Of a fuser that is to be written.
    pub fn of(c: &FuserConfig) -> InitArgs {
        let (a, t) = (config(c), c.training);
        InitArgs {
            source_dim: c.sharer.head_dim,
            target_dim: c.receiver.head_dim,
            source_num_heads: c.sharer.kv_heads,
            target_num_heads: c.receiver.kv_heads,
            hidden_dim: c.hidden,
            num_layers: c.num_layers,
            dropout: t.dropout,
            activation: a.activation,
            use_layer_norm: a.layer_norm,
            use_residual: Some(a.residual),
            use_swiglu: a.swiglu,
            use_concat: a.concat,
            gate_granularity: a.gate.granularity,
            gate_depends_on_input: a.gate.features.is_some(),
            gate_input_features: a.gate.features,
            weight_granularity: a.weight.granularity,
            weight_depends_on_input: a.weight.features.is_some(),
            weight_input_features: a.weight.features,
            weight_hidden_dim: c.intermediate,
            max_sequence_length: a.max_sequence_length,
            preserve_target_weight: a.preserve_target_weight,
            add_self: a.add_self,
            scalar_temperature: a.scalar_temperature,
            initial_temperature: Some(t.initial_temperature),
            final_temperature: Some(t.final_temperature),
            anneal_steps: Some(t.anneal_steps),
            weight_init_value: None,
            gate_init_value: None,
            dtype: None,
            pos_emb: None,
            max_pos: None,
        }
    }
}
