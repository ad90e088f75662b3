//! Fusers that others are compared with, which read keys and values together or know positions: the earlier
//! AllInOneProjector, and linear maps of columns. Formulae in docs/math.md ("Baselines").

use super::{FLOATS, KvPages, ShapeError, Weight, check};
use crate::backend::{DType, Precision, Queue, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Between the layers of an [`Mlp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Nonlinearity {
    /// Exact (erf).
    Gelu,
    Silu,
    Relu,
}

/// Linear layers with LayerNorm (ε = 10⁻⁵) and a nonlinearity between them.
#[derive(Clone, Debug)]
pub struct Mlp {
    pub hidden: Vec<MlpLayer>,
    pub output: Weight,
    /// Adds the input, which is as wide as the output.
    pub residual: bool,
}

/// `nonlinearity(norm(W · x + b))`, or `norm(silu(W_gate · x + b) ∘ (W_up · x + b))`.
#[derive(Clone, Debug)]
pub struct MlpLayer {
    /// The gate's and the up projection's rows one after the other where there is a gate.
    pub linear: Weight,
    /// Float `[width]`: weight and bias.
    pub norm: Option<[Tensor; 2]>,
    /// `None`: a gated layer.
    pub nonlinearity: Option<Nonlinearity>,
}

impl MlpLayer {
    fn width(&self) -> usize {
        self.linear.rows() / if self.nonlinearity.is_none() { 2 } else { 1 }
    }
}

/// What has a gate or a weight of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// All columns of a call.
    Scalar,
    /// A token.
    Token,
    /// A head of a token, computed from that head.
    Head,
    /// A head of a token, computed from all heads.
    HeadMerged,
    /// An element.
    Value,
}

/// What gates and weights are computed from: the receiver's columns and what the projections make of the sharer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Features {
    TargetKey,
    TargetValue,
    Both,
    TargetProjectedKey,
    TargetProjectedValue,
    TargetProjectedBoth,
}

impl Features {
    /// Columns that are joined, head by head.
    pub fn count(self) -> usize {
        match self {
            Features::TargetKey | Features::TargetValue => 1,
            Features::TargetProjectedBoth => 4,
            _ => 2,
        }
    }
}

/// Gates or weights before their step or sigmoid.
#[derive(Clone, Debug)]
pub enum Factor {
    /// Float, one number or a row for each place in the call: `[]`, `[n]`, `[n, heads]` or `[n, heads, head_dim]`.
    Table(Tensor, Granularity),
    Network {
        mlp: Mlp,
        head: Option<Weight>,
        granularity: Granularity,
        features: Features,
    },
}

/// What becomes of the receiver's own column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelfTerm {
    Kept,
    /// Weighed with one minus the weight of the projection.
    Remainder,
    Dropped,
}

/// The AllInOneProjector.
#[derive(Clone, Debug)]
pub struct AllInOne {
    /// Of keys and values.
    pub projections: [Mlp; 2],
    /// `[target_width, 2 · target_width]`, the projection first.
    pub combiners: Option<[Weight; 2]>,
    /// Open where positive.
    pub gate: Factor,
    /// Of keys and values.
    pub weights: [Factor; 2],
    /// That weights are divided by before their sigmoid.
    pub temperature: f32,
    pub self_term: SelfTerm,
}

/// Linear maps of the sharer's columns that take the receiver's place; keys are mapped without their rotation.
#[derive(Clone, Debug)]
pub struct LinearMap {
    /// `[target_width, source_width]` with bias.
    pub keys: Weight,
    pub values: Weight,
}

#[derive(Clone, Debug)]
pub enum Baseline {
    AllInOne(Arc<AllInOne>),
    /// `[source, target]`: rotations of the columns' keys, F32`[tokens, head_dim]` as [`super::RopeOperands::cos_sin`].
    Linear(Arc<LinearMap>, [Tensor; 2]),
}

/// One receiver layer of a [`fuse_baseline`]. Pages as in [`super::FuseLayer`].
#[derive(Clone, Debug)]
pub struct BaselineLayer {
    pub projector: Baseline,
    /// Factors of what becomes of keys and values: `base + gate · (fused − target)`.
    pub gates: [f32; 2],
    pub source: KvPages,
    pub target: KvPages,
    pub base: KvPages,
    pub out: KvPages,
}

/// Operands of [`fuse_baseline`]. All slots U32`[tokens]`, in the order of the section.
#[derive(Clone, Debug)]
pub struct BaselineOperands {
    pub layers: Vec<BaselineLayer>,
    pub source_slots: Tensor,
    pub target_slots: Tensor,
    pub base_slots: Tensor,
    pub out_slots: Tensor,
}

/// Fuses `tokens` columns of each layer. The columns of one call are one section: a scalar gate is computed from all of them.
pub fn fuse_baseline(
    queue: &Queue,
    tokens: usize,
    precision: Precision,
    operands: &BaselineOperands,
) -> Result<(), ShapeError> {
    const OP: &str = "fuse_baseline";
    let o = operands;
    for (name, slots) in [
        ("source_slots", &o.source_slots),
        ("target_slots", &o.target_slots),
        ("base_slots", &o.base_slots),
        ("out_slots", &o.out_slots),
    ] {
        check(OP, name, slots, &[DType::U32], &[tokens])?;
    }
    for layer in &o.layers {
        check_layer(layer, tokens)?;
    }
    let Some(device) = queue.backend().baselines() else {
        return Err(ShapeError {
            op: OP,
            operand: "queue",
            found: queue.backend().device().into(),
            expected: "a device that runs baseline fusers: cpu".into(),
        });
    };
    if tokens > 0 && !o.layers.is_empty() {
        device.fuse_baseline(queue.id(), tokens, precision, o);
    }
    Ok(())
}

/// Of a training pass.
#[derive(Clone, Copy, Debug)]
pub struct BaselineTraining {
    pub precision: Precision,
    /// As [`super::FuseTrainingParams::dropout`], behind the hidden layers.
    pub dropout: f32,
    pub seed: u64,
    pub step: u32,
}

/// What the forward pass of an AllInOneProjector leaves for its backward.
#[derive(Clone, Debug)]
pub struct BaselineTape {
    /// Number of the receiver layer.
    pub layer: u32,
    /// F32`[tokens, target_width]`: gates of the elements, of keys and values alike. The projector's own gate is not read.
    pub gates: Tensor,
    /// F32`[2 · tokens · (source_width + target_width)]`, assigned: the columns that were read.
    pub inputs: Tensor,
}

/// Gradients of one AllInOneProjector.
#[derive(Clone, Debug)]
pub struct BaselineGrads {
    /// F32 tensors in the shapes of the weights, added to; that of the gate is not.
    pub projector: Arc<AllInOne>,
    /// As [`super::FuseGrads::dout`] and [`super::FuseGrads::dtarget`].
    pub dout: KvPages,
    pub dtarget: Option<KvPages>,
    /// F32`[tokens, target_width]`, assigned: gradients of [`BaselineTape::gates`].
    pub dgates: Tensor,
}

fn check_tapes(
    queue: &Queue,
    tokens: usize,
    operands: &BaselineOperands,
    tapes: &[BaselineTape],
) -> Result<(), ShapeError> {
    for slots in [&operands.source_slots, &operands.target_slots, &operands.base_slots, &operands.out_slots] {
        check(OP, "slots", slots, &[DType::U32], &[tokens])?;
    }
    let trainable = operands.layers.iter().all(|layer| matches!(layer.projector, Baseline::AllInOne(_)));
    if tapes.len() != operands.layers.len() || !trainable || queue.backend().baselines().is_none() {
        return Err(ShapeError {
            op: OP,
            operand: "tapes",
            found: format!("{} tapes of {} layers", tapes.len(), operands.layers.len()),
            expected: "one for each AllInOneProjector, on a device that runs them".into(),
        });
    }
    for (layer, tape) in operands.layers.iter().zip(tapes) {
        check_layer(layer, tokens)?;
        let (source, target) = (layer.source.width(), layer.target.width());
        check(OP, "gates", &tape.gates, &[DType::F32], &[tokens, target])?;
        check(OP, "inputs", &tape.inputs, &[DType::F32], &[2 * tokens * (source + target)])?;
    }
    Ok(())
}

/// [`fuse_baseline`] of AllInOneProjectors with a gate for each element.
pub fn fuse_baseline_forward(
    queue: &Queue,
    tokens: usize,
    p: BaselineTraining,
    operands: &BaselineOperands,
    tapes: &[BaselineTape],
) -> Result<(), ShapeError> {
    check_tapes(queue, tokens, operands, tapes)?;
    if let Some(device) = queue.backend().baselines() {
        device.fuse_baseline_forward(queue.id(), tokens, p, operands, tapes);
    }
    Ok(())
}

/// Backward of [`fuse_baseline_forward`] from the same operands and tapes.
pub fn fuse_baseline_backward(
    queue: &Queue,
    tokens: usize,
    p: BaselineTraining,
    operands: &BaselineOperands,
    tapes: &[BaselineTape],
    grads: &[BaselineGrads],
) -> Result<(), ShapeError> {
    check_tapes(queue, tokens, operands, tapes)?;
    for (layer, grads) in operands.layers.iter().zip(grads) {
        let dims = layer.target.keys.shape();
        for pages in [Some(&grads.dout), grads.dtarget.as_ref()].into_iter().flatten() {
            pages.check(OP, "dout.keys", "dout.values")?;
            check(OP, "dout.keys", &pages.keys, &[DType::F32], &[pages.blocks(), dims[1], dims[2], dims[3]])?;
        }
        check(OP, "dgates", &grads.dgates, &[DType::F32], &[tokens, layer.target.width()])?;
    }
    if let Some(device) = queue.backend().baselines() {
        device.fuse_baseline_backward(queue.id(), tokens, p, operands, tapes, grads);
    }
    Ok(())
}

const OP: &str = "fuse_baseline";

fn check_layer(layer: &BaselineLayer, tokens: usize) -> Result<(), ShapeError> {
    layer.source.check(OP, "source.keys", "source.values")?;
    layer.target.check(OP, "target.keys", "target.values")?;
    let dims = layer.target.keys.shape();
    for (name, pages) in [("base.keys", &layer.base), ("out.keys", &layer.out)] {
        pages.check(OP, name, name)?;
        let dims = [pages.blocks(), dims[1], dims[2], dims[3]];
        check(OP, name, &pages.keys, &[layer.target.keys.dtype()], &dims)?;
    }
    let (source, target) = (layer.source.width(), layer.target.width());
    let (heads, dim) = (layer.target.kv_heads(), layer.target.head_dim());
    match &layer.projector {
        Baseline::Linear(map, [theirs, ours]) => {
            weight("keys", &map.keys, target, source)?;
            weight("values", &map.values, target, source)?;
            check(OP, "source angles", theirs, &[DType::F32], &[tokens, layer.source.head_dim()])?;
            check(OP, "target angles", ours, &[DType::F32], &[tokens, dim])
        }
        Baseline::AllInOne(p) => {
            for projection in &p.projections {
                mlp("projection", projection, target, source)?;
            }
            for combiner in p.combiners.iter().flatten() {
                weight("combiner", combiner, target, 2 * target)?;
            }
            factor("gate", &p.gate, tokens, heads, dim)?;
            p.weights.iter().try_for_each(|factor_| factor("weight", factor_, tokens, heads, dim))
        }
    }
}

fn factor(
    name: &'static str,
    factor: &Factor,
    tokens: usize,
    heads: usize,
    dim: usize,
) -> Result<(), ShapeError> {
    let wide = |granularity: Granularity| match granularity {
        Granularity::Scalar | Granularity::Token => 1,
        Granularity::Head => heads,
        Granularity::HeadMerged => heads,
        Granularity::Value => heads * dim,
    };
    match factor {
        Factor::Table(table, granularity) => {
            let rows = if *granularity == Granularity::Scalar { 1 } else { tokens };
            if table.elements() >= rows * wide(*granularity) && FLOATS.contains(&table.dtype()) {
                return Ok(());
            }
            Err(ShapeError {
                op: OP,
                operand: name,
                found: format!("{table:?}"),
                expected: format!("a table for a section of {rows} tokens: it was made for shorter ones"),
            })
        }
        Factor::Network { mlp: net, head, granularity, features } => {
            let column = features.count() * dim;
            let input = match granularity {
                Granularity::Token | Granularity::HeadMerged => heads * column,
                _ => column,
            };
            let out = match granularity {
                Granularity::HeadMerged => heads,
                Granularity::Value => dim,
                _ => 1,
            };
            match head {
                None => mlp(name, net, out, input),
                Some(head) => {
                    mlp(name, net, net.output.rows(), input)?;
                    weight(name, head, out, net.output.rows())
                }
            }
        }
    }
}

fn mlp(name: &'static str, mlp: &Mlp, rows: usize, cols: usize) -> Result<(), ShapeError> {
    let mut width = cols;
    for layer in &mlp.hidden {
        weight(name, &layer.linear, layer.linear.rows(), width)?;
        width = layer.width();
        for vector in layer.norm.iter().flatten() {
            check(OP, name, vector, FLOATS, &[width])?;
        }
    }
    weight(name, &mlp.output, rows, width)
}

fn weight(operand: &'static str, weight: &Weight, rows: usize, cols: usize) -> Result<(), ShapeError> {
    for part in &weight.parts {
        check(OP, operand, &part.matrix, FLOATS, &[part.matrix.rows(), cols])?;
        if let Some(bias) = &part.bias {
            check(OP, operand, bias, FLOATS, &[part.matrix.rows()])?;
        }
    }
    match weight.rows() == rows {
        true => Ok(()),
        false => Err(ShapeError {
            op: OP,
            operand,
            found: format!("[{}, {}]", weight.rows(), weight.cols()),
            expected: format!("[{rows}, {cols}]"),
        }),
    }
}
