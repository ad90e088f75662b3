//! The fuser of one receiver layer: `out = base + gate · w · p`, K and V alike, straight into the pages.
//!
//! Formulae in docs/math.md ("The fuser"). `s` are the sharer's cache columns, `t` the receiver's, flattened per token
//! to `[kv_heads · head_dim]`.

use super::{KvPages, ShapeError, Weight, check, check_apart};
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
    /// `[hidden, source_width + target_width]` with bias, source first; `[hidden, source_width]` without a target.
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
    /// Factors of the projections of keys and values: at inference 0 (closed: nothing is computed) or 1.
    pub key_gate: f32,
    pub value_gate: f32,
    /// Whether the projector also reads the receiver's columns, and adds to them instead of replacing them (C2C: yes).
    pub use_target: bool,
}

/// Operands of [`fuse`]. All slots U32`[tokens]`.
#[derive(Clone, Debug)]
pub struct FuseOperands {
    pub keys: Arc<Projector>,
    pub values: Arc<Projector>,
    /// The sharer's layer, and for each fused token the slot of the column aligned with it.
    pub source: KvPages,
    pub source_slots: Tensor,
    /// The receiver's plain cache, input of the projector.
    pub target: KvPages,
    pub target_slots: Tensor,
    /// What the projection is added to: `target`, or what an earlier sharer left in `out` (parallel sharers).
    pub base: KvPages,
    pub base_slots: Tensor,
    pub out: KvPages,
    pub out_slots: Tensor,
    /// F32, at least [`fuse_scratch_len`] elements.
    pub scratch: Tensor,
}

/// Most tokens that are worked on at once: enough to be bound by arithmetic, few enough for activations to stay in the
/// cache and scratch to stay small.
pub(crate) const FUSE_CHUNK: usize = 512;

/// Elements of scratch that [`fuse`] needs: per token of a chunk its input row, three hidden rows, one inner row, the projected row
/// and the weights of the heads.
pub fn fuse_scratch_len(
    p: &Projector,
    tokens: usize,
    source_width: usize,
    target_width: usize,
    kv_heads: usize,
) -> usize {
    let stage = p.source_stage.as_ref().map_or(0, |stage| stage.input.rows());
    let input = p.input.cols().max(source_width);
    tokens.min(FUSE_CHUNK) * (input + 3 * p.hidden().max(stage) + p.inner() + target_width + kv_heads)
}

/// Fuses `tokens` columns of one layer: `out = base + gate · w · p`.
///
/// Without `use_target` the projection takes the target's place: `out = base − gate · target + gate · w · p`, which is
/// `p` alone where `base` is the target. With a closed gate nothing is computed: `base` is copied to `out` where they
/// are not already the same slots. A slot of `out` may be the same token's slot of `base` and `target`, and no other.
pub fn fuse(queue: &Queue, p: FuseParams, operands: &FuseOperands) -> Result<(), ShapeError> {
    const OP: &str = "fuse";
    let o = operands;
    let tokens = p.tokens as usize;
    o.source.check(OP, "source.keys", "source.values")?;
    o.target.check(OP, "target.keys", "target.values")?;
    let dims = o.target.keys.shape().to_vec();
    for (name, pages) in [("base.keys", &o.base), ("out.keys", &o.out)] {
        pages.check(OP, name, name)?;
        let dims = [pages.blocks(), dims[1], dims[2], dims[3]];
        check(OP, name, &pages.keys, &[o.target.keys.dtype()], &dims)?;
    }
    let slots = [
        ("source_slots", &o.source_slots),
        ("target_slots", &o.target_slots),
        ("base_slots", &o.base_slots),
        ("out_slots", &o.out_slots),
    ];
    for (name, slots) in slots {
        check(OP, name, slots, &[DType::U32], &[tokens])?;
    }
    let (source_width, target_width) = (o.source.width(), o.target.width());
    for projector in [&o.keys, &o.values] {
        check_projector(projector, p.use_target, source_width, target_width, o.target.kv_heads())?;
        let need = fuse_scratch_len(projector, tokens, source_width, target_width, o.target.kv_heads());
        if o.scratch.dtype() != DType::F32 || o.scratch.elements() < need {
            return Err(ShapeError {
                op: OP,
                operand: "scratch",
                found: format!("{:?}", o.scratch),
                expected: format!("F32[≥ {need}]"),
            });
        }
    }
    for (name, pages) in [("source", &o.source), ("target", &o.target), ("base", &o.base), ("out", &o.out)] {
        check_apart(OP, &o.scratch, &[(name, &pages.keys), (name, &pages.values)])?;
    }
    queue.backend().fuse(queue.id(), p, operands);
    Ok(())
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
    weight("input", &p.input, hidden, input)?;
    ffn("mlp1", &p.mlp1, hidden)?;
    if let Some((block, head)) = &p.scalar {
        ffn("scalar", block, hidden)?;
        weight("scalar_head", head, kv_heads, hidden)?;
    }
    for block in &p.blocks {
        ffn("blocks", block, hidden)?;
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
    for part in &weight.parts {
        check("fuse", operand, &part.matrix, &DType::ALL, &[part.matrix.rows(), cols])?;
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
