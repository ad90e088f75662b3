//! The fuser in training: gates are numbers between 0 and 1, FFN branches are dropped, activations are kept; and its backward.
//!
//! Derivation in docs/math.md ("Backward of the fuser").

use super::{
    FuseOperands, FuseParams, KvPages, Projector, Scratch, ShapeError, Weight, check, check_apart,
    fuse::{check_fuse, check_joint},
    scratch::check_scratch,
    training,
};
use crate::backend::{DType, Queue, Tensor};
use std::sync::Arc;

#[derive(Clone, Copy, Debug)]
pub struct FuseTrainingParams {
    pub fuse: FuseParams,
    /// Probability that an element of an FFN branch is dropped; the others are scaled by `1 / (1 − dropout)`.
    pub dropout: f32,
    /// Of the dropped elements: [`crate::rng::Rng`] of this seed, stream [`dropout_part`] and step; the index is
    /// `token · hidden + column`, an element is dropped where its uniform number is below `dropout`.
    pub seed: u64,
    pub step: u32,
}

/// Stream of dropped elements: layer, keys (0) or values (1), and which FFN block: 0 the source stage's, 1 `mlp1`, 2 the
/// scalar's, 3 and on `blocks`.
pub fn dropout_part(layer: u32, half: u32, block: u32) -> u32 {
    layer << 8 | half << 7 | block
}

/// What a layer's forward pass leaves for its backward.
#[derive(Clone, Debug)]
pub struct FuseTape {
    /// Number of the receiver layer, for [`dropout_part`].
    pub layer: u32,
    /// F32`[2, tokens, kv_heads]`: factors of the projections of keys and of values. [`super::FuseLayer::gates`] are not read.
    pub gates: Tensor,
    /// F32, see [`Scratch::FuseSaved`].
    pub saved: Tensor,
}

/// Gradients of one layer.
#[derive(Clone, Debug)]
pub struct FuseGrads {
    /// F32 tensors in the shapes of the weights, added to.
    pub keys: Arc<Projector>,
    pub values: Arc<Projector>,
    /// F32 pages like `out`: the gradients of the fused columns, read at `out_slots`.
    pub dout: KvPages,
    /// F32 pages like `target`: the gradients of what the projector read from the receiver are added at `target_slots` (not those
    /// through `base`, which are `dout` itself). `None`: nobody wants them. May be the pages of `dout`.
    pub dtarget: Option<KvPages>,
    /// F32`[2, tokens, kv_heads]`, assigned: gradients of [`FuseTape::gates`].
    pub dgates: Tensor,
}

fn check_tapes(
    op: &'static str,
    queue: &Queue,
    o: &FuseOperands,
    p: FuseTrainingParams,
    tapes: &[FuseTape],
) -> Result<super::FuseExtent, ShapeError> {
    let tokens = p.fuse.tokens as usize;
    let extent = check_fuse(op, p.fuse, o)?.unwrap_or_default();
    check_joint(op, queue, extent)?;
    if tapes.len() != o.layers.len() || !(0.0..1.0).contains(&p.dropout) {
        return Err(ShapeError {
            op,
            operand: "tapes",
            found: format!("{} tapes, dropout {}", tapes.len(), p.dropout),
            expected: format!("{} tapes, dropout in 0..1", o.layers.len()),
        });
    }
    let saved = queue.backend().scratch_len(Scratch::FuseSaved(super::FuseExtent { layers: 1, ..extent }));
    for tape in tapes {
        check(op, "gates", &tape.gates, &[DType::F32], &[2, tokens, extent.kv_heads])?;
        if tape.saved.dtype() != DType::F32 || tape.saved.elements() < saved {
            return Err(ShapeError {
                op,
                operand: "saved",
                found: format!("{:?}", tape.saved),
                expected: format!("F32[≥ {saved}]"),
            });
        }
        check_apart(op, &tape.saved, &[("gates", &tape.gates), ("scratch", &o.scratch)])?;
    }
    Ok(extent)
}

