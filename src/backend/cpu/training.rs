//! The ops of training on a CPU: each is issued as its forward is.

use super::{Cpu, attention, dropout, fuse_training, linear, optimizer, pointwise_backward, rope_backward};
use crate::{
    backend::{Communicator, Error, Tensor, Training},
    ops,
};

impl Training for Cpu {
    fn zero(&self, queue: usize, x: &Tensor) {
        let x = x.clone();
        self.executor.issue(queue, move |team| {
            team.chunks_mut(x.host_bytes_mut(), 1 << 20, |_, part| part.fill(0));
        });
    }

    fn linear_backward_input(
        &self,
        queue: usize,
        p: ops::LinearBackwardParams,
        dy: &Tensor,
        weight: &ops::Weight,
        dx: &Tensor,
    ) {
        let (simd, dy, weight, dx) = (self.simd, dy.clone(), weight.clone(), dx.clone());
        self.executor.issue(queue, move |team| {
            linear::backward::input(team, simd, p, dy.host(), &weight, dx.host_mut())
        });
    }

    fn linear_backward_weight(
        &self,
        queue: usize,
        p: ops::LinearBackwardParams,
        dy: &Tensor,
        x: &Tensor,
        grad: &ops::Weight,
    ) {
        let (simd, dy, x, grad) = (self.simd, dy.clone(), x.clone(), grad.clone());
        self.executor
            .issue(queue, move |team| linear::backward::weight(team, simd, p, dy.host(), x.host(), &grad));
    }

    fn rms_norm_backward(
        &self,
        queue: usize,
        p: ops::RmsNormParams,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        dweight: Option<&Tensor>,
    ) {
        let (simd, x, weight, dy) = (self.simd, x.clone(), weight.clone(), dy.clone());
        let (dx, dweight) = (dx.clone(), dweight.cloned());
        self.executor.issue(queue, move |team| {
            pointwise_backward::rms_norm(team, simd, p, &x, &weight, &dy, &dx, dweight.as_ref())
        });
    }

    fn glu(&self, queue: usize, activation: ops::Activation, gate_up: &Tensor, out: &Tensor) {
        let (simd, gate_up, out) = (self.simd, gate_up.clone(), out.clone());
        self.executor
            .issue(queue, move |team| super::pointwise::glu(team, simd, activation, gate_up.host(), &out));
    }

    fn glu_backward(
        &self,
        queue: usize,
        activation: ops::Activation,
        gate_up: &Tensor,
        dout: &Tensor,
        dgate_up: &Tensor,
    ) {
        let (simd, gate_up, dout, dgate_up) = (self.simd, gate_up.clone(), dout.clone(), dgate_up.clone());
        self.executor.issue(queue, move |team| {
            pointwise_backward::glu(team, simd, activation, &gate_up, &dout, &dgate_up)
        });
    }

    fn embed_backward(
        &self,
        queue: usize,
        p: ops::EmbedParams,
        ids: &Tensor,
        dout: &Tensor,
        dtable: &Tensor,
    ) {
        let (ids, dout, dtable) = (ids.clone(), dout.clone(), dtable.clone());
        self.executor.issue(queue, move |_| pointwise_backward::embed(p, &ids, &dout, &dtable));
    }

    fn rope_backward(&self, queue: usize, p: ops::RopeParams, operands: &ops::RopeBackwardOperands) {
        let (simd, operands) = (self.simd, operands.clone());
        self.executor.issue(queue, move |team| rope_backward::rope_backward(team, simd, p, &operands));
    }

    fn attention_backward(
        &self,
        queue: usize,
        p: ops::AttentionParams,
        forward: &ops::AttentionOperands,
        grads: &ops::AttentionGrads,
    ) {
        let (simd, forward, grads) = (self.simd, forward.clone(), grads.clone());
        self.executor.issue(queue, move |team| {
            attention::backward::attention_backward(team, simd, p, &forward, &grads)
        });
    }

    fn cross_entropy(
        &self,
        queue: usize,
        p: ops::CrossEntropyParams,
        logits: &Tensor,
        labels: &Tensor,
        loss: &Tensor,
    ) {
        let (simd, logits, labels, loss) = (self.simd, logits.clone(), labels.clone(), loss.clone());
        self.executor.issue(queue, move |team| {
            pointwise_backward::cross_entropy(team, simd, p, &logits, &labels, &loss)
        });
    }

    fn fuse_forward(
        &self,
        queue: usize,
        p: ops::FuseTrainingParams,
        _: ops::FuseExtent,
        operands: &ops::FuseOperands,
        tapes: &[ops::FuseTape],
    ) {
        let (simd, operands, tapes) = (self.simd, operands.clone(), tapes.to_vec());
        self.executor.issue(queue, move |team| fuse_training::forward(team, simd, p, &operands, &tapes));
    }

    fn fuse_backward(
        &self,
        queue: usize,
        p: ops::FuseTrainingParams,
        _: ops::FuseExtent,
        operands: &ops::FuseOperands,
        tapes: &[ops::FuseTape],
        grads: &[ops::FuseGrads],
    ) {
        let (simd, operands) = (self.simd, operands.clone());
        let (tapes, grads) = (tapes.to_vec(), grads.to_vec());
        self.executor
            .issue(queue, move |team| fuse_training::backward(team, simd, p, &operands, &tapes, &grads));
    }

    fn adamw(
        &self,
        queue: usize,
        p: ops::AdamwParams,
        weights: &Tensor,
        grad: &Tensor,
        m: &Tensor,
        v: &Tensor,
    ) {
        let (simd, weights, grad, m, v) = (self.simd, weights.clone(), grad.clone(), m.clone(), v.clone());
        self.executor.issue(queue, move |team| optimizer::adamw(team, simd, p, &weights, &grad, &m, &v));
    }

    fn dropout(&self, queue: usize, p: ops::DropoutParams, x: &Tensor, out: &Tensor) {
        let (x, out) = (x.clone(), out.clone());
        self.executor.issue(queue, move |team| dropout::dropout(team, p, &x, &out));
    }

    fn sum_of_squares(&self, queue: usize, x: &Tensor, out: &Tensor) {
        let (simd, x, out) = (self.simd, x.clone(), out.clone());
        self.executor.issue(queue, move |team| optimizer::sum_of_squares(team, simd, &x, &out));
    }

    /// Processes on CPUs add up on their connections.
    fn communicator(
        &self,
        _queue: usize,
        _rank: usize,
        _count: usize,
        _exchange: &mut dyn FnMut(&mut [u8]),
    ) -> Result<Option<Box<dyn Communicator>>, Error> {
        Ok(None)
    }
}
