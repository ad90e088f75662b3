//! The ops of training: backward of the vocabulary, the loss, the optimiser.

use super::{Error, Tensor};
use crate::ops;

/// A device that trains. One method per op; operands are described at the op's function in [`crate::ops`], which checks them
/// and is the only caller. Sums are added up in a fixed order: two runs are bit-identical.
pub trait Training {
    /// Every byte 0.
    fn zero(&self, queue: usize, x: &Tensor);
    fn linear_backward_input(
        &self,
        queue: usize,
        p: ops::LinearBackwardParams,
        dy: &Tensor,
        weight: &ops::Weight,
        dx: &Tensor,
    );
    fn linear_backward_weight(
        &self,
        queue: usize,
        p: ops::LinearBackwardParams,
        dy: &Tensor,
        x: &Tensor,
        grad: &ops::Weight,
    );
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_backward(
        &self,
        queue: usize,
        p: ops::RmsNormParams,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        dweight: Option<&Tensor>,
    );
    fn glu(&self, queue: usize, activation: ops::Activation, gate_up: &Tensor, out: &Tensor);
    fn glu_backward(
        &self,
        queue: usize,
        activation: ops::Activation,
        gate_up: &Tensor,
        dout: &Tensor,
        dgate_up: &Tensor,
    );
    fn embed_backward(&self, queue: usize, p: ops::EmbedParams, ids: &Tensor, dout: &Tensor, dtable: &Tensor);
    fn rope_backward(&self, queue: usize, p: ops::RopeParams, operands: &ops::RopeBackwardOperands);
    fn attention_backward(
        &self,
        queue: usize,
        p: ops::AttentionParams,
        forward: &ops::AttentionOperands,
        grads: &ops::AttentionGrads,
    );
    fn cross_entropy(
        &self,
        queue: usize,
        p: ops::CrossEntropyParams,
        logits: &Tensor,
        labels: &Tensor,
        loss: &Tensor,
    );
    fn fuse_forward(
        &self,
        queue: usize,
        p: ops::FuseTrainingParams,
        extent: ops::FuseExtent,
        operands: &ops::FuseOperands,
        tapes: &[ops::FuseTape],
    );
    fn fuse_backward(
        &self,
        queue: usize,
        p: ops::FuseTrainingParams,
        extent: ops::FuseExtent,
        operands: &ops::FuseOperands,
        tapes: &[ops::FuseTape],
        grads: &[ops::FuseGrads],
    );
    fn adamw(
        &self,
        queue: usize,
        p: ops::AdamwParams,
        weights: &Tensor,
        grad: &Tensor,
        m: &Tensor,
        v: &Tensor,
    );
    fn dropout(&self, queue: usize, p: ops::DropoutParams, x: &Tensor, out: &Tensor);
    fn sum_of_squares(&self, queue: usize, x: &Tensor, out: &Tensor);

    /// What adds up tensors over the devices of `count` processes, of which this is number `rank`, on a queue; `None` where that goes
    /// through the host. All processes call it at once; `exchange` gives all of them rank 0's bytes.
    ///
    /// # Errors
    /// If the devices would have to add up on their own and cannot.
    fn communicator(
        &self,
        queue: usize,
        rank: usize,
        count: usize,
        exchange: &mut dyn FnMut(&mut [u8]),
    ) -> Result<Option<Box<dyn Communicator>>, Error>;
}

/// Devices of several processes that add up.
pub trait Communicator {
    /// Replaces an F32 tensor by the sum over all processes, in the order of the queue that was named at the start. All processes call it
    /// with tensors of the same length, in the same order.
    fn sum(&self, tensor: &Tensor) -> Result<(), Error>;
}
