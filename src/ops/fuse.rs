//! The fuser of receiver layers: `out = base + gate · w · p`, K and V alike, straight into the pages.
//!
//! Formulae in docs/math.md ("The fuser"). `s` are the sharer's cache columns, `t` the receiver's, flattened per token
//! to `[kv_heads · head_dim]`.

use super::{KvPages, Scratch, ShapeError, Weight, check, check_apart, scratch::check_scratch};
use crate::backend::{DType, Precision, Queue, Tensor};
use std::sync::Arc;

/// `y = x + W2 · gelu_erf(W1 · rms_norm(x))`, no biases.
#[derive(Clone, Debug)]
pub struct Ffn {
    /// Float `[hidden]`.
    pub norm: Tensor,
    /// `[inner, hidden]`
    pub w1: Weight,
    /// `[hidden, inner]`
    pub w2: Weight,
}

/// C2C-C's extra stage, on the sharer's columns before the concatenation: `s' = out(ffn(in(s)))`.
#[derive(Clone, Debug)]
pub struct SourceStage {
    /// `[hidden, source_width]` with bias.
    pub input: Weight,
    pub ffn: Ffn,
    /// `[target_width, hidden]` with bias.
    pub output: Weight,
}

/// Weights for the keys or for the values of one layer.
#[derive(Clone, Debug)]
pub struct Projector {
    pub source_stage: Option<SourceStage>,
    /// `[hidden, source_width + target_width]` with bias, source first; `[hidden, source_width]` without a target. Twice as wide,
    /// `[s_k; s_v; t_k; t_v]`, where it reads keys and values, which not every device does
    /// ([`crate::backend::Backend::fuses_jointly`]).
    pub input: Weight,
    pub mlp1: Ffn,
    /// FFN block and `[kv_heads, hidden]` head with bias of the per-head weight; `None`: w = 1.
    pub scalar: Option<(Ffn, Weight)>,
    /// One or more FFN blocks, then `[target_width, hidden]` with bias.
    pub blocks: Vec<Ffn>,
    pub output: Weight,
}

impl Projector {
    pub fn hidden(&self) -> usize {
        self.input.rows()
    }

