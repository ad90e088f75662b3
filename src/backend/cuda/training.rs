//! The ops of training on a GPU: each becomes its launches.

use super::{
    Cuda, adamw, attention_backward, cross_entropy, dropout, embed, fuse_training, glu, linear_backward,
    nccl, norm_backward, rope_backward, sums,
};
use crate::{
    backend::{Backend, Communicator, DType, Error, Tensor, Training},
    ops,
};
use cudarc::driver::result;

impl Cuda {
    /// F32 elements for what one launch of an op leaves to the next. They are given back when all have been issued: the arena hands them out
    /// again once the stream has passed. Without memory nothing is issued, and the next wait tells why.
    fn partials(&self, len: usize) -> Option<Tensor> {
        match self.alloc(DType::F32, &[len], "partial sums") {
            Ok(tensor) => Some(tensor),
            Err(error) => {
                let failure = ("allocating partial sums".into(), error.to_string());
                self.lock().failure.get_or_insert(failure);
                None
            }
        }
    }

    fn sum_rows(&self, queue: usize, x: u64, rows: usize, stride: usize, out: &Tensor) {
        let (launch, args) = sums::sum_rows(x, rows, stride, out);
        self.launch(queue, &launch, &args);
    }

    /// Sends a fuser's table of operands to the start of its scratch memory, then issues its launches.
    fn run_fuser(&self, queue: usize, plan: &fuse_training::Plan, scratch: &Tensor) {
        let stream = self.stream(queue);
        self.issue(
            || "uploading the fuser's table".into(),
            || self.staging.upload(&stream, &plan.table, scratch.address()),
        );
        plan.launches.iter().for_each(|(launch, args)| self.launch(queue, launch, args));
    }
}

impl Training for Cuda {
    fn zero(&self, queue: usize, x: &Tensor) {
        let stream = self.stream(queue);
        self.issue(
            || format!("clearing {x:?}"),
            || {
                self.context.bind_to_thread()?;
                // SAFETY: the bytes are those of the tensor, whose memory outlives what was issued on the stream.
                unsafe { result::memset_d8_async(x.address(), 0, x.bytes(), stream.cu_stream()) }
            },
        );
    }

    fn linear_backward_input(
        &self,
        queue: usize,
        p: ops::LinearBackwardParams,
        dy: &Tensor,
        weight: &ops::Weight,
        dx: &Tensor,
    ) {
        let launches = linear_backward::input(p, dy, weight, dx);
        launches.iter().for_each(|(launch, args)| self.launch(queue, launch, args));
    }

