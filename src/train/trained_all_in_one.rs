//! An AllInOneProjector in training. Its gate is one number a layer, for keys and values alike, with noise for each element.

use super::{
    Error, FuseRequest, TrainedFuser,
    trained_fuser::{FusedColumns, soft_gate},
};
use crate::{
    backend::{DType, Queue, Tensor},
    fuser::{Body, Fuser, FuserError},
    ops::{
        self, AllInOne, Baseline, BaselineGrads, BaselineLayer, BaselineOperands, BaselineTape,
        BaselineTraining, KvPages,
    },
};
use std::sync::Arc;

/// What a forward pass leaves.
pub(super) struct AllInOneColumns {
    params: BaselineTraining,
    layers: Vec<FusedLayer>,
}

struct FusedLayer {
    layer: usize,
    projector: usize,
    operands: BaselineLayer,
    tape: BaselineTape,
    dgates: Tensor,
    /// `∂gate/∂logit` of each element.
    slopes: Vec<f32>,
}

const GATE: &str = "gate_logit";

fn body(fuser: &Fuser, projector: usize) -> Result<&Arc<AllInOne>, Error> {
    match &fuser.projectors()[projector].body {
        Body::AllInOne(body) => Ok(body),
        _ => Err(FuserError::Untrainable { kind: fuser.config().kind }.into()),
    }
}

impl AllInOneColumns {
    pub fn has(&self, layer: usize) -> bool {
        self.layers.iter().any(|fused| fused.layer == layer)
    }
}

impl TrainedFuser {
    pub(super) fn forward_all_in_one(
        &self,
        queue: &Queue,
        request: &FuseRequest,
    ) -> Result<AllInOneColumns, Error> {
        let (tokens, backend) = (request.target_slots.elements(), queue.backend());
        let config = self.fuser.config();
        let (source, target) = (config.sharer.width(), config.receiver.width());
        let params = BaselineTraining {
            precision: request.precision,
            dropout: request.dropout,
            seed: request.seed,
            step: request.step,
        };
        let mut layers = Vec::new();
        for call in request.layers {
            let Some(route) = self.fuser.route(call.layer) else { continue };
            let logit = queue.download_f32(&self.fuser.projectors()[route.projector].tensors()[GATE])?[0];
            let (mut gates, mut slopes) = (vec![0.0f32; tokens * target], vec![0.0f32; tokens * target]);
            request.noise.fill(call.layer, 0, &mut gates);
            for (u, slope) in gates.iter_mut().zip(&mut slopes) {
                (*u, *slope) = soft_gate(logit, *u, self.temperature);
            }
            let alloc = |dims: &[usize], what: &str| backend.alloc(DType::F32, dims, what);
            layers.push(FusedLayer {
                layer: call.layer,
                projector: route.projector,
                operands: BaselineLayer {
                    projector: Baseline::AllInOne(body(&self.fuser, route.projector)?.clone()),
                    gates: [1.0; 2],
                    source: call.source.clone(),
                    target: call.target.clone(),
                    base: call.base.clone(),
                    out: call.out.clone(),
                },
                tape: BaselineTape {
                    layer: call.layer as u32,
                    gates: queue.tensor(&gates, &[tokens, target], "gates")?,
                    inputs: alloc(&[2 * tokens * (source + target)], "columns that the fuser read")?,
                },
                dgates: alloc(&[tokens, target], "gradients of gates")?,
                slopes,
            });
        }
        let columns = AllInOneColumns { params, layers };
        let all: Vec<&FusedLayer> = columns.layers.iter().collect();
        let (operands, tapes) = operands(&all, &request.source_slots, &request.target_slots);
        ops::fuse_baseline_forward(queue, tokens, params, &operands, &tapes)?;
        Ok(columns)
    }

    pub(super) fn backward_all_in_one(
        &self,
        queue: &Queue,
        fused: &FusedColumns,
        columns: &AllInOneColumns,
        of: &[usize],
        dkv: impl Fn(usize) -> KvPages,
        through: bool,
    ) -> Result<(), Error> {
        let layers: Vec<&FusedLayer> = columns.layers.iter().filter(|l| of.contains(&l.layer)).collect();
        let mut grads = Vec::new();
        for layer in &layers {
            let pages = dkv(layer.layer);
            grads.push(BaselineGrads {
                projector: body(&self.grads, layer.projector)?.clone(),
                dtarget: through.then(|| pages.clone()),
                dout: pages,
                dgates: layer.dgates.clone(),
            });
        }
        let (source_slots, target_slots) = fused.slots();
        let (operands, tapes) = operands(&layers, source_slots, target_slots);
        let tokens = target_slots.elements();
        Ok(ops::fuse_baseline_backward(queue, tokens, columns.params, &operands, &tapes, &grads)?)
    }

    /// Adds the gradients of the gates' logits, which are parameters.
    pub(super) fn gates_backward_all_in_one(
        &self,
        queue: &Queue,
        columns: &AllInOneColumns,
    ) -> Result<(), Error> {
        for layer in &columns.layers {
            let dgates = queue.download_f32(&layer.dgates)?;
            let products = dgates.iter().zip(&layer.slopes).map(|(d, s)| f64::from(*d) * f64::from(*s));
            let grad = &self.grads.projectors()[layer.projector].tensors()[GATE];
            let sum = queue.download_f32(grad)?[0] + products.sum::<f64>() as f32;
            queue.upload(&[sum], grad);
        }
        Ok(())
    }
}

fn operands(
    layers: &[&FusedLayer],
    source_slots: &Tensor,
    target_slots: &Tensor,
) -> (BaselineOperands, Vec<BaselineTape>) {
    let operands = BaselineOperands {
        layers: layers.iter().map(|layer| layer.operands.clone()).collect(),
        source_slots: source_slots.clone(),
        target_slots: target_slots.clone(),
        base_slots: target_slots.clone(),
        out_slots: target_slots.clone(),
    };
    (operands, layers.iter().map(|layer| layer.tape.clone()).collect())
}