/// [`super::fuse`] with a gate per token and head, keeping what [`fuse_backward`] needs. `operands.scratch`: [`Scratch::Fuse`].
pub fn fuse_forward(
    queue: &Queue,
    p: FuseTrainingParams,
    operands: &FuseOperands,
    tapes: &[FuseTape],
) -> Result<(), ShapeError> {
    const OP: &str = "fuse_forward";
    let extent = check_tapes(OP, queue, operands, p, tapes)?;
    check_scratch(OP, queue, &operands.scratch, Scratch::Fuse(extent))?;
    if !operands.layers.is_empty() {
        training(OP, queue)?.fuse_forward(queue.id(), p, extent, operands, tapes);
    }
    Ok(())
}

/// Backward of [`fuse_forward`] from the same operands and tapes; the pages themselves are not read again, except that
/// `operands.scratch` is [`Scratch::FuseBackward`]. With several layers, `dout` and `dtarget` of one layer are no other's.
pub fn fuse_backward(
    queue: &Queue,
    p: FuseTrainingParams,
    operands: &FuseOperands,
    tapes: &[FuseTape],
    grads: &[FuseGrads],
) -> Result<(), ShapeError> {
    const OP: &str = "fuse_backward";
    let extent = check_tapes(OP, queue, operands, p, tapes)?;
    check_scratch(OP, queue, &operands.scratch, Scratch::FuseBackward(extent))?;
    if grads.len() != tapes.len() {
        return Err(ShapeError {
            op: OP,
            operand: "grads",
            found: format!("{} layers", grads.len()),
            expected: format!("{}", tapes.len()),
        });
    }
    for (layer, grads) in operands.layers.iter().zip(grads) {
        check(OP, "dgates", &grads.dgates, &[DType::F32], &[2, p.fuse.tokens as usize, extent.kv_heads])?;
        let geometry = |pages: &KvPages| [pages.kv_heads(), pages.block_size(), pages.head_dim()];
        for (name, pages, like) in
            [("dout", Some(&grads.dout), &layer.out), ("dtarget", grads.dtarget.as_ref(), &layer.target)]
        {
            let Some(pages) = pages else { continue };
            pages.check(OP, name, name)?;
            if geometry(pages) != geometry(like)
                || pages.keys.dtype() != DType::F32
                || pages.blocks() < like.blocks()
            {
                return Err(ShapeError {
                    op: OP,
                    operand: name,
                    found: format!("{:?}", pages.keys),
                    expected: format!("F32 pages like {:?}", like.keys),
                });
            }
        }
        for (weights, grads) in [(&layer.keys, &grads.keys), (&layer.values, &grads.values)] {
            check_grads(OP, weights, grads)?;
        }
    }
    if !operands.layers.is_empty() {
        training(OP, queue)?.fuse_backward(queue.id(), p, extent, operands, tapes, grads);
    }
    Ok(())
}

fn check_grads(op: &'static str, weights: &Projector, grads: &Projector) -> Result<(), ShapeError> {
    let (weights, grads) = (weights.tensors(), grads.tensors());
    let same = weights.len() == grads.len()
        && weights.iter().zip(&grads).all(|(w, g)| w.shape() == g.shape() && g.dtype() == DType::F32);
    if same {
        return Ok(());
    }
    Err(ShapeError {
        op,
        operand: "grads",
        found: format!("{grads:?}"),
        expected: format!("F32 tensors shaped as {weights:?}"),
    })
}

impl Projector {
    /// Every tensor, in a fixed order.
    fn tensors(&self) -> Vec<&Tensor> {
        fn linear(weight: &Weight) -> impl Iterator<Item = &Tensor> {
            weight.parts.iter().flat_map(|part| [&part.matrix].into_iter().chain(&part.bias))
        }
        let mut all = Vec::new();
        if let Some(stage) = &self.source_stage {
            all.extend(linear(&stage.input));
            all.push(&stage.ffn.norm);
            all.extend(linear(&stage.ffn.w1).chain(linear(&stage.ffn.w2)));
            all.extend(linear(&stage.output));
        }
        all.extend(linear(&self.input));
        let ffns = [&self.mlp1].into_iter().chain(self.scalar.iter().map(|(ffn, _)| ffn)).chain(&self.blocks);
        for ffn in ffns {
            all.push(&ffn.norm);
            all.extend(linear(&ffn.w1).chain(linear(&ffn.w2)));
        }
        all.extend(self.scalar.iter().flat_map(|(_, head)| linear(head)));
        all.extend(linear(&self.output));
        all
    }
}