    fn linear_backward_weight(
        &self,
        queue: usize,
        p: ops::LinearBackwardParams,
        dy: &Tensor,
        x: &Tensor,
        grad: &ops::Weight,
    ) {
        let launches = linear_backward::weight(p, dy, x, grad);
        launches.iter().for_each(|(launch, args)| self.launch(queue, launch, args));
        for (column, part) in linear_backward::columns(grad) {
            if let Some(bias) = &part.bias {
                let first = dy.address() + 4 * u64::from(column);
                self.sum_rows(queue, first, p.tokens as usize, dy.row_len(), bias);
            }
        }
    }

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
    ) {
        let Some(dweight) = dweight else {
            let (launch, args) = norm_backward::rms_norm_backward(p, x, weight, dy, dx, None);
            return self.launch(queue, &launch, &args);
        };
        let (rows, cols) = (norm_backward::blocks(p.rows) as usize, p.cols as usize);
        let Some(partials) = self.partials(rows * cols) else { return };
        let (launch, args) = norm_backward::rms_norm_backward(p, x, weight, dy, dx, Some(&partials));
        self.launch(queue, &launch, &args);
        self.sum_rows(queue, partials.address(), rows, cols, dweight);
    }

    fn glu(&self, queue: usize, activation: ops::Activation, gate_up: &Tensor, out: &Tensor) {
        let (launch, args) = glu::glu(activation, gate_up, out);
        self.launch(queue, &launch, &args);
    }

    fn glu_backward(
        &self,
        queue: usize,
        activation: ops::Activation,
        gate_up: &Tensor,
        dout: &Tensor,
        dgate_up: &Tensor,
    ) {
        let (launch, args) = glu::glu_backward(activation, gate_up, dout, dgate_up);
        self.launch(queue, &launch, &args);
    }

    fn embed_backward(
        &self,
        queue: usize,
        p: ops::EmbedParams,
        ids: &Tensor,
        dout: &Tensor,
        dtable: &Tensor,
    ) {
        let (launch, args) = embed::embed_backward(p, ids, dout, dtable);
        self.launch(queue, &launch, &args);
    }

    fn rope_backward(&self, queue: usize, p: ops::RopeParams, operands: &ops::RopeBackwardOperands) {
        let rows = rope_backward::partial_rows(p);
        let grads = [&operands.dq_norm, &operands.dk_norm];
        let mut partials = [None, None];
        for ((partials, rows), grad) in partials.iter_mut().zip(rows).zip(grads) {
            if grad.is_some() {
                *partials = self.partials(rows * p.head_dim as usize);
                if partials.is_none() {
                    return;
                }
            }
        }
        let (launch, args) =
            rope_backward::rope_backward(p, operands, [partials[0].as_ref(), partials[1].as_ref()]);
        self.launch(queue, &launch, &args);
        for ((partials, rows), grad) in partials.iter().zip(rows).zip(grads) {
            if let (Some(partials), Some(grad)) = (partials, grad) {
                self.sum_rows(queue, partials.address(), rows, p.head_dim as usize, grad);
            }
        }
    }

    fn attention_backward(
        &self,
        queue: usize,
        p: ops::AttentionParams,
        forward: &ops::AttentionOperands,
        grads: &ops::AttentionGrads,
    ) {
        let (launches, args) = attention_backward::attention_backward(p, forward, grads);
        launches.iter().for_each(|launch| self.launch(queue, launch, &args));
    }

    fn cross_entropy(
        &self,
        queue: usize,
        p: ops::CrossEntropyParams,
        logits: &Tensor,
        labels: &Tensor,
        loss: &Tensor,
    ) {
        let (launch, args) = cross_entropy::cross_entropy(p, logits, labels, loss);
        self.launch(queue, &launch, &args);
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
        let (launch, args) = adamw::adamw(p, weights, grad, m, v);
        self.launch(queue, &launch, &args);
    }

    fn dropout(&self, queue: usize, p: ops::DropoutParams, x: &Tensor, out: &Tensor) {
        let (launch, args) = dropout::dropout(p, x, out);
        self.launch(queue, &launch, &args);
    }

    fn sum_of_squares(&self, queue: usize, x: &Tensor, out: &Tensor) {
        let Some(partials) = self.partials(sums::SQUARES_BLOCKS as usize) else { return };
        let (launches, args) = sums::sum_of_squares(x, &partials, out);
        launches.iter().for_each(|launch| self.launch(queue, launch, &args));
    }

    fn fuse_forward(
        &self,
        queue: usize,
        p: ops::FuseTrainingParams,
        extent: ops::FuseExtent,
        operands: &ops::FuseOperands,
        tapes: &[ops::FuseTape],
    ) {
        self.run_fuser(queue, &fuse_training::forward(p, extent, operands, tapes), &operands.scratch);
    }

    fn fuse_backward(
        &self,
        queue: usize,
        p: ops::FuseTrainingParams,
        extent: ops::FuseExtent,
        operands: &ops::FuseOperands,
        tapes: &[ops::FuseTape],
        grads: &[ops::FuseGrads],
    ) {
        let plans = fuse_training::backward(p, extent, operands, tapes, grads);
        plans.iter().for_each(|plan| self.run_fuser(queue, plan, &operands.scratch));
    }

    fn communicator(
        &self,
        queue: usize,
        rank: usize,
        count: usize,
        exchange: &mut dyn FnMut(&mut [u8]),
    ) -> Result<Option<Box<dyn Communicator>>, Error> {
        nccl::join(self, queue, rank, count, exchange)
    }
}