    /// Widest intermediate row.
    pub(crate) fn inner(&self) -> usize {
        let ffns = self.blocks.iter().chain([&self.mlp1]).chain(self.scalar.iter().map(|(ffn, _)| ffn));
        let ffns = ffns.chain(self.source_stage.iter().map(|stage| &stage.ffn));
        ffns.map(|ffn| ffn.w1.rows()).max().unwrap_or(0)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct FuseParams {
    pub tokens: u32,
    pub precision: Precision,
    /// Whether the projector also reads the receiver's columns, and adds to them instead of replacing them (C2C: yes).
    pub use_target: bool,
}

/// One receiver layer of a [`fuse`].
#[derive(Clone, Debug)]
pub struct FuseLayer {
    pub keys: Arc<Projector>,
    pub values: Arc<Projector>,
    /// Factors of the projections of keys and values: at inference 0 (closed: nothing is computed) or 1.
    pub gates: [f32; 2],
    /// The sharer's layer.
    pub source: KvPages,
    /// The receiver's plain cache, input of the projector.
    pub target: KvPages,
    /// What the projection is added to: `target`, or what an earlier sharer left in `out` (parallel sharers).
    pub base: KvPages,
    pub out: KvPages,
}

/// Operands of [`fuse`]. All slots U32`[tokens]`, the same for every layer.
#[derive(Clone, Debug)]
pub struct FuseOperands {
    /// All layers that are ready at once: a GPU works on them, keys and values alike, as one problem.
    pub layers: Vec<FuseLayer>,
    /// For each fused token the slot of the column aligned with it.
    pub source_slots: Tensor,
    pub target_slots: Tensor,
    pub base_slots: Tensor,
    pub out_slots: Tensor,
    /// See [`Scratch::Fuse`].
    pub scratch: Tensor,
}

/// Most tokens that are worked on at once on a CPU: enough to be bound by arithmetic, few enough for activations to stay in the
/// cache and scratch to stay small.
pub(crate) const FUSE_CHUNK: usize = 512;

/// What the scratch of a [`fuse`] depends on. All layers are of one size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FuseExtent {
    pub layers: usize,
    pub tokens: usize,
    pub hidden: usize,
    /// Widest inner row of the FFN blocks.
    pub inner: usize,
    /// Hidden width of the source stage, 0 without one.
    pub stage: usize,
    pub source_width: usize,
    pub target_width: usize,
    pub kv_heads: usize,
    /// FFN blocks of a projector, all of them.
    pub ffns: usize,
    /// Whether it reads keys and values.
    pub joint: bool,
}

impl FuseExtent {
    pub fn new(p: &Projector, source_width: usize, target_width: usize, kv_heads: usize) -> FuseExtent {
        let stage = p.source_stage.as_ref().map_or(0, |stage| stage.input.rows());
        let (hidden, inner) = (p.hidden(), p.inner());
        let ffns = 1 + usize::from(stage > 0) + usize::from(p.scalar.is_some()) + p.blocks.len();
        let joint = stage == 0 && source_width > 0 && p.input.cols() == 2 * (source_width + target_width);
        FuseExtent {
            layers: 0,
            tokens: 0,
            hidden,
            inner,
            stage,
            source_width,
            target_width,
            kv_heads,
            ffns,
            joint,
        }
    }
}

/// Fuses `tokens` columns of each layer: `out = base + gate · w · p`.
///
/// Without `use_target` the projection takes the target's place: `out = base − gate · target + gate · w · p`, which is
/// `p` alone where `base` is the target. With a closed gate nothing is computed: `base` is copied to `out` where they
/// are not already the same slots. A slot of `out` may be the same token's slot of `base` and `target`, and no other.
pub fn fuse(queue: &Queue, p: FuseParams, operands: &FuseOperands) -> Result<(), ShapeError> {
    const OP: &str = "fuse";
    let Some(extent) = check_fuse(OP, p, operands)? else { return Ok(()) };
    check_joint(OP, queue, extent)?;
    check_scratch(OP, queue, &operands.scratch, Scratch::Fuse(extent))?;
    queue.backend().fuse(queue.id(), p, extent, operands);
    Ok(())
}

/// All but the length of the scratch; the extent of the layers, if there are any.
pub(super) fn check_fuse(
    op: &'static str,
    p: FuseParams,
    o: &FuseOperands,
) -> Result<Option<FuseExtent>, ShapeError> {
    let tokens = p.tokens as usize;
    let slots = [
        ("source_slots", &o.source_slots),
        ("target_slots", &o.target_slots),
        ("base_slots", &o.base_slots),
        ("out_slots", &o.out_slots),
    ];
    for (name, slots) in slots {
        check(op, name, slots, &[DType::U32], &[tokens])?;
    }
    let mut first: Option<FuseExtent> = None;
    for layer in &o.layers {
        let extent = check_layer(layer, p.use_target, &o.scratch)?;
        let extents = [&layer.keys, &layer.values].map(|projector| FuseExtent::new(projector, 0, 0, 0));
        if extents[0] != extents[1] || first.is_some_and(|first| first != extent) {
            return Err(ShapeError {
                op,
                operand: "layers",
                found: format!("projectors of {extent:?} and others"),
                expected: "projectors of one size".into(),
            });
        }
        first = Some(extent);
        let geometry = |layer: &FuseLayer| {
            [&layer.source, &layer.target, &layer.base, &layer.out]
                .map(|pages| (pages.keys.dtype(), pages.kv_heads(), pages.block_size(), pages.head_dim()))
        };
        if geometry(layer) != geometry(&o.layers[0]) {
            return Err(ShapeError {
                op,
                operand: "layers",
                found: format!("pages of {:?} and others", layer.target.keys),
                expected: "pages of one geometry".into(),
            });
        }
    }
    Ok(first.map(|extent| FuseExtent { layers: o.layers.len(), tokens, ..extent }))
}

pub(super) fn check_joint(op: &'static str, queue: &Queue, extent: FuseExtent) -> Result<(), ShapeError> {
    if !extent.joint || queue.backend().fuses_jointly() {
        return Ok(());
    }
    Err(ShapeError {
        op,
        operand: "input",
        found: "a projector that reads keys and values".into(),
        expected: format!("one that reads either: {} has no other", queue.backend().device()),
    })
}

fn check_layer(layer: &FuseLayer, use_target: bool, scratch: &Tensor) -> Result<FuseExtent, ShapeError> {
    const OP: &str = "fuse";
    layer.source.check(OP, "source.keys", "source.values")?;
    layer.target.check(OP, "target.keys", "target.values")?;
    let dims = layer.target.keys.shape().to_vec();
    for (name, pages) in [("base.keys", &layer.base), ("out.keys", &layer.out)] {
        pages.check(OP, name, name)?;
        let dims = [pages.blocks(), dims[1], dims[2], dims[3]];
        check(OP, name, &pages.keys, &[layer.target.keys.dtype()], &dims)?;
    }
    let (source_width, target_width) = (layer.source.width(), layer.target.width());
    let kv_heads = layer.target.kv_heads();
    for projector in [&layer.keys, &layer.values] {
        check_projector(projector, use_target, source_width, target_width, kv_heads)?;
    }
    let pages = [&layer.source, &layer.target, &layer.base, &layer.out];
    for (name, pages) in ["source", "target", "base", "out"].into_iter().zip(pages) {
        check_apart(OP, scratch, &[(name, &pages.keys), (name, &pages.values)])?;
    }
    Ok(FuseExtent::new(&layer.keys, source_width, target_width, kv_heads))
}

fn check_projector(
    p: &Projector,
    use_target: bool,
    source_width: usize,
    target_width: usize,
    kv_heads: usize,
) -> Result<(), ShapeError> {
    let hidden = p.hidden();
    let staged = if p.source_stage.is_some() { target_width } else { source_width };
    let input = staged + if use_target { target_width } else { 0 };
    let joint = use_target && p.source_stage.is_none() && p.input.cols() == 2 * input;
    weight("input", &p.input, hidden, if joint { 2 * input } else { input })?;
    ffn("mlp1", &p.mlp1, hidden)?;
    if let Some((block, head)) = &p.scalar {
        ffn("scalar", block, hidden)?;
        weight("scalar_head", head, kv_heads, hidden)?;
    }
    for block in &p.blocks {
        ffn("blocks", block, hidden)?;
    }
    if p.blocks.is_empty() {
        return Err(ShapeError {
            op: "fuse",
            operand: "blocks",
            found: "none".into(),
            expected: "one or more".into(),
        });
    }
    weight("output", &p.output, target_width, hidden)?;
    if let Some(stage) = &p.source_stage {
        let hidden = stage.input.rows();
        weight("source_stage.input", &stage.input, hidden, source_width)?;
        ffn("source_stage.ffn", &stage.ffn, hidden)?;
        weight("source_stage.output", &stage.output, target_width, hidden)?;
    }
    Ok(())
}

fn ffn(operand: &'static str, block: &Ffn, hidden: usize) -> Result<(), ShapeError> {
    check("fuse", operand, &block.norm, super::FLOATS, &[hidden])?;
    weight(operand, &block.w1, block.w1.rows(), hidden)?;
    weight(operand, &block.w2, hidden, block.w1.rows())
}

fn weight(operand: &'static str, weight: &Weight, rows: usize, cols: usize) -> Result<(), ShapeError> {
    if weight.parts.len() != 1 {
        return Err(ShapeError {
            op: "fuse",
            operand,
            found: format!("a stack of {} matrices", weight.parts.len()),
            expected: "one matrix".into(),
        });
    }
    for part in &weight.parts {
        check("fuse", operand, &part.matrix, super::FLOATS, &[part.matrix.rows(), cols])?;
        if let Some(bias) = &part.bias {
            check("fuse", operand, bias, super::FLOATS, &[part.matrix.rows()])?;
        }
    }
    if weight.rows() == rows && weight.cols() == cols {
        return Ok(());
    }
    Err(ShapeError {
        op: "fuse",
        operand,
        found: format!("[{}, {}]", weight.rows(), weight.cols()),
        expected: format!("[{rows}, {cols}]"),
    })
}
